"""Eigenvalues without eigenvectors: planted ones, NumPy's in double precision, every transformation, hard matrices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from bilinear_jax.explain import spectra
from bilinear_jax.linalg.eigenvalues import eigvalsh


def symmetric(batch, size, seed=0):
    q = np.random.default_rng(seed).normal(size=(batch, size, size))
    return jnp.asarray(q + q.swapaxes(1, 2), jnp.float32)


def planted(values, seed=0):
    vectors, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return (vectors * values) @ vectors.T


def close(actual, expected):
    """Within 6 sqrt(n) rounding errors of the largest |eigenvalue|."""
    expected = np.asarray(expected, np.float64)
    rounding = np.finfo(actual.dtype).eps * np.sqrt(expected.shape[-1]) * np.abs(expected).max(axis=-1, initial=0)
    assert actual.shape == expected.shape
    assert np.all(np.abs(actual - expected) <= 6 * rounding[..., None])


@pytest.mark.parametrize("size", [1, 2, 3, 17, 130])
def test_it_agrees_with_double_precision(size):
    q = symmetric(3, size)
    close(eigvalsh(q), np.linalg.eigvalsh(np.asarray(q, np.float64)))


def test_double_precision_stays_double():
    with jax.enable_x64():
        values = np.array([-3.0, -1e-9, 0.0, 1.0, 1.0 + 1e-12, 2.0])
        close(eigvalsh(jnp.asarray(planted(values))), values)
        gradient = jax.grad(lambda q: eigvalsh(q)[0])(jnp.asarray(planted(values)))
        assert gradient.dtype == jnp.float64
        np.testing.assert_allclose(jnp.sum(gradient * planted(values)), -3.0, rtol=1e-13)  # v^T Q v


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([-2.0, -1.0, -1e-4, 0.0, 0.5, 2.0]), min_size=5, max_size=5), st.integers(0, 99))
def test_multiple_and_opposite_eigenvalues_are_found_in_order(values, seed):
    found = eigvalsh(jnp.asarray(planted(values, seed), jnp.float32))
    close(found, np.sort(values))
    assert jnp.all(found[1:] >= found[:-1])


def test_matrices_that_fall_into_blocks():
    # JAX's bisection alone gives 0, 0, 1 for diag(0, 1, -1): it tries 0, and finds 0 / 0 beside the diagonal.
    whole = np.array(list(itertools.product(*[range(-2, 3)] * 3, *[(0, 1)] * 2)))
    q = np.zeros((len(whole), 3, 3))
    q[:, [0, 1, 2, 0, 1], [0, 1, 2, 1, 2]] = q[:, [0, 1, 2, 1, 2], [0, 1, 2, 0, 1]] = whole
    close(eigvalsh(jnp.asarray(q, jnp.float32)), np.linalg.eigvalsh(q))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e37])
def test_scale_does_not_matter(scale):
    q = symmetric(2, 9)
    close(eigvalsh(jnp.float32(scale) * q) / jnp.float32(scale), eigvalsh(q))


def test_a_zero_matrix_has_exact_zeros_and_so_no_rank():
    q = symmetric(2, 6).at[1].set(0)
    assert not eigvalsh(q)[1].any()
    assert spectra.effective_rank(q)[1] == 0


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 4, 4), (0, 2, 1, 1)])
def test_nothing_has_no_eigenvalues(shape):
    assert eigvalsh(jnp.zeros(shape)).shape == shape[:-1]
    assert jax.grad(lambda q: eigvalsh(q).sum())(jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_gives_nan_there_alone(bad):
    q = symmetric(3, 5)
    values = eigvalsh(q.at[1, 2, 3].set(bad))
    assert jnp.isnan(values[1]).all()
    np.testing.assert_array_equal(values[jnp.array([0, 2])], eigvalsh(q)[jnp.array([0, 2])])
    assert jnp.isnan(eigvalsh(jnp.full((1, 1), bad))).all()


def test_transformations():
    q = symmetric(16, 6)
    expected = np.linalg.eigvalsh(np.asarray(q, np.float64))
    spec = PartitionSpec("matrices")
    mesh = jax.make_mesh((8,), ("matrices",), axis_types=(jax.sharding.AxisType.Auto,))
    shards = jax.shard_map(eigvalsh, mesh=mesh, in_specs=spec, out_specs=spec)
    for way in (shards, jax.jit(shards), lambda q: jax.lax.map(eigvalsh, q, batch_size=5)):
        close(way(q), expected)
    close(jax.vmap(jax.vmap(eigvalsh))(q.reshape(2, 8, 6, 6)), expected.reshape(2, 8, 6))
    gradient = jax.grad(lambda q: jnp.sum(shards(q) ** 3))(q)  # of tr Q^3
    np.testing.assert_allclose(gradient, 3 * q @ q, rtol=1e-4, atol=1e-4)
    spread_out = jax.jit(eigvalsh)(jax.device_put(q, jax.NamedSharding(mesh, spec)))
    close(spread_out, expected)
    assert len(spread_out.sharding.device_set) == 8


def test_derivatives_against_differences():
    # Entries are changed one by one, so the matrix stops being symmetric: its symmetric part counts.
    with jax.enable_x64():
        q = jnp.asarray(planted([-2.0, -0.5, 1.0, 4.0]))
        step = 1e-5
        for f in (lambda q: eigvalsh(q)[1], lambda q: jnp.sum(jnp.sin(eigvalsh(q)))):
            for derivative, once_less in ((jax.grad(f), f), (jax.jacfwd(jax.grad(f)), jax.grad(f))):
                exact = derivative(q)
                for index in np.ndindex(4, 4):
                    change = jnp.zeros_like(q).at[index].set(step)
                    difference = (once_less(q + change) - once_less(q - change)) / (2 * step)
                    np.testing.assert_allclose(exact[(..., *index)], difference, atol=1e-8)


def test_gradients_where_eigenvalues_are_equal():
    q = jnp.asarray(planted([1.0, 1.0, 1.0, -2.0, -2.0]), jnp.float32)
    np.testing.assert_allclose(jax.grad(lambda q: eigvalsh(q).sum())(q), jnp.eye(5), atol=1e-6)  # the trace
    np.testing.assert_allclose(jax.jit(jax.grad(lambda q: jnp.sum(eigvalsh(q) ** 2)))(q), 2 * q, atol=1e-5)
    assert jnp.isfinite(jax.grad(spectra.truncated_eigenvalues)(q)).all()


def test_eigenvectors_are_computed_for_a_derivative_only():
    q = symmetric(2, 8)
    plain = jax.jit(eigvalsh).lower(q).as_text()
    derived = jax.jit(jax.grad(lambda q: eigvalsh(q).sum())).lower(q).as_text()
    assert "syevd" not in plain and "sytrd" in plain
    assert "syevd" in derived and "sytrd" not in derived


@pytest.mark.parametrize(("platform", "solver"), [("cuda", "cusolver_syevd"), ("tpu", "Eigh")])
def test_other_platforms_have_their_own_solver(platform, solver):
    code = jax.jit(eigvalsh).trace(symmetric(2, 8)).lower(lowering_platforms=(platform,)).as_text()
    assert solver in code and "lapack" not in code


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="float32 or float64, got bfloat16"):
        eigvalsh(jnp.eye(3, dtype=jnp.bfloat16))
