"""Explanations by pairs of input features: terms of the form in the codes f of an SAE of the MLP's input.

    u . y  =  sum_{i <= j} c_ij f_i f_j  +  what the SAE's bias and error add        c_ij = 2 q_ij, and c_ii = q_ii

with ``q = D^T Q_u D``. The ways to choose them, by name:

    pairs by weight    the largest |q_ij|
    pairs by data      the largest |c_ij| sd(f_i f_j) on the choosing tokens: what the term adds to the variance alone
    pairs greedy       of the ``CANDIDATES`` best by data, one after another: the one that leaves least of the variance,
                       with new least-squares weights in place of c_ij (orthogonal least squares: Chen et al. 1989)

And the control, ``random pairs``: pairs at random among those that fire together on some choosing token, with weights
of the same kind.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilinear_jax.explain.batches import interaction
from bilinear_jax.explain.directions import Directions
from bilinear_jax.explain.parts import Pairs, Parts
from bilinear_jax.explain.samples import Layer
from bilinear_jax.nn.sae import SAE
from bilinear_jax.tensor import BilinearTensor

CANDIDATES = 256
"""Pairs among which the greedy way chooses."""


class PairChooser:
    """Pairs of inputs for some output directions, chosen on some tokens.

    Args:
        tensor: in the coordinates of the codes.
        codes: of the choosing tokens, with the constant input if the tensor has one.
        by: one of ``parts.PAIRS``.
        numbers: numbers of pairs, ascending.
        seed: of the control.
    """

    def __init__(
        self,
        tensor: BilinearTensor,
        codes: Float[np.ndarray, "tokens in"],
        by: str,
        numbers: tuple[int, ...],
        seed: int,
    ):
        self.tensor, self.codes, self.by, self.numbers = tensor, codes, by, numbers
        self.random = np.random.default_rng(seed)
        self.upper = np.triu_indices(codes.shape[1])
        mean, square = (np.asarray(one)[self.upper] for one in _products(jnp.asarray(codes)))
        self.spread = np.sqrt(np.maximum(square - mean**2, 0))
        self.together = np.flatnonzero(square > 0)

    def choose(self, rows: Float[Array, "U out"], z: Float[np.ndarray, "tokens U"]) -> Pairs:
        """The pairs of each output direction, whose products with the MLP's output are z."""
        return self._chosen(rows, z, self._ranked)

    def control(self, rows: Float[Array, "U out"], z: Float[np.ndarray, "tokens U"]) -> Pairs:
        """Random pairs in their place."""
        return self._chosen(rows, z, lambda coefficients, number: self.random.choice(self.together, number, False))

    def _chosen(self, rows, z, candidates) -> Pairs:
        q = np.asarray(interaction(self.tensor, rows, None))
        greedy = self.by == "pairs greedy"
        most = self.numbers[-1]
        wanted = min(max(CANDIDATES, most) if greedy else most, len(self.together))
        chosen, weights = [], []
        for one, target in zip(q, z.T, strict=True):
            coefficients = (2 * one - np.diag(np.diag(one)))[self.upper]
            places = candidates(coefficients, wanted)
            if greedy:
                places, its = self._greedy(places, target)
            else:
                its = np.array([np.where(np.arange(len(places)) < n, coefficients[places], 0) for n in self.numbers])
            chosen.append(_filled(places, most))
            weights.append(_filled(its.astype(np.float32), most))
        i, j = (jnp.asarray(side[np.array(chosen)], jnp.int32) for side in self.upper)
        return Pairs(i, j, jnp.asarray(np.array(weights)))

    def _ranked(self, coefficients: Float[np.ndarray, " pairs"], number: int) -> Int[np.ndarray, " n"]:
        """The pairs of the largest sizes, the largest first."""
        sizes = np.abs(coefficients)
        if self.by == "pairs by weight":
            sizes = np.where(self.upper[0] == self.upper[1], sizes, sizes / 2)
        else:
            sizes = sizes * self.spread
        best = np.argpartition(-sizes, number - 1)[:number]
        return best[np.argsort(-sizes[best], kind="stable")]

    def _greedy(self, places: Int[np.ndarray, " c"], z: Float[np.ndarray, " tokens"]):
        """The best of some pairs in the order in which they are taken, and least-squares weights for each number."""
        columns = (self.codes[:, self.upper[0][places]] * self.codes[:, self.upper[1][places]]).astype(np.float64)
        columns -= columns.mean(axis=0)
        gram, shared = columns.T @ columns, columns.T @ (z - z.mean())
        order = forward(gram, shared, min(self.numbers[-1], len(places)))
        weights = np.zeros((len(self.numbers), len(order)))
        for row, number in zip(weights, self.numbers, strict=True):
            some = order[:number]
            block = gram[np.ix_(some, some)]
            ridge = 1e-6 * np.trace(block) / max(len(some), 1)
            row[: len(some)] = np.linalg.solve(block + max(ridge, 1e-30) * np.eye(len(some)), shared[some])
        return places[order], weights


