"""Structure that the outputs of a bilinear layer share: decompositions of the whole tensor, not of one output's matrix.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 4, and the
appendix where the layer of an image classifier is decomposed this way.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bilinear_jax.tensor import BilinearTensor


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["singular_values", "directions", "tensor"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class HOSVD:
    """The output directions along which a layer computes most, and what it computes along each."""

    singular_values: Array  # [n], descending: the Frobenius norm of each direction's interaction matrix
    directions: Array  # [n, out]: orthonormal rows; of each, the entry of largest |value| is positive
    tensor: BilinearTensor  # its output i is directions[i] . y: interaction(jnp.eye(n)[i : i + 1]) is that matrix


def hosvd(tensor: BilinearTensor, n: int | None = None) -> HOSVD:
    """The higher-order singular value decomposition of a bilinear layer, with respect to its outputs.

        B[o, i, j] = sum_k  d_k[o] Q_k[i, j]      d_k . d_l = <Q_k, Q_l> = 0 for k != l,  |d_k| = 1,  |Q_k| = s_k

    B is the tensor, symmetrised in its two inputs as every interaction matrix is. This is the singular value
    decomposition of B unfolded to ``[out, in * in]``: s_k are its singular values, and ``Q_k / s_k`` its right singular
    vectors. Of all tensors that write into n directions only, the one cut off after n terms is the nearest to B, at a
    distance of ``sqrt(s_{n+1}^2 + ... + s_out^2)``; and the sum of all s_k^2 is that of ``|Q_o|^2`` over the outputs.

    No unfolding is formed: the d_k are the eigenvectors of ``B B^T = down K down^T``, with ``K = tensor.gram()``, and
    each s_k is then taken as the norm of its own Q_k. Squaring costs small directions their accuracy: those with s_k
    below about ``sqrt(eps) s_1``, 3e-4 s_1 in float32, are any mixture of each other, though s_k remains the norm along
    the direction given. The directions of equal singular values are determined only up to a rotation, too.

    Derivatives: the first ones of the singular values are exact (which are stationary in the directions), and finite
    where some are equal or 0; higher ones are not. Those of the directions are not finite where some are equal.

    Args:
        n: how many directions to return, those of the largest singular values; all ``out`` unless given.

    Raises:
        ValueError: if n is not in 1 ... out.

    Time: ``6 hidden^2 in + 4 out hidden^2 + 10 out^3`` flops, about. Memory: four matrices ``[hidden, hidden]`` and
    four ``[out, out]``.

    Example:
        Two outputs that both read x_0 x_1, with weights 3 and 4, and nothing else:

        >>> one = jnp.array([[1.0, 0.0]])
        >>> shared = hosvd(BilinearTensor(one, one[:, ::-1], jnp.array([[3.0], [4.0]])))
        >>> [round(float(d), 4) for d in shared.directions[0]]
        [0.6, 0.8]
        >>> shared.tensor.interaction(jnp.eye(2)[:1]).round(4).tolist()[0]  # all there is: 5 x_0 x_1
        [[0.0, 2.5], [2.5, 0.0]]
    """
    n = tensor.n_out if n is None else n
    if not 1 <= n <= tensor.n_out:
        raise ValueError(f"n must lie in 1 ... {tensor.n_out} (the outputs of the tensor), got {n}")
    gram = tensor.gram()
    with jax.default_matmul_precision("highest"):
        squared = tensor.down @ gram @ tensor.down.T
        directions = jnp.linalg.eigh((squared + squared.T) / 2)[1].T
        # The root of an eigenvalue would be off by eps s_1^2 / s_k; the norm along the same direction is not.
        singular_values = tensor.norms(jax.lax.stop_gradient(directions), gram)
        largest = jax.lax.top_k(singular_values, n)[1]
        singular_values, directions = singular_values[largest], directions[largest]
        leading = jnp.take_along_axis(directions, jnp.argmax(jnp.abs(directions), axis=1, keepdims=True), axis=1)
        directions = jnp.where(leading < 0, -directions, directions)
        return HOSVD(singular_values, directions, tensor.out_basis(directions))
