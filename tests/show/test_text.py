"""Tokens as text in the three large families of tokenizers, and readable shades."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from bilinear_jax.show.text import DARK, LIGHT, Context, context_text, pieces, token_label

TEXT = "Once upon a time, no naïve café → 日本 🙂!\n\nThe end."


def byte_level() -> Tokenizer:
    """No merges: every byte is a token, so that each character beyond ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab | {"Ġt": 256}, [("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return tokenizer


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "[BOS]", "once", "up", "##on", "time", ",", "!", "do", "##ing", '"', "##", "a"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[BOS]"])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama's: ▁ for a space, bytes for everything outside the vocabulary."""
    parts = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "▁b", "ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    vocab = {part: i for i, part in enumerate(parts)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


@pytest.mark.parametrize("family", [byte_level, sentencepiece])
@pytest.mark.parametrize("text", [TEXT, "ab ba\tabc", "a  b", "🙂", ""])
def test_pieces_read_as_the_text(family, text):
    tokenizer = family()
    ids = tokenizer.encode(text).ids
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=False) == text


def test_wordpiece_joins_as_its_tokenizer_does():
    tokenizer = wordpiece()
    ids = tokenizer.encode('[BOS]once upon a time, "doing!').ids
    found = pieces(tokenizer, ids)
    assert found == ["[BOS]", " once", " up", "on", " a", " time", ",", ' "', " do", "ing", "!"]
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=False)


def test_wordpiece_without_a_decoder_joins_alike():
    tokenizer = wordpiece()
    ids = tokenizer.encode("once upon a time, doing!").ids
    expected = pieces(tokenizer, ids)
    bare = Tokenizer(tokenizer.model)
    assert pieces(bare, ids) == expected


def test_a_split_character_belongs_to_the_token_that_completes_it():
    tokenizer = byte_level()
    ids = tokenizer.encode("a🙂b").ids
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🙂", "b"]
    # a row that begins, or ends, inside a character
    assert pieces(tokenizer, ids[2:])[-1] == "b" and "�" in "".join(pieces(tokenizer, ids[2:]))
    assert pieces(tokenizer, ids[:3]) == ["a", "", "�"]


def test_special_tokens_are_shown_by_name_and_end_a_character():
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<|endoftext|>")
    half = tokenizer.encode("é").ids[0]
    assert pieces(tokenizer, [half, end, half]) == ["�", "<|endoftext|>", "�"]
    assert pieces(tokenizer, [9999]) == ["<token 9999>"]


def test_a_transformers_tokenizer_reads_alike():
    from transformers import PreTrainedTokenizerFast

    tokenizer = sentencepiece()
    ids = tokenizer.encode("ab é").ids
    assert pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer), ids) == pieces(tokenizer, ids)


def test_labels_of_single_tokens():
    gpt, bert, llama = byte_level(), wordpiece(), sentencepiece()
    assert token_label(gpt, 256) == "␣t"
    assert token_label(gpt, gpt.encode("\n").ids[0]) == "↵"
    assert token_label(gpt, gpt.encode("é").ids[0]) == "<0xC3>"
    assert token_label(bert, bert.token_to_id("##on")) == "##on"
    assert token_label(llama, llama.token_to_id("▁a")) == "␣a"
    assert token_label(llama, llama.token_to_id("<0x0A>")) == "↵"
    assert token_label(llama, llama.token_to_id("<0xE2>")) == "<0xE2>"


def luminance(color) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_text_is_readable_on_every_shade_and_shades_grow(palette):
    text, page = luminance(palette.text), luminance(palette.zero)
    for sign in (1, -1):
        shades = [palette.background(sign * level, 1.0) for level in np.linspace(0.01, 1, 34)]
        for shade in shades:
            low, high = sorted([text, luminance(shade)])
            assert (high + 0.05) / (low + 0.05) >= 4.5
        distance = [abs(luminance(shade) - page) for shade in shades]
        assert distance == sorted(distance) and distance[0] > 0
    assert palette.background(0.0, 1.0) is None
    assert palette.background(7.0, 2.0) == palette.background(2.0, 2.0)


def a_context(**changes) -> Context:
    parts = {
        "value": 2.0,
        "row": 0,
        "position": 5,
        "start": 3,
        "pieces": ("no", "\n", " work", " is"),
        "activations": np.array([0.0, 1.0, 2.0, -0.5], np.float32),
    }
    return Context(**(parts | changes))


def test_plain_text_marks_the_token_of_the_activation():
    assert context_text(a_context(), 2.0, None) == "no↵ [work] is"
    assert context_text(a_context(position=4), 2.0, None) == "no[↵] work is"
    assert context_text(a_context(pieces=("a", "b", " ", "c")), 2.0, None) == "ab[ ]c"


@pytest.mark.parametrize(("palette", "text"), [(LIGHT, "38;2;20;20;20"), (DARK, "38;2;255;255;255")])
def test_every_token_has_the_shade_of_its_own_activation(palette, text):
    def colored(content, activation, bold=""):
        shade = ";".join(map(str, palette.background(activation, 2.0)))
        return f"\x1b[{bold}{text};48;2;{shade}m{content}\x1b[0m"

    expected = "no" + colored("↵", 1.0) + colored(" work", 2.0, "1;") + colored(" is", -0.5)
    assert context_text(a_context(), 2.0, palette) == expected


def test_the_parts_of_a_character_share_the_strongest_of_their_activations():
    split = a_context(pieces=("a", "", "", "é"), activations=np.array([0.0, 0.5, 2.0, 1.0], np.float32))
    assert split.glyphs() == [("a", 0.0, False), ("é", 2.0, True)]


def test_a_token_cannot_send_escape_codes():
    nasty = a_context(pieces=("a", "\x1b]0;title\x07", "\x1b[31m", "\x9b0m"))
    assert context_text(nasty, 2.0, None) == "a␛]0;title␇[␛[31m]<U+009B>0m"
    inside = context_text(nasty, 2.0, DARK)
    assert "\x1b]" not in inside and "\x1b[31m" not in inside and "\x07" not in inside and "\x9b" not in inside


def test_post_processed_ids_are_read_as_given():
    """What a template adds is a token like any other: nothing is inserted or dropped."""
    tokenizer = sentencepiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert pieces(tokenizer, tokenizer.encode("ab").ids)[0] == "<s>"


@pytest.mark.parametrize("token", [2**32, 2**40, 2**70])
def test_a_number_that_no_token_id_can_be(token):
    for read in (lambda: pieces(byte_level(), [token]), lambda: token_label(byte_level(), token)):
        with pytest.raises(ValueError, match=rf"^{token} is not a token id: "):
            read()
    assert pieces(byte_level(), [2**32 - 1, -1]) == ["<token 4294967295>", "<token -1>"]
