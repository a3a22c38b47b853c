"""The one training loop: a jitted update on one state pytree, checkpoints, metrics, exact resume.

What is in a run's folder, and who may write there, is in ``folder.py``; checkpoints are in ``checkpoints.py``.
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

from bilinear_jax.training import folder
from bilinear_jax.training.checkpoints import Checkpoints
from bilinear_jax.training.mesh import largest, on_first_process

STEPS_AHEAD = 2
"""Updates that may be queued on the device: enough to keep it busy, few enough that batches don't pile up."""


class TrainState(NamedTuple):
    """Everything that a run needs to go on."""

    step: jax.Array  # [], updates done so far
    params: PyTree  # the parameters, float32
    opt_state: PyTree  # the optimiser's state
    extra: PyTree = ()  # counters of the recipe


@runtime_checkable
class BatchIterator(Protocol):
    """A source of batches that can go on from where it was: the protocol of Grain's ``DatasetIterator``.

    What it gives is a function of its state alone: after ``set_state(s)`` it gives exactly what it gave after
    ``get_state()`` returned ``s``.
    """

    def __next__(self) -> Any:
        """The next batch, a pytree of arrays."""
        ...

    def get_state(self) -> dict:
        """Where it is, as JSON."""
        ...

    def set_state(self, state: dict) -> None:
        """Go to where it was."""
        ...


class ByStep:
    """A ``BatchIterator`` of a function of the step: ``batch_at(0)``, ``batch_at(1)``, ..."""

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
    """What the recipes hand on to ``fit``, whose docstring says what each is."""

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
    """Run ``update`` until ``state.step == steps``, going on from the newest checkpoint in ``directory``.

    However a run ended (an error, a signal, ``kill -9``), the same call goes on, and on one machine it ends
    with the same bits as a run that was never stopped: parameters, optimiser, counters, keys and the place in the data
    are saved together. SIGTERM and the first Ctrl-C save at the end of the step and stop: SIGTERM by
    ``SystemExit(143)`` (128 + 15, as a shell reports a process that the signal ended: the run isn't done, so the
    status isn't 0), Ctrl-C by ``KeyboardInterrupt``. A second Ctrl-C interrupts the step. In a thread that isn't the
    main one, signals are left alone. With several processes, a signal to one of them stops all, at the next step that
    is logged.

    ``directory`` holds ``config.json``, ``metrics.jsonl`` (a JSON object a line: step, seconds of training so far,
    metrics; null for what isn't finite), and Orbax checkpoints in ``checkpoints/<step>``.

    The device never waits for the host: metrics are fetched when they are logged, checkpoints are written in the
    background. At most ``STEPS_AHEAD`` batches are queued.

    Args:
        update: a pure function ``(state, batch) -> (state, metrics)``, jitted here; metrics are numbers.
        state: the state to start with. It is donated: don't use its arrays afterwards. If they are laid out over a
            mesh, so are those of every later state, and of a restored one.
        data: the batches; every step takes the next. Its state is saved with each checkpoint.
        steps: updates in all.
        directory: the run's folder; one process at a time may use it, or the processes of one run.
        config: what the run is, as JSON; a folder that another config started is refused.
        save_every: steps between checkpoints; there is one at the end as well.
        keep: how many of the newest checkpoints to keep.
        keep_every: also keep the checkpoint of every step that is a multiple of this.
        log_every: steps between lines of metrics; there is one at the end as well.
        log: called with the step and the metrics that were written, for Weights & Biases for instance:
            ``lambda step, metrics: wandb.log(metrics, step=step)``. A run that goes on from a checkpoint calls it
            again for the steps after that.
        evaluate: further metrics, of the state, every ``evaluate_every`` steps and at the end.
        name: what the progress bar is called.

    Raises:
        ValueError: for another config, a checkpoint of another run, if no checkpoint can be read, if the data ends, or
            for a number of steps that isn't at least 1.
        FloatingPointError: if a metric or a parameter is not finite; the last good checkpoint stays.
        OSError: if the disk is full; the last good checkpoint stays.
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
        if count is not None and count < 1:
            raise ValueError(
                "steps, save_every, keep_every, log_every and evaluate_every must be at least 1, got "
                f"{steps}, {save_every}, {keep_every}, {log_every} and {evaluate_every}"
            )
    directory = Path(directory).resolve()
    metrics_path = directory / "metrics.jsonl"
    first = jax.process_index() == 0
    _data_state(data)
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: _prepare(directory, config, stack))
        checkpoints = stack.enter_context(Checkpoints(directory, keep, keep_every))
        state = jax.tree.map(jnp.asarray, state)
        trained_before = 0.0
        if (restored := checkpoints.restore(state)) is not None:
            jax.tree.map(lambda leaf: leaf.delete(), state)  # as if donated: its memory is needed
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
    _leave(stop, f"{name}: stopped at step {saved} of {steps}, which is saved in {directory}")
    return state


def _prepare(directory: Path, config: dict, stack: contextlib.ExitStack) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    stack.enter_context(folder.locked(directory))
    folder.claim(directory, config)


def _data_state(data: BatchIterator) -> dict:
    """Where the data source is, as a copy that stays when the source goes on."""
    state = data.get_state()
    try:
        return json.loads(json.dumps(state))
    except TypeError as error:
        name = type(data).__name__
        raise TypeError(f"get_state() of {name} must give JSON, so that it can be saved: {error}") from error


def _watched(update: Callable, state: TrainState):
    """``update``, jitted, and a number that it carries along: the first step with a metric that isn't finite, or 0."""
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
    """The metrics as numbers; raises ``FloatingPointError`` if one of them is not finite, or was not."""
    report = {key: float(value) for key, value in jax.device_get(metrics).items()}
    if int(trouble):
        bad = {key: value for key, value in report.items() if not np.isfinite(value)}
        raise checkpoints.not_finite(
            f"a metric was not finite at step {int(trouble)} (those of step {step}: {bad or 'all finite'})"
        )
    return report


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C are noted in the list; a second Ctrl-C interrupts. Before and after, they do as they did."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number, frame):
        if received and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        received.append(number)
        os.write(2, b"\nsaving at the end of this step, then stopping; Ctrl-C stops at once\n")  # print can't be nested

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _leave(number: int, message: str) -> None:
    """What the signal of this number, if there was one, asks for."""
    if number:
        print(message, file=sys.stderr)
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
    """A hash of the values: what a run that builds on a model says of it in its config, wherever the model is kept."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


def cosine_with_warmup(peak: float, steps: int, warmup: int, final: float = 0.0):
    """Linear from 0 to ``peak`` over ``warmup`` steps, then a cosine down to ``final`` at ``steps``."""
    import optax

    return optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup, max(steps - 1, 1)), steps, final)


def sum_over_rows(function: Callable[[np.ndarray], dict[str, jax.Array]], rows: np.ndarray, batch_size: int):
    """Sums the sums that ``function(batch)`` returns over all rows; the caller divides once."""
    totals: dict[str, float] = {}
    for start in range(0, len(rows), batch_size):
        for key, value in function(rows[start : start + batch_size]).items():
            totals[key] = totals.get(key, 0.0) + float(value)
    return totals
