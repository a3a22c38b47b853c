"""Eigendecompositions of interaction matrices, and summaries of a matrix by which features are ranked.

The summaries take symmetric matrices ``q [..., in, in]`` and return a number (or a matrix) for each. The result for a
matrix depends on that matrix alone, so any split into batches gives the same result. They work inside ``jit``, ``vmap``
and ``grad``, and are functions for ``Tracer.compute``. They compute in float32 or float64, whatever numbers they are
given, and raise ``ValueError`` unless q holds square matrices.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", sections 3.3, 5.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer as JaxTracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from bilinear_jax.errors import check_count
from bilinear_jax.linalg.basis import factor_basis
from bilinear_jax.linalg.devices import matrixwise, spread
from bilinear_jax.linalg.eigenpairs import top_eigenpairs
from bilinear_jax.linalg.eigenvalues import eigvalsh
from bilinear_jax.linalg.metric import Metric, as_metric
from bilinear_jax.linalg.scale import as_floats, shift, unit_scale
from bilinear_jax.tensor import BilinearTensor

ENDS = ("magnitude", "positive", "negative")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "vectors"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of interaction matrices: ``Q_u = sum_i values[u, i] vectors[u, :, i] vectors[u, :, i]^T``."""

    values: Array  # [U, in], ascending
    vectors: Array  # [U, in, in]: column i belongs to values[:, i]; orthonormal, each up to its sign


