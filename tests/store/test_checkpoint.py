"""Checkpoints: what is saved comes back, what is damaged is refused, what was there is never lost."""

import gc
import hashlib
import json
import shutil
import subprocess
import sys
import time
import warnings
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import ORIGIN, make_params, same, snapshot

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store import checkpoint
from bilinear_jax.store.checksums import sealed
from bilinear_jax.store.sources import PRETRAINED
from bilinear_jax.store.tokenizers import load_tokenizer, save_tokenizer, tokenizer_hash, train_tokenizer
from weights_convert.names import parse_sae_name

CONFIG = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=12, n_ctx=16, n_vocab=11, bias=True, gate="silu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model and its params; copy it before you break it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    params = make_params(CONFIG)
    assert checkpoint.save_model(folder, CONFIG, params, origin=ORIGIN) == folder
    return folder, params


def make_sae() -> SAE:
    return SAE.init(SAEConfig("mlp_out", 1, d_model=8, expansion=4, k=3), jax.random.key(1))


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


# What is saved comes back.


def test_a_saved_model_comes_back_bit_for_bit(saved):
    folder, params = saved
    files = checkpoint.load_model(folder)
    assert files.config == CONFIG
    assert same(files.params, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(files.params))
    assert (files.source, files.tokenizer_source) == (str(folder), None)
    assert json.loads((folder / "config.json").read_text())["origin"] == ORIGIN
    assert checkpoint.load_model(folder, attn_scale=0.25).config.attn_scale == 0.25


def test_smaller_on_disk_is_float32_in_memory(tmp_path):
    params = make_params(CONFIG)
    folder = checkpoint.save_model(tmp_path / "m", CONFIG, params, origin=ORIGIN, dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert same(checkpoint.load_model(folder).params, rounded)


@pytest.mark.parametrize(
    "options", [{}, {"bilinear_encoder": True, "encoder_bias": True, "passthrough": (1, 3), "tag": "v2"}]
)
def test_a_saved_sae_comes_back_bit_for_bit(tmp_path, options):
    sae = SAE.init(SAEConfig("mlp_out", 1, d_model=8, expansion=4, k=3, **options), jax.random.key(1))
    checkpoint.save_sae(tmp_path / "scope" / sae.name, sae, origin=ORIGIN)
    again = checkpoint.load_sae(tmp_path, layer=1)
    assert again.config == sae.config
    assert same(again.params, sae.params)
    with pytest.raises(ValueError, match=f"must have its name.*{sae.name}"):
        checkpoint.save_sae(tmp_path / "scope" / "another", sae, origin=ORIGIN)


@given(st.text(min_size=1, max_size=20))
def test_a_tag_that_a_config_takes_can_be_found(tag):
    """Its folder's name, read again, has it."""
    try:
        config = SAEConfig("mlp_out", 1, d_model=8, expansion=4, k=3, tag=tag)
    except ValueError:
        assert {"/", "\\"} & set(tag) or not tag.isprintable()
    else:
        parts = parse_sae_name(config.name)
        assert parts == (1, "mlp_out", 4, 3, tag)


TINY = TransformerConfig(n_layer=1, n_head=1, d_model=4, d_hidden=3, n_ctx=8, n_vocab=5, bias=True)


@settings(max_examples=4, deadline=None)
@given(st.data(), st.sampled_from([None, jnp.bfloat16]))
def test_params_in_any_memory_layout_come_back(tmp_path_factory, data, dtype):
    expected = jax.tree.map(np.asarray, make_params(TINY))
    views = jax.tree.map(lambda leaf: published.other_memory(data.draw, leaf), expected)
    folder = tmp_path_factory.mktemp("layout") / "model"
    checkpoint.save_model(folder, TINY, views, origin=ORIGIN, dtype=dtype)
    if dtype is not None:
        expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), expected)
    assert same(checkpoint.load_model(folder).params, expected)


@pytest.fixture
def tiny(tmp_path):
    return checkpoint.save_model(tmp_path / "tiny", TINY, make_params(TINY), origin=ORIGIN)


