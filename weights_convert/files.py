"""The files of a published model's folder: found, and read no further than it is safe to."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LARGEST_JSON = 16 * 2**20
"""Bytes of a JSON file at most: the index of the largest published model has less than a thousandth of them."""

_INDEXES = {"model.safetensors": "model.safetensors.index.json", "pytorch_model.bin": "pytorch_model.bin.index.json"}
"""The files that may hold the weights, the preferred one first, and what names their parts if they are cut up."""


def inside(folder: Path, name: str) -> Path:
    """``folder / name``; raises ``ValueError`` if that is a link to something outside the folder.

    The hub's cache is made of links from ``snapshots/<commit>`` to ``blobs``: these are followed.
    """
    path, home = folder / name, folder.resolve()
    if not path.is_symlink():
        return path
    target = path.resolve()
    blobs = [above.parent / "blobs" for above in (home, *home.parents) if above.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (home, *blobs)):
        raise ValueError(
            f"{path} is a link to something outside its folder: put the file itself there, if you trust it"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ``ValueError`` if it holds something else, or more than ``LARGEST_JSON`` bytes."""
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(
            f"{path} has {size} bytes, at most {LARGEST_JSON} are read: it is no such file as it should be"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object: download it again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON object in ``folder/config.json``."""
    path = inside(folder, "config.json")
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder} has no config.json (it holds: {there}): name the folder of one model")
    return read_json(path)


def check_keys(path: Path, config: Mapping[str, Any], known: Iterable[str], required: Iterable[str]) -> None:
    """Raises ``ValueError`` for keys that aren't known, and for required ones that aren't there."""
    unknown = sorted(config.keys() - set(known))
    if unknown:
        raise ValueError(
            f"{path} has unknown keys {unknown}: the weights may mean something that isn't known here. If they change "
            f"nothing in how the model runs, take them out of the file. Known: {sorted(known)}"
        )
    lacking = sorted(set(required) - config.keys())
    if lacking:
        raise ValueError(f"{path} lacks {lacking}: add them")


def check_kinds(path: Path, config: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raises ``ValueError`` for values of another kind than their keys have; null stands for a key's absence."""
    for key, kind in kinds.items():
        value = config.get(key)
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if value is not None and type(value) not in allowed:
            names = " or ".join(one.__name__ for one in allowed)
            raise ValueError(f"{path}: {key} is {value!r:.100}, expected {names}: correct it")


def check_sizes(path: Path, config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises ``ValueError`` unless the values of all these keys are whole numbers of at least 1."""
    wrong = {key: config[key] for key in keys if type(config[key]) is not int or config[key] < 1}
    if wrong:
        raise ValueError(f"{path}: {wrong!r:.200} must be whole numbers of at least 1")


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights: ``model.safetensors``, the shards that its index names, or torch's own files.

    Where there are both, safetensors are preferred; a whole file is, to shards.
    """
    for single, index in _INDEXES.items():
        if (folder / single).is_file():
            return [inside(folder, single)]
        if (folder / index).is_file():
            return _shards(folder, inside(folder, index))
    sought = ", ".join(name for pair in _INDEXES.items() for name in pair)
    raise FileNotFoundError(f"{folder} has no weights: none of {sought}. Download one of them")


def _shards(folder: Path, index: Path) -> list[Path]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index} is no index of shards (weight_map: names of weights to files): download it again")
    names = sorted(set(named.values()))
    bad = [name for name in names if Path(name).name != name or "\\" in name]
    if bad:
        raise ValueError(f"{index} names files outside its folder: {bad}")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    bad = [name for name in names if Path(name).suffix != suffix]
    if bad:
        raise ValueError(f"{index} names files that are no {suffix} files: {bad}: download it again")
    paths = [inside(folder, name) for name in names]
    lacking = [path.name for path in paths if not path.is_file()]
    if lacking:
        raise FileNotFoundError(f"{folder} lacks shards that {index.name} names: {lacking}. Download them")
    return paths
