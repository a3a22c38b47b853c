"""Random dictionaries: what they are by NumPy, that no other scale or offset is better, and that nothing is learned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.controls import random_dictionaries
from bilinear_jax.measure.evaluation import controls, evaluate_saes
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig

WIDTH = 8
TOKENS = np.random.default_rng(3).integers(0, 11, (6, 5))
MASK = np.random.default_rng(4).random((6, 5)) < 0.7


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    config = TransformerConfig(n_layer=1, n_head=1, d_model=WIDTH, d_hidden=12, n_ctx=5, n_vocab=11)
    return LanguageModel.init(config, jax.random.key(0))


def trained(site="mlp_out", seed=0, **options) -> SAE:
    """Not trained, but with numbers in all of its parameters."""
    sae = SAE.init(SAEConfig(site, 0, WIDTH, 3, **({"k": 4} | options)), jax.random.key(seed))
    random = np.random.default_rng(seed)
    params = {name: value + 0.1 * random.normal(size=value.shape).astype("f4") for name, value in sae.params.items()}
    return SAE(params, sae.config)


KINDS = {
    "SAE": {},
    "in units of normalize": {"normalize": 4.0, "apply_normalize": True},
    "passthrough": {"passthrough": (1, 6)},
    "bilinear": {"bilinear_encoder": True, "encoder_bias": True, "linear_term": True},
    "with a skip": {"skip": True, "tag": "b"},
    "transcoder": {"site": "mlp_in", "target": "mlp_out"},
    "transcoder with a skip": {"site": "mlp_in", "target": "mlp_out", "skip": True},
    "readable": {
        **{"site": "mlp_in", "target": "mlp_out", "bilinear_encoder": True},
        **{"inputs": 5, "inputs_k": 2, "reads": 5},
    },
    "with a lookup": {"token_lookup": 11},
    "with a lookup in units of normalize": {"token_lookup": 11, "normalize": 4.0, "apply_normalize": True},
    "relu": {"k": None, "activation": "relu", "max_active": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_control_is(lm, kind):
    sae = trained(**KINDS[kind])
    control = random_dictionaries(lm, [sae], TOKENS, MASK, batch_size=4)[sae.name]
    got = lm.capture(TOKENS, [("mlp_in", 0), ("mlp_out", 0)])
    values = {name: np.asarray(got[name, 0], np.float64)[MASK] for name in ("mlp_in", "mlp_out")}
    x, y = values[sae.config.site], values[sae.config.reconstructs]
    beside = np.zeros_like(x)
    if "w_skip" in sae.params:
        beside = x @ np.asarray(sae.params["w_skip"], np.float64).T
    if sae.config.token_lookup:
        beside = sae.config.scale * np.asarray(sae.params["w_lookup"], np.float64)[TOKENS[MASK]]
    passed = list(sae.config.passthrough)
    beside[:, passed] += x[:, passed]
    rest = y - beside

    directions = np.asarray(control.w_enc, np.float64)
    assert directions.shape == (3 * WIDTH, WIDTH) and (control.config.site, control.config.reconstructs) == (
        sae.config.site,
        sae.config.reconstructs,
    )
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-5)
    z = (x - x.mean(axis=0)) @ directions.T
    active = (np.asarray(sae.encode(jnp.asarray(x, jnp.float32))) != 0).sum(axis=1)
    k = round(active.mean())
    smallest = np.sort(z, axis=1)[:, -k, None]
    codes = np.where((z >= smallest) & (z > 0), z, 0)
    np.testing.assert_allclose(np.asarray(control.encode(jnp.asarray(x, jnp.float32))), codes, rtol=1e-3, atol=1e-5)

    written = codes @ directions
    written[:, passed] = 0
    around = rest - rest.mean(axis=0)
    scale = np.sum(around * written) / np.sum(written**2)
    x_hat = np.asarray(control(jnp.asarray(x, jnp.float32), TOKENS[MASK])[0])
    np.testing.assert_allclose(x_hat, beside + rest.mean(axis=0) + scale * written, rtol=1e-3, atol=1e-4)


def test_no_other_scale_or_offset_explains_more(lm):
    sae = trained()
    control = random_dictionaries(lm, [sae], TOKENS, MASK)[sae.name]

    def nmse(**params) -> float:
        changed = SAE(control.params | params, control.config)
        return evaluate_saes(lm, [changed], TOKENS, MASK)[changed.name].nmse

    best = nmse()
    others = [nmse(w_dec=control.w_dec * factor) for factor in (0.9, 1.1)]
    assert min(others) > best and nmse(b_dec=control.b_dec + 0.01) > best
    assert evaluate_saes(lm, [control], TOKENS, MASK)[control.name].explained_variance > 0


def test_the_scores_are_those_of_the_random_dictionaries_by_the_names_of_the_trained_ones(lm):
    saes = [trained(), trained("mlp_in", seed=1), trained(tag="two")]
    found = controls(lm, saes, TOKENS, MASK, batch_size=3, seed=5)
    drawn = random_dictionaries(lm, saes, TOKENS, MASK, seed=5)
    assert list(found) == list(drawn) == [sae.name for sae in saes]
    for name, control in drawn.items():
        (expected,) = evaluate_saes(lm, [control], TOKENS, MASK).values()
        assert dataclasses.asdict(found[name]) == {
            key: pytest.approx(value, rel=2e-3, abs=2e-3) if isinstance(value, float) else value
            for key, value in dataclasses.asdict(expected).items()
        }
    # one shape has one set of directions, and another seed has others; what was trained plays no part
    first, _, third = drawn.values()
    np.testing.assert_array_equal(first.w_enc, third.w_enc)
    other = random_dictionaries(lm, saes[:1], TOKENS, MASK, seed=6)[saes[0].name]
    assert not np.allclose(first.w_enc, other.w_enc)


def test_squares_that_float32_cannot_hold(lm):
    sae = trained()
    expected = controls(lm, [sae], TOKENS, MASK)[sae.name]
    mlp = lm.params["layers"]["mlp"]
    layers = lm.params["layers"] | {"mlp": mlp | {"w_p": mlp["w_p"] * 2.0**-80}}
    tiny = dataclasses.replace(lm, params=lm.params | {"layers": layers})
    found = controls(tiny, [sae], TOKENS, MASK)[sae.name]
    assert found.explained_variance == pytest.approx(expected.explained_variance, rel=1e-4)


def test_values_that_are_not_finite_are_refused(lm):
    sae = trained()
    broken = SAE(sae.params | {"w_enc": sae.w_enc.at[0].set(jnp.nan)}, sae.config)
    broken_model = dataclasses.replace(lm, params=lm.params | {"w_e": lm.params["w_e"] * jnp.nan})
    with pytest.raises(ValueError, match=r"not finite in rows 0 \.\.\. 5"):
        random_dictionaries(broken_model, [sae], TOKENS)
    # what is wrong with the trained one shows when that is evaluated
    with pytest.raises(ValueError, match="not finite"):
        evaluate_saes(lm, [broken], TOKENS)
