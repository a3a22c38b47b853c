"""Spectra of matrices whose eigenvalues are known, and summaries worked out another way."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilinear_jax.explain import spectra
from bilinear_jax.tensor import BilinearTensor


def planted(values, seed=0):
    """A symmetric float32 matrix with the given eigenvalues, and its eigenvectors as columns."""
    vectors, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return jnp.asarray((vectors * np.asarray(values, np.float64)) @ vectors.T, jnp.float32), vectors


def planted_tensor(values, seed=0):
    """A tensor whose interaction matrix along output u is ``sum_i values[u][i] v_i v_i^T``: one hidden unit each."""
    _, vectors = planted(values[0], seed)
    return BilinearTensor(*(jnp.asarray(a, jnp.float32) for a in (vectors.T, vectors.T, values))), vectors


def symmetric(batch, size, seed=0):
    q = np.random.default_rng(seed).normal(size=(batch, size, size)).astype(np.float32)
    return jnp.asarray(q + q.swapaxes(1, 2)) / 2


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 32])
def test_eigh_finds_planted_eigenpairs(batch_size):
    values = np.array([[3.0, -5, 0, 1e-3, 2], [1, 1, 1, -1, -1], [0, 0, 0, 0, 0], [1e4, -1, 0, 0, 7]])
    tensor, vectors = planted_tensor(values)
    spectrum = spectra.eigh(tensor, jnp.eye(4), batch_size=batch_size)
    eps = 30 * np.finfo(np.float32).eps * np.abs(values).max(axis=1, keepdims=True)
    assert np.all(np.abs(spectrum.values - np.sort(values, axis=1)) <= eps)
    rebuilt = np.einsum("uik,uk,ujk->uij", spectrum.vectors, spectrum.values, spectrum.vectors)
    expected = np.einsum("ik,uk,jk->uij", vectors, values, vectors)
    assert np.all(np.abs(rebuilt - expected) <= eps[..., None])
    np.testing.assert_allclose(abs(spectrum.vectors[0, :, 0] @ vectors[:, 1]), 1, atol=1e-5)  # that of -5


def test_eigh_inside_jit_vmap_and_grad():
    tensor, _ = planted_tensor(np.array([[3.0, -5, 1]]))
    u = jnp.array([[1.0], [2.0], [-1.0]])
    expected = spectra.eigh(tensor, u)
    compiled = jax.jit(lambda t, u: spectra.eigh(t, u, batch_size=2))(tensor, u)
    np.testing.assert_allclose(compiled.values, expected.values, atol=1e-5)
    mapped = jax.jit(jax.vmap(lambda u: spectra.eigh(tensor, u[None])))(u)
    np.testing.assert_allclose(mapped.values[:, 0], expected.values, atol=1e-5)
    # Q is linear in u: the largest eigenvalue of 2 Q grows by 3 for each 1 of u.
    gradient = jax.jit(jax.grad(lambda u: spectra.eigh(tensor, u).values[1, -1]))(u)
    np.testing.assert_allclose(gradient[:, 0], [0, 3, 0], atol=1e-4)


def test_eigh_refuses_an_impossible_batch_size():
    tensor, _ = planted_tensor(np.ones((1, 2)))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        spectra.eigh(tensor, jnp.ones((1, 1)), batch_size=0)


def test_truncated_eigenvalues_takes_the_largest_of_either_sign():
    q = jnp.stack([planted([3.0, -5, 1, 4])[0], planted([-1.0, -2, -3, 0])[0]])
    np.testing.assert_allclose(spectra.truncated_eigenvalues(q), [9, 5], rtol=1e-5)
    np.testing.assert_allclose(spectra.truncated_eigenvalues(q, k=1), [5, 3], rtol=1e-5)
    np.testing.assert_allclose(spectra.truncated_eigenvalues(q, k=4), [13, 6], rtol=1e-5)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k is {k}, but it must be between 1 and 4"):
            spectra.truncated_eigenvalues(q, k=k)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 8), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_effective_rank_counts_equal_eigenvalues(rank, scale, seed):
    signs = np.random.default_rng(seed).choice([-scale, scale], rank)
    q, _ = planted([*signs, *[0.0] * (8 - rank)], seed)
    np.testing.assert_allclose(spectra.effective_rank(q), rank, rtol=1e-4)


def test_summaries_of_zero_of_one_entry_and_of_nan():
    zero, one = jnp.zeros((1, 3, 3)), jnp.full((1, 1, 1), 2.0)
    assert np.isnan(spectra.effective_rank(zero * jnp.nan))
    assert spectra.effective_rank(zero) == 0 and spectra.kurtosis(zero) == 0 and not spectra.outliers(zero).any()
    assert spectra.effective_rank(one) == 1 and spectra.kurtosis(one) == 0 and not spectra.outliers(one).any()
    assert not jax.grad(lambda q: spectra.effective_rank(q)[0])(zero).any()


@pytest.mark.parametrize(
    "summary", [spectra.effective_rank, spectra.kurtosis, spectra.truncated_eigenvalues, spectra.outliers]
)
def test_summaries_of_no_matrices_and_of_what_is_not_a_matrix(summary, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users call it without type checks
    assert len(summary(jnp.zeros((0, 3, 3)))) == 0
    for shape in [(2, 3), (2, 0, 0)]:
        with pytest.raises(ValueError, match=r"q has shape \(2, .*\), but it must be square matrices"):
            summary(jnp.zeros(shape))


def test_kurtosis_is_that_of_each_matrix_by_itself():
    q = symmetric(9, 6) ** 3
    entries = np.asarray(q, np.float64).reshape(9, -1)
    deviations = entries - entries.mean(axis=1, keepdims=True)
    expected = (deviations**4).mean(axis=1) / (deviations**2).mean(axis=1) ** 2 - 3
    np.testing.assert_allclose(spectra.kurtosis(q), expected, rtol=1e-5)
    for size in (1, 2, 4):
        parts = [spectra.kurtosis(q[i : i + size]) for i in range(0, 9, size)]
        np.testing.assert_allclose(np.concatenate(parts), spectra.kurtosis(q), rtol=1e-6)


def test_outliers_stay_at_their_place():
    q = np.array(symmetric(2, 12, seed=3))
    for i, j, value in [(5, 2, 40.0), (11, 0, -50.0), (4, 4, 30.0)]:
        q[0, i, j] = q[0, j, i] = value
    expected = np.zeros_like(q)
    expected[0, 5, 2], expected[0, 11, 0], expected[0, 4, 4] = 80, -100, 30  # a pair acts through two entries
    assert np.array_equal(spectra.outliers(jnp.asarray(q)), expected)


def test_outliers_carry_their_part_of_the_quadratic_form():
    q = np.array(symmetric(1, 8))[0]
    kept = np.array(spectra.outliers(jnp.asarray(q), cross_factor=0.0, self_factor=0.0))
    x = np.random.default_rng(0).normal(size=8)
    # With factor 0 what is dropped is the middle half; adding it back by hand gives the whole form.
    inside = np.where(np.eye(8), q, 2 * np.tril(q))
    assert 0 < (kept != 0).sum() < 36
    np.testing.assert_allclose(x @ np.where(kept != 0, kept, inside) @ x, x @ q @ x, rtol=1e-5)


def test_outlier_bounds_are_the_quartiles_and_their_distance():
    # Quartiles of 1 2 3 4 x, x > 4: 2 and 4, so factor 3 allows -4 ... 10.
    result = spectra.outliers(jnp.diag(jnp.array([1.0, 2, 3, 4, 10.1])))
    assert np.array_equal(np.nonzero(result), [[4], [4]])
    assert not spectra.outliers(jnp.diag(jnp.array([1.0, 2, 3, 4, 9.9]))).any()


@pytest.mark.parametrize(
    "fn", [spectra.truncated_eigenvalues, spectra.effective_rank, spectra.kurtosis, spectra.outliers]
)
def test_summaries_inside_jit_vmap_and_grad(fn):
    q = symmetric(3, 5, seed=4)
    expected = fn(q)
    np.testing.assert_allclose(jax.jit(fn)(q), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(fn))(q), expected, rtol=1e-4, atol=1e-5)

    def total(q):
        return jnp.sum(fn((q + q.swapaxes(1, 2)) / 2))

    gradient, step = jax.jit(jax.grad(total))(q), symmetric(3, 5, seed=5)
    assert jnp.isfinite(gradient).all()
    difference = (total(q + 3e-3 * step) - total(q - 3e-3 * step)) / 6e-3
    np.testing.assert_allclose(jnp.sum(gradient * step), difference, rtol=2e-2, atol=2e-2)
