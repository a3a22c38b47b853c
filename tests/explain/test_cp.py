"""Similarities by brute force and by sampling; decompositions of planted tensors; the golden case."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.explain.cp import CP, cp_als, cp_gradient, match, normalised
from bilinear_jax.explain.similarity import cosine_similarity, cross_gram, functional_similarity, inner_product
from bilinear_jax.tensor import BilinearTensor


def made(seed: int, hidden: int, inputs: int = 6, outputs: int = 4) -> BilinearTensor:
    shapes = ((hidden, inputs), (hidden, inputs), (outputs, hidden))
    keys = jax.random.split(jax.random.key(seed), 3)
    return BilinearTensor(*(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)))


def written_out(tensor: BilinearTensor) -> np.ndarray:
    return np.asarray(tensor.interaction(jnp.eye(tensor.n_out)), np.float64)


def test_similarities_by_brute_force():
    a, b = made(0, 5), made(1, 3)
    q, p = written_out(a), written_out(b)
    np.testing.assert_allclose(inner_product(a, b), (q * p).sum(), rtol=1e-5)
    cosine = (q * p).sum() / np.sqrt((q**2).sum() * (p**2).sum())
    np.testing.assert_allclose(cosine_similarity(a, b), cosine, rtol=1e-5)
    np.testing.assert_allclose(cross_gram(a, a), a.gram(), rtol=1e-5)

    def expectation(q, p):
        return np.trace(q, axis1=1, axis2=2) @ np.trace(p, axis1=1, axis2=2) + 2 * (q * p).sum()

    wanted = expectation(q, p) / np.sqrt(expectation(q, q) * expectation(p, p))
    np.testing.assert_allclose(functional_similarity(a, b), wanted, rtol=1e-5)
    x = jax.random.normal(jax.random.key(2), (100_000, 6))  # and the formula itself, by sampling
    y, z = a.apply(x), b.apply(x)
    sampled = jnp.sum(y * z) / jnp.sqrt(jnp.sum(y**2) * jnp.sum(z**2))
    np.testing.assert_allclose(wanted, sampled, atol=0.02)


def test_similarities_of_nothing_and_of_what_doesn_t_fit():
    a = made(0, 5)
    zero = BilinearTensor(jnp.zeros((1, 6)), jnp.zeros((1, 6)), jnp.zeros((4, 1)))
    assert cosine_similarity(a, zero) == functional_similarity(zero, a) == 0
    assert np.isfinite(jax.grad(lambda scale: cosine_similarity(a, a.out_basis(scale * jnp.eye(4))))(0.0))
    np.testing.assert_allclose(functional_similarity(a, BilinearTensor(a.right, a.left, 3 * a.down)), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="6 and 6 inputs, 4 and 3 outputs"):
        inner_product(a, made(1, 3, outputs=3))


@pytest.mark.parametrize("measure", [cosine_similarity, functional_similarity])
@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_similarities_don_t_depend_on_size_and_pass_nan_on(measure, scale):
    """The product of two squared norms would leave the range of float32."""
    a, b = made(0, 5), made(1, 5)
    scaled = [BilinearTensor(tensor.left * scale, tensor.right * scale, tensor.down) for tensor in (a, b)]
    np.testing.assert_allclose(measure(*scaled), measure(a, b), rtol=1e-5)
    assert np.isnan(measure(a, BilinearTensor(b.left * jnp.nan, b.right, b.down)))


def test_the_golden_case():
    """A CP model of rank 7 of the image model's tensor in pixels."""
    from safetensors.numpy import load_file

    arrays = {
        name: jnp.asarray(array)
        for name, array in load_file(Path(__file__).parents[1] / "data" / "image-micro.safetensors").items()
    }
    tensor = BilinearTensor(arrays["w_l"][0], arrays["w_r"][0], arrays["w_u"]).in_basis(arrays["embed"])
    found = BilinearTensor(arrays["cp_left"].T, arrays["cp_right"].T, arrays["cp_down"])
    np.testing.assert_allclose(found.apply(arrays["x"]), arrays["cp_logits"], rtol=5e-5, atol=5e-5)
    np.testing.assert_allclose(cosine_similarity(tensor, found), arrays["cp_similarity"][0], rtol=5e-5, atol=5e-5)
    np.testing.assert_allclose(normalised(found, found).weights, arrays["cp_sigma"], rtol=5e-5, atol=5e-5)


