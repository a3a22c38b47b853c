"""HTML that pages and notebooks share: tokens shaded by their activations, numbers, style sheets and templates.

The same input gives the same bytes. Everything that comes from a model, a tokenizer or a user is escaped. Invisible
characters (control characters, those that change the direction of text) become symbols: see ``store.terminal``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bilinear_jax.show import text as text_module

LEVELS = 10  # shades of a colour
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


class Html(str):
    """A string of HTML that a notebook renders."""

    def _repr_html_(self) -> str:
        return str(self)


@dataclasses.dataclass(frozen=True)
class Context:
    """Some tokens of one row of the dataset, with the activations of one feature, or of the two features of a pair."""

    row: int  # of the dataset
    start: int  # the position of the first token shown
    focus: int  # which of the tokens shown the context is about, from 0
    tokens: list[str]  # the text of each token; together they read like the tokenizer's own decoding
    values: list[float]  # the activation of the feature, or of a pair's first feature, at each token
    second: list[float] | None = None  # that of a pair's second feature; None if there is only one feature


# For notebooks


def contexts_fragment(
    features: Mapping[int, Sequence[text_module.Context]], effects: Mapping[int, tuple[Sequence, Sequence]], name: str
) -> Html:
    """The contexts of a ``Visualizer`` as HTML for a notebook.

    Args:
        features: the contexts of each feature, the largest activation first.
        effects: for each feature the labels of the tokens that it raises and lowers; ``{}`` leaves them out.
        name: of the SAE.
    """

    def facts(one: text_module.Context) -> Context:
        return Context(one.row, one.start, one.focus, list(one.pieces), one.activations.tolist())

    found = {feature: [facts(one) for one in contexts] for feature, contexts in features.items()}
    return fragment("contexts", features=found, effects=effects, name=name)


def fragment(kind: str, helpers: tuple[Callable, ...] = (), **values: Any) -> Html:
    """The part of ``fragment.html`` for one kind of content, with its style sheet."""
    values |= {
        "kind": kind,
        "inputs": {},
        "outputs": {},
        "links": False,
        "root": "",
        "style": Markup(style(static("parts.css"))),
    }
    return Html(environment(helpers).get_template("fragment.html").render(values))


# What the templates compute with


class Glyph(NamedTuple):
    """A token as a page shows it, or several tokens that are one character together."""

    text: str
    shade: str  # classes: p1 ... p10 or n1 ... n10 for an activation, u1 ... u3 for that of a pair's second feature
    value: str
    second: str | None
    focus: bool
    joined: int  # the number of tokens without a text of their own that it contains


def glyphs(context: Context, largest: float, second_largest: float = 0.0) -> list[Glyph]:
    """The tokens of a context, shaded by activation / ``largest``.

    Example:
        >>> [(one.text, one.shade) for one in glyphs(Context(0, 5, 0, ["a", "\\n"], [4.0, -1.0]), 4.0)]
        [('a', 'p10'), ('↵', 'n3')]
    """
    first = _shown(context, context.values)
    both = [None] * len(first) if context.second is None else [value for _, value, _ in _shown(context, context.second)]
    found, before = [], -1
    places = [place for place, text in enumerate(context.tokens) if text]
    for place, (text, value, focus), second in zip(places, first, both, strict=True):
        classes = shade(value, largest)
        if second:
            classes += f" u{math.ceil(3 * min(abs(second) / second_largest, 1.0)) if second_largest else 3}"
        text = "".join("␣" if one == " " else one for one in text) if text.isspace() else text
        written = None if second is None else number(second)
        found.append(Glyph(text, classes.strip(), number(value), written, focus, place - before - 1))
        before = place
    return found


def _shown(context: Context, values: list[float]) -> list[tuple[str, float, bool]]:
    position, tokens = context.start + context.focus, tuple(context.tokens)
    return text_module.Context(0.0, context.row, position, context.start, tokens, np.asarray(values)).glyphs()


def shade(value: float, largest: float) -> str:
    if not value:
        return ""
    level = math.ceil(LEVELS * min(abs(value) / largest, 1.0)) if largest else LEVELS
    return f"{'p' if value > 0 else 'n'}{max(level, 1)}"


def number(value: float | None, digits: int = 3) -> str:
    """A number as text, with this many significant digits; a dash for None.

    Example:
        >>> [number(value) for value in (0.0, 0.1, 12.345, 12345.0)]
        ['0', '0.100', '12.3', '12345']
        >>> number(-1.2e-7) == "-1.2e-07".replace("-", MINUS), number(None) == DASH
        (True, True)
    """
    if value is None:
        return DASH
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        text = f"{value:.0f}"
    elif abs(value) < 1e-4:
        text = f"{value:.{digits - 2}e}"
    else:
        text = f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", MINUS)


def percent(value: float | None) -> str:
    """A share, 0 to 1, as a percentage.

    Example:
        >>> percent(0.0123), percent(1.0)
        ('1.23%', '100%')
    """
    return DASH if value is None else f"{number(100 * value)}%"


def largest_of(values: Sequence[float]) -> float:
    """The largest |value|; 0 if there are no values."""
    return max(map(abs, values), default=0.0)


# Style and templates


def style(*sheets: str) -> str:
    """Style sheets after the rules of ``shades``. Their colours are those of the terminal output."""
    return "\n".join([shades(), *sheets])


def shades() -> str:
    """A CSS rule for each shade: ``.p1`` ... ``.p10`` for positive values, ``.n1`` ... ``.n10`` for negative ones.

    Example:
        >>> shades().splitlines()[-1]
        '.bj .n10{background:light-dark(#5aa0ff,#1e5cc8);color:light-dark(#141414,#ffffff)}'
    """
    rules = []
    for sign, name in ((1, "p"), (-1, "n")):
        for level in range(1, LEVELS + 1):
            background = _both(lambda palette, share=sign * level / LEVELS: palette.background(share, 1.0))
            text = _both(lambda palette: palette.text)
            rules.append(f".bj .{name}{level}{{background:{background};color:{text}}}")
    return "\n".join(rules)


def _both(colour) -> str:
    """A colour of both palettes, as the CSS function that chooses between them."""
    light, dark = ("#" + bytes(colour(palette)).hex() for palette in (text_module.LIGHT, text_module.DARK))
    return f"light-dark({light},{dark})"


def static(name: str, room: str = "bilinear_jax.show") -> str:
    """A file of the folder ``static/`` of a room (a package)."""
    return resources.files(room).joinpath("static", name).read_text(encoding="utf-8")


@functools.cache
def environment(helpers: tuple[Callable, ...] = (), rooms: tuple[str, ...] = ()) -> Environment:
    """The templates of ``bilinear_jax.show``, and those of the other packages in ``rooms``.

    ``helpers`` are functions that the templates call by their names.
    """
    made = Environment(
        loader=ChoiceLoader([PackageLoader(room) for room in ("bilinear_jax.show", *rooms)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: text_module.visible(value) if type(value) is str else value,
    )
    made.filters |= {"number": number, "percent": percent}
    made.globals |= {helper.__name__: helper for helper in (glyphs, largest_of, *helpers)}
    return made
