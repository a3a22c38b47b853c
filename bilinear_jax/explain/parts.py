"""Parts of a form: squares whose sum is a feature's pre-activation, the ones that explain most first.

    u . y  =  x^T Q x  =  sum_i values_i (vectors_i . x)^2

The ways to choose them, by name:

    data       eigenpairs in the metric of the data, the largest |value| first: see ``linalg.metric``
    firing     the same, in the metric of the data with half of the weight on the tokens at which the feature fires:
               (E[x x^T | fires] + E[x x^T]) / 2. A value is what its square adds on average on such tokens
    weight     eigenpairs of Q, the largest |value| first: the metric in which all directions of the input are alike

or terms ``c_ij f_i f_j`` of the codes of an input SAE, of which no few add up to it:

    pairs by weight, by data, greedy       see ``explain.feature_pairs``

And the controls: of eigenpairs ``rotated``, whose squares are not made for Q, the same with a random rotation of the
eigenvectors. Its values are what Q has along them, ``w_i^T Q w_i`` in the metric, and again the largest |value| is
first. And ``random_directions`` of the output, in place of those of features.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain.spectra import top_eigh
from bilinear_jax.linalg.metric import Metric
from bilinear_jax.tensor import BilinearTensor

METRICS = {"data": 0.0, "weight": 1.0}
"""The ways to choose eigenpairs in one metric for all features, each with the shrinking of the data's that it is."""

METHODS = ("data", "firing", "weight")
"""The ways to choose eigenpairs."""

PAIRS = ("pairs by weight", "pairs by data", "pairs greedy")
"""The ways to choose pairs of input features."""


class Parts(NamedTuple):
    """The first k squares of each of some output directions."""

    values: Float[Array, "U k"]
    vectors: Float[Array, "U k in"]


class Pairs(NamedTuple):
    """The first k products of two inputs of each of some output directions."""

    i: Int[Array, "U k"]
    j: Int[Array, "U k"]
    weights: Float[Array, "U numbers k"]  # for each number of parts; 0 beyond it


def check_method(by: str) -> None:
    """Raise ``UnknownNameError`` unless parts can be chosen in this way."""
    known = (*METHODS, *PAIRS)
    if by not in known:
        raise UnknownNameError("by", repr(by), known, of="ways to choose the parts of an explanation")


def checked_numbers(name: str, numbers: Iterable[SupportsIndex], inputs: int) -> tuple[int, ...]:
    """Numbers of parts, ascending. Raise ``ValueError`` unless each is in 1 ... inputs, and there is one."""
    found = tuple(sorted({operator.index(one) for one in numbers}))
    if not found or found[0] < 1 or found[-1] > inputs:
        raise ValueError(
            f"each {name} must lie in 1 ... {inputs} (the inputs of the MLP), and there must be at least one; got "
            f"{list(found)}"
        )
    return found


def eigenparts(tensor: BilinearTensor, directions: Float[Array, "U out"], k: int, metric: Metric, **options) -> Parts:
    """The first k eigenpairs of each output direction in a metric. ``options``: as for ``spectra.top_eigh``.

    Example:
        >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0]]))
        >>> metric = Metric.of(jnp.diag(jnp.array([4.0, 9.0])))
        >>> found = eigenparts(tensor, jnp.ones((1, 1)), 2, metric)  # x_0 x_1 = 6 s_0 s_1
        >>> sorted(found.values[0].round(4).tolist())
        [-3.0, 3.0]
    """
    top = top_eigh(tensor, directions, k, metric=metric, **options)
    return Parts(top.values, top.vectors)


