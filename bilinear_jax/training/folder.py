"""The folder of a run. It belongs to one process at a time and to one config.

What is in it:

    config.json     the config that started the run, with the SHA-256 of its data
    metrics.jsonl   one JSON object per line: step, seconds of training so far, metrics
    checkpoints/    see ``checkpoints.py``
    lock            locked while a process trains here; the lock ends with the process, however that ends
"""

import contextlib
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from bilinear_jax.store.files import finite_or_null, read_json, replace_file


def check_own(directory: Path) -> None:
    """Raise ``FileExistsError`` if files here would be replaced, but no run has written them: there is no lock."""
    there = [name for name in ("config.json", "metrics.jsonl") if (directory / name).exists()]
    if there and not any((directory / name).exists() for name in ("lock", "checkpoints")):
        raise FileExistsError(
            f"{directory} has {' and '.join(there)}, but not of a run, which would replace it: name another folder"
        )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises ``RuntimeError`` with the process that holds it, if there is one.

    On a file system without locks (as on some clusters) it only warns.
    """
    import fcntl

    with open(directory / "lock", "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"{directory} is in use by {file.read().strip() or 'another process'}: "
                "wait until it ends, stop it, or name another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{directory} cannot be locked ({error.strerror}): make sure that no other process trains there",
                stacklevel=2,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


DATA = "data_sha256"
"""The key of a run's config for the SHA-256 of its data. Configs of earlier versions do not have it."""


def claim(directory: Path, config: dict) -> None:
    """Write ``config.json``. Raises ``ValueError`` with the changes if the folder has checkpoints of another config.

    A recorded config without ``DATA`` is not compared in it.
    """
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    if not any(path.name.isdigit() for path in directory.glob("checkpoints/*")):  # so nothing is lost
        replace_file(directory / "config.json", text)
        return
    recorded = read_config(directory)
    if recorded is None:
        raise ValueError(
            f"{directory} has checkpoints, but no config.json, which describes their run: restore it, or name another "
            "folder"
        )
    before, now = _flat(recorded), _flat(json.loads(text))
    known = before.keys() | (now.keys() - {DATA})
    changed = sorted(key for key in known if before.get(key) != now.get(key))
    if changed:
        listing = ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise ValueError(
            f"{directory} holds a run with another config ({listing}): use the old config, or name another folder, or "
            "delete this one, with its run, and start again"
        )


def read_config(directory: Path) -> dict | None:
    """The config that ``claim`` wrote. None if there is none. Raises ``ValueError`` if the file is damaged."""
    return read_json(directory / "config.json", fix="restore it, or name another folder")


def _flat(value, name: str = "") -> dict:
    """``{"recipe": {"lr": 1}, "saes": [{"k": 2}]}`` as ``{"recipe.lr": 1, "saes.0.k": 2}``."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        return {name: value}
    return {key: leaf for at, part in parts for key, leaf in _flat(part, f"{name}.{at}" if name else str(at)).items()}


def forget_after(path: Path, step: int) -> None:
    """Drop the lines after ``step`` from a metrics file. A run that resumes at ``step`` writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            late = json.loads(line)["step"] > step
        except (ValueError, TypeError, KeyError, RecursionError):  # a line that a crash cut short, or foreign text
            continue
        if not late:
            kept.append(line + "\n")
    replace_file(path, "".join(kept))


def append(path: Path, entry: dict) -> None:
    """Add a complete line to a metrics file. Values that are not finite become null."""
    line = json.dumps(finite_or_null(entry), allow_nan=False)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(error.errno, f"could not write to {path} ({error.strerror}): free disk space") from error
