"""The folder of a run: one process at a time, one config for ever, metrics that agree with what was resumed.

config.json     what the run was started with
metrics.jsonl   a JSON object a line: step, seconds of training so far, metrics
checkpoints/    of which see ``checkpoints.py``
lock            locked while a process trains here; the lock ends with the process, however that ends
"""

import contextlib
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from bilinear_jax.evaluation import finite_or_null


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
    """Write ``config.json``; raises ``ValueError``, listing the changes, if the folder has checkpoints of another."""
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    if not any(path.name.isdigit() for path in directory.glob("checkpoints/*")):  # nothing is lost by another config
        replace_file(directory / "config.json", text)
        return
    recorded = read_config(directory)
    if recorded is None:
        raise ValueError(
            f"{directory} has checkpoints, but no config.json, which says what they are of: restore it, or name "
            "another folder"
        )
    before, now = _flat(recorded), _flat(json.loads(text))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        listing = ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise ValueError(
            f"{directory} holds a run with another config ({listing}): restore it, or name another folder, or delete "
            "this one to lose that run and begin anew"
        )


def read_config(directory: Path) -> dict | None:
    """What ``claim`` wrote; None if there is nothing. Raises ``ValueError`` for a file that is damaged."""
    path = directory / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: restore it, or name another folder")
    return config


def _flat(value, name: str = "") -> dict:
    """``{"recipe": {"lr": 1}, "saes": [{"k": 2}]}`` as ``{"recipe.lr": 1, "saes.0.k": 2}``."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        return {name: value}
    return {key: leaf for at, part in parts for key, leaf in _flat(part, f"{name}.{at}" if name else str(at)).items()}


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that a run which goes on from ``step`` will write again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            late = json.loads(line)["step"] > step
        except (ValueError, TypeError, KeyError):  # a line that a crash cut short, or that isn't of a run
            continue
        if not late:
            kept.append(line + "\n")
    replace_file(path, "".join(kept))


def append(path: Path, entry: dict) -> None:
    """Add a line to a metrics file, whole before this returns; values that are not finite become null."""
    line = json.dumps(finite_or_null(entry), allow_nan=False)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(error.errno, f"could not write to {path} ({error.strerror}): make room on the disk") from error


def replace_file(path: Path, text: str) -> None:
    """Write a text file that is whole or not there; raises ``OSError`` naming it if that can't be done."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        mend = "make room on the disk, or see what is in the way"
        raise OSError(error.errno, f"could not write {path} ({error.strerror}): {mend}") from error
