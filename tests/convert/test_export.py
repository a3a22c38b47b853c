"""The way back to the published layout: what is written is read as the same, bit for bit."""

import dataclasses
import json
import math
import warnings

import jax
import ml_dtypes
import numpy as np
import published
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import bilinear_jax as bj
import weights_convert
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store.convert import export
from weights_convert.__main__ import main
from weights_convert.export import save_tensors

DTYPES = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])


@st.composite
def configs(draw):
    heads, bias = draw(st.integers(1, 2)), draw(st.booleans())
    n_layer = draw(st.integers(1, 2))
    return dict(
        n_layer=n_layer,
        n_head=heads,
        d_model=4 * heads,
        d_hidden=draw(st.integers(1, 5)),
        n_ctx=draw(st.integers(1, 9)),
        n_vocab=draw(st.integers(1, 6)),
        bilinear=draw(st.booleans()),
        gate=draw(st.sampled_from([None, "relu", "silu", "gelu"])),
        bias=bias,
        attention_bias=bias and draw(st.booleans()),
        normalization=draw(st.booleans() | st.tuples(st.booleans(), st.booleans(), st.booleans())),
        attn_scale=draw(st.sampled_from([1.0, 1 / math.sqrt(2 * n_layer)])),
        tokenizer=draw(st.sampled_from([None, "mine"])),
        dataset=draw(st.sampled_from([None, "fineweb"])),
        pad_id=draw(st.none() | st.integers(0, 5)),
    )


def arrays(tree, dtype, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), tree)


@pytest.mark.filterwarnings("ignore:the current code of the original")
@settings(max_examples=60, deadline=None)
@given(configs(), DTYPES, st.integers(0, 99))
def test_models_come_back_bit_for_bit(tmp_path_factory, options, dtype, seed):
    config = TransformerConfig(**options)
    folder, values = tmp_path_factory.mktemp("model"), dataclasses.asdict(config)
    params = arrays(published.make_params(config), dtype, seed)
    weights_convert.write_transformer(folder, values, params)
    got, back = weights_convert.read_transformer(folder)
    assert got.items() <= values.items() and TransformerConfig(**got) == config
    assert published.same(back, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, back) == jax.tree.map(lambda leaf: leaf.dtype, params)


@pytest.mark.filterwarnings("ignore:the current code of the original ignores passthrough")
@settings(max_examples=60, deadline=None)
@given(
    site=st.sampled_from(["mlp_in", "mlp_out", "resid_mid", "attn_out"]),
    layer=st.integers(0, 12),
    expansion=st.integers(1, 4),
    k=st.integers(1, 3),
    bilinear_encoder=st.booleans(),
    encoder_bias=st.booleans(),
    passthrough=st.sets(st.integers(0, 4)).map(sorted).map(tuple),
    normalize=st.none() | st.floats(0.5, 90),
    tag=st.sampled_from([None, "v0", "a-b"]),
    dtype=DTYPES,
)
def test_saes_come_back_bit_for_bit(tmp_path_factory, dtype, **options):
    config = SAEConfig(d_model=5, **options)
    params = arrays(SAE.init(config, jax.random.key(0)).params, dtype, 1)
    folder = tmp_path_factory.mktemp("scope") / config.name
    folder.mkdir()
    weights_convert.write_sae(folder, dataclasses.asdict(config), params)
    got, back = weights_convert.read_sae(folder)
    assert SAEConfig(**got) == config
    assert published.same(back, params)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"activation": "topk_relu"}, "activation 'topk_relu'"),
        ({"activation": "jumprelu", "k": None}, "activation 'jumprelu'"),
        ({"target": "mlp_out"}, "target 'mlp_out', centred False"),
        ({"target": "mlp_out", "skip": True}, "target 'mlp_out', skip True, centred False"),
        ({"centred": False}, "centred False"),
        ({"bilinear_encoder": True, "product_bias": True}, "product_bias True"),
        ({"bilinear_encoder": True, "linear_term": True}, "linear_term True"),
        ({"expansion": 1.5}, "expansion 1.5"),
    ],
)
def test_what_the_layout_cannot_say_of_an_sae_is_named(tmp_path, options, named):
    config = SAEConfig(**({"site": "mlp_in", "layer": 0, "d_model": 4, "expansion": 2, "k": 2} | options))
    folder = tmp_path / config.name
    folder.mkdir()
    params = jax.tree.map(np.asarray, SAE.init(config, jax.random.key(0)).params)
    with pytest.raises(ValueError, match=rf"has only top-k SAEs, and cannot say {named}: keep it as a checkpoint"):
        weights_convert.write_sae(folder, dataclasses.asdict(config), params)
    assert list(folder.iterdir()) == []


READS = {"target": "mlp_out", "bilinear_encoder": True, "inputs": 5, "inputs_k": 2, "reads": 2}


