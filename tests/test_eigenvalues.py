"""Eigenvalues without eigenvectors: against NumPy in double precision, in every transformation, where it is hard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.devices import spread
from bilinear_jax.eigenvalues import eigvalsh


def symmetric(batch, size, seed=0):
    q = np.random.default_rng(seed).normal(size=(batch, size, size))
    return jnp.asarray(q + q.swapaxes(1, 2), jnp.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 130])
def test_it_agrees_with_double_precision(size):
    q = symmetric(3, size)
    expected = np.linalg.eigvalsh(np.asarray(q, np.float64))
    error = np.abs(eigvalsh(q) - expected).max(axis=1)
    assert np.all(error <= 5e-6 * np.abs(expected).max(axis=1))


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_scale_does_not_matter(scale):
    q = symmetric(2, 9)
    np.testing.assert_allclose(eigvalsh(jnp.float32(scale) * q) / jnp.float32(scale), eigvalsh(q), rtol=1e-4, atol=1e-5)


def test_matrices_with_equal_eigenvalues():
    vectors, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))
    for values in (np.zeros(12), np.full(12, -2.0), np.repeat([-1.0, 0.0, 3.0], 4), np.arange(12) == 5):
        q = jnp.asarray((vectors * values) @ vectors.T, jnp.float32)[None]
        np.testing.assert_allclose(eigvalsh(q)[0], np.sort(values), atol=1e-5)
    assert eigvalsh(jnp.zeros((0, 4, 4))).shape == (0, 4)


def test_what_is_not_finite_gives_nan_there_alone():
    q = symmetric(3, 5).at[1, 2, 3].set(jnp.nan)
    values = eigvalsh(q)
    assert jnp.isnan(values[1]).all() and jnp.isfinite(values[jnp.array([0, 2])]).all()


def test_inside_jit_vmap_and_on_a_mesh():
    q = symmetric(16, 6)
    expected = eigvalsh(q)
    np.testing.assert_allclose(jax.jit(eigvalsh)(q), expected, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(eigvalsh)(q), expected, atol=1e-5)
    mesh = jax.make_mesh((8,), ("matrices",))
    np.testing.assert_allclose(jax.jit(lambda q: spread(lambda _, q: eigvalsh(q), mesh, (), q))(q), expected, atol=1e-5)


def test_the_derivative_is_that_of_the_quadratic_form_of_each_eigenvector():
    q, change = symmetric(1, 7)[0], symmetric(1, 7, seed=2)[0]
    _, tangent = jax.jvp(eigvalsh, (q,), (change,))
    _, vectors = np.linalg.eigh(np.asarray(q, np.float64))
    np.testing.assert_allclose(tangent, np.diag(vectors.T @ np.asarray(change) @ vectors), atol=1e-4)
    gradient = jax.grad(lambda q: jnp.sum(eigvalsh(q) ** 2))(jnp.eye(7))  # of the squared norm, at equal eigenvalues
    np.testing.assert_allclose(gradient, 2 * np.eye(7), atol=1e-5)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="float32 or float64, got bfloat16"):
        eigvalsh(jnp.eye(3, dtype=jnp.bfloat16))
