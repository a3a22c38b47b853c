"""Where a model is: a built-in name, a folder, or a repository on the hub; and which SAEs it has.

A source is one of
- the name of a model that ships with the package: a folder in ``bilinear_jax/pretrained``;
- a folder, written by this library or laid out as the published checkpoints are;
- a hub name, "owner/name": only the files that are needed are fetched, once, into the hub's cache. The
  environment's ``HF_ENDPOINT`` and ``HF_HOME`` are respected.
"""

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from weights_convert.names import SAEName, sae_folders, sae_names_among

PRETRAINED = Path(__file__).parent / "pretrained"
"""The folder of the models that ship with the package."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "params/*", "tokenizer*.json")
_TORCH_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""What a model's folder may hold, and the files of old that are fetched only where there are no others."""


def builtin_names() -> list[str]:
    """The models that ship with the package."""
    if not PRETRAINED.is_dir():
        return []
    return sorted(entry.name for entry in PRETRAINED.iterdir() if (entry / "config.json").is_file())


def folder_of(source: str | Path, files: Sequence[str] = _MODEL_FILES) -> Path:
    """The folder that a source stands for; of a hub repository only ``files`` (patterns) are fetched.

    Raises ``FileNotFoundError`` for a source that doesn't exist, and ``ConnectionError`` where the hub can't be
    reached and what is asked for isn't in its cache; both list what can be loaded.
    """
    folder = _local(source)
    if folder is not None:
        return folder
    folder = _fetch(str(source), files)
    if files is _MODEL_FILES and not any(folder.glob("model*.safetensors")) and not (folder / "params").is_dir():
        folder = _fetch(str(source), [*files, *_TORCH_FILES])
    return folder


def dataset_folder(source: str | Path) -> Path:
    """The folder of a hub dataset's Parquet files; errors as of ``folder_of``."""
    if not _HUB_NAME.fullmatch(str(source)):
        raise FileNotFoundError(f"there is no file or folder {source}: name one, or a dataset of the hub, owner/name")
    return _fetch(str(source), ["*.parquet"], repo_type="dataset")


def sae_names(source: str | Path) -> list[str]:
    """The names of the SAEs of a source: of a model, or of its ``-scope``.

    Example:
        >>> sae_names("ts-nano")[0].count("-")
        4
    """
    return list(_scope(source)[1])


def list_saes(source: str | Path) -> list[SAEName]:
    """The SAEs of a source, of a model or of its ``-scope``: layer, site, expansion, k and tag of each.

    None of them is read, nor fetched from the hub. In the order of their layers; empty if there is none.

    Raises:
        FileNotFoundError: for a source that doesn't exist.
        ConnectionError: where the hub can't be reached and its cache doesn't hold the repository.

    Example:
        >>> import bilinear_jax as bj
        >>> bj.list_saes("ts-nano")[0]
        SAEName(layer=2, site='mlp_in', expansion=4, k=20, tag=None)
        >>> saes = [bj.load_sae("ts-nano", **name._asdict()) for name in bj.list_saes("ts-nano")]
    """
    return list(_scope(source)[1].values())


def sae_folder(source: str | Path, name: str) -> Path:
    """The folder of one SAE of a source; from the hub, this folder alone is fetched."""
    scope, names = _scope(source)
    if name not in names:
        raise FileNotFoundError(f"no SAE {name} in {source}; it holds: {', '.join(names) or 'none'}")
    return (scope if isinstance(scope, Path) else _fetch(scope, [f"{name}/*"])) / name


def find_sae(
    source: str | Path, site: str, layer: int | None, expansion: int | None, k: int | None, tag: str | None
) -> str:
    """The name of the one SAE that has these properties, None standing for any; without a ``tag``, untagged ones win.

    Raises ``FileNotFoundError`` if none has, and ``ValueError`` if several have; both list what the source holds.
    """
    for name, value in (("layer", layer), ("expansion", expansion), ("k", k)):
        if value is not None and not hasattr(value, "__index__"):
            raise ValueError(f"{name} is a whole number, got {value!r}")
    wanted = layer, site.replace("-", "_"), expansion, k, tag
    names = _scope(source)[1]
    found = [
        name
        for name, parts in names.items()
        if all(value is None or value == part for value, part in zip(wanted, parts, strict=True))
    ]
    untagged = [name for name in found if names[name].tag is None]
    found = untagged if tag is None and untagged else found
    if len(found) == 1:
        return found[0]
    asked = "-".join(
        f"{mark}{'*' if value is None else value}"
        for mark, value in zip(("", "", "x", "k"), (layer, site.replace("_", "-"), expansion, k), strict=True)
    )
    asked = f"{asked}-{tag}" if tag else asked
    if found:
        raise ValueError(f"{asked} fits several SAEs in {source}: {', '.join(found)}. Give layer, expansion, k and tag")
    raise FileNotFoundError(f"no SAE {asked} in {source}; it holds: {', '.join(names) or 'none'}")