@pytest.mark.parametrize(("option", "options"), [("token_lookup", {"token_lookup": 5}), ("inputs", READS)])
def test_what_only_we_have_cannot_be_published(tmp_path, option, options):
    config = SAEConfig("mlp_in", 0, 4, 2, 2, **options)
    params = jax.tree.map(np.asarray, SAE.init(config, jax.random.key(0)).params)
    with pytest.raises(ValueError, match=f"the published layout cannot say {option} 5: keep it as a checkpoint of"):
        weights_convert.write_sae(tmp_path, dataclasses.asdict(config), params)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=12, deadline=None, phases=[Phase.reuse, Phase.generate])  # to shrink takes minutes
@given(st.data(), st.booleans(), DTYPES)
def test_weights_in_any_memory_layout_come_back_bit_for_bit(tmp_path_factory, data, bias, dtype):
    """Transposed, sliced with steps, backwards, in Fortran order, repeated, big-endian, or of JAX."""
    config = TransformerConfig(2, 1, 4, 6, 8, 5, bias=bias, attention_bias=bias, attn_scale=0.5)
    given = arrays(published.make_params(config), dtype, 0)
    given["layers"]["mlp"]["w_p"] = published.repeated(data.draw, given["layers"]["mlp"]["w_p"])
    expected = jax.tree.map(np.array, given)  # copies, in C order
    given = jax.tree.map(lambda leaf: leaf if 0 in leaf.strides else published.other_memory(data.draw, leaf), given)
    folder = tmp_path_factory.mktemp("model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of biases in the attention
        weights_convert.write_transformer(folder, dataclasses.asdict(config), given)
    back = weights_convert.read_transformer(folder)[1]
    assert published.same(back, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(dtype)}

    sae = SAEConfig("mlp_out", 0, d_model=5, expansion=2, k=2, encoder_bias=True)
    expected = arrays(SAE.init(sae, jax.random.key(0)).params, dtype, 1)
    given = jax.tree.map(lambda leaf: published.other_memory(data.draw, leaf), expected)
    (folder / sae.name).mkdir()
    weights_convert.write_sae(folder / sae.name, dataclasses.asdict(sae), given)
    assert published.same(weights_convert.read_sae(folder / sae.name)[1], expected)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=r"could not write .*new/a\.safetensors .*: free disk space, or check what is at"):
        save_tensors(tmp_path / "new" / "a.safetensors", {"a": np.ones(3)})


def test_published_files_come_back_tensor_for_tensor(tmp_path):
    """Under the same names, in the same shapes: a file that torch wrote, read, and written again."""
    config, params = weights_convert.read_transformer(published.MODEL, attn_scale=published.SCALE)
    weights_convert.write_transformer(tmp_path, config, params)
    written, original = load_file(tmp_path / "model.safetensors"), load_file(published.MODEL / "model.safetensors")
    dead = {key for key in original if ".norm.linear." in key}
    assert written.keys() == original.keys() - dead
    for key, value in written.items():
        tolerance = {"rtol": 1e-6} if key.endswith("inv_freq") else {"rtol": 0}
        np.testing.assert_allclose(value, original[key], atol=0, **tolerance, err_msg=key)
    raw, was = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, published.MODEL))
    assert {key: raw[key] for key in ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden", "bilinear", "gate")} == {
        key: was[key] for key in ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden", "bilinear", "gate")
    }
    assert raw["architectures"] == ["Transformer"] and raw["torch_dtype"] == "float32"
    name = "1-mlp-out-x4-k6"
    (tmp_path / name).mkdir()
    weights_convert.write_sae(tmp_path / name, *weights_convert.read_sae(published.SCOPE / name))
    for key, value in published.sae(name)[1].items():
        assert load_file(tmp_path / name / "model.safetensors")[key].tobytes() == value.tobytes()


