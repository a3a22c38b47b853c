"""Ritz pairs of the projected matrices of a Lanczos search, their residuals, and bounds on their errors.

Source: Lehmann 1949 and Parlett, "The symmetric eigenvalue problem", chapter 10 (bounds).
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bilinear_jax.linalg.devices import matrixwise


class RitzPairs(NamedTuple):
    values: Float[Array, "S keep"]  # the most wanted first; 0 where there is none
    coefficients: Float[Array, "S N keep"]  # in the basis
    live: Bool[Array, "S keep"]
    residuals: Float[Array, "S keep"]
    dropped: Float[Array, "S keep"]
    gaps: Float[Array, "S keep"]  # the error of a value is at most residual^2 / gap
    contenders: Float[Array, "S"]


def ritz_pairs(
    live: Bool[Array, "S N"],  # which basis vectors exist
    projected: Float[Array, "S N N"],  # T
    dropped: Float[Array, "S N"],
    rest: Float[Array, "S b in"],  # the part of the last product that is orthogonal to the basis
    k: int,
    keep: int,
    signed: bool,
) -> RitzPairs:
    """Eigenpairs of T, their residuals, and what these imply for the eigenvalues of Q."""
    block, size = rest.shape[1], live.shape[1]
    both = live[:, :, None] & live[:, None, :]
    projected = jnp.where(both, (projected + jnp.swapaxes(projected, 1, 2)) / 2, 0)
    norm = jnp.sqrt(jnp.sum(projected**2, axis=(1, 2)))
    # Rows that are not live get their own eigenvalues, larger than all others, so that nothing mixes with them.
    beyond = jnp.where(norm > 0, 2 * norm, 1)
    diagonal = jnp.arange(size)
    projected = projected.at[:, diagonal, diagonal].add(jnp.where(live, 0, beyond[:, None]))
    values, vectors = matrixwise(functools.partial(jnp.linalg.eigh, symmetrize_input=False))(projected)
    number = jnp.sum(live, axis=1, keepdims=True)
    exists = diagonal[None] < number
    last = vectors[:, size - block :, :]
    gram = jnp.einsum("sad,sbd->sab", rest, rest)
    dropped = jnp.einsum("sn,snj->sj", dropped, jnp.abs(vectors))
    residuals, bounds, reach = _bounds(values, number, last, gram, dropped, signed)

    order = jnp.argsort(jnp.where(exists, -strength(values, signed), jnp.inf), axis=1)[:, :keep]

    def pick(array):
        return jnp.take_along_axis(array, order, axis=1)

    # When an eigenvalue that is not among the k begins to show, the outermost of the other Ritz values has a large
    # residual.
    others = exists.at[jnp.arange(len(order))[:, None], order[:, :k]].set(False)
    highest = jnp.flip(jnp.cumsum(jnp.flip(others, 1), axis=1), 1) == 1
    others &= highest if signed else highest | (jnp.cumsum(others, axis=1) == 1)
    contenders = jnp.max(jnp.where(others, strength(values, signed) + reach, -jnp.inf), axis=1)

    chosen = pick(exists)
    tiny = jnp.finfo(values.dtype).tiny
    return RitzPairs(
        jnp.where(chosen, pick(values), 0),
        jnp.where(chosen[:, None, :], jnp.take_along_axis(vectors, order[:, None, :], axis=2), 0),
        chosen,
        pick(residuals),
        pick(dropped),
        jnp.maximum(pick(residuals) ** 2 / jnp.maximum(pick(bounds), tiny), tiny),
        contenders,
    )


def _bounds(values, number, last, gram, dropped, signed: bool) -> tuple[Float[Array, "S N"], ...]:
    """Residual norms of Ritz pairs, and two bounds on how much further out the eigenvalues are than the Ritz values t.

    The bound of Kato and Temple is the last of the results. If the only eigenvalue of Q beyond rho is the one near t,
    it is at most ``residual^2 / (t - rho)`` away. Lehmann's bound uses the whole subspace and is sharper:

        z^T (G^-1 + sum_j z_j z_j^T / ((t_j - rho) (t_j - x)))^-1 z / (t - rho)        G = W^T W

    z and z_j are the last b coordinates of this Ritz vector and of the others, and x is the bound of Kato and Temple.
    rho lies three quarters of the way to the next Ritz value inwards.
    """
    size = values.shape[1]
    inward = jnp.ones_like(values, jnp.int32) if signed else jnp.where(values > 0, 1, -1)
    neighbour = jnp.arange(size)[None] - inward
    inside = (neighbour >= 0) & (neighbour < number)
    distance = jnp.abs(values - jnp.take_along_axis(values, jnp.clip(neighbour, 0, size - 1), axis=1))
    tiny = jnp.finfo(values.dtype).tiny
    distance = jnp.maximum(jnp.where(inside, 0.75 * distance, 0), tiny)
    image = jnp.einsum("sab,sbi->sia", gram, last)
    square = jnp.maximum(jnp.einsum("sia,sai->si", image, last), 0)
    residual = jnp.sqrt(square)

    outward = inward.astype(values.dtype)
    kato_temple = jnp.minimum(square / distance, residual)
    rho, x = values - outward * distance, values + outward * kato_temple
    denominator = (values[:, None, :] - rho[..., None]) * (values[:, None, :] - x[..., None])
    smallest = (jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), axis=1)[:, None, None]) ** 2
    use = (denominator > smallest) & (jnp.arange(size)[None] < number)[:, None, :] & ~jnp.eye(size, dtype=bool)[None]
    weight = jnp.where(use, 1 / jnp.where(use, denominator, 1), 0)
    if gram.shape[1] == 1:
        sharper = square / (1 + jnp.einsum("sij,sj->si", weight, square))
    else:
        matrix = jnp.einsum("sab,sbj,sij,scj->siac", gram, last, weight, last)
        matrix = matrix + jnp.broadcast_to(jnp.eye(gram.shape[1], dtype=gram.dtype), matrix.shape)
        sharper = jnp.einsum("sai,sia->si", last, jnp.linalg.solve(matrix, image[..., None])[..., 0])
        sharper = jnp.clip(sharper, 0, square)
    bound = jnp.where(dropped > 0, 2 * (sharper + dropped**2), sharper) / distance
    residual = jnp.sqrt(square + dropped**2)
    return residual, jnp.minimum(residual, bound), kato_temple


def strength(values, signed: bool):
    return values if signed else jnp.abs(values)
