"""Upload a model or dictionaries to the hub, with a card: ``upload``."""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilinear_jax.store.checkpoint import MODEL_FORMAT, training_line
from bilinear_jax.store.choice import Wanted
from bilinear_jax.store.dictionaries import OURS, Found, described, find_dictionaries
from bilinear_jax.store.files import read_json
from bilinear_jax.store.sources import is_unreachable, local_folder, repository_files
from weights_convert.files import inside, weight_files

CARD = "README.md"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def upload(folder: str | Path, repo: str, *, private: bool = False, license: str | None = None) -> str:
    """Upload the folder of a model, or of dictionaries, to the hub, into a new repository or one that is there.

    A card (README.md) is written from what the files say: config, training, scores. If the folder or the repository has
    one already, that stays. The folder itself is not changed. A single dictionary goes into a folder of its name.
    Hidden files are left out. ``bj.load`` or ``bj.load_dictionary`` of the repository loads it again.

    Args:
        folder: a model that ``save_model`` wrote, in the published layout, or of a known family; or a ``-scope`` or any
            other folder that ``load_dictionary`` reads.
        repo: the name on the hub, "owner/name".
        private: make a new repository private. It does not change one that is there.
        license: the identifier of a license for the card, such as "mit". None: "unknown".

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it holds neither a model nor dictionaries, if a link leads out of it, or if ``repo`` or
            ``license`` is no such name. Nothing is uploaded then.
        PermissionError: if there is no token, or if the hub refuses it.
        ConnectionError: if the hub cannot be reached.
        OSError: if the hub refuses the files. The message has its reason.
    """
    from huggingface_hub import HfApi, constants, get_token

    if not _REPOSITORY.fullmatch(repo):
        raise ValueError(f"repo is {repo!r}, but must be a name on the hub, owner/name")
    if license is not None and not _LICENSE.fullmatch(license):
        raise ValueError(f"license is {license!r}, but must be an identifier such as mit or apache-2.0")
    place = local_folder(folder)
    if place is None:
        raise FileNotFoundError(f"there is no folder {folder}: name one that holds a model or dictionaries")
    found = _found(place)
    single = Path(found.place).name if found.formats.get("") == OURS else None
    for path in place.rglob("*"):
        inside(place, path.relative_to(place).as_posix())
    if get_token() is None:
        raise PermissionError(f"no token to upload to {repo}: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if not (place / CARD).is_file() and CARD not in repository_files(repo):
            text = card(place, repo, license=license).encode()
            api.upload_file(path_or_fileobj=text, path_in_repo=CARD, repo_id=repo, commit_message="Add a card")
        api.upload_folder(
            repo_id=repo,
            folder_path=place,
            path_in_repo=single,
            commit_message=f"Upload {single or place.resolve().name}",
            ignore_patterns=[".*", "**/.*"],
        )
    except Exception as error:
        raise _explained(repo, constants.ENDPOINT, error) from error
    return str(url)


def card(folder: Path, repo: str, *, license: str | None = None) -> str:
    """The card of a model or of dictionaries for a repository, in Markdown."""
    record, found = read_json(folder / "config.json"), _found(folder)
    about = {name or Path(found.place).name: _about(found, name) for name in found.formats}
    names, is_model = list(about), record is not None and "" not in found.formats
    tags = ["bilinear", "interpretability", *([] if is_model else ["sparse-autoencoder"])]
    lines = [
        *("---", "library_name: bilinear_jax", f"license: {license or 'unknown'}", "tags:"),
        *(f"- {tag}" for tag in tags),
        *("---", "", f"# {repo.split('/')[1]}", ""),
    ]
    if record is not None and is_model:
        lines += [f"A model for `bilinear_jax`. Trained on: {training_line(folder / 'config.json')}.", ""]
        config = record["config"] if isinstance(record.get("config"), dict) else record
        lines += ["```json", json.dumps(config, indent=2).replace("`", "\\u0060"), "```", ""]
        lines += ["```python", "import bilinear_jax as bj", "", f'lm = bj.load("{repo}")', "```", ""]
    if names:
        lines += ["Dictionaries:" if is_model else "Dictionaries (SAEs and transcoders) for `bilinear_jax`.", ""]
        lines += [f"- `{name}`: {line}" for name, line in about.items()]
        lines += ["", "```python", "import bilinear_jax as bj", "", f'saes = bj.load_dictionaries("{repo}")', "```", ""]
    origin = (record or {}).get("origin")
    if isinstance(origin, dict) and isinstance(origin.get("source"), str) and not Path(origin["source"]).is_absolute():
        lines += [f"Converted from `{origin['source']}`.", ""]
    lines += _scores(folder, names)
    lines += [f"License: {license or 'unknown, as whoever uploaded this has not given one'}."]
    return "\n".join(lines) + "\n"


def _found(folder: Path) -> Found:
    """The dictionaries of a folder. Raises ``ValueError`` if there are none, and no model, or not all of one."""
    found = None
    with contextlib.suppress(FileNotFoundError):
        found = find_dictionaries(folder)
    if found is None or found.place != Path(os.path.abspath(folder)):  # they may be in the -scope beside a model
        found = Found(str(folder), folder, {})
    record = read_json(folder / "config.json")
    if "" not in found.formats and (record is not None or not found.formats) and not _has_model(folder, record):
        raise ValueError(f"{folder} holds neither a whole model nor dictionaries: name the folder of one")
    return found


def _has_model(folder: Path, record: Mapping[str, Any] | None) -> bool:
    if record is not None and record.get("format") == MODEL_FORMAT:
        return (folder / "params").is_dir()
    try:
        return any(folder.glob("*.gguf")) or (record is not None and bool(weight_files(folder)))
    except FileNotFoundError:
        return False


def _about(found: Found, name: str) -> str:
    """One line on a dictionary."""
    form = found.formats[name]
    try:
        parts = described(found._replace(formats={name: form}), Wanted())[name]
    except (ValueError, KeyError):  # its files do not say where it reads
        return f"in the format {form}"
    kind = "an SAE" if parts.target is None else f"a transcoder to {parts.target}"
    width = "" if parts.expansion is None else f"x{parts.expansion:g}, "
    trained = f"trained on {training_line(Path(found.place) / name / 'config.json')}" if form == OURS else f"of {form}"
    return f"{kind} that reads {parts.site} of layer {parts.layer}, {width}{parts.activation}; {trained}"


def _scores(folder: Path, names: list[str]) -> list[str]:
    """The scores in ``model.json`` and ``saes.json``, in the folder or, of a training run, beside it."""
    lines: list[str] = []
    for file in ("model.json", "saes.json"):
        for place in (folder, folder.resolve().parent):
            scores = read_json(place / file)
            own = {Path(name).name for name in names}
            if scores is None or (place != folder and not (folder.resolve().name == "model" or own & scores.keys())):
                continue
            tables = {key: value for key, value in scores.items() if isinstance(value, dict) and key in own}
            plain = {key: value for key, value in scores.items() if isinstance(value, int | float)}
            lines += [*(f"- {key}: {value:.5g}" for key, value in plain.items()), ""] if plain else []
            lines += _table(tables)
            break
    return ["Scores on held-out text:", "", *lines] if lines else []


def _table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows.values() for key, value in row.items() if _is_number(value)))
    if not columns:
        return []
    cells = [
        [name, *(f"{row[key]:.4g}" if _is_number(row.get(key)) else "" for key in columns)]
        for name, row in rows.items()
    ]
    lines = [["SAE", *columns], ["---"] * (len(columns) + 1), *cells]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _explained(repo: str, endpoint: str, error: Exception) -> Exception:
    """The error to raise for an error of the hub's client."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return PermissionError(
            f"the hub ({endpoint}) refuses to write {repo}: {reason}. Log in with `hf auth login`, with a token that "
            f"may write to {repo.split('/')[0]}"
        )
    if is_unreachable(error):
        return ConnectionError(
            f"the hub ({endpoint}) cannot be reached, so {repo} is not uploaded, or not all of it: do it again later"
        )
    if isinstance(error, FileNotFoundError | PermissionError | ValueError) and status is None:
        return error
    return OSError(f"{repo} could not be uploaded to the hub ({endpoint}): {reason}")
