"""A checkpoint belongs to one run, and what is set aside is kept."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import complete

from bilinear_jax.store.checksums import sealed
from bilinear_jax.training.checkpoints import Checkpoints
from bilinear_jax.training.fit import ByStep, TrainState, fit
from bilinear_jax.training.folder import DATA


def run(directory: Path, *, lr: float = 0.1, steps: int = 8, **config) -> np.ndarray:
    """The params of a run that adds ``lr`` times the step."""

    def update(state, batch):
        return TrainState(state.step + 1, state.params + lr * batch, ()), {"sum": jnp.sum(state.params)}

    start = TrainState(jnp.zeros((), jnp.int32), jnp.zeros(3), ())
    options = {"steps": steps, "directory": directory, "config": {"lr": lr} | config, "save_every": 2}
    return np.asarray(fit(update, start, ByStep(np.float32), **options).params)


def change(checkpoint: Path, action) -> None:
    path = checkpoint / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    metadata["custom_metadata"] = sealed(action(metadata["custom_metadata"]))
    path.write_text(json.dumps(metadata))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    run(directory)
    return directory


@pytest.fixture
def mine(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "mine"))


@pytest.mark.parametrize("step", ["8", "10"])
def test_a_checkpoint_of_another_run_is_not_taken(mine, tmp_path, step):
    run(tmp_path / "other", lr=0.5, steps=int(step))
    shutil.rmtree(mine / "checkpoints" / step, ignore_errors=True)
    shutil.copytree(tmp_path / "other" / "checkpoints" / step, mine / "checkpoints" / step)
    with pytest.warns(UserWarning, match=rf"checkpoint {step} .*\(it is of a run with another config\): resuming from"):
        found = run(mine, steps=10)
    np.testing.assert_allclose(found, np.full(3, 0.1 * 45), rtol=1e-6)  # 0 + 1 + ... + 9
    assert (mine / "damaged" / step).is_dir()


def test_if_all_checkpoints_are_of_another_run_none_is_taken(mine, tmp_path):
    run(tmp_path / "other", lr=0.5)
    shutil.rmtree(mine / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", mine / "checkpoints")
    with pytest.raises(ValueError, match=r"none of the checkpoints .* 8 \(it is of a run with another config\)"):
        run(mine)
    assert complete(mine) == {"6", "8"}


def test_a_sealed_checkpoint_that_does_not_name_its_run_is_taken(mine, finished):
    for step in ("6", "8"):
        change(mine / "checkpoints" / step, lambda saved: {key: saved[key] for key in ("step", "record", "arrays")})
    with warnings.catch_warnings(action="error"):
        np.testing.assert_array_equal(run(mine), run(finished))


def test_a_run_whose_recorded_config_lacks_the_data_goes_on_twice(mine):
    """As versions recorded it that knew no SHA-256 of the data. The file stays, and a null is as good as nothing."""
    with warnings.catch_warnings(action="error"):
        run(mine, steps=10, form=None, **{DATA: "abc"})
        found = run(mine, steps=12, form=None, **{DATA: "abc"})
    np.testing.assert_allclose(found, np.full(3, 0.1 * 66), rtol=1e-6)
    assert not (mine / "damaged").exists()


def test_the_home_folder(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(run(Path("~/run")), run(finished))
    assert complete(tmp_path / "run") == {"6", "8"}
    with pytest.raises(FileNotFoundError, match="home folder in ~nobody-here/run is not known"):
        run(Path("~nobody-here/run"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_set_aside_is_kept_when_its_step_is_damaged_again(tmp_path):
    state = {"params": jnp.arange(4.0)}
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "2-3").symlink_to("nothing")
    places = []
    for number in range(3):
        with Checkpoints(tmp_path) as there:
            for step in (1, 2) if number == 0 else (2,):
                there.save(step, state, {"number": number})
        change(tmp_path / "checkpoints" / "2", lambda saved: saved | {"step": 7})
        with Checkpoints(tmp_path) as there, pytest.warns(UserWarning, match="kept in") as warned:
            assert there.restore(jax.tree.map(jnp.zeros_like, state)) is not None
        places.append(Path(str(warned[0].message).partition("kept in ")[2]))
    assert [place.name for place in places] == ["2", "2-2", "2-4"]
    kept = [json.loads((place / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] for place in places]
    assert [metadata["record"]["number"] for metadata in kept] == [0, 1, 2]
