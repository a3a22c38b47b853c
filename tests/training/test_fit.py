"""The training loop: exact resume, honest metrics, and errors that keep what was good."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.training.fit import ByStep, TrainState, cosine_with_warmup, fit, sum_over_rows


class Interrupted(Exception):
    pass


def start() -> TrainState:
    return TrainState(
        jnp.zeros((), jnp.int32), {"w": jnp.ones(3)}, {"m": jnp.zeros(3)}, {"seen": jnp.zeros((), jnp.int32)}
    )


def update(state: TrainState, batch):
    momentum = 0.9 * state.opt_state["m"] + batch
    params = {"w": state.params["w"] - 0.1 * momentum}
    loss = jnp.sum(params["w"] ** 2)
    return TrainState(state.step + 1, params, {"m": momentum}, {"seen": state.extra["seen"] + 1}), {"loss": loss}


def batch_at(step: int):
    return np.random.default_rng(step).normal(size=3).astype(np.float32)


def run(directory, steps=7, batches=batch_at, step_function=update, **options):
    options = dict(config={"lr": 0.1}, save_every=2, log_every=1) | options
    return fit(step_function, start(), ByStep(batches), steps=steps, directory=directory, **options)


def lines(directory, *, timed=False):
    entries = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return entries if timed else [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def test_an_interrupted_run_ends_bit_identical_to_one_that_was_not(tmp_path):
    def failing(step):
        if step == 5:
            raise Interrupted
        return batch_at(step)

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", batches=failing)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a line that the crash cut short
    resumed = run(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole")] == list(range(1, 8))
    seconds = [line["seconds"] for line in lines(tmp_path / "cut", timed=True)]
    assert seconds == sorted(seconds)


def test_a_finished_run_is_only_loaded(tmp_path):
    done = run(tmp_path)

    def never(step):
        raise AssertionError("no step is left to do")

    jax.tree.map(np.testing.assert_array_equal, run(tmp_path, batches=never), done)


def test_a_changed_config_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"lr: 0.1 -> 0.2.*name another folder"):
        run(tmp_path, config={"lr": 0.2})


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    def poisoned(step):
        return batch_at(step) * (np.nan if step >= 4 else 1)

    with pytest.raises(
        FloatingPointError, match=r"not finite at step 5 .*nan.*checkpoints is of step 4\. Lower .* in another folder"
    ):
        run(tmp_path, batches=poisoned)
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path), run(tmp_path.parent / "whole"))


def test_evaluation_joins_the_metrics(tmp_path):
    run(tmp_path, evaluate=lambda state: {"held_out": float(state.step)}, evaluate_every=3)
    assert {line["step"]: line.get("held_out") for line in lines(tmp_path)} == {
        1: None, 2: None, 3: 3.0, 4: None, 5: None, 6: 6.0, 7: 7.0
    }  # fmt: skip


def test_the_schedule_warms_up_and_ends_where_it_should():
    schedule = cosine_with_warmup(1.0, 100, 10, 0.2)
    np.testing.assert_allclose(
        [schedule(0), schedule(5), schedule(10), schedule(55), schedule(100)], [0, 0.5, 1, 0.6, 0.2], atol=1e-6
    )


def test_sums_do_not_depend_on_the_split():
    rows = np.arange(14.0).reshape(7, 2)
    for size in (1, 3, 7, 10):
        assert sum_over_rows(lambda batch: {"total": batch.sum(), "rows": len(batch)}, rows, size) == {
            "total": 91.0,
            "rows": 7.0,
        }