def test_export_and_convert_are_inverse(tmp_path, capsys):
    """The model that ships, by the two commands: same codes, same tokens, same logits."""
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    assert main(["export", "ts-nano", out, "--scope", "--repo", "someone/mine"]) == 0
    assert main([out, back, "--scope", f"{out}-scope"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "knows the tokenizers ts-4096, mistral, gpt2, but not ts-nano" in lines[0]
    assert bj.list_saes(back) == bj.list_saes("ts-nano")
    before, exported, after = (bj.load(source) for source in ("ts-nano", out, back))
    assert before.config == exported.config == after.config
    assert published.same(before.params, exported.params) and published.same(before.params, after.params)
    assert exported.tokenizer("Once upon a time") == before.tokenizer("Once upon a time")
    for name in bj.list_saes("ts-nano"):
        saes = [bj.load_sae(source, **name._asdict()) for source in ("ts-nano", f"{out}-scope", back)]
        assert published.same(saes[0].params, saes[1].params) and published.same(saes[0].params, saes[2].params)
        assert saes[0].config == saes[1].config == saes[2].config


def test_what_the_layout_cannot_say(tmp_path):
    config, params = weights_convert.read_transformer(published.MODEL, attn_scale=published.SCALE)
    for change, message in (
        ({"attn_scale": 0.5}, "multiply w_o by 1.22474 and set attn_scale to None"),
        ({"attention_bias": True}, "add biases of 0 to the MLP"),
    ):
        with pytest.raises(ValueError, match=message):
            weights_convert.write_transformer(tmp_path, config | change, params)
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=r"current code of the original always scales the attention by 0\.408248"):
        weights_convert.write_transformer(tmp_path, config | {"attn_scale": 1.0}, params)
    assert weights_convert.read_transformer(tmp_path)[0]["attn_scale"] == 1
    with pytest.warns(UserWarning, match="has either all norms or none"):
        weights_convert.write_transformer(tmp_path, config | {"normalization": (True, False, True)}, params)
    sae, arrays = weights_convert.read_sae(published.SCOPE / "1-mlp-out-x4-k6")
    for folder, change, message in (
        ("1-mlp-out-x4-k6", {"apply_normalize": True, "normalize": 2.0}, "has no apply_normalize"),
        ("1-mlp-out-x4-k7", {}, "must have its name"),
        ("mine", {}, "must have its name"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            weights_convert.write_sae(tmp_path / folder, sae | change, arrays)
        assert not list((tmp_path / folder).iterdir())


def without(tree, *names):
    return {
        key: without(value, *names) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key not in names
    }


PARAMS = {
    "a side of the MLP": (lambda p: without(p, "w_r"), {}, "mlp.w.weight has"),
    "the output of the attention": (
        lambda p: without(p, "w_o"),
        {},
        "not in the params: transformer.h.0.attn.o.weight",
    ),
    "the head": (lambda p: without(p, "w_u"), {}, "not in the params: lm_head.weight"),
    "biases that the config has": (lambda p: p, {"bias": True}, "not in the params: transformer.h.0.mlp.p.bias"),
    "one more": (lambda p: p | {"w_x": p["w_e"]}, {}, "numbers:"),
    "more layers": (lambda p: p, {"n_layer": 2, "attn_scale": 0.5}, "not in the model: transformer.h.2.attn.o.weight"),
    "fewer layers": (lambda p: p, {"n_layer": 4, "attn_scale": None}, "not in the params: transformer.h.3.attn"),
    "another vocabulary": (lambda p: p, {"n_vocab": 5}, "lm_head.weight has"),
    "NaN": (lambda p: p | {"w_e": p["w_e"] * np.float32(np.nan)}, {}, "wte.weight has NaN"),
    "float64": (lambda p: p | {"w_e": p["w_e"].astype(np.float64)}, {}, "wte.weight is float64"),
    "an unknown gate": (lambda p: p, {"gate": "tanh"}, "unknown gate 'tanh'"),
}


@pytest.mark.parametrize("name", PARAMS)
def test_params_that_are_not_the_configs(tmp_path, name):
    """Each would be lost in silence, or make a folder that can't be read."""
    config, params = weights_convert.read_transformer(published.MODEL, attn_scale=published.SCALE)
    change, options, message = PARAMS[name]
    with pytest.raises(ValueError, match=message):
        weights_convert.write_transformer(tmp_path, config | options, change(params))
    assert not list(tmp_path.iterdir())


def test_params_that_are_not_the_saes(tmp_path):
    config, params = weights_convert.read_sae(published.SCOPE / "1-mlp-out-x4-k6")
    folder = tmp_path / "1-mlp-out-x4-k6"
    folder.mkdir()
    for change, options, message in (
        (without(params, "b_dec"), {}, "not in the params: b_dec"),
        (params | {"b_x": params["b_dec"]}, {}, "numbers: "),
        (params, {"encoder_bias": True}, "not in the params: w_enc.bias"),
        (params, {"bilinear_encoder": True}, "w_enc.weight has"),
        (params | {"b_dec": params["b_dec"].astype(np.int32)}, {}, "b_dec is int32"),
    ):
        with pytest.raises(ValueError, match=message):
            weights_convert.write_sae(folder, config | options, change)
        assert not list(folder.iterdir())
    with pytest.warns(UserWarning, match="ignores passthrough"):
        weights_convert.write_sae(folder, config | {"passthrough": (3,)}, params)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (folder / "config.json").stat().st_mode & 0o777
    }


def test_nothing_is_replaced_or_half_written(tmp_path, monkeypatch):
    (tmp_path / "out-scope").mkdir()
    (tmp_path / "out-scope" / "precious").write_text("data")
    with pytest.raises(FileExistsError, match="out-scope already exists: name another OUT, or move it away"):
        export(published.MODEL, tmp_path / "out", published.SCOPE, attn_scale=published.SCALE)
    with pytest.raises(FileNotFoundError, match="has no SAEs"):
        export(published.MODEL, tmp_path / "new", published.MODEL, attn_scale=published.SCALE)
    monkeypatch.setattr(weights_convert, "write_sae", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"), warnings.catch_warnings():
        export(published.MODEL, tmp_path / "new", published.SCOPE, attn_scale=published.SCALE)
    assert published.snapshot(tmp_path) == {"out-scope/precious": b"data"}
