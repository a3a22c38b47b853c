"""Checkpoints: what is damaged, or changed after it was written, is refused or named."""

import gc
import hashlib
import json
import shutil
import subprocess
import sys
import warnings
import zlib

import jax
import numpy as np
import published
import pytest
from published import ORIGIN, SMALL, make_params, same, snapshot

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.store import checkpoint
from bilinear_jax.store.checksums import sealed
from bilinear_jax.store.sources import PRETRAINED
from bilinear_jax.store.tokenizers import load_tokenizer, save_tokenizer, tokenizer_hash, train_tokenizer

# What is damaged is refused.


def test_masked_params_are_not_saved(tmp_path):
    params = make_params(SMALL)
    w_e = np.asarray(params["w_e"])
    for mask, hides in ((np.zeros(w_e.shape, bool), False), (np.arange(w_e.size).reshape(w_e.shape) == 3, True)):
        masked = dict(params) | {"w_e": np.ma.masked_array(w_e, mask)}
        if hides:
            with pytest.raises(ValueError, match=r"the params of .*b are a masked array .*: fill it with array.filled"):
                checkpoint.save_model(tmp_path / "b", SMALL, masked, origin=ORIGIN)
        else:
            checkpoint.save_model(tmp_path / "a", SMALL, masked, origin=ORIGIN)
    assert not (tmp_path / "b").exists()
    np.testing.assert_array_equal(checkpoint.load_model(tmp_path / "a").params["w_e"], w_e)


def edit_config(folder, **changes):
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | changes))


def test_params_that_disagree_with_the_config(copy):
    config = json.loads((copy / "config.json").read_text())["config"]
    edit_config(copy, config=config | {"d_hidden": 10})
    with pytest.raises(ValueError, match=r"layers\.mlp\.w_l \(2, 12, 8\), expected \(2, 10, 8\)"):
        checkpoint.load_model(copy)
    edit_config(copy, config=config | {"bias": False})
    with pytest.raises(ValueError, match=r"not in the model: layers\.mlp\.b_l, layers\.mlp\.b_p, layers\.mlp\.b_r;"):
        checkpoint.load_model(copy)
    edit_config(copy, config={key: value for key, value in config.items() if key != "n_ctx"} | {"zeta": 1})
    with pytest.raises(ValueError, match=r"unknown config keys \['zeta'\] and lacks the keys \['n_ctx'\]"):
        checkpoint.load_model(copy)


def test_formats_of_another_version_or_kind(copy):
    edit_config(copy, version=2)
    with pytest.raises(ValueError, match="format version 2, but this bilinear_jax reads versions up to 1: upgrade"):
        checkpoint.load_model(copy)
    edit_config(copy, format="bilinear_jax.sae")
    with pytest.raises(ValueError, match=r"format 'bilinear_jax\.sae', but must have 'bilinear_jax\.transformer'"):
        checkpoint.load_model(copy)


def test_truncated_orbax_files(copy):
    for path in [path for path in (copy / "params").rglob("*") if path.is_file() and path.stat().st_size]:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=rf"{path.name} should have \d+ bytes.*damaged\. Convert or download it"):
            checkpoint.load_model(copy)
        path.write_bytes(whole)
    assert checkpoint.load_model(copy).config == SMALL


def test_damaged_orbax_files_of_the_right_size(copy):
    """Of what describes the arrays, and of the numbers themselves, of which a single bit is wrong."""
    for path in (copy / "params").rglob("*.json"):
        whole = path.read_bytes()
        path.write_bytes(bytes(len(whole)))
        with pytest.raises(ValueError, match=r"params cannot be read.*damaged"):
            checkpoint.load_model(copy)
        path.write_bytes(whole)
    path = copy / "params" / "state" / "layers.mlp.w_l" / "c" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"not the values that were written: [\w.]+\).*damaged"):
        checkpoint.load_model(copy)


DAMAGED = """
import gc, sys
from pathlib import Path
from bilinear_jax.store import checkpoint

folder = Path(sys.argv[1])
files = [path for path in (folder / "params" / "state").rglob("*") if path.is_file() and path.stat().st_size]
for path in sorted(files)[1::5]:
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    try:
        checkpoint.load_model(folder)
    except ValueError as error:
        print(error)
    gc.collect()
    path.write_bytes(whole)
"""


