"""Extreme eigenpairs of the interaction matrices of many output directions, without forming any: ``spectra.top_eigh``.

Lanczos with full reorthogonalisation and thick restart, for a fixed number of *slots* at once. Each slot works on one
direction u. It keeps an orthonormal basis V of the subspace that was searched, and the projected matrix
``T = V^T Q_u V``; one step multiplies a block of b new vectors by Q_u, the blocks of all slots by ``left`` and
``right`` in the same matrix products. After a few steps (a cycle) the eigenpairs of T, the Ritz pairs, approximate the
extreme eigenpairs of Q_u, and

    Q V = V T + W S^T        W: the next block, orthogonal to V; S: the last b columns of the identity

says how well. A slot whose wanted pairs are good enough gives its place to the next direction, so directions that
converge late don't make the others wait; all others shrink their basis to the best Ritz vectors and go on.

What can go wrong is an eigenvector that the start is nearly orthogonal to, and a second copy of an eigenvalue, which a
single start can't see at all. Both show in a *probe*, a cycle from a fresh random block, orthogonal to all that was
found; so one follows wherever the wanted eigenvalues stand out enough for one cycle to show another like them.

Source: Golub and Underwood 1977 (block Lanczos); Wu and Simon 2000 (thick restart); Lehmann 1949 and Parlett, "The
symmetric eigenvalue problem", chapter 10 (bounds).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

COLUMNS = 512  # vectors that are multiplied at once: enough for matrix products to run at full speed
STARTS = 64  # different random blocks; direction u starts from number u modulo this
STANDS_OUT = 0.1  # by how much the k-th value must exceed the eighth after it, relative to |Q|, for a probe to show one
SETTLED = 1000  # how many times smaller than asked for the bounds are when no contender is waited for any longer


class Found(NamedTuple):
    """What the search says about each direction."""

    values: Float[Array, "U k"]  # Ritz values
    vectors: Float[Array, "U k in"]  # Ritz vectors, orthonormal
    gaps: Float[Array, "U k"]  # the error of a value is at most residual^2 / gap
    contenders: Float[Array, "U"]  # the largest that an eigenvalue which is not among them can be
    steps: Int[Array, "U"]  # products of Q_u with a vector


class _Slots(NamedTuple):
    direction: Int[Array, "S"]  # which one; the number of directions if the slot is idle
    gates: Float[Array, "S hidden"]
    basis: Float[Array, "S N in"]  # V, by rows; rows that aren't live are meaningless
    live: Bool[Array, "S N"]
    projected: Float[Array, "S N N"]  # T
    dropped: Float[Array, "S N"]  # the part of each basis vector's residual that no later step can reduce
    block: Float[Array, "S b in"]  # the next block: orthonormal, or 0 where the searched subspace is invariant
    scale: Float[Array, "S"]  # the largest |Q v| so far: of the size of |Q|
    steps: Int[Array, "S"]
    fresh: Int[Array, "S"]  # random blocks used so far
    reached: Float[Array, "S"]  # in a probe: the sum of the k values before it; infinite otherwise


def search(left, right, gates, *, k: int, block: int, signed: bool, rtol: float, max_steps: int, key) -> Found:
    """The k eigenpairs of largest |eigenvalue| (with ``signed``, of largest eigenvalue) of each direction.

    Args:
        left, right: ``[hidden, in]``.
        gates: ``[U, hidden]``.
        block: b, the vectors of one slot that are multiplied together.
        rtol: a direction is done when the bounds of its values sum to at most ``rtol * sum |values|``, and no other
            eigenvalue that shows can overtake the last of them by more.
        max_steps: products after which a direction is given up with what was found.
    """
    directions, inputs, dtype = gates.shape[0], left.shape[1], left.dtype
    cycle_steps = max(2, max(8, k) // block)
    keep = max(16, 2 * k + 8)
    size = keep + cycle_steps * block
    width = max(1, min(COLUMNS // block, directions))
    starts = _orthonormal(jax.random.normal(key, (STARTS, block, inputs), dtype), jnp.zeros(STARTS, dtype))

    def start(slots: _Slots, free: Bool[Array, "S"], following: Int[Array, ""]):
        """New directions for the slots that are free, from number ``following`` on."""
        direction = jnp.where(free, jnp.minimum(following + jnp.cumsum(free) - 1, directions), slots.direction)
        gates_of_new = jnp.take(gates, direction, axis=0, mode="fill", fill_value=0)
        return _Slots(
            direction.astype(jnp.int32),
            jnp.where(free[:, None], gates_of_new, slots.gates),
            slots.basis,
            slots.live & ~free[:, None],
            jnp.where(free[:, None, None], 0, slots.projected),
            jnp.where(free[:, None], 0, slots.dropped),
            jnp.where(free[:, None, None], starts[direction % STARTS], slots.block),
            jnp.where(free, 0, slots.scale),
            jnp.where(free, 0, slots.steps),
            jnp.where(free, 1, slots.fresh),
            jnp.where(free, jnp.inf, slots.reached),
        ), jnp.minimum(following + jnp.sum(free), directions).astype(jnp.int32)

    def step(number, carry):
        slots, _ = carry
        at = keep + number * block
        basis = jax.lax.dynamic_update_slice_in_dim(slots.basis, slots.block, at, axis=1)
        live = jax.lax.dynamic_update_slice_in_dim(slots.live, jnp.any(slots.block != 0, axis=-1), at, axis=1)
        product = multiply(left, right, slots.gates, slots.block)
        squares = jnp.sum(product**2, axis=-1)
        scale = jnp.maximum(slots.scale, jnp.sqrt(jnp.max(squares, axis=1)))
        overlaps = _project(basis, live, product)
        projected = jax.lax.dynamic_update_slice_in_dim(slots.projected, overlaps, at, axis=2)
        projected = jax.lax.dynamic_update_slice_in_dim(projected, jnp.swapaxes(overlaps, 1, 2), at, axis=1)
        rest = product - _combine(basis, overlaps)
        new = _orthonormal(rest, scale)
        # Where most of the product cancelled, what is left has lost digits, and is made orthogonal once more.
        cancelled = jnp.any(jnp.sum(rest**2, axis=-1) < 1e-2 * squares)
        new = jax.lax.cond(cancelled, lambda: _orthogonal(basis, live, new), lambda: new)
        slots = slots._replace(
            basis=basis, live=live, projected=projected, block=new, scale=scale, steps=slots.steps + block
        )
        return slots, rest

    def cycle(carry):
        found, slots, following = carry
        slots, rest = jax.lax.fori_loop(0, cycle_steps, step, (slots, jnp.zeros_like(slots.block)))
        ritz = _ritz_pairs(slots, rest, k, keep, signed)
        strengths = strength(ritz.values, signed)
        total = jnp.sum(jnp.abs(ritz.values[:, :k]), axis=-1)
        slack = rtol * total
        bounds = jnp.minimum(ritz.residuals, ritz.residuals**2 / ritz.gaps)[:, :k]
        bound = jnp.sum(bounds, axis=-1)
        contenders = jnp.where(bound <= slack / SETTLED, strengths[:, k - 1], ritz.contenders)
        calm = contenders <= strengths[:, k - 1] + slack
        good = calm & (bound <= slack) & (jnp.sum(slots.live, axis=1) >= k)
        over = slots.steps >= max_steps
        probing = jnp.isfinite(slots.reached)
        reached = jnp.sum(strengths[:, :k], axis=-1)
        news = reached > slots.reached + slack
        stuck = ~jnp.any(slots.block != 0, axis=(1, 2))
        far = jnp.where(ritz.live[:, k + 7], strengths[:, k + 7], -jnp.inf)
        stands_out = strengths[:, k - 1] - far > STANDS_OUT * jnp.max(jnp.abs(ritz.values), axis=1)
        probe = ~probing & good & (stuck | stands_out) & (block < max(k, 2))
        done = over | jnp.where(probing, calm & ~news, good & ~probe)

        basis = slots.basis.at[:, :keep].set(jnp.einsum("snj,snd->sjd", ritz.coefficients, slots.basis))
        finished = jnp.where(done, slots.direction, directions)
        report = jnp.where((good | over) & ~(probing & ~news), slots.direction, directions)
        found = Found(
            found.values.at[report].set(ritz.values[:, :k], mode="drop"),
            found.vectors.at[report].set(basis[:, :k], mode="drop"),
            found.gaps.at[report].set(ritz.gaps[:, :k], mode="drop"),
            found.contenders.at[finished].set(contenders, mode="drop"),
            found.steps.at[finished].set(slots.steps, mode="drop"),
        )
        live = jnp.zeros_like(slots.live).at[:, :keep].set(ritz.live)
        renew = probe | stuck
        random = _orthogonal(basis, live, starts[(slots.direction + slots.fresh) % STARTS])
        diagonal = jnp.arange(keep)
        slots = slots._replace(
            basis=basis,
            live=live,
            projected=jnp.zeros_like(slots.projected).at[:, diagonal, diagonal].set(ritz.values),
            dropped=jnp.zeros_like(slots.dropped)
            .at[:, :keep]
            .set(jnp.where(renew[:, None], ritz.residuals, ritz.dropped)),
            block=jnp.where(renew[:, None, None], random, slots.block),
            fresh=slots.fresh + renew.astype(jnp.int32),
            reached=jnp.where(probe, reached, jnp.where(probing & ~news, slots.reached, jnp.inf)),
        )
        slots, following = start(slots, done, following)
        return found, slots, following

    def busy(carry):
        return jnp.sum(carry[1].direction < directions)

    slots = _Slots(
        jnp.full(width, directions, jnp.int32),
        jnp.zeros((width, gates.shape[1]), dtype),
        jnp.zeros((width, size, inputs), dtype),
        jnp.zeros((width, size), bool),
        jnp.zeros((width, size, size), dtype),
        jnp.zeros((width, size), dtype),
        jnp.zeros((width, block, inputs), dtype),
        jnp.zeros(width, dtype),
        jnp.zeros(width, jnp.int32),
        jnp.zeros(width, jnp.int32),
        jnp.zeros(width, dtype),
    )
    slots, following = start(slots, jnp.ones(width, bool), jnp.int32(0))
    found = Found(
        jnp.zeros((directions, k), dtype),
        jnp.zeros((directions, k, inputs), dtype),
        jnp.ones((directions, k), dtype),
        jnp.zeros(directions, dtype),
        jnp.zeros(directions, jnp.int32),
    )
    # The last few directions go on in fewer slots, so that idle ones aren't multiplied.
    few = width // 4 if width > 64 else 0
    found, slots, following = jax.lax.while_loop(lambda carry: busy(carry) > few, cycle, (found, slots, following))
    if not few:
        return found
    last = jnp.argsort(slots.direction)[:few]
    slots = jax.tree.map(lambda leaf: leaf[last], slots)
    return jax.lax.while_loop(lambda carry: busy(carry) > 0, cycle, (found, slots, following))[0]


def multiply(left, right, gates: Float[Array, "S hidden"], v: Float[Array, "S b in"]) -> Float[Array, "S b in"]:
    """Q v, for each slot its own Q, and for all of them together four matrix products."""
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
    """An orthonormal basis of the part of each slot's block that is orthogonal to its basis; it must have one."""
    for _ in range(2):
        block = _orthonormal(block - _combine(basis, _project(basis, live, block)), jnp.zeros(len(block), block.dtype))
    return block


