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

from bilinear_jax.attribution import TERMS
from bilinear_jax.cofiring import CoFiringSums, Outputs, code_batches, entries, pair_weights
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

    Memory: that of ``co_firing`` and of ``strongest_pairs``; ``batch seq (features + 7 d_hidden + 8 U)`` numbers for U
    output features; and ``batch seq n`` for the pairs of one at a time.

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
    if not pairs:
        raise ValueError("name at least one output feature, with its pairs, such as {7: [(3, 12)]}")
    check_tracer(tracer, lm)
    chosen = {feature: _checked_pairs(tracer, feature, given) for feature, given in pairs.items()}
    weights = {feature: pair_weights(tracer, feature, some) for feature, some in chosen.items()}
    outputs = Outputs.of(tracer, list(pairs))
    fired, sums = CoFiringSums(tracer.basis.shape[1]), {}
    for got in code_batches(tracer, lm, tokens, outputs, token_mask, batch_size, "pairs of input features"):
        fired.add(got)
        terms, z = got["terms"].astype(np.float64), got["z"].astype(np.float64)
        found = {"terms": terms.sum(axis=0), "magnitude": np.abs(terms).sum(axis=0)}
        dense = _dense(got["codes"], got["indices"], tracer.basis.shape[1])
        for column, (feature, some) in enumerate(chosen.items()):
            codes = dense[:, some[:, 0]] * dense[:, some[:, 1]]
            left_over = z[:, column, None] - np.cumsum(codes * (entries(some) * weights[feature]), axis=1)
            values = np.concatenate([z[:, column, None], left_over], axis=1)
            found[f"moments of {feature}"] = np.stack([values.sum(axis=0), (values**2).sum(axis=0)])
        sums = {name: array + sums.get(name, 0) for name, array in found.items()}

    co = fired.finished()
    means = {name: array / co.tokens for name, array in sums.items()}
    result = {}
    for column, (feature, some) in enumerate(chosen.items()):
        of_features = np.abs(_read_with_bias(tracer, feature)) @ fired.scaled / co.tokens
        all_pairs = np.abs(entries(co.pairs) * pair_weights(tracer, feature, co.pairs)) @ co.magnitude / co.tokens
        others = np.abs(outputs.encoder[column]) + means["magnitude"][column, 2:].sum()
        here, left = co.find(some), co.find(np.repeat(some, 2, axis=1).reshape(-1, 2))
        mean = entries(some) * weights[feature] * here.product / co.tokens
        terms = dict(zip(TERMS, [*means["terms"][column], outputs.encoder[column]], strict=True))
        terms = {"shown": mean.sum(), **terms, "pairs": terms["pairs"] - mean.sum()}
        result[feature] = PairSummary(
            pairs=some,
            weight=weights[feature],
            mean=mean,
            mean_magnitude=np.abs(entries(some) * weights[feature]) * here.magnitude / co.tokens,
            joint=here.count / co.tokens,
            rates=left.count.reshape(-1, 2) / co.tokens,
            r2=_r2(means[f"moments of {feature}"]),
            terms={name: float(value) for name, value in terms.items()},
            magnitude_pairs=float(all_pairs),
            magnitude=float(all_pairs + of_features + others),
            tokens=co.tokens,
        )
    return result


def _dense(codes: np.ndarray, indices: np.ndarray, features: int) -> Float[np.ndarray, "tokens features"]:
    dense = np.zeros((len(codes), features))
    np.put_along_axis(dense, indices, codes.astype(np.float64), axis=1)
    return dense


def _read_with_bias(tracer: Tracer, feature: int) -> Float[np.ndarray, " features"]:
    """``2 D^T Q b``: what each input feature makes together with the decoder bias."""
    config = tracer.inp.config
    bias = tracer.inp.decode(jnp.zeros(config.n_features), jnp.zeros(config.d_model))
    with jax.default_matmul_precision("highest"):
        bias = jnp.pad(bias, (0, tracer.tensor.n_in - config.d_model))
        return np.asarray(2 * tracer.basis.T @ (tracer.q(feature) @ bias), np.float64)


def _checked_pairs(tracer: Tracer, feature: int, pairs) -> Int[np.ndarray, "n 2"]:
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
