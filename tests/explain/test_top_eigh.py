"""Extreme eigenpairs without matrices: planted spectra, what the bounds promise, and what must not change a number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from bilinear_jax.explain import spectra
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import load
from bilinear_jax.tensor import BilinearTensor

IN = 160  # wide enough to be searched, not decomposed
RNG = np.random.default_rng(0)
NOISE = RNG.uniform(-1, 1, IN)


def spectrum(*outliers, rest=NOISE):
    return np.concatenate([outliers, rest[len(outliers) :]])


WIGNER = RNG.normal(size=(IN, IN))  # the eigenvalues of noise repel each other, unlike those of NOISE
PLANTED = {
    "noise": np.linalg.eigvalsh(WIGNER + WIGNER.T),
    "semicircle": np.cos(np.pi * (np.arange(IN) + 0.5) / IN),
    "a cluster": spectrum(2, 1.9999, 1.9998, 1.9997),
    "twice": spectrum(2, 2),
    "five times": spectrum(-2, -2, -2, -2, -2, 1.5),
    "twice, of both": spectrum(2, 2, -1.7, -1.7),
    "plus and minus": spectrum(2, -2),
    "plus and minus, twice": spectrum(2, -2, 2, -2),
    "zero": np.zeros(IN),
    "rank 1": spectrum(3, rest=np.zeros(IN)),
    "rank 1, negative": spectrum(-3, rest=np.zeros(IN)),
    "rank 3": spectrum(3, 3, -1, rest=np.zeros(IN)),
    "one huge outlier": spectrum(1e4),
    "all equal": np.full(IN, 0.7),
    "all equal but one": spectrum(-0.9, rest=np.full(IN, 0.7)),
    "two values": np.where(np.arange(IN) % 3, 1.0, -1.0),
    "all negative": -np.abs(NOISE) - 0.1,
    "tiny": 1e-12 * spectrum(3, -2),
    "large": 1e12 * spectrum(3, -2),
}


def planted_tensor(spectra_of_directions):
    """Interaction matrices with the given eigenvalues and one random eigenbasis, each eigenvector a hidden unit."""
    vectors, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(IN, IN)))
    vectors = vectors[:, : spectra_of_directions.shape[1]].T
    return BilinearTensor(*(jnp.asarray(a, jnp.float32) for a in (vectors, vectors, spectra_of_directions))), vectors


def wanted(values, k, which):
    order = {"magnitude": -np.abs(values), "positive": -values, "negative": values}[which]
    return np.take_along_axis(values, np.argsort(order, axis=-1, kind="stable")[:, :k], axis=-1)


@functools.cache
def gaussian(hidden=640, number=12, seed=0):
    left, right, down = (
        jnp.asarray(np.random.default_rng(seed + i).normal(size=shape), jnp.float32)
        for i, shape in enumerate([(hidden, IN), (hidden, IN), (number, hidden)])
    )
    tensor = BilinearTensor(left, right, down)
    q = np.einsum("um,mi,mj->uij", *(np.asarray(a, np.float64) for a in (down, left, right)), optimize=True)
    return tensor, (q + q.swapaxes(1, 2)) / 2


@pytest.mark.parametrize("which", ["magnitude", "positive", "negative"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_planted_spectra_are_found(k, which):
    tensor, _ = planted_tensor(np.stack(list(PLANTED.values())))
    top = spectra.top_eigh(tensor, jnp.eye(len(PLANTED)), k, which=which)
    values = np.stack(list(PLANTED.values()))
    truth = wanted(values, k, which)
    largest = np.abs(values).max(axis=1, keepdims=True)
    for i, name in enumerate(PLANTED):
        # Of values that are equal in magnitude, either sign may come first.
        found, expected = (np.sort(np.abs(a)) for a in (np.asarray(top.values[i]), truth[i]))
        error = np.abs(found - expected).sum()
        assert error <= 1e-4 * np.abs(truth[i]).sum() + 1e-5 * largest[i], (name, found, expected)
        assert top.converged[i], name
    assert np.all(top.bounds <= top.residuals + 1e-30)
    norms = (values**2).sum(axis=1)
    np.testing.assert_allclose(
        top.explained, np.divide((truth**2).sum(axis=1), norms, where=norms > 0, out=0 * norms), rtol=1e-3, atol=1e-6
    )


def test_vectors_are_orthonormal_eigenvectors_and_residuals_theirs():
    tensor, _ = planted_tensor(np.stack(list(PLANTED.values())))
    top = spectra.top_eigh(tensor, jnp.eye(len(PLANTED)), 4)
    q = np.einsum("um,mi,mj->uij", *(np.asarray(a, np.float64) for a in (tensor.down, tensor.left, tensor.right)))
    vectors, values = np.asarray(top.vectors, np.float64), np.asarray(top.values, np.float64)
    products = np.einsum("uki,uji->ukj", vectors, vectors)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(4), products.shape), atol=2e-5)
    residuals = np.linalg.norm(np.einsum("uij,ukj->uki", q, vectors) - values[..., None] * vectors, axis=-1)
    assert np.all(residuals <= top.residuals)
    assert np.all(top.residuals <= 1.1 * residuals + 2e-5 * np.abs(values).max(axis=1, keepdims=True))


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(-6, 6),
    st.sampled_from(["magnitude", "positive", "negative"]),
    st.lists(st.floats(-4, 4), min_size=0, max_size=6),
)
def test_bounds_bound_the_error(seed, exponent, which, outliers):
    rest = np.random.default_rng(seed).normal(size=IN) / 3
    values = 10.0**exponent * spectrum(*outliers, rest=rest)[None]
    tensor, _ = planted_tensor(np.repeat(values, len(PLANTED), axis=0))  # the shape that is compiled already
    top = spectra.top_eigh(tensor, jnp.eye(len(PLANTED)), 4, which=which)
    stored = np.asarray(tensor.down, np.float64)[0]
    for found, residual in zip(np.asarray(top.values[0]), np.asarray(top.residuals[0]), strict=True):
        assert np.min(np.abs(stored - found)) <= residual
    if top.converged[0]:
        truth = wanted(stored[None], 4, which)[0]
        assert np.all(
            np.abs(np.sort(np.abs(top.values[0])) - np.sort(np.abs(truth))).sum() <= 1e-4 * np.abs(truth).sum()
        )


def test_fewer_hidden_units_than_inputs():
    tensor, _ = planted_tensor(np.array([[3.0, -2, 1, 0.5], [0, 0, 0, 0], [1, 1, 1, 1]]))
    top = spectra.top_eigh(tensor, jnp.eye(3), 3)
    np.testing.assert_allclose(np.abs(top.values), [[3, 2, 1], [0, 0, 0], [1, 1, 1]], atol=1e-5)
    assert top.converged.all()
    # One unit is a matrix of two eigenvalues, (l . r +- |l| |r|) / 2.
    left, right = jnp.asarray(np.random.default_rng(3).normal(size=(2, 1, IN)), jnp.float32)
    one = spectra.top_eigh(BilinearTensor(left, right, jnp.ones((1, 1))), jnp.ones((1, 1)), 3)
    inner, size = (left * right).sum(), jnp.linalg.norm(left) * jnp.linalg.norm(right)
    expected = sorted([(inner + size) / 2, (inner - size) / 2, 0], key=lambda value: -abs(value))
    np.testing.assert_allclose(one.values[0], expected, atol=1e-4)


def test_an_eigenvalue_that_is_there_twice_in_a_continuum_takes_a_block():
    values = np.linspace(-0.99, 1, IN)
    values[:1] = 1.0
    tensor, _ = planted_tensor(values[None])
    top = spectra.top_eigh(tensor, jnp.eye(1), 2, block_size=2)
    np.testing.assert_allclose(top.values[0], [1, 1], rtol=1e-4)


@pytest.mark.parametrize("block_size", [1, 2])
def test_gaussian_factors_against_dense(block_size):
    tensor, q = gaussian()
    top = spectra.top_eigh(tensor, jnp.eye(12), 2, block_size=block_size)
    truth = wanted(np.linalg.eigvalsh(q), 2, "magnitude")
    assert top.converged.all() and np.all(top.steps > 0)
    assert np.all(np.abs(np.abs(top.values) - np.abs(truth)) <= top.bounds)
    np.testing.assert_allclose(top.explained, (truth**2).sum(axis=1) / (q**2).sum(axis=(1, 2)), rtol=1e-4)


def test_what_does_not_converge_is_decomposed():
    tensor, q = gaussian()
    top = spectra.top_eigh(tensor, jnp.eye(12), 2, max_steps=8)
    assert top.converged.all() and not top.steps.any()
    np.testing.assert_allclose(np.abs(top.values), np.abs(wanted(np.linalg.eigvalsh(q), 2, "magnitude")), rtol=1e-5)


def test_invariances():
    """Rotating the inputs, permuting hidden units, and turning a matrix's sign around."""
    tensor, _ = gaussian()
    rotation, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(IN, IN)))
    rotation, order = jnp.asarray(rotation, jnp.float32), np.random.default_rng(6).permutation(640)
    top = spectra.top_eigh(tensor, jnp.eye(12))
    turned = spectra.top_eigh(tensor.in_basis(rotation), jnp.eye(12))
    permuted = spectra.top_eigh(
        BilinearTensor(tensor.left[order], tensor.right[order], tensor.down[:, order]), jnp.eye(12)
    )
    opposite = spectra.top_eigh(tensor, -jnp.eye(12))
    for other, sign in ((turned, 1), (permuted, 1), (opposite, -1)):
        np.testing.assert_allclose(sign * other.values, top.values, rtol=1e-5)
        np.testing.assert_allclose(other.explained, top.explained, rtol=1e-4)
    overlap = jnp.einsum("uki,ij,ukj->uk", top.vectors, rotation, turned.vectors)
    np.testing.assert_allclose(jnp.abs(overlap), 1, atol=1e-3)


