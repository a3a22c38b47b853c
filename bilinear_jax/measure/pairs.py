"""How much of an output feature some pairs of input features explain over a dataset.

The pairs may be those of largest weight (``Tracer.top_interactions``) or those that contribute most on the data
(``strongest_pairs``). The summary says how often each pair fires, what it contributes to the pre-activation, and how
much of the pre-activation all of them together explain.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain.account import TERMS
from bilinear_jax.explain.interactions import Interactions
from bilinear_jax.explain.overview import FeatureWeights, pair_weights
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.measure.cofiring import (
    CoFiring,
    CoFiringSums,
    Observed,
    best_of_rows,
    entries,
    largest,
    magnitudes,
    observe,
    pair_products,
)


@dataclasses.dataclass(frozen=True)
class PairSummary:
    """What some pairs of input features do to one output feature over a dataset, and what they leave out.

    A pair of two features stands for both of its entries, (i, j) and (j, i).
    """

    pairs: Int[np.ndarray, "n 2"]  # the input features of each, in the order given; n_features: the constant input
    weight: Float[np.ndarray, " n"]  # (D^T Q D)_ij
    mean: Float[np.ndarray, " n"]  # mean contribution to the pre-activation over the tokens in the mask, signed
    mean_magnitude: Float[np.ndarray, " n"]  # mean |contribution|
    joint: Float[np.ndarray, " n"]  # share of the tokens, 0 to 1, at which both features fire
    rates: Float[np.ndarray, "n 2"]  # share of the tokens at which each feature of the pair fires
    r2: Float[np.ndarray, " n"]  # of the first 1 ... n pairs: how well their sum predicts; see pair_summaries
    terms: Mapping[str, float]  # mean of "shown" (these pairs), of the other "pairs", and of every other kind of term
    # of the account; they add up to the mean pre-activation
    magnitude_pairs: float  # mean over tokens of the sum of |c_i c_j (D^T Q D)_ij| over all pairs
    magnitude: float  # the same of all terms
    tokens: int  # number of tokens in the mask

    @property
    def interference(self) -> np.ndarray:
        """``[n]`` bool: the pair has a weight, but its features never fire together on this data.

        Compare with ``chance * tokens``, the number of tokens at which they would fire together by chance.
        """
        return (self.weight != 0) & (self.joint == 0)

    @property
    def chance(self) -> np.ndarray:
        """``[n]``: the rate at which both would fire if they were independent."""
        return np.where(self.pairs[:, 0] == self.pairs[:, 1], self.rates[:, 0], self.rates.prod(axis=1))

    @property
    def share(self) -> float:
        """The share of these pairs in the sum of all |terms| of the account, 0 to 1; nan if all are 0.

        Each pair and each input feature is one term. Absolute values are summed, so terms that cancel do not count as
        explained.
        """
        return _ratio(self.mean_magnitude.sum(), self.magnitude)

    @property
    def share_of_pairs(self) -> float:
        """The share of these pairs in the sum of the |terms| of all pairs, 0 to 1; nan if all are 0."""
        return _ratio(self.mean_magnitude.sum(), self.magnitude_pairs)


def pair_summaries(
    tracer: Tracer, tokens, pairs: Mapping[int, Any], *, token_mask=None, batch_size: int = 16
) -> dict[int, PairSummary]:
    """What some pairs of input features do to output features over a token dataset, in one pass over it.

        s_m          the sum of the contributions of an output feature's first m pairs
        r2[m - 1]    1 - var(z - s_m) / var(z)                          z: its pre-activation

    R^2 is that of the prediction ``z = s_m + constant``, with the best constant and no fitted factor. It is 1 if the
    pairs explain all variation of z, 0 if they explain as much as no pair does, and negative if other terms cancel
    what they contribute. It is nan if z is constant. Sums over tokens are in float64 and are divided once, so the
    result does not depend on ``batch_size``. A progress bar shows on a terminal.

    Args:
        tracer: with ``use_encoder=True``; its model is run, as by ``account``, which says what its SAEs may be.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        pairs: the pairs of each output feature, ``{feature: pairs}``, in the order in which they are summed up: what
            ``tracer.top_interactions(n, feature)`` or ``strongest_pairs`` returns, or input features ``[n, 2]``. (i, j)
            and (j, i) are the same pair.
        token_mask: ``[rows, seq]``; by default the tokens that count (see ``LanguageModel.batches``). Pass the tokens
            at which an output feature fires to measure at these only.
        batch_size: rows that are run through the model at once.

    Returns:
        The ``PairSummary`` of each output feature.

    Raises:
        ValueError: if the directions of the tracer are decoder columns; if an output feature has no pair, a pair twice,
            or pairs that were found for another output feature; if the tokens or the mask do not fit or leave no
            token; or if an activation is not finite.
        UnknownNameError: for an output feature or an input feature that does not exist.

    Memory: that of ``co_firing`` and of ``strongest_pairs``; ``batch seq (features + 4 d_hidden + 12 U)`` numbers for U
    output features; and 40 bytes for every token of a batch and every pair of one output feature that fires there.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> text = lm.encode("One day, a little girl named Lily found a needle in her room.")
        >>> found = bj.pair_summaries(tracer, text, {7: tracer.top_interactions(n=5, feature=7)})[7]
        >>> found.mean.shape, bool(0 <= found.share <= found.share_of_pairs <= 1)
        ((5,), True)
        >>> bool(np.all(found.mean[found.interference] == 0))
        True
    """
    check_request(pairs)
    tracer.require_encoder()
    chosen = {feature: checked_pairs(tracer, feature, given) for feature, given in pairs.items()}
    weights = {f: pair_weights(tracer.q(f), tracer.basis, some) for f, some in chosen.items()}
    fired, sums, found = CoFiringSums(), AccountSums(), {feature: PairSums() for feature in pairs}
    options = {"token_mask": token_mask, "batch_size": batch_size, "description": "pairs of input features"}
    for seen in observe(tracer, tokens, list(pairs), **options):
        fired.add(seen)
        sums.add(seen)
        codes = seen.counted.tocsc()
        for column, (feature, some) in enumerate(chosen.items()):
            found[feature].add(pair_products(codes, some), seen.z[:, column])

    co, result = fired.finished(), {}
    for total, (feature, some) in zip(sums.finished(fired), chosen.items(), strict=True):
        whole = magnitudes(co, pair_weights(tracer.q(feature), tracer.basis, co.pairs)).sum()
        result[feature] = summary(some, weights[feature], found[feature], total, co, whole)
    return result


@dataclasses.dataclass(frozen=True)
class Totals:
    """The means of all terms of one output feature over a dataset, whichever pairs are chosen."""

    terms: dict[str, float]  # mean of each kind
    others: float  # mean over tokens of the sum of all |terms| that are not pairs
    z: Float[np.ndarray, "2"]  # mean of the pre-activation, and of its square


class AccountSums:
    """Sums over tokens of the terms of some output features' accounts, batch by batch."""

    def __init__(self):
        self.terms: Any = 0  # [U, 7]
        self.magnitude: Any = 0  # [U, 7]
        self.z: Any = 0  # [2, U]
        self.encoder: Any = 0  # [U]
        self.with_bias: Any = 0  # [U, features]

    def add(self, seen: Observed) -> None:
        self.encoder, self.with_bias = seen.encoder, seen.with_bias
        self.terms, self.magnitude = self.terms + seen.terms, self.magnitude + seen.magnitude
        squares = np.einsum("tu,tu->u", seen.z, seen.z, dtype=np.float64)
        self.z = self.z + np.stack([seen.z.sum(axis=0, dtype=np.float64), squares])

    def finished(self, fired: CoFiringSums) -> list[Totals]:
        """The totals of each output feature, in the order in which they were observed."""
        terms = np.concatenate([self.terms / fired.tokens, self.encoder[:, None]], axis=1)
        others = np.abs(self.with_bias) @ fired.scaled + self.magnitude[:, 2:].sum(axis=1)
        others = others / fired.tokens + np.abs(self.encoder)
        return [
            Totals(dict(zip(TERMS, map(float, terms[u]), strict=True)), float(others[u]), self.z[:, u] / fired.tokens)
            for u in range(len(terms))
        ]


