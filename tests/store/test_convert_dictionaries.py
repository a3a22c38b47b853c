"""Dictionaries of other libraries, converted and written back: the same numbers, whole or not at all."""

import json
import shutil
from pathlib import Path

import dictionaries
import jax
import numpy as np
import pytest
from published import same, snapshot

import bilinear_jax as bj
from bilinear_jax.commands.main import main
from bilinear_jax.errors import UnknownNameError
from bilinear_jax.store import checksums
from bilinear_jax.store.checkpoint import load_model
from bilinear_jax.store.convert_dictionaries import convert_dictionaries, export_dictionary
from weights_convert import dictionary_format, write_dictionary

GOLDEN = Path(__file__).parents[1] / "data" / "dictionaries"
NAMED = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and "transcoder" not in path.name)
PLACE = {"site": "resid-post", "layer": 2}


@pytest.fixture
def lens(tmp_path):
    """A folder with two dictionaries of SAELens."""
    for layer in (2, 3):
        folder = tmp_path / "lens" / f"blocks.{layer}.hook_resid_post"
        folder.mkdir(parents=True)
        write_dictionary(folder, "saelens", *dictionaries.made(layer, layer=layer))
    return tmp_path / "lens"


@pytest.mark.parametrize("name", NAMED)
def test_there_and_back(tmp_path, name):
    """A peer's file becomes a checkpoint, that a file of the peer, and that the same dictionary."""
    given = PLACE if name in ("gemma-scope", "sparsify") else {}
    (found,) = convert_dictionaries(GOLDEN / name, tmp_path / "saes", **given)
    first = bj.load_dictionary(GOLDEN / name, **given)
    second = bj.load_dictionary(tmp_path / "saes" / found)
    assert found == first.name and second.config == first.config and same(second.params, first.params)
    form = dictionary_format(GOLDEN / name)
    origin = json.loads((tmp_path / "saes" / found / "config.json").read_text())["origin"]
    assert (origin["source"], origin["format"]) == (str(GOLDEN / name), form)
    hashes = {path.name: checksums.of_file(path) for path in (GOLDEN / name).iterdir() if "expected" not in path.name}
    assert origin["files"] == hashes
    assert origin.get("model") == ("tiny" if form in ("saelens", "dictionary_learning") else None)
    assert export_dictionary(tmp_path / "saes", tmp_path / "back", form) == found
    assert dictionary_format(tmp_path / "back") == form
    third = bj.load_dictionary(tmp_path / "back", **(given if form == "gemma-scope" else {}))
    assert third.config == first.config and same(third.params, first.params)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_of_them(tmp_path, lens):
    names = convert_dictionaries(lens, tmp_path / "saes")
    assert names == ["2-resid-post-x2.5-relu", "3-resid-post-x2.5-relu"]
    assert {place: sae.name for place, sae in bj.load_dictionaries(tmp_path / "saes").items()} == {
        ("resid_post", 2): names[0],
        ("resid_post", 3): names[1],
    }
    assert convert_dictionaries(lens, tmp_path / "one", layer=3) == names[1:]
    assert convert_dictionaries(lens, tmp_path / "one", layer=2) == names[:1]  # beside the other
    before = snapshot(tmp_path)
    for options in ({"layer": 3}, {}):
        with pytest.raises(FileExistsError, match="already exists"):
            convert_dictionaries(lens, tmp_path / "one", **options)
    with pytest.raises(UnknownNameError, match=r"no SAE 4-\*-x\*-k\* in .*blocks\.2\.hook_resid_post, blocks\.3"):
        convert_dictionaries(lens, tmp_path / "new", layer=4)
    with pytest.raises(ValueError, match=r"need not be converted: 2-resid-post-x2\.5-relu"):
        convert_dictionaries(tmp_path / "saes", tmp_path / "new", layer=2)
    assert snapshot(tmp_path) == before
    assert convert_dictionaries(lens, tmp_path / "one", layer=3, force=True) == names[1:]


