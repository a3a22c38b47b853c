"""Work that is spread over devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.explain import spectra
from bilinear_jax.linalg.devices import matrixwise, spread
from bilinear_jax.tensor import BilinearTensor

LAPACK = re.compile(r"custom_call @lapack\w+\(.*?\) .*?: \(tensor<([^>]*)x\w+>")


def batches(function, *args) -> list[str]:
    """The shapes of the arrays that LAPACK gets on a CPU."""
    return LAPACK.findall(jax.jit(function).trace(*args).lower(lowering_platforms=("cpu",)).as_text())


@pytest.mark.parametrize(
    "find",
    [
        spectra.eigh,
        functools.partial(spectra.top_eigh, k=1),
        functools.partial(spectra.top_eigh, k=1, exact=True),
    ],
)
def test_no_device_of_a_mesh_gives_lapack_a_batch(find):
    # Batches share the threads of the process: with more devices than threads they waited for each other for ever.
    tensor = BilinearTensor(*(jnp.ones(shape) for shape in ((40, 24), (40, 24), (16, 40))))
    alone = batches(functools.partial(find, tensor), jnp.eye(16))
    assert any(shape.count("x") == 2 for shape in alone)
    meshed = batches(functools.partial(find, tensor, mesh=jax.make_mesh((8,), ("features",))), jnp.eye(16))
    assert meshed and all(shape.count("x") == 1 for shape in meshed)


def test_matrices_one_at_a_time_give_the_same_numbers_in_any_batch():
    q = jax.random.normal(jax.random.key(0), (8, 3, 5, 5))
    q = q + q.swapaxes(-1, -2)
    mesh = jax.make_mesh((8,), ("features",))
    for decompose in (matrixwise(jnp.linalg.eigvalsh), jax.vmap(matrixwise(jnp.linalg.eigvalsh))):
        found = spread(lambda _, q, decompose=decompose: decompose(q), mesh, (), q)
        np.testing.assert_allclose(found, np.linalg.eigvalsh(q), atol=1e-5)
