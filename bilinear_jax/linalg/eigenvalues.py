"""Eigenvalues of symmetric matrices, without their eigenvectors.

On a CPU, ``jnp.linalg.eigvalsh`` also computes the eigenvectors and discards them. Here LAPACK reduces a matrix to a
tridiagonal T with the same eigenvalues. Bisection then finds the eigenvalues of a whole batch at once: for any x, the
number of eigenvalues below x is the number of negative pivots in the elimination of ``T - x``.

Both steps are public functions of JAX. LAPACK's routine for eigenvalues alone is not: jaxlib has only an internal name
for it. That call gets too little memory to work in blocks, so it is slower, and its float32 values are at least 20
times less exact, because bisection does not add up rounding errors. A callback to NumPy would use one core only, and
callbacks have hung on machines with few cores.

Source of the bisection: Barth, Martin and Wilkinson 1967, "Calculation of the eigenvalues of a symmetric tridiagonal
matrix by the method of bisection".
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilinear_jax.linalg.devices import matrixwise


@jax.custom_jvp
@jax.jit
def eigvalsh(q: Float[Array, "*batch in in"]) -> Float[Array, "*batch in"]:
    """Eigenvalues of the symmetric part ``(q + q^T) / 2`` of matrices, ascending; NaN if a matrix is not finite.

    The derivative is ``dl_i = v_i^T dq v_i``, with v_i the eigenvectors. They are computed only if a derivative is
    asked for. Where eigenvalues are equal, the derivative holds for their symmetric functions, such as their sum.
    Second derivatives hold only if all eigenvalues are distinct.

    Memory: a copy of q. On a CPU, JAX divides the matrices of a batch among the cores. Limit LAPACK's own threads to
    one (``threadpoolctl``), or the two slow each other down.

    Raises:
        ValueError: if q is neither float32 nor float64.

    Example:
        >>> eigvalsh(jnp.array([[1.0, 2.0], [2.0, 1.0]])).round(4).tolist()
        [-1.0, 3.0]
    """
    if q.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"eigenvalues need matrices of float32 or float64, got {q.dtype}: convert them with astype")
    if not q.size:
        return jnp.zeros(q.shape[:-1], q.dtype)
    return jax.lax.platform_dependent(q, cpu=_by_bisection, default=jnp.linalg.eigvalsh)


@eigvalsh.defjvp
def _eigvalsh_jvp(primals, tangents):
    (q,), (tangent,) = primals, tangents
    values, vectors = matrixwise(jnp.linalg.eigh)(q)
    with jax.default_matmul_precision("highest"):
        return values, jnp.sum(vectors * (tangent @ vectors), axis=-2)


def _by_bisection(q: Float[Array, "*batch in in"]) -> Float[Array, "*batch in"]:
    scale = jnp.max(jnp.abs(q), axis=(-2, -1), keepdims=True)
    q = q / jnp.where(scale == 0, 1, scale)  # so that no square overflows or underflows
    _, diagonal, beside, _ = matrixwise(jax.lax.linalg.tridiagonal)((q + q.swapaxes(-2, -1)) / 2)
    # Zeros beside the diagonal can make the bisection divide 0 by 0. This minimum is too small to change the values.
    beside = jnp.maximum(jnp.abs(beside), jnp.finfo(q.dtype).eps ** 1.5)
    bisect = functools.partial(jax.scipy.linalg.eigh_tridiagonal, eigvals_only=True)
    return jnp.vectorize(bisect, signature="(n),(m)->(n)")(diagonal, beside) * scale[..., 0]
