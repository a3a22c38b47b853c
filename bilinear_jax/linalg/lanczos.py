"""The search of ``spectra.top_eigh``: extreme eigenpairs of many interaction matrices, without forming any of them.

The method is Lanczos with full reorthogonalisation and thick restart, for a fixed number of *slots* at once. Each slot
works on one direction u. It keeps an orthonormal basis V of the subspace searched so far, and the projected matrix
``T = V^T Q_u V``. One step multiplies a block of b new vectors by Q_u. The blocks of all slots are multiplied by
``left`` and ``right`` in the same matrix products. After a few steps (a cycle), the eigenpairs of T, called Ritz pairs,
approximate the extreme eigenpairs of Q_u. Their accuracy follows from

    Q V = V T + W S^T        W: the next block, orthogonal to V; S: the last b columns of the identity

If the wanted pairs of a slot are good enough, the next direction takes its place, so the others do not wait for
directions that converge late. All other slots cut their basis down to the best Ritz vectors and continue.

Two kinds of eigenvectors can be missed: one that is nearly orthogonal to the start, and a second copy of an eigenvalue,
which a single start cannot see at all. A *probe* finds both. It is a cycle from a new random block, orthogonal to all
that was found. It is run wherever the wanted eigenvalues stand out enough for one cycle to show another like them.

``cycle`` has one cycle; ``ritz`` has the Ritz pairs and their bounds. Both name their sources.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.linalg.cycle import STARTS, Problem, Slots, cycle, orthonormal

COLUMNS = 512  # vectors multiplied at once: enough for matrix products to run at full speed


class Found(NamedTuple):
    """The result of the search for each direction."""

    values: Float[Array, "U k"]  # Ritz values
    vectors: Float[Array, "U k in"]  # Ritz vectors, orthonormal
    gaps: Float[Array, "U k"]  # the error of a value is at most residual^2 / gap
    contenders: Float[Array, "U"]  # no eigenvalue that is not among the k values can be larger than this
    steps: Int[Array, "U"]  # products of Q_u with a vector


def search(left, right, gates, *, k: int, block: int, signed: bool, rtol: float, max_steps: int, key) -> Found:
    """The k eigenpairs of largest |eigenvalue| of each direction, or of largest eigenvalue if ``signed``.

    Args:
        left, right: ``[hidden, in]``.
        gates: ``[U, hidden]``.
        block: b, the vectors of one slot that are multiplied together.
        rtol: a direction is done when the bounds of its values sum to at most ``rtol * sum |values|``, and no other
            eigenvalue that shows can exceed the last of them by more.
        max_steps: after this many products a direction is given up, with the pairs found so far.
    """
    directions, inputs, dtype = gates.shape[0], left.shape[1], left.dtype
    cycle_steps = max(2, max(8, k) // block)
    keep = max(16, 2 * k + 8)
    size = keep + cycle_steps * block
    width = max(1, min(COLUMNS // block, directions))
    starts = orthonormal(jax.random.normal(key, (STARTS, block, inputs), dtype), jnp.zeros(STARTS, dtype))
    problem = Problem(left, right, starts, k, block, keep, cycle_steps, signed, rtol, max_steps)

    def start(slots: Slots, free: Bool[Array, "S"], following: Int[Array, ""]):
        """Gives new directions, from number ``following`` on, to the slots that are free."""
        direction = jnp.where(free, jnp.minimum(following + jnp.cumsum(free) - 1, directions), slots.direction)
        gates_of_new = jnp.take(gates, direction, axis=0, mode="fill", fill_value=0)
        return Slots(
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

    def following_cycle(carry):
        found, slots, following = carry
        slots, verdict = cycle(problem, slots)
        finished = jnp.where(verdict.done, slots.direction, directions)
        report = jnp.where(verdict.report, slots.direction, directions)
        found = Found(
            found.values.at[report].set(verdict.values, mode="drop"),
            found.vectors.at[report].set(verdict.vectors, mode="drop"),
            found.gaps.at[report].set(verdict.gaps, mode="drop"),
            found.contenders.at[finished].set(verdict.contenders, mode="drop"),
            found.steps.at[finished].set(verdict.steps, mode="drop"),
        )
        slots, following = start(slots, verdict.done, following)
        return found, slots, following

    def busy(carry):
        return jnp.sum(carry[1].direction < directions)

    slots = Slots(
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
    # The last few directions continue in fewer slots, so that idle slots are not multiplied.
    few = width // 4 if width > 64 else 0
    found, slots, following = jax.lax.while_loop(
        lambda carry: busy(carry) > few, following_cycle, (found, slots, following)
    )
    if not few:
        return found
    last = jnp.argsort(slots.direction)[:few]
    slots = jax.tree.map(lambda leaf: leaf[last], slots)
    return jax.lax.while_loop(lambda carry: busy(carry) > 0, following_cycle, (found, slots, following))[0]