def test_which_is_consistent():
    tensor, _ = gaussian()
    positive, negative, both = (
        spectra.top_eigh(tensor, jnp.eye(12), 2, which=which) for which in ("positive", "negative", "magnitude")
    )
    ends = np.concatenate([positive.values, negative.values], axis=1)
    np.testing.assert_allclose(both.values, wanted(ends, 2, "magnitude"), rtol=1e-5)
    assert np.all(np.diff(positive.values) <= 0) and np.all(np.diff(negative.values) >= 0)


def test_many_directions_give_each_what_it_gets_alone():
    # More directions than slots: places are given on, and the last few go on in fewer.
    values = np.random.default_rng(7).normal(size=(700, IN)) * np.random.default_rng(8).uniform(0.1, 9, (700, 1))
    tensor, _ = planted_tensor(values)
    top = spectra.top_eigh(tensor, jnp.eye(700))
    np.testing.assert_allclose(np.abs(top.values), np.abs(wanted(values, 2, "magnitude")), rtol=1e-4)
    alone = spectra.top_eigh(tensor, jnp.eye(700)[641:642])
    np.testing.assert_allclose(alone.values[0], top.values[641], rtol=1e-5)


@pytest.mark.parametrize(("layer", "use_encoder"), [(1, True), (2, False)])
def test_golden_by_the_fast_path(layer, use_encoder):
    lm = load(published.MODEL, attn_scale=published.SCALE)
    tracer = Tracer(lm, layer, use_encoder=use_encoder, scope=published.SCOPE)
    expected = load_file(published.TS_MICRO / "expected.safetensors")
    prefix = f"tracer.{layer}.{'enc' if use_encoder else 'dec'}."
    wide = BilinearTensor(
        *(jnp.pad(a, ((0, 0), (0, 128))) for a in (tracer.tensor.left, tracer.tensor.right)), tracer.tensor.down
    )
    for tensor in (tracer.tensor, wide):  # decomposed, and searched: zero inputs change nothing
        top = spectra.top_eigh(tensor, tracer.directions)
        scores = jnp.sum(jnp.abs(top.values), axis=-1)
        np.testing.assert_allclose(scores, expected[prefix + "all_truncated_k2"], rtol=5e-5, atol=5e-5)
        assert top.converged.all()