def test_the_error_is_all_that_is_said_of_a_damaged_checkpoint(copy):
    """Orbax logs long traces, and the tasks and reads that it leaves print errors when they end."""
    done = subprocess.run([sys.executable, "-c", DAMAGED, str(copy)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == done.stdout.count("the checkpoint is damaged. Convert or download it again") > 2


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        ({"text": "TinyStories, 3 stories"}, "TinyStories, 3 stories"),
        (
            {"text": {"sources": [{"name": "a.txt", "bytes": 1}], "n_documents": 2, "n_tokens": 30, "field": "text"}},
            "a.txt: 2 documents, 30 tokens",
        ),
        (
            {"text": {"sources": ["hub/a", {"name": "b"}], "n_documents": 2, "n_tokens": 30}},
            "hub/a, b: 2 documents, 30 tokens",
        ),
        ({"made_by": "a test"}, "not known: its files do not say"),
        ({}, "not known: its files do not say"),
    ],
)
def test_what_a_model_and_an_sae_were_trained_on(tmp_path, origin, line):
    checkpoint.save_model(tmp_path / "model", SMALL, make_params(SMALL), origin=origin)
    assert checkpoint.training_of(tmp_path / "model") == line
    sae = SAE.init(SAEConfig("mlp_in", 0, d_model=8, expansion=2, k=2), jax.random.key(0))
    checkpoint.save_sae(tmp_path / "model" / "scope" / sae.name, sae, origin=origin)
    assert checkpoint.training_of(tmp_path / "model", sae.name) == line
    with pytest.raises(UnknownNameError, match=r"no SAE 1-mlp-in-x2-k2 in .*model: choose one of 0-mlp-in-x2-k2"):
        checkpoint.training_of(tmp_path / "model", "1-mlp-in-x2-k2")


def test_what_published_files_were_trained_on():
    assert checkpoint.training_of(published.MODEL) == "tinystories"
    assert checkpoint.training_of(published.SCOPE, "1-mlp-in-x4-k6") == "not known: its files do not say"
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        checkpoint.training_of("nowhere")


def test_params_that_are_not_there(copy):
    shutil.rmtree(copy / "params")
    with pytest.raises(FileNotFoundError, match="has no params: the checkpoint is incomplete"):
        checkpoint.load_model(copy)


# What changed after it was written is found.


@pytest.fixture(scope="module")
def tokenizers():
    return [train_tokenizer([text], n_vocab=260) for text in ("the cat sat on the mat", "a dog ran and ran")]


@pytest.fixture
def whole(tokenizers, tmp_path):
    """The folder of a model with a tokenizer and an SAE."""
    save_tokenizer(tokenizers[0], tmp_path)
    folder = checkpoint.save_model(tmp_path / "m", SMALL, make_params(SMALL), tokenizer=tmp_path, origin=ORIGIN)
    sae = SAE.init(SAEConfig("mlp_in", 0, d_model=8, expansion=2, k=2), jax.random.key(0))
    checkpoint.save_sae(folder / "scope" / sae.name, sae, origin=ORIGIN)
    return folder


