"""Find the files of a published model, and read them only as far as is safe."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LARGEST_JSON = 16 * 2**20
"""Most bytes of a JSON file. The index of the largest published model has less than a thousandth of this."""

_INDEXES = {"model.safetensors": "model.safetensors.index.json", "pytorch_model.bin": "pytorch_model.bin.index.json"}
"""The files that may hold the weights, the preferred one first, each with the index of its shards."""


_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
"""The names of the files in the hub's cache."""


def inside(folder: Path, name: str) -> Path:
    """``folder / name``. Raises ``ValueError`` if links lead from there to something outside the folder.

    Raises ``FileNotFoundError`` if it is a link to a file that is gone.

    Links into the hub's cache are allowed, wherever it is: to ``blobs`` beside the folder's own ``snapshots``, and to
    any file whose name is a hash of 40 or 64 hexadecimal digits. Whoever made such a link knew what it holds.
    """
    path, home = folder / name, folder.resolve()
    target = Path(os.path.realpath(path))
    blobs = [above.parent / "blobs" for above in (home, *home.parents) if above.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (home, *blobs)) and not _HASH.fullmatch(target.name):
        raise ValueError(
            f"{path} is a link to something outside its folder: if you trust it, put what it links to there itself"
        )
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to a file that is gone: download it again")
    return path


def expanded(path: str | Path) -> Path:
    """A path with ``~`` or ``~user`` as the home folder. Raises ``FileNotFoundError`` if that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"the home folder in {path} is not known: write the whole path, without ~") from error


FIX = "correct it, or download it again"


def read_text(path: Path, *, limit: int = LARGEST_JSON, fix: str = FIX) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. ``fix`` is what an error tells the user to do.

    Raises ``ValueError`` if it is not UTF-8, has more than ``limit`` bytes, or is not a file (but a device, or a pipe).
    """
    path.stat()  # FileNotFoundError, or that it may not be read
    if not path.is_file():
        raise ValueError(f"{path} is not a file: put the file itself there")
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, but at most {limit} are read: it is not the file that belongs "
            f"here, {fix}"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): {fix}") from error


def read_json(path: Path, *, limit: int = LARGEST_JSON, fix: str = FIX) -> dict[str, Any]:
    """The JSON object in a file. Raises ``ValueError`` for anything else, and as ``read_text``."""
    text = read_text(path, limit=limit, fix=fix)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): {fix}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: {fix}")
    return value


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The JSON object in the config file of a folder."""
    path = inside(folder, name)
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder} has no {name} (it holds: {there}): name the folder of one model")
    return read_json(path)


def check_keys(path: Path, config: Mapping[str, Any], known: Iterable[str], required: Iterable[str]) -> None:
    """Raise ``ValueError`` for unknown keys and for required keys that are missing."""
    unknown = sorted(config.keys() - set(known))
    if unknown:
        raise ValueError(
            f"{path} has unknown keys {unknown}, which may change what the model computes. If they do not, remove "
            f"them from the file. Known keys: {sorted(known)}"
        )
    lacking = sorted(set(required) - config.keys())
    if lacking:
        raise ValueError(f"{path} lacks {lacking}: add them")


def check_kinds(path: Path, config: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise ``ValueError`` if a value has another type than its key requires. null counts as missing."""
    for key, kind in kinds.items():
        value = config.get(key)
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if value is not None and type(value) not in allowed:
            names = " or ".join(one.__name__ for one in allowed)
            raise ValueError(f"{path}: {key} is {value!r:.100}, but must be {names}: correct it")


def check_sizes(path: Path, config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise ``ValueError`` unless the values of all these keys are whole numbers of at least 1."""
    wrong = {key: config[key] for key in keys if type(config[key]) is not int or config[key] < 1}
    if wrong:
        raise ValueError(f"{path}: {wrong!r:.200} must be whole numbers of at least 1")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a model: ``model.safetensors``, the shards in its index, or the files of torch.

    safetensors are preferred to torch files, and one whole file to shards.
    """
    for single, index in _INDEXES.items():
        if inside(folder, single).is_file():
            return [folder / single]
        if inside(folder, index).is_file():
            return _shards(folder, folder / index)
    sought = ", ".join(name for pair in _INDEXES.items() for name in pair)
    raise FileNotFoundError(f"{folder} has no weights, that is none of {sought}. Download one of them")


def _shards(folder: Path, index: Path) -> list[Path]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index} is not an index of shards (weight_map: weight names to files): download it again")
    names = sorted(set(named.values()))
    bad = [name for name in names if Path(name).name != name or "\\" in name]
    if bad:
        raise ValueError(f"{index} names files outside its folder: {bad}")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    bad = [name for name in names if Path(name).suffix != suffix]
    if bad:
        raise ValueError(f"{index} names files that are not {suffix} files: {bad}: download it again")
    paths = [inside(folder, name) for name in names]
    lacking = [path.name for path in paths if not path.is_file()]
    if lacking:
        raise FileNotFoundError(f"{folder} lacks shards that are in {index.name}: {lacking}. Download them")
    return paths
