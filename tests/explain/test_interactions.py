"""The largest interactions against the matrix that holds them all, and what the bounds rule out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilinear_jax.explain import interactions
from bilinear_jax.explain.interactions import Interactions, top_interactions
from bilinear_jax.tensor import BilinearTensor


def random_case(number=6, width=5, features=9, hidden=7, seed=0, tail=1.0):
    """A tensor, directions and a basis; a large ``tail`` makes few directions and few features much the largest."""
    rng = np.random.default_rng(seed)
    left, right, down, directions, basis = (
        rng.normal(size=shape)
        for shape in ((hidden, width), (hidden, width), (4, hidden), (number, 4), (width, features))
    )
    directions *= rng.pareto(1, size=(number, 1)) ** np.log(tail) + 0.1
    basis *= rng.pareto(1, size=features) ** np.log(tail) + 0.1
    as_array = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    return BilinearTensor(*map(as_array, (left, right, down))), as_array(directions), as_array(basis)


def all_pairs(tensor, directions, basis):
    """Every (out, i, j, value) with i <= j, the largest |value| first, from float64 matrices."""
    left, right, down, directions, basis = (
        np.asarray(a, np.float64) for a in (tensor.left, tensor.right, tensor.down, directions, basis)
    )
    q = np.einsum("um,mi,mj->uij", directions @ down, left @ basis, right @ basis)
    q = (q + q.swapaxes(1, 2)) / 2
    out, i, j = np.nonzero(np.triu(np.ones_like(q[0]))[None] * np.ones(len(q))[:, None, None])
    order = np.lexsort((j, i, out, -np.abs(q[out, i, j])))
    return out[order], i[order], j[order], q[out, i, j][order]


def check(found: Interactions, case, n):
    """The same pairs as brute force, except where rounding may swap those of almost equal size."""
    out, i, j, value = all_pairs(*case)
    scale = np.abs(value[0])
    np.testing.assert_allclose(np.abs(found.value), np.abs(value[:n]), atol=1e-5 * scale)
    entries = {(o, a, b): v for o, a, b, v in zip(out.tolist(), i.tolist(), j.tolist(), value.tolist(), strict=True)}
    names = list(zip(found.out.tolist(), found.i.tolist(), found.j.tolist(), strict=True))
    assert len(set(names)) == n
    np.testing.assert_allclose(found.value, [entries[name] for name in names], atol=1e-5 * scale)
    magnitudes = np.abs(found.value)
    assert np.all(magnitudes[1:] <= magnitudes[:-1])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    tail=st.sampled_from([1.0, 3.0, 10.0]),
    n=st.sampled_from([1, 50, 270]),
    tile=st.sampled_from([4, 256]),
)
def test_it_equals_brute_force(seed, tail, n, tile):
    case = random_case(seed=seed, tail=tail)
    check(top_interactions(*case, n, tile=tile, batch_size=4), case, n)


def test_wide_and_narrow_bases():
    for features in (1, 2, 40):
        case = random_case(number=1, features=features)
        n = features * (features + 1) // 2
        check(top_interactions(*case, n, tile=16), case, n)


def test_very_small_and_very_large_weights():
    tensor, directions, basis = random_case(number=20, tail=3.0)
    for scale in (1e-9, 1e9):  # the squares of the entries are outside float32
        scaled = BilinearTensor(tensor.left * scale, tensor.right * scale, tensor.down * scale)
        check(top_interactions(scaled, directions, basis, 10, batch_size=4), (scaled, directions, basis), 10)


def planted(number=40, features=30):
    """D^T Q_u D = s_u diag(1 + its row): features that don't interact, and one direction much the largest."""
    strengths = jnp.ones((1, number)).at[0, 17].set(100.0)
    eye = jnp.eye(features)
    weights = 1 + jnp.arange(features, dtype=jnp.float32)
    return BilinearTensor(eye, eye * weights[:, None], jnp.ones((1, features))), strengths.T, eye


def test_bounds_rule_out_directions_and_rows():
    case = planted()
    found = top_interactions(*case, 3, batch_size=2)
    assert found.out.tolist() == [17] * 3 and found.i.tolist() == [29, 28, 27] and found.j.tolist() == [29, 28, 27]
    np.testing.assert_allclose(found.value, [3000, 2900, 2800], rtol=1e-6)
    # The spectral bound is exact here, so no other direction is projected; its diagonal alone gives a threshold that
    # only the three rows reach, and those are 6 of 40 * 465 pairs.
    np.testing.assert_allclose(found.pruned_features, 39 / 40, rtol=1e-6)
    np.testing.assert_allclose(found.pruned_rows, 1 - 3 / (40 * 30), rtol=1e-6)
    np.testing.assert_allclose(found.pruned, 1 - 6 / (40 * 465), rtol=1e-6)


def test_nothing_is_ruled_out_when_everything_is_asked_for():
    case = planted(number=3, features=5)
    found = top_interactions(*case, 45, batch_size=1)
    assert float(found.pruned) == float(found.pruned_rows) == float(found.pruned_features) == 0
    check(found, case, 45)
    assert (np.asarray(found.value) == 0).sum() == 30


