"""Functions of the interaction matrices of many output directions, a batch at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from bilinear_jax.errors import check_count
from bilinear_jax.linalg.devices import one_blas_thread, spread
from bilinear_jax.tensor import BilinearTensor


@jax.jit
def interaction(tensor: BilinearTensor, directions, basis) -> Float[Array, "U in in"]:
    """``tensor.interaction`` compiled, with the highest matmul precision."""
    with jax.default_matmul_precision("highest"):
        return tensor.interaction(directions, basis)


def of_every_matrix(
    fn: Callable[..., PyTree],
    tensor: BilinearTensor,
    directions: Float[Array, "U out"],
    basis: Float[Array, "in new"] | None,
    batch_size: int,
    description: str,
    *,
    mesh: Mesh | None,
    **kwargs,
) -> PyTree:
    """``fn(q, **kwargs)`` of the interaction matrices of all directions: see ``Tracer.compute``."""
    from tqdm import tqdm

    check_count("batch_size", batch_size)
    total, size = len(directions), min(batch_size, len(directions))

    @jax.jit
    def step(tensor, directions, basis, features):
        def of_some(shared, features):
            tensor, directions, basis = shared
            return fn(interaction(tensor, directions[features], basis), **kwargs)

        return spread(of_some, mesh, (tensor, directions, basis), features)

    results = []
    with one_blas_thread():
        for start in tqdm(range(0, total, size), desc=description, disable=None):
            # The last batch is filled up with the last feature, so that only one shape is compiled.
            features = jnp.asarray(np.minimum(np.arange(start, start + size), total - 1))
            result = step(tensor, directions, basis, features)
            for leaf in jax.tree.leaves(result) if not results else ():
                if leaf.ndim == 0 or leaf.shape[0] != size:
                    raise ValueError(
                        f"fn returned an array of shape {leaf.shape} for {size} matrices: the first axis must be "
                        "the batch"
                    )
            results.append(jax.block_until_ready(jax.tree.map(lambda leaf, n=total - start: leaf[:n], result)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)


def in_groups(
    function: Callable[[Int[np.ndarray, " U"]], PyTree], features: Int[np.ndarray, " features"], at_once: int
) -> PyTree:
    """``function(features)``, some features at a time, on the host. The result for one must not depend on the others.

    Example:
        >>> in_groups(lambda some: {"twice": 2 * some}, np.arange(5), at_once=2)["twice"].tolist()
        [0, 2, 4, 6, 8]
    """
    found, at_once = [], min(at_once, len(features))
    for start in range(0, len(features), at_once):
        number = min(at_once, len(features) - start)
        # The last group is filled up with its last feature, so there is only one shape to compile.
        one = function(features[np.minimum(start + np.arange(at_once), len(features) - 1)])
        found.append(jax.tree.map(lambda leaf, number=number: leaf[:number], one))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
