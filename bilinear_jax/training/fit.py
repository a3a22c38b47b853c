"""The training loop: a jitted update of one state pytree, with checkpoints, metrics and exact resume.

``folder.py`` describes the folder of a run, ``checkpoints.py`` its checkpoints.
"""

import collections
import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from bilinear_jax.store.fields import LARGEST_COUNT
from bilinear_jax.store.files import check_name
from bilinear_jax.store.terminal import say
from bilinear_jax.training import folder
from bilinear_jax.training.checkpoints import Checkpoints
from bilinear_jax.training.mesh import largest, on_first_process

STEPS_AHEAD = 2
"""Updates that may be queued on the device. This keeps it busy, and keeps few batches in memory."""


class TrainState(NamedTuple):
    """Everything that a run needs to resume."""

    step: jax.Array  # [], updates done so far
    params: PyTree  # the parameters, float32
    opt_state: PyTree  # the optimiser's state
    extra: PyTree = ()  # counters of the recipe


@runtime_checkable
class BatchIterator(Protocol):
    """A source of batches that can resume: the protocol of Grain's ``DatasetIterator``.

    Its batches depend only on its state: after ``set_state(s)`` it gives exactly the batches that it gave after
    ``get_state()`` returned ``s``.
    """

    def __next__(self) -> Any:
        """The next batch, a pytree of arrays."""
        ...

    def get_state(self) -> dict:
        """The current position, as JSON."""
        ...

    def set_state(self, state: dict) -> None:
        """Go to a saved position."""
        ...


class ByStep:
    """A ``BatchIterator`` made from a function of the step: ``batch_at(0)``, ``batch_at(1)``, ..."""

    def __init__(self, batch_at: Callable[[int], Any]):
        self._batch_at, self._step = batch_at, 0

    def __next__(self) -> Any:
        batch = self._batch_at(self._step)
        self._step += 1
        return batch

    def get_state(self) -> dict:
        return {"step": self._step}

    def set_state(self, state: dict) -> None:
        self._step = state["step"]


class FitOptions(TypedDict, total=False):
    """The options that every recipe passes to ``fit``, where they are explained."""

    save_every: int
    keep: int
    keep_every: int | None
    log_every: int
    log: Callable[[int, dict[str, Any]], None] | None