def test_nothing_is_left_of_what_fails(tmp_path, lens):
    shutil.copytree(lens / "blocks.3.hook_resid_post", lens / "twin")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"^twin and blocks\.3\.hook_resid_post of .* have one name, 3-resid-post-x2"):
        convert_dictionaries(lens, tmp_path / "saes")
    (lens / "twin" / "sae_weights.safetensors").write_bytes(b"")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"twin/sae_weights\.safetensors"):
        convert_dictionaries(lens, tmp_path / "saes")
    with pytest.raises(ValueError, match="Gemma Scope has no activation 'relu'"):
        export_dictionary(lens / "blocks.2.hook_resid_post", tmp_path / "new", "gemma-scope")
    with pytest.raises(ValueError, match="unknown format 'lens': give one of saelens, gemma-scope"):
        export_dictionary(lens / "blocks.2.hook_resid_post", tmp_path / "new", "lens")
    with pytest.raises(ValueError, match="matches several SAEs"):
        export_dictionary(lens, tmp_path / "new", "saelens")
    with pytest.raises(FileExistsError, match="already exists"):
        export_dictionary(lens / "blocks.2.hook_resid_post", lens, "saelens")
    assert snapshot(tmp_path) == before


def test_the_name_of_the_folder_may_say_what_the_file_does_not(tmp_path):
    """The tag of Gemma Scope is the name of the folder."""
    config, params = dictionaries.made(0, activation="jumprelu", centred=False, tag="average_l0_71")
    sae = bj.SAE(jax.tree.map(jax.numpy.asarray, params), bj.SAEConfig(**config))
    bj.save_sae(tmp_path / sae.name, sae, origin={})
    with pytest.raises(ValueError, match="cannot say tag 'average_l0_71'"):
        export_dictionary(tmp_path / sae.name, tmp_path / "other", "gemma-scope")
    place = tmp_path / "gemma-scope-2b-pt-res" / "layer_2" / "width_16k" / "average_l0_71"
    export_dictionary(tmp_path / sae.name, place, "gemma-scope")
    assert bj.load_dictionary(place).config == sae.config


def test_the_commands(tmp_path, lens, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "lens", "saes"]) == 0
    assert capsys.readouterr().out == "saes: 2-resid-post-x2.5-relu, 3-resid-post-x2.5-relu\n"
    words = ["convert", str(GOLDEN / "sparsify"), "more", "--site", "resid-post", "--layer", "2", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == {"out": "more", "dictionaries": ["2-resid-post-x4-reluk6"]}
    assert main(["export", "saes/2-resid-post-x2.5-relu", "out", "--format", "dictionary_learning"]) == 0
    assert capsys.readouterr().out == "out: 2-resid-post-x2.5-relu, for dictionary_learning\n"
    assert same(bj.load_dictionary("out").params, bj.load_dictionary("lens", layer=2).params)
    assert main(["export", "ts-nano", "nano", "--sae", "2-mlp-in-x4-k20", "--format", "saelens"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "nano: 2-mlp-in-x4-k20, for saelens\n"
    assert "warning: SAELens sets negative codes to 0" in printed.err
    x = np.random.default_rng(0).normal(size=(4, load_model("ts-nano").config.d_model)).astype(np.float32)
    codes = np.asarray(bj.load_sae("ts-nano", site="mlp-in", layer=2).encode(x))
    np.testing.assert_allclose(bj.load_dictionary("nano").encode(x), np.maximum(codes, 0), atol=1e-6)
    for words, message in (
        (["convert", "lens", "new", "--scope", "lens"], "holds dictionaries, no model: leave out --scope"),
        (["convert", "lens", "new", "--site", "nowhere"], "no site 'nowhere'"),
        (["export", "ts-nano", "new", "--sae", "2-mlp-in-x4-k20"], "--sae writes one dictionary: give --format too"),
        (["export", "ts-nano", "new", "--format", "saelens", "--scope"], "leave out --scope, --repo and --attn-scale"),
        (["export", "ts-nano", "new", "--format", "lens"], "invalid choice: 'lens'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert main(["export", "ts-nano", "new", "--sae", "9-mlp-in-x4-k20", "--format", "saelens"]) == 1
    assert "there is no SAE 9-mlp-in-x4-k20 in ts-nano" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
