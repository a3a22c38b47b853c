"""Tokens as readable text, and text in which every token is shaded by its activation.

``pieces`` turns token ids into text, one piece per token. It supports three families of tokenizers: byte-level BPE
(GPT-2), WordPiece, and sentencepiece with byte pieces (Llama). ``Context`` is one activation with the tokens around
it; ``context_text`` writes it as text. Nothing here runs a model.
"""

import codecs
import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

RGB = tuple[int, int, int]


# Tokens as text


def pieces(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each token. All texts together read like the tokenizer's own decoding of ``ids``.

    If a character is split over several tokens, the last of them has its text, and the others are ``""``. Bytes that
    are not a character become U+FFFD. Special tokens have their name as text. The text is raw: pass it through
    ``visible`` before you print it.

    Args:
        tokenizer: a ``transformers.PreTrainedTokenizerFast``, or a ``tokenizers.Tokenizer``.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models
        >>> vocab = {"once": 0, "up": 1, "##on": 2, ".": 3}
        >>> tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="."))
        >>> tokenizer.decoder = decoders.WordPiece()
        >>> pieces(tokenizer, [0, 1, 2, 3])
        ['once', ' up', 'on', '.']
    """
    reader = _Reader.of(tokenizer)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts: list[str] = []
    for place, token in enumerate(int(i) for i in ids):
        content = reader.content(token, first=place == 0)
        if isinstance(content, str):  # whole characters, so an unfinished character before them stays unfinished
            unfinished = decoder.decode(b"", final=True)
            decoder.reset()
            if unfinished:
                texts[-1] += unfinished
        texts.append(content if isinstance(content, str) else decoder.decode(content))
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def shown_around(texts: Sequence[str], position: int, window: int, last: int) -> tuple[int, int]:
    """``(start, stop)`` of the tokens to show around a position of a row: ``window`` tokens on either side.

    No token after ``last`` is shown. Tokens are added at the end if the last one is only a part of a character.

    Args:
        texts: the ``pieces`` of the row.
        position: the token in the middle.
        window: tokens on either side.
        last: the last position before the padding.

    Example:
        >>> shown_around(["a", "b", "c", "", "é", "d"], 2, 1, last=5)
        (1, 5)
    """
    start, stop = max(position - window, 0), min(position + window, max(position, last)) + 1
    while stop < len(texts) and not texts[stop - 1]:
        stop += 1
    return start, stop


def token_label(tokenizer: Any, token: int) -> str:
    """One token as a label for lists. A space is ``␣``; bytes that are not a whole character are ``<0xE2>``.

    A WordPiece token that continues a word keeps its ``##``.
    """
    reader = _Reader.of(tokenizer)
    content = reader.content(int(token), first=False)
    if isinstance(content, str) and reader.family == "wordpiece":
        return visible(reader.backend.id_to_token(int(token)) or content)
    if isinstance(content, bytes):
        try:
            content = content.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in content)
    return visible(content).replace(" ", "␣")


_SYMBOLS = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}


def visible(text: str) -> str:
    """The text with visible symbols in place of characters that control a terminal or cannot be seen.

    A newline is ``↵``, a tab is ``⇥``, another control character is its picture (escape is ``␛``). Format characters
    (such as those that change the direction of text), line separators, surrogates and private characters are written
    as ``<U+202E>``.
    """
    return "".join(character if character.isprintable() else _symbol(character) for character in text)


def _symbol(character: str) -> str:
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return _SYMBOLS.get(character, chr(0x2400 + code))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return f"<U+{code:04X}>"
    return character  # a space other than U+0020, or a character newer than this Python


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Reader(NamedTuple):
    """How one tokenizer writes text in its tokens."""

    backend: Any  # tokenizers.Tokenizer
    family: str  # "bytes", "wordpiece", "sentencepiece" or "plain"
    added: dict[int, str]  # added tokens, such as special ones, which are written as they are
    prefix: str  # WordPiece: the start of a token that continues a word
    cleanup: bool  # WordPiece: no space before . , ! ?
    strip: bool  # sentencepiece: the first space of the text is dropped

    @staticmethod
    def of(tokenizer: Any) -> "_Reader":
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        parts = _parts(backend.decoder) or _parts(backend.pre_tokenizer)
        kinds = {part["type"]: part for part in parts}
        added = {token: entry.content for token, entry in backend.get_added_tokens_decoder().items()}
        model = type(backend.model).__name__
        if "ByteLevel" in kinds:
            family = "bytes"
        elif model == "WordPiece":
            family = "wordpiece"
        elif kinds.keys() & {"Metaspace", "ByteFallback"}:
            family = "sentencepiece"
        else:
            family = "plain"
        wordpiece = kinds.get("WordPiece", {"prefix": "##", "cleanup": True})
        strip = "Metaspace" in kinds or "Strip" in kinds
        return _Reader(backend, family, added, wordpiece["prefix"], wordpiece["cleanup"], strip)

    def content(self, token: int, *, first: bool) -> str | bytes:
        """What a token adds to the text; ``str`` if it cannot be a part of a character."""
        text = self.backend.id_to_token(token)
        if text is None:
            return f"<token {token}>"
        if token in self.added:
            text = self.added[token]
            return f" {text}" if self.family == "wordpiece" and not first else text
        match self.family:
            case "bytes" if all(character in _byte_of() for character in text):
                return bytes(_byte_of()[character] for character in text)
            case "wordpiece":
                if not first and text.startswith(self.prefix):
                    return text.removeprefix(self.prefix)
                joined = first or (self.cleanup and text in (".", ",", "!", "?"))
                return text if joined else f" {text}"
            case "sentencepiece":
                if piece := _BYTE_PIECE.fullmatch(text):
                    return bytes.fromhex(piece[1])
                text = text.replace("▁", " ")
                return text.removeprefix(" ") if first and self.strip else text
        return text


def _parts(component: Any) -> list[dict]:
    """The steps of a tokenizer's decoder or pre-tokenizer, as the tokenizers library describes them."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state.get("decoders") or state.get("pretokenizers") or [state]


