"""Weights times powers of ten whose squares leave float32: shares, cosines and ranks stay, values are proportional."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilinear_jax.explain import cp, interactions, overview, similarity, spectra
from bilinear_jax.explain.hosvd import hosvd
from bilinear_jax.linalg.scale import lengths, unit_columns
from bilinear_jax.tensor import BilinearTensor

RNG = np.random.default_rng(0)
FACTORS = [RNG.normal(size=shape) for shape in ((12, 8), (12, 8), (6, 12))]
DIRECTIONS, BASIS = RNG.normal(size=(3, 6)), RNG.normal(size=(8, 20))
FORMS = np.einsum("um,mi,mj->uij", DIRECTIONS @ FACTORS[2], *FACTORS[:2])
FORMS = (FORMS + FORMS.swapaxes(1, 2)) / 2

SCALES = [(1, 1, 1), (1e-12, 1e-12, 1), (1e12, 1e12, 1e-3), (1e20, 1e-20, 1), (1, 1, 1e-25), (1e-20, 1, 1e20)]
each_scale = pytest.mark.parametrize("scale", SCALES, ids=str)


def made(scale) -> tuple[BilinearTensor, float]:
    """The tensor with its factors times these numbers, and their product, by which all its values grow."""
    factors = (jnp.asarray(factor * one, jnp.float32) for factor, one in zip(FACTORS, scale, strict=True))
    return BilinearTensor(*factors), float(np.prod(scale))


def close(actual, expected, size=1.0, rtol=2e-4):
    np.testing.assert_allclose(np.asarray(actual, np.float64) / size, expected, rtol=rtol, atol=rtol)


def strongest(k: int) -> np.ndarray:
    values = np.linalg.eigvalsh(FORMS)
    return np.take_along_axis(values, np.argsort(-abs(values), axis=1)[:, :k], axis=1)


@pytest.fixture(scope="module")
def searched():
    """``top_eigh`` searches also where it would decompose so few inputs densely."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bilinear_jax.linalg.eigenpairs.dense_is_faster", lambda *_: False)
        jax.clear_caches()
        yield
    jax.clear_caches()


@each_scale
@pytest.mark.parametrize("exact", [True, False], ids=["dense", "search"])
def test_top_eigenpairs(searched, scale, exact):
    tensor, size = made(scale)
    top = spectra.top_eigh(tensor, jnp.asarray(DIRECTIONS, jnp.float32), k=2, exact=exact)
    values = strongest(2)
    close(top.values, values, size)
    close(top.explained, (values**2).sum(axis=1) / (FORMS**2).sum(axis=(1, 2)))
    assert top.converged.all()
    assert (np.asarray(top.bounds, np.float64) / size < 1e-3 * abs(values)).all()


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e15])
def test_top_eigenpairs_of_scaled_directions_in_a_scaled_basis(scale):
    tensor, _ = made((1, 1, 1))
    directions, basis = jnp.asarray(DIRECTIONS * scale, jnp.float32), jnp.asarray(BASIS / scale**0.5, jnp.float32)
    top = spectra.top_eigh(tensor, directions, k=2, basis=basis)
    projected = np.einsum("ia,uij,jb->uab", BASIS, FORMS, BASIS)
    values = np.linalg.eigvalsh(projected)
    expected = np.take_along_axis(values, np.argsort(-abs(values), axis=1)[:, :2], axis=1)
    close(top.values, expected)
    close(top.explained, (expected**2).sum(axis=1) / (projected**2).sum(axis=(1, 2)))


