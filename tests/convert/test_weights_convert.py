"""Reading the published layout: every weight in its place, bit for bit; everything wrong is said."""

import json
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import published
import pytest

import weights_convert


def layer_weights(weights, key):
    return np.stack([weights[f"transformer.h.{i}.{key}"] for i in range(published.CONFIG["n_layer"])])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_weight_lands_in_its_place_bit_for_bit(tmp_path, sharded, dtype):
    config = published.CONFIG | {"bias": True, "gate": "silu", "normalization": [True, False, True]}
    weights = {key: value.astype(dtype) for key, value in published.state(config, qkv_bias=True).items()}
    write = published.write_sharded if sharded else published.write
    got, params = weights_convert.read_transformer(write(tmp_path / "m", config, weights))
    assert got == {
        **{key: config[key] for key in ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden", "bilinear")},
        **{"gate": "silu", "bias": True, "attention_bias": True, "normalization": (True, False, True)},
        **{"n_vocab": 11, "tokenizer": "ts-4096", "dataset": None, "pad_id": 2, "attn_scale": 0.5},
    }
    qkv, bias = layer_weights(weights, "attn.qkv.weight"), layer_weights(weights, "attn.qkv.bias")
    sides, side_bias = layer_weights(weights, "mlp.w.weight"), layer_weights(weights, "mlp.w.bias")
    expected = {
        "attention": {
            **{f"w_{name}": qkv[:, 8 * i : 8 * i + 8] for i, name in enumerate("qkv")},
            **{f"b_{name}": bias[:, 8 * i : 8 * i + 8] for i, name in enumerate("qkv")},
            "w_o": layer_weights(weights, "attn.o.weight"),
        },
        "mlp": {
            **{"w_l": sides[:, :12], "w_r": sides[:, 12:], "b_l": side_bias[:, :12], "b_r": side_bias[:, 12:]},
            **{"w_p": layer_weights(weights, "mlp.p.weight"), "b_p": layer_weights(weights, "mlp.p.bias")},
        },
    }
    for part, arrays in expected.items():
        assert params["layers"][part].keys() == arrays.keys()
        for name, array in arrays.items():
            assert params["layers"][part][name].dtype == dtype
            assert params["layers"][part][name].tobytes() == np.ascontiguousarray(array).tobytes(), name
    assert params["w_e"].tobytes() == weights["transformer.wte.weight"].tobytes()
    assert params["w_u"].tobytes() == weights["lm_head.weight"].tobytes()


def test_needs_neither_torch_nor_jax():
    code = (
        "import sys, weights_convert as w; "
        f"w.read_transformer({str(published.MODEL)!r}, attn_scale=1.0); "
        f"w.read_sae({str(published.SCOPE / '1-mlp-in-x4-k6')!r}); "
        "assert not {'torch', 'jax', 'bilinear_jax'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_plain_mlp_and_older_config_keys(tmp_path):
    config = published.CONFIG | {"bilinear": False, "gate": "relu", "modifier": None, "noise": 0.1, "norm_bias": False}
    got, params = weights_convert.read_transformer(published.write(tmp_path, config, published.state(config)))
    assert (got["bilinear"], got["gate"]) == (False, "relu")
    assert params["layers"]["mlp"].keys() == {"w_l", "w_p"}

    config = published.CONFIG | {"gate": False, "mlp": "bilinear", "rms": True, "attention2": False, "n_vocab": 11}
    weights = published.state(config)
    del config["bilinear"], config["normalization"]
    got, _ = weights_convert.read_transformer(published.write(tmp_path, config, weights))
    assert (got["bilinear"], got["gate"], got["normalization"]) == (True, None, (True, True, True))


def test_buffers_are_checked_and_dead_weights_ignored(tmp_path):
    weights = published.state(published.CONFIG)
    for i in range(2):
        weights[f"transformer.h.{i}.attn.rotary.inv_freq"] = np.array([1.0, 0.01], np.float32)
        weights[f"transformer.h.{i}.n1.norm.linear.weight"] = np.zeros((512, 512), np.float32)
    weights["transformer.n_f.norm.linear.weight"] = np.zeros((512, 512), np.float32)
    _, params = weights_convert.read_transformer(published.write(tmp_path, published.CONFIG, weights))
    assert params.keys() == {"w_e", "w_u", "layers"}
    weights["transformer.h.1.attn.rotary.inv_freq"] = np.array([1.0, 0.02], np.float32)
    with pytest.raises(ValueError, match=r"h\.1\.attn\.rotary\.inv_freq .* rotary base 10000"):
        weights_convert.read_transformer(published.write(tmp_path, published.CONFIG, weights))


def test_norm_gains_of_older_files_are_folded_in_out_loud(tmp_path):
    weights = published.state(published.CONFIG)
    _, plain = weights_convert.read_transformer(published.write(tmp_path, published.CONFIG, weights))
    rng = np.random.default_rng(1)
    n1, n2, final = (rng.normal(size=8).astype(np.float32) for _ in range(3))
    weights |= {"transformer.h.1.n1.weight": n1, "transformer.h.0.n2.weight": n2, "transformer.n_f.weight": final}
    with pytest.warns(UserWarning, match=r"gains.*h\.0\.n2\.weight, transformer\.h\.1\.n1\.weight, transformer\.n_f"):
        _, folded = weights_convert.read_transformer(published.write(tmp_path, published.CONFIG, weights))
    x = rng.normal(size=8).astype(np.float32)
    close = np.testing.assert_allclose
    close(folded["w_u"] @ x, plain["w_u"] @ (final * x), rtol=1e-5, atol=1e-5)
    for name in ("w_q", "w_k", "w_v"):
        before, after = (p["layers"]["attention"][name] for p in (plain, folded))
        close(after[1] @ x, before[1] @ (n1 * x), rtol=1e-5, atol=1e-5)
        assert np.array_equal(after[0], before[0])
    for name in ("w_l", "w_r"):
        before, after = (p["layers"]["mlp"][name] for p in (plain, folded))
        close(after[0] @ x, before[0] @ (n2 * x), rtol=1e-5, atol=1e-5)
        assert np.array_equal(after[1], before[1])
    for part, name in (("attention", "w_o"), ("mlp", "w_p")):
        assert np.array_equal(folded["layers"][part][name], plain["layers"][part][name])


@pytest.mark.parametrize(
    ("given", "scale_attn", "repo", "expected"),
    [
        (0.25, True, "tdooms/ts-medium", 0.25),
        (None, True, "tdooms/ts-medium", 0.5),
        (None, False, "tdooms/fw-medium", 1.0),
        (None, None, "tdooms/ts-medium", 1.0),
        (None, None, "tdooms/fw-medium", 0.5),
        (None, None, "someone/else", 0.5),
    ],
)
def test_attention_scale_goes_by_argument_then_config_then_name(tmp_path, recwarn, given, scale_attn, repo, expected):
    config = published.CONFIG | {"repo": repo, "scale_attn": scale_attn}
    folder = published.write(tmp_path, config, published.state(config))
    if given is None and scale_attn is None:
        with pytest.warns(UserWarning, match="To check, run .* compares the losses of attn_scale=1 and attn_scale=0.5"):
            got, _ = weights_convert.read_transformer(folder)
    else:
        got, _ = weights_convert.read_transformer(folder, attn_scale=given)
    assert got["attn_scale"] == expected
    assert not recwarn.list


def broken(tmp_path, config=None, weights=None, drop=()):
    config = published.CONFIG | (config or {})
    state = published.state(published.CONFIG) | (weights or {})
    return published.write(tmp_path, config, {key: value for key, value in state.items() if key not in drop})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zeta": 1, "alpha": 2}, r"unknown keys \['alpha', 'zeta'\].*remove them"),
        ({"attention2": True}, r"attention2: five projections and no softmax"),
        ({"norm_bias": True}, r"norm_bias: norms with a bias cannot be loaded"),
        ({"gate": "tanh"}, r"unknown gate 'tanh'; known: .*'relu'"),
        ({"normalization": [True, False]}, r"normalization must be true, false or three"),
        ({"rms": False}, r"rms False and normalization True contradict"),
        ({"n_head": 3}, r"not a multiple of 2 n_head"),
        ({"n_layer": "2"}, r"must be whole numbers"),
        ({"d_hidden": 13}, r"mlp\.p\.weight has \[8, 12\], expected \[8, 13\].*Check that config.json belongs"),
        ({"n_vocab": 12}, r"lm_head\.weight has \[11, 8\], expected \[12, 8\]"),
    ],
)
def test_configs_that_cannot_be_represented(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        weights_convert.read_transformer(broken(tmp_path, change))


def test_missing_and_extra_weights_are_listed_on_both_sides_sorted(tmp_path):
    extra = {"zeta": np.zeros(2, np.float32), "alpha": np.zeros(2, np.float32)}
    folder = broken(tmp_path, weights=extra, drop=["transformer.h.1.mlp.p.weight", "lm_head.weight"])
    message = (
        "In the model but not in the checkpoint: lm_head.weight, transformer.h.1.mlp.p.weight; "
        "in the checkpoint but not in the model: alpha, zeta."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        weights_convert.read_transformer(folder)


def test_a_gain_of_a_norm_that_is_off_is_an_extra_weight(tmp_path):
    gain = {"transformer.h.0.n1.weight": np.ones(8, np.float32)}
    with pytest.raises(ValueError, match=r"not in the model: transformer\.h\.0\.n1\.weight"):
        weights_convert.read_transformer(broken(tmp_path, {"normalization": [False, True, True]}, gain))


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_a_weight_that_is_not_finite_is_named(tmp_path, value, kind):
    weight = published.state(published.CONFIG)["transformer.h.1.mlp.w.weight"]
    weight[3, 4] = value
    with pytest.raises(ValueError, match=rf"h\.1\.mlp\.w\.weight .* has 1 values .*{kind}.*download it again"):
        weights_convert.read_transformer(broken(tmp_path, weights={"transformer.h.1.mlp.w.weight": weight}))


def test_integers_and_mixed_dtypes_are_refused(tmp_path):
    weight = published.state(published.CONFIG)["transformer.h.1.mlp.w.weight"]
    with pytest.raises(ValueError, match="stored as I32; save it again as one of float32"):
        weights_convert.read_transformer(broken(tmp_path, weights={"lm_head.weight": np.ones((11, 8), np.int32)}))
    with pytest.raises(ValueError, match=r"mlp\.w\.weight is stored as float16 and as float32: save all layers again"):
        half = {"transformer.h.1.mlp.w.weight": weight.astype(np.float16)}
        weights_convert.read_transformer(broken(tmp_path, weights=half))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file(tmp_path, kept):
    path = broken(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors \(\d+ bytes\) is cut short.*download it again"):
        weights_convert.read_transformer(tmp_path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        weights_convert.read_transformer(tmp_path / "nowhere")
    (broken(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors, .*pytorch_model\.bin.*Download one"):
        weights_convert.read_transformer(tmp_path)
    folder = published.write_sharded(tmp_path / "sharded", published.CONFIG, published.state(published.CONFIG))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks shards .*model-00002-of-00002\.safetensors.*Download"):
        weights_convert.read_transformer(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        weights_convert.read_transformer(folder)


def test_sae_weights_bit_for_bit():
    for name, parts in weights_convert.sae_folders(published.SCOPE).items():
        _, stored = published.sae(name)
        config, params = weights_convert.read_sae(published.SCOPE / name)
        assert (config["layer"], config["site"], config["expansion"], config["k"], config["tag"]) == parts[:5]
        assert params.keys() == {"w_enc", "w_dec", "b_dec"}
        for key, value in stored.items():
            assert params[key.removesuffix(".weight")].tobytes() == value.tobytes()


def test_sae_options_of_all_ages(tmp_path):
    config, weights = published.sae()
    config |= {"bilinear_encoder": True, "encoder_bias": True, "normalize": 12, "point": ["mlp_out", 1]}
    config |= {"kwargs": {"kwargs": {"passthrough": 7}}}
    del config["normalize_decoder"]
    weights["w_enc.weight"] = np.concatenate([weights["w_enc.weight"]] * 2)
    weights["w_enc.bias"] = np.arange(256, dtype=np.float32)
    folder = published.write(tmp_path / "1-mlp-out-x4-k6-v2", config, weights)
    got, params = weights_convert.read_sae(folder)
    assert (got["site"], got["passthrough"], got["normalize"], got["tag"]) == ("mlp_out", (7,), 12.0, "v2")
    assert params["w_enc"].shape == (256, 32)
    assert params["b_enc"].tobytes() == weights["w_enc.bias"].tobytes()
    published.write(folder, config | {"passthrough": [3, 5]}, weights)
    assert weights_convert.read_sae(folder)[0]["passthrough"] == (3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zeta": 1}, r"unknown keys \['zeta'\]"),
        ({"kwargs": {"theta": 1}}, r"unknown keys \['theta'\]"),
        ({"k": 7}, r"k 7 but the name says 6: rename"),
        ({"point": ["mlp-in", 1]}, r"site 'mlp_in' but the name says 'mlp_out'"),
        ({"point": ["mlp-mid", 1]}, r"point must be a site and a layer.*resid_post"),
        ({"target": ["mlp-in", 1]}, "transcoders of this layout cannot be loaded, because they subtract"),
        ({"token_lookup": True}, "SAEs with a table of tokens cannot be loaded"),
        ({"passthrough": [32]}, r"passthrough must be a coordinate in 0 \.\.\. 31"),
        ({"normalize": "unit"}, "normalize must be a number or null"),
        ({"bilinear_encoder": True}, r"w_enc\.weight has \[128, 32\], expected \[256, 32\]"),
        ({"encoder_bias": True}, r"not in the checkpoint: w_enc\.bias"),
        ({"d_model": 16}, r"b_dec has \[32\], expected \[16\]"),
    ],
)
def test_sae_configs_that_contradict_or_cannot_be_represented(tmp_path, change, message):
    config, weights = published.sae()
    folder = published.write(tmp_path / "1-mlp-out-x4-k6", config | change, weights)
    with pytest.raises(ValueError, match=message):
        weights_convert.read_sae(folder)
    assert json.loads((folder / "config.json").read_text()) == config | change
