"""Checkpoints: what is saved comes back, and what was there is never lost."""

import json
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import ORIGIN, SMALL, make_params, same, snapshot

from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store import checkpoint
from weights_convert.names import parse_sae_name


def make_sae() -> SAE:
    return SAE.init(SAEConfig("mlp_out", 1, d_model=8, expansion=4, k=3), jax.random.key(1))


# What is saved comes back.


def test_a_saved_model_comes_back_bit_for_bit(saved):
    folder, params = saved
    files = checkpoint.load_model(folder)
    assert files.config == SMALL
    assert same(files.params, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(files.params))
    assert (files.source, files.tokenizer_source) == (str(folder), None)
    assert json.loads((folder / "config.json").read_text())["origin"] == ORIGIN
    assert checkpoint.load_model(folder, attn_scale=0.25).config.attn_scale == 0.25


def test_smaller_on_disk_is_float32_in_memory(tmp_path):
    params = make_params(SMALL)
    folder = checkpoint.save_model(tmp_path / "m", SMALL, params, origin=ORIGIN, dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert same(checkpoint.load_model(folder).params, rounded)


@pytest.mark.parametrize(
    "options",
    [{}, {"bilinear_encoder": True, "encoder_bias": True, "passthrough": (1, 3), "tag": "v2"}, {"token_lookup": 5}],
)
def test_a_saved_sae_comes_back_bit_for_bit(tmp_path, options):
    sae = SAE.init(SAEConfig("mlp_out", 1, d_model=8, expansion=4, k=3, **options), jax.random.key(1))
    sae = SAE({name: value + 0.5 for name, value in sae.params.items()}, sae.config)
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
        assert parts == (1, "mlp_out", 4, 3, tag, "topk", None)


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
        checkpoint.save_model(tmp_path / "m", SMALL, make_params(SMALL), origin=ORIGIN)
        checkpoint.load_model(tmp_path / "m")
        assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
        for name in ("save", "metadata", "load"):
            monkeypatch.setattr(ocp, name, warns(getattr(ocp, name)))
        checkpoint.save_model(tmp_path / "m", SMALL, make_params(SMALL), origin=ORIGIN, force=True)
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
        checkpoint.save_model(copy, SMALL, make_params(SMALL, seed=1), origin=ORIGIN)
    assert snapshot(copy) == before
    checkpoint.save_model(copy, SMALL, make_params(SMALL, seed=1), origin=ORIGIN, force=True)
    assert same(checkpoint.load_model(copy).params, make_params(SMALL, seed=1))
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_force_replaces_nothing_but_checkpoints(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not what force may replace here"):
        checkpoint.save_model(tmp_path / "thesis", SMALL, make_params(SMALL), origin=ORIGIN, force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_force_replaces_a_model_by_a_model_and_an_sae_by_an_sae(copy, tmp_path):
    sae = make_sae()
    folder = checkpoint.save_sae(tmp_path / sae.name, sae, origin=ORIGIN)
    before = snapshot(folder)
    with pytest.raises(FileExistsError, match=r"format 'bilinear_jax.transformer'. It has format 'bilinear_jax.sae'"):
        checkpoint.save_model(folder, SMALL, make_params(SMALL), origin=ORIGIN, force=True)
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
        checkpoint.save_model(copy, SMALL, make_params(SMALL), origin=ORIGIN, force=True)
    assert snapshot(copy) == before
    (copy / "scope").rename(copy.parent / "scope")
    (copy / "scope").mkdir()
    checkpoint.save_model(copy, SMALL, make_params(SMALL, seed=1), origin=ORIGIN, force=True)


@pytest.mark.parametrize("name", ["a\\b", "gs:/b", "caf\udce9"])
def test_a_name_where_the_arrays_would_go_elsewhere_is_refused(tmp_path, name):
    """Orbax would write them to another folder, and saving would seem to succeed."""
    with pytest.raises(OSError, match="cannot be written"):
        checkpoint.save_model(tmp_path / name, SMALL, make_params(SMALL), origin=ORIGIN)
    assert not list(tmp_path.iterdir())


def test_arrays_that_orbax_writes_elsewhere_are_noticed(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    save = ocp.save
    monkeypatch.setattr(ocp, "save", lambda path, arrays: save(path, {"w_e": arrays["w_e"]}))
    with pytest.raises(OSError, match="did not write all arrays"):
        checkpoint.save_model(tmp_path / "m", SMALL, make_params(SMALL), origin=ORIGIN)
    assert not list(tmp_path.iterdir())


def test_params_that_do_not_fit_their_config_are_not_saved(tmp_path):
    params = make_params(SMALL)
    params["extra"] = jnp.zeros(3)
    del params["w_u"]
    with pytest.raises(ValueError, match=r"In the model but not in the checkpoint: w_u; in the checkpoint .*: extra"):
        checkpoint.save_model(tmp_path / "m", SMALL, params, origin=ORIGIN)
    params = make_params(SMALL)
    params["layers"]["mlp"]["w_l"] = params["layers"]["mlp"]["w_l"].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"NaN or infinite values: layers\.mlp\.w_l"):
        checkpoint.save_model(tmp_path / "m", SMALL, params, origin=ORIGIN)
    assert not list(tmp_path.iterdir())
