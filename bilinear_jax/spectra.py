"""Eigendecompositions of interaction matrices, and the summaries of a matrix that features are ranked by.

The summaries take symmetric matrices ``q [..., in, in]`` and give a number (or a matrix) for each, which depends on
that matrix alone: any split into batches gives the same result. They work inside ``jit``, ``vmap`` and ``grad``, and
are what ``Tracer.compute`` is called with.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", sections 3.3, 5.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilinear_jax.tensor import BilinearTensor

Which = Literal["magnitude", "positive", "negative"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "vectors"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of interaction matrices: ``Q_u = sum_i values[u, i] vectors[u, :, i] vectors[u, :, i]^T``."""

    values: Array  # [U, in], ascending
    vectors: Array  # [U, in, in]: column i belongs to values[:, i]; orthonormal, each up to its sign


def eigh(tensor: BilinearTensor, directions: Float[Array, "U out"], *, batch_size: int = 32) -> Spectrum:
    """All eigenpairs of the interaction matrices of all output directions: exact, by dense ``eigh``.

        Q_u = 1/2 (left^T diag(g) right + right^T diag(g) left) = V diag(l) V^T        g = down^T u

    Interaction matrices are built with the highest matmul precision, whatever the default of the device is, and
    decomposed ``batch_size`` at a time, so the memory beyond the result, ``U * in * (in + 1)`` numbers, is about
    ``batch_size * in * (hidden + 3 * in)`` numbers. Time goes as ``U * in^2 * (hidden + 10 in)``.

    Args:
        directions: the output directions, a row each, for instance the encoder rows of an SAE.
        batch_size: matrices that are built and decomposed together; it changes no result.

    Example:
        The layer y = x_0 x_1 = 1/4 (x_0 + x_1)^2 - 1/4 (x_0 - x_1)^2:

        >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0]]))
        >>> spectrum = eigh(tensor, jnp.array([[1.0], [4.0]]))
        >>> spectrum.values.round(4).tolist()
        [[-0.5, 0.5], [-2.0, 2.0]]
        >>> [round(abs(float(v)), 3) for v in spectrum.vectors[0, :, 1]]
        [0.707, 0.707]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    def decompose(direction):
        return jnp.linalg.eigh(tensor.interaction(direction[None])[0])

    with jax.default_matmul_precision("highest"):
        values, vectors = jax.lax.map(decompose, directions, batch_size=min(batch_size, max(len(directions), 1)))
    return Spectrum(values, vectors)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "vectors", "residuals", "bounds", "converged", "steps", "explained"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TopSpectrum:
    """Some eigenpairs of each interaction matrix, the most extreme ones, and how exact they are."""

    values: Array  # [U, k], signed, the largest |value| first (the most positive or most negative if asked for)
    vectors: Array  # [U, k, in]: row i belongs to values[:, i]; orthonormal, each up to its sign
    residuals: Array  # [U, k]: r = |Q v - l v|; an eigenvalue lies within r of l, whatever else is true
    bounds: Array  # [U, k]: min(r, r^2 / gap), the Kato-Temple bound; gap: the distance of l to the other eigenvalues
    converged: Array  # [U] bool: every bound of the direction is within the tolerance
    steps: Array  # [U] int: products with Q_u that were spent; 0 where it was decomposed densely
    explained: Array  # [U]: sum of values^2 / |Q_u|_F^2, the share of the matrix that these eigenpairs are


def top_eigh(
    tensor: BilinearTensor,
    directions: Float[Array, "U out"],
    k: int = 2,
    *,
    which: Which = "magnitude",
    rtol: float = 1e-4,
) -> TopSpectrum:
    """The k extreme eigenpairs of the interaction matrix of every output direction (dense for now)."""
    spectrum = eigh(tensor, directions)
    order = {"magnitude": -jnp.abs(spectrum.values), "positive": -spectrum.values, "negative": spectrum.values}[which]
    chosen = jnp.argsort(order, axis=-1)[:, :k]
    values = jnp.take_along_axis(spectrum.values, chosen, axis=-1)
    vectors = jnp.swapaxes(jnp.take_along_axis(spectrum.vectors, chosen[:, None], axis=-1), 1, 2)
    residuals = jnp.zeros_like(values)
    explained = _ratio(jnp.sum(values**2, axis=-1), jnp.sum(spectrum.values**2, axis=-1))
    number = len(values)
    return TopSpectrum(
        values, vectors, residuals, residuals, jnp.ones(number, bool), jnp.zeros(number, jnp.int32), explained
    )


def truncated_eigenvalues(q: Float[Array, "*batch in in"], k: int = 2) -> Float[Array, "*batch"]:
    """``sum of the k largest |l_i|`` over the eigenvalues l of q: how strong its strongest patterns are.

    Raises:
        ValueError: if k is not in 1 ... in.

    Example:
        >>> float(truncated_eigenvalues(jnp.diag(jnp.array([1.0, -5.0, 3.0])), k=2))
        8.0
    """
    if not 1 <= k <= q.shape[-1]:
        raise ValueError(f"k must lie in 1 ... {q.shape[-1]} (the number of eigenvalues), got {k}")
    return jnp.sum(jax.lax.top_k(jnp.abs(jnp.linalg.eigvalsh(q)), k)[0], axis=-1)


def effective_rank(q: Float[Array, "*batch in in"]) -> Float[Array, "*batch"]:
    """``(sum |l_i|)^2 / sum l_i^2`` over the eigenvalues l of q: r for r equal ones; 0 for the zero matrix.

    Example:
        >>> round(float(effective_rank(jnp.diag(jnp.array([2.0, -2.0, 0.0])))), 4)
        2.0
    """
    magnitudes = jnp.abs(jnp.linalg.eigvalsh(q))
    return _ratio(jnp.sum(magnitudes, axis=-1) ** 2, jnp.sum(magnitudes**2, axis=-1))


def kurtosis(q: Float[Array, "*batch in in"]) -> Float[Array, "*batch"]:
    """Excess kurtosis of a matrix's own entries: ``mean((q - m)^4) / mean((q - m)^2)^2 - 3`` with m their mean.

    0 for Gaussian entries, large where few entries stand out; it is 0 for a constant matrix by definition here.
    The original standardises each entry over the matrices of a batch, so there it depends on the batch; not here.

    Example:
        >>> round(float(kurtosis(jnp.array([[0.0, 0.0], [0.0, 4.0]]))), 3)  # deviations -1 -1 -1 3: 21 / 3^2 - 3
        -0.667
    """
    entries = q.reshape(*q.shape[:-2], -1)
    deviations = entries - jnp.mean(entries, axis=-1, keepdims=True)
    variance = jnp.mean(deviations**2, axis=-1)
    return jnp.where(variance > 0, _ratio(jnp.mean(deviations**4, axis=-1), variance**2) - 3, 0)


def outliers(
    q: Float[Array, "*batch in in"], cross_factor: float = 6.0, self_factor: float = 3.0
) -> Float[Array, "*batch in in"]:
    """The outlying entries of a matrix, as a lower-triangular matrix o; all others are 0.

        cross  o[i, j] = 2 q[i, j]  for i > j, where q[i, j] is an outlier among the entries below the diagonal
        self   o[i, i] = q[i, i]    where it is an outlier among the diagonal entries

    An entry is an outlier if it lies outside ``[q1 - factor (q3 - q1), q3 + factor (q3 - q1)]``, with q1 and q3 the
    quartiles (linearly interpolated) of its kind. A pair of inputs acts through two equal entries, hence the 2:
    ``x^T o x`` is the part of ``x^T q x`` that the outliers carry.

    The original takes the position of a cross outlier in the list of entries below the diagonal for its position in
    the flattened matrix, which puts it in a wrong row and column; here it stays at its own (i, j).

    Example:
        >>> q = jnp.zeros((4, 4)).at[2, 1].set(5.0).at[1, 2].set(5.0)
        >>> [outliers(q).shape, float(outliers(q)[2, 1]), float(jnp.abs(outliers(q)).sum())]
        [(4, 4), 10.0, 10.0]
    """
    rows, columns = np.tril_indices(q.shape[-1], -1)
    diagonal = np.arange(q.shape[-1])
    result = jnp.zeros_like(q).at[..., diagonal, diagonal].set(_outlying(q[..., diagonal, diagonal], self_factor))
    if not rows.size:
        return result
    return result.at[..., rows, columns].set(2 * _outlying(q[..., rows, columns], cross_factor))


def _outlying(x: Float[Array, "*batch n"], factor: float) -> Float[Array, "*batch n"]:
    """x where it is an outlier among its last axis, else 0."""
    q1, q3 = (jnp.broadcast_to(q[..., None], x.shape) for q in jnp.quantile(x, jnp.array([0.25, 0.75]), axis=-1))
    margin = factor * (q3 - q1)
    return jnp.where((x < q1 - margin) | (x > q3 + margin), x, 0)


def _ratio(numerator: Float[Array, "*batch"], denominator: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """numerator / denominator, and 0, with gradient 0, where the denominator is 0."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)
