"""The strongest interactions between the columns of a basis, found without the matrix that holds them all.

Between input features d_i (the columns of a basis D, such as an SAE's decoder), an output direction u has the
interactions

    q_ij = d_i^T Q_u d_j        D^T Q_u D, [features, features], for each of U directions

Only a few of the U * features^2 interactions matter. Two bounds exclude the others:

    |q_ij| <= |Q_u|_2 |d_i| |d_j|                           the spectral bound: excludes whole directions
    |q_ij| <= min(|Q_u d_i| |d_j|, |Q_u d_j| |d_i|)         the row bound: excludes rows, and with them columns

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 5.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from bilinear_jax.errors import check_count
from bilinear_jax.explain.spectra import top_eigh
from bilinear_jax.linalg.scale import lengths, shift, unit_scale
from bilinear_jax.tensor import BilinearTensor


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["out", "i", "j", "value", "pruned", "pruned_rows", "pruned_features"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Interactions:
    """The n largest |interactions|, in falling order, and the share of the work that the bounds saved.

    A pair i < j stands for two equal entries, (i, j) and (j, i). With codes f, it adds ``2 value f_i f_j`` to what the
    output feature reads. A pair i = j adds ``value f_i^2``.
    """

    out: Array  # [n] int: the output direction
    i: Array  # [n] int: an input feature
    j: Array  # [n] int: the other one, i <= j
    value: Array  # [n]: d_i^T Q_out d_j, signed; ties in |value| go to the smallest (out, i, j)
    pruned: Array  # []: share of the U features (features + 1) / 2 pairs i <= j that were never computed
    pruned_rows: Array  # []: share of the U features rows that the row bound or the spectral bound excluded
    pruned_features: Array  # []: share of the U directions that the spectral bound excluded


def top_interactions(
    tensor: BilinearTensor,
    directions: Float[Array, "U out"],
    basis: Float[Array, "in features"],
    n: int = 50,
    *,
    batch_size: int = 8,
    tile: int = 256,
    mesh: Mesh | None = None,
) -> Interactions:
    """The n largest |entries| of ``D^T Q_u D`` over all output directions together. The result is exact.

    Directions are visited in falling order of their spectral bound ``|Q_u|_2 max_i |d_i|^2``. The visits end when this
    bound is below the threshold, the n-th largest |entry| so far. For a visited direction, ``Q_u D`` is computed. Its
    row norms give the row bounds, and only features whose row bound reaches the threshold remain. Entries are then
    computed between these features only, i <= j, one tile at a time.

    The spectral norm is that of ``spectra.top_eigh`` plus its residual. A direction that did not converge is always
    visited. A pair can be missed only if ``top_eigh`` missed the largest |eigenvalue|; its docstring says how rare that
    is. If one batch holds all directions, spectral norms would save nothing and are not computed. Every bound has a
    relative slack of ``8 in eps``, so rounding does not exclude anything.

    Args:
        directions: the output directions, one a row, for example the encoder rows of an SAE.
        basis: the input features, one a column, of any norm, for example the decoder columns of an SAE.
        n: how many pairs i <= j to find.
        batch_size: directions that each device visits between two exchanges of the threshold. It does not change the
            result.
        tile: width of the square tiles of entries that are computed at once. It does not change the result. 256 suits a
            CPU; a GPU needs larger tiles to be fully used.
        mesh: the directions are sharded over its devices, all axes together. Each device has a copy of the tensor and
            of the basis. None: the computation runs where the arrays are.

    Raises:
        ValueError: if widths do not agree, an array is not finite, n is not in 1 ... the number of pairs, or batch_size
            or tile is below 1.
        FloatingPointError: if the entries are too large for the dtype.

    Cost, for a visited direction: ``2 in (in hidden + in features + rows^2 / 2)`` operations, where rows are those that
    the row bound leaves. Memory, on each device and for any batch_size: a copy of the basis, what ``top_eigh`` needs,
    and at most ``features in + hidden in + 3 in^2 + 2 tile (in + tile) + 10 n`` numbers.

    Example:
        The layer y = x_0 x_1 between the features (1, 0), (0, 1) and (3, 4) / 5:

        >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0]]))
        >>> basis = jnp.array([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])
        >>> found = top_interactions(tensor, jnp.array([[2.0]]), basis, n=3)
        >>> [(int(i), int(j), round(float(value), 4)) for i, j, value in zip(found.i, found.j, found.value)]
        [(0, 1, 1.0), (2, 2, 0.96), (0, 2, 0.8)]
    """
    _check(tensor, directions, basis, n, batch_size, tile)
    (number, _), features = directions.shape, basis.shape[1]
    devices = 1 if mesh is None else mesh.size
    size = devices * batch_size
    tile = min(tile, features)
    columns = basis.T
    upper = np.full(number, np.inf, basis.dtype)
    if number > size:
        upper = _spectral_bounds(tensor, directions, basis, mesh)
    whole, part = (None, None) if mesh is None else (NamedSharding(mesh, spec) for spec in _specs(mesh))
    tensor, columns, directions = jax.device_put((tensor, columns, directions), whole)

    from tqdm import tqdm

    best = _Top(*(np.zeros(0, dtype) for dtype in (basis.dtype, np.int32, np.int32, np.int32)))
    rows = np.full(number, -1)  # rows expanded for each direction; -1: Q D was not computed
    order = np.argsort(-upper, kind="stable")
    with tqdm(total=number, desc="output features", disable=True if number <= size else None) as progress:
        for start in range(0, number, size):
            threshold = abs(best.value[-1]) if len(best.value) == n else basis.dtype.type(-1)
            if upper[order[start]] < threshold:
                break
            batch = order[start : start + size]
            # The last batch is filled up with directions that are never visited.
            bounds = np.pad(upper[batch], (0, size - len(batch)), constant_values=-np.inf)
            visited = np.pad(batch, (0, size - len(batch))).astype(np.int32)
            visits = (*jax.device_put((visited, bounds), part), jax.device_put(threshold, whole))
            found, counts, largest = jax.device_get(
                _search(tensor, columns, directions, *visits, n=n, tile=tile, mesh=mesh)
            )
            if not np.isfinite(largest).all():
                raise FloatingPointError(f"the interactions are too large for {basis.dtype}: scale the tensor down")
            rows[visited[counts >= 0]] = counts[counts >= 0]
            found = _Top(*(np.concatenate(parts) for parts in zip(best, found, strict=True)))
            real = np.flatnonzero(found.out >= 0)
            real = real[np.lexsort([part[real] for part in (found.j, found.i, found.out, -np.abs(found.value))])][:n]
            best = _Top(*(part[real] for part in found))
            progress.update(len(batch))

    expanded = np.maximum(rows, 0)
    pairs = number * features * (features + 1) // 2
    return Interactions(
        out=jnp.asarray(best.out),
        i=jnp.asarray(best.i),
        j=jnp.asarray(best.j),
        value=jnp.asarray(best.value),
        pruned=jnp.asarray(1 - np.sum(expanded * (expanded + 1) // 2) / pairs, basis.dtype),
        pruned_rows=jnp.asarray(1 - np.sum(expanded) / (number * features), basis.dtype),
        pruned_features=jnp.asarray(np.mean(rows < 0), basis.dtype),
    )


class Submatrix(NamedTuple):
    """The part of a projected interaction matrix between some input features."""

    matrix: Float[Array, "n n"]  # D^T Q D between these features
    features: Int[np.ndarray, " n"]  # the input features of its rows and columns, ascending
    explained: Float[Array, ""]  # |matrix|_F^2 / |D^T Q D|_F^2: its share of the whole; 0 if the whole is 0


def submatrix(
    q: Float[Array, "in in"], basis: Float[Array, "in features"], features: Int[np.ndarray, " n"]
) -> Submatrix:
    """The part of ``D^T Q D`` between some columns; |D^T Q D|_F^2 = tr(Q M Q M) with M = D D^T."""
    with jax.default_matmul_precision("highest"):
        q, at_q = unit_scale(q)
        basis, at_basis = unit_scale(basis)
        columns = basis[:, features]
        matrix = columns.T @ q @ columns
        product = q @ (basis @ basis.T)
        whole = jnp.sum(product * product.T)
    matrix = (matrix + matrix.T) / 2
    explained = jnp.where(whole > 0, jnp.sum(matrix**2) / jnp.where(whole > 0, whole, 1), 0)
    return Submatrix(shift(matrix, at_q + 2 * at_basis), features, explained)


class _Top(NamedTuple):
    """The largest interactions so far, sorted. Places not yet taken have out = -1 and come last."""

    value: Any  # all four are JAX arrays during the search, and NumPy arrays when they are merged
    out: Any
    i: Any
    j: Any

    @property
    def magnitude(self) -> Array:
        """|value|, and -1 in the places not yet taken."""
        return jnp.where(self.out >= 0, jnp.abs(self.value), -1)


def _spectral_bounds(tensor: BilinearTensor, directions, basis, mesh: Mesh | None) -> np.ndarray:
    """``|Q_u|_2 max_i |d_i|^2`` of each direction: at least every |entry| of its ``D^T Q_u D``."""
    spectrum = top_eigh(tensor, directions, k=1, mesh=mesh)
    norms = jnp.where(spectrum.converged, jnp.abs(spectrum.values[:, 0]) + spectrum.residuals[:, 0], jnp.inf)
    return np.asarray(norms * jnp.max(lengths(basis, axis=0)) ** 2 * _slack(len(basis), basis.dtype))


def _slack(width: int, dtype) -> float:
    """The factor that keeps a computed bound above a computed entry. Both are sums over the width of in."""
    return 1 + 8 * width * float(jnp.finfo(dtype).eps)


def _specs(mesh: Mesh) -> tuple[PartitionSpec, PartitionSpec]:
    """How to place an array on a mesh: with a copy on every device, and sharded over the devices."""
    return PartitionSpec(), PartitionSpec(mesh.axis_names)


@functools.partial(jax.jit, static_argnames=("n", "tile", "mesh"))
def _search(tensor, columns, directions, visited, bounds, threshold, *, n: int, tile: int, mesh: Mesh | None):
    """``_search_here`` on each device, for its part of the directions."""
    search = functools.partial(_search_here, n=n, tile=tile)
    if mesh is not None:
        whole, part = _specs(mesh)
        search = jax.shard_map(search, mesh=mesh, in_specs=(whole, whole, whole, part, part, whole), out_specs=part)
    with jax.default_matmul_precision("highest"):
        return search(tensor, columns, directions, visited, bounds, threshold)


def _search_here(tensor, columns, directions, visited, bounds, threshold, *, n: int, tile: int):
    """The n largest interactions of the directions visited, the rows expanded for each, and its largest row norm."""

    def visit(k, state):
        top, counts, largest = state

        def expand(top):
            q = tensor.interaction(directions[visited[k]][None])[0]
            return _search_one(q, columns, visited[k], top, threshold, tile)

        def skip(top):
            return top, jnp.full_like(counts[k], -1), jnp.zeros_like(largest[k])

        reached = jnp.maximum(threshold, top.magnitude[-1])
        top, count, norm = jax.lax.cond(bounds[k] >= reached, expand, skip, top)
        return top, counts.at[k].set(count), largest.at[k].set(norm)

    nothing = jnp.full_like(visited, -1, shape=n)
    top = _Top(jnp.zeros_like(bounds, shape=n), nothing, nothing, nothing)
    return jax.lax.fori_loop(0, len(visited), visit, (top, jnp.zeros_like(visited), jnp.zeros_like(bounds)))


def _search_one(q: Float[Array, "in in"], columns: Float[Array, "features in"], out, top: _Top, threshold, tile: int):
    """The interactions of one direction that are among the n largest, merged into ``top``."""
    n, (features, width) = len(top.out), columns.shape
    slack = _slack(width, columns.dtype)
    projected = columns @ q  # row i is Q d_i
    norms, sizes = lengths(projected), lengths(columns)
    bounds = slack * jnp.minimum(norms * jnp.max(sizes), sizes * jnp.max(norms))
    # At least n entries, on this direction's diagonal or found before, are as large as ``reached``.
    diagonal = jnp.abs(jnp.sum(projected * columns, axis=1))
    reached = jnp.maximum(threshold, jax.lax.top_k(jnp.concatenate([top.magnitude, diagonal]), n)[0][-1])
    left = bounds >= reached
    count = jnp.sum(left, dtype=out.dtype)
    # Ascending, so that each tile lists its pairs i <= j in order, and top_k gives ties to the first.
    order = jnp.nonzero(left, size=-(-features // tile) * tile, fill_value=0)[0].astype(out.dtype)

    def expand(a, b, top):
        rows, others = (jax.lax.dynamic_slice_in_dim(order, start * tile, tile) for start in (a, b))
        entries = projected[rows] @ columns[others].T
        row, other = a * tile + jnp.arange(tile)[:, None], b * tile + jnp.arange(tile)[None]
        magnitudes = jnp.where((row <= other) & (other < count), jnp.abs(entries), -1)

        def merge(top):
            best, places = jax.lax.top_k(magnitudes.ravel(), min(n, tile * tile))
            i, j = rows[places // tile], others[places % tile]
            parts = (entries.ravel()[places], jnp.where(best >= 0, out, -1), i, j)
            both = _Top(*(jnp.concatenate(pair) for pair in zip(top, parts, strict=True)))
            ordered = jax.lax.sort((-both.magnitude, both.out, both.i, both.j, both.value), num_keys=4)
            _, *names, value = (part[:n] for part in ordered)
            return _Top(value, *names)

        least = jnp.maximum(reached / slack, top.magnitude[-1])
        return jax.lax.cond(jnp.max(magnitudes) >= least, merge, lambda top: top, top)

    tiles = -(-count // tile)
    top = jax.lax.fori_loop(
        0, tiles, lambda a, top: jax.lax.fori_loop(a, tiles, lambda b, top: expand(a, b, top), top), top
    )
    return top, count, jnp.max(norms)


def _check(tensor: BilinearTensor, directions, basis, n: int, batch_size: int, tile: int) -> None:
    if directions.ndim != 2 or directions.shape[1] != tensor.n_out:
        raise ValueError(
            f"directions have shape {directions.shape}, but they must be rows [U, {tensor.n_out}] for this tensor"
        )
    if basis.ndim != 2 or basis.shape[0] != tensor.n_in:
        raise ValueError(
            f"the basis has shape {basis.shape}, but it must be [{tensor.n_in}, features], one feature a column"
        )
    pairs = len(directions) * basis.shape[1] * (basis.shape[1] + 1) // 2
    if not 1 <= n <= pairs:
        raise ValueError(
            f"n is {n}, but it must be between 1 and {pairs}, the pairs i <= j of {basis.shape[1]} features for "
            f"{len(directions)} directions"
        )
    for name, given in (("batch_size", batch_size), ("tile", tile)):
        check_count(name, given)
    arrays = {"left": tensor.left, "right": tensor.right, "down": tensor.down}
    for name, array in (arrays | {"directions": directions, "basis": basis}).items():
        if not bool(jnp.isfinite(array).all()):
            raise ValueError(f"{name} holds NaN or infinite numbers")
