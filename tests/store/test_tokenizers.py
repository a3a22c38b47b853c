"""The tokenizers of the published models, offline: where texts begin, what is padded with, and that texts come back.

mistral's are the 32,000 pieces that the package mistral-common carries; ts-4096 is a small WordPiece built as it is.
"""

import json
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import published
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store.tokenizers import load_tokenizer
from bilinear_jax.store.tokens import tokenize

TEXTS = (
    "Once upon a time, there was a cat.",
    "  two  spaces\nand a line",
    "naïve café №7, 東京 \N{SLIGHTLY SMILING FACE}",
)


def pieces() -> list[tuple[str, float]]:
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
    scores = dict(pieces())
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
    """ts-4096 in small: NFD, no accents, lower case, single digits, [BOS] first, and no [EOS]."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'"
    words = ["[UNK]", "[BOS]", "[EOS]", *letters, *(f"##{letter}" for letter in letters), "once", "cat", "##fe"]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.WordPiece()
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
    assert tokenizer.decode(ids, skip_special_tokens=True) == "once, a cafe! 1 2"
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
    assert isinstance(text, str) and text.startswith("once a cat")


def test_a_folder_with_a_sentencepiece_file_alone_says_what_to_do(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"has no tokenizer\.json: put one there, made from its tokenizer\.model"
    ):
        load_tokenizer(str(tmp_path), "mistral")
    published.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[UNK]"}))
    assert load_tokenizer(str(tmp_path), "ts-4096").pad_token == "[EOS]"
