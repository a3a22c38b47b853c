"""Runs that are stopped, or whose files are damaged, go on from the last good checkpoint; a folder is of one run."""

import errno
import json
import os
import shutil
import signal
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import complete, metrics

from bilinear_jax.training import folder
from bilinear_jax.training.checkpoints import Checkpoints
from bilinear_jax.training.fit import ByStep, TrainState, fit


def start() -> TrainState:
    params = {"w": jax.random.normal(jax.random.key(0), (5000,))}
    return TrainState(jnp.zeros((), jnp.int32), params, {"m": jnp.zeros(5000)})


def update(state: TrainState, batch):
    moment = 0.9 * state.opt_state["m"] + batch
    params = {"w": state.params["w"] - 0.1 * moment}
    return TrainState(state.step + 1, params, {"m": moment}), {"loss": jnp.sum(params["w"] ** 2)}


def batch_at(step: int):
    return np.random.default_rng(step).normal(size=5000).astype(np.float32)


def run(directory, batches=batch_at, change=update, state=None, **options):
    options = dict(steps=8, config={}, save_every=2, log_every=1) | options
    return fit(change, start() if state is None else state, ByStep(batches), directory=directory, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    return directory, jax.tree.map(np.asarray, run(directory))


@pytest.mark.parametrize("name", ["a\\b", "gs:", "caf\udce9", "n" * 256])
def test_a_folder_where_no_checkpoint_could_be_is_refused_before_the_first_step(tmp_path, name):
    def never(step):
        raise AssertionError("the run has begun")

    with pytest.raises(OSError, match=r"cannot be written .*name another place"):
        run(tmp_path / name, never)
    with pytest.raises(OSError, match=r"cannot be written .*name another place"):
        Checkpoints(tmp_path / name)
    assert not list(tmp_path.iterdir())


def largest_file(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut_short(checkpoint: Path) -> None:
    file = largest_file(checkpoint)
    os.truncate(file, file.stat().st_size // 2)


def change_a_byte(checkpoint: Path) -> None:
    """Which Orbax reads without a complaint."""
    file = largest_file(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 64
    file.write_bytes(content)


def without_arrays(checkpoint: Path) -> None:
    (checkpoint / "state" / "_METADATA").unlink()


def without_record(checkpoint: Path) -> None:
    (checkpoint / "_CHECKPOINT_METADATA").unlink()


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def edit(checkpoint: Path, change) -> None:
    """``change`` is given the metadata, and changes it or returns other ones."""
    path = checkpoint / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(change(metadata) or metadata))


def own(change):
    """A change of what this library wrote into the metadata."""
    return lambda checkpoint: edit(checkpoint, lambda metadata: change(metadata["custom_metadata"]))


def another_batch(checkpoint: Path) -> None:
    own(lambda saved: saved["record"]["data"].update(step=7))(checkpoint)


def renamed_field(checkpoint: Path) -> None:
    own(lambda saved: saved["record"].update(dater=saved["record"].pop("data")))(checkpoint)


def another_dtype(checkpoint: Path) -> None:
    own(lambda saved: saved["arrays"]["step"].update(dtype="int64"))(checkpoint)


def arrays_of_another_type(checkpoint: Path) -> None:
    own(lambda saved: saved.update(arrays=[1]))(checkpoint)


def metadata_of_another_type(checkpoint: Path) -> None:
    """Of which Orbax cannot list a single checkpoint of the folder."""
    edit(checkpoint, lambda metadata: metadata | {"custom_metadata": [1]})


def a_list_as_metadata(checkpoint: Path) -> None:
    edit(checkpoint, lambda metadata: [1])


def brackets(checkpoint: Path) -> None:
    (checkpoint / "_CHECKPOINT_METADATA").write_text("[" * 200_000)


def the_one_before(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("6"), checkpoint)


DAMAGES = [cut_short, change_a_byte, without_arrays, without_record, empty]
DAMAGES += [another_batch, renamed_field, another_dtype, arrays_of_another_type]
DAMAGES += [metadata_of_another_type, a_list_as_metadata, brackets, the_one_before]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_left_for_the_one_before(finished, tmp_path, damage):
    directory, state = finished
    shutil.copytree(directory, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "8")
    with pytest.warns(UserWarning, match=r"checkpoint 8 of .*cannot be read.*resuming from checkpoint 6.*damaged/8"):
        jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "run"), state)
    assert metrics(tmp_path / "run") == metrics(directory)
    assert complete(tmp_path / "run") == {"6", "8"}
    assert (tmp_path / "run" / "damaged" / "8").is_dir()
    with warnings.catch_warnings(action="error"):
        run(tmp_path / "run")


@pytest.mark.parametrize("to", ["10", "1000"])
def test_a_copy_under_another_number_is_no_checkpoint(finished, tmp_path, to):
    """Else the run would say that the disk is full, or lose the checkpoint of that step."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "checkpoints" / "8", tmp_path / "run" / "checkpoints" / to)
    with pytest.warns(
        UserWarning, match=rf"checkpoint {to} .*\(it is a copy of checkpoint 8\): resuming from checkpoint 8"
    ):
        state = run(tmp_path / "run", steps=10)
    assert int(state.step) == 10
    assert complete(tmp_path / "run") == {"8", "10"}
    assert (tmp_path / "run" / "damaged" / to).is_dir()


def without_seal(checkpoint: Path) -> None:
    """As versions before seals wrote it."""
    own(lambda saved: [saved.pop(key) for key in ("step", "run", "sha256")] and None)(checkpoint)


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_warning(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    without_seal(tmp_path / "run" / "checkpoints" / "6")
    with pytest.warns(UserWarning, match=r"checkpoint 6 of .* recorded no checksum of its place in the data"):
        jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "run"), finished[1])
    assert not (tmp_path / "run" / "damaged").exists()


@pytest.mark.parametrize("damage", [renamed_field, another_dtype, arrays_of_another_type])
def test_a_damaged_checkpoint_of_an_earlier_version_is_left_or_refused(finished, tmp_path, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    without_seal(tmp_path / "run" / "checkpoints" / "8")
    damage(tmp_path / "run" / "checkpoints" / "8")
    if damage is another_dtype:
        with pytest.raises(ValueError, match=r"step \(\(\), 'int64'\), expected \(\(\), 'int32'\)"):
            run(tmp_path / "run")
        return
    with pytest.warns(UserWarning, match=r"checkpoint 8 of .*cannot be read.*resuming from checkpoint 6"):
        jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "run"), finished[1])


def test_if_no_metadata_can_be_read_all_stay(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    for name in ("6", "8"):
        metadata_of_another_type(tmp_path / "run" / "checkpoints" / name)
    with pytest.raises(ValueError, match=r"none of the checkpoints .* 6 \(.*another folder"):
        run(tmp_path / "run")
    assert complete(tmp_path / "run") == {"6", "8"}


def test_other_data_of_the_same_size_is_another_run(tmp_path):
    """A config of an earlier version, which does not know its data, is not compared in them."""
    config = {"tokens": 9, folder.DATA: "one"}
    run(tmp_path / "run", config=config)
    with pytest.raises(ValueError, match=r"another config \(data_sha256: 'one' -> 'other'\)"):
        run(tmp_path / "run", config=config | {folder.DATA: "other"})
    run(tmp_path / "earlier", config={"tokens": 9})
    run(tmp_path / "earlier", config=config)


def test_no_checkpoint_that_can_be_read_is_an_error_and_all_stay(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    cut_short(tmp_path / "run" / "checkpoints" / "8")
    change_a_byte(tmp_path / "run" / "checkpoints" / "6")
    with pytest.raises(
        ValueError, match=r"none of the checkpoints .* 8 \(.*; 6 \(not what was saved: .*another folder"
    ):
        run(tmp_path / "run")
    assert complete(tmp_path / "run") == {"6", "8"}


def test_a_checkpoint_of_another_run_is_refused_and_stays(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    other = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros(7)}, {"v": jnp.zeros(5000)})
    with pytest.raises(ValueError) as error:
        run(tmp_path / "run", state=other)
    for part in (
        "In the checkpoint but not in this run: opt_state.m;",
        "in this run but not in the checkpoint: opt_state.v;",
        "params.w ((5000,), 'float32'), expected ((7,), 'float32')",
    ):
        assert part in str(error.value)
    assert complete(tmp_path / "run") == {"6", "8"}


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    def poisoned(state, batch):
        new, _ = update(state, batch)
        w = jnp.where(new.step == 5, new.params["w"].at[3].set(jnp.inf), new.params["w"])
        return new._replace(params={"w": w}), {"loss": jnp.zeros(())}

    with pytest.raises(FloatingPointError, match=r"at step 6 these are not finite: params\.w; .* is of step 4\. Lower"):
        run(tmp_path, change=poisoned)
    assert complete(tmp_path) == {"2", "4"}
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_infinity_may_be_in_the_optimiser_but_not_nan(tmp_path):
    state = {"params": jnp.ones(2), "opt_state": jnp.asarray([jnp.inf, 1.0])}
    with Checkpoints(tmp_path) as there:
        there.save(1, state, {})
        with pytest.raises(FloatingPointError, match=r"not finite: opt_state;"):
            there.save(2, state | {"opt_state": jnp.asarray([jnp.nan, 1.0])}, {})
        restored = there.restore(state)
    assert restored is not None
    assert float(restored[0]["opt_state"][0]) == np.inf


def test_a_metric_that_was_not_finite_between_two_lines_is_an_error(tmp_path):
    def poisoned(state, batch):
        new, metrics = update(state, batch)
        return new, metrics | {"share": jnp.where(new.step == 3, jnp.nan, 1.0)}

    with pytest.raises(FloatingPointError, match=r"a metric was not finite at step 3 \(those of step 5: all finite\)"):
        run(tmp_path, change=poisoned, log_every=5, save_every=100)


def test_checksums_are_those_of_the_formula(tmp_path):
    random = np.random.default_rng(0)
    state = {
        "float": random.normal(size=(3, 4, 5)).astype(np.float32),
        "half": jnp.asarray(random.normal(size=7), jnp.bfloat16),
        "bool": random.integers(2, size=(2, 3)).astype(bool),
        "whole": np.asarray(-5, np.int32),
    }
    with Checkpoints(tmp_path) as there:
        there.save(1, jax.tree.map(jnp.asarray, state) | {"key": jax.random.key(9)}, {})
    saved = json.loads((tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"][
        "arrays"
    ]
    words = {"half": np.uint16, "bool": np.uint8}
    for name, array in (state | {"key": np.asarray([0, 9], np.uint32)}).items():
        bits = np.asarray(array).reshape(-1).view(words.get(name, np.uint32))
        expected = sum((2 * i + 1) * int(bit) for i, bit in enumerate(bits)) % 2**32
        assert saved[name]["checksum"] == expected, name


def test_the_newest_are_kept_and_every_mth(tmp_path):
    run(tmp_path, steps=9, save_every=1, keep=1, keep_every=4)
    assert complete(tmp_path) == {"4", "8", "9"}
    with pytest.raises(ValueError, match="keep must be at least 1"):
        run(tmp_path, keep=0)


def test_saving_does_not_change_which_lines_are_logged(tmp_path):
    run(tmp_path, steps=8, save_every=1, log_every=3)
    assert [line["step"] for line in metrics(tmp_path)] == [3, 6, 8]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_folder_with_files_that_no_run_wrote(tmp_path, name):
    """As the folder of a published model: its config is not replaced."""
    (tmp_path / name).write_text('{"n_layer": 2}')
    with pytest.raises(FileExistsError, match=f"{tmp_path} has {name}, but not of a run"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"n_layer": 2}'


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_step(finished, tmp_path, number, capsys):
    def interrupted(step):
        if step == 4:
            signal.raise_signal(number)
        return batch_at(step)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as stopped:
        run(tmp_path, interrupted, save_every=100, log_every=2)
    assert f"stopped at step 5 of 8; it is saved in {tmp_path}" in capsys.readouterr().err
    assert number != signal.SIGTERM or stopped.value.code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert complete(tmp_path) == {"5"}
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path, log_every=2), finished[1])
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 6, 8]


def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path):
    def interrupted(step):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("still in the step")
        return batch_at(step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted, save_every=3)
    assert complete(tmp_path) == {"3"}


def test_another_thread_leaves_signals_alone(tmp_path, finished):
    states = []
    thread = threading.Thread(target=lambda: states.append(run(tmp_path)))
    thread.start()
    thread.join()
    jax.tree.map(np.testing.assert_array_equal, states[0], finished[1])


def test_two_processes_do_not_train_in_one_folder(tmp_path, finished):
    with (
        folder.locked(tmp_path),
        pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} on .*: wait .* another folder"),
    ):
        run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path), finished[1])


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match=r"cannot be locked \(Function not implemented\)"):
        run(tmp_path)
    assert complete(tmp_path) == {"6", "8"}


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", b"\xff\xfe"])
def test_a_damaged_config_is_an_error_and_the_checkpoints_stay(finished, tmp_path, content):
    """Else the run would go on with any other recipe."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"config.json (is not|holds a) .*: .*restore it, or name another folder"):
        run(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has checkpoints, but no config.json"):
        run(tmp_path / "run")
    assert complete(tmp_path / "run") == {"6", "8"}


def test_what_is_no_line_of_metrics_is_dropped(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b"[" * 100_000 + b'\n[1]\n3\n{}\n{"step": "x"}\n\xff\xfe\n{"step": 7')
    run(tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(finished[0])


def test_the_changes_of_a_list_are_named_one_by_one(tmp_path):
    before = {"saes": [{"site": "mlp_in", "k": 2}, {"site": "mlp_out", "k": 2}]}
    run(tmp_path, config=before)
    with pytest.raises(
        ValueError, match=r"another config \(saes.1.k: 2 -> 3, saes.2.k: None -> 4\): use the old config"
    ):
        run(tmp_path, config={"saes": [before["saes"][0], {"site": "mlp_out", "k": 3}, {"k": 4}]})


def test_another_config_may_follow_a_run_that_saved_nothing(tmp_path):
    """A loss that isn't finite asks for another learning rate: nothing is lost by it here."""

    def poisoned(step):
        return batch_at(step) * np.nan

    with pytest.raises(FloatingPointError, match=r"good checkpoint in .* is none\. Lower .*the same command with"):
        run(tmp_path, poisoned, config={"lr": 9.0}, log_every=1, save_every=100)
    run(tmp_path, config={"lr": 0.1})
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.1}
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 9))


