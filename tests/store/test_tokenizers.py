"""The tokenizers of the published models, offline: where texts begin, what is padded with, and that texts come back.

mistral's are the 32,000 pieces that the package mistral-common carries; ts-4096 is a small WordPiece by its recipe,
which has no decoder. Then what files hold that people or other tools changed.
"""

import hashlib
import json
import struct
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import published
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.show.text import pieces
from bilinear_jax.store.tokenizers import (
    load_tokenizer,
    missing_decoder,
    prompt_ids,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from bilinear_jax.store.tokens import tokenize

TEXTS = (
    "Once upon a time, there was a cat.",
    "  two  spaces\nand a line",
    "naïve café №7, 東京 \N{SLIGHTLY SMILING FACE}",
)


def sentencepieces() -> list[tuple[str, float]]:
    """The pieces of a sentencepiece file and their scores: protobuf fields 1, each with a text and a float."""
    spec = find_spec("mistral_common")
    assert spec is not None and spec.origin is not None
    data = (Path(spec.origin).parent / "data" / "tokenizer.model.v1").read_bytes()
    found, at = [], 0

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                return value, at

    while at < len(data) and data[at] == 0x0A:
        length, at = varint(at + 1)
        end = at + length
        size, at = varint(at + 1)
        found.append((data[at : at + size].decode(), struct.unpack("<f", data[at + size + 1 : at + size + 5])[0]))
        at = end
    return found


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    """A folder with its tokenizer.json, but for what puts <s> first: as one built from the sentencepiece file."""
    scores = dict(sentencepieces())
    ids = {piece: number for number, piece in enumerate(scores)}
    merges = sorted(
        (-scores[piece], cut, (piece[:cut], piece[cut:]))
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    )
    merges = [pair for _, _, pair in merges]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path_factory.mktemp("mistral")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def word_pieces(folder: Path) -> Path:
    """ts-4096 in small: NFD, no accents, lower case, single digits, [BOS] first, no [EOS], and no decoder."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'"
    words = ["[UNK]", "[BOS]", "[EOS]", *letters, *(f"##{letter}" for letter in letters), "once", "cat", "##fe"]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    tokenizer.add_special_tokens(["[UNK]", "[BOS]", "[EOS]"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_mistral_begins_pads_and_comes_back(mistral):
    with pytest.warns(UserWarning, match="did not put <s> first, unlike mistral"):
        tokenizer = load_tokenizer(str(mistral), "mistral")
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (32_000, 1, 2, 2)
    ids = tokenizer("Hello world\n")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁Hello", "▁world", "<0x0A>"]
    assert ids == [1, 22557, 1526, 13]
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1 and 1 not in ids[1:] and 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    batch = tokenizer(["cat", TEXTS[0]], padding=True)["input_ids"]
    assert batch[0][-1] == 2 and batch[0][0] == 1


def test_ts_4096_begins_pads_and_joins_its_pieces(tmp_path):
    tokenizer = load_tokenizer(str(word_pieces(tmp_path)), "ts-4096")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    ids = tokenizer("Once, a CAFÉ! 12")["input_ids"]
    words = ["[BOS]", "once", ",", "a", "c", "##a", "##fe", "!", "1", "2"]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(ids) == "once , a c ##a ##fe ! 1 2"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "once, a cafe! 1 2"
    assert "".join(pieces(tokenizer, ids)) == "[BOS] once, a cafe! 1 2"
    assert tokenizer(["a", "once a cat"], padding=True)["input_ids"][0][2:] == [2, 2]


def test_gpt2_begins_with_nothing(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path), "gpt2")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (256, 256, 256)
    for text in TEXTS:
        ids = loaded(text)["input_ids"]
        assert len(ids) == len(text.encode()) and loaded.decode(ids) == text


@pytest.mark.filterwarnings("ignore:this tokenizer did not put")
@pytest.mark.parametrize("name", ["mistral", "ts-4096"])
def test_every_way_to_tokens_begins_once(tmp_path, mistral, name):
    """``encode``, a prompt, and the training data; a sequence without its <s> has another loss."""
    folder = mistral if name == "mistral" else word_pieces(tmp_path / "words")
    config = TransformerConfig(1, 1, 4, 4, 16, 32_000 if name == "mistral" else 99, tokenizer=name)
    lm = LanguageModel(published.make_params(config), config, tokenizer_source=str(folder))
    ids = lm.tokenizer("once a cat")["input_ids"]
    assert ids.count(1) == 1 and ids[0] == 1
    np.testing.assert_array_equal(lm.encode("once a cat"), [ids])
    (tmp_path / "text.txt").write_text("once a cat<|endoftext|>once a cat")
    stream = tokenize([tmp_path / "text.txt"], lm.tokenizer, tmp_path / "tokens").tokens
    assert stream.tolist() == ids * 2
    text = lm.generate("once a cat", max_length=2)
    assert isinstance(text, str) and text.startswith("once a cat") and "##" not in text


def test_a_folder_with_a_sentencepiece_file_alone_says_what_to_do(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"has no tokenizer\.json: put one there, made from its tokenizer\.model"
    ):
        load_tokenizer(str(tmp_path), "mistral")
    published.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[UNK]"}))
    assert load_tokenizer(str(tmp_path), "ts-4096").pad_token == "[EOS]"


def test_an_added_decoder_is_no_part_of_the_tokenizer(tmp_path):
    """What was tokenised before has the hash of the file, and the file is saved as it was."""
    folder = word_pieces(tmp_path / "words")
    definition = json.loads((folder / "tokenizer.json").read_text())
    tokenizer = load_tokenizer(str(folder), None)
    assert tokenizer_hash(tokenizer) == hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
    (tmp_path / "saved").mkdir()
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text()) == definition
    bert = Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    bert.decoder = decoders.WordPiece()
    definition = json.loads(bert.to_str())
    assert definition["decoder"] is not None
    assert tokenizer_hash(bert) == hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    ("tokens", "options", "before", "text"),
    [
        (["Ġa", "Ã", "©"], {}, pre_tokenizers.ByteLevel(), " aé"),
        (["▁a", "b"], {}, pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace()]), "ab"),
        (["a", "@@b"], {"continuing_subword_prefix": "@@"}, pre_tokenizers.Whitespace(), "ab"),
        (["a", "b</w>", "a</w>"], {"end_of_word_suffix": "</w>"}, None, "ab a"),
        (["a", "b"], {}, pre_tokenizers.Whitespace(), "a b"),
    ],
)
def test_tokens_say_which_decoder_they_lack(tmp_path, tokens, options, before, text):
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [], **options))
    tokenizer.pre_tokenizer = before
    ids = list(range(len(tokens)))
    assert "".join(pieces(tokenizer, ids)) == text
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path), None)
    assert loaded.decode(ids) == "".join(pieces(loaded, ids)) == text
    assert missing_decoder(loaded.backend_tokenizer) is None


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A tokenizer that ends every text with [EOS], and a model that always draws the token "cat"."""
    folder = word_pieces(tmp_path_factory.mktemp("ends"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [("[BOS]", 1), ("[EOS]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = TransformerConfig(1, 1, 4, 4, 16, 99, tokenizer="ts-4096")
    return LanguageModel(published.make_params(config), config, tokenizer_source=str(folder))


class TestTokensAfterEveryText:
    def test_they_are_kept_with_one_warning(self, ending):
        for read in (lambda: ending.encode("a cat")[0].tolist(), lambda: ending.generate(["a cat", "once"], 2)):
            with pytest.warns(UserWarning, match=r"puts '\[EOS\]' after every text.*keep_end=False") as told:
                found = read()
            assert len(told) == 1
            if found[0] == 1:
                cat = ending.tokenizer.convert_tokens_to_ids("cat")
                assert found == [1, ending.tokenizer.convert_tokens_to_ids("a"), cat, 2]

    @pytest.mark.parametrize(("keep_end", "end"), [(True, [2]), (False, [])])
    def test_they_are_kept_or_left_out_on_request(self, ending, keep_end, end):
        words = ending.tokenizer.convert_tokens_to_ids(["a", "cat"])
        assert ending.encode("a cat", keep_end=keep_end)[0].tolist() == [1, *words, *end]
        assert ending.encode("a cat[EOS]", keep_end=keep_end)[0].tolist() == [
            1,
            *words,
            2,
            *end,
        ]  # the user's own stays
        assert prompt_ids(ending.tokenizer, ["", "a cat"], keep_end) == [[1, *end], [1, *words, *end]]

    def test_generation_goes_on_from_the_prompt(self, ending):
        """As with token ids, without the end."""
        from bilinear_jax.nn.generation import generate

        ids = np.array([[1, *ending.tokenizer.convert_tokens_to_ids(["a", "cat"])]])
        new = np.asarray(generate(ending.config, ending.params, ids, np.array([3]), max_length=4, temperature=0))[0]
        text = ending.tokenizer.decode([*ids[0].tolist(), *new.tolist()], skip_special_tokens=True)
        assert ending.generate("a cat", 4, temperature=0, keep_end=False) == text

    def test_a_tokenizer_that_adds_none_is_quiet(self, tmp_path):
        tokenizer = load_tokenizer(str(word_pieces(tmp_path)), "ts-4096")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert prompt_ids(tokenizer, ["a"])[0] == prompt_ids(tokenizer, ["a"], keep_end=False)[0]


class TestChangedFiles:
    def test_a_special_token_outside_the_vocabulary_is_left_out(self, tmp_path):
        """transformers would add it, with an id that the model does not have."""
        published.write_tokenizer(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({"bos_token": "[BOS]", "eos_token": {"content": "</s>"}, "pad_token": "[PAD]"}))
        with pytest.warns(UserWarning) as told:
            tokenizer = load_tokenizer(str(tmp_path), None)
        assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.pad_token) == (5, 1, None, None)
        for one, name in zip(told, ("'</s>' as its eos_token", "'[PAD]' as its pad_token"), strict=True):
            assert f"{path} names {name}, but tokenizer.json has no such token" in str(one.message)
        text = tmp_path / "text.txt"
        text.write_text("hello world")
        assert tokenize(text, tokenizer, tmp_path / "tokens").n_vocab == 5  # so the model can be trained on it

    def test_a_special_token_of_another_type_is_told(self, tmp_path):
        published.write_tokenizer(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"pad_token": 3}')
        with pytest.raises(ValueError, match=r"tokenizer_config.json: pad_token is 3, but must be a token"):
            load_tokenizer(str(tmp_path), None)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_a_byte_order_mark_changes_nothing(self, tmp_path, name):
        for folder in ("as it was", "marked"):
            published.write_tokenizer(tmp_path / folder)
        path = tmp_path / "marked" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        before, marked = (load_tokenizer(str(tmp_path / folder), None) for folder in ("as it was", "marked"))
        assert tokenizer_hash(marked) == tokenizer_hash(before)
        assert (marked.special_tokens_map, marked("hello")) == (before.special_tokens_map, before("hello"))

    @pytest.mark.parametrize(
        "change",
        [
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "special_tokens": {},
                    "single": [{"SpecialToken": {"id": "[BOS]", "type_id": 0}}],
                    "pair": [],
                }
            },
        ],
    )
    def test_a_panic_is_one_clear_error(self, tmp_path, change, capfd):
        """Of the first as it is read, of the second as it encodes."""
        published.write_tokenizer(tmp_path)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=rf"{path} is .*: restore it, or name another"):
            load_tokenizer(str(tmp_path), None)


# What was loaded before.


def test_a_tokenizer_is_read_again_when_it_is_another(tmp_path, monkeypatch):
    """It was replaced, or its path, which is relative, leads to another one from another working folder."""
    texts, sentence = ("the cat sat on the mat", "a dog ran and ran"), "the cat and a dog"
    trained = [train_tokenizer([text], n_vocab=260) for text in texts]
    expected = [tokenizer.encode(sentence).ids for tokenizer in trained]
    assert expected[0] != expected[1]
    for number, tokenizer in enumerate(trained):
        folder = tmp_path / str(number) / "same"
        folder.mkdir(parents=True)
        save_tokenizer(tokenizer, folder)
        monkeypatch.chdir(folder.parent)
        loaded = load_tokenizer("same", None)
        assert loaded(sentence)["input_ids"] == expected[number]
        assert load_tokenizer("same", None) is loaded
    save_tokenizer(trained[0], folder)
    assert load_tokenizer("same", None)(sentence)["input_ids"] == expected[0]
    (folder / "tokenizer_config.json").write_text('{"pad_token": "a"}')
    assert load_tokenizer("same", None).pad_token == "a"
