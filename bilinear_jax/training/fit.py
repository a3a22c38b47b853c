"""The one training loop: a jitted update on one state pytree, checkpoints, metrics, exact resume."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import PyTree


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


def fit(
    update: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    data: BatchIterator,
    *,
    steps: int,
    directory: str | Path,
    config: dict,
    save_every: int = 200,
    log_every: int = 20,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    name: str = "training",
) -> TrainState:
    """Run ``update`` until ``state.step == steps``, going on from the newest checkpoint in ``directory``.

    Every step takes the next batch of ``data``, whose state is saved in the checkpoint. Writes into
    ``directory``: ``config.json`` (refuses to resume a run that another config started), ``metrics.jsonl``
    (a JSON object a line: step, seconds of training so far, metrics), and Orbax checkpoints, the newest
    two kept. ``update`` is jitted here and its state argument donated.

    Raises ``ValueError`` for a changed config and ``FloatingPointError`` for a loss that is not finite;
    the last good checkpoint stays.
    """
    from orbax.checkpoint import v1 as ocp
    from tqdm.auto import tqdm

    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    _claim(directory, config)
    policy: Any = ocp.training.preservation_policies.LatestN(2)
    update = jax.jit(update, donate_argnums=0)
    with ocp.training.Checkpointer(
        str(directory / "checkpoints"), preservation_policy=policy, cleanup_tmp_directories=True
    ) as checkpointer:
        if checkpointer.latest is not None:
            abstract = {"state": jax.tree.map(jax.numpy.asarray, state), "data": None}
            loaded = checkpointer.load_checkpointables(checkpointer.latest.step, abstract)
            state = loaded["state"]
            data.set_state(loaded["data"])
        start = int(state.step)
        metrics_path = directory / "metrics.jsonl"
        trained_before = _forget_after(metrics_path, start)
        began = time.monotonic()
        with tqdm(total=steps, initial=start, desc=name, disable=None, unit="step") as bar:
            for step in range(start, steps):
                state, metrics = update(state, next(data))
                done = step + 1
                last = done == steps
                save_due = last or done % save_every == 0
                evaluate_due = evaluate is not None and (last or (evaluate_every and done % evaluate_every == 0))
                if save_due or evaluate_due or done % log_every == 0:
                    report = {key: float(value) for key, value in metrics.items()}
                    bad = {key: value for key, value in report.items() if not math.isfinite(value)}
                    if bad:
                        raise FloatingPointError(
                            f"{bad} at step {done}; the last good checkpoint is in {directory / 'checkpoints'}. "
                            "Lower the learning rate, or lengthen the warm-up"
                        )
                    if evaluate is not None and evaluate_due:
                        report |= evaluate(state)
                    seconds = round(trained_before + time.monotonic() - began, 1)
                    _append(metrics_path, {"step": done, "seconds": seconds} | report)
                    bar.set_postfix({key: f"{value:.4g}" for key, value in report.items()}, refresh=False)
                if save_due:
                    checkpointer.save_checkpointables(done, {"state": state, "data": data.get_state()}, force=True)
                bar.update()
    return state


def apply_optimizer(optimizer, gradient: PyTree, state: TrainState) -> tuple[PyTree, PyTree]:
    """``(params, opt_state)`` after one update of an Optax optimiser."""
    import optax

    with jax.numpy_dtype_promotion("standard"):  # Optax corrects its bias with integer step counts
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state


def _claim(directory: Path, config: dict) -> None:
    path = directory / "config.json"
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, path)
        return
    before, now = json.loads(path.read_text()), json.loads(text)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        listing = ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise ValueError(f"{directory} holds a run with another config ({listing}): restore it, or name another folder")


def _forget_after(path: Path, step: int) -> float:
    """Drop the metric lines that the resumed run will write again; the seconds that the kept ones took."""
    if not path.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line that a crash cut short
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
            seconds = entry["seconds"]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
    return seconds


def _append(path: Path, entry: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


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
