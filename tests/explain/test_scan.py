"""The scan: planted answers, a leak, chance, what a batch must not change, and a real layer beside its control."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import bilinear_jax as bj
from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain import scan as module
from bilinear_jax.explain.negation import EXAMPLES, LEAST, Seen, chance, scanned
from bilinear_jax.explain.parts import firing_metrics
from bilinear_jax.explain.scan import RANKINGS, SCORES, Scan
from bilinear_jax.explain.scores import average_precision, largest
from bilinear_jax.linalg.metric import Metric
from bilinear_jax.tensor import BilinearTensor

D, RANDOM, TOKENS, FIRINGS = 6, 10, 3000, 150
RNG = np.random.default_rng(0)
X = [RNG.normal(size=(TOKENS, D)).astype(np.float32) * np.array([1, 2, 1, 0.5, 1, 1], np.float32) for _ in range(2)]
TENSOR = BilinearTensor(
    jnp.asarray(np.vstack([[[1, 0.8, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], RNG.normal(size=(30, D))]), jnp.float32),
    jnp.asarray(np.vstack([[[1, -0.8, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], RNG.normal(size=(30, D))]), jnp.float32),
    jnp.eye(32),
)
NEGATION, SQUARE = 0, 1
"""x_0^2 - (.8 x_1)^2 and x_0^2. The other outputs are random forms."""

ROWS = np.vstack([np.eye(2, 32), np.hstack([np.zeros((RANDOM, 2)), RNG.normal(size=(RANDOM, 30)) / 6])])
METRIC = Metric.of((X[0].T @ X[0] / TOKENS).astype(np.float64))


def seen(firings=FIRINGS, shuffle=None):
    """Both halves: every output fires at its largest values, or at as many tokens that have nothing to do with them."""
    found = []
    for x in X:
        z = (ROWS @ np.asarray(TENSOR.apply(jnp.asarray(x))).T).astype(np.float32)
        fired = largest(z, np.full(len(ROWS), firings))
        found.append(Seen(x, z, fired if shuffle is None else shuffle.permuted(fired, axis=1)))
    return found


def a_scan(both, control=None, metric=METRIC):
    found = scanned(TENSOR, jnp.asarray(ROWS, jnp.float32), metric, *both)
    found |= {name: np.stack([found[name]] * 2, axis=-1) for name in ("fires", "silent")}
    return Scan(**found, features=np.arange(len(ROWS)), tokens=(TOKENS, TOKENS), control=control)


@pytest.mark.parametrize("by", ["data", "firing"])
def test_a_planted_negation_is_first_and_a_planted_square_is_none(by):
    both = seen()
    moment = X[0].T.astype(np.float64) @ X[0] / TOKENS
    found = a_scan(both, metric=METRIC if by == "data" else firing_metrics(X[0], both[0].fired, moment))
    assert found.gain[NEGATION] > 0.2 and found.vetoed[NEGATION] > 0.2
    assert found.best(1, by="negation") == [NEGATION]
    assert set(found.best(2)) == {NEGATION, SQUARE}
    np.testing.assert_allclose(found.average_precision_two[[NEGATION, SQUARE]], 1, atol=1e-3)
    np.testing.assert_allclose(found.r2_active_two[[NEGATION, SQUARE]], 1, atol=2e-2)
    assert abs(found.gain[SQUARE]) < 1e-3 and found.average_precision_one[SQUARE] > 0.999
    assert found.average_precision_one[NEGATION] < 0.8


def test_the_numbers_are_those_of_the_formulas():
    both = seen()
    found = a_scan(both)
    d, s = X[1][:, 0] ** 2, 0.64 * X[1][:, 1] ** 2  # up to the metric, which mixes the axes a little
    threshold = np.sort(X[0][:, 0] ** 2)[-FIRINGS]
    driven, fired = d >= threshold, both[1].fired[NEGATION]
    assert found.driven[NEGATION] == pytest.approx(driven.sum(), abs=5)
    gain = average_precision(d - s, fired) - average_precision(d, fired)
    assert found.gain[NEGATION] == pytest.approx(gain, abs=0.02)
    expected = average_precision(s[driven], ~fired[driven]) - chance(driven.sum()[None], np.sum(~fired[driven])[None])
    assert found.vetoed[NEGATION] == pytest.approx(expected[0], abs=0.02)
    for place in found.fires[NEGATION, :, 0]:
        assert fired[place] and d[place] > 0.9 * threshold and s[place] < 0.05
    for place in found.silent[NEGATION, :, 0]:
        assert not fired[place] and d[place] > 0.9 * threshold and s[place] > np.quantile(s[driven], 0.9)


def test_firing_that_has_nothing_to_do_with_the_tokens_scores_nothing():
    found = [a_scan(seen(shuffle=np.random.default_rng(seed))) for seed in range(3)]
    gain, vetoed = (np.stack([getattr(one, name) for one in found]) for name in ("gain", "vetoed"))
    assert np.abs(gain).max() < 0.03 and np.abs(gain.mean()) < 5e-3
    assert np.abs(vetoed).max() < 0.08 and np.abs(vetoed.mean()) < 0.02


def test_chance_is_the_mean_over_orders():
    rng = np.random.default_rng(1)
    for n, m in [(1, 1), (4, 1), (7, 3), (5, 5)]:
        orders = rng.permuted(np.tile(np.arange(n) < m, (4000, 1)), axis=1)
        drawn = average_precision(np.broadcast_to(-np.arange(n, dtype=float), orders.shape), orders)
        assert chance(np.array([n]), np.array([m]))[0] == pytest.approx(drawn.mean(), abs=0.02)
    assert np.isnan(chance(np.array([0, 3]), np.array([0, 0]))).all()


def test_features_that_fire_seldom_are_left_out():
    found = a_scan(seen(firings=LEAST - 1))
    assert all(np.isnan(getattr(found, name)).all() for name in SCORES)
    assert found.best() == [] and found.rows() == [] and len(found.table().splitlines()) == 2
    assert not np.isnan(a_scan(seen(firings=LEAST)).average_precision_two).any()


def test_a_form_without_a_positive_part_is_never_driven():
    both = [one._replace(z=-one.z[1:2], fired=largest(-one.z[1:2], np.array([FIRINGS]))) for one in seen()]
    found = scanned(TENSOR, -jnp.asarray(ROWS[1:2], jnp.float32), METRIC, *both)
    assert found["average_precision_two"][0] == pytest.approx(1, abs=1e-3)
    assert found["driven"].tolist() == [0] and np.isnan(found["vetoed"][0]) and (found["silent"] == -1).all()
    assert found["silent"].shape == (1, EXAMPLES) and found["gain"][0] > 0.5  # d is 0 everywhere


def test_a_table_has_the_control_at_the_same_rank():
    control = a_scan(seen(shuffle=np.random.default_rng(0)))
    found = a_scan(seen(), control=control)
    table = found.table(3, by="negation", names={place: f"name {place}" for place in range(len(ROWS))}).splitlines()
    assert table[0].startswith("| rank | feature | name | fires at | negation | control |") and len(table) == 5
    ranked = -np.sort(-control.negation)
    for rank, row in enumerate(found.rows(3, "negation")):
        assert row["control"] == ranked[rank] and row["value"] == -np.sort(-found.negation)[rank]
        assert f"name {row['feature']}" in table[2 + rank]
    for by in (*RANKINGS, *SCORES):
        assert len(found.best(4, by)) == 4
    with pytest.raises(UnknownNameError, match="explained, negation"):
        found.best(by="size")
    with pytest.raises(ValueError, match="n must be at least 1"):
        found.table(0)


@pytest.fixture(scope="module")
def tracer():
    return bj.Tracer(bj.load("ts-nano"), layer=2)


def test_a_real_layer(tracer, monkeypatch):
    tokens, features = bj.load_corpus("ts-nano")[:12], [963, 928, 108, 3]
    found = bj.scan(tracer, tokens[6:], tokens[:6], features=features)
    halved = bj.scan(tracer, tokens, features=features)
    monkeypatch.setattr(module, "BYTES", 3 * 32 * found.tokens[1])  # three features at once
    again = bj.scan(tracer, tokens[6:], tokens[:6], features=features, batch_size=4)
    for one, other in ((found, halved), (found, again)):
        for a, b in ((one, other), (one.control, other.control)):
            for field in dataclasses.fields(Scan)[:-1]:
                np.testing.assert_allclose(getattr(a, field.name), getattr(b, field.name), rtol=1e-3, atol=1e-3)
    expected = tracer.explained(tokens, features=features, parts=(1, 2), by="firing")
    scored = ~np.isnan(found.gain)
    assert scored.sum() >= 2
    control = found.control
    assert control is not None
    for own, other in ((found, expected), (control, expected.controls["random directions"])):
        both = np.stack([own.average_precision_one, own.average_precision_two], axis=1)
        np.testing.assert_allclose(both[scored], other.average_precision[scored], atol=1e-3)
    np.testing.assert_array_equal(found.firings, expected.firings)
    site = ("mlp_out", 2)
    codes = np.asarray(tracer.out.encode(tracer.lm.capture(jnp.asarray(tokens[6:], jnp.int32), [site])[site]))
    for feature, fires, silent in zip(features, found.fires, found.silent, strict=True):
        assert all(codes[row, position, feature] != 0 for row, position in fires if row >= 0)
        assert all(codes[row, position, feature] == 0 for row, position in silent if row >= 0)
    assert (found.fires[0] >= 0).all() and (found.silent[0] >= 0).all()


def test_bad_requests_are_named(tracer):
    tokens = bj.load_corpus("ts-nano")[:2]
    with pytest.raises(ValueError, match="one row, but it takes two"):
        bj.scan(tracer, tokens[:1])
    with pytest.raises(UnknownNameError, match="1024"):
        bj.scan(tracer, tokens, features=[1024])
    with pytest.raises(ValueError, match="name at least one"):
        bj.scan(tracer, tokens, features=[])
    with pytest.raises(ValueError, match="plain directions"):
        bj.scan(bj.Tracer(tracer.lm, layer=2, out=np.eye(256, dtype=np.float32)[:3]), tokens)
