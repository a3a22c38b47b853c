"""The sparse products against loops and dense autodiff, in every form, and what they keep in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilinear_jax.nn import sparse
from bilinear_jax.nn.activations import largest
from bilinear_jax.nn.sparse import FORMS, combine, decode_at, dots, fastest_form, linear_at, scatter_outer

FEATURES, D_MODEL, K = 12, 5, 3
every_form = pytest.mark.parametrize("form", FORMS)


def example(*leading: int):
    """Values, indices (all k of a token differ, tokens share some), rows, and a vector for each token."""
    keys = jax.random.split(jax.random.key(len(leading)), 4)
    scores = jax.random.normal(keys[0], (*leading, FEATURES))
    indices = jax.lax.top_k(scores, K)[1]
    values = jax.random.normal(keys[1], (*leading, K))
    return (
        values,
        indices,
        jax.random.normal(keys[2], (FEATURES, D_MODEL)),
        jax.random.normal(keys[3], (*leading, D_MODEL)),
    )


def same(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


@every_form
@pytest.mark.parametrize("tokens", [0, 1, 7, 130])
def test_kernels_are_the_loops_that_they_stand_for(form, tokens):
    """130 tokens and k = 3 are multiples of neither the block of tokens nor the unrolled passes of "scan"."""
    values, indices, rows, x = (np.asarray(part) for part in example(tokens))
    combined, scattered = np.zeros((tokens, D_MODEL), np.float32), np.zeros((FEATURES, D_MODEL), np.float32)
    products = np.zeros((tokens, K), np.float32)
    for t in range(tokens):
        for j, feature in enumerate(indices[t]):
            combined[t] += values[t, j] * rows[feature]
            products[t, j] = rows[feature] @ x[t]
            scattered[feature] += values[t, j] * x[t]
    values, indices, rows, x = (jnp.asarray(part) for part in (values, indices, rows, x))
    same(combine(values, indices, rows, form), combined)
    same(dots(indices, rows, x, form), products)
    same(scatter_outer(values, indices, x, FEATURES, form), scattered)


@pytest.mark.parametrize("kind", ["noise", "ties", "one run", "minus infinity"])
def test_the_largest_are_those_of_top_k_ties_and_all(kind):
    """Ties within a run, between runs, and at the edge of the k; all of the k in one run of 32; fewer than k finite."""
    y = jax.random.normal(jax.random.key(0), (2, 50, 1024))
    if kind == "ties":
        y = jnp.round(2 * y)
    elif kind == "one run":
        y = y.at[..., 96:128].add(10)
    elif kind == "minus infinity":
        y = jnp.where(jax.random.uniform(jax.random.key(1), y.shape) < 0.004, y, -jnp.inf)
    for k in (1, 5, 8):
        np.testing.assert_array_equal(largest(y, k), jax.lax.top_k(y, k)[1])
    np.testing.assert_array_equal(largest(y[..., :100], 3), jax.lax.top_k(y[..., :100], 3)[1])


ODD = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 3e38, -3e38, 1e-30]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1024, 1000, 64]), st.sampled_from([1, 3, 8]), st.floats(0, 1))
def test_the_largest_are_those_of_a_sort_and_nan_is_the_smallest(seed, features, k, share):
    """A NaN never takes the place of another entry, whatever its sign bit. Without NaN they are those of top_k."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(4, features)).astype(np.float32).round(1)
    y = np.where(rng.random(y.shape) < share**4, rng.choice(np.array(ODD, np.float32), y.shape), y)
    lowest = np.where(np.isnan(y), -np.inf, y)
    order = np.lexsort((np.broadcast_to(np.arange(features), y.shape), np.signbit(lowest), -lowest), axis=-1)
    np.testing.assert_array_equal(largest(jnp.asarray(y), k), order[:, :k])
    if not np.isnan(y).any():
        np.testing.assert_array_equal(order[:, :k], jax.lax.top_k(jnp.asarray(y), k)[1])


def dense_decode(values, indices, rows):
    return jnp.sum(jax.nn.one_hot(indices, FEATURES) * values[..., None], axis=-2) @ rows


def dense_linear(x, rows, bias, indices):
    y = x @ rows.T
    return jnp.take_along_axis(y + jnp.broadcast_to(bias, y.shape), indices, axis=-1)


@every_form
@pytest.mark.parametrize("leading", [(), (7,), (2, 3)])
def test_derivatives_of_decoding_are_those_of_dense_codes(form, leading):
    values, indices, rows, x = example(*leading)

    def loss(decode):
        return lambda values, rows: jnp.sum((decode(values, indices, rows) - x) ** 3)

    ours = jax.jit(jax.value_and_grad(loss(lambda v, i, r: decode_at(v, i, r, form)), argnums=(0, 1)))
    same(ours(values, rows), jax.value_and_grad(loss(dense_decode), argnums=(0, 1))(values, rows))


