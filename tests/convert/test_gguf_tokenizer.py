"""The tokenizer in a GGUF file: byte-level and SentencePiece, the rules that cut a text, and a model with one."""

import json
import re
from pathlib import Path

import gguf
import made_gguf
import numpy as np
import pytest

import bilinear_jax as bj
from bilinear_jax.store.convert import convert
from bilinear_jax.store.gguf_tokenizer import gguf_tokenizer
from bilinear_jax.store.tokenizers import load_tokenizer, train_tokenizer
from weights_convert.families import read_gated

DATA = Path(__file__).parents[1] / "data"
FAMILIES = DATA / "families"


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
    for key, leaf in made_gguf.leaves(lm.params).items():
        np.testing.assert_array_equal(made_gguf.leaves(own.params)[key], leaf)


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
