"""Sharding work over the devices of a mesh, row by row, and limiting the threads of LAPACK on a CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def spread(function: Callable[[PyTree, PyTree], PyTree], mesh: Mesh | None, shared: PyTree, rows: PyTree) -> PyTree:
    """``function(shared, rows)``, with the rows of ``rows`` sharded over the devices of a mesh.

    Every device has a copy of ``shared`` and calls the function with its part of the rows. Devices exchange nothing, so
    the result for a row must not depend on the other rows. All axes of the mesh are used together. If the rows cannot
    be divided evenly, the last row is repeated, and its extra results are dropped.

    Args:
        mesh: for example ``jax.make_mesh((8,), ("features",))``. None calls the function without sharding.
        rows: arrays with the same first axis, and at least one row.

    Example:
        >>> spread(lambda factor, x: factor * x, jax.make_mesh((1,), ("rows",)), 2.0, jnp.arange(3.0)).tolist()
        [0.0, 2.0, 4.0]
    """
    if mesh is None:
        return function(shared, rows)
    number = len(jax.tree.leaves(rows)[0])
    index = jnp.minimum(jnp.arange(-(-number // mesh.size) * mesh.size), number - 1)
    mesh = Mesh(mesh.devices, mesh.axis_names)  # without explicit axes: results could not be sliced along those
    whole, part = PartitionSpec(), PartitionSpec(mesh.axis_names)
    shared = jax.device_put(shared, NamedSharding(mesh, whole))
    rows = jax.device_put(jax.tree.map(lambda leaf: leaf[index], rows), NamedSharding(mesh, part))
    result = jax.shard_map(function, mesh=mesh, in_specs=(whole, part), out_specs=part, check_vma=False)(shared, rows)
    return jax.tree.map(lambda leaf: leaf[:number], result)


def matrixwise(decompose: Callable[[jax.Array], PyTree]) -> Callable[[jax.Array], PyTree]:
    """``decompose``, which inside ``spread`` on a CPU takes one matrix at a time.

    JAX divides a batch of matrices among the threads of the process, and waits for them in one of them. If more devices
    than there are threads do so at once, all wait for ever. So every device works alone there. On one device, and on
    other platforms, nothing changes.

    Args:
        decompose: a function of matrices ``[..., n, n]``, for example ``jnp.linalg.eigh``. The result for a matrix must
            not depend on the others.

    Example:
        >>> matrixwise(jnp.linalg.eigh)(jnp.diag(jnp.array([3.0, -1.0]))).eigenvalues.tolist()
        [-1.0, 3.0]
    """

    def of_each(q):
        if not jax.sharding.get_abstract_mesh().manual_axes:
            return decompose(q)
        # The lambda keeps options of ``decompose`` from becoming arguments, which would be traced.
        one = jax.custom_batching.sequential_vmap(lambda matrix: decompose(matrix))
        for _ in range(q.ndim - 2):
            one = jax.vmap(one)
        return jax.lax.platform_dependent(q, cpu=one, default=decompose)

    return of_each


def one_blas_thread():
    """A context in which LAPACK uses one thread.

    On a CPU, LAPACK works on one matrix at a time, which is too small to divide. Its threads then wait for each other
    without sleeping. On a machine with other work this made it ten times slower.
    """
    import scipy.linalg  # noqa: F401  loads the LAPACK that is limited below
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")
