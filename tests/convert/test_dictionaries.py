"""Dictionaries of other libraries: what the peers computed, and that reading inverts writing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from dictionaries import PLACE, TRANSCODER, WRITABLE, F, codes_of, decoded, made, reconstructed
from safetensors.numpy import load_file, save_file

from weights_convert import dictionary_format, read_dictionary, write_dictionary
from weights_convert.dictionaries import hooks
from weights_convert.pickled import read_torch
from weights_convert.torch_file import write_torch

GOLDEN = Path(__file__).parents[1] / "data" / "dictionaries"  # what the peers wrote and computed, see make.py there
CASES = {
    "saelens-standard": ("saelens", "relu", {}),
    "saelens-topk": ("saelens", "topk_relu", {}),
    "saelens-jumprelu": ("saelens", "jumprelu", {}),
    "saelens-transcoder": ("saelens", "relu", {"target": "resid_post"}),
    "saelens-skip-transcoder": ("saelens", "relu", {"target": "resid_post"}),
    "gemma-scope": ("gemma-scope", "jumprelu", PLACE),
    "sparsify": ("sparsify", "topk_relu", PLACE),
    "dl-batchtopk": ("dictionary_learning", "batchtopk", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_codes_and_reconstructions_are_those_of_the_peers(name):
    form, activation, given = CASES[name]
    assert dictionary_format(GOLDEN / name) == form
    config, params = read_dictionary(GOLDEN / name, **given)
    assert config["activation"] == activation and config["layer"] == 2
    expected = load_file(GOLDEN / name / "expected.safetensors")
    x = expected["x"].astype(np.float64)
    codes = codes_of(config, params, x)
    assert 0 < (expected["codes"] != 0).mean() < 1  # else nothing is chosen
    np.testing.assert_allclose(codes, expected["codes"], atol=1e-5)
    np.testing.assert_allclose(decoded(params, codes), expected["recon"], atol=1e-5)
    if "forward" in expected:
        np.testing.assert_allclose(reconstructed(config, params, x), expected["forward"], atol=1e-5)


@pytest.mark.parametrize(("form", "options"), WRITABLE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reading_inverts_writing_bit_for_bit(form, options, dtype, tmp_path):
    config, params = made(1, dtype, **options)
    if form == "gemma-scope" and dtype is ml_dtypes.bfloat16:
        with pytest.raises(ValueError, match="bfloat16, which npz files do not have"):
            write_dictionary(tmp_path, form, config, params)
        return
    write_dictionary(tmp_path, form, config, params)
    got, values = read_dictionary(tmp_path, **(PLACE if form == "gemma-scope" else {}))
    assert got == config
    assert values.keys() == params.keys()
    for key, value in params.items():
        assert values[key].dtype == value.dtype and values[key].shape == value.shape, key
        assert values[key].tobytes() == np.ascontiguousarray(value).tobytes(), key


@pytest.mark.parametrize("form", ["saelens", "sparsify", "dictionary_learning"])
def test_signed_codes_are_written_with_a_warning(form, tmp_path):
    config, params = made(activation="topk")
    with pytest.warns(UserWarning, match="sets negative codes to 0") as caught:
        write_dictionary(tmp_path, form, config, params)
    assert caught[0].filename == __file__
    got, values = read_dictionary(tmp_path)
    assert got == config | {"activation": "topk_relu"}
    np.testing.assert_array_equal(values["w_enc"], params["w_enc"])


@pytest.mark.parametrize(("form", "activation"), [("saelens", "relu"), ("sparsify", "topk_relu")])
def test_without_an_encoder_bias_one_of_zeros_is_written(form, activation, tmp_path):
    config, params = made(activation=activation, encoder_bias=False)
    del config["centred"]
    write_dictionary(tmp_path, form, config, params)
    got, values = read_dictionary(tmp_path)
    assert got["encoder_bias"] and got["centred"] is True and not values["b_enc"].any()


def test_views_and_other_byte_orders_are_written_as_their_values(tmp_path):
    config, params = made(activation="jumprelu", centred=False)
    odd = {key: np.repeat(value, 2, axis=0)[::2].astype(">f4") for key, value in params.items()}
    for form in ("saelens", "gemma-scope", "dictionary_learning"):
        folder = tmp_path / form
        folder.mkdir()
        write_dictionary(folder, form, config, odd)
        _, values = read_dictionary(folder, **(PLACE if form == "gemma-scope" else {}))
        for key, value in params.items():
            np.testing.assert_array_equal(values[key], value)


# SAELens


def changed(tmp_path: Path, name: str, config: dict, *, drop: tuple[str, ...] = (), **tensors) -> Path:
    """A copy of a golden folder with a changed config and changed tensors."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    path = next(folder.glob("c*f*g.json"))
    raw = json.loads(path.read_text())
    nested = raw if path.name == "cfg.json" else raw["trainer"]
    nested.update({key: value for key, value in config.items() if key != "metadata"})
    nested.setdefault("metadata", {}).update(config.get("metadata", {})) if "metadata" in config else None
    for key in drop:
        nested.pop(key, None)
    path.write_text(json.dumps(raw))
    for weights in folder.glob("sae*.safetensors"):
        state = load_file(weights) | tensors
        save_file({key: value for key, value in state.items() if value is not None}, weights)
    for weights in folder.glob("ae.pt"):
        state = {key: np.array(value) for key, value in read_torch(weights).items()} | tensors
        write_torch(weights, {key: value for key, value in state.items() if value is not None})
    return folder