@every_form
@pytest.mark.parametrize("leading", [(), (7,), (2, 3)])
def test_derivatives_of_encoding_are_those_of_dense_preactivations(form, leading):
    values, indices, rows, x = example(*leading)
    bias = jnp.arange(FEATURES, dtype=jnp.float32)

    def ours(x, rows, bias):
        y = x @ rows.T
        return jnp.sum(values * linear_at(x, rows, y + jnp.broadcast_to(bias, y.shape), indices, bias, form) ** 2)

    def dense(x, rows, bias):
        return jnp.sum(values * dense_linear(x, rows, bias, indices) ** 2)

    pair = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(x, rows, bias) for f in (ours, dense))
    same(*pair)


@every_form
def test_a_stack_under_vmap_is_one_after_another(form):
    values, indices, _, x = example(4, 6)
    rows = jax.random.normal(jax.random.key(9), (4, FEATURES, D_MODEL))

    def loss(values, indices, rows, x):
        decoded = decode_at(values, indices, rows, form)
        return jnp.sum(linear_at(x, rows, x @ rows.T, indices, form=form) ** 2) + jnp.sum(decoded**2 * x)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 2, 3)))
    one_by_one = [gradient(*(part[i] for part in (values, indices, rows, x))) for i in range(4)]
    same(
        jax.jit(jax.vmap(gradient))(values, indices, rows, x),
        jax.tree.map(lambda *parts: jnp.stack(parts), *one_by_one),
    )


def test_second_derivatives():
    """Of the size of a gradient, as a penalty on it would take them."""
    values, indices, rows, x = example(7)

    def size_of_gradient(decode):
        gradient = jax.grad(lambda values, rows: jnp.sum((decode(values, indices, rows) - x) ** 2), argnums=(0, 1))
        return lambda *args: sum(jnp.sum(part**2) for part in gradient(*args))

    ours, dense = (jax.grad(size_of_gradient(f), argnums=(0, 1)) for f in (decode_at, dense_decode))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), ours(values, rows), dense(values, rows)
    )


def test_rows_follow_the_dtype_of_the_tokens():
    values, indices, rows, x = example(7)
    assert decode_at(values.astype(jnp.bfloat16), indices, rows).dtype == jnp.bfloat16
    low = x.astype(jnp.bfloat16)
    gradient = jax.grad(lambda rows: jnp.sum(linear_at(low, rows, low @ rows.T.astype(low.dtype), indices)))(rows)
    assert gradient.dtype == jnp.float32


def test_scans_keep_neither_dense_codes_nor_all_active_rows():
    """A second [tokens, features] would take 8 MB, [tokens, k, d_model] 2.6 MB; [tokens, k] takes 0.16 MB."""
    tokens, features, d_model, k = 1024, 2000, 16, 40
    values, indices = jnp.ones((tokens, k)), jnp.zeros((tokens, k), jnp.int32)
    rows, x, y = jnp.ones((features, d_model)), jnp.ones((tokens, d_model)), jnp.ones((tokens, features))

    def temporary_bytes(form):
        def loss(values, rows, x, y):
            encoded = linear_at(x, rows, y, indices, form=form)
            return jnp.sum(encoded**2) + jnp.sum(decode_at(values * encoded, indices, rows, form) ** 2)

        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return step.lower(values, rows, x, y).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("scan") < 2e6
    assert temporary_bytes("dense") > 8e6  # so the number does tell


def test_an_unknown_form_is_named():
    values, indices, rows, _ = example(2)
    with pytest.raises(
        ValueError, match="unknown form 'fast' of the sparse products; choose one of scan, gather, dense"
    ):
        decode_at(values, indices, rows, "fast")


def test_the_fastest_form_is_the_one_measured_so(monkeypatch):
    monkeypatch.setattr(sparse, "_seconds", lambda step, *args: next(seconds))
    seconds = iter([3.0, 3.0, 3.0, 5.0, 1.0, 5.0, 2.0, 2.0, 2.0])  # least: scan 3, gather 1, dense 2
    assert fastest_form(8, K, FEATURES, D_MODEL) == "gather"


def test_a_form_that_does_not_fit_in_memory_is_left_out(monkeypatch):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(sparse, "_written_out", full)
    assert fastest_form(8, K, FEATURES, D_MODEL) in ("scan", "gather")
    monkeypatch.setattr(sparse, "combine", full)
    with pytest.raises(MemoryError, match="lower batch_size"):
        fastest_form(8, K, FEATURES, D_MODEL)