def eigh(
    tensor: BilinearTensor,
    directions: Float[Array, "U out"],
    *,
    basis: Float[Array, "in new"] | None = None,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> Spectrum:
    """All eigenpairs of the interaction matrices of all output directions: exact, by dense ``eigh``.

        Q_u = 1/2 (left^T diag(g) right + right^T diag(g) left) = V diag(l) V^T        g = down^T u

    Interaction matrices are built with the highest matmul precision, whatever the default of the device is.

    Args:
        directions: the output directions, one a row, for example the encoder rows of an SAE.
        basis: if given, the eigenpairs are those of ``basis^T Q_u basis``. There are ``rank = min(in, new)`` of them;
            all other eigenvalues are 0. No ``[new, new]`` matrix is formed (``linalg.basis.factor_basis``). Vectors are
            ``[U, new, rank]``.
        batch_size: matrices that are built and decomposed together. It does not change the result.
        mesh: the directions are sharded over its devices, for example ``jax.make_mesh((8,), ("features",))``.

    Memory: the result, ``U * in * (in + 1)`` numbers, and about ``batch_size * in * (hidden + 3 * in)``. Cost: it grows
    as ``U * in^2 * (hidden + 10 in)``.

    Example:
        The layer y = x_0 x_1 = 1/4 (x_0 + x_1)^2 - 1/4 (x_0 - x_1)^2:

        >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0]]))
        >>> spectrum = eigh(tensor, jnp.array([[1.0], [4.0]]))
        >>> spectrum.values.round(4).tolist()
        [[-0.5, 0.5], [-2.0, 2.0]]
        >>> [round(abs(float(v)), 3) for v in spectrum.vectors[0, :, 1]]
        [0.707, 0.707]
    """
    check_count("batch_size", batch_size)
    decompose = functools.partial(_decompose, batch_size=batch_size)
    with jax.default_matmul_precision("highest"):
        isometry = None
        if basis is not None:
            root, isometry = factor_basis(basis)
            tensor = tensor.in_basis(root)
        values, vectors = spread(decompose, mesh, tensor, directions)
        return Spectrum(values, vectors if isometry is None else jnp.einsum("ni,uij->unj", isometry, vectors))


@functools.partial(jax.jit, static_argnames="batch_size")
def _decompose(tensor, directions, batch_size: int):
    def one(direction):
        return matrixwise(jnp.linalg.eigh)(tensor.interaction(direction[None])[0])

    return jax.lax.map(one, directions, batch_size=min(batch_size, max(len(directions), 1)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "vectors", "patterns", "residuals", "bounds", "converged", "steps", "explained"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TopSpectrum:
    """The most extreme eigenpairs of each interaction matrix, and bounds on their errors."""

    values: Array  # [U, k], signed, the largest |value| first (or the most positive, or the most negative)
    vectors: Array  # [U, k, in]: row i belongs to values[:, i]; orthonormal (with a metric p_i: p C p = 1), up to sign
    patterns: Array  # [U, k, in]: with a metric, what the data has there, C vectors; else the vectors
    residuals: Array  # [U, k]: r = |Q v - l v|; an eigenvalue always lies within r of l
    bounds: (
        Array  # [U, k]: min(r, r^2 / gap), the largest possible error of l if no eigenvalue was missed, see top_eigh
    )
    converged: Array  # [U] bool: the bounds are within the tolerance
    steps: Array  # [U] int: products of Q_u with a vector; 0 where it was decomposed densely
    explained: Array  # [U]: sum of values^2 / |Q_u|_F^2, the share of the matrix in these eigenpairs


def top_eigh(
    tensor: BilinearTensor,
    directions: Array,
    k: int = 2,
    *,
    which: str = "magnitude",
    rtol: float = 1e-4,
    max_steps: int | None = None,
    key: Array | None = None,
    basis: Array | None = None,
    metric: Metric | Array | np.ndarray | None = None,
    block_size: int = 2,
    exact: bool = False,
    mesh: Mesh | None = None,
) -> TopSpectrum:
    """The k extreme eigenpairs of the interaction matrix of every output direction, from the factors alone.

    No matrix is built. All directions are multiplied by ``left`` and ``right`` together, at ``8 hidden in`` flops for
    each direction and step, and a Lanczos process for each finds its eigenpairs (see ``linalg.lanczos``). Directions
    that do not converge are decomposed densely. So are all directions if that is faster (few inputs, or many pairs).

    **What is certain.** ``residuals`` always hold: an eigenvalue of Q_u lies within r of the value l. ``bounds`` are
    sharper: ``r^2 / gap``, where gap is at least the distance from l to the nearest other eigenvalue (Kato and Temple,
    sharpened by Lehmann's bound). This distance is known only if all eigenvalues near l have shown. Both include
    rounding. A direction has ``converged`` if ``sum(bounds) <= rtol * sum(|values|)``, so that the sum of the k
    |values| is exact to rtol (or to rounding), and if no other eigenvalue that has begun to show can exceed the last of
    them by more.

    **What is not certain.** An eigenvector that is nearly orthogonal to all of the random start shows late. So the
    search continues until the bounds are 30 times smaller than asked for. The misses that remain are in
    docs/benchmarks.md: none where eigenvalues stand out; up to 6 in 4,000 directions in pure noise, or where
    eigenvalues are independent of each other. ``exact=True`` misses none. An eigenvalue of higher multiplicity than
    ``block_size`` is found as often as its multiplicity if it stands out, because a second random start follows. At the
    edge of a continuum it is found only ``block_size`` times.

    Args:
        directions: the output directions ``[U, out]``, one a row.
        k: number of eigenpairs of each direction.
        which: "magnitude": the largest |eigenvalues|; "positive": the largest eigenvalues; "negative": the smallest.
        rtol: tolerance of the sum of the k |values|, relative to it. Above 1e-4 it only defines what counts as
            converged and saves no time: a search that ends early has seen too few eigenvalues for its bounds to hold.
        max_steps: products of a Q_u with a vector before it is decomposed densely. By default ``in / 8``, at least 128
            and at least 12 k.
        key: of the random start. The default is fixed, so the same input gives the same numbers.
        basis: if given, the eigenpairs are those of ``basis^T Q_u basis``, as in ``eigh``.
        metric: if given, the eigenpairs are those of ``C^(1/2) Q_u C^(1/2)``: a ``linalg.metric.Metric``, or C itself,
            the second moment E[x x^T] of the inputs (with a basis, of the new coordinates). Then ``x^T Q_u x`` is the
            sum over all i of ``values[u, i] (vectors[u, i] . x)^2``, value i is what part i adds to it on average, and
            residuals, bounds and explained are those of the matrix in the metric. For Gaussian inputs of mean 0,
            explained is the share of the variance. ``Tracer.metric`` measures C on text.
        block_size: start vectors of each direction, multiplied together. In pure noise, 1 is a third faster, but misses
            an eigenvalue in three of a thousand directions; 2 in one of several thousand. More than 2 take longer.
        exact: decompose every matrix densely. This is slower, but misses nothing.
        mesh: the directions are sharded over its devices.

    Memory: factors, result, ``U * hidden`` numbers and ``512 * (hidden + (24 + 3 k) in)``. If there are more than a few
    directions, also 4 matrices ``[hidden, hidden]`` for the norms.

    Inside ``grad``, values and explained have gradients (``dl = v^T dQ v``). Vectors and residuals do not.

    Raises:
        ValueError: if k, rtol, block_size or which is out of range, the directions have another width, there are no
            directions, the factors are neither float32 nor float64, or (outside ``jit``) a value is not finite.

    Example:
        >>> left, right = jax.random.normal(jax.random.key(0), (2, 300, 200))
        >>> tensor = BilinearTensor(left, right, jax.random.normal(jax.random.key(1), (5, 300)))
        >>> top, exact = top_eigh(tensor, jnp.eye(5)), eigh(tensor, jnp.eye(5))
        >>> bool(jnp.allclose(jnp.abs(top.values[:, 0]), jnp.abs(exact.values).max(axis=1), rtol=1e-4))
        True
        >>> top.converged.tolist(), bool((top.residuals < 1).all())
        ([True, True, True, True, True], True)
    """
    columns = basis
    if metric is not None:
        metric = as_metric(metric)
        columns = _in_metric(tensor, basis, metric)
    _check_request(tensor, directions, columns, k, which, rtol, max_steps, block_size)
    steps = max(128, tensor.n_in // 8, 12 * k) if max_steps is None else max_steps
    key = jax.random.key(0) if key is None else key
    signed, directions = which != "magnitude", -directions if which == "negative" else directions  # the largest of -Q
    top = _top_eigh(tensor, directions, columns, key, k, signed, float(rtol), steps, block_size, exact, mesh)
    if which == "negative":
        top = dataclasses.replace(top, values=-top.values)
    if metric is None:
        return top
    with jax.default_matmul_precision("highest"):
        patterns, vectors = top.vectors @ metric.root.T, top.vectors @ metric.inverse.T
    return dataclasses.replace(top, vectors=vectors, patterns=patterns)


def _in_metric(tensor: BilinearTensor, basis, metric: Metric) -> Array:
    """The columns in which the form is that of white coordinates."""
    wide = tensor.n_in if basis is None else basis.shape[-1]
    if metric.n_in != wide:
        of = "the inputs" if basis is None else "the columns of the basis"
        raise ValueError(f"the metric is of {metric.n_in} coordinates, but it must be of {wide}, {of}")
    if basis is None:
        return metric.root.astype(tensor.left.dtype)
    with jax.default_matmul_precision("highest"):
        return basis @ metric.root.astype(basis.dtype)


@functools.partial(jax.jit, static_argnames=("k", "signed", "rtol", "max_steps", "block_size", "exact", "mesh"))
def _top_eigh(tensor, directions, basis, key, k, signed, rtol, max_steps, block_size, exact, mesh) -> TopSpectrum:
    with jax.default_matmul_precision("highest"):
        tensor, at_inputs, at_outputs = tensor.unit()
        isometry, exponents = None, at_inputs + at_outputs
        if basis is not None:
            root, isometry = factor_basis(basis)
            root, at_root = unit_scale(root)
            tensor, at_inputs, _ = tensor.in_basis(root).unit()
            exponents = exponents + 2 * at_root + at_inputs
        directions, at_directions = unit_scale(directions, axis=1)
        gates, at_gates = tensor.scaled_gates(directions)
        norms = shift(tensor.norms(directions), -at_gates[:, 0])
        exponents = exponents + at_directions + at_gates

        def solve(shared, rows):
            return top_eigenpairs(
                *shared, *rows, k=k, signed=signed, rtol=rtol, max_steps=max_steps, block=block_size, exact=exact
            )

        top = spread(solve, mesh, (tensor.left, tensor.right, key), (gates,))
        vectors = top.vectors if isometry is None else jnp.einsum("ni,uki->ukn", isometry, top.vectors)
        explained = _ratio(jnp.sum(top.values**2, axis=-1), norms**2)
    exponents = jnp.broadcast_to(exponents, top.values.shape)
    values, residuals, bounds = (shift(part, exponents) for part in (top.values, top.residuals, top.bounds))
    return TopSpectrum(values, vectors, vectors, residuals, bounds, top.converged, top.steps, explained)


def _check_request(tensor: BilinearTensor, directions, basis, k, which, rtol, max_steps, block_size) -> None:
    inputs, dtype = tensor.n_in, tensor.left.dtype
    if basis is not None and (basis.ndim != 2 or basis.shape[0] != inputs):
        raise ValueError(f"basis has shape {basis.shape}, but it must be [{inputs}, new], one new coordinate a column")
    pairs = inputs if basis is None else min(basis.shape)
    if directions.ndim != 2 or directions.shape[1] != tensor.n_out:
        raise ValueError(
            f"directions have shape {directions.shape}, but they must be rows [U, {tensor.n_out}] for this tensor"
        )
    if not len(directions):
        raise ValueError("there are no directions: give at least one row")
    if not hasattr(k, "__index__") or not 1 <= k <= pairs:
        raise ValueError(f"k is {k}, but it must be between 1 and {pairs} (the number of inputs)")
    if which not in ENDS:
        raise ValueError(f"which must be one of {', '.join(ENDS)}, got {which!r}")
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"eigenvalues need factors of float32 or float64, got {dtype}: convert them with astype")
    smallest = 32 * float(jnp.finfo(dtype).eps)
    if not smallest <= rtol < 1:
        raise ValueError(f"rtol is {rtol}, but it must be between {smallest:.1e} (what {dtype} can hold) and 1")
    for name, number in (("block_size", block_size), ("max_steps", max_steps)):
        if number is not None:
            check_count(name, number)
    given = {"left": tensor.left, "right": tensor.right, "down": tensor.down, "directions": directions, "basis": basis}
    for name, array in given.items():
        if array is None or isinstance(array, JaxTracer):
            continue
        with jax.ensure_compile_time_eval():
            finite = bool(jnp.isfinite(array).all())
        if not finite:
            raise ValueError(f"{name} holds values that are not finite")


def truncated_eigenvalues(q: Shaped[Array, "*batch in in"], k: int = 2) -> Float[Array, "*batch"]:
    """The sum of the k largest ``|l_i|`` over the eigenvalues l of q: how strong its strongest patterns are.

    Raises:
        ValueError: if k is not in 1 ... in.

    Example:
        >>> float(truncated_eigenvalues(jnp.diag(jnp.array([1.0, -5.0, 3.0])), k=2))
        8.0
    """
    q = _matrices(q)
    if not 1 <= k <= q.shape[-1]:
        raise ValueError(f"k is {k}, but it must be between 1 and {q.shape[-1]} (the number of eigenvalues)")
    return jnp.sum(jax.lax.top_k(jnp.abs(eigvalsh(q)), k)[0], axis=-1)


def effective_rank(q: Shaped[Array, "*batch in in"]) -> Float[Array, "*batch"]:
    """``(sum |l_i|)^2 / sum l_i^2`` over the eigenvalues l of q: r if q has r equal |l_i|; 0 for the zero matrix.

    Example:
        >>> round(float(effective_rank(jnp.diag(jnp.array([2.0, -2.0, 0.0])))), 4)
        2.0
    """
    magnitudes, _ = unit_scale(jnp.abs(eigvalsh(_matrices(q))), axis=-1)
    return _ratio(jnp.sum(magnitudes, axis=-1) ** 2, jnp.sum(magnitudes**2, axis=-1))


def kurtosis(q: Shaped[Array, "*batch in in"]) -> Float[Array, "*batch"]:
    """Excess kurtosis of the entries of a matrix: ``mean((q - m)^4) / mean((q - m)^2)^2 - 3`` with m their mean.

    It is 0 for Gaussian entries and large if a few entries stand out. For a constant matrix it is defined as 0. The
    original code standardises each entry over the matrices of a batch, so its result depends on the batch. This one
    does not.

    Example:
        >>> round(float(kurtosis(jnp.array([[0.0, 0.0], [0.0, 4.0]]))), 3)  # deviations -1 -1 -1 3: 21 / 3^2 - 3
        -0.667
    """
    q = _matrices(q)
    entries, _ = unit_scale(q.reshape(*q.shape[:-2], q.shape[-1] ** 2), axis=-1)
    deviations, _ = unit_scale(entries - jnp.mean(entries, axis=-1, keepdims=True), axis=-1)
    variance = jnp.mean(deviations**2, axis=-1)
    return jnp.where(variance > 0, _ratio(jnp.mean(deviations**4, axis=-1), variance**2) - 3, 0)


def outliers(
    q: Shaped[Array, "*batch in in"], cross_factor: float = 6.0, self_factor: float = 3.0
) -> Float[Array, "*batch in in"]:
    """The outlying entries of a matrix, as a lower-triangular matrix o. All others are 0.

        cross  o[i, j] = 2 q[i, j]  for i > j, where q[i, j] is an outlier among the entries below the diagonal
        self   o[i, i] = q[i, i]    where it is an outlier among the diagonal entries

    An entry is an outlier if it lies outside ``[q1 - factor (q3 - q1), q3 + factor (q3 - q1)]``, with q1 and q3 the
    quartiles (linearly interpolated) of its kind. A pair of inputs acts through two equal entries, hence the factor 2:
    ``x^T o x`` is the part of ``x^T q x`` in the outliers.

    The original code confuses the position of a cross outlier in the list of entries below the diagonal with its
    position in the flattened matrix. That puts it in a wrong row and column. Here it stays at (i, j).

    Example:
        >>> q = jnp.zeros((4, 4)).at[2, 1].set(5.0).at[1, 2].set(5.0)
        >>> [outliers(q).shape, float(outliers(q)[2, 1]), float(jnp.abs(outliers(q)).sum())]
        [(4, 4), 10.0, 10.0]
    """
    q = _matrices(q)
    rows, columns = np.tril_indices(q.shape[-1], -1)
    diagonal = np.arange(q.shape[-1])
    result = jnp.zeros_like(q).at[..., diagonal, diagonal].set(_outlying(q[..., diagonal, diagonal], self_factor))
    if not rows.size:
        return result
    return result.at[..., rows, columns].set(2 * _outlying(q[..., rows, columns], cross_factor))


def _matrices(q: Any) -> Float[Array, "*batch in in"]:
    """q as floats. Raises ``ValueError`` unless it holds square matrices of real numbers."""
    q = as_floats("q", q)
    if q.ndim < 2 or q.shape[-1] != q.shape[-2] or not q.shape[-1]:
        raise ValueError(f"q has shape {q.shape}, but it must be square matrices [..., in, in]")
    return q


def _outlying(x: Float[Array, "*batch n"], factor: float) -> Float[Array, "*batch n"]:
    """x where it is an outlier along its last axis, else 0."""
    q1, q3 = (jnp.broadcast_to(q[..., None], x.shape) for q in jnp.quantile(x, jnp.array([0.25, 0.75]), axis=-1))
    margin = factor * (q3 - q1)
    return jnp.where((x < q1 - margin) | (x > q3 + margin), x, 0)


def _ratio(numerator: Float[Array, "*batch"], denominator: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """numerator / denominator, and 0, with gradient 0, where the denominator is 0."""
    nothing = denominator <= 0  # False for nan, so that nan is passed on
    return jnp.where(nothing, 0, numerator / jnp.where(nothing, 1, denominator))
