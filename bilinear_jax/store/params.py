"""The params in the folder of a model or an SAE: an Orbax checkpoint, ``folder/params``, and how it is checked."""

import contextlib
import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bilinear_jax.nn.configs import check_plain
from bilinear_jax.store import checksums
from weights_convert.files import inside
from weights_convert.weights import FLOATS

NOTHING_TO_MERGE = "Skipping merge of OCDBT checkpoints"
"""Orbax warns so when it saves, but only one process writes."""
NO_DATA_FILES = "TensorStore data files not found"
"""Orbax warns so when it loads, because it looks for files of zarr 2 and these are of zarr 3. Files that are missing
are found by their record in ``config.json``, or when they are read."""


def stored_params(folder: Path, params: PyTree, abstract: PyTree, dtype: Any) -> PyTree:
    """The params as they will be on disk: in C order, and in ``dtype``. Raises ``ValueError`` if they cannot be."""
    _check_shapes(folder, params, abstract)
    dtypes = jax.tree.map(lambda leaf: np.dtype(leaf.dtype if dtype is None else dtype).newbyteorder("="), params)
    if other := sorted({each.name for each in jax.tree.leaves(dtypes)} - set(FLOATS)):
        raise ValueError(
            f"the params of {folder} cannot be stored as {', '.join(other)}: give dtype as one of {', '.join(FLOATS)}"
        )
    for leaf in jax.tree.leaves(params):
        check_plain(leaf, f"the params of {folder}")
    with np.errstate(over="ignore"):
        arrays = jax.tree.map(lambda leaf, kind: np.asarray(leaf, kind, order="C"), params, dtypes)
    _check_finite(folder, arrays, "" if dtype is None else f" as {np.dtype(dtype).name}")
    return arrays


