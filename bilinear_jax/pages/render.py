"""Feature pages as HTML: facts in, a string out. The same input gives the same bytes.

Each part of a page is a macro of ``templates/parts.html``; pages of a site and what a notebook shows are made of the
same parts. Everything that comes from a model, a tokenizer or a user is escaped, and what an eye would miss in it
(control characters, those that turn the direction of text) is shown as a symbol: see ``rendering.visible``.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bilinear_jax import rendering
from bilinear_jax.pages.facts import (
    Activity,
    Context,
    Histogram,
    InputFeature,
    OutputFeature,
    Provenance,
    Site,
)

LEVELS = 10  # shades of a colour
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
TERMS = {
    "shown": "the pairs shown",
    "pairs": "all other pairs of input features",
    "feature_bias": "input features with the input SAE's decoder bias",
    "bias": "the input SAE's decoder bias with itself",
    "passthrough": "coordinates that the input SAE passes through",
    "error_cross": "the input SAE's error with what it reconstructs",
    "error_error": "the input SAE's error with itself",
    "encoder": "the constant of the output SAE's encoder",
}
"""What the kinds of terms of an account are: see ``attribution.Account``."""


class Html(str):
    """HTML that a notebook shows as such."""

    def _repr_html_(self) -> str:
        return str(self)


# Pages


def index_page(site: Site) -> str:
    """The table of output features."""
    return _page("index.html", site, root="", here="outputs")


def inputs_page(site: Site) -> str:
    """The table of input features."""
    return _page("inputs.html", site, root="", here="inputs")


def output_page(site: Site, place: int) -> str:
    """The page of the place-th output feature of a site."""
    around = _around([page.activity.feature for page in site.outputs], place, "output")
    return _page("output.html", site, root="../", here="output", page=site.outputs[place], **around)


def input_page(site: Site, place: int) -> str:
    """The page of the place-th input feature of a site."""
    around = _around([page.activity.feature for page in site.inputs], place, "input")
    return _page("input.html", site, root="../", here="input", page=site.inputs[place], **around)


def _around(features: Sequence[int], place: int, kind: str) -> dict[str, str | None]:
    def address(there: int) -> str | None:
        return f"../{kind}/{features[there]}.html" if 0 <= there < len(features) else None

    return {"before": address(place - 1), "after": address(place + 1)}


def _page(template: str, site: Site, **values: Any) -> str:
    names = {page.activity.feature: page.activity for page in site.inputs}
    outputs = {page.activity.feature: page.activity for page in site.outputs}
    values |= {"site": site, "origin": site.provenance, "inputs": names, "outputs": outputs, "links": True}
    return _environment().get_template(template).render(values)


# Fragments for notebooks


def output_fragment(page: OutputFeature) -> Html:
    """What a notebook shows of an output feature: its page without the links."""
    return _fragment("output", page=page)


def input_fragment(page: InputFeature) -> Html:
    """What a notebook shows of an input feature."""
    return _fragment("input", page=page)


def site_fragment(site: Site) -> Html:
    """What a notebook shows of a site: the table of its output features."""
    return _fragment("site", site=site)


def contexts_fragment(
    features: Mapping[int, Sequence[rendering.Context]], effects: Mapping[int, tuple[Sequence, Sequence]], name: str
) -> Html:
    """What a notebook shows of a ``Visualizer``'s contexts.

    Args:
        features: the contexts of each feature, the largest activation first.
        effects: the tokens that each raises and lowers, as labels; of none of them where there are none.
        name: of the SAE.
    """

    def facts(one: rendering.Context) -> Context:
        return Context(one.row, one.start, one.focus, list(one.pieces), one.activations.tolist())

    found = {feature: [facts(one) for one in contexts] for feature, contexts in features.items()}
    return _fragment("contexts", features=found, effects=effects, name=name)


def _fragment(kind: str, **values: Any) -> Html:
    values |= {
        "kind": kind,
        "inputs": {},
        "outputs": {},
        "links": False,
        "root": "",
        "style": Markup(style("parts.css")),
    }
    return Html(_environment().get_template("fragment.html").render(values))


# What the templates compute with


class Glyph(NamedTuple):
    """A token, or several that are one character together, as a page shows it."""

    text: str
    shade: str  # classes: p1 ... p10 or n1 ... n10 for an activation, u1 ... u3 for that of a pair's second feature
    value: str
    second: str | None
    focus: bool
    joined: int  # how many tokens of no text of their own are in it


def glyphs(context: Context, largest: float, second_largest: float = 0.0) -> list[Glyph]:
    """The tokens of a context, shaded by activation / largest.

    Example:
        >>> [(one.text, one.shade) for one in glyphs(Context(0, 5, 0, ["a", "\\n"], [4.0, -1.0]), 4.0)]
        [('a', 'p10'), ('↵', 'n3')]
    """
    first = _shown(context, context.values)
    both = [None] * len(first) if context.second is None else [value for _, value, _ in _shown(context, context.second)]
    found, before = [], -1
    places = [place for place, text in enumerate(context.tokens) if text]
    for place, (text, value, focus), second in zip(places, first, both, strict=True):
        shade = _shade(value, largest)
        if second:
            shade += f" u{math.ceil(3 * min(abs(second) / second_largest, 1.0)) if second_largest else 3}"
        text = "".join("␣" if one == " " else one for one in text) if text.isspace() else text
        written = None if second is None else number(second)
        found.append(Glyph(text, shade.strip(), number(value), written, focus, place - before - 1))
        before = place
    return found


def _shown(context: Context, values: list[float]) -> list[tuple[str, float, bool]]:
    position, tokens = context.start + context.focus, tuple(context.tokens)
    return rendering.Context(0.0, context.row, position, context.start, tokens, np.asarray(values)).glyphs()


def _shade(value: float, largest: float) -> str:
    if not value:
        return ""
    level = math.ceil(LEVELS * min(abs(value) / largest, 1.0)) if largest else LEVELS
    return f"{'p' if value > 0 else 'n'}{max(level, 1)}"


def number(value: float | None, digits: int = 3) -> str:
    """A number as people read it, with so many significant digits; a dash where there is none.

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
    """A share, 0 to 1, in per cent.

    Example:
        >>> percent(0.0123), percent(1.0)
        ('1.23%', '100%')
    """
    return DASH if value is None else f"{number(100 * value)}%"


