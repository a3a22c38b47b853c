"""Folders that appear when they are whole: of checkpoints, conversions, feature pages and datasets."""

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def check_place(path: str | Path, *, force: bool = False, record: str = "config.json") -> Path:
    """Where ``atomic_folder`` would write, absolute; raises ``OSError`` if it can be seen that it couldn't."""
    path = Path(path).expanduser().resolve()
    occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if occupied and not force:
        raise FileExistsError(f"{path} exists: name another folder, or replace it with force (--force)")
    if occupied and "format" not in (read_json(path / record) or {}):
        raise FileExistsError(
            f"{path} holds no {record} of this library, so it is something else and not even force replaces it: move "
            "it away"
        )
    above = next(folder for folder in path.parents if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".bilinear-jax-", dir=above))
    except OSError as error:
        raise OSError(
            f"{path} can't be written: {above} is no folder that one may write to. Name another place"
        ) from error
    return path


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, force: bool = False, record: str = "config.json") -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place once the block has ended without an error.

    A killed process leaves nothing at ``path`` but what was there before (and the hidden temporary folder, named
    ``.<name>.partial-...``, which can be deleted). With ``force``, an older folder of the same kind, known by the
    ``format`` in its ``record``, is moved aside when the new one is whole, and deleted when that is in its place.
    """
    path = check_place(path, force=force, record=record)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    partial, old = path.with_name(f".{path.name}.partial-{mark}"), path.with_name(f".{path.name}.old-{mark}")
    partial.mkdir()
    try:
        yield partial
        if not path.exists():
            os.replace(partial, path)
            return
        os.replace(path, old)
        try:
            os.replace(partial, path)
        except BaseException:
            os.replace(old, path)
            raise
        shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): convert or download it again") from error
    return value if isinstance(value, dict) else None