def _orthonormal(block: Float[Array, "S b in"], scale: Float[Array, "S"]) -> Float[Array, "S b in"]:
    """An orthonormal basis of each slot's block; 0 in place of vectors that are only rounding noise of ``scale``."""
    noise = 50 * jnp.finfo(block.dtype).eps * scale
    rows = []
    for row in jnp.moveaxis(block, 1, 0):
        for other in 2 * rows:
            row = row - jnp.sum(other * row, axis=-1, keepdims=True) * other
        norm = jnp.sqrt(jnp.sum(row**2, axis=-1))
        alive = norm > noise
        rows.append(row * jnp.where(alive, 1 / jnp.where(alive, norm, 1), 0)[:, None])
    return jnp.stack(rows, axis=1)


class _RitzPairs(NamedTuple):
    values: Float[Array, "S keep"]  # the most wanted first; 0 where there is none
    coefficients: Float[Array, "S N keep"]  # in the basis
    live: Bool[Array, "S keep"]
    residuals: Float[Array, "S keep"]
    dropped: Float[Array, "S keep"]
    gaps: Float[Array, "S keep"]  # the error of a value is at most residual^2 / gap
    contenders: Float[Array, "S"]


def _ritz_pairs(slots: _Slots, rest: Float[Array, "S b in"], k: int, keep: int, signed: bool) -> _RitzPairs:
    """Eigenpairs of T, their residuals, and what these say about the eigenvalues of Q."""
    block, size = rest.shape[1], slots.live.shape[1]
    both = slots.live[:, :, None] & slots.live[:, None, :]
    projected = jnp.where(both, (slots.projected + jnp.swapaxes(slots.projected, 1, 2)) / 2, 0)
    norm = jnp.sqrt(jnp.sum(projected**2, axis=(1, 2)))
    # Rows that aren't live get eigenvalues of their own, beyond all others, so that nothing mixes with them.
    beyond = jnp.where(norm > 0, 2 * norm, 1)
    diagonal = jnp.arange(size)
    projected = projected.at[:, diagonal, diagonal].add(jnp.where(slots.live, 0, beyond[:, None]))
    values, vectors = jnp.linalg.eigh(projected, symmetrize_input=False)
    number = jnp.sum(slots.live, axis=1, keepdims=True)
    exists = diagonal[None] < number
    last = vectors[:, size - block :, :]
    gram = jnp.einsum("sad,sbd->sab", rest, rest)
    dropped = jnp.einsum("sn,snj->sj", slots.dropped, jnp.abs(vectors))
    residuals, bounds, reach = _bounds(values, number, last, gram, dropped, signed)

    order = jnp.argsort(jnp.where(exists, -strength(values, signed), jnp.inf), axis=1)[:, :keep]

    def pick(array):
        return jnp.take_along_axis(array, order, axis=1)

    # Where an eigenvalue that isn't among the k begins to show, a Ritz value at an end of what is left has a large
    # residual.
    others = exists.at[jnp.arange(len(order))[:, None], order[:, :k]].set(False)
    highest = jnp.flip(jnp.cumsum(jnp.flip(others, 1), axis=1), 1) == 1
    others &= highest if signed else highest | (jnp.cumsum(others, axis=1) == 1)
    contenders = jnp.max(jnp.where(others, strength(values, signed) + reach, -jnp.inf), axis=1)

    live = pick(exists)
    tiny = jnp.finfo(values.dtype).tiny
    return _RitzPairs(
        jnp.where(live, pick(values), 0),
        jnp.where(live[:, None, :], jnp.take_along_axis(vectors, order[:, None, :], axis=2), 0),
        live,
        pick(residuals),
        pick(dropped),
        jnp.maximum(pick(residuals) ** 2 / jnp.maximum(pick(bounds), tiny), tiny),
        contenders,
    )


def _bounds(values, number, last, gram, dropped, signed: bool) -> tuple[Float[Array, "S N"], ...]:
    """Residual norms of Ritz pairs, and two bounds on how much further out the eigenvalues are than the Ritz values t.

    Kato and Temple (the last of the results): if the only eigenvalue of Q beyond rho is the one near t, it is at most
    ``residual^2 / (t - rho)`` away. Lehmann's bound uses the whole subspace, and is sharper:

        z^T (G^-1 + sum_j z_j z_j^T / ((t_j - rho) (t_j - x)))^-1 z / (t - rho)        G = W^T W

    with z and z_j the last b coordinates of this Ritz vector and the others, and x the bound of Kato and Temple. rho is
    taken three quarters of the way to the next Ritz value inwards.
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
