"""Text that a terminal shows and does not obey. Everything that the package prints goes through here.

Tokens, names and files come from others, and may hold escape sequences.
"""

import sys
import unicodedata
from typing import Any

_SYMBOLS = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}
_IN_LINES = "\n\u200c\u200d"


def visible(text: str) -> str:
    """The text with visible symbols in place of characters that control a terminal or cannot be seen.

    A newline is ``↵``, a tab is ``⇥``, another control character is its picture (escape is ``␛``). Format characters
    (such as those that change the direction of text), line separators, surrogates and private characters are written
    as ``<U+202E>``.
    """
    return "".join(character if character.isprintable() else _symbol(character) for character in text)


def visible_lines(text: str) -> str:
    """As ``visible``, but newlines stay, and so do the two characters that join letters (and emoji) or keep them apart.

    Example:
        >>> print(visible_lines("one\\n\\x1b[2Jtwo"))
        one
        ␛[2Jtwo
    """
    return "".join(character if character in _IN_LINES else visible(character) for character in text)


def _symbol(character: str) -> str:
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return _SYMBOLS.get(character, chr(0x2400 + code))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return f"<U+{code:04X}>"
    return character  # a space other than U+0020, or a character newer than this Python


def say(text: str, file: Any = None, *, raw: bool = False) -> None:
    """Print lines of text to a stream, by default the standard output, with ``visible_lines``.

    A character that the stream's encoding does not have is written as ``\\u2192``.

    Args:
        raw: print the text as it is. Its writer has made it safe, or it does not go to a terminal.
    """
    stream = sys.stdout if file is None else file
    shown = text if raw else visible_lines(text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream)
