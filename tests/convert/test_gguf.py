"""GGUF files: every quantisation, every architecture, the order of rows, the tokenizer; and files that lie."""

import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import made_gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import bilinear_jax as bj
import weights_convert
from bilinear_jax.store.convert import convert
from bilinear_jax.store.gguf_tokenizer import gguf_tokenizer
from bilinear_jax.store.tokenizers import load_tokenizer, train_tokenizer
from weights_convert.families import filled, gated_shapes, read_gated
from weights_convert.gguf import NAMES, read_gguf, rope_factors
from weights_convert.gguf_file import GGUFFile

DATA = Path(__file__).parents[1] / "data"
FAMILIES = DATA / "families"
Kind = gguf.GGMLQuantizationType

CONFIG = {
    **{"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_head": 64, "d_model": 256, "d_hidden": 256, "n_ctx": 32},
    **{"n_vocab": 40, "gate": "silu", "bias": False, "attention_bias": False, "qk_norm": False, "tied": True},
    **{"rope_scaling": None, "rope_theta": 10_000.0, "rms_eps": 1e-5, "family": "llama"},
}
"""A tiny Llama whose rows are as long as the longest block of all quantisations, 256."""


def random_params(config: dict, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def fill(name, key, out):
        out[...] = rng.normal(size=out.shape)

    return filled(config, NAMES, lambda name, key: "float32", fill)


def leaves(params) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(key, simple=True, separator="."): leaf for key, leaf in found}


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


# Headers that lie


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def begin(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def info(shape=(4,), kind: int = 0, place: int = 0, name: str = "a", axes: int | None = None) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape) if axes is None else axes, *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, place)


