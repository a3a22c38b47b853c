"""Extreme eigenpairs of many interaction matrices, with bounds on their errors: the work behind ``spectra.top_eigh``.

The pairs come from a search (``lanczos.search``) or, where that is slower or has failed, from a dense decomposition.
Either way, every eigenvector is then multiplied by its matrix once more to check it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.linalg.cycle import multiply
from bilinear_jax.linalg.devices import matrixwise
from bilinear_jax.linalg.lanczos import COLUMNS, Found, search
from bilinear_jax.linalg.ritz import strength

STRICTER = 30  # a search ends when the bounds are this many times smaller than asked for
LOOSEST = 1e-4  # a larger tolerance does not end a search sooner: it would save a quarter, and bounds would not hold
ROUNDING = 8  # the rounding error of a value is this times eps sqrt(sum_m (g_m |left_m| |right_m|)^2)
BYTES = 2**26  # size of a batch of matrices that are decomposed densely


class Pairs(NamedTuple):
    """Eigenpairs, and bounds on their errors."""

    values: Float[Array, "U k"]
    vectors: Float[Array, "U k in"]
    residuals: Float[Array, "U k"]
    bounds: Float[Array, "U k"]
    converged: Bool[Array, "U"]
    steps: Int[Array, "U"]


def top_eigenpairs(
    left, right, key, gates, *, k: int, signed: bool, rtol: float, max_steps: int, block: int, exact: bool
) -> Pairs:
    """The result of ``spectra.top_eigh``, for directions given by their gates ``[U, hidden]``.

    ``signed`` asks for the largest values, and otherwise for the largest |values|.

    The factors and each row of the gates have their largest entry near 1, so that no square overflows or underflows.
    """
    fixed = jax.lax.stop_gradient((left, right, gates))

    def decompose(gates):
        return _assess(*fixed[:2], gates, _dense(*fixed[:2], gates, k, signed), signed, rtol)

    if exact or dense_is_faster(left.shape[1], k):
        pairs = decompose(fixed[2])
    else:
        finest = min(rtol, LOOSEST) / STRICTER
        found = search(*fixed, k=k, block=block, signed=signed, rtol=finest, max_steps=max_steps, key=key)
        pairs = _assess(*fixed, found, signed, rtol)
        pairs = _replace(pairs, ~pairs.converged, decompose, fixed[2])
    return pairs._replace(values=_rayleigh_quotients(left, right, gates, pairs.vectors, pairs.values))


def dense_is_faster(inputs: int, k: int) -> bool:
    """Whether it costs less to build and decompose each matrix than to search. Measured on a CPU."""
    return inputs < 96 or 8 * k > inputs


@jax.custom_jvp
def _rayleigh_quotients(left, right, gates, vectors, values):
    """``values = v^T Q_u v``, which are known, with the derivatives of eigenvalues: ``dl = v^T dQ_u v``."""
    return values


@_rayleigh_quotients.defjvp
def _rayleigh_quotients_jvp(primals, tangents):
    *factors, vectors, values = primals

    def quotients(left, right, gates):
        def one(row):
            gates, v = row
            return ((v @ left.T) * (v @ right.T)) @ gates

        return jax.lax.map(one, (gates, vectors), batch_size=_batch(vectors))

    return values, jax.jvp(quotients, tuple(factors), tangents[:3])[1]


def _assess(left, right, gates, found: Found, signed: bool, rtol: float) -> Pairs:
    """The Rayleigh quotients of the pairs found, their true residuals, and the bounds that follow from them."""
    vectors = found.vectors

    def look(row):
        gates, vectors = row
        product = multiply(left, right, gates[None], vectors[None])[0]
        values = jnp.sum(vectors * product, axis=-1)
        return values, jnp.sqrt(jnp.sum((product - values[:, None] * vectors) ** 2, axis=-1))

    values, residuals = jax.lax.map(look, (gates, vectors), batch_size=_batch(vectors))
    sizes = jnp.sum(left**2, axis=-1) * jnp.sum(right**2, axis=-1)
    rounding = ROUNDING * jnp.finfo(values.dtype).eps * jnp.sqrt(gates**2 @ sizes)[:, None]
    bounds = jnp.minimum(residuals, residuals**2 / found.gaps) + rounding
    slack = rtol * jnp.sum(jnp.abs(values), axis=-1) + 2 * jnp.sum(rounding, axis=-1) * values.shape[1]
    converged = jnp.sum(bounds, axis=-1) <= slack
    converged &= found.contenders <= strength(values[:, -1], signed) + slack
    return Pairs(values, vectors, residuals + rounding, bounds, converged, found.steps)


def _batch(vectors: Float[Array, "U k in"]) -> int:
    """How many directions have their vectors multiplied at once."""
    return min(max(1, COLUMNS // vectors.shape[1]), len(vectors))


def _replace(pairs: Pairs, chosen: Bool[Array, "U"], solve, gates) -> Pairs:
    """``pairs``, with the result of ``solve`` for the chosen directions, a few of them at a time."""
    number, inputs = len(chosen), pairs.vectors.shape[-1]
    batch = max(1, min(number, BYTES // (4 * inputs * max(inputs, gates.shape[1]))))
    order = jnp.argsort(~chosen)  # the chosen ones first
    total = jnp.sum(chosen)

    def some(carry):
        at, pairs = carry
        place = jnp.arange(batch) + at
        index = order[jnp.minimum(place, number - 1)]
        target = jnp.where(place < total, index, number)
        better = solve(gates[index])
        return at + batch, jax.tree.map(lambda all, new: all.at[target].set(new, mode="drop"), pairs, better)

    return jax.lax.while_loop(lambda carry: carry[0] < total, some, (jnp.zeros_like(total), pairs))[1]


def _dense(left, right, gates, k: int, signed: bool) -> Found:
    """The same pairs by building and decomposing each matrix. Nothing can be missed, and ``steps`` is 0."""

    def one(gates):
        half = (left.T * gates[None]) @ right
        values, vectors = matrixwise(functools.partial(jnp.linalg.eigh, symmetrize_input=False))((half + half.T) / 2)
        order = jnp.argsort(-strength(values, signed))[:k]
        apart = jnp.abs(values[order][:, None] - values[None])
        apart = apart.at[jnp.arange(k), order].set(jnp.inf)
        gaps = jnp.maximum(jnp.min(apart, axis=1), jnp.finfo(values.dtype).tiny)
        return Found(values[order], vectors[:, order].T, gaps, jnp.array(-jnp.inf, values.dtype), jnp.int32(0))

    (hidden, inputs), number = left.shape, len(gates)
    batch = max(1, min(number, BYTES // (4 * inputs * max(inputs, hidden))))
    return jax.lax.map(one, gates, batch_size=batch)
