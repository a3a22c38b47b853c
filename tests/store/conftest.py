"""A saved model, and a copy of it to break."""

import shutil

import pytest
from published import ORIGIN, SMALL, make_params

from bilinear_jax.store import checkpoint


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A saved model and its params; copy it before you break it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    params = make_params(SMALL)
    assert checkpoint.save_model(folder, SMALL, params, origin=ORIGIN) == folder
    return folder, params


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")