def test_saelens_norms_of_the_decoder_are_folded(tmp_path):
    folder = changed(tmp_path, "saelens-topk", {"rescale_acts_by_decoder_norm": True})
    config, params = read_dictionary(folder)
    raw = load_file(folder / "sae_weights.safetensors")
    x = load_file(folder / "expected.safetensors")["x"].astype(np.float64)
    norms = np.linalg.norm(raw["W_dec"].astype(np.float64), axis=1)
    z = (x @ raw["W_enc"] + raw["b_enc"]) * norms
    kept = np.where(z >= np.sort(z, axis=1)[:, [-6]], np.maximum(z, 0), 0)
    codes = codes_of(config, params, x)
    np.testing.assert_allclose(codes, kept, atol=1e-5)
    np.testing.assert_allclose(decoded(params, codes), kept / norms @ raw["W_dec"] + raw["b_dec"], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(params["w_dec"], axis=0), 1, atol=1e-6)


def test_saelens_folding_keeps_half_precision_and_columns_of_zeros(tmp_path):
    raw = load_file(GOLDEN / "saelens-topk" / "sae_weights.safetensors")
    half = {key: value.astype(np.float16) for key, value in raw.items()}
    half["W_dec"][0] = 0
    _, params = read_dictionary(changed(tmp_path, "saelens-topk", {"rescale_acts_by_decoder_norm": True}, **half))
    assert params["w_enc"].dtype == np.float32 and all(np.isfinite(value).all() for value in params.values())
    norms = np.linalg.norm(half["W_dec"].astype(np.float64), axis=1)
    np.testing.assert_allclose(params["w_enc"], half["W_enc"].T.astype(np.float64) * norms[:, None], rtol=1e-6)


def test_saelens_batch_topk_as_it_is_trained_and_as_it_is_saved(tmp_path):
    double = np.array(0.3)
    training = changed(
        tmp_path / "a",
        "saelens-jumprelu",
        {"architecture": "batchtopk", "k": 6.4, "topk_threshold_lr": 0.01, "rescale_acts_by_decoder_norm": False},
        threshold=None,
        topk_threshold=double,
    )
    config, params = read_dictionary(training)
    assert config["activation"] == "batchtopk" and config["k"] == 6
    assert params["threshold"].dtype == np.float32 and params["threshold"] == np.float32(0.3)
    metadata = {"training_architecture": "matryoshka_batchtopk", "training_architecture_details": {"k": 6}}
    equal = np.full(64, 0.3, np.float32)
    saved = read_dictionary(changed(tmp_path / "b", "saelens-jumprelu", {"metadata": metadata}, threshold=equal))
    assert saved.config == config
    np.testing.assert_array_equal(saved.params["threshold"], params["threshold"])
    equal[3] = 0.4
    other = read_dictionary(changed(tmp_path / "c", "saelens-jumprelu", {"metadata": metadata}, threshold=equal))
    assert other.config["activation"] == "jumprelu" and other.params["threshold"].shape == (64,)


