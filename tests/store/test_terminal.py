"""What a terminal must not obey is shown, whatever prints it."""

import io

import pytest

from bilinear_jax.store.terminal import say, visible, visible_lines


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\n\n", "↵↵"),
        ("\t", "⇥"),
        ("\x1b[2J", "␛[2J"),
        ("\x9b2J", "<U+009B>2J"),
        ("\r\x07\x00\x7f", "␍␇␀␡"),
        ("\u202eabc\u2066", "<U+202E>abc<U+2066>"),
        ("\u2028\ud800\ue000", "<U+2028><U+D800><U+E000>"),
        ("naïve café 日本 🙂 �", "naïve café 日本 🙂 �"),
    ],
)
def test_nothing_that_a_terminal_obeys_is_left(raw, shown):
    assert visible(raw) == shown


def test_lines_and_joined_letters_stay():
    family = "👨\u200d👩\u200d👧"
    assert visible_lines(f"one\n\ttwo\x1b[2J\r\n{family}\u202e") == f"one\n⇥two␛[2J␍\n{family}<U+202E>"


def test_every_control_character_is_shown():
    """C0 but for the newline, DEL, C1, and what Unicode lists as Bidi_Control."""
    bidi = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    controls = [*range(0x20), *range(0x7F, 0xA0), *bidi]
    shown = visible_lines("".join(map(chr, controls)))
    assert {chr(code) for code in controls} & set(shown) == {"\n"}


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "␛[2J é\n"), ("ascii", "\\u241b[2J \\xe9\n")])
def test_a_stream_gets_what_its_encoding_has(encoding, shown):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    say("\x1b[2J é", file)
    file.flush()
    assert file.buffer.getvalue().decode(encoding) == shown
