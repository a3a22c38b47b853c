"""The HOSVD against the singular value decomposition of the tensor written out, and the identities that define it."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilinear_jax.explain.hosvd import hosvd
from bilinear_jax.tensor import BilinearTensor


def random_tensor(hidden=9, inputs=5, outputs=4, seed=0) -> BilinearTensor:
    rng = np.random.default_rng(seed)
    shapes = (hidden, inputs), (hidden, inputs), (outputs, hidden)
    return BilinearTensor(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))


def unfolded(tensor) -> np.ndarray:
    """The tensor, symmetrised in its inputs, as a matrix [out, in * in] in float64."""
    left, right, down = (np.asarray(a, np.float64) for a in (tensor.left, tensor.right, tensor.down))
    full = np.einsum("om,mi,mj->oij", down, left, right)
    return ((full + full.swapaxes(1, 2)) / 2).reshape(len(down), -1)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([(1, 1, 1), (30, 2, 8), (2, 6, 4), (20, 5, 3)]), st.integers(0, 2**31))
def test_is_the_singular_value_decomposition_of_the_unfolded_tensor(shape, seed):
    hidden, inputs, outputs = shape  # few, because each is compiled anew
    tensor = random_tensor(hidden, inputs, outputs, seed)
    matrix, shared = unfolded(tensor), hosvd(tensor)
    expected = np.linalg.svd(matrix, compute_uv=False)
    expected = np.pad(expected, (0, max(outputs - len(expected), 0)))  # where outputs outnumber the entries of a matrix
    # Rounding is of the size of the parts that interfere, and a squared singular value is what it falls on.
    size = np.sum(np.asarray(tensor.down, np.float64) ** 2 @ np.diagonal(tensor.gram()))
    np.testing.assert_allclose(np.asarray(shared.singular_values) ** 2, expected**2, atol=3e-6 * size)
    directions = np.asarray(shared.directions, np.float64)
    np.testing.assert_allclose(directions @ directions.T, np.eye(outputs), atol=1e-5)
    products = directions @ matrix @ matrix.T @ directions.T
    np.testing.assert_allclose(products, np.diag(expected**2), atol=3e-6 * size)
    np.testing.assert_allclose(np.sum(np.asarray(shared.singular_values) ** 2), np.sum(matrix**2), atol=3e-6 * size)


def test_its_tensor_is_what_the_layer_computes_along_the_directions():
    tensor = random_tensor()
    shared = hosvd(tensor, n=3)
    assert shared.singular_values.shape == (3,) and shared.directions.shape == (3, 4) and shared.tensor.n_out == 3
    q = np.asarray(shared.tensor.interaction(jnp.eye(3)))
    np.testing.assert_allclose(q.reshape(3, -1), shared.directions @ unfolded(tensor), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(q, axis=(1, 2)), shared.singular_values, rtol=1e-5)
    np.testing.assert_allclose(shared.tensor.cosines(jnp.eye(3)), np.eye(3), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_n_terms_are_the_nearest_tensor_that_writes_in_n_directions(n):
    tensor = random_tensor()
    matrix, shared = unfolded(tensor), hosvd(tensor, n)
    cut = np.asarray(shared.directions).T @ np.asarray(shared.tensor.interaction(jnp.eye(n))).reshape(n, -1)
    rest = np.linalg.svd(matrix, compute_uv=False)[n:]
    np.testing.assert_allclose(np.linalg.norm(matrix - cut), np.sqrt(np.sum(rest**2)), atol=1e-4)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100))
def test_does_not_depend_on_coordinates(seed, scale):
    tensor, rng = random_tensor(seed=seed), np.random.default_rng(seed)
    shared, order = hosvd(tensor), rng.permutation(9)
    rotation, turn = (jnp.asarray(np.linalg.qr(rng.normal(size=(n, n)))[0], jnp.float32) for n in (5, 4))
    permuted = BilinearTensor(tensor.right[order], tensor.left[order], tensor.down[:, order])
    scaled = BilinearTensor(tensor.left, tensor.right * scale, tensor.down)
    for other, factor in (tensor.in_basis(rotation), 1), (permuted, 1), (scaled, scale), (tensor.out_basis(turn), 1):
        np.testing.assert_allclose(
            hosvd(other).singular_values,
            factor * shared.singular_values,
            atol=1e-4 * factor * shared.singular_values[0],
        )
    # Turned outputs have turned directions, each up to its sign.
    directions = hosvd(tensor.out_basis(turn)).directions @ turn
    gap = np.min(-np.diff(shared.singular_values**2)) / shared.singular_values[0] ** 2
    np.testing.assert_allclose(np.abs(jnp.sum(directions * shared.directions, axis=1)), 1, atol=min(1e-4 / gap, 1))


def test_finds_planted_directions_and_their_order():
    # Output direction i computes x_i^2 with weight i + 1: the largest is the last.
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    down = jnp.asarray(rotation * np.arange(1, 5), jnp.float32)
    shared = hosvd(BilinearTensor(jnp.eye(4), jnp.eye(4), down), n=3)
    np.testing.assert_allclose(shared.singular_values, [4, 3, 2], rtol=1e-5)
    planted = rotation.T[[3, 2, 1]]
    planted = planted * np.sign(planted[np.arange(3), np.abs(planted).argmax(1)])[:, None]
    np.testing.assert_allclose(shared.directions, planted, atol=1e-5)


def test_an_outlier_leaves_the_others_their_precision():
    # By the eigenvalues of B B^T alone, the others would be off by up to 1e-3.
    tensor = random_tensor(48, 12, 10)
    tensor = BilinearTensor(tensor.left.at[0].multiply(30), tensor.right.at[0].multiply(30), tensor.down)
    shared, expected = hosvd(tensor), np.linalg.svd(unfolded(tensor), compute_uv=False)
    assert expected[1] < 1e-2 * expected[0]
    np.testing.assert_allclose(shared.singular_values, expected, rtol=1e-4)


def test_outputs_that_add_up_to_nothing_have_one_direction_less():
    tensor = random_tensor(20, 6, 5)
    tensor = BilinearTensor(tensor.left, tensor.right, tensor.down - jnp.mean(tensor.down, axis=0, keepdims=True))
    shared = hosvd(tensor)
    assert shared.singular_values[-1] < 2e-6 * shared.singular_values[0]
    np.testing.assert_allclose(np.abs(shared.directions[-1]), 5**-0.5, atol=1e-5)


def test_equal_singular_values_and_zero():
    equal = hosvd(BilinearTensor(jnp.eye(3), jnp.eye(3), 2 * jnp.eye(3)))
    np.testing.assert_allclose(equal.singular_values, 2, rtol=1e-6)
    zero = hosvd(BilinearTensor(jnp.zeros((4, 2)), jnp.zeros((4, 2)), jnp.ones((3, 4))))
    assert np.array_equal(zero.singular_values, np.zeros(3))
    for shared in (equal, zero):
        np.testing.assert_allclose(shared.directions @ shared.directions.T, np.eye(3), atol=1e-6)


def test_gradients_of_singular_values():
    # d s_k^2 = 2 <Q_k, dQ_k>: by central differences in one random direction of the factors.
    with jax.enable_x64():
        tensor, change = (jax.tree.map(lambda a: a.astype(np.float64), random_tensor(seed=s)) for s in (0, 1))
        values = jax.jit(lambda t: hosvd(t, 3).singular_values)
        value, moved = jax.jit(lambda t, by: jax.jvp(values, (t,), (by,)))(tensor, change)
        step = lambda e: values(jax.tree.map(lambda a, b: a + e * b, tensor, change))  # noqa: E731
        np.testing.assert_allclose(moved, (step(1e-5) - step(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-6)
        assert value.dtype == np.float64


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_gradients_are_finite_where_singular_values_are_equal_or_zero(transform):
    equal = BilinearTensor(jnp.eye(3), jnp.eye(3), 2 * jnp.eye(3))
    zero = jax.tree.map(jnp.zeros_like, equal)
    for tensor in (equal, zero):
        gradient = transform(jax.grad(lambda t: jnp.sum(hosvd(t).singular_values)))(tensor)
        assert all(np.isfinite(factor).all() for factor in jax.tree.leaves(gradient))


def test_inside_jit_and_vmap():
    stacked = jax.tree.map(lambda *a: jnp.stack(a), random_tensor(), random_tensor(seed=5))
    batched, alone = jax.jit(jax.vmap(lambda t: hosvd(t, 2)))(stacked), hosvd(random_tensor(seed=5), 2)
    for one, other in zip(jax.tree.leaves(batched), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one[1], other, atol=1e-4)


def test_no_matrix_of_an_output_is_formed():
    # 40 inputs, 30 hidden units, 20 outputs.
    shapes = [v.aval.shape for e in jax.make_jaxpr(hosvd)(random_tensor(30, 40, 20)).eqns for v in e.outvars]
    assert max(np.prod(shape) for shape in shapes) < 40 * 40


def test_products_have_the_highest_precision_whatever_the_default():
    with jax.default_matmul_precision("bfloat16"):
        program = str(jax.make_jaxpr(hosvd)(random_tensor()))
    assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


@pytest.mark.parametrize("n", [0, 5])
def test_more_directions_than_outputs(n, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=rf"n is {n}, but it must be between 1 and 4 "):
        hosvd(random_tensor(), n)
