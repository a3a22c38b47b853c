"""What each eigenpair of a feature adds to its form at the tokens of a text.

    u . y  =  x^T Q x  =  sum_i l_i (p_i . x)^2

in a metric of other tokens (``linalg.metric``). A positive term raises the pre-activation at a token, a negative one
suppresses it. And what p_i finds in x is a sum over the active input features, with codes c_j and decoder columns d_j:

    p_i . x  =  sum_j c_j (p_i . d_j)  +  p_i . rest          rest: the decoder bias and the error of the input SAE
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.explain.parts import Parts
from bilinear_jax.explain.samples import each_input
from bilinear_jax.explain.tracer import Tracer


class EigenpairAt(NamedTuple):
    """One eigenpair at a token."""

    value: float  # l_i
    contribution: float  # l_i (p_i . x)^2: what it adds here
    share: float  # |contribution| / the sum of all |contributions| here
    finds: list[tuple[int, float]]  # active input features j by |c_j (p_i . d_j)|, each with its share of p_i . x


class FormAt(NamedTuple):
    """A feature's form at a token."""

    total: float  # x^T Q x, all eigenpairs
    first: float  # of those that are listed
    eigenpairs: list[EigenpairAt]  # in the order of the eigenpairs


def form_at(
    tracer: Tracer,
    every: Parts,
    x: Float[Array, " in"],
    codes: Float[Array, " k"],
    indices: Int[Array, " k"],
    feature: int,
    *,
    n: int = 6,
    finds: int = 3,
) -> FormAt:
    """The first n eigenpairs of a feature, and what they add to its form at one token.

    Args:
        every: all its eigenpairs, those of ``tracer.top_eigh`` in a metric of other tokens.
        x: what the tracer's tensor reads at the token: ``explain.samples.tensor_inputs``.
        codes, indices: of the active input features there, as the MLP sees them: those of an ``explain.account``.
        n: how many eigenpairs.
        finds: how many input features to name for each.

    Raises:
        UnknownNameError: if there is no such feature.

    Example:
        >>> import bilinear_jax as bj
        >>> from bilinear_jax.explain.samples import tensor_inputs
        >>> lm = bj.load("ts-nano")
        >>> tracer, tokens = bj.Tracer(lm, layer=2), lm.encode("Tom had a dog.")
        >>> x, account = tensor_inputs(lm, ("mlp_in", 2), tracer.tensor.n_in, tokens), bj.account(tracer, tokens, 7)
        >>> metric = tracer.metric(bj.load_corpus("ts-nano")[:4])
        >>> top = tracer.top_eigh(256, [7], metric=metric, exact=True)
        >>> every = Parts(top.values, top.vectors)
        >>> found = form_at(tracer, every, x[0, 3], account.codes[0, 3], account.indices[0, 3], 7, n=256)
        >>> bool(abs(found.first - found.total) < 1e-3), round(sum(one.share for one in found.eigenpairs), 3)
        (True, 1.0)
    """
    feature = tracer.check_feature(feature)
    with jax.default_matmul_precision("highest"):
        along = np.asarray(every.vectors[0] @ x, np.float64)
        found_in = every.vectors[0, :n] @ (tracer.basis[:, indices] * codes[None])  # [n, k]
        total = float(tracer.directions[feature] @ tracer.tensor.apply(x))
    values = np.asarray(every.values[0], np.float64)
    terms = values * along**2
    whole = float(np.abs(terms).sum()) or 1.0
    found = []
    for place, parts in enumerate(np.asarray(found_in, np.float64)):
        named = np.argsort(-np.abs(parts), kind="stable")[:finds]
        its = [(int(indices[one]), float(parts[one] / (along[place] or 1.0))) for one in named]
        share = float(abs(terms[place])) / whole
        found.append(EigenpairAt(float(values[place]), float(terms[place]), share, its))
    return FormAt(total, float(sum(one.contribution for one in found)), found)


def along_on(
    tracer: Tracer, vectors: Float[Array, "U k in"], tokens, token_mask=None, batch_size: int = 16
) -> Float[np.ndarray, "U k rows seq"]:
    """What some vectors find at each token of a text, ``p . x``; 0 at the tokens that do not count.

    Args:
        vectors: in the coordinates of the tracer's tensor.
        tokens, token_mask, batch_size: the text, as for ``LanguageModel.batches``.

    Raises:
        ValueError: if the tokens do not fit the model, or a value is not finite.

    Memory: the result, on the host.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer, tokens = bj.Tracer(lm, layer=2), lm.encode("Tom had a dog.")
        >>> top = tracer.top_eigh(256, [7], exact=True)
        >>> terms = np.asarray(top.values)[..., None, None] * along_on(tracer, top.vectors, tokens) ** 2
        >>> z = bj.account(tracer, tokens, 7).preactivation
        >>> terms.shape, bool(np.ptp(terms.sum(axis=1)[0, :, 1:] - z[:, 1:]) < 1e-3)  # they differ by a constant
        ((1, 256, 1, 6), True)
    """
    lm, site, found = tracer.lm.original, (tracer.site, tracer.layer), []
    inputs = tracer.inp if tracer.reads_codes else None
    for batch, x in each_input(lm, site, tracer.tensor.n_in, tokens, token_mask, batch_size, inputs=inputs):
        found.append(np.asarray(_along(vectors, x, batch.mask))[:, :, : batch.rows])
    return np.concatenate(found, axis=2)


@jax.jit
def _along(vectors: Float[Array, "U k in"], x: Float[Array, "batch seq in"], mask: Bool[Array, "batch seq"]):
    with jax.default_matmul_precision("highest"):
        return jnp.where(mask, jnp.einsum("uki,bni->ukbn", vectors, x), 0)


def strongest(terms: Float[np.ndarray, "k rows seq"], n: int) -> list[Int[np.ndarray, "m 2"]]:
    """For each square, the (row, position) of its largest |terms|, one a row, the largest first; none of value 0.

    Example:
        >>> strongest(np.array([[[0.0, -3.0], [1.0, 2.0], [0.0, 0.0]]]), 5)[0].tolist()
        [[0, 1], [1, 1]]
    """
    sizes = np.abs(terms)
    positions, best = sizes.argmax(axis=-1), sizes.max(axis=-1)
    order = np.argsort(-best, axis=-1, kind="stable")[:, :n]
    return [
        np.array([(row, positions[one, row]) for row in rows if best[one, row] > 0], int).reshape(-1, 2)
        for one, rows in enumerate(order)
    ]
