"""The direct effects of features on logits: one by one, many together, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain import logits
from bilinear_jax.explain.logits import LogitEffects, logit_effects, logit_effects_of
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig

CONFIG = TransformerConfig(1, 2, 8, 12, 6, 11, attn_scale=0.25)
FEATURES = [3, 31, 0, 3, 7, 30]  # one may be asked about twice


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(published.make_params(CONFIG), CONFIG)


def sae_at(site: str) -> SAE:
    return SAE.init(SAEConfig(site, 0, d_model=8, expansion=4, k=2), jax.random.key(0))


@pytest.mark.parametrize(("site", "factor"), [("mlp_out", 1), ("mlp_in", 1), ("attn_out", 0.25)])
@pytest.mark.parametrize("at_once", [4, 64])
def test_many_together_are_those_of_each(lm, monkeypatch, site, factor, at_once):
    monkeypatch.setattr(logits, "FEATURES_AT_ONCE", at_once)
    sae = sae_at(site)
    found = logit_effects_of(lm, sae, FEATURES, 3)
    assert isinstance(found, LogitEffects) and {len(part) for part in jax.tree.leaves(found)} == {len(FEATURES)}
    for place, feature in enumerate(FEATURES):
        effects = factor * np.asarray(lm.w_u, np.float64) @ np.asarray(sae.w_dec, np.float64)[:, feature]
        order = np.argsort(-effects)
        for tokens, by, expected in (
            (found.raised, found.raised_by, order[:3]),
            (found.lowered, found.lowered_by, order[::-1][:3]),
        ):
            assert isinstance(tokens, np.ndarray) and tokens[place].tolist() == expected.tolist()
            np.testing.assert_allclose(by[place], effects[expected], rtol=1e-5, atol=1e-6)
        one = logit_effects(lm, sae, feature, 3)
        for many, alone in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(many[place], alone, rtol=1e-5)


@pytest.mark.parametrize(("site", "target", "factor"), [("attn_out", "mlp_out", 1), ("resid_pre", "attn_out", 0.25)])
def test_a_transcoder_writes_at_its_target(lm, site, target, factor):
    sae = SAE.init(SAEConfig(site, 0, d_model=8, expansion=4, k=2, target=target), jax.random.key(0))
    effects = factor * np.asarray(lm.w_u, np.float64) @ np.asarray(sae.w_dec, np.float64)[:, 3]
    np.testing.assert_allclose(logit_effects(lm, sae, 3, 3).raised_by, np.sort(effects)[::-1][:3], rtol=1e-5)


def test_no_tokens_and_no_features(lm):
    sae = sae_at("mlp_out")
    assert {part.shape for part in jax.tree.leaves(logit_effects_of(lm, sae, FEATURES, 0))} == {(6, 0)}
    assert {part.shape[0] for part in jax.tree.leaves(logit_effects_of(lm, sae, [], 3))} == {0}
    assert logit_effects(lm, sae, 3, k=100).raised.shape == (11,)  # all tokens that there are


def test_what_is_refused(lm):
    sae = sae_at("mlp_out")
    with pytest.raises(UnknownNameError, match=r"no feature 32 in SAE 0-mlp-out-x4-k2: choose one of 0 \.\.\. 31"):
        logit_effects(lm, sae, 32)
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        logit_effects(lm, sae, 3, k=-1)
    traced = jax.jit(lambda feature: logit_effects(lm, sae, feature, 2).raised)(jnp.int32(5))
    assert traced.tolist() == logit_effects(lm, sae, 5, 2).raised.tolist()