def write_params(folder: Path, arrays: PyTree) -> dict[str, int]:
    """Write the arrays of ``stored_params`` to ``folder/params``. Returns their checksums."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # it makes weights 7 % smaller, but takes three times as long
    context.array.saving.use_ocdbt = False  # only one process writes, so there is nothing to merge
    context.memory.deepcopy_host_arrays = False  # nothing changes them, because the save is waited for
    with ThreadPoolExecutor(1) as meanwhile, context, _without(NOTHING_TO_MERGE):
        crc32 = meanwhile.submit(checksums.of_params, arrays)
        ocp.save(str(folder.resolve() / "params"), arrays)
    if len(list((folder / "params").rglob("zarr.json"))) != len(jax.tree.leaves(arrays)):
        raise OSError(f"Orbax did not write all arrays into {folder / 'params'}: name another folder")
    (folder / "params" / "commit_success.txt").unlink(missing_ok=True)  # it contains a path of this machine
    return crc32.result()


def restore_params(folder: Path, raw: Mapping[str, Any], abstract: PyTree, *, sealed: bool = True) -> PyTree:
    """The params of a folder in float32. Their structure and shapes must be those of ``abstract``.

    ``sealed``: also compare the record with its own checksum, or warn if it has none.
    """
    from orbax.checkpoint import v1 as ocp

    path = folder.resolve() / "params"
    if not path.is_dir():
        raise FileNotFoundError(f"{folder} has no params: the checkpoint is incomplete. Convert or download it again")
    for entry in (path, *path.rglob("*")):
        inside(folder, entry.relative_to(folder.resolve()).as_posix())
    for name, size in (raw.get("files") or {}).items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            raise _damaged(
                path, f"{name} should have {size} bytes, but {'is missing' if there is None else f'has {there}'}"
            )

    def described() -> Any:
        found = ocp.metadata(str(path)).metadata
        if found is None:
            raise ValueError("its metadata cannot be read")
        return found

    stored = _read(path, described)
    _check_shapes(folder, stored, abstract)
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract)
    arrays = _read(path, lambda: ocp.load(str(path), target))
    _check_finite(folder, arrays)
    crc32, found = raw.get("crc32") or {}, checksums.of_params(arrays)
    if changed := sorted(key for key, checksum in crc32.items() if found.get(key) != checksum):
        raise _damaged(path, f"these are not the values that were written: {', '.join(changed)}")
    if sealed and not checksums.check_seal(folder / "config.json", raw):
        lacking = "its config and the files beside it" if crc32 else "its params, its config and the files beside it"
        warnings.warn(
            f"{folder} was written by a version that recorded no checksums of {lacking}, so changes in them are not "
            f"noticed. If you trust the folder, add them with {checksums.how_to_add(folder)}",
            stacklevel=4,
        )
    return jax.tree.map(jnp.asarray, arrays)


def _read(path: Path, action: Callable[[], Any]) -> Any:
    try:
        with _without(NO_DATA_FILES):
            return read_quietly(action)
    except Unreadable as error:
        raise _damaged(path, str(error)) from error


_READS_END = 0.2
"""Seconds in which the other reads of a checkpoint end after one has failed. Orbax does not wait for them."""


class Unreadable(Exception):
    """A checkpoint that Orbax cannot read, with the reason."""


def read_quietly(action: Callable[[], Any]) -> Any:
    """The result of an Orbax action that reads. What is logged meanwhile is passed on when the action has succeeded.

    Raises ``Unreadable`` with the reason if it fails. Nothing is printed then: Orbax logs long traces, and leaves
    unfinished tasks, one per array, which print errors when they are collected, and reads, which print errors when they
    end. Both happen here.
    """
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    loggers = {name: logging.getLogger(name) for name in ("absl", "asyncio")}
    hook, result, reason = sys.unraisablehook, None, ""
    sys.unraisablehook = lambda found: None if str(found.exc_value) == "Event loop is closed" else hook(found)
    for logger in loggers.values():
        logger.addFilter(hold)
    try:
        result = action()
    except MemoryError:
        raise
    except Exception as error:
        sys.unraisablehook = lambda _: None
        reason = first_line(error)
    finally:
        if reason:  # the error is gone by now, and with it what held the tasks
            time.sleep(_READS_END)
            gc.collect()
        sys.unraisablehook = hook
        for logger in loggers.values():
            logger.removeFilter(hold)
    if reason:
        raise Unreadable(reason)
    for record in held:
        loggers[record.name].handle(record)
    return result


def first_line(error: Exception) -> str:
    """The first line of an error, without the paths and settings after it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextlib.contextmanager
def _without(text: str) -> Iterator[None]:
    """Leave out this one warning of Orbax, which does not hold. All other warnings stay."""
    logger = logging.getLogger("absl")

    def other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} cannot be read ({reason}): the checkpoint is damaged. Convert or download it again")


def _check_shapes(folder: Path, params: PyTree, abstract: PyTree) -> None:
    """Raise ``ValueError`` if names or shapes differ. The message lists both sides."""
    have, want = (
        {
            jax.tree_util.keystr(key, simple=True, separator="."): tuple(leaf.shape)
            for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (params, abstract)
    )
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    wrong = [f"{key} {have[key]}, expected {want[key]}" for key in sorted(have.keys() & want) if have[key] != want[key]]
    if missing or extra or wrong:
        raise ValueError(
            f"the params of {folder} do not match its config. In the model but not in the checkpoint: "
            f"{', '.join(missing) or 'nothing'}; in the checkpoint but not in the model: "
            f"{', '.join(extra) or 'nothing'}; shapes: {'; '.join(wrong) or 'as expected'}. "
            "Check that the params and the config belong together"
        )


def _check_finite(folder: Path, params: PyTree, stored: str = "") -> None:
    bad = [
        jax.tree_util.keystr(key, simple=True, separator=".")
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not all(np.isfinite(part).all() for part in checksums.parts(np.asarray(leaf)))
    ]
    if bad:
        raise ValueError(
            f"the params of {folder} have NaN or infinite values{stored}: {', '.join(bad)}. Use an earlier checkpoint"
            + (", or a dtype with a larger range" if stored else "")
        )