# Text with shades


@dataclasses.dataclass(frozen=True)
class Context:
    """One activation of a feature, and the tokens around it."""

    value: float  # the activation
    row: int  # its row in the dataset
    position: int  # its position in that row, from 0
    start: int  # the position of the first token shown
    pieces: tuple[str, ...]  # the text of the tokens shown
    activations: Float[np.ndarray, " tokens"]  # the feature's activation at each of them; 0 where not selected

    @property
    def focus(self) -> int:
        """The place of the activation among the tokens shown."""
        return self.position - self.start

    def glyphs(self) -> list[tuple[str, float, bool]]:
        """(visible text, activation, is it the focus) of every token that has a text.

        A token without text is a part of a character. The token that completes the character shows the strongest
        activation of all its parts.
        """
        shown: list[tuple[str, float, bool]] = []
        strongest, focused = 0.0, False
        for place, (piece, activation) in enumerate(zip(self.pieces, self.activations, strict=True)):
            strongest = max(strongest, float(activation), key=abs)
            focused = focused or place == self.focus
            if piece:
                shown.append((visible(piece), strongest, focused))
                strongest, focused = 0.0, False
        return shown


@dataclasses.dataclass(frozen=True)
class Palette:
    """Background colours: ``zero`` for the page, ``positive`` and ``negative`` for the strongest activation."""

    text: RGB
    zero: RGB
    positive: RGB
    negative: RGB

    def background(self, activation: float, strongest: float) -> RGB | None:
        """The shade of one token; ``None`` for an activation of 0. The faintest shade can still be seen."""
        if activation == 0 or strongest == 0:
            return None
        end = self.positive if activation > 0 else self.negative
        share = 0.12 + 0.88 * min(abs(activation) / abs(strongest), 1.0)
        red, green, blue = (round(a + share * (b - a)) for a, b in zip(self.zero, end, strict=True))
        return red, green, blue


LIGHT = Palette(text=(20, 20, 20), zero=(255, 255, 255), positive=(255, 140, 40), negative=(90, 160, 255))
DARK = Palette(text=(255, 255, 255), zero=(24, 24, 24), positive=(186, 84, 0), negative=(30, 92, 200))
"""Orange and blue are safe for colour blindness. The text has a contrast of at least 4.5 : 1 on every shade."""


def shaded(text: str, background: RGB | None, palette: Palette, *, strong: bool = False) -> str:
    """Text between ANSI escape codes (24-bit colours)."""
    codes = ["1"] if strong else []
    if background is not None:
        codes += [f"38;2;{';'.join(map(str, palette.text))}", f"48;2;{';'.join(map(str, background))}"]
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text


def context_text(context: Context, strongest: float, palette: Palette | None) -> str:
    """The tokens of a context, shaded by activation / ``strongest``. Without a palette the focus is in [brackets]."""
    parts = []
    for text, activation, focused in context.glyphs():
        if palette is not None:
            parts.append(shaded(text, palette.background(activation, strongest), palette, strong=focused))
        elif focused:
            bare = text.lstrip(" ") or text
            parts.append(f"{text[: len(text) - len(bare)]}[{bare}]")
        else:
            parts.append(text)
    return "".join(parts)
