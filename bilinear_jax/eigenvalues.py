"""Eigenvalues of symmetric matrices, without their eigenvectors.

On a CPU ``jnp.linalg.eigvalsh`` computes the eigenvectors as well and throws them away. Here LAPACK brings a matrix to
tridiagonal form T, which keeps its eigenvalues, and those are found by bisection, all of a batch at once: for any x, as
many eigenvalues lie below x as there are negative pivots in the elimination of ``T - x``.

Both steps are public functions of JAX. LAPACK's routine for values alone is not: jaxlib has an internal name for it,
and gives it too little memory to work in blocks, so that it is slower; its float32 values are also 20 times less exact
or worse, as bisection adds up no rounding errors. A callback to NumPy would keep to one core, and callbacks have hung
on machines with few.

Source of the bisection: Barth, Martin and Wilkinson 1967, "Calculation of the eigenvalues of a symmetric tridiagonal
matrix by the method of bisection".
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
@jax.jit
def eigvalsh(q: Float[Array, "*batch in in"]) -> Float[Array, "*batch in"]:
    """Eigenvalues of the symmetric part ``(q + q^T) / 2`` of matrices, ascending; NaN for those not finite.

    The derivative is ``dl_i = v_i^T dq v_i`` with v_i the eigenvectors, which are computed only where it is asked for.
    Where eigenvalues are equal, it is that of their symmetric functions, such as a sum over them all. Second
    derivatives hold for distinct eigenvalues only.

    Memory: a copy of q. On a CPU, JAX shares the matrices of a batch out over the cores; where LAPACK's own threads
    are not limited to one (``threadpoolctl``), they get in each other's way.

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
    values, vectors = jnp.linalg.eigh(q)
    with jax.default_matmul_precision("highest"):
        return values, jnp.sum(vectors * (tangent @ vectors), axis=-2)


def _by_bisection(q: Float[Array, "*batch in in"]) -> Float[Array, "*batch in"]:
    scale = jnp.max(jnp.abs(q), axis=(-2, -1), keepdims=True)
    q = q / jnp.where(scale == 0, 1, scale)  # so that no square of anything can leave the range of the floats
    _, diagonal, beside, _ = jax.lax.linalg.tridiagonal((q + q.swapaxes(-2, -1)) / 2)
    # Zeros beside the diagonal can make the bisection divide 0 by 0; so little makes no difference.
    beside = jnp.maximum(jnp.abs(beside), jnp.finfo(q.dtype).eps ** 1.5)
    bisect = functools.partial(jax.scipy.linalg.eigh_tridiagonal, eigvals_only=True)
    return jnp.vectorize(bisect, signature="(n),(m)->(n)")(diagonal, beside) * scale[..., 0]