def _local(source: str | Path) -> Path | None:
    """The folder of a built-in name or of a path, None for a hub name; raises if it is neither."""
    if isinstance(source, str) and source in builtin_names():
        return PRETRAINED / source
    path = Path(source).expanduser()
    if source == "":
        raise FileNotFoundError(f"the name of the model is empty. {_what_there_is()}")
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{source} is a file: name the folder that holds it")
    if isinstance(source, str) and _HUB_NAME.fullmatch(source) and not source.startswith("."):
        return None
    raise FileNotFoundError(f"no folder {source}, and no model of that name. {_what_there_is()}")


def _scope(source: str | Path) -> tuple[Path | str, dict[str, SAEName]]:
    """Where the SAEs of a source are, a folder or a hub name, and what they are called."""
    folder = _local(source)
    if folder is None:
        repository = str(source) if str(source).endswith("-scope") else f"{source}-scope"
        return repository, _remote_names(repository)
    resolved = folder.resolve()
    candidates = [folder, folder / "scope", resolved.with_name(f"{resolved.name}-scope")]
    for candidate in candidates:
        if names := sae_folders(candidate):
            return candidate, names
    return folder, {}


def _remote_names(repository: str) -> dict[str, SAEName]:
    """The SAE folders of a repository; those in the cache, where the hub can't be reached."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(repository).siblings or []  # list_repo_files tries again for a minute if offline
    except Exception as error:
        if not _is_unreachable(error):
            raise _explained(repository, error) from error
        for snapshot in _cached().get(repository, []):
            if names := sae_folders(snapshot):
                return names
        raise _explained(repository, error) from error
    files = [sibling.rfilename for sibling in siblings]
    return sae_names_among(file.removesuffix("/config.json") for file in files if file.count("/") == 1)


def _fetch(repository: str, files: Sequence[str], repo_type: str = "model") -> Path:
    """The folder with a repository's files, from the cache alone where the hub can't be reached."""
    from huggingface_hub import errors, snapshot_download

    fetch = functools.partial(snapshot_download, repository, repo_type=repo_type, allow_patterns=list(files))
    try:
        return Path(fetch())
    except Exception as error:
        if _is_unreachable(error):
            with contextlib.suppress(errors.LocalEntryNotFoundError):
                return Path(fetch(local_files_only=True))
        raise _explained(repository, error) from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether an error of the hub's client means that there was no answer, or none but a server's failure."""
    from huggingface_hub import errors

    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status >= 500
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            return True
        if error.__cause__ is None and isinstance(error, errors.LocalEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _explained(repository: str, error: Exception) -> Exception:
    """What to raise for an error of the hub's client."""
    from huggingface_hub import constants

    if _is_unreachable(error):
        return ConnectionError(
            f"the hub ({constants.ENDPOINT}) can't be reached, and {repository} isn't in its cache with all that is "
            f"needed; nor is there a folder of that name. {_what_there_is()}"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return FileNotFoundError(
        f"{repository} can't be had from the hub ({constants.ENDPOINT}): {reason}. Check the name, and whether it "
        f"needs a token (`hf auth login`); nor is there a folder of that name. {_what_there_is()}"
    )


def _what_there_is() -> str:
    cached = sorted(name for name, snapshots in _cached().items() if any(map(_is_ours, snapshots)))
    return (
        f"What can be loaded offline: built in: {', '.join(builtin_names()) or 'none'}; "
        f"from the hub's cache: {', '.join(cached) or 'none'}; and any folder with a model in it"
    )


def _cached() -> dict[str, list[Path]]:
    """The model repositories in the hub's cache, with their snapshots, the newest first."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    snapshots: dict[str, list[Path]] = {}
    for folder in cache.glob("models--*--*/snapshots/*"):
        name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        snapshots.setdefault(name, []).append(folder)
    return {name: sorted(found, key=os.path.getmtime, reverse=True) for name, found in snapshots.items()}


def _is_ours(snapshot: Path) -> bool:
    """Whether a cached repository holds a model of this architecture, or SAEs."""
    try:
        config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return bool(sae_folders(snapshot))
    return isinstance(config, dict) and ({"d_hidden", "n_ctx"} <= config.keys() or "format" in config)


class _Known(NamedTuple):
    """A tokenizer with which published models were trained."""

    repository: str
    bos_token: str
    eos_token: str
    pad_token: str
    begins: bool  # whether every text begins with the bos_token


_TOKENIZERS = {
    "ts-4096": _Known("tdooms/ts-tokenizer-4096", "[BOS]", "[EOS]", "[EOS]", begins=True),
    "mistral": _Known("mistral-community/Mixtral-8x22B-v0.1", "<s>", "</s>", "</s>", begins=True),
    "gpt2": _Known("openai-community/gpt2", *["<|endoftext|>"] * 3, begins=False),
}


@functools.lru_cache(maxsize=8)
def load_tokenizer(tokenizer_source: str | None, name: str | None):
    """A tokenizer as a ``transformers.PreTrainedTokenizerFast``; a second call with the same arguments is free.

    Args:
        tokenizer_source: a folder with ``tokenizer.json``, such a file, or a hub name. None: look up ``name``.
        name: of a known tokenizer ("ts-4096", "mistral", "gpt2"), fetched from the hub. The first two put their
            bos_token first in every text; one that was built without that, as from a sentencepiece file, is mended,
            with a warning, for the models were trained with it.

    Raises ``FileNotFoundError`` or ``ConnectionError`` if it can't be found, naming what would help.
    """
    known = _TOKENIZERS.get(name or "")
    if tokenizer_source is None:
        if known is None:
            raise FileNotFoundError(
                f"the model has no tokenizer.json beside it, and its config's tokenizer, {name!r}, isn't one of "
                f"{', '.join(_TOKENIZERS)}: put a tokenizer.json into the model's folder, or work with token ids"
            )
        tokenizer_source = known.repository
    path = Path(tokenizer_source).expanduser()
    if not path.is_file():
        try:
            path = folder_of(tokenizer_source, ["tokenizer.json", "tokenizer_config.json"]) / "tokenizer.json"
        except (ConnectionError, FileNotFoundError) as error:
            raise type(error)(
                f"no tokenizer: {error}. A tokenizer.json in the model's folder is used before the hub is asked"
            ) from error
    if not path.is_file():
        made = ", made from its tokenizer.model by transformers," if (path.parent / "tokenizer.model").is_file() else ""
        raise FileNotFoundError(f"{path.parent} has no tokenizer.json: put it there{made} or work with token ids")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # of no kind of its own
        raise ValueError(f"{path} is no tokenizer that can be read ({error}): restore it, or name another") from error
    if known and known.begins:
        _begin_with(tokenizer, known.bos_token, name)
    usual = {key: getattr(known, key) for key in ("bos_token", "eos_token", "pad_token")} if known else {}
    usual = {key: token for key, token in usual.items() if tokenizer.token_to_id(token) is not None}
    padding = {key: token for key, token in usual.items() if key == "pad_token"}  # whatever the files say
    special = usual | _special_tokens(path) | padding
    return _tokenizer_class()(tokenizer_object=tokenizer, **special)


def _begin_with(tokenizer, bos_token: str, name: str | None) -> None:
    """Makes a tokenizer put its bos_token first, if it has one and doesn't."""
    from tokenizers.processors import TemplateProcessing

    bos_id = tokenizer.token_to_id(bos_token)
    if bos_id is None or tokenizer.encode("a").ids[:1] == [bos_id]:
        return
    special = [(bos_token, bos_id)]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos_token} $A", special_tokens=special)
    warnings.warn(
        f"this tokenizer doesn't put {bos_token} first, as {name}'s does, with which the published models were "
        "trained: it does now",
        stacklevel=3,
    )


def _special_tokens(path: Path) -> dict[str, str]:
    """The special tokens that ``tokenizer_config.json`` beside a tokenizer names."""
    config_path = path.with_name("tokenizer_config.json")
    if not config_path.is_file():
        return {}
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path} is not JSON ({error}): restore it, or delete it") from error
    tokens = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None:
            tokens[key] = value
    return tokens


def _tokenizer_class():
    """``PreTrainedTokenizerFast``, imported without transformers' advice that there is no torch."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before
    return PreTrainedTokenizerFast
