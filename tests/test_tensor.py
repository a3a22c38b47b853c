"""BilinearTensor against the quadratic form that it stands for, and against the tensor written out."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bilinear_jax.linalg.basis import factor_basis
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
    program = str(jax.make_jaxpr(tensor.interaction)(u))
    assert "f32[256,32,32]" in program
    assert not any(f"f32[{shape}]" in program for shape in ("64,32,32", "32,64,32", "32,32,64"))


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


def forms(tensor, u) -> np.ndarray:
    """The interaction matrices in float64."""
    left, right, down, u = (np.asarray(a, np.float64) for a in (tensor.left, tensor.right, tensor.down, u))
    q = np.einsum("um,mi,mj->uij", u @ down, left, right)
    return (q + q.swapaxes(1, 2)) / 2


def rotation(n, seed=3):
    return jnp.linalg.qr(random(n, n, seed=seed))[0]


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([(1, 1, 1, 1), (30, 1, 2, 6), (2, 9, 4, 1), (12, 5, 3, 4)]), st.integers(0, 2**31))
def test_traces_norms_and_cosines_are_those_of_the_matrices(shape, seed):
    hidden, inputs, outputs, number = shape  # few, because each is compiled anew
    tensor, u = random_tensor(hidden, inputs, outputs, seed), random(number, outputs, seed=seed + 1)
    q = forms(tensor, u)
    inner, norms = np.einsum("uij,vij->uv", q, q), np.linalg.norm(q, axis=(1, 2))
    # Rounding is of the size of the parts that interfere, see the docstring of norms; in the gates u @ down, too.
    gates = np.abs(np.asarray(u, np.float64)) @ np.abs(np.asarray(tensor.down, np.float64))
    parts = np.sqrt(gates**2 @ np.diagonal(np.asarray(tensor.gram(), np.float64)))
    np.testing.assert_allclose(tensor.gram(), tensor.gram().T, rtol=1e-5, atol=1e-5)
    traces = np.trace(q, axis1=1, axis2=2)
    np.testing.assert_allclose(tensor.traces(u), traces, atol=1e-5 * np.sqrt(inputs * hidden) * parts.max())
    for gram in (None, tensor.gram()):
        np.testing.assert_array_less(np.abs(tensor.norms(u, gram) ** 2 - norms**2), 3e-6 * parts**2 + 1e-30)
        cosines = np.asarray(tensor.cosines(u, gram), np.float64)
        clear = norms > 0.05 * parts
        np.testing.assert_allclose(
            cosines[clear][:, clear], inner[clear][:, clear] / np.outer(norms[clear], norms[clear]), atol=2e-3
        )
        assert np.array_equal(cosines, cosines.T)


@pytest.mark.parametrize(("hidden", "inputs", "number"), [(64, 32, 6), (64, 32, 7), (200, 4, 3), (3, 50, 1)])
def test_norms_are_the_same_by_matrices_and_by_their_gram(hidden, inputs, number):
    # On both sides of the point where the way changes: 6 and 7 directions of the first shape.
    tensor, u = random_tensor(hidden, inputs), random(number, 4)
    np.testing.assert_allclose(tensor.norms(u), tensor.norms(u, tensor.gram()), rtol=1e-5)
    np.testing.assert_allclose(tensor.norms(u), np.linalg.norm(forms(tensor, u), axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("number", [1, 4, 2000])
def test_norms_take_the_cheaper_way(number):
    # hidden 256, in 64: a matrix takes 2 * 256 * 64^2 flops, K 6 * 256^2 * 64 and then 2 * 256^2 a direction.
    tensor, u = random_tensor(256, 64, 4), random(number, 4)
    shapes = {v.aval.shape for e in jax.make_jaxpr(tensor.norms)(u).eqns for v in e.outvars}
    assert ((256, 256) in shapes) == (number * 256 * 64**2 > 3 * 256**2 * 64 + number * 256**2)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100))
def test_norms_and_cosines_do_not_depend_on_coordinates(seed, scale):
    tensor, u = random_tensor(seed=seed), random(6, 4, seed=seed)
    order = np.random.default_rng(seed).permutation(7)
    rotated = tensor.in_basis(rotation(5, seed=seed))
    permuted = BilinearTensor(tensor.right[order], tensor.left[order], tensor.down[:, order])
    scaled = BilinearTensor(tensor.left * scale, tensor.right, tensor.down)
    for other, factor in (rotated, 1), (permuted, 1), (scaled, scale):
        np.testing.assert_allclose(other.norms(u), factor * tensor.norms(u), rtol=1e-3)
        np.testing.assert_allclose(other.cosines(u), tensor.cosines(u), atol=1e-3)
        close(other.traces(u), factor * tensor.traces(u))
    close(tensor.out_basis(u).norms(jnp.eye(6), tensor.gram()), tensor.norms(u))


powers = st.integers(-30, 30)


@settings(max_examples=30, deadline=None)
@given(st.tuples(powers, powers, powers, powers), st.sampled_from([2, 60]), st.booleans())
def test_scales_whose_squares_leave_float32(exponents, number, by_gram):
    """Against NumPy in float64, of factors and directions times powers of ten; 60 directions go by the Gram."""
    tensor, u = random_tensor(), random(number, 4)
    scales = [10.0**e for e in exponents]
    factors = [
        np.asarray(a, np.float64) * s for a, s in zip((tensor.left, tensor.right, tensor.down, u), scales, strict=True)
    ]
    exact = forms(BilinearTensor(tensor.left, tensor.right, tensor.down), u)
    norms = np.sqrt((exact**2).sum(axis=(1, 2)))
    size = np.prod(scales)
    largest, smallest = 1e37, 1e-36  # what float32 can hold, the Gram matrix and the gates included
    gates = abs(scales[2] * scales[3])
    assume(smallest < size * norms.min() / 100 and size * norms.max() < largest / 100 and smallest < gates < largest)
    scaled = BilinearTensor(*(jnp.asarray(a, jnp.float32) for a in factors[:3]))
    given_gram = by_gram and 1e-23 < (scales[0] * scales[1]) ** 2 < 1e30  # norms refuses a Gram matrix below 1e-24
    options = {"gram": scaled.gram()} if given_gram else {}
    directions = jnp.asarray(factors[3], jnp.float32)
    np.testing.assert_allclose(np.asarray(scaled.norms(directions, **options), float) / size, norms, rtol=1e-4)
    cosines = np.einsum("uij,vij->uv", exact, exact) / np.outer(norms, norms)
    np.testing.assert_allclose(scaled.cosines(directions, **options), cosines, atol=1e-4)
    if given_gram:
        np.testing.assert_allclose(
            np.asarray(options["gram"]) / (scales[0] * scales[1]) ** 2, tensor.gram(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, bool, jnp.float16, jnp.bfloat16])
def test_factors_that_are_not_float32_count_as_their_numbers(dtype):
    """int8 wrapped around: 100 * 100 is 16. By hand: 10^4 x_0^2 + 10^4 x_0 x_1, with the norm sqrt(1.5) 10^4."""
    one = 1 if dtype is bool else 100
    left, right = np.array([[one, 0]]).astype(dtype), np.array([[one, one]]).astype(dtype)
    tensor = BilinearTensor(jnp.asarray(left), jnp.asarray(right), jnp.asarray(np.array([[1]]).astype(dtype)))
    u, square = jnp.ones((1, 1)), float(one) ** 2
    assert {leaf.dtype for leaf in jax.tree.leaves(tensor)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(tensor.interaction(u)[0], [[square, square / 2], [square / 2, 0]])
    np.testing.assert_allclose(tensor.norms(u), [1.5**0.5 * square], rtol=1e-6)
    np.testing.assert_allclose(tensor.cosines(jnp.array([[1.0], [-2.0]])), [[1, -1], [-1, 1]], rtol=1e-6)


@pytest.mark.usefixtures("without_type_checks")
def test_float64_factors_stay_and_complex_ones_are_refused():
    with jax.enable_x64(True):
        tensor = BilinearTensor(*(jnp.ones((2, 2), jnp.float64) for _ in range(3)))
        assert tensor.left.dtype == jnp.float64 and tensor.norms(jnp.ones((1, 2), jnp.float64)).dtype == jnp.float64
    with pytest.raises(ValueError, match="down has the dtype complex64, but must hold real numbers"):
        BilinearTensor(jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones((2, 2), jnp.complex64))


def test_norms_in_another_basis():
    tensor, u, basis = random_tensor(), random(3, 4), random(5, 9)
    q = np.einsum("ia,uij,jb->uab", basis, forms(tensor, u), basis)
    close(tensor.in_basis(basis).norms(u), np.linalg.norm(q, axis=(1, 2)))
    close(tensor.in_basis(basis).norms(u, tensor.in_basis(basis).gram()), np.linalg.norm(q, axis=(1, 2)))
    close(tensor.in_basis(basis).traces(u), np.trace(q, axis1=1, axis2=2))


@pytest.mark.parametrize("by_gram", [False, True])
def test_an_outlier_does_not_drown_the_norms(by_gram):
    # Unit 0 is 10,000 times the others: the directions that don't read it keep their own precision.
    tensor = random_tensor(100, 20, 4)
    left, right = tensor.left.at[0].multiply(100), tensor.right.at[0].multiply(100)
    tensor = BilinearTensor(left, right, tensor.down.at[2:, 0].set(0))
    u = jnp.eye(4)
    norms = tensor.norms(u, tensor.gram() if by_gram else None)
    np.testing.assert_allclose(norms, np.linalg.norm(forms(tensor, u), axis=(1, 2)), rtol=1e-5)


def zeros_and_a_matrix(seed=0):
    """A tensor and directions: a zero matrix, three hidden units that cancel, and a matrix that is not zero."""
    left, right = random(5, 6, seed=seed), random(5, 6, seed=seed + 100)
    left = left.at[1].set(left[0]).at[2].set(left[0])
    right = right.at[2].set(right[0] + right[1])
    return BilinearTensor(left, right, jnp.eye(5)), jnp.array([[0, 0, 0, 0, 0], [1, 1, -1, 0, 0], [0, 0, 0, 1, 1.0]])


@pytest.mark.parametrize("seed", range(6))  # what rounding leaves of the second matrix is positive for some
def test_a_zero_matrix_is_like_nothing(seed):
    tensor, u = zeros_and_a_matrix(seed)
    assert tensor.norms(u, tensor.gram())[0] == 0
    assert tensor.norms(u, tensor.gram())[1] < 1e-3 * tensor.norms(u)[2]
    np.testing.assert_allclose(tensor.cosines(u), np.diag([0, 0, 1.0]), atol=1e-6)
    np.testing.assert_allclose(jax.jit(type(tensor).cosines)(tensor, u), np.diag([0, 0, 1.0]), atol=1e-6)


def test_gradients_of_norms_and_cosines():
    tensor, u = zeros_and_a_matrix()
    for gram in (None, tensor.gram()):
        slope = jax.jit(jax.grad(lambda u, gram=gram: tensor.norms(u, gram).sum()))
        assert np.array_equal(slope(u[:1]), np.zeros((1, 5)))
        # |Q_u|^2 = g K g^T, so the gradient by u is K g / |Q_u|.
        close(slope(u[2:]), u[2:] @ tensor.gram() / tensor.norms(u[2:])[:, None])
    assert np.isfinite(jax.jit(jax.grad(lambda u: (tensor.cosines(u) ** 2).sum()))(u)).all()


def test_not_a_number_is_not_taken_for_zero():
    tensor, u = random_tensor(), random(2, 4)
    tensor = BilinearTensor(tensor.left.at[0, 0].set(jnp.nan), tensor.right, tensor.down)
    assert np.isnan(tensor.norms(u)).all() and np.isnan(tensor.norms(u, tensor.gram())).all()
    assert np.isnan(tensor.cosines(u)).all()


def test_norms_of_no_directions():
    tensor = random_tensor()
    assert tensor.norms(jnp.zeros((0, 4))).shape == tensor.traces(jnp.zeros((0, 4))).shape == (0,)
    assert tensor.cosines(jnp.zeros((0, 4))).shape == (0, 0)


def test_norms_inside_jit_and_vmap():
    stacked = jax.tree.map(lambda *a: jnp.stack(a), random_tensor(), random_tensor(seed=5))
    u = random(3, 4)
    for method in (BilinearTensor.traces, BilinearTensor.norms, BilinearTensor.cosines):
        close(jax.jit(jax.vmap(lambda t, method=method: method(t, u)))(stacked)[1], method(random_tensor(seed=5), u))
    cosines = np.asarray(jax.jit(BilinearTensor.cosines)(random_tensor(40), random(30, 4)))
    assert np.array_equal(cosines, cosines.T) and np.abs(cosines).max() <= 1
    np.testing.assert_allclose(np.diagonal(cosines), 1, atol=1e-6)


def test_products_have_the_highest_precision_whatever_the_default():
    tensor, u = random_tensor(), random(3, 4)
    calls = [tensor.gram] + [lambda m=m: m(u) for m in (tensor.traces, tensor.norms, tensor.cosines)]
    with jax.default_matmul_precision("bfloat16"):
        programs = [str(jax.make_jaxpr(call)()) for call in (*calls, lambda: tensor.norms(u, tensor.gram()))]
    for program in programs:
        assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


@pytest.mark.parametrize("new", [1, 3, 5, 12])
@pytest.mark.parametrize("kind", ["generic", "rank deficient", "ill conditioned", "zero"])
def test_a_basis_is_brought_down_to_the_rank_it_can_have(new, kind):
    basis = random(5, new)
    if kind == "rank deficient":
        basis = basis.at[3:].set(basis[:2])
    elif kind == "ill conditioned":
        basis = jnp.logspace(0, -6, 5)[:, None] * basis
    elif kind == "zero":
        basis = jnp.zeros_like(basis)
    root, isometry = factor_basis(basis)
    rank = min(5, new)
    assert root.shape == (5, rank) and isometry.shape == (new, rank)
    close(root @ isometry.T, basis)
    np.testing.assert_allclose(isometry.T @ isometry, np.eye(rank), atol=2e-6)

    # All there is of the projected matrix is in the small one.
    tensor, u = random_tensor(), random(1, 4)
    small, large = tensor.in_basis(root), np.einsum("ia,ij,jb->ab", basis, forms(tensor, u)[0], basis)
    close(small.norms(u)[0], np.linalg.norm(large))
    values, vectors = jnp.linalg.eigh(small.interaction(u)[0])
    vectors = isometry @ vectors
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(large @ vectors, vectors * values[None], atol=1e-5 * (1e-30 + np.abs(values).max()))
    expected = np.concatenate([values, np.zeros(new - rank)])
    np.testing.assert_allclose(np.sort(expected), np.linalg.eigvalsh(large), atol=1e-5 * np.abs(values).max() + 1e-30)


def test_no_matrix_between_all_vectors_of_a_basis():
    program = jax.make_jaxpr(factor_basis)(random(8, 100))
    assert max(v.aval.size for e in program.eqns for v in e.outvars) <= 8 * 100


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
        (
            (3, 2),
            (3, 4),
            (5, 3),
            r"left has shape \(3, 2\) and right \(3, 4\), but both must be matrices \[hidden, in\]",
        ),
        ((3,), (3,), (5, 3), r"left has shape \(3,\) and right \(3,\), but both must be matrices"),
        ((3, 2), (3, 2), (3, 5), r"down has shape \(3, 5\), but it must be \[out, 3\]: .* left \(3, 2\)"),
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
    with pytest.raises(ValueError, match=r"rows \[U, out\]: write u\[None\] for one"):
        tensor.interaction(jnp.zeros(4))
    with pytest.raises(ValueError, match="basis must have 5 coordinates"):
        tensor.interaction(jnp.zeros((1, 4)), jnp.zeros((4, 9)))
    with pytest.raises(ValueError, match="basis must have 5 coordinates"):
        tensor.in_basis(jnp.zeros((4, 9)))
    with pytest.raises(ValueError, match="v must have 5 coordinates"):
        tensor.matvec(jnp.zeros((1, 4)), jnp.zeros(7))
    for method in (tensor.traces, tensor.norms, tensor.cosines):
        with pytest.raises(ValueError, match="directions must have 4 coordinates"):
            method(jnp.zeros((1, 5)))
        with pytest.raises(ValueError, match=r"rows \[U, out\]: write u\[None\] for one"):
            method(jnp.zeros(4))
    for method in (tensor.norms, tensor.cosines):
        with pytest.raises(
            ValueError, match=r"gram has shape \(4, 4\), but it must be gram\(\) of this tensor, \(7, 7\)"
        ):
            method(jnp.zeros((1, 4)), jnp.zeros((4, 4)))
