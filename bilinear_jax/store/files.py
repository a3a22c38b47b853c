"""Files and folders that appear only when they are complete, and JSON."""

import contextlib
import errno
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from weights_convert import files


class Place(NamedTuple):
    """A place for a folder, as ``check_place`` found it."""

    path: Path  # absolute
    older: dict[str, tuple[int, ...]] | None  # the files and folders that force replaces; None: there are none


def check_place(path: str | Path | Place, *, force: bool = False, record: str = "config.json") -> Place:
    """The place where ``atomic_folder`` will write. Raises ``OSError`` if it is clear that it could not.

    ``atomic_folder`` replaces only what was found here. A ``Place`` is returned as it is.
    """
    if isinstance(path, Place):
        return path
    path = Path(path).expanduser().resolve()
    occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if occupied and not force:
        raise FileExistsError(f"{path} already exists: name another folder, or replace it with force (--force)")
    if occupied and "format" not in (read_json(path / record) or {}):
        raise FileExistsError(
            f"{path} has no {record} of this library, so force does not replace it: move it away, or name another "
            "folder"
        )
    older = _contents(path) if occupied else None
    check_writable(path)
    if path.exists():
        _check_movable(path, occupied)
    return Place(path, older)


def check_writable(path: Path) -> None:
    """Raise ``OSError`` unless something can be made in the lowest folder above ``path`` that exists. This is tried."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    trial = _beside(above / path.name, "partial")
    try:
        trial.mkdir()
    except OSError as error:
        other = "a new folder in it" if path.is_dir() else "another place"
        raise OSError(
            f"{path} cannot be written: {above} is not a folder with write permission ({error.strerror}). Name {other}"
        ) from error
    trial.rmdir()


def _check_movable(path: Path, occupied: bool) -> None:
    """Raise ``OSError`` unless a new folder can take the place of this one.

    The system is asked to move it onto a folder that is not empty. This always fails, but with another error for the
    root of a volume or without permission.
    """
    if Path.cwd().is_relative_to(path):
        raise OSError(f"{path} cannot be replaced, because it holds the working folder: name a new folder in it")
    expected = {errno.ENOTEMPTY, errno.EEXIST} | (set() if occupied else {errno.EXDEV})  # EXDEV: a layer of a container
    trial = _beside(path, "partial")
    (trial / "full").mkdir(parents=True)
    try:
        os.rename(path, trial)
    except OSError as error:
        if error.errno not in expected:
            raise OSError(
                f"{path} cannot be replaced ({error.strerror}): it is the root of a volume, or not yours. Name a new "
                "folder in it"
            ) from error
    finally:
        shutil.rmtree(trial)


@contextlib.contextmanager
def atomic_folder(path: str | Path | Place, *, force: bool = False, record: str = "config.json") -> Iterator[Path]:
    """Give a temporary folder beside ``path``. It takes the place of ``path`` if the block ends without an error.

    If the process is killed, ``path`` is as it was before. The hidden temporary folder ``.<name>.partial-...`` may be
    left; it can be deleted. Between two system calls at the end, an older folder has the name ``.<name>.old-...``.

    Args:
        path: the folder to write, or a place that ``check_place`` returned earlier.
        force: replace an older folder of the same kind. It is moved aside when the new one is complete, and deleted
            when the new one is in its place.
        record: the JSON file whose ``format`` shows that a folder is of this kind.

    Raises:
        OSError: as ``check_place``, before the block.
        FileExistsError: after the block, if ``path`` is no longer what it was: something appeared there, or the older
            folder was changed. That stays as it is. The message says where the complete temporary folder is.
    """
    place, complete = check_place(path, force=force, record=record), False
    place.path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(place.path, "partial")
    try:
        partial.mkdir()
        yield partial
        complete = True
        _put(partial, place)
    except BaseException as error:
        if not (complete and isinstance(error, OSError)):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _put(partial: Path, place: Place) -> None:
    """Move a complete folder to its place. A folder that is not empty cannot be replaced by ``os.rename``."""
    path, old = place.path, _beside(place.path, "old")
    try:
        if place.older is not None:
            with contextlib.suppress(FileNotFoundError):  # it was deleted meanwhile
                os.rename(path, old)
            if os.path.lexists(old) and _contents(old) != place.older:
                raise OSError(errno.EEXIST, "it was changed")
        os.rename(partial, path)
    except BaseException as error:
        if os.path.lexists(old):
            with contextlib.suppress(OSError):
                os.rename(old, path)
        if not isinstance(error, OSError):
            raise
        moved = f" What was there before is in {old}." if os.path.lexists(old) else ""
        raise FileExistsError(
            f"{path} is no longer what it was when this began ({error.strerror}), so it stays as it is.{moved} What "
            f"was written is complete in {partial}: give that another name"
        ) from error
    if old.exists():
        shutil.rmtree(old)


def _contents(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells every file and folder apart from others, by path: a change anywhere in the folder changes this."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        entry = path.lstat()
        size_and_time = () if stat.S_ISDIR(entry.st_mode) else (entry.st_size, entry.st_mtime_ns)
        found[path.relative_to(folder).as_posix()] = (entry.st_dev, entry.st_ino, *size_and_time)
    return found


def _beside(path: Path, what: str) -> Path:
    """A hidden name beside ``path`` that nothing else has."""
    return path.with_name(f".{path.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}")


def put_file(partial: Path, path: Path) -> None:
    """Move a complete file to ``path``. Raises ``FileExistsError``, and moves nothing, if something is there."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: take the name first
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(partial, path)
    else:
        partial.unlink()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait until no other process holds this lock. On a file system without locks it does nothing."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``. If the block ends without an error, this file replaces ``path``."""
    partial = _beside(path, "partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path, *, fix: str = files.FIX) -> dict[str, Any] | None:
    """The JSON object in a file. None if the file does not exist. Otherwise as ``weights_convert.files.read_json``."""
    try:
        return files.read_json(path, fix=fix)
    except (FileNotFoundError, NotADirectoryError):
        return None


def replace_file(path: Path, text: str) -> None:
    """Write a text file, completely or not at all. Raises ``OSError`` with the path if it cannot be written."""
    try:
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        fix = "free disk space, or check what is at that path"
        raise OSError(error.errno, f"could not write {path} ({error.strerror}): {fix}") from error


def finite_or_null(value):
    """A value as strict JSON can store it: a number that is not finite becomes None, also inside dicts."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
