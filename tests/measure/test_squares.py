"""Squares ablated and steered: the identity on random models, a planted feature, the control, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilinear_jax as bj
from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure import squares as module
from bilinear_jax.nn.architecture import TransformerConfig
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import SAEConfig

D, FEATURES = 16, 24
CONFIG = TransformerConfig(n_layer=2, n_head=2, d_model=D, d_hidden=32, n_ctx=12, n_vocab=40)
TOKENS = np.asarray(jax.random.randint(jax.random.key(3), (24, 12), 1, 40))


def tracer_of(config=CONFIG, **options):
    lm = LanguageModel.init(config, jax.random.key(0))
    inp = SAE.init(SAEConfig("mlp_in", 1, D, 2, 4), jax.random.key(1))
    out = SAE.init(SAEConfig("mlp_out", 1, D, FEATURES / D, 5, encoder_bias=True), jax.random.key(2))
    return Tracer(lm, 1, inp, out, **options)


TRACER = tracer_of()


@pytest.mark.parametrize("n", [1, 3])
def test_the_pre_activation_changes_as_the_explanation_says(n):
    found = bj.intervene_on_squares(TRACER, TOKENS, features=range(FEATURES), n=n)
    acted = found.tokens > 2
    assert acted.sum() > 5
    for done in (found.ablated, found.steered):
        np.testing.assert_allclose(done.change[acted], done.predicted[acted], rtol=1e-3, atol=1e-4)
        assert np.abs(done.change[acted]).min() > 0
    for done in (found.ablated_random, found.steered_random):
        assert np.isnan(done.predicted).all() and not np.isnan(done.change[acted]).any()
    quiet = found.tokens == 0
    assert np.isnan(found.ablated.fires[quiet]).all()
    assert ((found.ablated.fires[acted] >= 0) & (found.ablated.fires[acted] <= 1)).all()


def test_without_any_square_the_pre_activation_is_its_constant():
    """All squares away: nothing goes into the MLP, so nothing comes out of it."""
    found = bj.intervene_on_squares(TRACER, TOKENS, features=[0, 5, 7], n=D)
    site = ("mlp_out", 1)
    codes = np.asarray(TRACER.out.encode(TRACER.lm.capture(jnp.asarray(TOKENS[12:]), [site])[site]))
    z = np.asarray(TRACER.lm.capture(jnp.asarray(TOKENS[12:]), [site])[site]) @ np.asarray(TRACER.directions).T
    for row, feature in enumerate(found.features):
        fires = codes[..., feature] != 0
        fires[:, 0] = False
        best = np.argsort(-fires.sum(axis=1), kind="stable")[: module.ROWS]
        fires[np.setdiff1d(np.arange(12), best)] = False
        if found.tokens[row] == fires.sum() > 0:
            assert found.ablated.change[row] == pytest.approx(-z[..., feature][fires].mean(), abs=1e-3)


def test_a_planted_feature_is_turned_off_and_on(monkeypatch):
    """y_0 = x_0^2, at tokens of 6 kinds. Feature 0 fires where y_0 > 1, at two of them, and no other feature does."""
    config = TransformerConfig(1, 1, 4, 2, 8, 6, normalization=False)
    mlp = {
        "w_l": jnp.array([[[1.0, 0, 0, 0], [0, 0, 0, 0]]]),
        "w_r": jnp.array([[[1.0, 0, 0, 0], [0, 0, 0, 0]]]),
        "w_p": jnp.zeros((1, 4, 2)).at[0, 0, 0].set(1),
    }
    attention = {name: jnp.zeros((1, 4, 4)) for name in ("w_q", "w_k", "w_v", "w_o")}
    embedding = jnp.array([[0, 0, 1.0, 0], [3, 1, 0, 0], [-3, 0, 1, 0], [0.1, 2, 0, 1], [0.2, 1, 1, 0], [0, 3, 0, 1]])
    unembedding = jnp.zeros((6, 4)).at[2, 0].set(1)  # the feature raises token 2
    lm = LanguageModel({"w_e": embedding, "w_u": unembedding, "layers": {"attention": attention, "mlp": mlp}}, config)
    inp = SAE.init(SAEConfig("mlp_in", 0, 4, 1, 2), jax.random.key(0))
    params = {"w_enc": jnp.eye(4), "w_dec": jnp.eye(4), "b_dec": jnp.zeros(4), "b_enc": jnp.array([-1.0, 0, 0, 0])}
    out = SAE(params, SAEConfig("mlp_out", 0, 4, 1, 1, encoder_bias=True))
    tokens = np.random.default_rng(0).integers(0, 6, (12, 8))
    monkeypatch.setattr(module, "RAISED", 1)
    found = bj.intervene_on_squares(Tracer(lm, 0, inp, out), tokens, features=[0], n=1)
    assert found.ablated.fires[0] == 0 and found.ablated.change[0] == pytest.approx(-9, abs=1e-3)
    assert found.steered.fires[0] == 1 and found.steered.change[0] == pytest.approx(9, abs=0.1)  # some have .04 already
    assert found.ablated_random.fires[0] > 0.3 and found.steered_random.fires[0] < 0.7
    assert found.ablated.logits[0] == pytest.approx(-9 * 5 / 6, abs=1e-3)  # that of token 2, less the mean of six
    assert found.steered.logits[0] == pytest.approx(9 * 5 / 6, abs=0.1)
    assert found.tokens[0] == min(np.isin(tokens[6:, 1:], [1, 2]).sum(), 42 - np.isin(tokens[6:, 1:], [1, 2]).sum())


def test_a_table_has_a_row_for_each_feature():
    found = bj.intervene_on_squares(TRACER, TOKENS[12:], TOKENS[:12], features=[5, 3])
    lines = found.table().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 5", "| 3"]
    assert f"{found.ablated.fires[0]:.2f} ({found.ablated_random.fires[0]:.2f})" in lines[2]
    again = bj.intervene_on_squares(TRACER, TOKENS, features=[5, 3])
    np.testing.assert_array_equal(again.steered_random.change, found.steered_random.change)
    other = bj.intervene_on_squares(TRACER, TOKENS, features=[5, 3], seed=1)
    assert not np.array_equal(other.ablated_random.change, found.ablated_random.change)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="n must be at least 1"):
        bj.intervene_on_squares(TRACER, TOKENS, features=[0], n=0)
    with pytest.raises(ValueError, match="a form has 16 squares"):
        bj.intervene_on_squares(TRACER, TOKENS, features=[0], n=17)
    with pytest.raises(UnknownNameError, match="99"):
        bj.intervene_on_squares(TRACER, TOKENS, features=[99])
    with pytest.raises(ValueError, match="encoder rows"):
        bj.intervene_on_squares(tracer_of(use_encoder=False), TOKENS, features=[0])
    with pytest.raises(ValueError, match="biases"):
        bj.intervene_on_squares(tracer_of(dataclasses.replace(CONFIG, bias=True)), TOKENS, features=[0])
