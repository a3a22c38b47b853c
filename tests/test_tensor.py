"""BilinearTensor against the quadratic form that it stands for, and against the tensor written out."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilinear_jax.tensor import BilinearTensor, with_constant


def random_tensor(hidden=7, inputs=5, outputs=4, seed=0) -> BilinearTensor:
    rng = np.random.default_rng(seed)
    shapes = (hidden, inputs), (hidden, inputs), (outputs, hidden)
    return BilinearTensor(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))


def random(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(a, b):
    """Equal up to the rounding of a float32 sum of the size of the largest entries."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=100 * np.finfo(np.float32).eps * (np.abs(b).max() if b.size else 1))


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_interaction_is_the_contracted_tensor_and_gives_the_output(hidden, inputs, outputs, number, seed):
    tensor = random_tensor(hidden, inputs, outputs, seed)
    u, x = random(number, outputs, seed=seed), random(inputs, seed=seed + 1)
    full = np.einsum("om,mi,mj->oij", *(np.asarray(a, np.float64) for a in (tensor.down, tensor.left, tensor.right)))
    raw = np.einsum("uo,oij->uij", np.asarray(u, np.float64), full)
    q = tensor.interaction(u)
    np.testing.assert_allclose(tensor.interaction(u, symmetric=False), raw, atol=1e-4 * (1 + np.abs(raw).max()))
    np.testing.assert_allclose(q, (raw + raw.swapaxes(1, 2)) / 2, atol=1e-4 * (1 + np.abs(raw).max()))
    assert np.array_equal(q, q.swapaxes(1, 2))
    form = np.einsum("i,uij,j->u", x, raw, x)
    atol = 1e-4 * (1 + np.einsum("i,uij,j->u", np.abs(x), np.abs(raw), np.abs(x)).max())
    np.testing.assert_allclose(u @ tensor.apply(x), form, atol=atol)
    np.testing.assert_allclose(jnp.einsum("i,uij,j->u", x, q, x), form, atol=atol)


def test_matvec_multiplies_by_the_interaction_matrix():
    tensor, u = random_tensor(), random(6, 4)
    own, shared = random(6, 5), random(5, seed=2)
    close(tensor.matvec(u, own), jnp.einsum("uij,uj->ui", tensor.interaction(u), own))
    close(tensor.matvec(u, shared), jnp.einsum("uij,j->ui", tensor.interaction(u), shared))