def test_in_an_sae_basis():
    tensor, _ = gaussian()
    basis = jnp.asarray(np.random.default_rng(9).normal(size=(IN, 400)), jnp.float32)
    direct = np.asarray(tensor.interaction(jnp.eye(12)[:3], basis), np.float64)
    truth, vectors = np.linalg.eigh(direct)
    top = spectra.top_eigh(tensor, jnp.eye(12)[:3], 2, basis=basis)
    order = np.argsort(-np.abs(truth), axis=1)[:, :2]
    np.testing.assert_allclose(top.values, np.take_along_axis(truth, order, axis=1), rtol=1e-4)
    expected = np.take_along_axis(vectors, order[:, None], axis=2).swapaxes(1, 2)
    np.testing.assert_allclose(np.abs(np.einsum("ukn,ukn->uk", expected, top.vectors)), 1, atol=1e-4)
    np.testing.assert_allclose(
        top.explained, (np.take_along_axis(truth, order, 1) ** 2).sum(1) / (direct**2).sum((1, 2)), rtol=1e-4
    )
    exact = spectra.eigh(tensor, jnp.eye(12)[:3], basis=basis)
    np.testing.assert_allclose(exact.values[:, [0, -1]], truth[:, [0, -1]], rtol=1e-4)
    rebuilt = np.einsum("uni,ui,umi->unm", exact.vectors, exact.values, exact.vectors)
    np.testing.assert_allclose(rebuilt, direct, atol=1e-4 * np.abs(direct).max())
    narrow = spectra.eigh(tensor, jnp.eye(12)[:1], basis=basis[:, :5])
    np.testing.assert_allclose(narrow.values[0], np.linalg.eigvalsh(direct[0, :5, :5]), rtol=1e-3, atol=1e-2)