@pytest.mark.parametrize("tile", [1, 2, 3, 64])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_of_equal_entries_the_first_is_taken(tile, batch_size):
    # Every entry of every direction is 1 or -1.
    tensor = BilinearTensor(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)))
    basis = jnp.asarray(np.where(np.arange(6) % 2, -1, 1)[None], jnp.float32)
    found = top_interactions(tensor, jnp.ones((4, 1)), basis, 25, tile=tile, batch_size=batch_size)
    i, j = np.triu_indices(6)
    names = [(out, a, b) for out in range(4) for a, b in zip(i.tolist(), j.tolist(), strict=True)][:25]
    assert list(zip(found.out.tolist(), found.i.tolist(), found.j.tolist(), strict=True)) == names
    assert found.value.tolist() == [(-1.0) ** (a + b) for _, a, b in names]


def test_of_equal_entries_in_different_batches_the_first_is_taken():
    # Direction 2 is visited first, for its 5; the ones of all three tie.
    tensor = BilinearTensor(jnp.eye(2), jnp.eye(2), jnp.eye(2))
    directions = jnp.array([[1.0, 0.5], [0.5, 1.0], [1.0, 5.0]])
    found = top_interactions(tensor, directions, jnp.eye(2), 3, batch_size=1)
    names = zip(found.out.tolist(), found.i.tolist(), found.j.tolist(), strict=True)
    assert list(names) == [(2, 1, 1), (0, 0, 0), (1, 1, 1)]


@pytest.mark.parametrize(("shape", "axes"), [((8,), ("d",)), ((4, 2), ("a", "b")), ((3,), ("d",))])
def test_a_mesh_gives_the_same(shape, axes):
    case = random_case(number=37, features=30, tail=3.0)
    expected = top_interactions(*case, 40)
    mesh = jax.make_mesh(shape, axes, devices=jax.devices()[: np.prod(shape)])
    found = top_interactions(*case, 40, batch_size=2, mesh=mesh)
    for field in ("out", "i", "j", "value"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    assert 0 < float(found.pruned) < 1


def test_a_mesh_shares_the_work(monkeypatch):
    case = random_case(number=16)
    mesh = jax.make_mesh((8,), ("d",))
    texts, search = [], interactions._search

    def lowered(*args, **kwargs):
        texts.append(search.lower(*args, **kwargs).compile().as_text())
        return search(*args, **kwargs)

    monkeypatch.setattr(interactions, "_search", lowered)
    top_interactions(*case, 3, batch_size=2, mesh=mesh)
    (text,) = texts
    assert "num_partitions=8" in text and "s32[2]" in text and "s32[16]" not in text  # two directions a device
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all"))


@pytest.mark.parametrize("given", ["no convergence", "a residual"])
def test_an_uncertain_eigenvalue_rules_nothing_out(monkeypatch, given):
    def uncertain(tensor, directions, **options):  # of direction 17, which has the largest entries, it says 0
        spectrum, at = exact(tensor, directions, **options), jnp.arange(len(directions)) == 17
        doubts = {
            "no convergence": {"converged": ~at},
            "a residual": {"residuals": jnp.where(at[:, None], spectrum.values, 0)},
        }
        return dataclasses.replace(spectrum, values=jnp.where(at[:, None], 0, spectrum.values), **doubts[given])

    exact = interactions.top_eigh
    monkeypatch.setattr(interactions, "top_eigh", uncertain)
    assert top_interactions(*planted(), 3, batch_size=2).out.tolist() == [17] * 3


def test_a_batch_is_compiled_once():
    tensor, directions, basis = random_case(number=11, width=6, seed=3)
    before = interactions._search._cache_size()
    for count in (11, 1, 7, 11):
        top_interactions(tensor, directions[:count], basis, 2, batch_size=4)
    # The number of directions is a shape of the arguments, so each of the three has its own; none has two.
    assert interactions._search._cache_size() - before == 3


def test_precision_is_the_highest_whatever_the_default():
    tensor, directions, basis = random_case()
    with jax.default_matmul_precision("bfloat16"):
        text = interactions._search.lower(
            tensor, basis.T, directions, np.zeros(8, np.int32), np.ones(8, np.float32), np.float32(0), n=3, tile=4,
            mesh=None,
        ).as_text()  # fmt: skip
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n is 0, but it must be between 1 and 270, the pairs i <= j of 9 features for 6 directions"),
        ({"n": 271}, "n is 271, but it must be between 1 and 270"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"tile": 0}, "tile must be at least 1"),
        ({"directions": jnp.ones((2, 5))}, r"directions have shape \(2, 5\), but they must be rows \[U, 4\]"),
        ({"directions": jnp.ones((0, 4))}, "but it must be between 1 and 0"),
        ({"directions": jnp.full((2, 4), jnp.nan)}, "directions holds NaN"),
        ({"basis": jnp.ones((6, 9))}, r"the basis has shape \(6, 9\), but it must be \[5, features\]"),
        ({"basis": jnp.full((5, 9), jnp.inf)}, "basis holds NaN or infinite"),
    ],
)
def test_what_can_not_be_answered(change, message):
    tensor, directions, basis = random_case()
    arguments = {"tensor": tensor, "directions": directions, "basis": basis, "n": 5} | change
    with pytest.raises(ValueError, match=message):
        top_interactions(**arguments)


def test_broken_factors_and_overflow():
    tensor, directions, basis = random_case()
    with pytest.raises(ValueError, match="right holds NaN"):
        top_interactions(dataclasses.replace(tensor, right=tensor.right.at[2, 3].set(jnp.nan)), directions, basis, 5)
    with pytest.raises(FloatingPointError, match="too large for float32: scale the tensor down"):
        top_interactions(dataclasses.replace(tensor, down=tensor.down * 1e38), directions * 1e5, basis, 5)