@pytest.mark.parametrize("power", [0, -80, 60])
def test_derivatives_at_zeros_and_at_every_scale(power):
    """Of norms and of the largest eigenvalue, by differences in float64. Most entries are 0."""
    left, right, down = np.eye(3, 4), np.eye(3, 4)[:, ::-1], np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    factors = [jnp.asarray(f, jnp.float32) for f in (left, right, down)]
    factors[0] = factors[0] * 2.0**power

    def form(left, right, down):
        q = np.einsum("m,mi,mj->ij", down[0], left, right)
        return (q + q.T) / 2

    def check(ours, exact):
        for place, found in enumerate(jax.jit(jax.grad(ours))(factors)):
            given = [np.asarray(f, np.float64) for f in factors]
            size, step = 2.0 ** (power if place == 0 else 0), 1e-4
            for index in [(0, 0), (0, 1), (1, 0), (1, 2)]:
                ends = []
                for sign in (1, -1):
                    moved = [f.copy() for f in given]
                    moved[place][index] += sign * step * size
                    ends.append(exact(*moved) / 2.0**power)
                slope = (ends[0] - ends[1]) / (2 * step)
                np.testing.assert_allclose(float(found[index]) * size / 2.0**power, slope, rtol=1e-3, atol=1e-3)

    u = jnp.array([[1.0, 0.0]])
    check(lambda f: BilinearTensor(*f).norms(u)[0], lambda *f: np.sqrt((form(*f) ** 2).sum()))
    check(
        lambda f: spectra.top_eigh(BilinearTensor(*f), u, k=1, which="positive").values[0, 0],
        lambda *f: np.linalg.eigvalsh(form(*f))[-1],
    )


@pytest.mark.parametrize(
    "scales", [(1e-25, 1e-25, 1e30, 1), (1e-22, 1e-22, 1e22, 1e22), (1e25, 1e-30, 1, 1e5), (1e18, 1e19, 1e-35, 1)]
)
def test_products_of_extreme_factors(scales):
    """The value is near 1, but a product of two of its factors leaves float32."""
    *factors, u = (jnp.asarray(f * s, jnp.float32) for f, s in zip((*FACTORS, DIRECTIONS), scales, strict=True))
    tensor, size = BilinearTensor(*factors), float(np.prod(scales))
    basis = jnp.asarray(BASIS, jnp.float32)
    projected = np.einsum("ia,uij,jb->uab", BASIS, FORMS, BASIS)
    close(tensor.interaction(u), FORMS, size)
    close(tensor.interaction(u, basis), projected, size, rtol=1e-3)
    close(tensor.interaction(u, basis[:, :3]), projected[:, :3, :3], size, rtol=1e-3)
    close(tensor.traces(u), np.trace(FORMS, axis1=1, axis2=2), size, rtol=1e-3)
    close(spectra.eigh(tensor, u).values, np.linalg.eigvalsh(FORMS), size)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_gram_that_leaves_float32_is_refused(scale):
    tensor, _ = made((scale, scale, 1))
    u = jnp.asarray(DIRECTIONS, jnp.float32)
    for method in (tensor.norms, tensor.cosines):
        with pytest.raises(ValueError, match=r"the entries of gram, up to .*, leave float32: leave gram out"):
            method(u, tensor.gram())
        method(u)


@each_scale
def test_similarities(scale):
    tensor, size = made(scale)
    other, one = made((1, 1, 1))
    assert one == 1
    close(similarity.cosine_similarity(tensor, other), 1)
    close(similarity.functional_similarity(tensor, other), 1)
    inner = np.sum(np.einsum("om,mi,mj->oij", FACTORS[2], *FACTORS[:2]) * symmetrised(FACTORS))
    close(similarity.inner_product(tensor, other), inner, size)


def symmetrised(factors) -> np.ndarray:
    full = np.einsum("om,mi,mj->oij", factors[2], *factors[:2])
    return (full + full.swapaxes(1, 2)) / 2


@each_scale
def test_hosvd(scale):
    tensor, size = made(scale)
    close(hosvd(tensor).singular_values, np.linalg.svd(symmetrised(FACTORS).reshape(6, -1), compute_uv=False), size)