@pytest.mark.parametrize("given", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_biases_are_a_constant_input(given):
    tensor, x = random_tensor(), random(3, 5)
    biases = [random(n, seed=9 + n) if on else None for n, on in zip((7, 7, 4), given, strict=True)]
    b_left, b_right, b_down = (jnp.zeros(n) if b is None else b for n, b in zip((7, 7, 4), biases, strict=True))
    left = x @ tensor.left.T + jnp.broadcast_to(b_left, (3, 7))
    right = x @ tensor.right.T + jnp.broadcast_to(b_right, (3, 7))
    expected = (left * right) @ tensor.down.T + jnp.broadcast_to(b_down, (3, 4))

    biased = BilinearTensor.from_mlp(tensor.left, tensor.right, tensor.down, *biases)
    assert biased.n_in == 6
    close(biased.apply(with_constant(x)), expected)
    u = random(2, 4)
    quadratic = jnp.einsum("bi,uij,bj->bu", with_constant(x), biased.interaction(u), with_constant(x))
    close(quadratic, expected @ u.T)


def test_no_bias_adds_no_input():
    tensor = random_tensor()
    assert BilinearTensor.from_mlp(tensor.left, tensor.right, tensor.down).n_in == tensor.n_in


@pytest.mark.parametrize("hidden", [2, 50])
@pytest.mark.parametrize("new", [1, 3, 40])
@pytest.mark.parametrize("number", [1, 30])
def test_both_orders_of_a_basis_change_agree(hidden, new, number):
    # Between them these shapes take either order of contraction.
    tensor, u, basis = random_tensor(hidden), random(number, 4), random(5, new)
    q = tensor.interaction(u, basis)
    close(q, tensor.in_basis(basis).interaction(u))
    close(q, jnp.einsum("ia,uij,jb->uab", basis, tensor.interaction(u), basis))
    assert np.array_equal(q, q.swapaxes(1, 2))
    close(tensor.interaction(u, basis, symmetric=False), tensor.in_basis(basis).interaction(u, symmetric=False))


def test_an_sae_basis_is_not_contracted_with_the_hidden_units():
    # d_model 64, hidden 256, 512 features: the factors first would take 2 * 256 * 512^2 flops, Q first 4 times fewer.
    tensor, u, basis = random_tensor(256, 64, 64), random(1, 64), random(64, 512)
    flops = jax.jit(tensor.interaction).lower(u, basis).compile().cost_analysis()["flops"]
    assert flops < 0.5 * 2 * 256 * 512**2


def test_the_third_order_tensor_is_never_formed():
    tensor, u = random_tensor(64, 32, 32), random(256, 32)  # more directions than hidden units
    shapes = [v.aval.shape for e in jax.make_jaxpr(tensor.interaction)(u).eqns for v in e.outvars]
    assert (64, 32, 32) not in {tuple(sorted(shape, reverse=True)) for shape in shapes}


def test_out_basis_composes_output_directions():
    tensor, u, x = random_tensor(), random(6, 4), random(2, 5)
    close(tensor.out_basis(u).apply(x), tensor.apply(x) @ u.T)
    close(tensor.out_basis(u).interaction(jnp.eye(6)), tensor.interaction(u))


def test_inside_jit_vmap_and_grad():
    tensor, u, x = random_tensor(), random(1, 4), random(5)
    close(jax.jit(lambda t, u: t.interaction(u))(tensor, u), tensor.interaction(u))

    stacked = jax.tree.map(lambda *a: jnp.stack(a), tensor, random_tensor(seed=5))
    batched = jax.vmap(lambda t: t.interaction(u))(stacked)
    close(batched[1], random_tensor(seed=5).interaction(u))
    assert jax.vmap(lambda t: t, in_axes=0)(stacked).left.shape == (2, 7, 5)

    # The gradient of the quadratic form is 2 Q x, and by left it is what a finite difference says.
    close(jax.grad(lambda x: (u @ tensor.apply(x))[0])(x), 2 * tensor.matvec(u, x)[0])
    gradient = jax.grad(lambda t: (u @ t.apply(x))[0])(tensor)
    assert isinstance(gradient, BilinearTensor)
    close(gradient.left, (u @ tensor.down)[0][:, None] * (tensor.right @ x)[:, None] * jnp.broadcast_to(x, (7, 5)))


def test_is_a_pytree_with_named_factors():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(random_tensor())[0]]
    assert paths == [".left", ".right", ".down"]


@pytest.fixture
def without_type_checks(monkeypatch):
    """As for a user: shapes are checked by the library alone, not by jaxtyping as well."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("left", "right", "down", "message"),
    [
        ((3, 2), (3, 4), (5, 3), r"one shape \[hidden, in\], got \(3, 2\) and \(3, 4\)"),
        ((3,), (3,), (5, 3), "left and right are matrices"),
        ((3, 2), (3, 2), (3, 5), r"hidden = 3 as in left \(3, 2\), got \(3, 5\)"),
    ],
)
def test_factors_that_do_not_fit(left, right, down, message):
    with pytest.raises(ValueError, match=message):
        BilinearTensor(jnp.zeros(left), jnp.zeros(right), jnp.zeros(down))


@pytest.mark.usefixtures("without_type_checks")
def test_vectors_that_do_not_fit():
    tensor = random_tensor()
    with pytest.raises(ValueError, match="x must have 5 coordinates"):
        tensor.apply(jnp.zeros(4))
    with pytest.raises(ValueError, match="directions must have 4 coordinates"):
        tensor.interaction(jnp.zeros((1, 5)))
    with pytest.raises(ValueError, match="add an axis"):
        tensor.interaction(jnp.zeros(4))
    with pytest.raises(ValueError, match="basis must have 5 coordinates"):
        tensor.interaction(jnp.zeros((1, 4)), jnp.zeros((4, 9)))
    with pytest.raises(ValueError, match="basis must have 5 coordinates"):
        tensor.in_basis(jnp.zeros((4, 9)))
    with pytest.raises(ValueError, match="v must have 5 coordinates"):
        tensor.matvec(jnp.zeros((1, 4)), jnp.zeros(7))
