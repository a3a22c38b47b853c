"""Checksums: the SHA-256 of files, of arrays and of JSON, and records that carry their own.

A sealed record is a JSON object with one more key, ``sha256``: the SHA-256 of all the others.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from bilinear_jax.store.files import read_json

SEAL = "sha256"


def of_json(value: Any) -> str:
    """The SHA-256 of a value as JSON with sorted keys. It does not depend on the layout of a file.

    Example:
        >>> of_json({"a": 1, "b": [2.5]}) == of_json({"b": [2.5], "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def of_file(path: Path) -> str:
    """The SHA-256 of the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_arrays(*arrays: np.ndarray) -> str:
    """The SHA-256 of the dtypes, shapes and values of arrays, which may be memory-mapped.

    Example:
        >>> of_arrays(np.arange(6)) == of_arrays(np.arange(12)[:6]), of_arrays(np.zeros(6)) == of_arrays(np.zeros(5))
        (True, False)
    """
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        little = array.dtype.newbyteorder("<")
        digest.update(f"{little.str} {array.shape}".encode())
        for part in parts(array):
            digest.update(np.ascontiguousarray(part, little).data)
    return digest.hexdigest()


def of_params(params: PyTree) -> dict[str, int]:
    """The CRC-32 of every array, computed from its bytes in memory (float32, little-endian), not from those on disk."""
    found = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(params):
        checksum = 0
        for part in parts(np.asarray(leaf)):
            checksum = zlib.crc32(part.astype("<f4", copy=False).data, checksum)
        found[jax.tree_util.keystr(key, simple=True, separator=".")] = checksum
    return found


def parts(array: np.ndarray) -> list[np.ndarray]:
    """The numbers of an array in parts of a few million, so that a computation on each part takes little memory."""
    return np.array_split(array.reshape(-1), 1 + array.size // 2**22)


def of_texts(texts: Iterable[str]) -> str:
    """The SHA-256 of texts and of their lengths, in order.

    Example:
        >>> of_texts(["ab", "c"]) == of_texts(["a", "bc"])
        False
    """
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode()
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as JSON stores it, with its seal.

    Example:
        >>> intact(sealed({"step": 3})), intact(sealed({"step": 3}) | {"step": 4}), intact({"step": 3})
        (True, False, None)
    """
    plain = json.loads(json.dumps({key: value for key, value in record.items() if key != SEAL}))
    return plain | {SEAL: of_json(plain)}


def intact(record: Mapping[str, Any]) -> bool | None:
    """Whether a record is what was sealed. None if it has no seal: a version before seals wrote it."""
    if SEAL not in record:
        return None
    return record[SEAL] == of_json({key: value for key, value in record.items() if key != SEAL})


def check_seal(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the record of a checkpoint has a seal. Raises ``ValueError`` if it is not what was sealed."""
    found = intact(record)
    if found is False:
        raise ValueError(
            f"{path} is not what was written: it is damaged, or was edited. Restore it; or, if the change is right, "
            f"run {how_to_add(path.parent)}"
        )
    return found is not None


def changed_file(path: Path) -> str | None:
    """What is wrong with a file, by the ``contents`` of the ``config.json`` beside it. None if it is not listed there.

    ``contents`` maps the names of files to their SHA-256; see ``store.checkpoint``.
    """
    contents = (read_json(path.with_name("config.json")) or {}).get("contents")
    expected = contents.get(path.name) if isinstance(contents, dict) else None
    if expected is None or (path.is_file() and of_file(path) == expected):
        return None
    return f"{path} is {'not the file that was saved with the model' if path.is_file() else 'missing'}"


def check_file(path: Path) -> None:
    """Raise ``ValueError`` if ``changed_file`` finds something."""
    if changed := changed_file(path):
        raise ValueError(f"{changed}: restore it; or, if you replaced it on purpose, run {how_to_add(path.parent)}")


def how_to_add(folder: Path) -> str:
    """What to type so that the checksums of a folder are those of what is in it now."""
    return f'python -c "from bilinear_jax.store.checkpoint import add_checksums; add_checksums({str(folder)!r})"'
