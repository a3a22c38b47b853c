"""Explanations by pairs of input features: whole sums, planted pairs, leaks, and the selection against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_explained import TOKENS, TRACER, D, tracer_of

from bilinear_jax.explain import explained as module
from bilinear_jax.explain.feature_pairs import PairChooser, forward
from bilinear_jax.explain.parts import PAIRS, partial_sums
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import SAEConfig
from bilinear_jax.tensor import BilinearTensor


def exact_inputs() -> SAE:
    """An SAE whose codes are all coordinates of x, so nothing is left out by its bias and error."""
    sae = SAE.init(SAEConfig("mlp_in", 1, D, 1, D), jax.random.key(0))
    return SAE({"w_enc": jnp.eye(D), "w_dec": jnp.eye(D), "b_dec": jnp.zeros(D)}, sae.config)


@pytest.mark.parametrize("by", PAIRS)
def test_more_pairs_explain_more_and_all_are_the_pre_activation(by, monkeypatch):
    tracer = Tracer(TRACER.lm, 1, exact_inputs(), TRACER.out)
    monkeypatch.setattr(module, "checked_numbers", lambda name, numbers, inputs: tuple(numbers))
    pairs = D * (D + 1) // 2
    others = (TOKENS * 7 + 3) % 40
    found = tracer.explained(others[:8], TOKENS, features=range(4), parts=(4, 40, pairs), by=by)
    np.testing.assert_allclose(found.r2[:, 2], 1, atol=1e-3)
    assert (np.median(found.r2, axis=0)[1:] > np.median(found.r2, axis=0)[:-1]).all()
    assert found.inputs_read.max() <= D and (found.inputs_read[:, 0] <= 8).all()
    assert found.firings_left is None and set(found.controls) == {"random pairs", "random directions"}


def test_a_biased_layer_has_the_constant_as_an_input():
    tracer = tracer_of(TRACER.lm.config.__class__(**{**vars(TRACER.lm.config), "bias": True}))
    assert tracer.explained(TOKENS, features=[0, 1], parts=(3,), by="pairs by data").r2.shape == (2, 1)


@pytest.mark.parametrize("by", PAIRS)
def test_what_is_scored_was_not_seen_in_choosing(by, monkeypatch):
    gather = module.gather

    def shuffled(*args):
        found = gather(*args)
        return found._replace(y=np.random.default_rng(len(found.y)).normal(size=found.y.shape).astype(np.float32))

    monkeypatch.setattr(module, "gather", shuffled)
    found = TRACER.explained(TOKENS, parts=(1, 4), by=by)
    for scores in (found, found.controls["random pairs"]):
        assert np.median(scores.r2) < 0


@pytest.mark.parametrize("by", ["pairs by data", "pairs greedy"])
def test_planted_pairs_are_found_first(by):
    """z = 3 f_0 f_1 - 2 f_2 f_3 + f_4^2; the weight of f_5 f_6 is largest, but they hardly ever are."""
    random = np.random.default_rng(0)
    codes = random.exponential(size=(500, 8)).astype(np.float32)
    codes[:, 5:7] *= 1e-3
    left, right = np.zeros((4, 8), np.float32), np.zeros((4, 8), np.float32)
    for row, (i, j) in enumerate([(0, 1), (2, 3), (4, 4), (5, 6)]):
        left[row, i], right[row, j] = 1, 1
    tensor = BilinearTensor(jnp.asarray(left), jnp.asarray(right), jnp.asarray([[3.0, -2.0, 1.0, 50.0]]))
    z = np.asarray(tensor.apply(jnp.asarray(codes)))
    chooser = PairChooser(tensor, codes, by, (2, 3), 0)
    found = chooser.choose(jnp.ones((1, 1)), z)
    pairs = [{int(i), int(j)} for i, j in zip(found.i[0], found.j[0], strict=True)]
    assert sorted(map(sorted, pairs)) == [[0, 1], [2, 3], [4]]
    predicted = np.asarray(partial_sums(jnp.asarray(codes), found, (2, 3)))[0, 1]
    missed = (z[:, 0] - predicted) - np.mean(z[:, 0] - predicted)
    assert np.sum(missed**2) < 1e-3 * np.sum((z - z.mean()) ** 2)
    by_weight = PairChooser(tensor, codes, "pairs by weight", (1,), 0).choose(jnp.ones((1, 1)), z)
    assert (int(by_weight.i[0, 0]), int(by_weight.j[0, 0])) == (5, 6)


def test_forward_selection_takes_what_leaves_least():
    """Against least squares of every candidate at every step."""
    random = np.random.default_rng(1)
    columns = random.normal(size=(60, 9)) @ random.normal(size=(9, 9))
    columns[:, 4] = columns[:, 2] - columns[:, 3]  # adds nothing once these two are there
    z = random.normal(size=60) + 2 * columns[:, 7]
    order = forward(columns.T @ columns, columns.T @ z, 9)
    assert len(order) == 8  # the ninth adds nothing new
    for n, taken in itertools.pairwise(range(len(order))):

        def left(some):
            return np.linalg.lstsq(columns[:, some], z, rcond=None)[1].sum()

        options = {c: left([*order[:taken], c]) for c in range(9) if c not in order[: n + 1]}
        best = min(options.values())
        assert options[int(order[taken])] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("by", PAIRS)
def test_a_layer_replaced_by_pairs_of_all_features_is_scored(by):
    found = TRACER.explained(TOKENS, features=[0], parts=(1, 8), by=by, loss=True).layer
    assert np.isfinite(found.losses).all() and found.losses[0] != found.losses[1]


def test_pairs_need_an_sae_of_mlp_in():
    with pytest.raises(ValueError, match="SAE of mlp_in"):
        tracer_of(site="resid_mid").explained(TOKENS, by="pairs greedy", parts=(1,))
    with pytest.raises(ValueError, match="fire together"):
        one = SAE.init(SAEConfig("mlp_in", 1, D, 1, 1), jax.random.key(0))
        Tracer(TRACER.lm, 1, one, TRACER.out).explained(TOKENS[:2], features=[0], by="pairs by data", parts=(16,))
