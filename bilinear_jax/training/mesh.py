"""Run one program on many devices and machines: a mesh with axes "data" and "model", and the sharding over it.

The rows of a batch are sharded over "data". Each weight matrix is sharded over "model" along one axis (see ``CUTS``):
in a transformer by head, hidden unit and vocabulary, in an SAE by feature. An optimiser's moments are sharded like
their weights. XLA adds the communication. The results are those of one device, up to the order of floating-point sums.

With several processes (machines, or one process per GPU), all run the same command. ``join_processes`` connects them.
Each builds the same batches, and sends its part to its own devices.
"""

import math
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

CUTS: dict[str, tuple[str | None, ...]] = {
    # Transformer: by head, hidden unit and token id. A first axis of layers is not sharded.
    "w_q": ("model", None),
    "w_k": ("model", None),
    "w_v": ("model", None),
    "w_o": (None, "model"),
    "b_q": ("model",),
    "b_k": ("model",),
    "b_v": ("model",),
    "w_l": ("model", None),
    "w_r": ("model", None),
    "w_p": (None, "model"),
    "w_s": ("model", None),
    "b_l": ("model",),
    "b_r": ("model",),
    "w_e": ("model", None),
    "w_u": ("model", None),
    # SAE: by feature. A first axis of SAEs that are trained together is not sharded.
    "w_enc": ("model", None),
    "w_dec": (None, "model"),
    "b_enc": ("model",),
    "w_dec_rows": ("model", None),  # the decoder as it is trained, see training/sae_state.py
    "b_z": ("model",),
    "w_lookup": ("model", None),  # by token id
    "log_threshold": ("model",),
    "quiet": ("model",),
}
"""How the last axes of an array are sharded, by the last part of its path. Other arrays are whole on every device."""


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """All devices of all processes as a mesh ``[data, model]``.

    Args:
        data: number of parts of a batch. None: all devices that ``model`` leaves.
        model: number of parts of the weights.

    Raises:
        ValueError: if ``data * model`` is not the number of devices.

    Example:
        >>> make_mesh(model=1).axis_names
        ('data', 'model')
    """
    number = jax.device_count()
    data = number // model if data is None and model > 0 else data
    if data is None or data * model != number:
        raise ValueError(
            f"{data} parts of a batch times {model} of the weights do not make {number}, the number of devices: "
            "choose others"
        )
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def sharding_of(mesh: Mesh, path: tuple, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of the array at a path of a pytree. An array that cannot be split evenly is not sharded."""
    name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
    cut = CUTS.get(name, ())
    if len(cut) > len(shape):
        cut = ()
    cut = (None,) * (len(shape) - len(cut)) + cut
    even = all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(cut, shape, strict=True))
    return NamedSharding(mesh, PartitionSpec(*cut) if even else PartitionSpec())


def place(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Shard params, or a whole training state, over a mesh, by the names in ``CUTS``. Without a mesh nothing changes.

    Every process must hold the same arrays.

    Example:
        >>> params = place({"layers": {"mlp": {"w_l": jax.numpy.ones((3, 8, 4))}}}, make_mesh(model=jax.device_count()))
        >>> params["layers"]["mlp"]["w_l"].sharding.spec == PartitionSpec(None, "model", None)
        True
    """
    if mesh is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _spread(leaf, sharding_of(mesh, path, np.shape(leaf))), tree
    )


