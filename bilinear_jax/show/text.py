"""Tokens as readable text, and text in which every token is shaded by its activation.

``pieces`` cuts a tokenizer's own decoding of a row into one text for each token, so it needs to know nothing of how
tokenizers work. ``Context`` is one activation with the tokens around it; ``context_text`` writes it as text. Nothing
here runs a model.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from bilinear_jax.store.terminal import visible
from bilinear_jax.store.tokenizers import clear_errors, missing_decoder

RGB = tuple[int, int, int]

Decode = Callable[[list[int]], str]


# Tokens as text


def pieces(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each token. All texts together are ``tokenizer.decode(ids, skip_special_tokens=False)``.

    The texts of the first n tokens together are the decoding of these n tokens, as far as later tokens leave it as it
    is. If a character is split over several tokens, the last of them has its text, and the others are ``""``. Bytes
    that are not a character become U+FFFD. Special tokens have their name as text. The text is raw: pass it through
    ``visible`` before you print it.

    A token id that the tokenizer does not know is ``<token 9999>``; the tokenizer itself leaves it out. If
    the tokenizer has no decoder but its tokens show which one they need, they are read with it: see
    ``store.tokenizers.missing_decoder``.

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
    backend, row = _backend(tokenizer), [int(token) for token in ids]
    unknown = {token for token in set(row) if _name(backend, token) is None}
    with clear_errors("the tokenizer cannot decode its own tokens", "restore tokenizer.json"):
        texts = iter(_cut(_decoding(tokenizer), [token for token in row if token not in unknown]))
    return [_unknown(token) if token in unknown else next(texts) for token in row]


def _backend(tokenizer: Any) -> Any:
    """The ``tokenizers.Tokenizer`` in a tokenizer."""
    return getattr(tokenizer, "backend_tokenizer", tokenizer)


def _name(backend: Any, token: int) -> str | None:
    """The name of a token in the vocabulary. None if the tokenizer does not know it."""
    if token >= 2**32:
        raise ValueError(f"{token} is not a token id: they are below 2^32. Give the ids of this tokenizer")
    return backend.id_to_token(token) if token >= 0 else None


def _unknown(token: int) -> str:
    return f"<token {token}>"


def _decoding(tokenizer: Any) -> Decode:
    """What turns token ids into text, special tokens included."""
    backend = _backend(tokenizer)
    decoder = missing_decoder(backend)
    if decoder is not None:
        return lambda ids: decoder.decode([backend.id_to_token(token) for token in ids])
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    return functools.partial((tokenizer if cleans else backend).decode, skip_special_tokens=False)


_BLOCK = 4
"""How many tokens are cut with one window. Larger: longer windows; smaller: more of them."""


def _cut(decode: Decode, ids: list[int]) -> list[str]:
    """``decode(ids)``, cut behind each token: where the decoding of the tokens up to it ends.

    Decoding every prefix would take time quadratic in the row. So what follows a block of tokens is read from a window
    that begins with that block. If the text in the window does not go on as the whole does, the window is the row.
    """
    whole, ends, first = decode(ids), [0], 0
    while len(ends) <= len(ids):
        start = len(ends) - 1
        found = _ends(decode, ids, first, start, whole, ends[-1]) if first else None
        ends += found or _ends(decode, ids, 0, start, whole, ends[-1]) or []
        first = start
    for place in range(1, len(ids)):  # an unfinished character belongs to the last token that has a part of it
        if ends[place] == ends[place + 1] and whole[ends[place - 1] : ends[place]].endswith("\ufffd"):
            ends[place] -= 1
    return [whole[a:b] for a, b in itertools.pairwise(ends)]


def _ends(decode: Decode, ids: list[int], first: int, start: int, whole: str, at: int) -> list[int] | None:
    """Where in ``whole`` the texts of the tokens from ``start`` on end. ``at``: where the tokens before them end.

    It stops at the first token after a block with which the decoding goes on as the whole does. None if there is none,
    which cannot be if ``first``, where the window begins, is 0.
    """
    before, offset = (decode(ids[first:start]), at) if first else ("", 0)
    found = []
    for stop in range(start + 1, len(ids) + 1):
        text = decode(ids[first:stop])
        goes_on = text.startswith(before)
        text = text[len(before) :] if goes_on else ""
        agrees = goes_on and whole.startswith(text, offset)
        length = len(text) if agrees else _alike(text, whole[offset : offset + len(text)])
        at = max(at, offset + length)
        found.append(at)
        if agrees and len(found) >= _BLOCK and stop < len(ids):
            return found
        if first and len(found) > 16 * _BLOCK:
            return None
    return found if at == len(whole) else None


def _alike(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


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

    Where the decoder sets the spaces, and not the tokens, the label is the token's name in the vocabulary: a WordPiece
    token that continues a word keeps its ``##``, and one that ends a word its ``</w>``.
    """
    backend, token = _backend(tokenizer), int(token)
    name = _name(backend, token)
    if name is None:
        return _unknown(token)
    model = backend.model
    named = backend.decoder is None and missing_decoder(backend) is None
    if not (named or type(model).__name__ == "WordPiece" or getattr(model, "end_of_word_suffix", None)):
        name = _alone(tokenizer, token, name)
    return visible(name).replace(" ", "␣")


def _alone(tokenizer: Any, token: int, name: str) -> str:
    """What a token adds to a text that it does not begin."""
    text = pieces(tokenizer, [token, token])[1] or name
    if "\ufffd" not in text:
        return text
    try:
        content = bytes(_byte_of()[character] for character in name)
    except KeyError:
        return name
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in content)


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


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


def text_at(tokenizer: Any, ids: Sequence[int] | np.ndarray, position: int, last: int, window: int = 12) -> str:
    """The tokens around a position of a row as text, that one in [brackets]. No token after ``last`` is shown.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
        >>> text_at(tokenizer, [0, 1, 2, 0], 2, last=2, window=1)
        ' b [c]'
    """
    texts = pieces(tokenizer, ids)
    start, stop = shown_around(texts, position, window, last)
    shown = tuple(texts[start:stop])
    return context_text(Context(0.0, 0, position, start, shown, np.zeros(len(shown))), 0.0, None)