METHODS = {"gradient": lambda t, k: cp_gradient(t, 3, k, steps=600), "als": lambda t, k: cp_als(t, 3, k, steps=300)}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_planted_components_are_found_from_any_start(method):
    """Three components of different sizes are unique, so seeds that fit agree with the plan and with each other."""
    planted = made(3, 3, inputs=8)
    found = jax.jit(jax.vmap(lambda key: method(planted, key)))(jax.random.split(jax.random.key(0), 4))
    good = [jax.tree.map(lambda leaf, n=n: leaf[n], found) for n in range(4) if found.similarity[n] > 0.9999]
    assert len(good) >= 2
    plan = normalised(planted, planted)
    for one in good:
        assert (match(one, plan).cosines > 0.999).all() and (match(one, good[0]).cosines > 0.999).all()
        np.testing.assert_allclose(one.weights, plan.weights, rtol=0.02)
        np.testing.assert_allclose(jnp.linalg.norm(one.tensor.left, axis=1), 1, rtol=1e-5)


def test_alternating_least_squares_never_rises():
    """And ends where no factor can be improved: the distance is stationary."""
    tensor = made(0, 12, inputs=7)

    def distance(one: CP):
        return float(inner_product(tensor, tensor) * (1 - one.similarity**2))

    found = [cp_als(tensor, 4, jax.random.key(1), steps=steps) for steps in (1, 3, 10, 200)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(map(distance, found)))

    last = found[-1].tensor
    gradient = jax.jit(jax.grad(lambda one: inner_product(one, one) / 2 - inner_product(tensor, one)))(last)
    scale = float(jnp.sqrt(inner_product(tensor, tensor)))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 2e-2 * scale


@pytest.mark.parametrize("penalty", ["l1", "hoyer"])
def test_a_penalty_makes_patterns_sparse_at_a_cost(penalty):
    tensor = made(0, 12, inputs=16)

    def flatness(one):
        patterns = jnp.concatenate([one.tensor.left, one.tensor.right])
        return float((jnp.abs(patterns).sum(axis=1) ** 2 / 16).mean())

    plain = cp_gradient(tensor, 6, jax.random.key(0))
    sparse = cp_gradient(tensor, 6, jax.random.key(0), penalty=penalty, strength=1.0)
    assert flatness(sparse) < 0.6 * flatness(plain)
    assert 0.2 < sparse.similarity < plain.similarity


def test_matching_undoes_order_signs_and_sides():
    plan = normalised(made(3, 5), made(3, 5))
    order = jnp.array([3, 0, 4, 1, 2])
    left, right, down = (-plan.tensor.right[order], plan.tensor.left[order], -plan.tensor.down[:, order])
    other, cosines = match(plan, CP(plan.weights[order], BilinearTensor(left, right, down), plan.similarity))
    assert order[other].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(cosines, 1, rtol=1e-5)
    flipped = CP(plan.weights, BilinearTensor(plan.tensor.left, plan.tensor.right, -plan.tensor.down), plan.similarity)
    assert (match(plan, flipped).cosines < 0.99).any()  # the opposite is not the same


def test_what_is_refused():
    tensor = made(0, 5)
    with pytest.raises(ValueError, match="rank and steps must be at least 1"):
        cp_als(tensor, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="penalty is 'l2', but it must be one of None, 'l1', 'hoyer'"):
        cp_gradient(tensor, 2, jax.random.key(0), penalty="l2")
    with pytest.raises(
        ValueError, match=r"cannot match 2 components of 6 inputs and 4 outputs with 3 of 6 inputs and 4 outputs"
    ):
        match(normalised(tensor, made(1, 2)), normalised(tensor, made(1, 3)))