STORED = {"float32", "float16", "bfloat16"}
OTHERS = {"float64", "complex64", "int8", "uint8", "int32", "bool"} | {
    name for name in dir(ml_dtypes) if name.lstrip("bu").startswith(("float", "int")) and name != "bfloat16"
}


@pytest.mark.parametrize("name", sorted(STORED | OTHERS))
def test_a_dtype_is_stored_as_it_can_be_loaded_or_refused(tiny, name):
    """By ``dtype``, or since the params have it. What is refused leaves the older checkpoint as it is."""
    before, dtype = snapshot(tiny), jnp.dtype(getattr(ml_dtypes, name, name))
    params = jax.tree.map(lambda leaf: np.abs(leaf) + np.float32(0.3), make_params(TINY, seed=1))
    cast = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)
    for those, asked in ((params, dtype), (cast, None)):
        if name in STORED:
            checkpoint.save_model(tiny, TINY, those, origin=ORIGIN, force=True, dtype=asked)
            assert same(checkpoint.load_model(tiny).params, jax.tree.map(lambda leaf: leaf.astype(np.float32), cast))
            continue
        with pytest.raises(ValueError, match=f"cannot be stored as {name}: give dtype as one of float32, float16, bf"):
            checkpoint.save_model(tiny, TINY, those, origin=ORIGIN, force=True, dtype=asked)
        assert snapshot(tiny) == before


@pytest.mark.parametrize(
    ("dtype", "largest", "too_large"),
    [(jnp.float16, 65504, 65520), (jnp.bfloat16, 3.38e38, 3.4e38), (jnp.float32, 3.4e38, 1e39)],
)
def test_values_that_a_dtype_does_not_have(tiny, dtype, largest, too_large):
    before, params, name = snapshot(tiny), make_params(TINY), np.dtype(dtype).name
    params["w_u"] = np.full((5, 4), too_large)
    with pytest.raises(ValueError, match=f"infinite values as {name}: w_u. Use .*, or a dtype with a larger range"):
        checkpoint.save_model(tiny, TINY, params, origin=ORIGIN, force=True, dtype=dtype)
    assert snapshot(tiny) == before
    params["w_u"] = np.full((5, 4), largest)
    checkpoint.save_model(tiny, TINY, params, origin=ORIGIN, force=True, dtype=dtype)
    assert checkpoint.load_model(tiny).params["w_u"][0, 0] == np.float32(np.asarray(largest).astype(dtype))