def test_saelens_configs_before_version_6(tmp_path):
    old = {"hook_point": "blocks.4.hook_resid_pre", "hook_point_layer": 4, "lr": 1e-4, "normalize_activations": False}
    folder = changed(
        tmp_path / "a",
        "saelens-standard",
        old,
        drop=("metadata", "architecture", "apply_b_dec_to_input"),
        scaling_factor=np.ones(64, np.float32),
    )
    config, params = read_dictionary(folder)
    assert (config["site"], config["layer"], config["activation"], config["centred"]) == ("resid_pre", 4, "relu", True)
    new = read_dictionary(GOLDEN / "saelens-standard").params
    assert params.keys() == new.keys()
    topk = old | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    config, _ = read_dictionary(changed(tmp_path / "b", "saelens-standard", topk, drop=("metadata", "architecture")))
    assert (config["activation"], config["k"]) == ("topk_relu", 5)


@pytest.mark.parametrize(
    ("out", "target", "expected"),
    [
        ("blocks.2.hook_mlp_out", None, "mlp_out"),
        ("blocks.2.hook_mlp_out", "mlp_out", "mlp_out"),
        (None, None, "mlp_out"),
        (None, "resid_post", "resid_post"),
    ],
)
def test_saelens_targets(out, target, expected, tmp_path):
    metadata = {"hook_name": "blocks.2.mlp.hook_in"} | ({"hook_name_out": out} if out else {})
    folder = changed(tmp_path, "saelens-transcoder", {"metadata": metadata})
    config, _ = read_dictionary(folder, target=target)
    assert (config["site"], config["target"]) == ("mlp_in", expected)


# Gemma Scope, sparsify, dictionary_learning


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", {}, ("resid_post", 20, None, "average_l0_71")),
        ("models--a--gemma-scope-9b-pt-mlp/snapshots/0a/layer_3/canonical", {}, ("mlp_out", 3, None, "canonical")),
        ("gemma-scope-2b-pt-transcoders/layer_4/width_16k/average_l0_9", {}, ("mlp_in", 4, "mlp_out", "average_l0_9")),
        ("layer_7/a", {"site": "resid_mid"}, ("resid_mid", 7, None, None)),
        ("a", {"site": "mlp_in", "layer": 0, "target": "mlp_out"}, ("mlp_in", 0, "mlp_out", None)),
    ],
)
def test_gemma_scope_is_placed_by_its_path(path, given, expected, tmp_path):
    folder = tmp_path / path
    shutil.copytree(GOLDEN / "gemma-scope", folder)
    config, _ = read_dictionary(folder, **given)
    assert (config["site"], config["layer"], config["target"], config["tag"]) == expected


def test_gemma_scope_compressed_and_in_fortran_order(tmp_path):
    arrays = dict(np.load(GOLDEN / "gemma-scope" / "params.npz"))
    arrays["w_enc"] = np.asfortranarray(arrays.pop("W_enc"))
    np.savez_compressed(tmp_path / "params.npz", **arrays)
    got, expected = (read_dictionary(folder, **PLACE).params for folder in (tmp_path, GOLDEN / "gemma-scope"))
    for key, value in expected.items():
        np.testing.assert_array_equal(got[key], value)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("layers.10.mlp", {}, ("mlp_out", 10, None, True)),
        ("layers.10", {}, ("resid_post", 10, None, True)),
        ("model.layers.3.self_attn", {}, ("attn_out", 3, None, True)),
        ("transformer.h.3.mlp", {"transcode": True}, ("mlp_in", 3, "mlp_out", False)),
        ("gpt_neox.layers.4", {"transcode": True}, ("resid_pre", 4, "resid_post", False)),
    ],
)
def test_sparsify_is_placed_by_its_folder(name, changes, expected, tmp_path):
    folder = changed(tmp_path, "sparsify", changes).rename(tmp_path / name)
    config, _ = read_dictionary(folder)
    assert (config["site"], config["layer"], config["target"], config["centred"]) == expected


