"""Compiled programs that commands keep: where, when not, and that what is kept gives the same numbers."""

import os
import subprocess
import sys

import pytest
from test_cli import COMMAND, environment

from bilinear_jax.commands.compiled import keep_compiled

WORDS = ["spectra", "--layer", "2", "--features", "3,17", "--k", "1", "--json"]


@pytest.fixture
def no_jax(monkeypatch):
    """As in a new process: JAX is not imported, and the environment says nothing of it."""
    monkeypatch.delitem(sys.modules, "jax")
    for name in [*os.environ]:
        if name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "BILINEAR_JAX_CACHE", "XDG_CACHE")):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    yield monkeypatch
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_the_folder_is_in_the_cache_of_the_user(no_jax, tmp_path):
    no_jax.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = keep_compiled([])
    assert folder is not None and folder.parent == tmp_path / "bilinear-jax" / "compiled"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder) and folder.stat().st_mode & 0o077 == 0
    assert keep_compiled([]) is None  # it is set now


@pytest.mark.parametrize("how", ["flag", "off", "jax", "others", "file"])
def test_nothing_is_kept(no_jax, tmp_path, how):
    no_jax.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = keep_compiled([])
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    if how == "off":
        no_jax.setenv("BILINEAR_JAX_CACHE", "off")
    elif how == "jax":
        no_jax.setitem(sys.modules, "jax", sys)
    elif how == "others":
        folder.chmod(0o777)
    elif how == "file":
        folder.rmdir()
        folder.touch()
    assert keep_compiled(["spectra", "--no-cache"] if how == "flag" else []) is None
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_what_a_killed_process_left_is_removed(no_jax, tmp_path):
    no_jax.setenv("BILINEAR_JAX_CACHE", str(tmp_path))
    folder = keep_compiled([])
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    for name in ("half-cache", "whole-cache", "whole-atime", ".lockfile"):
        (folder / name).write_bytes(b"12345678")
    keep_compiled([])
    assert {path.name for path in folder.iterdir()} == {"whole-cache", "whole-atime", ".lockfile"}


def test_a_kept_program_gives_the_same_numbers_and_a_damaged_one_is_compiled_anew(tmp_path):
    found, kept = [], []
    for turn in range(3):
        env = environment() | {"BILINEAR_JAX_CACHE": str(tmp_path)}
        done = subprocess.run([*COMMAND, *WORDS], env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0
        found.append(done.stdout)
        files = [path for path in tmp_path.glob("*/*-cache") if path.is_file()]
        kept.append(sorted(path.name for path in files))
        if turn == 1:
            assert done.stderr == ""
            for path in files:
                path.write_bytes(path.read_bytes()[:100])
    assert found[0] == found[1] == found[2]
    assert kept[0] and set(kept[0]) <= set(kept[1]) <= set(kept[2])  # what is compiled slowly another time is kept then
