"""One cycle of the Lanczos search in ``lanczos``: a few steps in every slot, then a restart from the best Ritz vectors.

Source: Golub and Underwood 1977 (block Lanczos); Wu and Simon 2000 (thick restart).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.linalg.ritz import ritz_pairs, strength

STARTS = 64  # different random blocks; direction u starts from block u modulo this
STANDS_OUT = 0.1  # a probe needs the k-th value to exceed the eighth after it by this much, relative to |Q|
SETTLED = 1000  # when the bounds are this many times smaller than asked for, contenders are no longer waited for


class Problem(NamedTuple):
    """What is searched for, and how. It is the same in all cycles."""

    left: Float[Array, "hidden in"]
    right: Float[Array, "hidden in"]
    starts: Float[Array, "STARTS b in"]  # random blocks, orthonormal
    k: int  # eigenpairs of each direction
    block: int  # b, vectors of one slot that are multiplied together
    keep: int  # Ritz vectors that a restart keeps
    cycle_steps: int
    signed: bool  # search for the largest eigenvalues, not the largest |eigenvalues|
    rtol: float
    max_steps: int


class Slots(NamedTuple):
    """The state of the search: S slots. Each works on one direction."""

    direction: Int[Array, "S"]  # its direction; the number of directions if the slot is idle
    gates: Float[Array, "S hidden"]
    basis: Float[Array, "S N in"]  # V, one vector a row; rows that are not live have no meaning
    live: Bool[Array, "S N"]
    projected: Float[Array, "S N N"]  # T
    dropped: Float[Array, "S N"]  # the part of each basis vector's residual that no later step can reduce
    block: Float[Array, "S b in"]  # the next block: orthonormal, or 0 where the searched subspace is invariant
    scale: Float[Array, "S"]  # the largest |Q v| so far: an estimate of |Q|
    steps: Int[Array, "S"]
    fresh: Int[Array, "S"]  # random blocks used so far
    reached: Float[Array, "S"]  # in a probe: the sum of the k values before the probe; else infinite


class Verdict(NamedTuple):
    """The result of a cycle for each slot."""

    done: Bool[Array, "S"]  # its direction needs no more steps
    report: Bool[Array, "S"]  # its pairs are the best so far for its direction
    values: Float[Array, "S k"]
    vectors: Float[Array, "S k in"]
    gaps: Float[Array, "S k"]  # the error of a value is at most residual^2 / gap
    contenders: Float[Array, "S"]  # no eigenvalue that is not among the k values can be larger than this
    steps: Int[Array, "S"]  # products so far


def cycle(problem: Problem, slots: Slots) -> tuple[Slots, "Verdict"]:
    """Runs a few steps, computes the Ritz pairs, and cuts the basis down to the best of them.

    Slots that are done keep their direction. ``Verdict.done`` says that another direction may take their place.
    """
    k, block, keep, signed, rtol = problem.k, problem.block, problem.keep, problem.signed, problem.rtol
    slots, rest = jax.lax.fori_loop(
        0, problem.cycle_steps, functools.partial(_step, problem), (slots, jnp.zeros_like(slots.block))
    )
    ritz = ritz_pairs(slots.live, slots.projected, slots.dropped, rest, k, keep, signed)
    strengths = strength(ritz.values, signed)
    total = jnp.sum(jnp.abs(ritz.values[:, :k]), axis=-1)
    slack = rtol * total
    bounds = jnp.minimum(ritz.residuals, ritz.residuals**2 / ritz.gaps)[:, :k]
    bound = jnp.sum(bounds, axis=-1)
    contenders = jnp.where(bound <= slack / SETTLED, strengths[:, k - 1], ritz.contenders)
    calm = contenders <= strengths[:, k - 1] + slack
    good = calm & (bound <= slack) & (jnp.sum(slots.live, axis=1) >= k)
    over = slots.steps >= problem.max_steps
    probing = jnp.isfinite(slots.reached)
    reached = jnp.sum(strengths[:, :k], axis=-1)
    news = reached > slots.reached + slack
    stuck = ~jnp.any(slots.block != 0, axis=(1, 2))
    far = jnp.where(ritz.live[:, k + 7], strengths[:, k + 7], -jnp.inf)
    stands_out = strengths[:, k - 1] - far > STANDS_OUT * jnp.max(jnp.abs(ritz.values), axis=1)
    probe = ~probing & good & (stuck | stands_out) & (block < max(k, 2))
    done = over | jnp.where(probing, calm & ~news, good & ~probe)

    basis = slots.basis.at[:, :keep].set(jnp.einsum("snj,snd->sjd", ritz.coefficients, slots.basis))
    verdict = Verdict(
        done,
        (good | over) & ~(probing & ~news),
        ritz.values[:, :k],
        basis[:, :k],
        ritz.gaps[:, :k],
        contenders,
        slots.steps,
    )
    live = jnp.zeros_like(slots.live).at[:, :keep].set(ritz.live)
    renew = probe | stuck
    random = _orthogonal(basis, live, problem.starts[(slots.direction + slots.fresh) % STARTS])
    diagonal = jnp.arange(keep)
    slots = slots._replace(
        basis=basis,
        live=live,
        projected=jnp.zeros_like(slots.projected).at[:, diagonal, diagonal].set(ritz.values),
        dropped=jnp.zeros_like(slots.dropped).at[:, :keep].set(jnp.where(renew[:, None], ritz.residuals, ritz.dropped)),
        block=jnp.where(renew[:, None, None], random, slots.block),
        fresh=slots.fresh + renew.astype(jnp.int32),
        reached=jnp.where(probe, reached, jnp.where(probing & ~news, slots.reached, jnp.inf)),
    )
    return slots, verdict


def _step(problem: Problem, number, carry):
    """Multiplies one block of vectors by Q and makes the result orthogonal to the basis."""
    slots, _ = carry
    at = problem.keep + number * problem.block
    basis = jax.lax.dynamic_update_slice_in_dim(slots.basis, slots.block, at, axis=1)
    live = jax.lax.dynamic_update_slice_in_dim(slots.live, jnp.any(slots.block != 0, axis=-1), at, axis=1)
    product = multiply(problem.left, problem.right, slots.gates, slots.block)
    squares = jnp.sum(product**2, axis=-1)
    scale = jnp.maximum(slots.scale, jnp.sqrt(jnp.max(squares, axis=1)))
    overlaps = _project(basis, live, product)
    projected = jax.lax.dynamic_update_slice_in_dim(slots.projected, overlaps, at, axis=2)
    projected = jax.lax.dynamic_update_slice_in_dim(projected, jnp.swapaxes(overlaps, 1, 2), at, axis=1)
    rest = product - _combine(basis, overlaps)
    new = orthonormal(rest, scale)
    # If most of the product cancelled, the rest has lost digits. It is made orthogonal once more.
    cancelled = jnp.any(jnp.sum(rest**2, axis=-1) < 1e-2 * squares)
    new = jax.lax.cond(cancelled, lambda: _orthogonal(basis, live, new), lambda: new)
    slots = slots._replace(
        basis=basis, live=live, projected=projected, block=new, scale=scale, steps=slots.steps + problem.block
    )
    return slots, rest


def multiply(left, right, gates: Float[Array, "S hidden"], v: Float[Array, "S b in"]) -> Float[Array, "S b in"]:
    """Q v, with a different Q for each slot: four matrix products for all of them together."""
    rows = v.reshape(-1, v.shape[-1])
    gates = jnp.repeat(gates, v.shape[1], axis=0)
    return (((gates * (rows @ right.T)) @ left + (gates * (rows @ left.T)) @ right) / 2).reshape(v.shape)


def _project(basis, live, v: Float[Array, "S b in"]) -> Float[Array, "S N b"]:
    return jnp.where(live[:, :, None], jnp.einsum("snd,sbd->snb", basis, v), 0)


def _combine(basis, coefficients: Float[Array, "S N b"]) -> Float[Array, "S b in"]:
    return jnp.stack(
        [jnp.einsum("sn,snd->sd", coefficients[..., i], basis) for i in range(coefficients.shape[-1])], axis=1
    )


def _orthogonal(basis, live, block: Float[Array, "S b in"]) -> Float[Array, "S b in"]:
    """An orthonormal basis of the part of each slot's block, not 0, that is orthogonal to the slot's basis."""
    for _ in range(2):
        block = orthonormal(block - _combine(basis, _project(basis, live, block)), jnp.zeros(len(block), block.dtype))
    return block


def orthonormal(block: Float[Array, "S b in"], scale: Float[Array, "S"]) -> Float[Array, "S b in"]:
    """An orthonormal basis of each slot's block. A vector that is only rounding noise of ``scale`` is replaced by 0."""
    noise = 50 * jnp.finfo(block.dtype).eps * scale
    rows = []
    for row in jnp.moveaxis(block, 1, 0):
        for other in 2 * rows:
            row = row - jnp.sum(other * row, axis=-1, keepdims=True) * other
        norm = jnp.sqrt(jnp.sum(row**2, axis=-1))
        alive = norm > noise
        rows.append(row * jnp.where(alive, 1 / jnp.where(alive, norm, 1), 0)[:, None])
    return jnp.stack(rows, axis=1)
