"""Why an output feature fires: pairs of input features, eigenvectors, interactions between its inputs."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from bilinear_jax.cofiring import CoFiringSums, Observed, entries, largest, magnitudes, pair_products, pair_weights
from bilinear_jax.devices import one_blas_thread
from bilinear_jax.nn.sae import unit_columns
from bilinear_jax.pages.activity import Codes, Texts, best_of_rows, context
from bilinear_jax.pages.facts import Context, Eigenpair, HeatMap, Pair, PairList
from bilinear_jax.pages.options import PageOptions
from bilinear_jax.spectra import effective_rank
from bilinear_jax.summaries import AccountSums, PairSums, summary
from bilinear_jax.tracer import Tracer

FEATURES_AT_ONCE = 32  # output features whose matrices are held at once; it changes no result


@dataclasses.dataclass(frozen=True)
class Spectral:
    """What the weights alone say of one output feature."""

    norm: float
    effective_rank: float
    eigenpairs: list[Eigenpair]
    explained: float
    projected: float  # ||D^T Q D||^2, the squares of all interactions between input features


def spectra(tracer: Tracer, features: list[int], options: PageOptions) -> dict[int, Spectral]:
    """Norm, effective rank and eigenpairs of ||Q|| of each output feature.

    An eigenvector has no sign of its own: here the largest |cosine| of a decoder column with it is positive.
    """
    from tqdm.auto import tqdm

    found, k = {}, min(options.eigenpairs, tracer.tensor.n_in)
    columns = unit_columns(tracer.basis)
    with jax.default_matmul_precision("highest"):
        gram = tracer.basis @ tracer.basis.T
    with tqdm(total=len(features), desc="eigenvalues", disable=None) as bar:
        for start in range(0, len(features), FEATURES_AT_ONCE):
            some = features[start : start + FEATURES_AT_ONCE]
            # The last batch is filled up with its last feature, so that there is one shape to compile for.
            padded = np.pad(some, (0, min(FEATURES_AT_ONCE, len(features)) - len(some)), mode="edge")
            top = tracer.top_eigh(k, padded, exact=True)  # effective rank takes all eigenvalues anyway
            with one_blas_thread():
                ranks, norms, projected = jax.device_get(_sizes(tracer.q(padded), gram))
            with jax.default_matmul_precision("highest"):
                cosines = jax.device_get(top.vectors @ columns)
            values, bounds, explained = jax.device_get((top.values, top.bounds, top.explained))
            for place, feature in enumerate(some):
                square = float(norms[place]) ** 2
                pairs = [
                    Eigenpair(
                        float(value), float(bound), value**2 / square if square else 0.0, _reads(row, options.reads)
                    )
                    for value, bound, row in zip(
                        values[place].tolist(), bounds[place].tolist(), cosines[place], strict=True
                    )
                ]
                found[feature] = Spectral(
                    float(norms[place]), float(ranks[place]), pairs, float(explained[place]), float(projected[place])
                )
            bar.update(len(some))
    return found


@jax.jit
def _sizes(q, gram):
    """Effective rank, ||Q|| and |D^T Q D|_F^2 = tr(Q M Q M), with M = D D^T, of each matrix."""
    with jax.default_matmul_precision("highest"):
        product = q @ jnp.broadcast_to(gram, q.shape)
    squares = jnp.sum(product * product.swapaxes(1, 2), axis=(1, 2))
    return effective_rank(q), jnp.sqrt(jnp.sum(q**2, axis=(1, 2))), jnp.maximum(squares, 0)


def _reads(cosines: Float[np.ndarray, " features"], n: int) -> list[tuple[int, float]]:
    order = np.argsort(-np.abs(cosines), kind="stable")[:n]
    sign = -1 if cosines[order[0]] < 0 else 1
    return [(int(feature), float(sign * cosines[feature])) for feature in order]


@dataclasses.dataclass(frozen=True)
class Why:
    """The pairs of one output feature, as a page shows them."""

    by_weight: PairList
    by_data: PairList
    heat_map: HeatMap
    feeds: dict[int, tuple[int, float]]  # of each input feature that the page names: the other one, and the weight


class PairFinder:
    """Finds and sums up the pairs of one output feature after another, from what was observed once."""

    def __init__(
        self,
        tracer: Tracer,
        features: list[int],  # that were observed
        seen: Observed,
        codes: Codes,  # to show, of the input SAE
        texts: Texts,
        options: PageOptions,
    ):
        self.tracer, self.seen, self.options = tracer, seen, options
        self.codes, self.texts = codes, texts
        fired = CoFiringSums()
        fired.add(seen)
        account = AccountSums()
        account.add(seen)
        self.co, self.totals = fired.finished(), account.finished(tracer, features, fired)
        self.counted = seen.counted.tocsc()
        self.basis = np.asarray(tracer.basis, np.float64)

    def find(self, feature: int, column: int, firing: Int[np.ndarray, " n"], spectral: Spectral) -> Why:
        """Of an output feature, the column-th of those observed, that fires at some tokens."""
        size, co = self.basis.shape[1], self.co
        top = self.tracer.top_interactions(min(self.options.pairs, size * (size + 1) // 2), feature)
        by_weight = np.stack([top.i, top.j], axis=-1).astype(np.int32)[np.asarray(top.value) != 0]
        weights = pair_weights(self.tracer, feature, np.concatenate([co.pairs, by_weight]))
        weights, of_largest = np.split(weights, [len(co.pairs)])
        size = magnitudes(co, weights)
        best = largest(size, self.options.pairs)
        lists = [
            self._listed(pairs, some, column, firing, size.sum())
            for pairs, some in ((by_weight, of_largest), (co.pairs[best], weights[best]))
        ]
        # The first pair by weight, the first by data, the second by weight, ...
        both = itertools.chain(*itertools.zip_longest(*(found.pairs for found in lists)))
        inputs = list(dict.fromkeys(one for pair in both if pair is not None for one in (pair.i, pair.j)))
        read = {one for pair in spectral.eigenpairs for one, _ in pair.reads}
        heat_map, feeds = self._interactions(feature, inputs, sorted({*inputs, *read}), spectral.projected)
        return Why(lists[0], lists[1], heat_map, feeds)

    def _listed(
        self,
        pairs: Int[np.ndarray, "n 2"],
        weights: Float[np.ndarray, " n"],
        column: int,
        firing: Int[np.ndarray, " tokens"],
        whole: float,
    ) -> PairList:
        products = pair_products(self.counted, pairs)
        sums = PairSums()
        sums.add(products, self.seen.z[:, column])
        found = summary(pairs, weights, sums, self.totals[column], self.co, whole)
        fires = np.zeros(len(self.seen.counts))
        fires[firing] = 1
        when_firing = entries(pairs) * weights * (products.T @ fires) / max(len(firing), 1)
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
                contexts=self._contexts(int(i), int(j), products, m),
            )
            for m, (i, j) in enumerate(pairs)
        ]
        whole = found.r2[-1] if len(pairs) else np.nan
        return PairList(listed, _number(whole), _number(found.share), _number(found.share_of_pairs), dict(found.terms))

    def _contexts(self, i: int, j: int, products: sparse.csc_array, m: int) -> list[Context]:
        """Where the product of two codes is largest, each time in another row."""
        part = slice(products.indptr[m], products.indptr[m + 1])
        places = products.indices[part]
        rows = places // self.texts.tokens.shape[1]
        chosen = best_of_rows(rows, np.abs(products.data[part]))[: self.options.pair_contexts]
        return [context(self.texts, self.codes, i, int(places[one]), self.options.window, second=j) for one in chosen]

    def _interactions(
        self, feature: int, inputs: list[int], named: list[int], whole: float
    ) -> tuple[HeatMap, dict[int, tuple[int, float]]]:
        """The heat map of the first of ``inputs``, and with which of those that the page names each acts most."""
        # On the host: the number of features differs from page to page, and JAX would compile for each.
        q = np.asarray(self.tracer.q(feature), np.float64)
        columns = self.basis[:, named]
        matrix = columns.T @ q @ columns
        partner = np.argmax(np.abs(matrix), axis=1)
        feeds = {one: (named[partner[k]], float(matrix[k, partner[k]])) for k, one in enumerate(named)}
        shown = inputs[: self.options.heat_map]
        place = [named.index(one) for one in shown]
        part = matrix[np.ix_(place, place)]
        return HeatMap(shown, part.tolist(), float(np.sum(part**2) / whole) if whole > 0 else 0.0), feeds


def _number(value) -> float | None:
    return None if math.isnan(value) else float(value)