@pytest.mark.parametrize("name", ["save_every", "log_every", "evaluate_every", "keep_every", "steps"])
def test_a_number_of_steps_is_at_least_one(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}.* must be at least 1"):
        run(tmp_path, **{name: 0})


@pytest.mark.parametrize("count", [2**31, 10**30])
def test_a_number_of_steps_is_counted_in_32_bits(tmp_path, count):
    with pytest.raises(ValueError, match=rf"at most 2147483647, got .*{count}"):
        run(tmp_path, steps=count)


def test_metrics_are_handed_on(tmp_path):
    seen = []
    run(tmp_path, log_every=3, log=lambda step, metrics: seen.append((step, sorted(metrics))))
    assert seen == [(3, ["loss"]), (6, ["loss"]), (8, ["loss"])]


def test_an_evaluation_that_is_not_finite_is_null(tmp_path):
    run(tmp_path, evaluate=lambda state: {"correlation": float("nan")})
    assert metrics(tmp_path)[-1]["correlation"] is None


def test_data_that_ends_and_data_that_cannot_be_saved(tmp_path):
    def ends(step):
        if step == 5:
            raise StopIteration
        return batch_at(step)

    with pytest.raises(ValueError, match="the data ended before step 6 of 8: give more of it, or fewer steps"):
        run(tmp_path / "ends", ends)
    assert complete(tmp_path / "ends") == {"2", "4"}

    class Numpy(ByStep):
        def get_state(self):
            return {"step": np.int64(0)}

    with pytest.raises(TypeError, match=r"get_state\(\) of Numpy must return JSON"):
        fit(update, start(), Numpy(batch_at), steps=1, directory=tmp_path / "numpy", config={})
