"""Llama, Mistral, Qwen and Gemma from the folders of Hugging Face: the numbers of transformers, or a clear refusal."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bilinear_jax as bj
from bilinear_jax.nn import generation
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store.convert import convert, export
from bilinear_jax.store.published import as_dtype, taken
from weights_convert.families import FAMILIES, gated_config, read_gated

DATA = Path(__file__).parents[1] / "data" / "families"
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
PATH = Path("config.json")


def leaves(params) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(key, simple=True, separator="."): leaf for key, leaf in found}


def raw_of(name: str, **changes) -> dict:
    """The config.json of a case with other values; a key with the value ``...`` is left out."""
    raw = json.loads((DATA / name / "model" / "config.json").read_text()) | changes
    return {key: value for key, value in raw.items() if value is not ...}


def config_of(name: str, **changes) -> dict:
    return gated_config(PATH, raw_of(name, **changes))


def broken(tmp_path: Path, name: str, weights=None, **changes) -> Path:
    """A copy of a case with another config, and with other weights: None removes one."""
    folder = tmp_path / name
    shutil.copytree(DATA / name / "model", folder)
    (folder / "config.json").write_text(json.dumps(raw_of(name, **changes)))
    if weights is not None:
        state = load_file(folder / "model.safetensors") | weights
        save_file({key: value for key, value in state.items() if value is not None}, folder / "model.safetensors")
    return folder


# The numbers


@pytest.mark.parametrize("name", NAMES)
def test_every_family_computes_what_transformers_computes(name):
    expected = load_file(DATA / name / "expected.safetensors")
    lm = bj.load(DATA / name / "model")
    ids = expected["input_ids"]
    np.testing.assert_allclose(lm.logits(ids), expected["logits"], rtol=0, atol=2e-4)
    got = lm.capture(ids, ["mlp_in", "mlp_out"])
    for site in ("mlp_in", "mlp_out"):
        for layer in range(lm.config.n_layer):
            np.testing.assert_allclose(got[site][layer], expected[f"{site}.{layer}"], rtol=0, atol=2e-4)
    greedy = expected["greedy"]
    row, length = greedy[:, :8], np.array([8], np.int32)
    options = {"max_length": greedy.shape[1] - 8, "temperature": 0.0, "key": jax.random.key(0)}
    new = generation.generate(lm.config, lm.params, row, length, **options)
    np.testing.assert_array_equal(new, greedy[:, 8:])


def test_the_cases_are_of_every_family():
    assert {raw_of(name)["model_type"] for name in NAMES} == set(FAMILIES)


def test_every_weight_lands_in_its_place_bit_for_bit(tmp_path):
    stored = {}
    for path in sorted((DATA / "biases" / "model").glob("*.safetensors")):
        stored |= load_file(path)
    assert len(list((DATA / "biases" / "model").glob("*.safetensors"))) == 4
    config, params = read_gated(DATA / "biases" / "model")
    assert config["bias"] and not config["attention_bias"] and config["n_kv_head"] == 1
    names = {
        "w_e": "model.embed_tokens.weight",
        "w_u": "lm_head.weight",
        "final_gain": "model.norm.weight",
        "layers.attention.w_q": "self_attn.q_proj.weight",
        "layers.attention.w_k": "self_attn.k_proj.weight",
        "layers.attention.w_v": "self_attn.v_proj.weight",
        "layers.attention.w_o": "self_attn.o_proj.weight",
        "layers.mlp.w_l": "mlp.gate_proj.weight",
        "layers.mlp.w_r": "mlp.up_proj.weight",
        "layers.mlp.w_p": "mlp.down_proj.weight",
        "layers.mlp.b_l": "mlp.gate_proj.bias",
        "layers.mlp.b_r": "mlp.up_proj.bias",
        "layers.mlp.b_p": "mlp.down_proj.bias",
        "layers.attention_gain": "input_layernorm.weight",
        "layers.mlp_gain": "post_attention_layernorm.weight",
    }
    found = leaves(params)
    assert found.keys() == names.keys()
    for name, key in names.items():
        layers = [stored[f"model.layers.{i}.{key}"] for i in range(2)] if name.startswith("layers") else None
        expected = stored[key] if layers is None else np.stack(layers)
        assert found[name].dtype == ml_dtypes.bfloat16
        assert found[name].tobytes() == expected.tobytes(), name


def test_gains_of_gemma_are_added_in_float32(tmp_path):
    state = load_file(DATA / "gemma" / "model" / "model.safetensors")
    half = {key: value.astype(ml_dtypes.bfloat16) for key, value in state.items()}
    _, params = read_gated(broken(tmp_path, "gemma", half))
    assert params["final_gain"].dtype == np.float32 and params["w_e"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(params["final_gain"], 1 + half["model.norm.weight"].astype(np.float32))


def test_layers_stored_in_two_dtypes_become_float32(tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    state = load_file(DATA / "qwen3" / "model" / "model.safetensors")
    half = state[key].astype(np.float16)
    _, params = read_gated(broken(tmp_path, "qwen3", {key: half}))
    w_r = params["layers"]["mlp"]["w_r"]
    assert w_r.dtype == np.float32
    np.testing.assert_array_equal(w_r[1], half.astype(np.float32))
    np.testing.assert_array_equal(w_r[0], state["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_weights_are_kept_in_the_dtype_that_is_asked_for(dtype):
    expected = load_file(DATA / "qwen3" / "expected.safetensors")
    lm = bj.load(DATA / "qwen3" / "model", dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype(dtype)}
    error = np.abs(np.asarray(lm.logits(expected["input_ids"])) - expected["logits"]).max()
    assert 1e-5 < error < 5e-2


def test_a_weight_that_float16_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=re.escape("1e+05 is too large for float16: load it with dtype=bfloat16")):
        as_dtype(np.array([1.0, 1e5], np.float32), "float16")


@pytest.mark.parametrize("dtype", ["int32", "float64", "nonsense", 3])
def test_other_dtypes_of_weights_are_refused(dtype):
    with pytest.raises(ValueError, match="weights can be float32, float16, bfloat16"):
        bj.load(DATA / "qwen3" / "model", dtype=dtype)


def test_arrays_are_taken_over_without_a_copy():
    arrays = read_gated(DATA / "mistral" / "model").params
    addresses = {name: leaf.ctypes.data for name, leaf in leaves(arrays).items()}
    params = taken(arrays, "float32")
    assert arrays == {}
    for name, leaf in leaves(params).items():
        assert leaf.unsafe_buffer_pointer() == addresses[name], name


# The config


def test_both_spellings_of_the_rotary_keys_are_one():
    parameters = raw_of("llama3-rope")["rope_parameters"]
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    newer = config_of("llama3-rope")
    assert newer["rope_scaling"] == (8.0, 1.0, 4.0, 32.0) and newer["rope_theta"] == 500_000.0
    assert config_of("llama3-rope", rope_parameters=..., rope_theta=500_000, rope_scaling=scaling) == newer
    oldest = {**scaling, "type": scaling["rope_type"]}
    del oldest["rope_type"]
    assert config_of("llama3-rope", rope_parameters=None, rope_theta=500_000.0, rope_scaling=oldest) == newer
    assert config_of("llama3-rope", rope_scaling=scaling) == newer
    del scaling["original_max_position_embeddings"]
    fallback = config_of("llama3-rope", rope_parameters=..., rope_theta=500_000, rope_scaling=scaling)
    assert fallback["rope_scaling"] == (8.0, 1.0, 4.0, 64.0)  # max_position_embeddings, as transformers


def test_missing_keys_and_null_are_the_defaults_of_the_family():
    assert config_of("qwen3", head_dim=...)["d_head"] == 128
    assert config_of("gemma", head_dim=None)["d_head"] == 256
    assert config_of("llama-tied", head_dim=None)["d_head"] == 8
    assert config_of("llama-tied", num_key_value_heads=None)["n_kv_head"] == 4
    assert config_of("llama-tied", rope_parameters=None)["rope_theta"] == 10_000.0
    assert config_of("llama-tied", tie_word_embeddings=...)["tied"] is False
    assert config_of("gemma", tie_word_embeddings=...)["tied"] is True
    assert config_of("llama-tied", pad_token_id=None)["pad_id"] is None
    assert config_of("llama-tied", pad_token_id=-1)["pad_id"] is None
    assert config_of("gemma")["embed_scale"] == np.sqrt(32)
    assert config_of("gemma", hidden_act="gelu")["gate"] == "gelu_tanh"  # as the first release says
    assert config_of("llama-tied", hidden_act="gelu")["gate"] == "gelu"


def test_a_sliding_window_limits_the_context():
    assert config_of("mistral", sliding_window=16)["n_ctx"] == 16
    assert config_of("mistral", sliding_window=None)["n_ctx"] == 64
    assert config_of("mistral", sliding_window=..., max_position_embeddings=32_768)["n_ctx"] == 4096
    long = {"max_position_embeddings": 32_768, "layer_types": None}
    assert config_of("qwen2", **long)["n_ctx"] == 32_768
    assert config_of("qwen2", **long, use_sliding_window=True, sliding_window=100)["n_ctx"] == 100
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 9}
    assert config_of("qwen3", **kinds)["n_ctx"] == 9


REFUSED = {
    "another family": ({"model_type": "gpt_oss"}, "has model_type 'gpt_oss', which cannot be loaded"),
    "no family": ({"model_type": None}, "has model_type None"),
    "softcapping": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
    "biases of attention": ({"attention_bias": True}, "attention_bias True"),
    "a part is rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "interleaved": ({"rope_interleaved": True}, "rope_interleaved True"),
    "the key of another family": ({"sliding_window": 16}, "sliding_window 16"),
    "another gate": ({"hidden_act": "tanh"}, "has hidden_act 'tanh', but a gate must be one of silu"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions of type 'yarn'"),
    "linear": ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "of type 'linear'"),
    "a rope a layer": ({"rope_parameters": {"full_attention": {}}}, "of type 'default' with {'full_attention': {}}"),
    "a llama3 without": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' with factor"),
    "no theta": ({"rope_parameters": {"rope_theta": 0}}, "{'rope_theta': 0} must be numbers above 0"),
    "a theta beyond floats": ({"rope_parameters": None, "rope_theta": 10**400}, "must be numbers above 0"),
    "an epsilon that is none": ({"rms_norm_eps": float("nan")}, "{'rms_norm_eps': nan} must be numbers above 0"),
    "two thetas": ({"rope_theta": 5.0}, "contradict each other in ['rope_theta']"),
    "no size": ({"hidden_size": ...}, "lacks ['hidden_size']"),
    "half a size": ({"num_hidden_layers": 2.5}, "{'num_hidden_layers': 2.5} must be whole numbers"),
    "a size below 1": ({"num_key_value_heads": 0}, "{'num_key_value_heads': 0} must be whole numbers"),
    "an epsilon in words": ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', but must be int or float"),
    "no context": ({"max_position_embeddings": None}, "lacks max_position_embeddings"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config_of("llama-tied", **changes)
    assert "\n" not in str(caught.value)


def test_the_families_are_listed_where_another_is_refused():
    with pytest.raises(ValueError, match="can be loaded: llama, mistral, qwen2, qwen3, gemma"):
        config_of("llama-tied", model_type="mamba")
    with pytest.raises(ValueError, match=re.escape("layer_types ['sliding_attention'], but may have full_attention")):
        config_of("qwen2", layer_types=["sliding_attention"] * 2)


# The weights


def test_a_head_beside_a_tied_embedding_must_be_equal(tmp_path):
    embedding = load_file(DATA / "llama-tied" / "model" / "model.safetensors")["model.embed_tokens.weight"]
    config, params = read_gated(broken(tmp_path / "equal", "llama-tied", {"lm_head.weight": embedding}))
    assert config["tied"] and "w_u" not in params
    other = broken(tmp_path / "other", "llama-tied", {"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="says that the embedding is tied, but the files hold another lm_head"):
        read_gated(other)


def test_frequencies_that_older_files_hold_are_left_out(tmp_path):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert "w_e" in read_gated(broken(tmp_path, "llama-tied", buffer)).params


WEIGHTS = {
    "one is missing": ({"model.norm.weight": None}, {}, "not in the checkpoint: model.norm.weight"),
    "one too many": ({"model.layers.0.self_attn.o_proj.bias": np.ones(32, np.float32)}, {}, "o_proj.bias"),
    "another vocabulary": ({}, {"vocab_size": 159}, "model.embed_tokens.weight has [160, 32], expected [159, 32]"),
    "other heads": ({}, {"num_key_value_heads": 4}, "k_proj.weight has [16, 32], expected [32, 32]"),
    "a billion layers": ({}, {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, but the files hold 20"),
    "not a number": ({"model.norm.weight": np.full(32, np.nan, np.float32)}, {}, "32 values that are not finite"),
    "integers": ({"model.norm.weight": np.ones(32, np.int32)}, {}, "is stored as I32"),
}


@pytest.mark.parametrize(("weights", "changes", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit_are_refused(tmp_path, weights, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_gated(broken(tmp_path, "llama-tied", weights, **changes))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    folder = broken(tmp_path, "biases")
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("lacks shards that are in model.safetensors.index.json: [")):
        read_gated(folder)


# Beside the weights


def test_a_tokenizer_larger_than_the_vocabulary_is_an_error_when_it_is_used(tmp_path):
    folder = broken(tmp_path, "llama-tied")
    shutil.copy(Path(bj.__file__).parent / "pretrained" / "ts-nano" / "tokenizer.json", folder)
    lm = bj.load(folder)
    with pytest.raises(ValueError, match=r"has \d+ token ids, but the vocabulary of the model only 160"):
        lm.encode("Once upon a time")


def test_the_summary_says_family_file_and_hash(tmp_path):
    folder = DATA / "gemma" / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert f"family gemma; weights model.safetensors, SHA-256 {digest}" in bj.load(folder).summary().splitlines()
    assert "weights in 4 files, SHA-256 of the list" in bj.load(DATA / "biases" / "model").summary()


@pytest.mark.parametrize("name", ["llama3-rope", "biases"])
def test_convert_writes_a_checkpoint_that_loads_back_equal(tmp_path, name):
    source = DATA / name / "model"
    convert(source, tmp_path / "own")
    before, after = bj.load(source), bj.load(tmp_path / "own")
    assert after.config == before.config and isinstance(after.config, TransformerConfig)
    found = leaves(after.params)
    for key, leaf in leaves(before.params).items():
        np.testing.assert_array_equal(found[key], leaf)
    half = bj.load(tmp_path / "own", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    line = next(line for line in before.summary().splitlines() if line.startswith("family"))
    assert line in after.summary().splitlines()  # of the files that it was converted from


def test_a_family_cannot_be_exported_to_the_published_layout(tmp_path):
    with pytest.raises(ValueError, match="the published layout cannot"):
        export(DATA / "mistral" / "model", tmp_path / "out")
    assert not list(tmp_path.iterdir())
