"""The sums from which ``measure.evaluation`` computes the scores of a dictionary: pure functions of one batch."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.explain.samples import Place
from bilinear_jax.language import LanguageModel
from bilinear_jax.linalg.scale import shift, unit_scale
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE


def reads(sae: SAE) -> Place:
    """The site whose value x a dictionary encodes."""
    return sae.config.site, sae.config.layer


def target(sae: SAE) -> Place:
    """The site whose value y it reconstructs: its own, or of a transcoder the target in the same layer."""
    return sae.config.reconstructs, sae.config.layer


def places(saes: Iterable[SAE]) -> tuple[Place, ...]:
    """The sites that dictionaries read and reconstruct, each once."""
    return tuple(dict.fromkeys(place for sae in saes for place in (reads(sae), target(sae))))


class SAESums(NamedTuple):
    """The sums from which the scores of one dictionary are computed. ``merge`` adds those of two batches.

    y is the value of the site that is reconstructed, and y_hat the reconstruction. Squares are divided by
    ``4^exponent``, so that they stay in the range of float32; after ``merge``, exponent is 0.
    """

    squared_error: Float[Array | np.ndarray, " d_model"]  # sum (y - y_hat)^2 / 4^exponent of each coordinate
    squared_norm: Float[Array | np.ndarray, " d_model"]  # sum y^2 / 4^exponent of each coordinate
    spread: Float[Array | np.ndarray, " d_model"]  # sum (y - mean)^2 / 4^exponent, with the mean of these tokens
    exponent: Int[Array | np.ndarray, ""] | Float[np.ndarray, ""]  # the largest |y| is about 2^exponent
    mean: Float[Array | np.ndarray, " d_model"]  # of y; 0 if there are no tokens
    cosine: Float[Array | np.ndarray, ""]  # sum of cos(y, y_hat); 0 for a token at which one of the two is 0
    active: Int[Array, ""] | Float[np.ndarray, ""]  # number of codes other than 0
    absolute: Float[Array | np.ndarray, ""]  # sum of |codes|
    fired: Int[Array, " features"] | Float[np.ndarray, " features"]  # tokens at which each feature's code is not 0
    tokens: Float[Array | np.ndarray, ""]  # number of tokens in the mask


def sae_sums(
    lm: LanguageModel, saes: Iterable[SAE], tokens: Int[Array, "batch seq"], token_mask: Bool[Array, "batch seq"]
) -> tuple[SAESums, ...]:
    """The sums of one batch for each SAE or transcoder. The model is run once, up to the last layer needed.

    A pure function, for your own ``jit`` and loop. Arguments as in ``evaluate_saes``.
    """
    saes = tuple(saes)
    got = sites.capture(lm.config, lm.params, tokens, places(saes), compute_dtype=lm.compute_dtype)
    return tuple(dictionary_sums(sae, got[reads(sae)], got[target(sae)], token_mask, tokens)[0] for sae in saes)


def dictionary_sums(
    sae: SAE,
    x: Float[Array, "batch seq d_model"],
    y: Float[Array, "batch seq d_model"],
    token_mask: Bool[Array, "batch seq"],
    tokens: Int[Array, "batch seq"] | None = None,
) -> tuple[SAESums, Float[Array, "batch seq d_model"]]:
    """The sums of one dictionary that reads x and should give y, and its reconstruction y_hat. A pure function.

    ``tokens`` are the token ids, which a dictionary with a lookup needs.

    Thresholded activations are encoded densely, one row after another, so a token can have any number of active
    features. Memory: that of the codes, ``2 batch seq k`` numbers, or then ``(batch + seq) features``.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    counted = token_mask[..., None]
    number = jnp.sum(token_mask, dtype=jnp.float32)
    y_hat, active, absolute, fired = coded(sae, x, token_mask, tokens)
    mean = jnp.sum(y, axis=(0, 1), where=counted) / jnp.maximum(number, 1)
    exponent = unit_scale(jnp.where(counted, y, 0))[1]

    def squares(part: Float[Array, "batch seq d_model"]) -> Float[Array, " d_model"]:
        return jnp.sum(shift(part, -exponent) ** 2, axis=(0, 1), where=counted)

    sums = SAESums(
        squared_error=squares(y - y_hat),
        squared_norm=squares(y),
        spread=squares(y - mean[None, None]),
        exponent=exponent,
        mean=mean,
        cosine=jnp.sum(_cosines(y, y_hat), where=token_mask),
        active=active,
        absolute=absolute,
        fired=fired,
        tokens=number,
    )
    return sums, y_hat


def coded(
    sae: SAE,
    x: Float[Array, "batch seq d_model"],
    token_mask: Bool[Array, "batch seq"],
    tokens: Int[Array, "batch seq"] | None,
):
    """The reconstruction, and of the codes at counted tokens: how many, the sum of |codes|, how many by feature."""

    def dense(row):
        x, counted, tokens = row
        codes = sae.encode(x)
        fired = jnp.sum((codes != 0) & counted[:, None], axis=0, dtype=jnp.int32)
        return sae.decode(codes, x, tokens), jnp.sum(jnp.abs(codes), where=counted[:, None]), fired

    if sae.config.thresholded:
        y_hat, absolute, fired = jax.lax.map(dense, (x, token_mask, tokens))
        fired = jnp.sum(fired, axis=0)
        return y_hat, jnp.sum(fired), jnp.sum(absolute), fired
    codes = sae.encode(x, sparse=True)
    nonzero = ((codes.values != 0) & token_mask[..., None]).astype(jnp.int32)
    fired = jnp.zeros(sae.config.n_features, jnp.int32).at[codes.indices].add(nonzero)
    absolute = jnp.sum(jnp.abs(codes.values), where=token_mask[..., None])
    return sae.decode(codes, x, tokens), jnp.sum(nonzero), absolute, fired


def _cosines(a: Float[Array, "*tokens d_model"], b: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens"]:
    """The cosine of each token; 0 where a or b is 0."""
    a, b = unit_scale(a, -1)[0], unit_scale(b, -1)[0]
    squares = jnp.sum(a**2, axis=-1) * jnp.sum(b**2, axis=-1)
    zero = squares <= 0
    return jnp.where(zero, 0, jnp.sum(a * b, axis=-1) / jnp.sqrt(jnp.where(zero, 1, squares)))


def merge(a: SAESums, b: SAESums) -> SAESums:
    """The sums of two batches together, in float64 on the host.

    All fields are added, except two. With n tokens in all, ``mean = (n_a mean_a + n_b mean_b) / n`` and, by coordinate,
    ``spread = spread_a + spread_b + (mean_b - mean_a)^2 n_a n_b / n``. Nothing cancels in the latter.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    a, b = map(_unscaled, (a, b))
    total = jax.tree.map(np.add, a, b)
    share = b.tokens / max(total.tokens, 1)
    moved = b.mean - a.mean
    return total._replace(mean=a.mean + share * moved, spread=a.spread + b.spread + a.tokens * share * moved**2)


def _unscaled(sums: SAESums) -> SAESums:
    """The same sums in float64, with the exponent 0."""
    sums = jax.tree.map(functools.partial(np.asarray, dtype=np.float64), sums)
    squares = {name: getattr(sums, name) * 4.0**sums.exponent for name in ("squared_error", "squared_norm", "spread")}
    return sums._replace(**squares, exponent=np.zeros_like(sums.exponent))


def nothing(like: SAESums) -> SAESums:
    """The sums of no tokens."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape), like)