class Bar(NamedTuple):
    """A bar of the activation histogram, in the units of its drawing."""

    x: float
    height: float
    low: float
    high: float
    tokens: int


def bars(histogram: Histogram) -> list[Bar]:
    """The bars of a histogram in a drawing 100 high and 10 wide a bar; none is invisible but those of no count."""
    most = max(histogram.counts, default=0)
    ends = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    return [
        Bar(10 * place, round(max(100 * count / most, 1.5), 1) if count else 0, low, high, count)
        for place, (low, high, count) in enumerate(ends)
    ]


class Term(NamedTuple):
    """One kind of term of an account, beside what the two lists of pairs make of it."""

    name: str
    by_weight: float
    by_data: float


def terms(page: OutputFeature) -> list[Term]:
    """The account of a feature: the mean of each kind of term; those that are 0 both ways are left out."""
    first, second = page.by_weight.terms, page.by_data.terms
    listed = [Term(name, first.get(key, 0.0), second.get(key, 0.0)) for key, name in TERMS.items()]
    return [term for term in listed if term.by_weight or term.by_data or term.name == TERMS["shown"]]


def total(page: OutputFeature) -> float:
    """The mean pre-activation: what all terms add up to, whichever pairs are told apart."""
    return math.fsum(page.by_weight.terms.values())


def largest_of(values: Sequence[float]) -> float:
    """The largest |value|, 0 of none."""
    return max(map(abs, values), default=0.0)


def heat(matrix: list[list[float]]) -> list[list[tuple[str, str]]]:
    """(shade, value) of each cell of a heat map."""
    largest = largest_of([value for row in matrix for value in row])
    return [[(_shade(value, largest), number(value)) for value in row] for row in matrix]


def cut(context: Context, window: int) -> Context:
    """The same context with fewer tokens on either side."""
    start = max(context.focus - window, 0)
    part = slice(start, context.focus + window + 1)
    return dataclasses.replace(
        context,
        start=context.start + start,
        focus=context.focus - start,
        tokens=context.tokens[part],
        values=context.values[part],
        second=None if context.second is None else context.second[part],
    )


def without_second(context: Context) -> Context:
    """A context of a feature paired with itself, as one of the feature alone."""
    return dataclasses.replace(context, second=None)


def largest_in(context: Context, activity: Activity | None, second: bool = False) -> float:
    """What to shade a context by: the feature's largest activation, or the context's where the feature has no page."""
    if activity is not None:
        return activity.largest
    return largest_of((context.second if second else context.values) or [])


def name_of(origin: Provenance) -> str:
    """What the site is about."""
    return f"{origin.model}, layer {origin.layer}"


# Style


def style(*sheets: str) -> str:
    """Style sheets of ``static/``, after the shades of the palettes that the terminal output has too."""
    return "\n".join([shades(), *(read_static(sheet) for sheet in sheets)])


def shades() -> str:
    """A rule for each shade: ``.p1`` ... ``.p10`` for positive, ``.n1`` ... ``.n10`` for negative values.

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
    """A colour of either palette, as a style sheet writes the choice between them."""
    light, dark = ("#" + bytes(colour(palette)).hex() for palette in (rendering.LIGHT, rendering.DARK))
    return f"light-dark({light},{dark})"


def read_static(name: str) -> str:
    """A file of ``static/``."""
    return resources.files("bilinear_jax.pages").joinpath("static", name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bilinear_jax.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: rendering.visible(value) if type(value) is str else value,
    )
    environment.filters |= {"number": number, "percent": percent}
    helpers = (glyphs, bars, terms, total, largest_of, heat, cut, without_second, largest_in, name_of)
    environment.globals |= {helper.__name__: helper for helper in helpers}
    return environment
