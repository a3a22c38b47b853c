"""Feature pages as HTML: facts in, a string out. The same input gives the same bytes.

Each part of a page is a macro of ``show/templates/parts.html``. The pages of a site and the output in a notebook use
the same parts. Escaping and number formats are in ``show.html``.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bilinear_jax.explain.account import TERMS
from bilinear_jax.pages.facts import Activity, Histogram, InputFeature, Making, OutputFeature, Provenance, Site
from bilinear_jax.show.html import MINUS, Context, Html, environment, fragment, largest_of, number, percent, shade

ROOM = "bilinear_jax.pages"
SHOWN = {"shown": "the pairs shown"} | TERMS | {"pairs": "all other pairs of input features"}
"""The kinds of terms of an account as a page lists them: the pairs that it shows have their own line."""


# Pages


def index_page(site: Site) -> str:
    """The table of output features."""
    return _page("index.html", site, root="", here="outputs")


def inputs_page(site: Site) -> str:
    """The table of input features."""
    return _page("inputs.html", site, root="", here="inputs")


def output_page(site: Site, place: int) -> str:
    """The page of one output feature; ``place`` is its index in ``site.outputs``."""
    around = _around([page.activity.feature for page in site.outputs], place, "output")
    return _page("output.html", site, root="../", here="output", page=site.outputs[place], **around)


def input_page(site: Site, place: int) -> str:
    """The page of one input feature; ``place`` is its index in ``site.inputs``."""
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
    return environment(HELPERS, (ROOM,)).get_template(template).render(values)


def notebook(fact: OutputFeature | InputFeature | Site) -> Html:
    """HTML for a notebook: the page of a feature without links, or the table of a site's output features."""
    if isinstance(fact, Site):
        return fragment("site", HELPERS, site=fact)
    return fragment("output" if isinstance(fact, OutputFeature) else "input", HELPERS, page=fact)


# What the templates compute with


class Bar(NamedTuple):
    """A bar of the activation histogram, in the units of the drawing."""

    x: float
    height: float
    low: float
    high: float
    tokens: int


def bars(histogram: Histogram) -> list[Bar]:
    """The bars of a histogram, each 10 wide and at most 100 high. Every bar with a count above 0 can be seen."""
    most = max(histogram.counts, default=0)
    ends = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    return [
        Bar(10 * place, round(max(100 * count / most, 1.5), 1) if count else 0, low, high, count)
        for place, (low, high, count) in enumerate(ends)
    ]


class Term(NamedTuple):
    """One kind of term of an account: its mean for each of the two lists of pairs."""

    name: str
    by_weight: float
    by_data: float


def terms(page: OutputFeature) -> list[Term]:
    """The account of a feature: the mean of each kind of term. Terms that are 0 for both lists are left out."""
    first, second = page.by_weight.terms, page.by_data.terms
    listed = [Term(name, first.get(key, 0.0), second.get(key, 0.0)) for key, name in SHOWN.items()]
    return [term for term in listed if term.by_weight or term.by_data or term.name == SHOWN["shown"]]


def largest_share(made: Making) -> float:
    """The largest |share| of an eigenpair, or of all others."""
    return largest_of([others(made), *(square.share or 0.0 for square in made.squares)])


def signed(value: float) -> str:
    """A contribution with its sign and two decimals: those of one table can be compared.

    Example:
        >>> signed(0.128), signed(-0.004)
        ('+0.13', '0.00')
    """
    text = f"{value:+.2f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def others(made: Making) -> float:
    """The share of the eigenpairs that are not listed."""
    return 1 - math.fsum(square.share or 0.0 for square in made.squares)


def sentence_of_squares(made: Making) -> str:
    """What the first eigenpairs add where the feature fires, in words."""
    first = max(made.squares, key=lambda square: square.share or 0.0)
    place, n = 1 + made.squares.index(first), len(made.squares)
    return (
        f"Its pre-activation is a sum of squares. Where it fires, number {place} is {percent(first.share)} of the sum, "
        f"and the {n} listed are {percent(1 - others(made))}."
    )


def sentence_of_scores(made: Making) -> str:
    """How well they say where it fires, beside the best control, in words."""
    best, control = _best(made), _best(made, control=True)
    if best is None or control is None:
        return "It fires too seldom there to say."
    (name, precision), (other, its) = best, control
    found = f"{name} say where it fires with an average precision of {number(precision, 2)}"
    against = f"the best control, {other}, has {number(its, 2)}"
    matched = " That says nothing of this feature." if its >= precision else ""
    return f"{found[0].upper()}{found[1:]} (1 is perfect); {against}.{matched}"


def explained(made: Making | None, control: bool = False) -> float | None:
    """The average precision of the first eigenpairs, or of the best control; None if there is none."""
    found = made and _best(made, control)
    return found[1] if found else None


def _best(made: Making, control: bool = False) -> tuple[str, float] | None:
    """The average precision of the eigenpairs that are listed, or of the best control, with its name."""
    some = [
        (score.name, score.average_precision)
        for score in made.scores[:-1]
        if score.control == control and score.average_precision is not None
    ]
    if not some:
        return None
    return max(some, key=lambda one: one[1]) if control else some[-1]


def total(page: OutputFeature) -> float:
    """The mean pre-activation where the feature fires, which is the sum of all terms."""
    return math.fsum(page.by_weight.terms.values())


def heat(matrix: list[list[float]]) -> list[list[tuple[str, str]]]:
    """(shade, value) of each cell of a heat map."""
    largest = largest_of([value for row in matrix for value in row])
    return [[(shade(value, largest), number(value)) for value in row] for row in matrix]


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
    """The context of a pair of a feature with itself, as the context of one feature."""
    return dataclasses.replace(context, second=None)


def largest_in(context: Context, activity: Activity | None, second: bool = False) -> float:
    """The activation with the strongest shade: the feature's largest, or the context's if the feature has no page."""
    if activity is not None:
        return activity.largest
    return largest_of((context.second if second else context.values) or [])


def name_of(origin: Provenance) -> str:
    """The title of the site."""
    return f"{origin.model}, layer {origin.layer}"


HELPERS = (
    *(bars, terms, total, heat, cut, without_second, largest_in, name_of),
    *(explained, largest_share, others, sentence_of_squares, sentence_of_scores, shade, signed),
)
"""Functions that the templates call, in addition to those of ``show.html``."""
