"""``python -m weights_convert``: what it writes, and that nothing on disk is lost when it fails."""

import json
import shutil
import signal
import subprocess
import sys

import published
import pytest
from published import same, snapshot

from bilinear_jax.language import load
from bilinear_jax.store import checkpoint
from bilinear_jax.store.sources import sae_names
from bilinear_jax.store.tokenizers import tokenizer_hash
from weights_convert.__main__ import main as convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden model and SAEs as the command line converts them."""
    folder = tmp_path_factory.mktemp("converted") / "ts-micro"
    scale = repr(float(published.SCALE))
    assert convert([str(published.MODEL), str(folder), "--scope", str(published.SCOPE), "--attn-scale", scale]) == 0
    return folder


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "copy")


def test_converted_and_directly_loaded_agree_bit_for_bit(converted):
    direct, through = load(published.MODEL, attn_scale=published.SCALE), load(converted)
    assert through.config == direct.config
    assert same(through.params, direct.params)
    assert sae_names(converted) == sae_names(published.SCOPE)
    for name in sae_names(converted):
        layer, site = int(name[0]), name[2:].split("-x")[0]
        left, right = (checkpoint.load_sae(source, site=site, layer=layer) for source in (published.SCOPE, converted))
        assert left.name == name
        assert left.config == right.config
        assert same(left.params, right.params)


def test_converted_records_its_origin(converted):
    record = json.loads((converted / "config.json").read_text())["origin"]
    assert record["source"] == str(published.MODEL)
    assert record["files"]["model.safetensors"] == "adbda3e70d818b41b0e9796f9d764a29e56abc4bf3bd6eb42ffaa5c3abbd3745"
    sae = json.loads((converted / "scope" / "1-mlp-in-x4-k6" / "config.json").read_text())["origin"]
    assert sae["files"].keys() == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("force", [False, True])
def test_a_writer_that_fails_midway_leaves_what_was_there(copy, tmp_path, monkeypatch, force):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    before = snapshot(copy)
    out = copy if force else tmp_path / "new"
    monkeypatch.setattr("bilinear_jax.store.convert.save_sae", fail)  # after the model has been written
    command = [str(published.MODEL), str(out), "--scope", str(published.SCOPE), "--attn-scale", "1"]
    assert convert([*command, "--force"] if force else command) == 1
    assert snapshot(copy) == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_killed_writer_leaves_what_was_there(copy, tmp_path):
    before = snapshot(copy)
    code = (
        "import os, signal, sys; from bilinear_jax.store import convert; from weights_convert.__main__ import main\n"
        "convert.save_sae = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])"
    )
    command = [str(published.MODEL), str(copy), "--scope", str(published.SCOPE), "--attn-scale", "1", "--force"]
    assert subprocess.run([sys.executable, "-c", code, *command]).returncode == -signal.SIGKILL
    assert snapshot(copy) == before
    left = [path.name for path in tmp_path.iterdir() if path != copy]
    assert len(left) == 1
    assert left[0].startswith(".copy.partial-")


def test_tokenizer_beside_the_model_is_converted_and_used(tmp_path, capsys):
    folder = shutil.copytree(published.MODEL, tmp_path / "model")
    published.write_tokenizer(folder)
    assert convert([str(folder), str(tmp_path / "out"), "--attn-scale", "1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: the model\n"
    tokenizer = load(tmp_path / "out").tokenizer
    assert tokenizer("hello world there")["input_ids"] == [1, 3, 4, 0]
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["origin"]
    assert origin["tokenizer_hash"] == tokenizer_hash(tokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert load(tmp_path / "out").tokenizer is tokenizer


def test_command_line_errors_are_one_line(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert convert([str(tmp_path / "nowhere"), out]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bilinear-jax: error: there is no folder ")
    assert captured.err.count("\n") == 1
    assert convert([str(published.MODEL), out]) == 0
    assert capsys.readouterr().err.startswith(
        "bilinear-jax: warning: the files of tdooms/ts-micro do not give the scale"
    )
    assert convert([str(published.MODEL), str(tmp_path / "other"), "--scope", str(tmp_path)]) == 1
    assert "has no SAEs: give --scope" in capsys.readouterr().err
    assert convert([out, str(tmp_path / "again")]) == 1
    assert "load it as it is" in capsys.readouterr().err
    with pytest.raises(SystemExit) as wrong_use:
        convert([out])
    assert wrong_use.value.code == 2


def test_saes_of_another_model_are_refused(tmp_path, capsys):
    config = published.CONFIG | {"d_model": 32}
    folder = published.write(tmp_path / "small", config, published.state(config))
    assert convert([str(folder), str(tmp_path / "out"), "--scope", str(published.SCOPE)]) == 1
    assert "belongs to layer 2, but the model has layers 0 ... 1: it reads mlp_in of layer 2" in capsys.readouterr().err
    published.write(tmp_path / "small", published.CONFIG, published.state(published.CONFIG))
    assert convert([str(folder), str(tmp_path / "out"), "--scope", str(published.SCOPE)]) == 1
    assert "has d_model 32, but the model has 8" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_force_without_scope_does_not_lose_the_saes(copy, capsys):
    before = sorted(path.name for path in (copy / "scope").iterdir())
    assert before
    assert convert([str(published.MODEL), str(copy), "--attn-scale", "1", "--force"]) == 1
    assert "convert them too with --scope" in capsys.readouterr().err
    assert sorted(path.name for path in (copy / "scope").iterdir()) == before
