"""GGUF files: every quantisation, every architecture, the order of rows, the tokenizer; and files that lie."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import made_gguf
import numpy as np
import pytest
from made_gguf import CONFIG, leaves, random_params
from safetensors.numpy import load_file

import bilinear_jax as bj
import weights_convert
from weights_convert.families import gated_shapes, read_gated
from weights_convert.gguf import read_gguf, rope_factors
from weights_convert.gguf_file import GGUFFile

DATA = Path(__file__).parents[1] / "data"
FAMILIES = DATA / "families"
Kind = gguf.GGMLQuantizationType


def decodes(kind: Kind) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def encodes(kind: Kind) -> bool:
    try:
        gguf.quants.quantize(np.zeros((1, 256), np.float32), kind)
    except NotImplementedError:
        return False
    return True


DECODED = [kind for kind in gguf.GGML_QUANT_SIZES if decodes(kind)]


def test_these_are_all_that_the_package_decodes():
    names = {kind.name for kind in DECODED}
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS"} <= names
    assert len(names) >= 20


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_every_quantisation_is_read_as_the_package_decodes_it(tmp_path, kind):
    """What the package cannot write is filled with random bytes below 64, of which every half float is finite."""
    rng = np.random.default_rng(1)
    block, size = gguf.GGML_QUANT_SIZES[kind]

    def packed(matrix):
        return rng.integers(0, 64, (len(matrix), matrix.shape[1] // block * size), np.uint8)

    params = random_params(CONFIG)
    path = made_gguf.write(tmp_path / "m.gguf", CONFIG, params, kind=kind, packed=None if encodes(kind) else packed)
    config, got = read_gguf(path)
    assert {key: config[key] for key in CONFIG} == CONFIG
    plain = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }
    assert got["w_e"].dtype.name == {"F16": "float16", "BF16": "bfloat16"}.get(kind.name, "float32")
    np.testing.assert_array_equal(got["w_e"].astype(np.float32), plain["token_embd.weight"])
    for i in range(2):
        attention, mlp = got["layers"]["attention"], got["layers"]["mlp"]
        for name, key, heads in (("w_q", "attn_q", 4), ("w_k", "attn_k", 2)):
            turned = made_gguf.interleaved(attention[name][i].astype(np.float32), heads)
            np.testing.assert_array_equal(turned, plain[f"blk.{i}.{key}.weight"])
        np.testing.assert_array_equal(mlp["w_p"][i].astype(np.float32), plain[f"blk.{i}.ffn_down.weight"])
        np.testing.assert_array_equal(attention["w_o"][i].astype(np.float32), plain[f"blk.{i}.attn_output.weight"])
    if encodes(kind):
        original = params["layers"]["mlp"]["w_p"]
        error = np.abs(got["layers"]["mlp"]["w_p"].astype(np.float32) - original).mean()
        assert error < 0.7 and (error == 0) == (kind.name == "F32")


def test_a_tensor_of_many_pieces_is_read_in_order(tmp_path):
    """With more numbers than are decoded at once, and a rest that fills no row of them."""
    config = CONFIG | {"n_vocab": 4_099, "n_layer": 1, "d_model": 288, "d_hidden": 32}
    params = random_params(config, seed=2)
    path = made_gguf.write(tmp_path / "m.gguf", config, params, kind=Kind.Q8_0)
    whole = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    np.testing.assert_array_equal(read_gguf(path).params["w_e"], gguf.quants.dequantize(whole.data, whole.tensor_type))


def test_layers_stored_in_several_ways_become_float32(tmp_path):
    params = random_params(CONFIG)
    path = made_gguf.write(tmp_path / "m.gguf", CONFIG, params, kind=Kind.F16)
    mixed = made_gguf.write(tmp_path / "q.gguf", CONFIG, params, kind=Kind.Q8_0)
    assert read_gguf(path).params["w_e"].dtype == np.float16
    assert read_gguf(mixed).params["layers"]["mlp"]["w_l"].dtype == np.float32
    assert read_gguf(mixed).params["final_gain"].dtype == np.float32


# Every architecture, against the folder that it was made from


@pytest.mark.parametrize("name", ["llama-tied", "llama3-rope", "mistral", "qwen2", "qwen3", "gemma"])
def test_every_architecture_gives_what_its_folder_gives(tmp_path, name):
    config, params = read_gated(FAMILIES / name / "model")
    metadata = {"tokenizer.ggml.padding_token_id": 0}
    got, found = read_gguf(made_gguf.write(tmp_path / "m.gguf", config, params, metadata=metadata))
    assert got == config | {"family": "llama" if name == "mistral" else config["family"]}
    found, expected = leaves(found), leaves(params)
    assert found.keys() == expected.keys() == gated_shapes(config).keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


def test_the_logits_from_a_file_are_those_of_transformers(tmp_path):
    """And not if the rows of q and k are in another order, so a wrong order cannot pass."""
    config, params = read_gated(FAMILIES / "llama3-rope" / "model")
    expected = load_file(FAMILIES / "llama3-rope" / "expected.safetensors")
    path = made_gguf.write(tmp_path / "m.gguf", config, params)
    logits = bj.load(path).logits(expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-4)
    wrong = made_gguf.write(tmp_path / "w.gguf", config, params, turn=lambda weight, heads: weight)
    assert np.abs(np.asarray(bj.load(wrong).logits(expected["input_ids"])) - expected["logits"]).max() > 0.01


def test_the_order_of_rows_is_that_of_the_file_format():
    rows = np.arange(8.0)[:, None]  # two heads of width 4: halves (0, 1) and (2, 3) become pairs (0, 2) and (1, 3)
    assert made_gguf.interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rope_factors_are_those_of_the_formula():
    factors = rope_factors(8, 500_000.0, (8.0, 1.0, 4.0, 32.0))
    turns = 32 * 500_000.0 ** -(np.arange(4) / 4) / (2 * np.pi)
    assert turns[0] > 4 and factors[0] == 1 and turns[1] < 1 and (factors[1:] == 8).all()
    between = rope_factors(2, 10_000.0, (8.0, 1.0, 4.0, 2 * np.pi * 2.5))  # half way between 1 and 4 turns
    np.testing.assert_allclose(between, [1 / (0.5 / 8 + 0.5)])


def test_a_rope_scaling_other_than_that_of_llama_3_is_refused(tmp_path):
    config, params = read_gated(FAMILIES / "llama3-rope" / "model")

    def change(tensors):
        tensors["rope_freqs.weight"] = np.array([1, 2, 3, 4], np.float32)

    with pytest.raises(ValueError, match="is not the rope scaling of Llama 3"):
        read_gguf(made_gguf.write(tmp_path / "m.gguf", config, params, change=change))
    path = made_gguf.write(tmp_path / "l.gguf", config, params, metadata={"llama.rope.scaling.type": "linear"})
    with pytest.raises(ValueError, match=re.escape("not understood: llama.rope.scaling.type 'linear'")):
        read_gguf(path)


def test_factors_of_one_are_no_scaling(tmp_path):
    config, params = read_gated(FAMILIES / "llama-tied" / "model")

    def change(tensors):
        tensors["rope_freqs.weight"] = np.ones(4, np.float32)

    assert read_gguf(made_gguf.write(tmp_path / "m.gguf", config, params, change=change)).config["rope_scaling"] is None


# Metadata and tensors that do not fit


METADATA = {
    "another architecture": ({"general.architecture": "mamba"}, "has the architecture 'mamba'"),
    "softcapping": ({"llama.attn_logit_softcapping": 50.0}, "not understood: llama.attn_logit_softcapping 50.0"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count 8"),
    "not causal": ({"llama.attention.causal": False}, "llama.attention.causal False"),
    "a part of a model": ({"split.count": 3}, "is one of 3 parts of a model"),
    "no layers": ({"llama.block_count": ...}, "lacks llama.block_count"),
    "heads a layer": ({"llama.attention.head_count": [4, 4]}, "{'attention.head_count': [4, 4]} must be whole numbers"),
    "many layers": ({"llama.block_count": 4_000_000_000}, "block_count 4000000000, but only 20 tensors"),
    "another vocabulary": ({"llama.vocab_size": 161}, "{'llama.vocab_size': 161}, but its other sizes give"),
    "a part is rotated": ({"llama.rope.dimension_count": 4}, "{'llama.rope.dimension_count': 4}, but its other sizes"),
    "other heads": ({"llama.attention.head_count_kv": 4}, "blk.0.attn_k.weight has [16, 32], expected [32, 32]"),
    "an infinite base": ({"llama.rope.freq_base": float("inf")}, "freq_base is inf, but must be above 0"),
    "an epsilon below 0": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0, but must be above 0"),
}


@pytest.mark.parametrize(("metadata", "message"), METADATA.values(), ids=METADATA)
def test_metadata_that_are_not_understood_are_refused_by_name(tmp_path, metadata, message):
    config, params = read_gated(FAMILIES / "llama-tied" / "model")
    path = made_gguf.write(tmp_path / "m.gguf", config, params, metadata=metadata)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        bj.load(path)
    assert "\n" not in str(caught.value)


TENSORS = {
    "one is missing": (lambda tensors: tensors.pop("blk.1.ffn_up.weight"), "Missing: blk.1.ffn_up.weight"),
    "no embedding": (lambda tensors: tensors.pop("token_embd.weight"), "lacks token_embd.weight"),
    "one too many": (
        lambda tensors: tensors.update({"blk.0.attn_q.bias": np.ones(32, np.float32)}),
        "not understood: blk.0.attn_q.bias",
    ),
    "another shape": (
        lambda tensors: tensors.update({"output_norm.weight": np.ones(31, np.float32)}),
        "output_norm.weight has [31], expected [32]",
    ),
    "not a number": (
        lambda tensors: tensors.update({"output_norm.weight": np.full(32, np.inf, np.float32)}),
        "output_norm.weight in",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    config, params = read_gated(FAMILIES / "llama-tied" / "model")
    path = made_gguf.write(tmp_path / "m.gguf", config, params, change=change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        bj.load(path)
    assert "\n" not in str(caught.value)


# Where a file is


def test_a_folder_with_one_file_is_that_file_and_several_are_listed(tmp_path, small):
    (tmp_path / "b.gguf").write_bytes(small)
    assert bj.load(tmp_path).config == bj.load(tmp_path / "b.gguf").config
    (tmp_path / "a.gguf").write_bytes(small)
    with pytest.raises(ValueError, match=re.escape("holds 2 GGUF files: a.gguf, b.gguf. Name the file, as in")):
        bj.load(tmp_path)
    shutil.copytree(FAMILIES / "gemma" / "model", tmp_path, dirs_exist_ok=True)
    assert bj.load(tmp_path).config.family == "gemma"  # a folder with weights of its own is that model


def test_the_summary_says_family_file_and_hash(tmp_path, small):
    (tmp_path / "m.gguf").write_bytes(small)
    line = f"family llama; weights m.gguf, SHA-256 {hashlib.sha256(small).hexdigest()}"
    assert line in bj.load(tmp_path / "m.gguf").summary().splitlines()


def test_needs_neither_torch_nor_jax(tmp_path, small):
    (tmp_path / "m.gguf").write_bytes(small)
    code = (
        f"import sys, weights_convert as w; w.read_gguf({str(tmp_path / 'm.gguf')!r}); "
        f"w.read_gated({str(FAMILIES / 'gemma' / 'model')!r}); "
        "assert not {'torch', 'jax', 'bilinear_jax'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_alignment_in_the_metadata_counts(tmp_path):
    config, params = read_gated(FAMILIES / "llama-tied" / "model")
    path = tmp_path / "m.gguf"
    made_gguf.write(path, config, params, alignment=128)
    file = GGUFFile(path)
    assert all(tensor.place % 128 == 0 for tensor in file.tensors.values())
    np.testing.assert_array_equal(weights_convert.read_gguf(path).params["w_e"], params["w_e"])
