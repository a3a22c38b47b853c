"""Distillation of bilinear forms: the loss by hand, and that it does what it is for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.bilinear_form import bilinear_form
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.training.distil import DistilRecipe, distil, divergence, layer_errors

CONFIG = TransformerConfig(
    n_layer=2, n_head=2, d_model=8, d_hidden=12, n_ctx=16, n_vocab=11, gate="silu", gains=True, tied=True
)
RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, 11, 2000)
HELD_OUT = RNG.integers(0, 11, (16, 12))
RECIPE = DistilRecipe(steps=40, batch_size=8, n_ctx=12, lr=1e-2)


@pytest.fixture(scope="module")
def form():
    lm = LanguageModel.init(CONFIG, jax.random.key(0))
    louder = jax.tree.map(lambda weight: 2 * weight, lm.params["layers"]["mlp"])
    lm = dataclasses.replace(lm, params=lm.params | {"layers": lm.params["layers"] | {"mlp": louder}})
    return bilinear_form(lm, TEXT[:600].reshape(50, 12), held_out=HELD_OUT)


def kl_of(form, recipe, step=0):
    tokens, mlp = jnp.asarray(HELD_OUT), form.lm.params["layers"]["mlp"]
    gated = layer_errors(mlp, form.original, form.lm, tokens, recipe)[0]
    return divergence(mlp, gated, form.original, form.lm, tokens, recipe, step)


@pytest.fixture(scope="module")
def trained(form, tmp_path_factory):
    return distil(form, RECIPE, TEXT, HELD_OUT, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("every", [1, 3])
def test_the_divergence_is_that_of_the_logits(form, every):
    recipe = dataclasses.replace(RECIPE, every=every)
    p, q = (np.asarray(jax.nn.log_softmax(lm.logits(HELD_OUT)), np.float64) for lm in (form.original, form.lm))
    expected = (np.exp(p) * (p - q)).sum(axis=-1)[:, every - 1 :: every].mean()
    np.testing.assert_allclose(kl_of(form, recipe, every - 1), expected, rtol=1e-4)


def test_errors_of_layers_are_those_of_the_certificate_and_the_gradient_is_of_their_mean(form):
    tokens, mlp = jnp.asarray(HELD_OUT), form.lm.params["layers"]["mlp"]

    def mean_error(mlp):
        return jnp.mean(layer_errors(mlp, form.original, form.lm, tokens, RECIPE)[1])

    _, errors, gradient = layer_errors(mlp, form.original, form.lm, tokens, RECIPE)
    np.testing.assert_allclose(1 - np.asarray(errors), form.certificate.r2, atol=1e-5)
    way = jax.tree.map(lambda value: jax.random.normal(jax.random.key(0), value.shape), mlp)
    plus, minus = (mean_error(jax.tree.map(lambda a, b, h=h: a + h * b, mlp, way)) for h in (1e-3, -1e-3))
    along = sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose(float(plus - minus) / 2e-3, along, rtol=1e-2)


def test_layers_alone_learn_their_own_mlps(form, trained, tmp_path):
    recipe = dataclasses.replace(RECIPE, alone=RECIPE.steps)
    found = distil(form, recipe, TEXT, HELD_OUT, tmp_path)
    assert (found.certificate.r2 > form.certificate.r2).all()
    assert found.certificate.r2.mean() > trained.certificate.r2.mean()


def test_in_bfloat16_it_learns_the_same(form, trained, tmp_path):
    found = distil(form, dataclasses.replace(RECIPE, compute_dtype="bfloat16"), TEXT, HELD_OUT, tmp_path)
    assert found.lm.params["layers"]["mlp"]["w_l"].dtype == jnp.float32
    np.testing.assert_allclose(found.certificate.r2, trained.certificate.r2, atol=0.02)


def test_a_distilled_form_is_nearer_to_its_model_on_held_out_text(form, trained):
    before, after = (float(kl_of(one, RECIPE)) for one in (form, trained))
    assert after < 0.7 * before
    assert (trained.certificate.r2 > form.certificate.r2).all()
    np.testing.assert_array_equal(trained.certificate.controls["linear"].r2, form.certificate.controls["linear"].r2)


def test_only_what_is_named_is_trained(form, tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=2, weights=("w_r", "b_p"))
    found = distil(form, recipe, TEXT, HELD_OUT, tmp_path)
    for name, value in form.lm.params["layers"]["mlp"].items():
        same = np.array_equal(value, found.lm.params["layers"]["mlp"][name])
        assert same == (name not in recipe.weights), name
    original = found.lm.params["layers"]["original"]
    for name, value in form.original.params["layers"]["mlp"].items():
        np.testing.assert_array_equal(original[name], value)


def test_an_interrupted_run_goes_on_to_the_same_bits(form, trained, tmp_path):
    def stop(step, _):
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(form, RECIPE, TEXT, HELD_OUT, tmp_path, save_every=10, log_every=10, log=stop)
    again = distil(form, RECIPE, TEXT, HELD_OUT, tmp_path)
    for one, other in zip(jax.tree.leaves(again.lm.params), jax.tree.leaves(trained.lm.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bad_input(form, tmp_path):
    with pytest.raises(ValueError, match="weights must be some of"):
        DistilRecipe(steps=1, weights=("w_x",))
    with pytest.raises(ValueError, match=r"alone is 2, but must be at most steps \(1\)"):
        DistilRecipe(steps=1, alone=2)
    with pytest.raises(ValueError, match="compute_dtype must be float32 or bfloat16; got 'half'"):
        DistilRecipe(steps=1, compute_dtype="half")
    with pytest.raises(ValueError, match="must be above every"):
        DistilRecipe(steps=1, n_ctx=2)
    partly = bilinear_form(form.original, TEXT[:600].reshape(50, 12), held_out=HELD_OUT, layers=[0])
    with pytest.raises(ValueError, match="in all layers"):
        distil(partly, RECIPE, TEXT, HELD_OUT, tmp_path)