def firing_metrics(
    x: Float[np.ndarray, "tokens in"], fired: Bool[np.ndarray, "U tokens"], moment: Float[np.ndarray, "in in"]
) -> Metric:
    """The metrics of the data with half of the weight on the tokens at which each feature fires, stacked.

        C_u = (E[x x^T | u fires] + E[x x^T]) / 2

    That of a feature that never fires is the data's. ``moment``: ``E[x x^T]``.

    Memory: ``2 U in^2`` numbers of 4 bytes.

    Example:
        >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        >>> metrics = firing_metrics(x, x.T[:1] > 0, x.T @ x / 4)
        >>> bool(np.allclose(metrics.root[0] @ metrics.root[0].T, np.diag([0.625, 0.375])))
        True
    """
    found = []
    for where in fired:
        own = x[where].astype(np.float64)
        metric = Metric.of((own.T @ own / len(own) + moment) / 2 if len(own) else moment)
        room = ((0, 0), (0, len(moment) - metric.root.shape[1]))  # one shape: directions left out are zeros
        found.append(
            dataclasses.replace(metric, root=jnp.pad(metric.root, room), inverse=jnp.pad(metric.inverse, room))
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


@functools.partial(jax.jit, static_argnames=("k", "which"))
def own_eigenparts(
    tensor: BilinearTensor, directions: Float[Array, "U out"], k: int, metrics: Metric, which: str = "magnitude"
) -> Parts:
    """``eigenparts`` of each output direction in a metric of its own, each decomposed densely."""
    return _of_each(functools.partial(eigenparts, tensor, k=k, which=which, exact=True), directions, metrics)


@functools.partial(jax.jit, static_argnames="k")
def own_rotated(
    tensor: BilinearTensor, directions: Float[Array, "U out"], k: int, metrics: Metric, key: Array
) -> Parts:
    """The control ``rotated`` of each output direction in a metric of its own."""
    return _of_each(functools.partial(rotated, tensor, k=k, key=key), directions, metrics)


def _of_each(choose: Callable[..., Parts], directions: Float[Array, "U out"], metrics: Metric) -> Parts:
    found = jax.lax.map(lambda one: choose(directions=one[0][None], metric=one[1]), (directions, metrics))
    return jax.tree.map(lambda leaf: leaf[:, 0], found)


@jax.jit
def random_directions(rows: Float[Array, "U out"], features: Int[Array, " U"], key: Array) -> Float[Array, "U out"]:
    """The control: a random output direction for each feature, of the length of its row."""
    noise = jax.vmap(lambda one: jax.random.normal(jax.random.fold_in(key, one), rows.shape[1:]))(features)
    lengths, its = (jnp.linalg.norm(some, axis=1, keepdims=True) for some in (rows, noise))
    return noise * (lengths / its)


@functools.partial(jax.jit, static_argnames="k")
def rotated(tensor: BilinearTensor, directions: Float[Array, "U out"], k: int, metric: Metric, key: Array) -> Parts:
    """The control: k squares along random directions, orthonormal in the metric and the same for all outputs."""
    with jax.default_matmul_precision("highest"):
        rank = metric.root.shape[1]
        turn = jnp.linalg.qr(jax.random.normal(key, (rank, rank)))[0]
        white = metric.root @ turn
        values = (directions @ tensor.down) @ ((tensor.left @ white) * (tensor.right @ white))
        order = jax.lax.top_k(jnp.abs(values), k)[1]
        vectors = (metric.inverse @ turn).T[order]
    return Parts(jnp.take_along_axis(values, order, axis=1), vectors)


@jax.jit
def squares(x: Float[Array, "tokens in"], found: Parts) -> Float[Array, "U k tokens"]:
    """What each square adds at each token, ``values_i (vectors_i . x)^2``."""
    with jax.default_matmul_precision("highest"):
        return found.values[:, :, None] * jnp.einsum("uki,ni->ukn", found.vectors, x) ** 2


@functools.partial(jax.jit, static_argnames="numbers")
def partial_sums(
    x: Float[Array, "tokens in"], found: Parts | Pairs, numbers: tuple[int, ...]
) -> Float[Array, "U numbers tokens"]:
    """``sum_{i < n} values_i (vectors_i . x)^2``, or the sum of the first n pairs, for every n in ``numbers``.

    Memory: ``U k tokens`` numbers, twice.
    """
    if isinstance(found, Pairs):
        with jax.default_matmul_precision("highest"):
            return found.weights @ (x.T[found.i] * x.T[found.j])
    counted = jnp.asarray([[i < number for i in range(found.values.shape[1])] for number in numbers])
    weights = jnp.where(counted[None], found.values[:, None], 0)  # [U, numbers, k]; XLA's cumsum is slow
    with jax.default_matmul_precision("highest"):
        return weights @ (jnp.einsum("uki,ni->ukn", found.vectors, x) ** 2)
