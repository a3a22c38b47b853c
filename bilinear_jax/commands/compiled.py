"""Compiled programs are kept between commands, so that the second time a command spends its time on its numbers.

They lie in ``$XDG_CACHE_HOME/bilinear-jax/compiled``, or ``~/.cache/bilinear-jax/compiled``, in a folder for each kind
of processor, because a program is made for one kind. JAX writes and reads them, at most ``MOST`` bytes in all, and two
processes may do so at once. ``--no-cache`` turns this off for a command, ``BILINEAR_JAX_CACHE=off`` for all; another
value is the folder to use. Where ``JAX_COMPILATION_CACHE_DIR`` is set, that is used as it is.
"""

import contextlib
import hashlib
import os
import platform
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

MOST = 2**29
"""Bytes of compiled programs that are kept; those that were not used for longest go first."""

SECONDS = 0.1
"""Programs that take less time to compile are not kept."""


def keep_compiled(words: Sequence[str]) -> Path | None:
    """Make JAX keep compiled programs, if it is not imported yet; the folder, or None if nothing is kept.

    Nothing is kept either if others than this user could write to the folder: a program from there would be run.
    """
    given = os.environ.get("BILINEAR_JAX_CACHE")
    if "--no-cache" in words or given == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ or "jax" in sys.modules:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = (Path(given) if given else Path(home) / "bilinear-jax" / "compiled") / _processor()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder):
            return None
        _remove_unfinished(folder)
    except OSError:
        return None
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(MOST)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(SECONDS)
    return folder


def _remove_unfinished(folder: Path) -> None:
    """Remove programs that a killed process had not finished writing: JAX would neither read nor replace them.

    It writes ``<key>-cache``, and then ``<key>-atime``.
    """
    for path in folder.glob("*-cache"):
        if not path.with_name(f"{path.name.removesuffix('-cache')}-atime").exists():
            path.unlink(missing_ok=True)


def _is_ours(folder: Path) -> bool:
    """Whether only this user can write to a folder. Always, where files have no owner."""
    if not hasattr(os, "getuid"):
        return True
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _processor() -> str:
    """A name for what the processor can do: a hash of the features that Linux lists, or else its type."""
    features = platform.machine() + platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        features = "".join(sorted({line for line in file if line.startswith(("flags", "Features", "model name"))}))
    return hashlib.sha256(features.encode()).hexdigest()[:16]
