"""Find a model by a built-in name, a folder or a hub name, and list its SAEs.

A source is one of
- the name of a model that ships with the package: a folder in ``bilinear_jax/pretrained``;
- a folder that this library wrote, one in the layout of the published checkpoints, or one of a family that
  ``weights_convert.families`` reads;
- a GGUF file, or a folder without other weights that holds one;
- a hub name, "owner/name", or "owner/name/file.gguf" for one of several GGUF files. Only the files that are needed are
  downloaded, once, into the hub's cache. The
  environment variables ``HF_ENDPOINT`` and ``HF_HOME`` are respected. If the hub cannot be reached, what is in the
  cache is used: the commit of the branch main or, without ``refs/main``, the newest.
"""

import contextlib
import functools
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.store.choice import Wanted, one_of
from bilinear_jax.store.files import read_json
from weights_convert.families import FAMILIES
from weights_convert.files import expanded, inside, weight_files
from weights_convert.names import SAEName, sae_folders, sae_names_among

PRETRAINED = Path(__file__).parents[1] / "pretrained"
"""The folder of the models that ship with the package."""

GGUF = ".gguf"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/((?:[\w.-]+/)*[\w.-]+\.gguf)")
_MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "params/*", "tokenizer*.json")
_TORCH_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""The files of a model's folder, and the older torch files, which are downloaded only if there are no others."""


def builtin_names() -> list[str]:
    """The names of the models that ship with the package."""
    if not PRETRAINED.is_dir():
        return []
    return sorted(entry.name for entry in PRETRAINED.iterdir() if (entry / "config.json").is_file())


def folder_of(source: str | Path, files: Sequence[str] = _MODEL_FILES) -> Path:
    """The folder of a source. From a hub repository, only ``files`` (patterns) are downloaded.

    Raises:
        FileNotFoundError: if the source does not exist.
        ConnectionError: if the hub cannot be reached and its cache does not hold the files.

    Both messages list what can be loaded.
    """
    folder = local_folder(source)
    if folder is not None:
        return folder
    repository = _repository(source)
    folder = _fetch(repository, files)
    if files is _MODEL_FILES and not any(folder.glob("model*.safetensors")) and not (folder / "params").is_dir():
        folder = _fetch(repository, [*files, *_TORCH_FILES])
    return folder


def model_place(source: str | Path) -> Path:
    """The folder of a model, or the GGUF file that holds it. From the hub, only what is needed is downloaded.

    Raises:
        FileNotFoundError, ConnectionError: as ``folder_of``.
        ValueError: if a folder or a repository holds no other weights and several GGUF files. The message lists them.
    """
    path = expanded(source)
    if path.suffix == GGUF and path.is_file():
        return path
    local = local_folder(source)
    if local is None and (named := _HUB_FILE.fullmatch(str(source))):
        return inside(_fetch(named[1], [named[2]]), named[2])
    folder = folder_of(source)
    if _has_weights(folder):
        return folder
    files = sorted(entry.name for entry in folder.glob(f"*{GGUF}")) if local else _remote_gguf(str(source), folder)
    if len(files) > 1:
        raise ValueError(
            f"{source} holds {len(files)} GGUF files: {', '.join(files)}. Name the file, as in {source}/{files[0]}"
        )
    if not files:
        return folder
    return inside(folder if local else _fetch(str(source), files), files[0])


def _remote_gguf(repository: str, folder: Path) -> list[str]:
    """The GGUF files of a repository. If the hub cannot be reached, those in the cache."""
    try:
        names = repository_files(repository)
    except ConnectionError:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob(f"*{GGUF}")]
    return sorted(name for name in names if name.endswith(GGUF))


def repository_files(repository: str) -> list[str]:
    """The names of the files of a repository. Raises the errors of ``folder_of``."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(repository).siblings or []  # list_repo_files retries for a minute if offline
    except Exception as error:
        raise _explained(repository, error) from error
    return [sibling.rfilename for sibling in siblings]


def cached_files(repository: str) -> list[str]:
    """The names of the files of a repository that are in the hub's cache."""
    snapshot = _cached().get(repository)
    if snapshot is None:
        return []
    return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]


def _repository(source: str | Path) -> str:
    """The hub name in a source."""
    named = _HUB_FILE.fullmatch(str(source))
    return named[1] if named else str(source)


def dataset_folder(source: str | Path) -> Path:
    """The folder with the Parquet files of a hub dataset. Raises the errors of ``folder_of``."""
    if not _HUB_NAME.fullmatch(str(source)):
        raise FileNotFoundError(
            f"there is no file or folder {source}: name one that exists, or a hub dataset owner/name"
        )
    return _fetch(str(source), ["*.parquet"], repo_type="dataset")


