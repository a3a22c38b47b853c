"""Spreading work over the devices of a mesh, row by row, and keeping the threads of a CPU out of each other's way."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def spread(function: Callable[[PyTree, PyTree], PyTree], mesh: Mesh | None, shared: PyTree, rows: PyTree) -> PyTree:
    """``function(shared, rows)``, with the rows of ``rows`` shared out among the devices of a mesh.

    Every device has a copy of ``shared`` and calls the function with its part of the rows, so what the function
    says of a row must not depend on the others, and nothing is exchanged between devices. All axes of the mesh are
    taken together. If the rows can't be shared out evenly, the last is repeated, and what comes of that is left out.

    Args:
        mesh: ``jax.make_mesh((8,), ("features",))``, for instance; None calls the function as it is.
        rows: arrays with one first axis in common, and at least one row.

    Example:
        >>> spread(lambda factor, x: factor * x, jax.make_mesh((1,), ("rows",)), 2.0, jnp.arange(3.0)).tolist()
        [0.0, 2.0, 4.0]
    """
    if mesh is None:
        return function(shared, rows)
    number = len(jax.tree.leaves(rows)[0])
    index = jnp.minimum(jnp.arange(-(-number // mesh.size) * mesh.size), number - 1)
    mesh = Mesh(mesh.devices, mesh.axis_names)  # without explicit axes, which results could not be cut along
    whole, part = PartitionSpec(), PartitionSpec(mesh.axis_names)
    shared = jax.device_put(shared, NamedSharding(mesh, whole))
    rows = jax.device_put(jax.tree.map(lambda leaf: leaf[index], rows), NamedSharding(mesh, part))
    result = jax.shard_map(function, mesh=mesh, in_specs=(whole, part), out_specs=part, check_vma=False)(shared, rows)
    return jax.tree.map(lambda leaf: leaf[:number], result)


def one_blas_thread():
    """A context in which LAPACK works in one thread.

    On a CPU it takes one matrix at a time, too small to share out: its threads would wait for each other, busily, and
    on a machine with other work to do that made it ten times slower.
    """
    import scipy.linalg  # noqa: F401  loads the LAPACK whose threads are limited
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")
