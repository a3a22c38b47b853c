"""A bilinear layer as a few products of two patterns: the canonical polyadic (CP) decomposition, from the factors.

    B ~ sum_r  s_r  d_r (x) 1/2 (p_r q_r^T + q_r p_r^T)          |d_r| = |p_r| = |q_r| = 1,  s_1 >= s_2 >= ...

Component r multiplies the inner products of x with two patterns, and writes the result along one direction. So it is a
hidden unit. A decomposition is a ``BilinearTensor`` with ``rank`` hidden units, and every analysis of a tensor applies
to it. If the decomposition is unique, its components do not depend on the random seed, unlike a layer's own hidden
units.

No unfolding of B is formed: distances and gradients need only ``<B, C>`` and ``<C, C>`` (``similarity``). So a layer of
a language model, or its part between SAE features, can be decomposed.

Source: Kolda and Bader 2009, "Tensor decompositions and applications". The cosine objective with Muon, and the Hoyer
penalty, are exercises in the code of Pearce, Dooms et al. 2025.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from bilinear_jax.explain.similarity import cosine_similarity, plain_gram, plain_product
from bilinear_jax.linalg.scale import lengths, shift
from bilinear_jax.tensor import BilinearTensor

PENALTIES = (None, "l1", "hoyer")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weights", "tensor", "similarity"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class CP:
    """The components of a decomposition, the largest first."""

    weights: Array  # [rank]: s_r, descending
    tensor: BilinearTensor  # left and right hold the patterns p and q as rows, down holds s_r d_r as columns; the
    # entry of largest |value| of each p and q is positive
    similarity: Array  # []: cosine similarity to the tensor that was decomposed


class Matching(NamedTuple):
    """Which components of two decompositions are the same."""

    other: Array  # [rank]: for each component of the first decomposition, its partner in the second
    cosines: Array  # [rank]: cosine between the two as tensors, with signs: 1 where they are equal


def cp_gradient(
    tensor: BilinearTensor,
    rank: int,
    key: Key[Array, ""],
    *,
    steps: int = 200,
    lr: float = 0.02,
    penalty: str | None = None,
    strength: float = 0.0,
) -> CP:
    """A decomposition by gradient descent on the cosine similarity, with Muon.

        minimise  1 - cos(B, C) + strength * penalty

        "l1"      mean over patterns of |p|_1 / (sqrt(in) |p|_2)
        "hoyer"   mean over patterns of |p|_1^2 / (in |p|_2^2)          both 1 for a flat pattern, least for one entry

    The cosine does not depend on the scale of C. At the end, C is scaled to be nearest to B. The function is pure: for
    your own ``jit``, and ``vmap`` over keys.

    Args:
        rank: number of components.
        key: of the random start.
        steps: number of updates, with a momentum of 0.95 and a learning rate that falls from ``lr`` to 0 as a cosine.
        penalty: makes patterns sparse: None, "l1" or "hoyer".
        strength: the weight of the penalty. A larger weight costs similarity.

    Raises:
        ValueError: if the rank or the number of steps is below 1, or the penalty is unknown.

    Cost: about ``24 (hidden + rank) rank in`` flops a step. Memory: a few times ``(hidden + rank) rank``, and the
    factors.

    Example:
        >>> u = BilinearTensor(jnp.array([[1.0, 0.0, 1.0]]), jnp.array([[0.0, 1.0, 0.0]]), jnp.array([[3.0], [4.0]]))
        >>> found = cp_gradient(u, rank=1, key=jax.random.key(0))
        >>> bool(found.similarity > 0.999), found.weights.shape
        (True, (1,))
    """
    import optax

    _check(rank, steps)
    if penalty not in PENALTIES:
        raise ValueError(f"penalty is {penalty!r}, but it must be one of {', '.join(map(repr, PENALTIES))}")
    unit, *_ = tensor.unit()  # the factors that are sought have about this scale
    square = plain_product(unit, unit)

    def loss(factors):
        one = _tensor(factors)
        with jax.default_matmul_precision("highest"):
            cosine = plain_product(unit, one) / jnp.sqrt(square * plain_product(one, one))
        patterns = jnp.concatenate([one.left, one.right])
        flatness = jnp.abs(patterns).sum(axis=1) / (jnp.linalg.norm(patterns, axis=1) * tensor.n_in**0.5)
        sparsity = {None: 0.0, "l1": flatness.mean(), "hoyer": (flatness**2).mean()}[penalty]
        return 1 - cosine + strength * sparsity

    optimizer = optax.contrib.muon(optax.cosine_decay_schedule(lr, steps), beta=0.95)
    factors = _start(tensor, rank, key)

    def step(carried: Any, _) -> tuple[Any, None]:
        factors, state = carried
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(factors), state, factors)
        return (optax.apply_updates(factors, updates), state), None

    (factors, _), _ = jax.lax.scan(step, (factors, optimizer.init(factors)), length=steps)
    return normalised(tensor, _tensor(factors))


def cp_als(tensor: BilinearTensor, rank: int, key: Key[Array, ""], *, steps: int = 50, solver_steps: int = 20) -> CP:
    """A decomposition by alternating least squares: finds the nearest C to B in one factor at a time.

        minimise  |B - C|^2 = <B, B> - 2 <B, C> + <C, C>

    The objective is quadratic in each factor. For the directions it is solved at once. For the patterns, which the
    symmetrisation couples, it is solved by conjugate gradients from their present values. The distance never rises. The
    function is pure, as ``cp_gradient`` is.

    Args:
        rank: number of components.
        key: of the random start.
        steps: sweeps over the three factors.
        solver_steps: steps of conjugate gradients for each pattern factor in a sweep.

    Raises:
        ValueError: if the rank or a number of steps is below 1.

    Example:
        >>> u = BilinearTensor(jnp.array([[1.0, 0.0, 1.0]]), jnp.array([[0.0, 1.0, 0.0]]), jnp.array([[3.0], [4.0]]))
        >>> bool(cp_als(u, rank=1, key=jax.random.key(0)).similarity > 0.9999)
        True
    """
    _check(rank, min(steps, solver_steps))
    unit, *_ = tensor.unit()

    def solve(factors, name):
        def with_one(value):
            return _tensor(factors | {name: value})

        def towards(value):
            return plain_product(unit, with_one(value))

        def within(value):
            return plain_product(with_one(value), with_one(value)) / 2

        value = factors[name]
        wanted = jax.grad(towards)(value)
        value, _ = jax.scipy.sparse.linalg.cg(jax.grad(within), wanted, x0=value, maxiter=solver_steps)
        return factors | {name: value}

    def directions(factors):
        one = _tensor(factors)
        with jax.default_matmul_precision("highest"):
            gram = plain_gram(one, one)
            ridge = jnp.finfo(gram.dtype).eps * rank * jnp.trace(gram) * jnp.eye(rank, dtype=gram.dtype)
            wanted = unit.down @ plain_gram(unit, one)
            down = jnp.linalg.solve(gram + ridge, wanted.T).T
        return factors | {"down": down}

    def sweep(factors, _):
        factors = directions(factors)
        for name in ("left", "right"):
            factors = solve(factors, name)
        sizes = {name: lengths(factors[name])[:, None] for name in ("left", "right")}
        rows = {name: factors[name] / jnp.where(size > 0, size, 1) for name, size in sizes.items()}
        return rows | {"down": factors["down"] * sizes["left"].T * sizes["right"].T}, None

    factors, _ = jax.lax.scan(sweep, _start(tensor, rank, key), length=steps)
    return normalised(tensor, _tensor(directions(factors)))


def normalised(tensor: BilinearTensor, found: BilinearTensor) -> CP:
    """The components with unit patterns, sorted, and scaled as a whole to be nearest to ``tensor``."""
    found, (tensor, *exponents) = found.unit()[0], tensor.unit()
    square = plain_product(found, found)
    scale = jnp.where(square > 0, plain_product(tensor, found) / jnp.where(square > 0, square, 1), 0)
    left, left_length = _unit_rows(found.left)
    right, right_length = _unit_rows(found.right)
    down = found.down * (scale * left_length * right_length)[None, :]
    down = shift(down, sum(exponents, jnp.int32(0)))
    weights = lengths(down, axis=0)
    order = jnp.argsort(-weights)
    ordered = BilinearTensor(left[order], right[order], down[:, order])
    return CP(weights[order], ordered, cosine_similarity(tensor, ordered))


def match(first: CP, second: CP) -> Matching:
    """Pairs the components of two decompositions so that the sum of their cosines is largest.

    Components are compared as tensors. So their order, the signs within a component, and which of its patterns is
    called left do not matter. This runs on the host, not inside ``jit``.

    Raises:
        ValueError: if the numbers of components, of inputs or of outputs differ.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    a, b = first.tensor, second.tensor
    if a.left.shape != b.left.shape or a.n_out != b.n_out:
        raise ValueError(
            f"cannot match {len(a.left)} components of {a.n_in} inputs and {a.n_out} outputs with {len(b.left)} of "
            f"{b.n_in} inputs and {b.n_out} outputs: the numbers must be equal"
        )
    a, b = a.unit()[0], b.unit()[0]
    with jax.default_matmul_precision("highest"):
        inner = (a.down.T @ b.down) * plain_gram(a, b)
        sizes = [jnp.sqrt(jnp.sum(one.down**2, 0) * jnp.diagonal(plain_gram(one, one))) for one in (a, b)]
    cosines = np.asarray(inner) / np.maximum(np.outer(*map(np.asarray, sizes)), np.finfo(np.float32).tiny)
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return Matching(jnp.asarray(columns), jnp.asarray(cosines[rows, columns]))