def of_codes(layer: Layer, inputs: SAE | Directions, basis: Float[Array, "in features"]) -> Layer:
    """A layer with the codes of the input SAE as its input. ``basis``: their decoder, see ``Tracer.basis``."""
    if isinstance(inputs, Directions) or inputs.config.site != "mlp_in":
        raise ValueError(
            f"pairs of input features need an SAE of mlp_in, but inp is {inputs.name}: make the tracer with such an "
            "SAE, or explain by data or weight"
        )
    tensor = BilinearTensor(layer.tensor.left @ basis, layer.tensor.right @ basis, layer.tensor.down)
    return dataclasses.replace(layer, tensor=tensor, inputs=inputs)


def forward(gram: Float[np.ndarray, "c c"], shared: Float[np.ndarray, " c"], number: int) -> Int[np.ndarray, " number"]:
    """Forward selection: columns one after another, each time the one after which least of the target is left.

    Args:
        gram: the products of the columns with each other.
        shared: their products with the target.
        number: how many to take. Fewer, if the others add nothing new.

    Example:
        >>> columns = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> forward(columns.T @ columns, columns.T @ np.array([2.0, 2.0, 1.0]), 2).tolist()
        [1, 2]
    """
    left, target, basis, order = np.diag(gram).copy(), shared.astype(np.float64).copy(), [], []
    least = 1e-9 * np.max(left, initial=0)
    for _ in range(number):
        gain = np.where(left > least, target**2 / np.maximum(left, 1e-300), -1.0)
        gain[order] = -1.0
        best = int(np.argmax(gain))
        if gain[best] < 0:
            break
        along = gram[:, best] - sum((one * one[best] for one in basis), start=np.zeros(len(gram)))
        along = along / np.sqrt(left[best])
        target = target - along * (target[best] / np.sqrt(left[best]))
        left = left - along**2
        basis.append(along)
        order.append(best)
    return np.array(order, int)


def inputs_read(found: Parts | Pairs, numbers: tuple[int, ...]) -> Int[np.ndarray, "U numbers"]:
    """How many inputs each explanation reads: those in its pairs, or with 1e-4 of the largest weight in its vectors.

    Eigenvectors of an MLP have a weight for nearly all of its inputs. The constant input counts as one.
    """
    if isinstance(found, Parts):
        sizes = np.abs(np.asarray(found.vectors))
        has = sizes > 1e-4 * sizes.max(axis=(1, 2), keepdims=True)
        return np.stack([has[:, :number].any(axis=1).sum(axis=-1) for number in numbers], axis=1)
    i, j, weights = (np.asarray(part) for part in found)
    return np.array(
        [
            [len(np.union1d(one[row != 0], other[row != 0])) for row in rows]
            for one, other, rows in zip(i, j, weights, strict=True)
        ]
    )


@jax.jit
def _products(codes: Float[Array, "tokens in"]):
    """``E[f_i f_j]`` and ``E[f_i^2 f_j^2]`` for all pairs."""
    with jax.default_matmul_precision("highest"):
        return codes.T @ codes / len(codes), (codes**2).T @ codes**2 / len(codes)


def _filled(values: np.ndarray, number: int) -> np.ndarray:
    """With zeros along the last axis, up to a number."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, number - values.shape[-1])])