def test_an_sae_whose_values_do_not_fit(tmp_path):
    sae = SAE.init(SAEConfig("mlp_out", 0, d_model=8, expansion=2, k=2), jax.random.key(0))
    large = SAE(sae.params | {"b_dec": jnp.full(8, 1e5)}, sae.config)
    for dtype, message in ((jnp.float16, "infinite values as float16: b_dec"), (np.int8, "cannot be stored as int8")):
        with pytest.raises(ValueError, match=message):
            checkpoint.save_sae(tmp_path / "scope" / sae.name, large, origin=ORIGIN, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_model_of_six_million_parameters_loads_fast(tmp_path):
    config = TransformerConfig(n_layer=4, n_head=8, d_model=256, d_hidden=1024, n_ctx=256, n_vocab=4096)
    checkpoint.save_model(tmp_path / "m", config, make_params(config), origin=ORIGIN, dtype=jnp.bfloat16)
    start = time.monotonic()
    checkpoint.load_model(tmp_path / "m")
    assert (
        time.monotonic() - start < 10
    )  # 0.2 s where nothing else runs; this catches a load per layer or a compilation


def test_loading_prints_nothing(saved, capfd):
    checkpoint.load_model(saved[0])
    assert capfd.readouterr() == ("", "")


# The golden model, loaded from the published layout and converted.


def test_saving_and_loading_warn_of_nothing_but_what_is_wrong(tmp_path, caplog, monkeypatch):
    from absl import logging
    from orbax.checkpoint import v1 as ocp

    def warns(function):
        def both(*arguments):
            logging.warning("a real warning")
            return function(*arguments)

        return both

    with caplog.at_level("INFO", logger="absl"):
        checkpoint.save_model(tmp_path / "m", CONFIG, make_params(CONFIG), origin=ORIGIN)
        checkpoint.load_model(tmp_path / "m")
        assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
        for name in ("save", "metadata", "load"):
            monkeypatch.setattr(ocp, name, warns(getattr(ocp, name)))
        checkpoint.save_model(tmp_path / "m", CONFIG, make_params(CONFIG), origin=ORIGIN, force=True)
        checkpoint.load_model(tmp_path / "m")
    warnings = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
    assert warnings == ["a real warning"] * 3


def test_loaded_model_gives_the_originals_logits_and_loss(golden):
    lm = golden.lm
    assert (lm.config.pad_id, lm.config.tokenizer, lm.source) == (2, "ts-4096", str(published.MODEL))
    logits = lm.logits(golden.ids)
    golden.close(logits[..., ::8], golden.expected["logits.every8"])
    assert np.array_equal(np.argmax(logits, axis=-1), golden.expected["greedy_next"])
    everything = np.ones(golden.ids.shape, bool)
    golden.close(lm.loss(golden.ids, token_mask=everything), golden.expected["loss"][0])


@pytest.mark.parametrize("name", ["1-mlp-in-x4-k6", "1-resid-mid-x4-k6", "2-mlp-in-x4-k6", "2-mlp-out-x4-k6"])
def test_loaded_sae_gives_the_originals_codes_and_reconstruction(golden, name):
    sae = checkpoint.load_sae(published.SCOPE, site=name[2:].split("-x")[0], layer=int(name[0]), expansion=4, k=6)
    x = golden.expected[f"act.{sae.config.site}.{sae.config.layer}"]
    reconstruction, codes = sae(jnp.asarray(x))
    golden.close(codes, golden.expected[f"sae.{name}.codes"])
    golden.close(reconstruction, golden.expected[f"sae.{name}.recon"])


def test_loss_with_the_mlp_replaced_by_the_sae_and_by_zero(golden):
    sae = checkpoint.load_sae(published.SCOPE, "mlp-out", 1)
    everything = np.ones(golden.ids.shape, bool)
    for name, edit in (("loss_patched", lambda x: sae(x)[0]), ("loss_zeroed", jnp.zeros_like)):
        got = golden.lm.loss(golden.ids, token_mask=everything, edits={("mlp_out", 1): edit})
        golden.close(got, golden.expected[f"sae.{sae.name}.{name}"][0])


# Nothing on disk is lost or half-written.


def test_refuses_to_overwrite_without_force(saved, copy):
    before = snapshot(copy)
    with pytest.raises(FileExistsError, match="exists: name another folder, or replace it with force"):
        checkpoint.save_model(copy, CONFIG, make_params(CONFIG, seed=1), origin=ORIGIN)
    assert snapshot(copy) == before
    checkpoint.save_model(copy, CONFIG, make_params(CONFIG, seed=1), origin=ORIGIN, force=True)
    assert same(checkpoint.load_model(copy).params, make_params(CONFIG, seed=1))
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_force_replaces_nothing_but_checkpoints(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not what force may replace here"):
        checkpoint.save_model(tmp_path / "thesis", CONFIG, make_params(CONFIG), origin=ORIGIN, force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_force_replaces_a_model_by_a_model_and_an_sae_by_an_sae(copy, tmp_path):
    sae = make_sae()
    folder = checkpoint.save_sae(tmp_path / sae.name, sae, origin=ORIGIN)
    before = snapshot(folder)
    with pytest.raises(FileExistsError, match=r"format 'bilinear_jax.transformer'. It has format 'bilinear_jax.sae'"):
        checkpoint.save_model(folder, CONFIG, make_params(CONFIG), origin=ORIGIN, force=True)
    assert snapshot(folder) == before
    checkpoint.save_sae(folder, sae, origin=ORIGIN, force=True)
    (tmp_path / "other").mkdir()
    model = copy.rename(tmp_path / "other" / sae.name)
    before = snapshot(model)
    with pytest.raises(FileExistsError, match=r"format 'bilinear_jax.sae'. It has format 'bilinear_jax.transformer'"):
        checkpoint.save_sae(model, sae, origin=ORIGIN, force=True)
    assert snapshot(model) == before


def test_force_does_not_delete_the_saes_of_a_model(copy):
    sae = make_sae()
    checkpoint.save_sae(copy / "scope" / sae.name, sae, origin=ORIGIN)
    before = snapshot(copy)
    with pytest.raises(ValueError, match=f"holds SAEs, which would be deleted: move {copy / 'scope'} away first"):
        checkpoint.save_model(copy, CONFIG, make_params(CONFIG), origin=ORIGIN, force=True)
    assert snapshot(copy) == before
    (copy / "scope").rename(copy.parent / "scope")
    (copy / "scope").mkdir()
    checkpoint.save_model(copy, CONFIG, make_params(CONFIG, seed=1), origin=ORIGIN, force=True)


@pytest.mark.parametrize("name", ["a\\b", "gs:/b", "caf\udce9"])
def test_a_name_where_the_arrays_would_go_elsewhere_is_refused(tmp_path, name):
    """Orbax would write them to another folder, and saving would seem to succeed."""
    with pytest.raises(OSError, match="cannot be written"):
        checkpoint.save_model(tmp_path / name, CONFIG, make_params(CONFIG), origin=ORIGIN)
    assert not list(tmp_path.iterdir())


def test_arrays_that_orbax_writes_elsewhere_are_noticed(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    save = ocp.save
    monkeypatch.setattr(ocp, "save", lambda path, arrays: save(path, {"w_e": arrays["w_e"]}))
    with pytest.raises(OSError, match="did not write all arrays"):
        checkpoint.save_model(tmp_path / "m", CONFIG, make_params(CONFIG), origin=ORIGIN)
    assert not list(tmp_path.iterdir())


def test_params_that_do_not_fit_their_config_are_not_saved(tmp_path):
    params = make_params(CONFIG)
    params["extra"] = jnp.zeros(3)
    del params["w_u"]
    with pytest.raises(ValueError, match=r"In the model but not in the checkpoint: w_u; in the checkpoint .*: extra"):
        checkpoint.save_model(tmp_path / "m", CONFIG, params, origin=ORIGIN)
    params = make_params(CONFIG)
    params["layers"]["mlp"]["w_l"] = params["layers"]["mlp"]["w_l"].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"NaN or infinite values: layers\.mlp\.w_l"):
        checkpoint.save_model(tmp_path / "m", CONFIG, params, origin=ORIGIN)
    assert not list(tmp_path.iterdir())


# What is damaged is refused.


def test_masked_params_are_not_saved(tmp_path):
    params = make_params(CONFIG)
    w_e = np.asarray(params["w_e"])
    for mask, hides in ((np.zeros(w_e.shape, bool), False), (np.arange(w_e.size).reshape(w_e.shape) == 3, True)):
        masked = dict(params) | {"w_e": np.ma.masked_array(w_e, mask)}
        if hides:
            with pytest.raises(ValueError, match=r"the params of .*b are a masked array .*: fill it with array.filled"):
                checkpoint.save_model(tmp_path / "b", CONFIG, masked, origin=ORIGIN)
        else:
            checkpoint.save_model(tmp_path / "a", CONFIG, masked, origin=ORIGIN)
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
    assert checkpoint.load_model(copy).config == CONFIG


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
    checkpoint.save_model(tmp_path / "model", CONFIG, make_params(CONFIG), origin=origin)
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
    folder = checkpoint.save_model(tmp_path / "m", CONFIG, make_params(CONFIG), tokenizer=tmp_path, origin=ORIGIN)
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