LIES = {
    "empty": (b"", "it does not begin with GGUF"),
    "another file": (b"PK\3\4" + bytes(40), "it does not begin with GGUF"),
    "nothing more": (b"GGUF", "its header ends too early"),
    "version 1": (begin(version=1), "of version 1"),
    "big-endian": (begin(version=3 << 24), "big-endian"),
    "2^60 keys": (begin(keys=2**60), "1152921504606846976 keys, but 0 bytes are left"),
    "2^60 tensors": (begin(tensors=2**60), "1152921504606846976 tensors, but 0 bytes are left"),
    "a key of 2^62 bytes": (
        begin(keys=1) + struct.pack("<Q", 2**62) + bytes(20),
        "4611686018427387904 bytes of a string",
    ),
    "2^61 strings": (begin(keys=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**61), "2305843009213693952 strings"),
    "2^61 numbers": (begin(keys=1) + text("k") + struct.pack("<IIQ", 9, 6, 2**61), "2305843009213693952 numbers"),
    "an array of arrays": (begin(keys=1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "array of the unknown type 9"),
    "an unknown type": (begin(keys=1) + text("k") + struct.pack("<IQ", 77, 0), "k has the unknown type 77"),
    "no UTF-8": (begin(keys=1) + struct.pack("<Q", 1) + b"\xff" + bytes(20), "is not UTF-8"),
    "2^31 axes": (begin(tensors=1) + info(axes=2**31), "a has 2147483648 axes"),
    "2^62 numbers in a tensor": (begin(tensors=1) + info((2**31, 2**31)) + bytes(99), "a should end at byte"),
    "a shape beyond 64 bits": (begin(tensors=1) + info((2**63, 2**63, 2**63)) + bytes(99), "a should end at byte"),
    "no numbers": (begin(tensors=1) + info((0, 4)) + bytes(99), "a has the shape [4, 0]"),
    "half a block": (
        begin(tensors=1) + info((33,), kind=8) + bytes(99),
        "a has the shape [33], stored in blocks of 32",
    ),
    "an unknown quantisation": (begin(tensors=1) + info(kind=999) + bytes(99), "stores a as 999"),
    "integers": (begin(tensors=1) + info(kind=26) + bytes(99), "stores a as I32"),
    "a place beyond the end": (begin(tensors=1) + info(place=2**63) + bytes(99), "a should end at byte"),
    "one place for all": (
        begin(tensors=40) + b"".join(info((16,), name=f"{i}") for i in range(40)) + bytes(96),
        "its tensors should have 2560 bytes",
    ),
    "a key that is there twice": (
        begin(keys=2) + (text("k") + struct.pack("<IB", 0, 1)) * 2,
        "the name k is there twice",
    ),
    "a tensor that is there twice": (begin(tensors=2) + info() * 2 + bytes(99), "the name a is there twice"),
    "a name of two lines": (begin(tensors=1) + info(name="a\nb") + bytes(99), r"'a\nb' is not a name"),
    "a name of a megabyte": (begin(tensors=1) + info(name="a" * 2**20) + bytes(99), "aaa is not a name"),
    "an odd alignment": (
        begin(keys=1) + text("general.alignment") + struct.pack("<II", 4, 24),
        "general.alignment is 24, which is not a power of two",
    ),
    "an alignment of 0": (begin(keys=1) + text("general.alignment") + struct.pack("<II", 4, 0), "alignment is 0"),
}


@pytest.mark.parametrize(("content", "message"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_one_line(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        bj.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_header_that_lies_takes_no_memory(tmp_path):
    """In a process that may take half a gigabyte more than it has, none of the lies raises a MemoryError."""
    for number, (content, _) in enumerate(LIES.values()):
        (tmp_path / f"{number}.gguf").write_bytes(content)
    code = f"""
import resource
from pathlib import Path
import gguf
from weights_convert.gguf import read_gguf
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29,) * 2)
for path in Path({str(tmp_path)!r}).iterdir():
    try:
        read_gguf(path)
    except ValueError as error:
        print(error)
    else:
        raise SystemExit(f"{{path}} was read")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(LIES)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    config = CONFIG | {"d_model": 32, "d_hidden": 32, "d_head": 8}
    folder = tmp_path_factory.mktemp("small")
    tokenizer = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
    path = made_gguf.write(folder / "m.gguf", config, random_params(config), kind=Kind.Q4_0, metadata=tokenizer)
    return path.read_bytes()


def test_a_file_that_is_cut_short_anywhere_is_one_line(tmp_path, small):
    path = tmp_path / "m.gguf"
    for end in [*range(0, 2600, 13), *range(2600, len(small) - 32, 997), len(small) - 33]:
        path.write_bytes(small[:end])
        with pytest.raises(ValueError, match=r"cut short or damaged|does not begin with GGUF") as caught:
            read_gguf(path)
        assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_damaged_header_is_read_or_one_line(tmp_path_factory, small, data):
    content = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 2600))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(bytes(content))
    try:
        read_gguf(path)
    except ValueError as error:
        assert "\n" not in str(error)


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch, small):
    (tmp_path / "m.gguf").write_bytes(small)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'bilinear-jax[gguf]'")):
        bj.load(tmp_path / "m.gguf")


# The tokenizer


def byte_level(path: Path, tokenizer, **metadata) -> Path:
    """A file with the tokens and merges of a ``tokenizers.Tokenizer`` only."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda pair: pair[1])]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    for key, value in metadata.items():
        {bool: writer.add_bool, str: writer.add_string, list: writer.add_array}[type(value)](
            f"tokenizer.ggml.{key}", value
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def trained():
    texts = ["Once upon a time there was 12345 a naïve café.", "It's the tokens' text, isn't it?\n\n  def f(x): return"]
    return train_tokenizer(texts * 20, 280)


SENTENCES = ["Once upon a time", "12345 naïve cafés 🙂", "It's\n\n  a\ttest, ISN'T it?", "", " ", "x<|endoftext|>y"]


def test_a_byte_level_tokenizer_gives_the_same_ids(tmp_path, trained):
    tokenizer, special = gguf_tokenizer(byte_level(tmp_path / "m.gguf", trained, pre="gpt-2", add_bos_token=True))
    assert special == {"bos_token": "<|endoftext|>"}
    for sentence in SENTENCES:
        ids = trained.encode(sentence).ids
        assert tokenizer.encode(sentence).ids == ids
        assert tokenizer.decode(ids) == trained.decode(ids)
    without, _ = gguf_tokenizer(byte_level(tmp_path / "w.gguf", trained, pre="gpt-2"))
    assert without.encode("a").ids == trained.encode("a").ids[1:]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    {
        "gpt-2": ["It", "'s", " 12345", " cafe", "\u0301", "\u2460", "!?", "\n\n  ", " A"],
        "smollm": ["It", "'s", " ", *"12345", " cafe", "\u0301", "\u2460", "!?", "\n\n  ", " A"],
        "llama-bpe": ["It", "'s", " ", "123", "45", " cafe", "\u0301", "\u2460", "!?\n\n", "  ", " A"],
        "qwen2": ["It", "'s", " ", *"12345", " caf\u00e9", "\u2460", "!?\n\n", "  ", " A"],
        "default": ["It", "'", "s", " ", "123", "45", " cafe", "\u0301", "\u2460", "!?", "\n\n  ", " A"],
    }.items(),
)
def test_the_rules_cut_a_text_as_they_say(tmp_path, trained, pre, pieces):
    tokenizer, _ = gguf_tokenizer(byte_level(tmp_path / "m.gguf", trained, pre=pre))
    text = "It's 12345 cafe\u0301\u2460!?\n\n   A"
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    cut = [text[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces


def test_sentencepiece_gives_the_same_ids(tmp_path):
    made = json.loads((DATA / "sentencepiece.json").read_text())
    for name, model in made.items():
        path = sentencepiece(tmp_path / f"{name}.gguf", model)
        tokenizer, special = gguf_tokenizer(path)
        assert special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        for sentence, ids in model["encoded"]:
            assert tokenizer.encode(sentence).ids == [1, *ids]
            assert tokenizer.decode([1, *ids]) == sentence
    assert made["prefix"]["encoded"][0] != made["plain"]["encoded"][0]


def sentencepiece(path: Path, model: dict) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(model["tokens"])
    writer.add_token_scores(model["scores"])
    writer.add_token_types(model["token_type"])
    writer.add_add_space_prefix(model["add_space_prefix"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TOKENIZERS = {
    "another model": ({"model": "t5"}, "a tokenizer of the kind 't5'"),
    "another rule": ({"pre": "tekken"}, "the rule 'tekken' to cut a text, but must have one of default, gpt-2"),
    "a merge of three": ({"merges": ["a b c"]}, "the merge 'a b c', which is not of two tokens"),
    "a merge of nothing": ({"merges": ["nothing here"]}, "is damaged"),
    "tokens twice": ({"tokens": ["a", "a"]}, "2 tokens, of which 1 differ"),
    "few kinds": ({"token_type": [1, 1]}, "and 2 kinds of tokens"),
    "a number": ({"add_bos_token": "yes"}, "add_bos_token is 'yes', but must be bool"),
}


@pytest.mark.parametrize(("changes", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read_says_why(tmp_path, trained, changes, message):
    path = byte_level(tmp_path / "m.gguf", trained, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_tokenizer(str(path), None)


def with_tokenizer(path: Path, config: dict, params: dict, model: dict, tokens: int | None = None) -> Path:
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1}
    metadata |= {f"tokenizer.ggml.{key}": model[key][:tokens] for key in ("tokens", "scores", "token_type")}
    return made_gguf.write(path, config, params, metadata=metadata)


def test_a_file_is_a_whole_model_and_converts_to_a_checkpoint(tmp_path):
    model = json.loads((DATA / "sentencepiece.json").read_text())["prefix"]
    config, params = read_gated(FAMILIES / "llama-tied" / "model")
    config |= {"n_vocab": 500}
    params["w_e"] = np.random.default_rng(0).normal(size=(500, 32)).astype(np.float32)
    lm = bj.load(with_tokenizer(tmp_path / "m.gguf", config, params, model))
    assert lm.encode("The capital of France is Paris.").tolist() == [[1, *model["encoded"][0][1]]]
    convert(tmp_path / "m.gguf", tmp_path / "own")
    own = bj.load(tmp_path / "own")
    assert own.config == lm.config
    for sentence, _ in model["encoded"]:
        assert own.encode(sentence).tolist() == lm.encode(sentence).tolist()
    for key, leaf in leaves(lm.params).items():
        np.testing.assert_array_equal(leaves(own.params)[key], leaf)


def test_a_tokenizer_json_beside_the_file_is_used_first(tmp_path, small, trained):
    (tmp_path / "m.gguf").write_bytes(small)
    assert bj.load(tmp_path / "m.gguf").tokenizer_source == str(tmp_path / "m.gguf")
    trained.save(str(tmp_path / "tokenizer.json"))
    assert bj.load(tmp_path / "m.gguf").tokenizer_source == str(tmp_path)


def test_a_tokenizer_larger_than_the_vocabulary_is_an_error_when_it_is_used(tmp_path):
    model = json.loads((DATA / "sentencepiece.json").read_text())["prefix"]
    config, params = read_gated(FAMILIES / "llama-tied" / "model")
    lm = bj.load(with_tokenizer(tmp_path / "m.gguf", config, params, model, tokens=300))
    with pytest.raises(ValueError, match="has 300 token ids, but the vocabulary of the model only 160"):
        lm.encode("a")


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