def sae_names(source: str | Path) -> list[str]:
    """The names of the SAEs of a source: a model, or its ``-scope``.

    Example:
        >>> sae_names("ts-nano")[0].count("-")
        4
    """
    return list(_scope(source)[1])


def list_saes(source: str | Path) -> list[SAEName]:
    """List the SAEs of a source (a model, or its ``-scope``): layer, site, expansion, k and tag of each.

    No SAE is read, and none is downloaded from the hub. They come in the order of their layers. The list is empty if
    there are none.

    Raises:
        FileNotFoundError: if the source does not exist.
        ConnectionError: if the hub cannot be reached and its cache does not hold the repository.

    Example:
        >>> import bilinear_jax as bj
        >>> bj.list_saes("ts-nano")[0]
        SAEName(layer=2, site='mlp_in', expansion=4, k=20, tag=None, activation='topk', target=None)
        >>> saes = [bj.load_sae("ts-nano", **name._asdict()) for name in bj.list_saes("ts-nano")]
    """
    return list(_scope(source)[1].values())


def sae_folder(source: str | Path, name: str) -> Path:
    """The folder of one SAE of a source. From the hub, only this folder is downloaded."""
    scope, names = _scope(source)
    if name not in names:
        raise UnknownNameError("SAE", name, names, of=str(source))
    return inside(scope if isinstance(scope, Path) else fetch_below(scope, [f"{name}/*"]), name)


def sae_configs(source: str | Path) -> dict[str, Path]:
    """The config.json of every SAE of a source, by name. From the hub, only these files are downloaded, together."""
    scope, names = _scope(source)
    if names and not isinstance(scope, Path):
        scope = fetch_below(scope, ["*/config.json"])
    return {name: inside(Path(scope), f"{name}/config.json") for name in names}


def find_sae(
    source: str | Path,
    site: str,
    layer: int | None,
    expansion: int | float | None,
    k: int | None,
    tag: str | None,
    activation: str | None = None,
    target: str | None = None,
) -> str:
    """The name of the one SAE that has these properties. None means any value.

    Without a ``target``, SAEs are preferred to transcoders; without a ``tag``, those that have no tag.

    Raises:
        UnknownNameError: if no SAE matches.
        ValueError: if several SAEs match.

    Both messages list the SAEs of the source.
    """
    wanted = Wanted(layer, site, expansion, k, tag, activation, target)
    return one_of(_scope(source)[1], wanted, source)


def local_folder(source: str | Path) -> Path | None:
    """The folder of a built-in name or of a path, of a GGUF file that beside it. None for a hub name.

    Raises an error if it is neither.
    """
    if isinstance(source, str) and source in builtin_names():
        return PRETRAINED / source
    path = expanded(source)
    if source == "":
        raise FileNotFoundError(f"the name of the model is empty. {_what_there_is()}")
    if path.is_dir():
        return path
    if path.suffix == GGUF and path.is_file():
        return path.parent
    if path.exists():
        raise FileNotFoundError(f"{source} is a file: name the folder that holds it")
    if isinstance(source, str) and _HUB_NAME.fullmatch(_repository(source)) and not source.startswith("."):
        return None
    raise FileNotFoundError(f"there is no folder {source}, and no model of that name. {_what_there_is()}")


def _scope(source: str | Path) -> tuple[Path | str, dict[str, SAEName]]:
    """Where the SAEs of a source are (a folder or a hub name), and their names."""
    folder = local_folder(source)
    if folder is None:
        repository = _repository(source)
        scope = repository if repository.endswith("-scope") else f"{repository}-scope"
        try:
            return scope, _remote_names(scope)
        except (FileNotFoundError, ConnectionError):
            with contextlib.suppress(FileNotFoundError, ConnectionError):
                if scope != repository and (names := _remote_names(repository, "scope/")):
                    return f"{repository}/scope", names
            raise
    resolved = folder.resolve()
    candidates = [folder, inside(folder, "scope"), resolved.with_name(f"{resolved.name}-scope")]
    for candidate in candidates:
        if names := sae_folders(candidate):
            return candidate, names
    return folder, {}


def _remote_names(repository: str, below: str = "") -> dict[str, SAEName]:
    """The SAE folders of a repository, or in a folder of it. If the hub cannot be reached, those in the cache."""
    try:
        files = [file.removeprefix(below) for file in repository_files(repository) if file.startswith(below)]
    except ConnectionError:
        snapshot = _cached().get(repository)
        if names := _with_weights(snapshot and snapshot / below):
            return names
        raise
    return sae_names_among(file.removesuffix("/config.json") for file in files if file.count("/") == 1)


