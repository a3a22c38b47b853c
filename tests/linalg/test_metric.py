"""The metric of data: planted second moments, and what an eigenpair in a metric must satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.explain.spectra import top_eigh
from bilinear_jax.linalg.metric import Metric
from bilinear_jax.tensor import BilinearTensor

RNG = np.random.default_rng(0)
IN, HIDDEN = 12, 20
TENSOR = BilinearTensor(*(jnp.asarray(RNG.normal(size=(HIDDEN, IN)), jnp.float32) for _ in range(2)), jnp.eye(HIDDEN))
DIRECTIONS = jnp.asarray(RNG.normal(size=(3, HIDDEN)), jnp.float32)
TURN = np.linalg.qr(RNG.normal(size=(IN, IN)))[0]
MOMENT = TURN @ np.diag(np.geomspace(9, 0.1, IN)) @ TURN.T


def test_eigenpairs_are_those_of_the_white_form():
    root = TURN @ np.diag(np.sqrt(np.geomspace(9, 0.1, IN))) @ TURN.T
    for direction, values in zip(DIRECTIONS, top_eigh(TENSOR, DIRECTIONS, IN, metric=MOMENT).values, strict=True):
        q = np.asarray(TENSOR.interaction(direction[None])[0], np.float64)
        np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(root @ q @ root), rtol=1e-3, atol=1e-3)


def test_all_parts_are_the_form_and_each_value_is_its_mean_on_the_data():
    top = top_eigh(TENSOR, DIRECTIONS, IN, metric=Metric.of(MOMENT))
    x = RNG.multivariate_normal(np.zeros(IN), MOMENT, size=50)
    squares = np.einsum("uki,ni->unk", top.vectors, x) ** 2
    wanted = np.einsum("uo,no->un", DIRECTIONS, TENSOR.apply(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(np.einsum("unk,uk->un", squares, top.values), wanted, rtol=1e-3, atol=2e-2)
    np.testing.assert_allclose(top.patterns, top.vectors @ MOMENT, rtol=1e-3, atol=1e-4)
    inner = np.einsum("uki,uli->ukl", top.vectors, top.patterns)
    np.testing.assert_allclose(inner, np.broadcast_to(np.eye(IN), inner.shape), atol=1e-4)


def test_an_even_metric_changes_nothing():
    plain, even = top_eigh(TENSOR, DIRECTIONS, 4), top_eigh(TENSOR, DIRECTIONS, 4, metric=np.eye(IN))
    np.testing.assert_allclose(even.values, plain.values, rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(even.vectors * plain.vectors, axis=-1)), 1, atol=1e-4)
    np.testing.assert_allclose(even.explained, plain.explained, rtol=1e-4)
    np.testing.assert_array_equal(plain.patterns, plain.vectors)


def test_shrinking_ends_at_the_even_metric_of_the_same_trace():
    plain, shrunk = (
        top_eigh(TENSOR, DIRECTIONS, 4),
        top_eigh(TENSOR, DIRECTIONS, 4, metric=Metric.of(MOMENT, shrink=1.0)),
    )
    np.testing.assert_allclose(shrunk.values, plain.values * np.trace(MOMENT) / IN, rtol=1e-4)


def test_fewer_squares_explain_more_of_gaussian_data():
    x = jnp.asarray(RNG.multivariate_normal(np.zeros(IN), MOMENT, size=20_000), jnp.float32)
    wanted = np.asarray(TENSOR.apply(x) @ DIRECTIONS.T)
    missed = {}
    for name, metric in {"data": MOMENT, "weight": None}.items():
        top = top_eigh(TENSOR, DIRECTIONS, 3, metric=metric)
        squares = jnp.einsum("uki,ni->unk", top.vectors, x) ** 2
        made = np.asarray(jnp.einsum("unk,uk->nu", squares, top.values))
        missed[name] = np.var(wanted - made, axis=0) / np.var(wanted, axis=0)
        if name == "data":
            np.testing.assert_allclose(1 - missed[name], top.explained, atol=0.03)
    assert (missed["data"] < missed["weight"] - 0.01).all()


def test_directions_without_data_are_left_out():
    moment = TURN[:, :5] @ np.diag([5.0, 4, 3, 2, 1]) @ TURN[:, :5].T
    metric = Metric.of(moment)
    assert metric.root.shape == (IN, 5) and float(metric.kept) == pytest.approx(1)
    x = (RNG.normal(size=(30, 5)) @ TURN[:, :5].T).astype(np.float32)
    top = top_eigh(TENSOR, DIRECTIONS, 5, metric=metric)
    made = np.einsum("unk,uk->un", np.einsum("uki,ni->unk", top.vectors, x) ** 2, top.values)
    np.testing.assert_allclose(made, DIRECTIONS @ TENSOR.apply(jnp.asarray(x)).T, rtol=1e-3, atol=1e-3)
    assert float(Metric.of(moment, rank=2).kept) == pytest.approx(9 / 15)


def test_with_a_basis_the_metric_is_that_of_its_coordinates():
    basis = jnp.asarray(RNG.normal(size=(IN, 30)), jnp.float32)
    codes = RNG.normal(size=(200, 30)) * np.geomspace(3, 0.3, 30)
    moment = codes.T @ codes / len(codes)
    top = top_eigh(TENSOR, DIRECTIONS, IN, basis=basis, metric=moment)
    made = np.einsum("unk,uk->un", np.einsum("uki,ni->unk", top.vectors, codes) ** 2, top.values)
    wanted = DIRECTIONS @ TENSOR.apply(jnp.asarray(codes, jnp.float32) @ basis.T).T
    np.testing.assert_allclose(made, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("moment", "options", "message"),
    [
        (np.ones((2, 3)), {}, "a matrix of real numbers"),
        (np.ones((2, 2), int), {}, "a matrix of real numbers"),
        (np.full((2, 2), np.nan), {}, "not finite"),
        (np.zeros((2, 2)), {}, "is 0"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), {}, "not symmetric"),
        (np.diag([1.0, -0.5]), {}, "negative eigenvalue"),
        (np.eye(2), {"rank": 3}, "between 1 and 2"),
        (np.eye(2), {"shrink": 1.5}, "between 0"),
    ],
)
def test_what_is_no_second_moment_is_refused(moment, options, message):
    with pytest.raises(ValueError, match=message):
        Metric.of(moment, **options)


def test_a_metric_of_another_width_is_refused():
    with pytest.raises(ValueError, match="of 3 coordinates, but it must be of 12"):
        top_eigh(TENSOR, DIRECTIONS, 1, metric=np.eye(3))


def test_a_metric_is_a_pytree_and_a_spectrum_in_it_can_be_compiled():
    metric = Metric.of(MOMENT)
    found = jax.jit(lambda metric: top_eigh(TENSOR, DIRECTIONS, 2, metric=metric).values)(metric)
    np.testing.assert_allclose(found, top_eigh(TENSOR, DIRECTIONS, 2, metric=metric).values, rtol=1e-5)
