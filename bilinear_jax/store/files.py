"""Files and folders that appear only when they are complete, and JSON."""

import contextlib
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weights_convert import files


def check_place(path: str | Path, *, force: bool = False, record: str = "config.json") -> Path:
    """The absolute path where ``atomic_folder`` would write. Raises ``OSError`` if it is clear that it could not."""
    path = Path(path).expanduser().resolve()
    occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if occupied and not force:
        raise FileExistsError(f"{path} already exists: name another folder, or replace it with force (--force)")
    if occupied and "format" not in (read_json(path / record) or {}):
        raise FileExistsError(
            f"{path} has no {record} of this library, so force does not replace it: move it away, or name another "
            "folder"
        )
    above = next(folder for folder in path.parents if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".bilinear-jax-", dir=above))
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {above} is not a folder with write permission. Name another place"
        ) from error
    return path


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, force: bool = False, record: str = "config.json") -> Iterator[Path]:
    """Give a temporary folder beside ``path``. It takes the place of ``path`` if the block ends without an error.

    If the process is killed, ``path`` is as it was before. The hidden temporary folder ``.<name>.partial-...`` may be
    left; it can be deleted.

    Args:
        path: the folder to write.
        force: replace an older folder of the same kind. It is moved aside when the new one is complete, and deleted
            when the new one is in its place.
        record: the JSON file whose ``format`` shows that a folder is of this kind.
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


def read_json(path: Path, *, fix: str = files.FIX) -> dict[str, Any] | None:
    """The JSON object in a file. None if the file does not exist. Otherwise as ``weights_convert.files.read_json``."""
    try:
        return files.read_json(path, fix=fix)
    except (FileNotFoundError, NotADirectoryError):
        return None


def replace_file(path: Path, text: str) -> None:
    """Write a text file, completely or not at all. Raises ``OSError`` with the path if it cannot be written."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fix = "free disk space, or check what is at that path"
        raise OSError(error.errno, f"could not write {path} ({error.strerror}): {fix}") from error


def finite_or_null(value):
    """A value as strict JSON can store it: a number that is not finite becomes None, also inside dicts."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