def fetch_below(place: str, files: Sequence[str]) -> Path:
    """A repository, or a folder of it ("owner/name/folder"), with these files. Raises the errors of ``folder_of``."""
    owner, name, *folders = place.split("/")
    below = "/".join(folders)
    snapshot = _fetch(f"{owner}/{name}", [f"{glob.escape(below)}/{file}" if below else file for file in files])
    return inside(snapshot, below) if below else snapshot


def _fetch(repository: str, files: Sequence[str], repo_type: str = "model") -> Path:
    """The folder with the files of a repository. If the hub cannot be reached, only the cache is used."""
    from huggingface_hub import errors, snapshot_download

    fetch = functools.partial(snapshot_download, repository, repo_type=repo_type, allow_patterns=list(files))
    try:
        return Path(fetch())
    except Exception as error:
        if is_unreachable(error) and (snapshot := _cached(repo_type).get(repository)):
            with contextlib.suppress(errors.LocalEntryNotFoundError):
                return Path(fetch(revision=snapshot.name, local_files_only=True))
        raise _explained(repository, error) from error


def is_unreachable(error: BaseException | None) -> bool:
    """Whether an error of the hub's client means that there was no answer, or only a server error (500 or more)."""
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
    """The error to raise for an error of the hub's client."""
    from huggingface_hub import constants

    if is_unreachable(error):
        return ConnectionError(
            f"the hub ({constants.ENDPOINT}) cannot be reached, its cache does not hold all files of {repository}, and "
            f"there is no folder of that name. {_what_there_is(repository)}"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return FileNotFoundError(
        f"{repository} cannot be downloaded from the hub ({constants.ENDPOINT}): {reason}. There is no folder of that "
        f"name either. Check the name, and whether it needs a token (`hf auth login`). {_what_there_is(repository)}"
    )


def _what_there_is(failed: str | None = None) -> str:
    """What can be loaded without the hub, except for the repository that has just failed."""
    cached = sorted(name for name, snapshot in _cached().items() if name != failed and _is_ours(snapshot))
    return (
        f"What can be loaded offline: built in: {', '.join(builtin_names()) or 'none'}; "
        f"from the hub's cache: {', '.join(cached) or 'none'}; and any folder that holds a model"
    )


def _cached(repo_type: str = "model") -> dict[str, Path]:
    """The repositories in the hub's cache, each with its snapshot: that of the branch main.

    A cache without ``refs/main`` was filled by a commit's hash, or copied without it. Its newest snapshot is taken.
    """
    from huggingface_hub import constants

    found = {}
    for folder in Path(constants.HF_HUB_CACHE).glob(f"{repo_type}s--*--*"):
        with contextlib.suppress(OSError):  # what cannot be read, or has just been removed, is not in the cache
            if snapshot := _snapshot(folder):
                found[folder.name.removeprefix(f"{repo_type}s--").replace("--", "/", 1)] = snapshot
    return found


def _snapshot(repository: Path) -> Path | None:
    """The snapshot to take of a repository in the cache. What is not a folder in ``snapshots`` is not one."""
    snapshots = [entry for entry in repository.glob("snapshots/*") if os.path.isdir(entry)]
    main = repository / "refs" / "main"
    if main.is_file():
        commit = main.read_text(encoding="utf-8", errors="replace").strip()
        return next((snapshot for snapshot in snapshots if snapshot.name == commit), None)
    return max(snapshots, key=os.path.getmtime, default=None)


def _is_ours(snapshot: Path) -> bool:
    """Whether a snapshot in the cache holds a model that can be loaded, with its weights, or SAEs with theirs."""
    if any(snapshot.glob(f"*{GGUF}")):
        return True
    try:
        config = read_json(snapshot / "config.json")
    except (OSError, ValueError):
        config = None
    if config is None:
        return bool(_with_weights(snapshot))
    known = {"d_hidden", "n_ctx"} <= config.keys() or "format" in config or config.get("model_type") in FAMILIES
    return known and _has_weights(snapshot)


def _with_weights(snapshot: Path | None) -> dict[str, SAEName]:
    """The SAEs in a snapshot in the cache whose weights are there too."""
    if snapshot is None:
        return {}
    return {name: parts for name, parts in sae_folders(snapshot).items() if _has_weights(snapshot / name)}


def _has_weights(folder: Path) -> bool:
    """Whether the weights of a model or an SAE are there, with all shards."""
    try:
        return (folder / "params").is_dir() or bool(weight_files(folder))
    except (OSError, ValueError):
        return False