def fit(
    update: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    data: BatchIterator,
    *,
    steps: int,
    directory: str | Path,
    config: dict,
    save_every: int = 200,
    keep: int = 2,
    keep_every: int | None = None,
    log_every: int = 20,
    log: Callable[[int, dict[str, Any]], None] | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    name: str = "training",
) -> TrainState:
    """Run ``update`` until ``state.step == steps``. Resume from the newest checkpoint in ``directory``.

    However a run ended (an error, a signal, ``kill -9``), the same call resumes it. On one machine, the result has the
    same bits as a run that was never stopped, because parameters, optimiser, counters, keys and the position in the
    data are saved together.

    Signals: SIGTERM and the first Ctrl-C save at the end of the step and stop. SIGTERM then raises ``SystemExit(143)``
    (128 + 15, the status that a shell reports for this signal; it is not 0, because the run is not finished). Ctrl-C
    raises ``KeyboardInterrupt``. A second Ctrl-C interrupts the step. Outside the main thread signals are not handled.
    With several processes, a signal to one of them stops all, at the next step that is logged.

    ``directory`` holds ``config.json``, ``metrics.jsonl`` (one JSON object per line: step, seconds of training so far,
    metrics; null for values that are not finite), and Orbax checkpoints in ``checkpoints/<step>``.

    The device never waits for the host: metrics are fetched when they are logged, and checkpoints are written in the
    background. At most ``STEPS_AHEAD`` batches are queued.

    Args:
        update: a pure function ``(state, batch) -> (state, metrics)``. It is jitted here. Metrics are numbers.
        state: the initial state. It is donated: do not use its arrays afterwards. If they are sharded over a mesh, all
            later and restored states are sharded in the same way.
        data: the batches, one per step. Its state is saved with each checkpoint.
        steps: number of updates in total.
        directory: the folder of the run. Only one process at a time may use it, or the processes of one run.
        config: the description of the run, as JSON. A folder with another config raises an error.
        save_every: steps between checkpoints. There is also one at the end.
        keep: how many of the newest checkpoints to keep.
        keep_every: also keep the checkpoint of every step that is a multiple of this.
        log_every: steps between lines of metrics. There is also one at the end.
        log: called with the step and the metrics that were written, for instance for Weights & Biases:
            ``lambda step, metrics: wandb.log(metrics, step=step)``. A run that resumes from a checkpoint calls it
            again for the steps after the checkpoint.
        evaluate: more metrics, computed from the state every ``evaluate_every`` steps and at the end.
        evaluate_every: steps between evaluations. None: only at the end.
        name: the label of the progress bar.

    Returns:
        The final state.

    Raises:
        ValueError: if the folder has another config or a checkpoint of another run, if no checkpoint can be read, if
            the data ends, or if a number of steps is below 1 or above 2^31 - 1.
        FileExistsError: if the folder is not of a run, but has files with the names of its files.
        FloatingPointError: if a metric or a parameter is not finite. The last good checkpoint stays.
        OSError: if nothing can be written in the folder, or if the disk is full. The last good checkpoint stays.
        RuntimeError: if another process trains in the folder.

    Example:
        >>> import tempfile
        >>> def update(state, batch):
        ...     return TrainState(state.step + 1, state.params + batch, ()), {"sum": state.params}
        >>> start = TrainState(jnp.zeros((), jnp.int32), jnp.zeros(()), ())
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     fit(update, start, ByStep(np.float32), steps=4, directory=directory, config={}).params.item()
        6.0
    """
    from tqdm.auto import tqdm

    for count in (steps, save_every, keep_every, log_every, evaluate_every):
        if count is not None and not 1 <= count <= LARGEST_COUNT:
            raise ValueError(
                "steps, save_every, keep_every, log_every and evaluate_every must be at least 1, "
                f"and at most {LARGEST_COUNT}, got "
                f"{steps}, {save_every}, {keep_every}, {log_every} and {evaluate_every}"
            )
    directory = check_name(directory)
    metrics_path = directory / "metrics.jsonl"
    first = jax.process_index() == 0
    _data_state(data)
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: _prepare(directory, config, stack))
        checkpoints = stack.enter_context(Checkpoints(directory, keep, keep_every))
        state = jax.tree.map(jnp.asarray, state)
        trained_before = 0.0
        if (restored := checkpoints.restore(state, ("data", "seconds"))) is not None:
            jax.tree.map(lambda leaf: leaf.delete(), state)  # frees its memory, as donation would
            state, record = restored
            data.set_state(record["data"])
            trained_before = record["seconds"]
        start = saved = int(state.step)
        on_first_process(lambda: folder.forget_after(metrics_path, start))
        advance, trouble = _watched(update, state)
        began = time.monotonic()
        queued: collections.deque = collections.deque()
        received = stack.enter_context(_signals())
        bar = stack.enter_context(
            tqdm(total=steps, initial=start, desc=name, disable=None if first else True, unit="step")
        )
        for done in range(start + 1, steps + 1):
            (state, trouble), metrics = advance((state, trouble), _next(data, done, steps))
            queued.append(metrics)
            if len(queued) > STEPS_AHEAD:
                jax.block_until_ready(queued.popleft())
            evaluate_due = evaluate is not None and (done == steps or (evaluate_every and done % evaluate_every == 0))
            log_due = evaluate_due or done == steps or done % log_every == 0
            stop = largest(max(received, default=0)) if log_due or jax.process_count() == 1 else 0
            save_due = stop or done == steps or done % save_every == 0
            report = _report(metrics, trouble, done, checkpoints) if log_due or save_due else {}
            if log_due:
                if evaluate is not None and evaluate_due:
                    report |= {key: float(value) for key, value in evaluate(state).items()}
                seconds = round(trained_before + time.monotonic() - began, 1)
                if first:
                    folder.append(metrics_path, {"step": done, "seconds": seconds} | report)
                    if log is not None:
                        log(done, report)
                bar.set_postfix({key: f"{value:.4g}" for key, value in report.items()}, refresh=False)
            if save_due:
                seconds = trained_before + time.monotonic() - began
                checkpoints.save(done, state, {"data": _data_state(data), "seconds": seconds})
                saved = done
            bar.update()
            if stop:
                break
        checkpoints.wait()
        stop = largest(max(received, default=0))
    _leave(stop, f"{name}: stopped at step {saved} of {steps}; it is saved in {directory}")
    return state


