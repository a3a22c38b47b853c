"""Pieces against each tokenizer's own decoding, for random token ids of every family of tokenizers."""

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bilinear_jax.show.text import pieces, token_label

WORDS = ["[UNK]", "once", "upon", "a", "time", ",", ".", "...", "n't", "'s", "?", "do", "not", "�", "日本", "é"]


def made(model, decoder=None, added=("<s>", "[PAD]"), plain=("two words", " x", "\x1b[2J")) -> Tokenizer:
    """A tokenizer with this decoder, with special tokens, and with added tokens that are not special."""
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    tokenizer.add_tokens(list(plain))
    return tokenizer


def numbered(tokens) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def bpe(tokens, **options):
    return models.BPE(numbered(tokens), [], **options)


def word_pieces(decoder=None) -> Tokenizer:
    model = models.WordPiece(numbered([*WORDS, "##on", "##.", "##", "##n't", "##'s"]), unk_token="[UNK]")
    return made(model, decoder)


def metaspace(scheme: str) -> Tokenizer:
    marked = [f"▁{word}" for word in WORDS]
    tokenizer = made(bpe([*marked, *WORDS, "▁", "▁▁"]), decoders.Metaspace(prepend_scheme=scheme))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return tokenizer


def byte_level() -> Tokenizer:
    """Every byte, and tokens that end or begin inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return made(bpe([*alphabet, "Ġt", "ĠÃ", "©Ġ", "ðŁ", "ĻĤ", "âĤ¬"]), decoders.ByteLevel())


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama() -> Tokenizer:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return made(bpe(["<unk>", *BYTES, "▁", "▁a", "ab", "▁▁b", "é", "�"], byte_fallback=True), decoders.Sequence(parts))


def unigram() -> Tokenizer:
    scores = [(word, -1.0) for word in ("<unk>", "▁once", "▁a", "b", "▁", "日本")]
    return made(models.Unigram(scores, 0, False), decoders.Metaspace())


FAMILIES = {
    "words": made(models.WordLevel(numbered(WORDS), unk_token="[UNK]")),
    "BPE of words": made(bpe(WORDS)),
    "end of word": made(
        bpe([*WORDS, *(f"{word}</w>" for word in WORDS)], end_of_word_suffix="</w>"), decoders.BPEDecoder("</w>")
    ),
    "Metaspace always": metaspace("always"),
    "Metaspace first": metaspace("first"),
    "Metaspace never": metaspace("never"),
    "WordPiece": word_pieces(decoders.WordPiece()),
    "WordPiece, no clean-up": word_pieces(decoders.WordPiece(cleanup=False)),
    "transformers clean-up": PreTrainedTokenizerFast(
        tokenizer_object=word_pieces(decoders.WordPiece(cleanup=False)), clean_up_tokenization_spaces=True
    ),
    "byte-level": byte_level(),
    "Llama": llama(),
    "Unigram": unigram(),
    "CTC": made(models.WordLevel(numbered([*"abc", "<pad>", "|"]), unk_token="a"), decoders.CTC("<pad>", "|")),
}


def rows(family: str, longest: int = 90):
    """Random token ids, some of them runs of few tokens: half characters in a row, for instance."""
    size = len(getattr(FAMILIES[family], "backend_tokenizer", FAMILIES[family]).get_vocab())
    few = st.lists(st.integers(0, size - 1), min_size=1, max_size=4)
    return st.lists(st.integers(0, size - 1), max_size=longest) | few.flatmap(
        lambda some: st.lists(st.sampled_from(some), max_size=longest)
    )


@pytest.mark.parametrize("family", FAMILIES)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(data=st.data())
def test_pieces_are_the_decoding_cut_where_each_prefix_ends(family, data):
    tokenizer, ids = FAMILIES[family], data.draw(rows(family))
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(found) == whole
    for length in range(len(ids)):  # what waits for its end is at most an unfinished character
        before = tokenizer.decode(ids[:length], skip_special_tokens=False)
        if whole.startswith(before):
            assert "".join(found[:length]) == before or before.endswith("�")


def of(family: str, *tokens: str) -> list[int]:
    """The ids of tokens, by their names in the vocabulary."""
    ids = [FAMILIES[family].token_to_id(token) for token in tokens]
    assert None not in ids
    return ids


@pytest.mark.parametrize(
    ("family", "tokens", "texts"),
    [
        ("words", ["once", "upon", ",", "<s>"], ["once", " upon", " ,", " <s>"]),
        ("BPE of words", ["a", "two words", "."], ["a", " two words", " ."]),
        ("end of word", ["do", "not</w>", "a</w>", "<s>"], ["do", "not", " a", " <s>"]),
        ("Metaspace first", ["▁a", "time", "▁"], ["a", "time", " "]),
        ("Metaspace never", ["▁a", "time", "<s>"], [" a", "time", "<s>"]),
        ("WordPiece", ["do", "n't", "...", "##on"], ["do", "n't", "...", "on"]),
        ("WordPiece, no clean-up", ["do", "n't", "...", "##on"], ["do", " n't", " ...", "on"]),
        ("byte-level", ["Ġt", "ðŁ", "ĻĤ", "<s>"], [" t", "", "🙂", "<s>"]),
        ("byte-level", ["a", "ðŁ"], ["a", "�"]),  # ends inside a character
        ("byte-level", ["ĻĤ", "a"], ["��", "a"]),  # begins inside one
        ("Llama", ["▁a", "<0xE2>", "<0x82>", "<0xAC>", "▁a"], ["a", "", "", "€", " a"]),
        ("Llama", ["<0xE2>", "<0x82>", "ab"], ["�", "�", "ab"]),  # this decoder has one for each byte
        (  # a byte that ends no character makes all bytes around it U+FFFD, also those that a window reads as text
            "Llama",
            ["<0xAC>", "<0xE2>", "▁a", "<0xE2>", *["<0x41>"] * 4, "<0xFF>", "<0xAC>", "<s>", "<0x82>", "<0x82>"],
            ["�", "�", " a", *["�"] * 7, "<s>", "�", "�"],
        ),
        ("Unigram", ["▁once", "▁a", "b"], ["once", " a", "b"]),
        ("words", [], []),
    ],
)
def test_the_text_of_each_token(family, tokens, texts):
    assert pieces(FAMILIES[family], of(family, *tokens)) == texts


def test_an_id_that_the_tokenizer_does_not_know_is_shown():
    first, second = of("byte-level", "Ġt", "<s>")
    assert pieces(FAMILIES["byte-level"], [first, 9999, second, -1]) == [" t", "<token 9999>", "<s>", "<token -1>"]
    assert token_label(FAMILIES["byte-level"], 9999) == "<token 9999>"


def test_long_rows_are_cut_as_short_ones():
    """The windows of a long row lie elsewhere than those of its parts, but each word adds the same text."""
    ids = of("byte-level", "Ġt", "ðŁ", "ĻĤ", "a", "âĤ¬") * 400
    assert pieces(FAMILIES["byte-level"], ids) == [" t", "", "🙂", "a", "€"] * 400


def test_clean_up_of_the_whole_text_takes_back_what_was_shown():
    """Before the last token, the text is "do n"; the clean-up of transformers makes "don't" of it."""
    model = models.WordPiece(numbered(["[UNK]", "do", "n", "##'t"]), unk_token="[UNK]")
    backend = made(model, decoders.WordPiece(cleanup=False), added=(), plain=())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    assert tokenizer.decode([1, 2, 3, 1]) == "don't do"
    assert pieces(tokenizer, [1, 2, 3, 1]) == ["do", "", "n't", " do"]


def test_a_decoder_that_panics_is_one_clear_error():
    tokenizer = made(bpe([" "]), decoders.Strip(" ", 0, 5))
    with pytest.raises(ValueError, match=r"cannot decode its own tokens \(index out of bounds.*: restore"):
        pieces(tokenizer, [0])


@pytest.mark.parametrize(
    ("family", "token", "label"),
    [
        ("words", "once", "once"),
        ("end of word", "once</w>", "once</w>"),
        ("end of word", "once", "once"),
        ("Metaspace never", "▁once", "␣once"),
        ("WordPiece", "##on", "##on"),
        ("WordPiece", "once", "once"),
        ("byte-level", "ĠÃ", "<0x20><0xC3>"),
        ("byte-level", "âĤ¬", "€"),
        ("Llama", "<0xE2>", "<0xE2>"),
        ("Llama", "�", "�"),
        ("Unigram", "▁a", "␣a"),
        ("words", "\x1b[2J", "␛[2J"),
    ],
)
def test_the_label_of_one_token(family, token, label):
    assert token_label(FAMILIES[family], *of(family, token)) == label
