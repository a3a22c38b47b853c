"""The folder of a run: one process at a time, one config for ever, metrics that agree with what was resumed.

config.json     what the run was started with
metrics.jsonl   a JSON object a line: step, seconds of training so far, metrics
checkpoints/    of which see ``checkpoints.py``
lock            locked while a process trains here; the lock ends with the process, however that ends
"""

import contextlib
import json
import math
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the folder's lock; raises ``RuntimeError`` naming the process that holds it, if one does.

    A file system that has no locks (some of clusters) gives a warning.
    """
    import fcntl

    with open(directory / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"{directory} is in use by {file.read().strip() or 'another process'}: "
                "wait until that ends, or stop it, or name another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{directory} can't be locked ({error.strerror}): see to it that no other process trains there",
                stacklevel=2,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def claim(directory: Path, config: dict) -> None:
    """Write ``config.json``; raises ``ValueError``, listing the changes, if the folder has another config."""
    path = directory / "config.json"
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    if not path.exists():
        _replace(path, text)
        return
    before, now = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(json.loads(text))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        listing = ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise ValueError(f"{directory} holds a run with another config ({listing}): restore it, or name another folder")


def _flat(config: dict, prefix: str = "") -> dict:
    """``{"recipe": {"lr": 1}}`` as ``{"recipe.lr": 1}``."""
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that a run which goes on from ``step`` will write again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line that a crash cut short
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    _replace(path, "".join(kept))


def append(path: Path, entry: dict) -> None:
    """Add a line to a metrics file, whole before this returns; values that are not finite become null."""
    line = json.dumps({key: _finite(value) for key, value in entry.items()}, allow_nan=False)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(error.errno, f"could not write to {path} ({error.strerror}): make room on the disk") from error


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write {path} ({error.strerror}): make room on the disk") from error
