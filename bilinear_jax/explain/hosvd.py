"""Structure that the outputs of a bilinear layer share: a decomposition of the whole tensor.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 4, and the
appendix where the layer of an image classifier is decomposed this way.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bilinear_jax.linalg.scale import shift
from bilinear_jax.tensor import BilinearTensor


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["singular_values", "directions", "tensor"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class HOSVD:
    """The output directions along which a layer computes most, and what it computes along each."""

    singular_values: Array  # [n], descending: the Frobenius norm of each direction's interaction matrix
    directions: Array  # [n, out]: orthonormal rows; the entry of largest |value| in each is positive
    tensor: BilinearTensor  # its output i is directions[i] . y: interaction(jnp.eye(n)[i : i + 1]) is that matrix


def hosvd(tensor: BilinearTensor, n: int | None = None) -> HOSVD:
    """The higher-order singular value decomposition of a bilinear layer, with respect to its outputs.

        B[o, i, j] = sum_k  d_k[o] Q_k[i, j]      d_k . d_l = <Q_k, Q_l> = 0 for k != l,  |d_k| = 1,  |Q_k| = s_k

    B is the tensor, symmetrised in its two inputs as every interaction matrix is. The decomposition is the singular
    value decomposition of B unfolded to ``[out, in * in]``: s_k are the singular values, and ``Q_k / s_k`` the right
    singular vectors. Cut off after n terms, it is the tensor nearest to B that writes into n directions only. Its
    distance to B is ``sqrt(s_{n+1}^2 + ... + s_out^2)``. The sum of all s_k^2 is the sum of ``|Q_o|^2`` over the
    outputs.

    No unfolding is formed. The d_k are the eigenvectors of ``B B^T = down K down^T``, with ``K = tensor.gram()``, and
    each s_k is then computed as the norm of its own Q_k. The square makes small directions less accurate: those with
    s_k below about ``sqrt(eps) s_1``, 3e-4 s_1 in float32, can be any mixture of each other. Even so, s_k is the norm
    along the direction returned. Directions with equal singular values are also determined only up to a rotation.

    Derivatives: the first derivatives of the singular values are exact (they are stationary in the directions), and
    finite where some values are equal or 0. Higher ones are not. The derivatives of the directions are not finite where
    some values are equal.

    Args:
        n: how many directions to return, those of the largest singular values; None: all ``out``.

    Raises:
        ValueError: if n is not in 1 ... out.

    Cost: about ``6 hidden^2 in + 4 out hidden^2 + 10 out^3`` flops. Memory: four matrices ``[hidden, hidden]`` and four
    ``[out, out]``.

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
        raise ValueError(f"n is {n}, but it must be between 1 and {tensor.n_out} (the outputs of the tensor)")
    unit, at_inputs, at_down = tensor.unit()
    gram = unit.gram()
    with jax.default_matmul_precision("highest"):
        squared = unit.down @ gram @ unit.down.T
        directions = jnp.linalg.eigh((squared + squared.T) / 2)[1].T
        # The root of an eigenvalue has an error of eps s_1^2 / s_k; the norm along the same direction does not.
        singular_values = unit.norms(jax.lax.stop_gradient(directions), gram)
        largest = jax.lax.top_k(singular_values, n)[1]
        singular_values, directions = singular_values[largest], directions[largest]
        leading = jnp.take_along_axis(directions, jnp.argmax(jnp.abs(directions), axis=1, keepdims=True), axis=1)
        directions = jnp.where(leading < 0, -directions, directions)
        singular_values = shift(singular_values, at_inputs + at_down)
        return HOSVD(singular_values, directions, tensor.out_basis(directions))
