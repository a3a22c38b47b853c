"""Extreme eigenpairs of many interaction matrices, certified: the work behind ``spectra.top_eigh``.

They are searched for (``lanczos.search``) or, where that is cheaper or has failed, read off a dense decomposition. What
either says is then checked by multiplying every eigenvector by its matrix once more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.lanczos import COLUMNS, Found, multiply, search, strength

STRICTER = 30  # how many times smaller than asked for the bounds are when a search ends
LOOSEST = 1e-4  # tolerance beyond which no search is cut short: it would spare a quarter, and bounds would not hold
ROUNDING = 8  # eps times so much, times sqrt(sum_m (g_m |left_m| |right_m|)^2), is what rounding does to a value
BYTES = 2**26  # of a batch of matrices that are decomposed densely


class Pairs(NamedTuple):
    """Eigenpairs, and what is known of their errors."""

    values: Float[Array, "U k"]
    vectors: Float[Array, "U k in"]
    residuals: Float[Array, "U k"]
    bounds: Float[Array, "U k"]
    converged: Bool[Array, "U"]
    steps: Int[Array, "U"]


def top_eigenpairs(
    left, right, key, gates, *, k: int, which: str, rtol: float, max_steps: int, block: int, exact: bool
) -> Pairs:
    """What ``spectra.top_eigh`` returns, for directions given by their gates ``[U, hidden]``."""
    # Q is linear in the gates: scaled, so that no square of anything can leave the range of the floats.
    unit = jnp.max(jnp.abs(gates), axis=-1) * jnp.max(jnp.abs(left)) * jnp.max(jnp.abs(right))
    unit = jax.lax.stop_gradient(jnp.where(unit > 0, unit, 1) * (-1 if which == "negative" else 1))
    gates, signed = gates / unit[:, None], which != "magnitude"
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
    values = _rayleigh_quotients(left, right, gates, pairs.vectors, pairs.values)
    scale = jnp.abs(unit)[:, None]
    return pairs._replace(values=values * unit[:, None], residuals=pairs.residuals * scale, bounds=pairs.bounds * scale)


def dense_is_faster(inputs: int, k: int) -> bool:
    """Whether building each matrix and decomposing it costs less than a search: measured on a CPU."""
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
    """The Rayleigh quotients of what was found, their true residuals, and what follows from them."""
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
    """Directions whose vectors are multiplied at once."""
    return min(max(1, COLUMNS // vectors.shape[1]), len(vectors))


def _replace(pairs: Pairs, chosen: Bool[Array, "U"], solve, gates) -> Pairs:
    """``pairs`` with what ``solve`` says of the chosen directions, a few of them at a time."""
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
    """The same by building each matrix and decomposing it; nothing can be missed, and no steps are spent."""

    def one(gates):
        half = (left.T * gates[None]) @ right
        values, vectors = jnp.linalg.eigh((half + half.T) / 2, symmetrize_input=False)
        order = jnp.argsort(-strength(values, signed))[:k]
        apart = jnp.abs(values[order][:, None] - values[None])
        apart = apart.at[jnp.arange(k), order].set(jnp.inf)
        gaps = jnp.maximum(jnp.min(apart, axis=1), jnp.finfo(values.dtype).tiny)
        return Found(values[order], vectors[:, order].T, gaps, jnp.array(-jnp.inf, values.dtype), jnp.int32(0))

    (hidden, inputs), number = left.shape, len(gates)
    batch = max(1, min(number, BYTES // (4 * inputs * max(inputs, hidden))))
    return jax.lax.map(one, gates, batch_size=batch)