class PairSums:
    """Sums over tokens of the products c_i c_j of some pairs, batch by batch."""

    def __init__(self):
        self.product: Any = 0  # [n]
        self.squares: Any = 0  # [n, n]: the product of each pair with each pair
        self.with_z: Any = 0  # [n]

    def add(self, products: sparse.csc_array, z: Float[np.ndarray, " tokens"]) -> None:
        self.product = self.product + products.sum(axis=0)
        self.squares = self.squares + (products.T @ products).toarray()
        self.with_z = self.with_z + products.T @ z.astype(np.float64)


def summary(
    pairs: Int[np.ndarray, "n 2"],
    weights: Float[np.ndarray, " n"],
    sums: PairSums,
    totals: Totals,
    co: CoFiring,
    whole: float,  # the sum of co's ``magnitudes``
) -> PairSummary:
    """The ``PairSummary`` of one output feature's pairs, from sums over the dataset."""
    here, alone = co.find(pairs), co.find(np.repeat(pairs, 2, axis=1).reshape(-1, 2))
    acts = entries(pairs) * weights
    mean = acts * here.product / co.tokens
    # The first two moments of z, and of z without the first m pairs.
    first = np.cumsum(acts * sums.product)
    squares = np.diag(np.cumsum(np.cumsum(acts[:, None] * sums.squares * acts, axis=0), axis=1))
    second = squares - 2 * np.cumsum(acts * sums.with_z)
    moments = totals.z[:, None] + np.concatenate([np.zeros((2, 1)), np.stack([-first, second]) / co.tokens], axis=1)
    return PairSummary(
        pairs=pairs,
        weight=weights,
        mean=mean,
        mean_magnitude=np.abs(acts) * here.magnitude / co.tokens,
        joint=here.count / co.tokens,
        rates=alone.count.reshape(-1, 2) / co.tokens,
        r2=_r2(moments),
        terms={"shown": float(mean.sum()), **totals.terms, "pairs": totals.terms["pairs"] - float(mean.sum())},
        magnitude_pairs=float(whole / co.tokens),
        magnitude=float(whole / co.tokens + totals.others),
        tokens=co.tokens,
    )