def test_on_a_mesh_the_numbers_are_those_of_one_device():
    tensor, _ = gaussian()
    alone, exact = spectra.top_eigh(tensor, jnp.eye(12)), spectra.eigh(tensor, jnp.eye(12))
    mesh = jax.make_mesh((2, 4), ("a", "b"))  # 12 directions for 8 devices
    spread = spectra.top_eigh(tensor, jnp.eye(12), mesh=mesh)
    np.testing.assert_allclose(spread.values, alone.values, rtol=1e-5)
    assert spread.converged.all() and spread.vectors.shape == alone.vectors.shape
    np.testing.assert_allclose(spread.explained, alone.explained, rtol=1e-5)
    np.testing.assert_allclose(spectra.eigh(tensor, jnp.eye(12), mesh=mesh).values, exact.values, rtol=1e-4, atol=1e-3)


def test_inside_jit_vmap_and_grad():
    tensor, _ = gaussian()
    u, expected = jnp.eye(12)[:4], spectra.top_eigh(tensor, jnp.eye(12))
    mapped = jax.jit(jax.vmap(lambda tensor, u: spectra.top_eigh(tensor, u[None]), (None, 0)))(tensor, u)
    np.testing.assert_allclose(mapped.values[:, 0], expected.values[:4], rtol=1e-5)
    gradient = jax.grad(lambda u: spectra.top_eigh(tensor, u).values[1, 0])(u)
    v = np.asarray(expected.vectors[1, 0])
    y = tensor.apply(jnp.asarray(v))  # dl/du = v^T dQ/du v = what the layer makes of v
    np.testing.assert_allclose(gradient[1], y, rtol=1e-3, atol=1e-2)
    assert not gradient[jnp.array([0, 2, 3])].any()


def test_the_key_changes_the_start_alone():
    tensor, _ = gaussian()
    first, second = (spectra.top_eigh(tensor, jnp.eye(12), key=jax.random.key(seed)) for seed in (1, 2))
    np.testing.assert_allclose(first.values, second.values, rtol=1e-5)
    assert not np.array_equal(first.values, second.values)


def test_low_default_precision_does_not_reach_it():
    tensor, _ = gaussian()
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(lambda u: spectra.top_eigh(tensor, u, basis=jnp.eye(IN))).lower(jnp.eye(12)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_a_loose_tolerance_is_no_loose_search():
    """A search that ended early would have seen too little for its bounds to hold."""
    tensor, _ = gaussian()
    strict, loose = (spectra.top_eigh(tensor, jnp.eye(12), rtol=rtol) for rtol in (1e-4, 0.1))
    np.testing.assert_array_equal(loose.values, strict.values)
    np.testing.assert_array_equal(loose.bounds, strict.bounds)
    assert (strict.steps > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"directions": jnp.ones((2, 5))},
            r"directions have shape \(2, 5\), but they must be rows \[U, 12\] for this tensor",
        ),
        ({"directions": jnp.ones(12)}, r"rows \[U, 12\]"),
        ({"directions": jnp.ones((0, 12))}, "there are no directions"),
        ({"directions": jnp.full((1, 12), jnp.nan)}, "directions holds values that are not finite"),
        ({"k": 0}, "k is 0, but it must be between 1 and 160"),
        ({"k": 161}, r"k is 161, but it must be between 1 and 160 \(the number of inputs\)"),
        ({"which": "largest"}, "which must be one of magnitude, positive, negative, got 'largest'"),
        ({"rtol": 1e-7}, r"rtol is 1e-07, but it must be between 3\.8e-06 \(what float32 can hold\) and 1"),
        ({"rtol": 0.0}, r"rtol is 0\.0, but it must be between"),
        ({"rtol": float("nan")}, "rtol is nan, but it must be between"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"basis": jnp.ones((5, 7))}, r"basis has shape \(5, 7\), but it must be \[160, new\]"),
        ({"basis": jnp.full((IN, 7), jnp.inf)}, "basis holds values that are not finite"),
    ],
)
def test_bad_requests(change, message):
    tensor, _ = gaussian()
    arguments = {"directions": jnp.eye(12), "k": 2} | change
    with pytest.raises(ValueError, match=message):
        spectra.top_eigh(tensor, **arguments)


def test_bad_factors():
    tensor, _ = gaussian()
    half = [a.astype(jnp.bfloat16) for a in (tensor.left, tensor.right, tensor.down)]
    found = spectra.top_eigh(BilinearTensor(*half), jnp.eye(12, dtype=jnp.bfloat16))
    exact = spectra.top_eigh(BilinearTensor(*(a.astype(jnp.float32) for a in half)), jnp.eye(12))
    np.testing.assert_array_equal(found.values, exact.values)
    broken = BilinearTensor(tensor.left.at[3, 4].set(jnp.nan), tensor.right, tensor.down)
    with pytest.raises(ValueError, match="left holds values that are not finite"):
        spectra.top_eigh(broken, jnp.eye(12))
