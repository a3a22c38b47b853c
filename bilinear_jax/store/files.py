"""Files and folders that appear only when they are complete, and JSON."""

import contextlib
import errno
import math
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from weights_convert import files

NAME_LIMIT = 255
"""The most bytes in the name of a file or a folder, on all usual file systems."""


class Kind(NamedTuple):
    """What shows that this library wrote a folder, and what it holds."""

    record: str  # a JSON file in it
    format: str  # the value of ``format`` there


class Place(NamedTuple):
    """A place for a folder, as ``check_place`` found it."""

    path: Path  # absolute
    older: dict[str, tuple[int, ...]] | None  # the files and folders that force replaces; None: there are none


def check_name(path: str | Path) -> Path:
    """The absolute path, without links. Raises ``OSError`` if its names are such that nothing can be written there.

    Orbax reads a backslash as "/", and a folder "gs:" as the start of an address. Its arrays would go elsewhere.
    """
    shown = str(path).encode("utf-8", "backslashreplace").decode()
    path = files.expanded(path)
    try:
        path = path.resolve()
        parts = [part.encode() for part in path.parts]
        if any(len(part) > NAME_LIMIT for part in parts):
            raise ValueError(f"a name may have up to {NAME_LIMIT} bytes")
        if any(b"\\" in part or part in (b"gs:", b"s3:", b"az:", b"hf:") for part in parts):
            raise ValueError(r"a folder's name may not have \ in it, nor be gs:, s3:, az: or hf:")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
        return path
    except UnicodeEncodeError:
        reason = "it has characters that are not UTF-8"
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or str(error)
    raise OSError(f"{shown} cannot be written ({reason}): name another place")


def check_place(path: str | Path | Place, *, replace: Kind | None = None) -> Place:
    """The place where ``atomic_folder`` will write. Raises ``OSError`` if it is clear that it could not.

    ``atomic_folder`` replaces only what was found here. A ``Place`` is returned as it is.
    """
    if isinstance(path, Place):
        return path
    path = check_name(path)
    occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if occupied and replace is None:
        raise FileExistsError(f"{path} already exists: name another folder, or replace it with force (--force)")
    if occupied and replace is not None:
        there = read_json(path / replace.record)
        if there is None or there.get("format") != replace.format:
            found = "no such file" if there is None else f"format {there.get('format')!r:.100}"
            raise FileExistsError(
                f"{path} is not what force may replace here: a folder with a {replace.record} of format "
                f"{replace.format!r}. It has {found}: move it away, or name another folder"
            )
    older = _contents(path) if occupied else None
    check_writable(path)
    if path.exists():
        _check_movable(path, occupied)
    return Place(path, older)


def check_writable(path: Path) -> None:
    """Raise ``OSError`` unless something can be made in the lowest folder above ``path`` that exists. This is tried."""
    path = check_name(path)
    above = next(folder for folder in path.parents if folder.exists())
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
def atomic_folder(path: str | Path | Place, *, replace: Kind | None = None) -> Iterator[Path]:
    """Give a temporary folder beside ``path``. It takes the place of ``path`` if the block ends without an error.

    If the process is killed, ``path`` is as it was before. The hidden temporary folder ``.<name>.partial-...`` may be
    left; it can be deleted. Between two system calls at the end, an older folder has the name ``.<name>.old-...``.

    Args:
        path: the folder to write, or a place that ``check_place`` returned earlier.
        replace: replace an older folder of this kind. It is moved aside when the new one is complete, and deleted
            when the new one is in its place. If it cannot be deleted, a warning says where it is.

    Raises:
        OSError: as ``check_place``, before the block.
        FileExistsError: after the block, if ``path`` is no longer what it was: something appeared there, or the older
            folder was changed. That stays as it is. The message says where the complete temporary folder is.
    """
    place, complete = check_place(path, replace=replace), False
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
        written = f"complete in {partial}: give that another name"
        if not partial.is_dir():
            written = f"no longer in {path.parent}: look for {partial.name} where that folder was moved, or do it again"
        raise FileExistsError(
            f"{path} is no longer what it was when this began ({error.strerror}), so it stays as it is.{moved} What "
            f"was written is {written}"
        ) from error
    if old.exists():
        try:
            shutil.rmtree(old)
        except OSError as error:
            warnings.warn(
                f"{path} is complete, but what it replaced could not be deleted ({error.strerror}): delete {old}",
                stacklevel=5,
            )


def _contents(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells every file and folder apart from others, by path: a change anywhere in the folder changes this."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        entry = path.lstat()
        found[path.relative_to(folder).as_posix()] = (entry.st_dev, entry.st_ino)
        if not stat.S_ISDIR(entry.st_mode):  # a folder's own times change when it is moved
            found[path.relative_to(folder).as_posix()] += (entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns)
    return found


def _beside(path: Path, what: str) -> Path:
    """A hidden name beside ``path`` that nothing else has. Of a long name it has the start, so that it fits."""
    return path.with_name(f".{path.name[:50]}.{what}-{os.getpid()}-{secrets.token_hex(4)}")


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


def finite_or_null(value: Any) -> Any:
    """A value as strict JSON can store it: a number that is not finite becomes None, also inside dicts and lists."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
