"""Why an output feature fires, as a page shows it: its pairs of input features and their interactions."""

import dataclasses
import itertools
import math

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from bilinear_jax.measure.cofiring import entries
from bilinear_jax.measure.pairs import MeasuredPairs, PairsOnData
from bilinear_jax.pages.activity import Codes, Texts, best_of_rows, context
from bilinear_jax.pages.facts import Context, HeatMap, Pair, PairList
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
    projected: float,  # |D^T Q D|^2
    firing: Int[np.ndarray, " n"],  # the tokens at which the output feature fires
    codes: Codes,  # of the input SAE, to show
    texts: Texts,
    options: PageOptions,
) -> Why:
    """The part of a page that says why an output feature fires."""
    both = (measured.by_weight, measured.by_data)
    lists = [_listed(some, firing, codes, texts, options) for some in both]
    # The first pair by weight, the first by data, the second by weight, ...
    mixed = itertools.chain(*itertools.zip_longest(*(found.pairs for found in lists)))
    inputs = list(dict.fromkeys(one for pair in mixed if pair is not None for one in (pair.i, pair.j)))
    named, matrix = measured.named, measured.between
    partner = np.argmax(np.abs(matrix), axis=1)
    feeds = {one: (named[partner[k]], float(matrix[k, partner[k]])) for k, one in enumerate(named)}
    heat_map = _heat_map(inputs[: options.heat_map], named, matrix, projected)
    return Why(lists[0], lists[1], heat_map, feeds)


def _listed(
    some: PairsOnData, firing: Int[np.ndarray, " n"], codes: Codes, texts: Texts, options: PageOptions
) -> PairList:
    found, products = some
    fires = np.zeros(len(codes.counts))
    fires[firing] = 1
    when_firing = entries(found.pairs) * found.weight * (products.T @ fires) / max(len(firing), 1)
    listed = [
        Pair(
            i=int(i),
            j=int(j),
            weight=float(found.weight[m]),
            mean=float(found.mean[m]),
            mean_when_firing=float(when_firing[m]) if len(firing) else None,
            joint=float(found.joint[m]),
            chance=float(found.chance[m]),
            interference=bool(found.interference[m]),
            r2=_number(found.r2[m]),
            contexts=_contexts(int(i), int(j), products, m, codes, texts, options),
        )
        for m, (i, j) in enumerate(found.pairs)
    ]
    whole = found.r2[-1] if len(found.pairs) else np.nan
    return PairList(listed, _number(whole), _number(found.share), _number(found.share_of_pairs), dict(found.terms))


def _contexts(
    i: int, j: int, products: sparse.csc_array, m: int, codes: Codes, texts: Texts, options: PageOptions
) -> list[Context]:
    """Contexts in which the |product| of two codes is largest, each from another row."""
    part = slice(products.indptr[m], products.indptr[m + 1])
    places = products.indices[part]
    rows = places // texts.tokens.shape[1]
    chosen = best_of_rows(rows, np.abs(products.data[part]))[: options.pair_contexts]
    return [context(texts, codes, i, int(places[one]), options.window, second=j) for one in chosen]


def _heat_map(shown: list[int], named: list[int], matrix: Float[np.ndarray, "m m"], whole: float) -> HeatMap:
    """The interactions between the input features of the heat map, cut out of those between all on the page."""
    place = [named.index(one) for one in shown]
    part = matrix[np.ix_(place, place)]
    return HeatMap(shown, part.tolist(), float(np.sum(part**2) / whole) if whole > 0 else 0.0)


def _number(value) -> float | None:
    return None if math.isnan(value) else float(value)
