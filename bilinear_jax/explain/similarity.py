"""How similar two bilinear tensors are, as tensors and as functions: closed forms, from the factors alone.

Tensors are symmetrised in their inputs, as every interaction matrix is, because only the symmetric part acts. Let B and
C have the same inputs and outputs, and let ``Q_o`` and ``P_o`` be their interaction matrices of output o:

    <B, C>           = sum_o <Q_o, P_o> = sum_mn (down_B^T down_C)[m, n] K[m, n]
    K                = 1/2 ((left_B left_C^T) * (right_B right_C^T) + (left_B right_C^T) * (right_B left_C^T))
    E_x [y_B . y_C]  = sum_o (trace Q_o trace P_o) + 2 <B, C>          x standard normal

Nothing of size ``in^2 out`` is formed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilinear_jax.linalg.scale import shift
from bilinear_jax.tensor import BilinearTensor


def cross_gram(a: BilinearTensor, b: BilinearTensor) -> Float[Array, "hidden other"]:
    """Inner products between what the hidden units of two tensors add to an interaction matrix: K of the formula.

    ``cross_gram(a, a)`` is ``a.gram()``.

    Cost: ``8 hidden other in`` flops. Memory: four times the result.
    """
    (a, at_a, _), (b, at_b, _) = a.unit(), b.unit()
    return shift(plain_gram(a, b), at_a + at_b)


def plain_gram(a: BilinearTensor, b: BilinearTensor) -> Float[Array, "hidden other"]:
    """``cross_gram`` without scaling first: squares of very small or very large factors leave the range of floats."""
    with jax.default_matmul_precision("highest"):
        straight = (a.left @ b.left.T) * (a.right @ b.right.T)
        return (straight + (a.left @ b.right.T) * (a.right @ b.left.T)) / 2


def inner_product(a: BilinearTensor, b: BilinearTensor) -> Float[Array, ""]:
    """``<a, b>``: the sum over outputs of the inner products of their interaction matrices.

    Raises:
        ValueError: if the tensors have different inputs or outputs.

    Example:
        >>> product = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[2.0]]))
        >>> float(inner_product(product, product))  # 2 x_0 x_1 is [[0, 1], [1, 0]]
        2.0
    """
    _check_alike(a, b)
    (a, *at_a), (b, *at_b) = a.unit(), b.unit()
    return shift(plain_product(a, b), sum(at_a + at_b, jnp.int32(0)))


def plain_product(a: BilinearTensor, b: BilinearTensor) -> Float[Array, ""]:
    """``inner_product`` without scaling first, as ``plain_gram``."""
    with jax.default_matmul_precision("highest"):
        return jnp.sum((a.down.T @ b.down) * plain_gram(a, b))


def cosine_similarity(a: BilinearTensor, b: BilinearTensor) -> Float[Array, ""]:
    """``<a, b> / (|a| |b|)``: 1 if the tensors are equal up to a positive factor; 0 if either is 0.

    Example:
        >>> product = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[2.0]]))
        >>> square = BilinearTensor(jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 1.0]]), jnp.array([[1.0]]))
        >>> round(float(cosine_similarity(product, square)), 4)  # of [[0, 1], [1, 0]] and [[1, 1], [1, 1]]
        0.7071
    """
    return _normalised(plain_product, a, b)


def functional_similarity(a: BilinearTensor, b: BilinearTensor) -> Float[Array, ""]:
    """``E[y_a . y_b] / sqrt(E[|y_a|^2] E[|y_b|^2])`` over standard normal inputs; 0 if either tensor is 0.

    It compares the tensors as functions, including their means: two functions that hardly vary about the same mean are
    similar. For other inputs, first change to a basis in which they are white (``in_basis`` with a root of their
    covariance). If a tensor has a constant input, a normal one takes its place.

    Example:
        >>> product = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[2.0]]))
        >>> square = BilinearTensor(jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 1.0]]), jnp.array([[1.0]]))
        >>> round(float(functional_similarity(product, square)), 4)  # 4 / sqrt(4 * 12)
        0.5774
    """
    return _normalised(_expectation, a, b)


def _expectation(a: BilinearTensor, b: BilinearTensor) -> Float[Array, ""]:
    with jax.default_matmul_precision("highest"):
        traces = (tensor.down @ jnp.sum(tensor.left * tensor.right, axis=-1) for tensor in (a, b))
        return jnp.dot(*traces) + 2 * plain_product(a, b)


def _normalised(product, a: BilinearTensor, b: BilinearTensor) -> Float[Array, ""]:
    _check_alike(a, b)
    a, b = a.unit()[0], b.unit()[0]
    squares = jnp.stack([product(a, a), product(b, b)])
    nothing = jnp.any(squares <= 0)  # False for nan, so that nan is passed on
    return jnp.where(nothing, 0, product(a, b) / jnp.prod(jnp.sqrt(jnp.where(nothing, 1, squares))))


def _check_alike(a: BilinearTensor, b: BilinearTensor) -> None:
    if (a.n_in, a.n_out) != (b.n_in, b.n_out):
        raise ValueError(
            f"the tensors have {a.n_in} and {b.n_in} inputs, {a.n_out} and {b.n_out} outputs: the numbers must be equal"
        )
