"""What a choice of pairs of input features says of an output feature over a dataset, and how much it leaves out.

The pairs may be those of largest weight (``Tracer.top_interactions``) or those that do most on the data
(``cofiring.strongest_pairs``): either way a summary says how often each pair fires, what it contributes, and how much
of the pre-activation all of them together are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from bilinear_jax.attribution import TERMS, encoder_constant
from bilinear_jax.cofiring import (
    CoFiring,
    CoFiringSums,
    Observed,
    entries,
    magnitudes,
    observe,
    pair_products,
    pair_weights,
)
from bilinear_jax.correlation import check_tracer
from bilinear_jax.interactions import Interactions
from bilinear_jax.language import LanguageModel
from bilinear_jax.tracer import Tracer


@dataclasses.dataclass(frozen=True)
class PairSummary:
    """What some pairs of input features do to one output feature over a dataset, and what they leave out.

    A pair of two features stands for both of its entries, (i, j) and (j, i).
    """

    pairs: Int[np.ndarray, "n 2"]  # the input features of each, in the order given; n_features: the constant input
    weight: Float[np.ndarray, " n"]  # (D^T Q D)_ij
    mean: Float[np.ndarray, " n"]  # mean contribution to the pre-activation over the tokens that count, signed
    mean_magnitude: Float[np.ndarray, " n"]  # mean |contribution|
    joint: Float[np.ndarray, " n"]  # share of the tokens, 0 to 1, at which both features fire
    rates: Float[np.ndarray, "n 2"]  # share of the tokens at which each feature of the pair fires
    r2: Float[np.ndarray, " n"]  # of the first 1 ... n pairs: how well their sum predicts; see pair_summaries
    terms: Mapping[str, float]  # mean of "shown" pairs, of the other "pairs", and of each other kind of term of the
    # account; they add up to the mean pre-activation
    magnitude_pairs: float  # mean over tokens of the sum of |c_i c_j (D^T Q D)_ij| over all pairs
    magnitude: float  # the same of all terms
    tokens: int  # how many tokens count

    @property
    def interference(self) -> np.ndarray:
        """``[n]`` bool: it has a weight, and never fires: it tells of the weights, and of nothing on this data.

        How much that means depends on how often the two would meet, ``chance * tokens`` times if by chance.
        """
        return (self.weight != 0) & (self.joint == 0)

    @property
    def chance(self) -> np.ndarray:
        """``[n]``: the joint firing rate of two features with these rates that know nothing of each other."""
        return np.where(self.pairs[:, 0] == self.pairs[:, 1], self.rates[:, 0], self.rates.prod(axis=1))

    @property
    def share(self) -> float:
        """The share of all |terms| that these pairs are, 0 to 1; nan if all are 0.

        By absolute values, each pair and each input feature a term: what cancels is not taken for explained.
        """
        return _ratio(self.mean_magnitude.sum(), self.magnitude)

    @property
    def share_of_pairs(self) -> float:
        """The same, of the |terms| of pairs alone."""
        return _ratio(self.mean_magnitude.sum(), self.magnitude_pairs)


def pair_summaries(
    tracer: Tracer, lm: LanguageModel, tokens, pairs: Mapping[int, Any], *, token_mask=None, batch_size: int = 16
) -> dict[int, PairSummary]:
    """What some pairs of input features do to some output features over a token dataset, in one pass of the model.

        s_m          the sum of the contributions of an output feature's first m pairs
        r2[m - 1]    1 - var(z - s_m) / var(z)                          z: its pre-activation

    R^2 is that of ``z = s_m + constant`` with the constant that suits best, and no factor fitted: 1 where the pairs say
    all that varies, 0 where they say as much as none, and negative where they say what other terms take back. It is nan
    where z is constant. Sums over tokens are taken in float64 and divided once: the result doesn't depend on
    ``batch_size``. A progress bar shows on a terminal.

    Args:
        tracer: of this model, with ``use_encoder=True``; see ``attribution.account`` for its SAEs.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        pairs: for each output feature its pairs, in the order in which they are shown: what
            ``tracer.top_interactions(n, feature)`` or ``strongest_pairs`` found, or ``[n, 2]`` input features. (i, j)
            and (j, i) are one.
        token_mask: ``[rows, seq]``, the tokens that count; by default all but position 0 and the padding at the end of
            each row. Give the tokens at which an output feature fires, to learn about these alone.
        batch_size: rows that are run through the model at once.

    Raises:
        ValueError: if the tracer has decoder columns as its directions or belongs to another model; if an output
            feature has no pair, one twice, one that was found for another output feature, or one of an input feature
            that doesn't exist; if tokens or mask don't fit or leave nothing; or if an activation is not finite.
        IndexError: if there is no such output feature.

    Memory: that of ``co_firing`` and of ``strongest_pairs``; ``batch seq (features + 4 d_hidden + 12 U)`` numbers for U
    output features; and 40 bytes for every token of a batch and pair of one output feature that fires there.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> text = lm.encode("One day, a little girl named Lily found a needle in her room.")
        >>> found = bj.summaries.pair_summaries(tracer, lm, text, {7: tracer.top_interactions(n=5, feature=7)})[7]
        >>> found.mean.shape, bool(0 <= found.share <= found.share_of_pairs <= 1)
        ((5,), True)
        >>> bool(np.all(found.mean[found.interference] == 0))
        True
    """
    check_request(pairs)
    check_tracer(tracer, lm)
    chosen = {feature: checked_pairs(tracer, feature, given) for feature, given in pairs.items()}
    weights = {feature: pair_weights(tracer, feature, some) for feature, some in chosen.items()}
    fired, sums, found = CoFiringSums(), AccountSums(), {feature: PairSums() for feature in pairs}
    options = {"token_mask": token_mask, "batch_size": batch_size, "description": "pairs of input features"}
    for seen in observe(tracer, lm, tokens, list(pairs), **options):
        fired.add(seen)
        sums.add(seen)
        codes = seen.counted.tocsc()
        for column, (feature, some) in enumerate(chosen.items()):
            found[feature].add(pair_products(codes, some), seen.z[:, column])

    co, result = fired.finished(), {}
    totals = sums.finished(tracer, list(pairs), fired)
    for total, (feature, some) in zip(totals, chosen.items(), strict=True):
        whole = magnitudes(co, pair_weights(tracer, feature, co.pairs)).sum()
        result[feature] = summary(some, weights[feature], found[feature], total, co, whole)
    return result


@dataclasses.dataclass(frozen=True)
class Totals:
    """What the terms of one output feature come to over a dataset, whatever pairs are shown of it."""

    terms: dict[str, float]  # mean of each kind
    others: float  # mean over tokens of the sum of all |terms| that are no pairs
    z: Float[np.ndarray, "2"]  # mean of the pre-activation, and of its square


class AccountSums:
    """Sums over tokens of what the account of each of some output features is made of, batch by batch."""

    def __init__(self):
        self.terms: Any = 0  # [U, 6]
        self.magnitude: Any = 0  # [U, 6]
        self.z: Any = 0  # [2, U]

    def add(self, seen: Observed) -> None:
        self.terms, self.magnitude = self.terms + seen.terms, self.magnitude + seen.magnitude
        squares = np.einsum("tu,tu->u", seen.z, seen.z, dtype=np.float64)
        self.z = self.z + np.stack([seen.z.sum(axis=0, dtype=np.float64), squares])

    def finished(self, tracer: Tracer, features: list[int], fired: CoFiringSums) -> list[Totals]:
        """Of each output feature, in the order in which they were observed."""
        encoder = np.asarray(encoder_constant(tracer.out, np.asarray(features, np.int32)), np.float64)
        terms = np.concatenate([self.terms / fired.tokens, encoder[:, None]], axis=1)
        others = np.abs(_read_with_bias(tracer, features)) @ fired.scaled + self.magnitude[:, 2:].sum(axis=1)
        others = others / fired.tokens + np.abs(encoder)
        return [
            Totals(dict(zip(TERMS, map(float, terms[u]), strict=True)), float(others[u]), self.z[:, u] / fired.tokens)
            for u in range(len(features))
        ]


class PairSums:
    """Sums over tokens of the products c_i c_j of some pairs, batch by batch."""

    def __init__(self):
        self.product: Any = 0  # [n]
        self.squares: Any = 0  # [n, n]: of each pair with each
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
    """What ``pair_summaries`` says of the pairs of one output feature, from sums over the dataset."""
    here, alone = co.find(pairs), co.find(np.repeat(pairs, 2, axis=1).reshape(-1, 2))
    acts = entries(pairs) * weights
    mean = acts * here.product / co.tokens
    # The first two moments of z, and of what is left of it without the first m pairs.
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


def _read_with_bias(tracer: Tracer, features: list[int]) -> Float[np.ndarray, "U features"]:
    """``2 D^T Q b``: what each input feature makes together with the decoder bias."""
    config = tracer.inp.config
    bias = tracer.inp.decode(jnp.zeros(config.n_features), jnp.zeros(config.d_model))
    with jax.default_matmul_precision("highest"):
        bias = jnp.pad(bias, (0, tracer.tensor.n_in - config.d_model))
        directions = tracer.directions[np.asarray(features, np.int32)]
        return np.asarray(2 * tracer.tensor.matvec(directions, bias) @ tracer.basis, np.float64)


def check_request(pairs: Mapping[int, Any]) -> None:
    """Raises ``ValueError`` unless there are output features, each with its pairs."""
    if not isinstance(pairs, Mapping) or not pairs:
        raise ValueError("name at least one output feature, with its pairs, such as {7: [(3, 12)]}")


def checked_pairs(tracer: Tracer, feature: int, pairs) -> Int[np.ndarray, "n 2"]:
    """The pairs that were given for an output feature, as int32; ``ValueError`` says what is wrong with them."""
    if isinstance(pairs, Interactions):
        other = np.asarray(pairs.out)[np.asarray(pairs.out) != feature]
        if other.size:
            raise ValueError(f"the pairs given for output feature {feature} were found for {other[0]}")
        pairs = np.stack([pairs.i, pairs.j], axis=-1)
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(
            f"the pairs of an output feature are ints [n, 2] with n at least 1; those of {feature} are {pairs.dtype} "
            f"of shape {pairs.shape}"
        )
    features = tracer.basis.shape[1]
    outside = pairs[(pairs < 0) | (pairs >= features)]
    if outside.size:
        raise ValueError(f"input features of {tracer.inp.name} are 0 ... {features - 1}, got {outside[0]}")
    distinct, times = np.unique(np.sort(pairs, axis=1), axis=0, return_counts=True)
    if (times > 1).any():
        i, j = distinct[times > 1][0]
        raise ValueError(
            f"the pair ({i}, {j}) of output feature {feature} is given twice, and would count twice: (i, j) and (j, i) "
            "are one"
        )
    return pairs.astype(np.int32)


def _r2(means: Float[np.ndarray, "2 values"]) -> Float[np.ndarray, " n"]:
    """From the means of z and of what is left of it, and of their squares."""
    mean, square = means
    variance = np.maximum(square - mean**2, 0)
    if variance[0] <= 1e-12 * square[0]:  # a standard deviation of 1e-6 of its size is float32's rounding
        return np.full(len(variance) - 1, np.nan)
    return 1 - variance[1:] / variance[0]


def _ratio(numerator, denominator) -> float:
    return float(numerator) / float(denominator) if denominator else float("nan")
