"""Checkpoints of a run: complete or absent, verified when they are read, with the newest few kept.

A checkpoint is one Orbax folder, ``checkpoints/<step>``, which gets this name when it is complete. It holds the
training state, a record (JSON: the position in the data, the seconds of training) and a checksum of every array,

    sum over i of (2 i + 1) bits_i   mod 2^32        bits_i: the bits of number i as an unsigned integer

The checksum is computed on the device where the array is, shard by shard, and again after loading. Orbax notices a
file that was cut short, but it may not notice changed contents. The step, the record, the checksums and the SHA-256 of
the run's ``config.json`` are sealed together (see ``store.checksums``), so a checkpoint of another run is noticed. A
checkpoint of a version before seals is loaded with a warning.
"""

import contextlib
import functools
import itertools
import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, UInt32

from bilinear_jax.store.checksums import intact, of_json, sealed
from bilinear_jax.store.files import check_name
from bilinear_jax.store.params import Unreadable, first_line, read_quietly
from bilinear_jax.training.folder import read_config
from bilinear_jax.training.mesh import largest, on_first_process

_ORBAX_LOG = logging.getLogger("absl")


class Checkpoints:
    """The checkpoints of one run, as a context manager. Leaving it waits for the last save.

    Args:
        directory: the folder of the run. The checkpoints are in ``checkpoints/<step>`` in it. Its ``config.json``, if
            there is one, is that of the run already.
        keep: how many of the newest checkpoints to keep.
        keep_every: also keep every checkpoint whose step is a multiple of this. None: no others.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     checkpoints.save(3, {"params": jnp.arange(4.0)}, {"position": 12})
        ...     state, record = checkpoints.restore({"params": jnp.zeros(4)})
        >>> state["params"].tolist(), record
        ([0.0, 1.0, 2.0, 3.0], {'position': 12})
    """

    def __init__(self, directory: str | Path, keep: int = 2, keep_every: int | None = None):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, the newest checkpoint, got {keep}")
        self.directory = check_name(directory)
        self.keep, self.keep_every = keep, keep_every
        self._run = of_json(read_config(self.directory))
        self._pending: tuple[int, Any] | None = None

    def __enter__(self) -> "Checkpoints":
        from orbax.checkpoint import v1 as ocp

        self._log_level = _ORBAX_LOG.level
        _ORBAX_LOG.setLevel(logging.CRITICAL)  # it logs long traces for the errors that are raised here
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(self.keep)]
        if self.keep_every is not None:
            kept.append(policies.EveryNSteps(self.keep_every))
        policy: Any = policies.AnyPreservationPolicy(kept)
        there = str(self.directory / "checkpoints")
        opened = functools.partial(
            ocp.training.Checkpointer, there, preservation_policy=policy, cleanup_tmp_directories=True
        )
        try:
            self._orbax = opened()
        except Exception as error:  # Orbax lists no checkpoint if it cannot read the metadata of one
            try:
                self._without_unlisted(error)
                self._orbax = opened()
            except BaseException:
                _ORBAX_LOG.setLevel(self._log_level)
                raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(f"Also, {failure}")
        finally:
            self._orbax.close()
            _ORBAX_LOG.setLevel(self._log_level)

    def save(self, step: int, state: PyTree, record: dict) -> None:
        """Save the state of a step. Writing continues in the background. ``state`` may be changed or donated at once.

        Raises:
            FloatingPointError: if ``params`` in the state are not finite, or if anything in it is NaN. Nothing is
                saved.
            OSError: if this save or the one before failed. Earlier checkpoints are still there.
        """
        self.wait()
        leaves = named_leaves(state)
        checksums, not_finite = jax.device_get(_fingerprint(leaves))
        bad = sorted(name for name, found in not_finite.items() if found)
        if bad:
            raise self.not_finite(f"at step {step} these are not finite: {', '.join(bad)}")
        arrays = {name: _description(leaf) | {"checksum": int(checksums[name])} for name, leaf in leaves.items()}
        metadata: Any = sealed({"step": step, "run": self._run, "record": record, "arrays": arrays})
        try:
            response = self._orbax.save_async(step, leaves, force=True, custom_metadata=metadata)
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = (step, response)

    def wait(self) -> None:
        """Wait until the last save is complete. Raises ``OSError`` if it failed."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            raise self._failed(step, error) from error

    def restore(self, state: PyTree, fields: Sequence[str] = ()) -> tuple[PyTree, dict] | None:
        """The newest readable checkpoint, as ``(state, record)``. None if there are no checkpoints.

        A newer checkpoint that cannot be read is moved to ``damaged/<step>``, with a warning that names both. Nothing
        there is replaced: the next one of this step is ``damaged/<step>-2``.

        Args:
            state: arrays with the structure, shapes, dtypes and shardings of what to load.
            fields: what the record must have. A checkpoint without them cannot be read.

        Raises:
            ValueError: if a checkpoint holds other arrays than ``state``, or if none can be read.
        """
        self.wait()
        leaves = named_leaves(state)
        problems: dict[int, str] = {}
        steps = sorted((checkpoint.step for checkpoint in self._orbax.checkpoints), reverse=True)
        for step in steps:
            try:
                loaded, record = self._load(step, leaves, fields)
            except Unreadable as problem:
                problems[step] = str(problem)
                continue
            self._set_aside(problems, step)
            self._orbax.reload()
            return jax.tree.unflatten(jax.tree.structure(state), list(loaded.values())), record
        if not steps:
            return None
        raise self._none_read(problems)

    def not_finite(self, what: str) -> FloatingPointError:
        """The error for NaN or infinite values in a run. It names them, the last good checkpoint, and what to do."""
        with contextlib.suppress(OSError):
            self.wait()
        kept = self._last_good()
        anew = "run the same command with that" if kept == "none" else "start again with that in another folder"
        return FloatingPointError(
            f"{what}; the last good checkpoint in {self.directory / 'checkpoints'} is {kept}. Lower the learning rate "
            f"or lengthen the warm-up, and {anew}"
        )

    def _last_good(self, but: int | None = None) -> str:
        steps = [checkpoint.step for checkpoint in self._orbax.checkpoints if checkpoint.step != but]
        return f"of step {max(steps)}" if steps else "none"

    def _load(self, step: int, leaves: dict[str, Array], fields: Sequence[str]) -> tuple[dict[str, Array], dict]:
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in leaves.items()
        }
        metadata: Any = read_quietly(lambda: self._orbax.checkpointables_metadata(step).custom_metadata)
        seal = _check_metadata(step, self._run, metadata, fields)
        try:
            self._compare(step, metadata["arrays"], leaves)
            saved = {name: metadata["arrays"][name]["checksum"] for name in leaves}
        except (AttributeError, KeyError, TypeError) as error:  # only where there is no seal
            raise Unreadable(f"its metadata is damaged: {error!r}") from error
        loaded: Any = read_quietly(lambda: self._orbax.load(step, abstract))
        loaded = {name: loaded[name] for name in leaves}
        checksums, _ = jax.device_get(_fingerprint(loaded))
        changed = [name for name in leaves if int(checksums[name]) != saved[name]]
        if changed:
            raise Unreadable(f"not what was saved: {', '.join(changed)}")
        if not seal:
            warnings.warn(
                f"checkpoint {step} of {self.directory} was saved by a version that recorded no checksum of its place "
                "in the data, so a change of it is not noticed: resuming from it as it is",
                stacklevel=4,
            )
        return loaded, metadata["record"]

    def _steps(self) -> list[int]:
        """The steps of the folders in ``checkpoints``, readable or not."""
        folders = (self.directory / "checkpoints").glob("*")
        return [int(path.name) for path in folders if path.name.isdecimal() and path.is_dir()]

    def _without_unlisted(self, error: Exception) -> None:
        """Set the checkpoints aside whose metadata Orbax cannot read. Raises the error if that does not help."""
        from orbax.checkpoint import v1 as ocp

        problems = {}
        for step in self._steps():
            path = str(self.directory / "checkpoints" / str(step))
            try:
                read_quietly(functools.partial(ocp.checkpointables_metadata, path))
            except Unreadable as problem:
                problems[step] = str(problem)
        rest = set(self._steps()) - problems.keys()
        if not problems:
            raise error
        if not rest:
            raise self._none_read(problems) from error
        if jax.process_count() > 1:  # some may have failed, and others not
            raise ValueError(f"checkpoints of {self.directory} cannot be read: {problems}. Move them away") from error
        self._set_aside(problems, max(rest))

    def _none_read(self, problems: dict[int, str]) -> ValueError:
        listing = "; ".join(f"{step} ({problem})" for step, problem in problems.items())
        return ValueError(
            f"none of the checkpoints in {self.directory / 'checkpoints'} can be read: {listing}. "
            "Restore one from a copy, or name another folder to train from the beginning"
        )

    def _compare(self, step: int, saved: dict, leaves: dict[str, Array]) -> None:
        """Raise ``_Mismatch`` if names, shapes or dtypes differ. The message lists both sides."""
        have = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in saved.items()}
        want = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in leaves.items()}
        if have == want:
            return
        both = sorted(have.keys() & want)
        other = [f"{name} {have[name]}, expected {want[name]}" for name in both if have[name] != want[name]]
        raise _Mismatch(
            f"checkpoint {step} in {self.directory / 'checkpoints'} belongs to another run. "
            f"In the checkpoint but not in this run: {', '.join(sorted(have.keys() - want)) or 'nothing'}; "
            f"in this run but not in the checkpoint: {', '.join(sorted(want.keys() - have)) or 'nothing'}; "
            f"shapes and dtypes: {'; '.join(other) or 'as expected'}. Name another folder"
        )

    def _set_aside(self, problems: dict[int, str], loaded: int) -> None:
        """Move checkpoints that cannot be read away, so that the run can save these steps again."""
        if not problems:
            return
        home = self.directory / "damaged"
        goals = {step: _free(home, step) for step in problems}
        largest(0)  # so that all processes have found the same names

        def move() -> None:
            home.mkdir(exist_ok=True)
            for step, goal in goals.items():
                (self.directory / "checkpoints" / str(step)).rename(goal)

        on_first_process(move)
        for step, problem in problems.items():
            warnings.warn(
                f"checkpoint {step} of {self.directory} cannot be read ({problem}): resuming from checkpoint {loaded}. "
                f"The damaged one is kept in {goals[step]}",
                stacklevel=4,
            )

    def _failed(self, step: int, error: Exception) -> OSError:
        with contextlib.suppress(Exception):
            self._orbax.wait()  # it would raise the same error again later
        for partial in (self.directory / "checkpoints").glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        return OSError(
            f"the checkpoint of step {step} could not be written to {self.directory / 'checkpoints'} "
            f"({first_line(error)}); the last good one is {self._last_good(but=step)}. "
            "Free disk space, then run the same command again"
        )


class _Mismatch(ValueError):
    """A readable checkpoint of another run."""


def _check_metadata(step: int, run: str, metadata: Any, fields: Sequence[str]) -> bool:
    """Whether the metadata of a checkpoint are sealed. Raises ``Unreadable`` if ``save`` did not write them so."""
    if not metadata:
        raise Unreadable("its metadata is missing")
    found = intact(metadata)
    if found and metadata["step"] != step:
        raise Unreadable(f"it is a copy of checkpoint {metadata['step']}")
    if found and metadata.get("run", run) != run:  # the first sealed ones did not have it
        raise Unreadable("it is of a run with another config")
    older = metadata.keys() == {"record", "arrays"}
    whole = found or (older and isinstance(metadata["record"], dict) and metadata["record"].keys() >= set(fields))
    if not whole:
        raise Unreadable("its metadata is not what was saved")
    return not older


def _free(folder: Path, step: int) -> Path:
    """A path that nothing has: ``folder/<step>``, else ``folder/<step>-2``, and so on."""
    names = itertools.chain([str(step)], (f"{step}-{number}" for number in itertools.count(2)))
    return next(folder / name for name in names if not os.path.lexists(folder / name))


def named_leaves(state: PyTree) -> dict[str, Array]:
    """The arrays of a pytree by their path: ``{"params.layers.mlp.w_l": ..., ...}``, in the pytree's order."""
    pairs = jax.tree_util.tree_leaves_with_path(state)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}
    if len(leaves) < len(pairs):
        raise ValueError("two arrays of the state have one path: keys of its dicts must not contain a '.'")
    return leaves


@jax.jit
def _fingerprint(leaves: dict[str, Array]) -> tuple[dict[str, UInt32[Array, ""]], dict[str, Bool[Array, ""]]]:
    """The checksum of every array, and whether it must not be saved."""
    checksums = {name: _checksum(leaf) for name, leaf in leaves.items()}
    return checksums, {name: _not_finite(name, leaf) for name, leaf in leaves.items()}


def _checksum(leaf: Array) -> UInt32[Array, ""]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize, 4)  # 8-byte numbers become two of 4 bytes
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # a reshape would gather a sharded array
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def _not_finite(name: str, leaf: Array) -> Bool[Array, ""]:
    """Whether an array has NaN, or in ``params`` also infinity. An optimiser may hold infinity as a first minimum."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros((), bool)
    return jnp.any(~jnp.isfinite(leaf)) if name.startswith("params") else jnp.any(jnp.isnan(leaf))


def _description(leaf: Array) -> dict:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