@pytest.mark.parametrize("find", [cp.cp_als, lambda *given: cp.cp_gradient(*given, steps=60)])
def test_cp_finds_the_same_components_at_every_scale(find):
    """Scaled by powers of two, so that not a digit differs."""
    plain, *scaled = (
        find(
            BilinearTensor(*(jnp.asarray(f, jnp.float32) * s for f, s in zip(FACTORS, scale, strict=True))),
            2,
            jax.random.key(0),
        )
        for scale in [(1, 1, 1), (2.0**-80, 2.0**-5, 1), (2.0**70, 1, 2.0**-10)]
    )
    for one, power in zip(scaled, (-85, 60), strict=True):
        np.testing.assert_array_equal(one.weights, jnp.ldexp(plain.weights, power))
        np.testing.assert_array_equal(one.similarity, plain.similarity)
        np.testing.assert_array_equal(cp.match(one, plain).cosines, cp.match(plain, plain).cosines)


@each_scale
def test_what_is_read_from_the_weights(scale):
    tensor, size = made(scale)
    directions, basis = jnp.asarray(DIRECTIONS, jnp.float32), jnp.asarray(BASIS, jnp.float32)
    projected = np.einsum("ia,uij,jb->uab", BASIS, FORMS, BASIS)
    for u, found in enumerate(overview._feature_weights(tensor, directions, basis, [0, 1, 2], k=2, reads=1, pairs=3)):
        magnitudes = abs(np.linalg.eigvalsh(FORMS[u]))
        close(found.effective_rank, magnitudes.sum() ** 2 / (magnitudes**2).sum())
        close(found.norm, np.sqrt((FORMS[u] ** 2).sum()), size)
        close(found.projected, (projected[u] ** 2).sum(), size**2)
        close([pair.share for pair in found.eigenpairs], strongest(2)[u] ** 2 / (FORMS[u] ** 2).sum())
        largest = np.sort(abs(projected[u][np.triu_indices(20)]))[::-1][:3]
        close(np.abs(found.weights), largest, size)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_interactions_of_tiny_and_huge_basis_vectors(scale):
    """The bounds of the search were products of squares, and 0 for a tiny basis: pairs were missed without a word."""
    tensor, _ = made((1, 1, 1))
    basis = jnp.asarray(BASIS * scale**0.5, jnp.float32)
    found = interactions.top_interactions(tensor, jnp.asarray(DIRECTIONS[:1], jnp.float32), basis, 4)
    projected = BASIS.T @ FORMS[0] @ BASIS
    close(np.sort(np.abs(found.value))[::-1], np.sort(abs(projected[np.triu_indices(20)]))[::-1][:4], scale)


@settings(max_examples=30, deadline=None)
@given(st.integers(-35, 37), st.sampled_from([1, 4]), st.integers(0, 2**31))
def test_ranks_kurtosis_and_lengths_at_every_scale(power, n, seed):
    q = np.random.default_rng(seed).normal(size=(n + 1, n + 1))
    q = (q + q.T) / np.abs(q).max() / 20
    scaled = np.asarray(q * 10.0**power, np.float32)
    scaled = np.where(abs(scaled) < np.finfo(np.float32).tiny, 0, scaled)  # a CPU counts denormal numbers as 0
    q, scaled = np.asarray(scaled, np.float64), jnp.asarray(scaled)  # as float32 holds it
    magnitudes, deviations = abs(np.linalg.eigvalsh(q)), (q - q.mean()).ravel()
    close(spectra.effective_rank(scaled), magnitudes.sum() ** 2 / (magnitudes**2).sum())
    close(spectra.kurtosis(scaled), (deviations**4).mean() / (deviations**2).mean() ** 2 - 3, rtol=2e-3)
    np.testing.assert_allclose(lengths(scaled), np.linalg.norm(q, axis=1), rtol=1e-5)
    columns = np.linalg.norm(q, axis=0)
    close(unit_columns(scaled), q / columns)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, bool, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "summary", [spectra.effective_rank, spectra.kurtosis, spectra.truncated_eigenvalues, spectra.outliers]
)
def test_summaries_of_numbers_that_are_not_float32(summary, dtype):
    """float16 ends at 65504: the fourth powers of 100 overflowed in the kurtosis."""
    q = (np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]]) * (1 if dtype is bool else 100)).astype(dtype)
    np.testing.assert_allclose(summary(jnp.asarray(q)), summary(jnp.asarray(q.astype(np.float32))), rtol=1e-6)
