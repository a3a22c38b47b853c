"""Runs whose process is killed, or whose disk is full, go on from the last good checkpoint, to the same bits."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import checkpoints, complete, metrics

from bilinear_jax.training import folder
from bilinear_jax.training.checkpoints import Checkpoints

# The processes of these tests are forked from one that has imported all but started nothing: real processes, to be
# killed for real, without the seconds that the imports take.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["bilinear_jax.training.fit", "orbax.checkpoint.v1", "optax", "tqdm.auto", "bilinear_jax.training.sae"]
)
PATIENCE = 120  # seconds after which a process is taken to hang


def launch(target, directory: Path):
    process = SERVER.Process(target=target, args=(directory,))
    process.start()
    return process


def wait_for(condition, process) -> None:
    """Until the condition holds; fails if the process ends before."""
    began = time.monotonic()
    while not condition():
        assert process.is_alive(), f"the run ended by itself, with {process.exitcode}"
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.0005)


def finish(target, directory: Path) -> None:
    process = launch(target, directory)
    process.join(PATIENCE)
    assert process.exitcode == 0


def result(directory: Path):
    """Every array of the last checkpoint, the place in the data, and the metrics but for the seconds."""
    with Checkpoints(directory) as there:
        restored = there.restore(runs.start())
    assert restored is not None
    state, record = restored
    state.extra["key"] = jax.random.key_data(state.extra["key"])
    return jax.tree.map(np.asarray, state), record["data"], metrics(directory)


def assert_same(one: Path, other: Path) -> None:
    (state, data, lines), (other_state, other_data, other_lines) = result(one), result(other)
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    assert data == other_data
    assert lines == other_lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole")
    finish(runs.train_slowly, directory)
    assert [line["step"] for line in metrics(directory)] == list(range(2, runs.STEPS + 1, 2))
    return directory


def test_a_run_killed_again_and_again_ends_bit_identical(whole, tmp_path):
    """One run, killed: before its first checkpoint, while the first is written, while a later one is, when one is
    just complete, and at three odd moments; then stopped by SIGTERM; then left to end."""

    def has_logged():
        return (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").stat().st_size > 0

    def writes():
        return any(not name.isdigit() for name in checkpoints(tmp_path))

    def goes_on():
        return bool(complete(tmp_path) - before)

    for moment in ("logged", "writes", "goes on, writes", "goes on", 0.03, 0.11, 0.19):
        before = complete(tmp_path)
        process = launch(runs.train_slowly, tmp_path)
        if moment == "logged":
            wait_for(has_logged, process)
            assert not complete(tmp_path)
        if moment == "writes":
            wait_for(writes, process)
        if moment != "logged" and moment != "writes":
            wait_for(goes_on, process)
        if moment == "goes on, writes":
            wait_for(writes, process)
        if isinstance(moment, float):
            time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if moment in ("writes", "goes on, writes"):
            assert writes()

    before = complete(tmp_path)
    process = launch(runs.train_slowly, tmp_path)
    wait_for(goes_on, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == 128 + signal.SIGTERM
    assert not writes()
    assert int(max(complete(tmp_path), key=int)) < runs.STEPS

    finish(runs.train_slowly, tmp_path)
    assert not writes()
    assert_same(tmp_path, whole)


def test_saes_and_their_buffer_go_on_where_a_kill_left_them(tmp_path):
    """Killed within a chunk of the buffer, which is three batches long."""

    def last(directory: Path) -> dict:
        """Checksums of all arrays, and where the buffer is; the seconds left out."""
        saved = json.loads((directory / "checkpoints" / "40" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
        assert saved["record"].pop("seconds") > 0
        assert len(saved.pop("sha256")) == 64  # of the seconds too
        return saved

    finish(runs.train_saes_on_a_model, tmp_path / "whole")
    process = launch(runs.train_saes_on_a_model, tmp_path / "killed")
    wait_for(lambda: complete(tmp_path / "killed"), process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert "40" not in complete(tmp_path / "killed")
    finish(runs.train_saes_on_a_model, tmp_path / "killed")
    assert last(tmp_path / "killed") == last(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_full_disk_keeps_the_last_good_checkpoint(whole, tmp_path):
    finish(runs.train_on_a_full_disk, tmp_path)
    error = (tmp_path / "error.txt").read_text()
    assert "the checkpoint of step 33 could not be written" in error
    assert "the last good one is of step 30. Free disk space" in error
    assert checkpoints(tmp_path) == {"27", "30"}
    finish(runs.train_slowly, tmp_path)
    assert_same(tmp_path, whole)


def test_metrics_that_cannot_be_written_are_an_error(tmp_path):
    with pytest.raises(OSError, match=r"could not write to /dev/full \(No space left on device\): free disk space"):
        folder.append(Path("/dev/full"), {"step": 1})