def _prepare(directory: Path, config: dict, stack: contextlib.ExitStack) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    folder.check_own(directory)
    stack.enter_context(folder.locked(directory))
    folder.claim(directory, config)


def _data_state(data: BatchIterator) -> dict:
    """A copy of the data source's state, which does not change when the source advances."""
    state = data.get_state()
    try:
        return json.loads(json.dumps(state))
    except TypeError as error:
        name = type(data).__name__
        raise TypeError(f"get_state() of {name} must return JSON, so that it can be saved: {error}") from error


def _watched(update: Callable, state: TrainState):
    """The jitted ``update``, which also carries the first step whose metrics are not finite, or 0."""
    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(state) if isinstance(leaf.sharding, NamedSharding)}
    trouble = jnp.zeros((), jnp.int32)
    out_shardings = None
    if meshes:
        whole = NamedSharding(meshes.pop(), PartitionSpec())
        trouble = jax.device_put(np.zeros((), np.int32), whole)
        out_shardings = ((jax.tree.map(lambda leaf: leaf.sharding, state), whole), whole)

    def watched(carried, batch):
        before, trouble = carried
        after, metrics = update(before, batch)
        finite = [jnp.all(jnp.isfinite(value)) for value in jax.tree.leaves(metrics)]
        new = (trouble == 0) & ~jnp.all(jnp.asarray(finite))
        return (after, jnp.where(new, after.step.astype(jnp.int32), trouble)), metrics

    return jax.jit(watched, donate_argnums=0, out_shardings=out_shardings), trouble


def _next(data: BatchIterator, step: int, steps: int) -> Any:
    try:
        return next(data)
    except StopIteration:
        raise ValueError(f"the data ended before step {step} of {steps}: give more of it, or fewer steps") from None


def _report(metrics: dict[str, jax.Array], trouble: jax.Array, step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """The metrics as numbers. Raises ``FloatingPointError`` if any metric so far was not finite."""
    report = {key: float(value) for key, value in jax.device_get(metrics).items()}
    if int(trouble):
        bad = {key: value for key, value in report.items() if not np.isfinite(value)}
        raise checkpoints.not_finite(
            f"a metric was not finite at step {int(trouble)} (those of step {step}: {bad or 'all finite'})"
        )
    return report


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Record SIGTERM and Ctrl-C in a list. A second Ctrl-C interrupts. At the end the old handlers are restored."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number, frame):
        if received and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        received.append(number)
        # not print, which is unsafe in a signal handler
        os.write(2, b"\nsaving at the end of this step, then stopping; another Ctrl-C stops at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _leave(number: int, message: str) -> None:
    """End as the signal asks, if there was one."""
    if number:
        say(message, sys.stderr)
    if number == signal.SIGTERM:
        raise SystemExit(128 + number)
    if number:
        raise KeyboardInterrupt


def apply_optimizer(optimizer, gradient: PyTree, state: TrainState) -> tuple[PyTree, PyTree]:
    """``(params, opt_state)`` after one update of an Optax optimiser."""
    import optax

    with jax.numpy_dtype_promotion("standard"):  # Optax corrects its bias with integer step counts
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state


def fingerprint(params: PyTree) -> str:
    """A hash of the parameter values. A run's config uses it to identify the model that the run starts from."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


def cosine_with_warmup(peak: float, steps: int, warmup: int, final: float = 0.0):
    """Linear from 0 to ``peak`` over ``warmup`` steps, then a cosine down to ``final`` at ``steps``."""
    import optax

    return optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup, max(steps - 1, 1)), steps, final)


def sum_over_rows(function: Callable[[np.ndarray], dict[str, jax.Array]], rows: np.ndarray, batch_size: int):
    """Add up the sums that ``function(batch)`` returns over all rows. The caller divides once."""
    totals: dict[str, float] = {}
    for start in range(0, len(rows), batch_size):
        for key, value in function(rows[start : start + batch_size]).items():
            totals[key] = totals.get(key, 0.0) + float(value)
    return totals