def everything(folder):
    """All that is loaded from a folder."""
    files = checkpoint.load_model(folder)
    tokenizer = load_tokenizer(str(folder), None)
    sae = checkpoint.load_sae(folder, "mlp_in")
    origin = checkpoint.training_of(folder), checkpoint.training_of(folder, sae.name)
    return files.config, files.params, sae.config, sae.params, tokenizer_hash(tokenizer), tokenizer.pad_token, origin


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops tasks on its way out
def test_a_flipped_bit_anywhere_is_an_error_or_changes_nothing(whole):
    """A warning is an error here. Each names the folder."""
    expected = everything(whole)
    random = np.random.default_rng(0)
    found = 0
    files = sorted(path for path in whole.rglob("*") if path.is_file() and path.stat().st_size)
    params = [path for path in files if "params" in path.parts]
    for path in [*sorted(set(files) - set(params)) * 3, *random.permutation(params)[:8]]:
        content = path.read_bytes()
        bit = random.integers(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert all(jax.tree.leaves(jax.tree.map(np.array_equal, everything(whole), expected)))
        except (ValueError, OSError, UserWarning) as error:
            assert str(whole) in str(error), (path, bit)
            found += 1
        path.write_bytes(content)
    assert found > 8
    gc.collect()


def test_an_edited_config_is_named_with_what_to_do(whole):
    config = json.loads((whole / "config.json").read_text())["config"]
    edit_config(whole, config=config | {"attn_scale": 0.51})
    message = r"m/config.json is not what was written: it is damaged, or was edited\. .*add_checksums\('.*m'\)"
    for read in (checkpoint.load_model, checkpoint.training_of):
        with pytest.raises(ValueError, match=message):
            read(whole)
    checkpoint.add_checksums(whole)
    assert checkpoint.load_model(whole).config.attn_scale == 0.51
    sae = whole / "scope" / "0-mlp-in-x2-k2"
    edit_config(sae, origin={"text": "another"})
    with pytest.raises(ValueError, match=r"k2/config.json is not what was written"):
        checkpoint.load_sae(whole, "mlp_in")


def test_another_tokenizer_is_a_warning_until_it_is_recorded(whole, tokenizers, tmp_path):
    save_tokenizer(tokenizers[1], whole)
    with pytest.warns(
        UserWarning, match=r"m/tokenizer.json is not the file that was saved .*other token ids .*on purpose"
    ):
        assert tokenizer_hash(load_tokenizer(str(whole), None)) == tokenizer_hash(tokenizers[1])
    checkpoint.add_checksums(whole)
    everything(whole)
    save_tokenizer(tokenizers[0], whole)  # after it was loaded
    with pytest.warns(UserWarning, match=r"m/tokenizer.json is not the file that was saved"):
        assert tokenizer_hash(load_tokenizer(str(whole), None)) == tokenizer_hash(tokenizers[0])
    (whole / "tokenizer_config.json").unlink()
    with pytest.warns(UserWarning, match=r"m/tokenizer_config.json is missing"):
        load_tokenizer(str(whole), None)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (("sha256", "contents"), "of its config and the"),
        (("sha256", "contents", "crc32", "files"), "of its params, its"),
    ],
)
def test_a_folder_of_an_earlier_version_loads_with_a_warning(whole, without, said):
    expected = checkpoint.load_model(whole).params
    for folder in (whole, whole / "scope" / "0-mlp-in-x2-k2"):
        record = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({key: record[key] for key in record if key not in without}))
    with pytest.warns(UserWarning, match=rf"recorded no checksums {said} .*add them with .*add_checksums\('.*m'\)"):
        assert same(checkpoint.load_model(whole).params, expected)
    with pytest.warns(UserWarning, match=rf"recorded no checksums {said}"):
        checkpoint.load_sae(whole, "mlp_in")
    checkpoint.add_checksums(whole)
    everything(whole)


def test_checksums_are_not_added_to_what_is_damaged(whole, tmp_path):
    path = whole / "params" / "state" / "layers.mlp.w_l" / "c" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    before = snapshot(whole)
    with pytest.raises(ValueError, match=r"not the values that were written: layers\.mlp\.w_l\)"):
        checkpoint.add_checksums(whole)
    assert snapshot(whole) == before
    with pytest.raises(ValueError, match="not of a model or an SAE that this library saved"):
        checkpoint.add_checksums(tmp_path)


@pytest.mark.parametrize("name", ["ts-nano"])
def test_all_that_ships_has_checksums(name):
    folder = PRETRAINED / name
    scopes = sorted(path.parent for path in folder.glob("scope/*/config.json"))
    assert [path.name for path in PRETRAINED.iterdir() if path.is_dir()] == [name]
    assert len(scopes) == 3
    with warnings.catch_warnings(action="error"):
        loaded = [checkpoint.load_model(folder).params]
        for path in scopes:
            layer, first, second, expansion, k = path.name.split("-")
            loaded.append(
                checkpoint.load_sae(folder, f"{first}-{second}", int(layer), int(expansion[1:]), int(k[1:])).params
            )
    for place, params in zip([folder, *scopes], loaded, strict=True):
        record = json.loads((place / "config.json").read_text())
        assert record == sealed(record)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        assert record["crc32"] == {
            ".".join(key.key for key in path): zlib.crc32(np.asarray(leaf, "<f4").tobytes()) for path, leaf in leaves
        }
        files = [path for path in place.rglob("*") if path.is_file() and path.relative_to(place).parts[0] != "scope"]
        names = {path.relative_to(place).as_posix(): path for path in files}
        beside = names.keys() - record["files"].keys() - {"config.json", "card.md"}
        assert record["contents"] == {key: hashlib.sha256(names[key].read_bytes()).hexdigest() for key in beside}
        assert all(names[key].stat().st_size == size for key, size in record["files"].items())