def one_copy(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Gather sharded arrays, each on one device of this process. Without a mesh nothing changes.

    All processes must call it.
    """
    if mesh is None:
        return tree
    gather = jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(mesh, PartitionSpec()))
    # One array at a time: gathering all in one program hung when two processes compiled it for CPUs.
    return jax.tree.map(lambda leaf: jax.block_until_ready(gather(leaf)).addressable_data(0), tree)


def place_rows(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """Shard the rows (first axes) of a batch over "data". Without a mesh nothing changes.

    Every process must hold the whole batch, and sends its own devices their rows. Rows that cannot be split evenly go
    to every device as a whole.
    """
    if mesh is None:
        return batch

    def one(rows):
        even = np.ndim(rows) > 0 and len(rows) % mesh.shape["data"] == 0
        return _spread(rows, NamedSharding(mesh, PartitionSpec("data") if even else PartitionSpec()))

    return jax.tree.map(one, batch)


class OnMesh:
    """A batch source whose batches are sharded over a mesh. Without a mesh nothing changes.

    Args:
        data: a ``BatchIterator``. It must be the same in every process, with the same seed.
        mesh: from ``make_mesh``, or None.
    """

    def __init__(self, data: Any, mesh: Mesh | None):
        self._data, self._mesh = data, mesh

    def __next__(self) -> PyTree:
        batch = next(self._data)
        parts = 1 if self._mesh is None else self._mesh.shape["data"]
        uneven = sorted({len(rows) for rows in jax.tree.leaves(batch) if len(rows) % parts})
        if uneven:
            raise ValueError(
                f"a batch of {uneven[0]} rows cannot be split evenly over {parts} devices: "
                f"make batch_size a multiple of {parts}"
            )
        return place_rows(batch, self._mesh)

    def get_state(self) -> dict:
        return self._data.get_state()

    def set_state(self, state: dict) -> None:
        self._data.set_state(state)


def _spread(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds, as one array over the devices of all."""
    if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _spread(jax.random.key_data(leaf), NamedSharding(sharding.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def join_processes(
    coordinator: str | None = None, processes: int | None = None, index: int | None = None, *, timeout: float = 300
) -> None:
    """Connect this process with the others of the run. Call it before anything else uses JAX.

    If no argument and no environment variable is set, this is the only process, and nothing happens.

    Args:
        coordinator: "address:port" of process 0, which all can reach. None: ``$JAX_COORDINATOR_ADDRESS``. "auto": take
            all three values from the cluster (a TPU pod, Slurm, Open MPI).
        processes: number of processes. None: ``$JAX_NUM_PROCESSES``.
        index: index of this process, from 0. None: ``$JAX_PROCESS_ID``.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: if only some of the three are given, or if a value is not valid.
        RuntimeError: if JAX was used before, or if the coordinator's address does not answer. If this process is the
            coordinator and the others do not come, JAX ends it with its own message.

    Source: jax.distributed.initialize, which this calls.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    if coordinator == "auto":
        jax.distributed.initialize(initialization_timeout=math.ceil(timeout))
        return
    processes = _number(processes, "JAX_NUM_PROCESSES")
    index = _number(index, "JAX_PROCESS_ID")
    given = {
        "coordinator ($JAX_COORDINATOR_ADDRESS)": coordinator,
        "processes ($JAX_NUM_PROCESSES)": processes,
        "index ($JAX_PROCESS_ID)": index,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if coordinator is None or processes is None or index is None:
        raise ValueError(f"to join several processes, also give {' and '.join(missing)}")
    if processes < 1 or not 0 <= index < processes:
        raise ValueError(f"index must lie in 0 ... {processes - 1}, got {index}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f'coordinator must be "address:port", for instance "10.0.0.1:1234", got {coordinator!r}')
    if index > 0:
        _wait_for(host.strip("[]"), int(port), timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            index,
            cluster_detection_method="deactivate",
            initialization_timeout=math.ceil(timeout),
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"process {index} of {processes} could not join the others at {coordinator}: {error}"
        ) from error


def _wait_for(host: str, port: int, timeout: float) -> None:
    """Wait until the address answers. If JAX itself waits in vain, it ends the process with a C++ trace."""
    began = time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() - began > timeout:
                raise RuntimeError(
                    f"no answer from {host}:{port} for {timeout:g} s ({error}): check that process 0 is running, that "
                    "this is its address, and that no firewall blocks it"
                ) from error
            time.sleep(0.2)


def _number(given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if given is not None or not text:
        return given
    if not text.isdigit():
        raise ValueError(f"${variable} must be a number, got {text!r}")
    return int(text)


def on_first_process(action: Callable[[], None]) -> None:
    """Run an action on files in process 0, while the others wait. An error there raises an error in all."""
    problem = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as error:
            problem = error
    failed = largest(int(problem is not None))
    if problem is not None:
        raise problem
    if failed:
        raise RuntimeError("process 0 stopped with an error: see its output")


def largest(number: int) -> int:
    """The largest of the numbers that the processes pass. All processes must call it."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.asarray(number))))