def _check(rank: int, steps: int) -> None:
    if rank < 1 or steps < 1:
        raise ValueError(f"rank and steps must be at least 1, got {rank} and {steps}")


def _start(tensor: BilinearTensor, rank: int, key: Key[Array, ""]) -> dict[str, Array]:
    shapes = {"left": (rank, tensor.n_in), "right": (rank, tensor.n_in), "down": (tensor.n_out, rank)}
    keys = jax.random.split(key, 3)
    dtype = tensor.left.dtype
    return {
        name: jax.random.normal(key, shape, dtype) / jnp.sqrt(jnp.asarray(shape[1], dtype))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _tensor(factors: dict[str, Array]) -> BilinearTensor:
    return BilinearTensor(factors["left"], factors["right"], factors["down"])


def _unit_rows(rows: Float[Array, "rank in"]) -> tuple[Float[Array, "rank in"], Float[Array, " rank"]]:
    """Rows of unit length whose entry of largest |value| is positive, and the factors they were divided by."""
    leading = jnp.take_along_axis(rows, jnp.argmax(jnp.abs(rows), axis=1, keepdims=True), axis=1)[:, 0]
    length = jnp.where(leading < 0, -1, 1) * lengths(rows)
    return rows / jnp.where(length == 0, 1, length)[:, None], length
