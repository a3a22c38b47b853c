"""Why an output feature fires, as a page shows it: its pairs of input features and their interactions."""

import dataclasses
import itertools
import math

import numpy as np
from jaxtyping import Float

from bilinear_jax.measure.pairs import MeasuredPairs, PairsOnData
from bilinear_jax.pages.activity import Codes, Texts, context
from bilinear_jax.pages.facts import HeatMap, Pair, PairList
from bilinear_jax.pages.options import PageOptions


@dataclasses.dataclass(frozen=True)
class Why:
    """The pairs of one output feature, as a page shows them."""

    by_weight: PairList
    by_data: PairList
    heat_map: HeatMap
    feeds: dict[int, tuple[int, float]]  # for each input feature on the page: its partner in its pair of largest
    # |weight|, and that weight


def lay_out(
    measured: MeasuredPairs,
    codes: Codes,  # of the input SAE, to show
    texts: Texts,
    options: PageOptions,
) -> Why:
    """The part of a page that says why an output feature fires."""
    both = (measured.by_weight, measured.by_data)
    lists = [_listed(some, codes, texts, options) for some in both]
    # The first pair by weight, the first by data, the second by weight, ...
    mixed = itertools.chain(*itertools.zip_longest(*(found.pairs for found in lists)))
    inputs = list(dict.fromkeys(one for pair in mixed if pair is not None for one in (pair.i, pair.j)))
    named, matrix = measured.named, measured.between
    partner = np.argmax(np.abs(matrix), axis=1)
    feeds = {one: (named[partner[k]], float(matrix[k, partner[k]])) for k, one in enumerate(named)}
    heat_map = _heat_map(inputs[: options.heat_map], named, matrix, measured.projected)
    return Why(lists[0], lists[1], heat_map, feeds)


def _listed(some: PairsOnData, codes: Codes, texts: Texts, options: PageOptions) -> PairList:
    found = some.summary
    listed = [
        Pair(
            i=int(i),
            j=int(j),
            weight=float(found.weight[m]),
            mean=float(found.mean[m]),
            joint=float(found.joint[m]),
            everywhere=float(some.everywhere[m]),
            interference=bool(found.weight[m] != 0 and some.everywhere[m] == 0),
            r2=_number(found.r2[m]),
            contexts=[
                context(texts, codes, int(i), int(place), options.window, second=int(j)) for place in some.strongest[m]
            ],
        )
        for m, (i, j) in enumerate(found.pairs)
    ]
    whole = found.r2[-1] if len(found.pairs) else np.nan
    return PairList(listed, _number(whole), _number(found.share), _number(found.share_of_pairs), dict(found.terms))


def _heat_map(shown: list[int], named: list[int], matrix: Float[np.ndarray, "m m"], whole: float) -> HeatMap:
    """The interactions between the input features of the heat map, cut out of those between all on the page."""
    place = [named.index(one) for one in shown]
    part = matrix[np.ix_(place, place)]
    return HeatMap(shown, part.tolist(), float(np.sum(part**2) / whole) if whole > 0 else 0.0)


def _number(value) -> float | None:
    return None if math.isnan(value) else float(value)
