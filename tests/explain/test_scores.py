"""The scores of predictions against definitions written out, and what a prediction that knows nothing gets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilinear_jax.explain.lookups import lookups, token_means
from bilinear_jax.explain.samples import Samples
from bilinear_jax.explain.scores import average_precision, score

RNG = np.random.default_rng(0)


def by_definition(scores, fired):
    """Average precision from every threshold, one after another."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        called = scores >= threshold
        recall, precision = np.sum(called & fired) / np.sum(fired), np.sum(called & fired) / np.sum(called)
        total, before = total + (recall - before) * precision, recall
    return total


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_average_precision_with_ties(pairs):
    scores, fired = np.array([one for one, _ in pairs], float), np.array([hit for _, hit in pairs])
    found = average_precision(scores, fired)
    if fired.any():
        assert found == pytest.approx(by_definition(scores, fired))
    else:
        assert np.isnan(found)


def random_case():
    """Pre-activations, predictions and firing, at choosing and at scoring tokens."""
    z, held = 1 + RNG.normal(size=(2, 3, 200))
    noise = RNG.normal(size=(2, 3, 2, 200)) - 1
    return z, held, z[:, None] + noise[0], held[:, None] + noise[1], z > 1.5, held > 1.5


EACH = [(u, n) for u in range(3) for n in range(2)]


def test_r2_after_a_constant_of_the_choosing_tokens():
    z, held, chosen, predicted, fired, held_fired = random_case()
    found = score(chosen, z, fired, predicted, held, held_fired)
    for u, n in EACH:
        guess = predicted[u, n] + (z[u] - chosen[u, n]).mean()
        for name, where in {"r2": slice(None), "r2_active": held_fired[u]}.items():
            its, missed = held[u][where], (held[u] - guess)[where]
            wanted = 1 - np.sum(missed**2) / np.sum((its - its.mean()) ** 2)
            assert getattr(found, name)[u, n] == pytest.approx(wanted)


def test_nothing_but_a_constant_may_differ():
    z, held, chosen, predicted, fired, held_fired = random_case()
    plain = score(chosen, z, fired, predicted, held, held_fired)
    moved = score(chosen + 7, z, fired, predicted + 7, held, held_fired)
    np.testing.assert_allclose(moved.r2, plain.r2)
    np.testing.assert_allclose(moved.precision, plain.precision)


def test_the_threshold_is_the_choosing_tokens():
    z, held, chosen, predicted, fired, held_fired = random_case()
    found = score(chosen, z, fired, predicted, held, held_fired)
    for u, n in EACH:
        called = predicted[u, n] >= np.sort(chosen[u, n])[-fired[u].sum()]
        right = np.sum(called & held_fired[u])
        assert found.precision[u, n] == pytest.approx(right / called.sum())
        assert found.recall[u, n] == pytest.approx(right / held_fired[u].sum())


def test_a_feature_that_never_fires_has_no_score_of_firing():
    z, held, chosen, predicted, _, _ = random_case()
    never = np.zeros_like(z, bool)
    found = score(chosen, z, never, predicted, held, never)
    assert np.isfinite(found.r2).all()
    for values in (found.r2_active, found.average_precision, found.precision, found.recall):
        assert np.isnan(values).all()


def samples(token, previous, z):
    nothing = np.zeros((len(token), 0), np.float32)
    return Samples(nothing, z, nothing, nothing.astype(np.int32), np.asarray(token), np.asarray(previous))


def test_lookups_lean_on_the_coarser_mean():
    z = np.array([[1.0], [3.0], [8.0]])
    choosing = samples([5, 5, 6], [1, 2, 1], z)
    scoring = samples([5, 5, 6, 7], [1, 3, 9, 1], np.zeros((4, 1)))
    found = lookups(choosing, scoring, z)
    mean, five, six = 4.0, (1 + 3 + 4) / 3, (8 + 4) / 2
    np.testing.assert_allclose(found["token"][1][:, 0], [five, five, six, mean])
    np.testing.assert_allclose(found["token"][0][:, 0], [five, five, six])
    np.testing.assert_allclose(found["bigram"][1][:, 0], [(1 + five) / 2, five, six, mean])
    np.testing.assert_allclose(found["bigram"][0][:, 0], [(1 + five) / 2, (3 + five) / 2, (8 + six) / 2])
    np.testing.assert_allclose(token_means(choosing.token, z, 8)[:, 0], [mean] * 5 + [five, six, mean])