class PairMeasurer:
    """Sums up the pairs of one output feature after another over the tokens at which it fires.

    All of them were observed together, by ``cofiring.observe_all``.
    """

    def __init__(self, seen: Observed, seq: int):  # seq: tokens in a row of the dataset
        self.seen, self.seq = seen, seq
        fired = CoFiringSums()
        fired.add(seen)
        self.everywhere = fired.finished()

    def measure(
        self,
        weights: FeatureWeights,
        column: int,
        firing: Int[np.ndarray, " m"],
        *,
        n: int,
        places: int,
        also: Iterable[int] = (),
    ) -> "MeasuredPairs":
        """Sum up the pairs of largest weight, and the n pairs that contribute most where the output feature fires.

        Args:
            column: the place of the output feature among those observed.
            firing: the tokens at which it fires.
            places: for each pair, how many of these to find at which both of its features fire most.
            also: input features to name beside those of the pairs and the eigenvectors.
        """
        here, fired, account = self.seen.where(column, firing), CoFiringSums(), AccountSums()
        fired.add(here)
        account.add(here)
        fired.tokens = max(fired.tokens, 1)  # of a feature that never fires, every sum is 0
        co = fired.finished()
        (totals,) = account.finished(fired)
        by_weight = weights.pairs[weights.weights != 0]
        of_pairs = weights.weights_of(np.concatenate([co.pairs, by_weight]))
        of_pairs, of_largest = np.split(of_pairs, [len(co.pairs)])
        size = magnitudes(co, of_pairs)
        best = largest(size, n)

        def summed(pairs, its_weights) -> PairsOnData:
            products, sums = pair_products(here.counted.tocsc(), pairs), PairSums()
            sums.add(products, here.z[:, 0])
            found = summary(pairs, its_weights, sums, totals, co, size.sum())
            strongest = []
            for start, stop in itertools.pairwise(products.indptr):
                tokens = firing[products.indices[start:stop]]
                strongest.append(tokens[best_of_rows(tokens // self.seq, np.abs(products.data[start:stop]))[:places]])
            everywhere = self.everywhere.find(pairs)
            return PairsOnData(found, everywhere.count / everywhere.tokens, strongest)

        first, second = summed(by_weight, of_largest), summed(co.pairs[best], of_pairs[best])
        read = {feature for pair in weights.eigenpairs for feature, _ in pair.reads}
        named = {int(feature) for some in (first, second) for feature in some.summary.pairs.ravel()}
        everything = sorted({*read, *named, *also})
        return MeasuredPairs(first, second, everything, weights.between(everything), weights.projected)


class PairsOnData(NamedTuple):
    """What some pairs of one output feature do where it fires."""

    summary: PairSummary  # over the tokens at which it fires
    everywhere: Float[np.ndarray, " n"]  # share of all tokens at which both features of the pair fire
    strongest: list[Int[np.ndarray, " places"]]  # for each pair, the tokens of the largest |c_i c_j|, one a row


class MeasuredPairs(NamedTuple):
    """The pairs of one output feature: those chosen by weight, and those chosen by their contribution on the data."""

    by_weight: PairsOnData
    by_data: PairsOnData
    named: list[int]  # the input features of both, and those that the eigenvectors read, ascending
    between: Float[np.ndarray, "m m"]  # D^T Q D between these input features
    projected: float  # |D^T Q D|^2, of all input features


def check_request(pairs: Mapping[int, Any]) -> None:
    """Raises ``ValueError`` unless ``pairs`` maps at least one output feature to its pairs."""
    if not isinstance(pairs, Mapping) or not pairs:
        raise ValueError("pairs must map at least one output feature to its pairs, such as {7: [(3, 12)]}")


def checked_pairs(tracer: Tracer, feature: int, pairs) -> Int[np.ndarray, "n 2"]:
    """The pairs that were given for an output feature, as int32.

    Raises:
        ValueError: if they have another shape or type, were found for another output feature, or name a pair twice.
        UnknownNameError: for an input feature that does not exist.
    """
    if isinstance(pairs, Interactions):
        other = np.asarray(pairs.out)[np.asarray(pairs.out) != feature]
        if other.size:
            raise ValueError(
                f"the pairs given for output feature {feature} were found for {other[0]}: give those of {feature}"
            )
        pairs = np.stack([pairs.i, pairs.j], axis=-1)
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(
            f"the pairs of output feature {feature} are {pairs.dtype} of shape {pairs.shape}, but they must be ints "
            "[n, 2] with n at least 1"
        )
    features = tracer.basis.shape[1]
    outside = pairs[(pairs < 0) | (pairs >= features)]
    if outside.size:
        raise UnknownNameError("feature", outside[0], range(features), of=f"SAE {tracer.inp.name}")
    distinct, times = np.unique(np.sort(pairs, axis=1), axis=0, return_counts=True)
    if (times > 1).any():
        i, j = distinct[times > 1][0]
        raise ValueError(
            f"the pair ({i}, {j}) of output feature {feature} is given twice: give it once. (i, j) and (j, i) are the "
            "same pair"
        )
    return pairs.astype(np.int32)


def _r2(means: Float[np.ndarray, "2 values"]) -> Float[np.ndarray, " n"]:
    """R^2 from the means of z and of what remains of it, and from the means of their squares."""
    mean, square = means
    variance = np.maximum(square - mean**2, 0)
    if variance[0] <= 1e-12 * square[0]:  # a relative standard deviation of 1e-6 is float32 rounding
        return np.full(len(variance) - 1, np.nan)
    return 1 - variance[1:] / variance[0]


def _ratio(numerator, denominator) -> float:
    return float(numerator) / float(denominator) if denominator else float("nan")
