"""What can be read from the weights about output features, one at a time: their eigenpairs and strongest pairs."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilinear_jax.explain.interactions import top_interactions
from bilinear_jax.explain.select import checked_features
from bilinear_jax.explain.spectra import effective_rank, top_eigh
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.linalg.devices import one_blas_thread
from bilinear_jax.linalg.scale import lengths, unit_columns, unit_scale
from bilinear_jax.tensor import BilinearTensor

FEATURES_AT_ONCE = 32  # output features whose matrices are held at once; does not change the result
TILE = 1024  # rows of D^T Q D that are held at once; does not change the result


@dataclasses.dataclass(frozen=True)
class Eigenpair:
    """One eigenvalue of an interaction matrix, and the input features that its eigenvector reads."""

    value: float
    bound: float  # the error of value is at most this
    share: float  # value^2 / |Q|^2
    reads: list[tuple[int, float]]  # input features, each with the cosine of its decoder column with the eigenvector;
    # the largest |cosine| first


@dataclasses.dataclass(frozen=True)
class FeatureWeights:
    """What can be read from the weights about one output feature, with interaction matrix Q and input decoder D."""

    feature: int
    norm: float  # |Q|, Frobenius
    effective_rank: float  # of Q
    eigenpairs: list[Eigenpair]  # the largest |value| first
    explained: float  # share of |Q|^2 in those eigenpairs, 0 to 1
    projected: float  # |D^T Q D|^2, the sum of squares of all interactions between input features
    pairs: Int[np.ndarray, "n 2"]  # input features i <= j of the largest |interactions|, the largest first
    weights: Float[np.ndarray, " n"]  # (D^T Q D)_ij of each pair
    q: Float[Array, "in in"]
    basis: Float[Array, "in features"]  # D; with biases, the constant input is the last feature

    def weights_of(self, pairs: Int[np.ndarray, "m 2"]) -> Float[np.ndarray, " m"]:
        """(D^T Q D)_ij of any pairs."""
        return pair_weights(self.q, self.basis, pairs)

    def between(self, features: Sequence[int]) -> Float[np.ndarray, "m m"]:
        """D^T Q D between some input features, in float64."""
        # On the host, because JAX would compile for every new number of features.
        columns = np.asarray(self.basis, np.float64)[:, list(features)]
        return columns.T @ np.asarray(self.q, np.float64) @ columns


def feature_weights(
    tracer: Tracer, features: Sequence[int], *, eigenpairs: int, reads: int, pairs: int
) -> Iterator[FeatureWeights]:
    """What can be read from the weights about each output feature, in the given order.

    Every matrix is decomposed densely, so no eigenvalue can be missed. The sign of an eigenvector is arbitrary. Here it
    is chosen so that its largest |cosine| with a decoder column is positive. A progress bar shows on a terminal.

    Args:
        eigenpairs: how many for each feature, those of largest |eigenvalue|; at most the number of the MLP's inputs.
        reads: how many input features describe an eigenvector.
        pairs: how many of the largest interactions for each feature; fewer if there are fewer.

    Raises:
        ValueError: if no feature is named, or one is named twice.
        UnknownNameError: if a feature does not exist.

    Memory: 32 interaction matrices at once, ``64 in (in + features)`` numbers.

    Example:
        >>> import bilinear_jax as bj
        >>> tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
        >>> one = next(feature_weights(tracer, [7], eigenpairs=2, reads=3, pairs=5))
        >>> one.pairs.shape, bool(np.allclose(one.weights, one.weights_of(one.pairs), atol=1e-6))
        ((5, 2), True)
    """
    features, tensor, size = checked_features(features, tracer), tracer.tensor, tracer.basis.shape[1]
    request = {"k": min(eigenpairs, tensor.n_in), "reads": reads, "pairs": min(pairs, size * (size + 1) // 2)}
    return _feature_weights(tensor, tracer.directions, tracer.basis, features, **request)


def _feature_weights(
    tensor: BilinearTensor, directions, basis, features: list[int], *, k: int, reads: int, pairs: int
) -> Iterator[FeatureWeights]:
    from tqdm.auto import tqdm

    batch = min(FEATURES_AT_ONCE, len(features))
    with tqdm(total=len(features), desc="reading weights", disable=None) as bar:
        for start in range(0, len(features), batch):
            some = features[start : start + batch]
            # The last batch is filled up with its last feature, so that only one shape is compiled.
            rows = directions[np.pad(some, (0, batch - len(some)), mode="edge")]
            with one_blas_thread():
                top = top_eigh(tensor, rows, k, exact=True)
                known = _known(tensor, rows, basis, top.vectors)
            q, known = known.q, jax.device_get(known._replace(q=None))
            values, bounds, explained = jax.device_get((top.values, top.bounds, top.explained))
            for place, feature in enumerate(some):
                square = float(known.norms[place]) ** 2
                listed = zip(values[place].tolist(), bounds[place].tolist(), known.cosines[place], strict=True)
                found = top_interactions(tensor, rows[place : place + 1], basis, pairs)
                yield FeatureWeights(
                    feature=feature,
                    norm=float(known.norms[place]),
                    effective_rank=float(known.ranks[place]),
                    eigenpairs=[
                        Eigenpair(value, bound, value**2 / square if square else 0.0, _reads(row, reads))
                        for value, bound, row in listed
                    ],
                    explained=float(explained[place]),
                    projected=math.ldexp(float(known.projected[place]), int(known.scale[place])),
                    pairs=np.stack([found.i, found.j], axis=-1).astype(np.int32),
                    weights=np.asarray(found.value, np.float64),
                    q=q[place],
                    basis=basis,
                )
                bar.update()


def pair_weights(
    q: Float[Array, "in in"], basis: Float[Array, "in features"], pairs: Int[np.ndarray, "n 2"]
) -> Float[np.ndarray, " n"]:
    """(D^T Q D)_ij of some pairs, computed one tile of rows at a time."""
    with jax.default_matmul_precision("highest"):
        projected = q @ basis
        weights = np.empty(len(pairs))
        for start in range(0, basis.shape[1], TILE):
            here = (pairs[:, 0] >= start) & (pairs[:, 0] < start + TILE)
            if here.any():
                tile = np.asarray(basis[:, start : start + TILE].T @ projected)
                weights[here] = tile[pairs[here, 0] - start, pairs[here, 1]]
    return weights


class _Known(NamedTuple):
    q: Float[Array, "U in in"] | None
    ranks: Float[Array, " U"]  # effective rank of each matrix
    norms: Float[Array, " U"]  # |Q|
    projected: Float[Array, " U"]  # |D^T Q D|_F^2 / 2^scale = tr(Q M Q M) / 2^scale, with M = D D^T
    scale: Int[Array, " U"]
    cosines: Float[Array, "U k features"]  # of each eigenvector with each decoder column


@jax.jit
def _known(tensor: BilinearTensor, directions, basis, vectors) -> _Known:
    with jax.default_matmul_precision("highest"):
        q = tensor.interaction(directions)
        unit, at_basis = unit_scale(basis)
        product, at = unit_scale(q @ jnp.broadcast_to(unit @ unit.T, q.shape), axis=(1, 2))
        cosines = vectors @ unit_columns(basis)
    squares = jnp.sum(product * product.swapaxes(1, 2), axis=(1, 2))
    scale = 2 * at[:, 0, 0] + 4 * at_basis
    return _Known(q, effective_rank(q), lengths(q, axis=(1, 2)), jnp.maximum(squares, 0), scale, cosines)


def _reads(cosines: Float[np.ndarray, " features"], n: int) -> list[tuple[int, float]]:
    order = np.argsort(-np.abs(cosines), kind="stable")[:n]
    sign = -1 if cosines[order[0]] < 0 else 1
    return [(int(feature), float(sign * cosines[feature])) for feature in order]