def test_sparsify_counts_features(tmp_path):
    without = changed(tmp_path / "a", "sparsify", {"num_latents": 0})
    assert read_dictionary(without, **PLACE).config["expansion"] == 4
    other = changed(tmp_path / "b", "sparsify", {"expansion_factor": 32})  # what counts is num_latents
    assert read_dictionary(other, **PLACE).config["expansion"] == 4


def test_dictionary_learning_matryoshka(tmp_path):
    linear = read_torch(GOLDEN / "dl-batchtopk" / "ae.pt")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
    flipped = {new: np.array(linear[old].T) for old, new in names.items()}
    gone = dict.fromkeys(names)
    folder = changed(
        tmp_path,
        "dl-batchtopk",
        {"dict_class": "MatryoshkaBatchTopKSAE", "group_sizes": [16, 48]},
        **flipped,
        **gone,
        group_sizes=np.array([16, 48]),
    )
    got, expected = read_dictionary(folder), read_dictionary(GOLDEN / "dl-batchtopk")
    assert got.config == expected.config
    for key, value in expected.params.items():
        np.testing.assert_array_equal(got.params[key], value)


def test_dictionary_learning_topk_without_its_buffers(tmp_path):
    changes = {"dict_class": "AutoEncoderTopK"}
    folder = changed(tmp_path, "dl-batchtopk", changes, threshold=None, k=None)
    config, params = read_dictionary(folder)
    assert (config["activation"], config["k"], config["centred"]) == (
        "topk_relu",
        6,
        True,
    ) and "threshold" not in params


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resid_out_layer3", ("resid_post", 3)), ("mlp_out", ("mlp_out", 3)), ("blocks.3.hook_attn_out", ("attn_out", 3))],
)
def test_dictionary_learning_submodules(name, expected, tmp_path):
    folder = changed(tmp_path, "dl-batchtopk", {"submodule_name": name, "layer": 3})
    config, _ = read_dictionary(folder)
    assert (config["site"], config["layer"]) == expected


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in"])
def test_every_site_has_a_hook(site):
    assert hooks.site_of(hooks.hook_name(site, 11)) == (site, 11)


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        ("model.layers.4.input", ("resid_pre", 4)),
        ("model.layers.4.mlp.input", ("mlp_in", 4)),
        ("model.layers.4.output", ("resid_post", 4)),
        ("model.layers.4.self_attn.input", None),
        ("blocks.4.attn.hook_z", None),
        ("blocks.4.hook_mlp_in", None),  # in TransformerLens this is before the norm
        ("hook_embed", None),
    ],
)
def test_hooks(hook, expected):
    assert hooks.site_of(hook) == expected


def test_neither_torch_nor_jax_is_needed(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['jax'] = None\n"
        "from weights_convert import read_dictionary, write_dictionary\n"
        f"config, params = read_dictionary({str(GOLDEN / 'dl-batchtopk')!r})\n"
        f"write_dictionary({str(tmp_path)!r}, 'dictionary_learning', config, params)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / "ae.pt").is_file()


def test_a_transcoder_to_its_own_site_stays_one(tmp_path):
    config, params = made(**TRANSCODER | {"target": "mlp_in", "skip": True})
    write_dictionary(tmp_path, "saelens", config, params)
    assert read_dictionary(tmp_path).config == config | {"target": None}
    assert params["b_enc"].shape == (F,)
