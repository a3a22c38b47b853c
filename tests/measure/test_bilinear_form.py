"""The bilinear form of a gated model against least squares, and its certificate against losses of edited models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.bilinear_form import bilinear_form
from bilinear_jax.measure.quadratic import (
    after_layers,
    after_swapped,
    embedded,
    quadratic_output,
    through_layers,
    with_coefficients,
)
from bilinear_jax.nn.transformer import GATES, MLP, TransformerConfig, run_module
from bilinear_jax.store.checkpoint import load_model, save_model

CONFIG = TransformerConfig(
    n_layer=2, n_head=4, n_kv_head=2, d_model=8, d_hidden=6, n_ctx=20, n_vocab=13, gate="silu", gains=True, tied=True
)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 13, (24, 12))
HELD_OUT = RNG.integers(0, 13, (9, 12))


def random_lm(config=CONFIG, seed=0, size=1.0) -> LanguageModel:
    """A model whose every parameter is random, biases and gains too, so that none can be forgotten."""
    lm = LanguageModel.init(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(lm.params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    new = [leaf + 0.3 * size * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return dataclasses.replace(lm, params=jax.tree.unflatten(tree, new))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return random_lm(dataclasses.replace(CONFIG, bias=True))


@pytest.fixture(scope="module")
def form(lm):
    return bilinear_form(lm, TOKENS, held_out=HELD_OUT, batch_size=5, loss_tokens=10**6)


def inputs(lm, tokens):
    """mlp_in of every layer at the tokens after position 0: [n_layer, tokens, d_model]."""
    x = np.asarray(lm.capture(tokens, ["mlp_in"])["mlp_in"])[:, :, 1:]
    return x.reshape(lm.config.n_layer, -1, lm.config.d_model)


def least_squares(lm, layer, x, terms=5):
    """The coefficients [terms, d_hidden], in float64."""
    mlp = {name: np.asarray(weight[layer], np.float64) for name, weight in lm.params["layers"]["mlp"].items()}
    a, b = (x @ mlp[f"w_{side}"].T + mlp.get(f"b_{side}", 0) for side in "lr")
    target = np.asarray(GATES[lm.config.gate](jnp.asarray(a, jnp.float32)), np.float64) * b
    powers = np.stack([np.ones_like(a), a, b, a**2, a * b][:terms])
    return np.stack([np.linalg.lstsq(powers[:, :, m].T, target[:, m])[0] for m in range(a.shape[1])], axis=1)


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh", "relu"])
def test_the_coefficients_are_those_of_least_squares(gate):
    lm = random_lm(dataclasses.replace(CONFIG, gate=gate, bias=True))
    found = bilinear_form(lm, TOKENS, held_out=HELD_OUT, batch_size=7)
    for layer, x in enumerate(inputs(lm, TOKENS)):
        expected = with_coefficients(lm, jnp.asarray(least_squares(lm, layer, x), jnp.float32)[None].repeat(2, axis=0))
        for name in ("w_r", "b_r", "w_s", "b_p"):
            actual = found.lm.params["layers"]["mlp"][name][layer]
            np.testing.assert_allclose(actual, expected.params["layers"]["mlp"][name][layer], rtol=1e-2, atol=2e-3)
        linear = least_squares(lm, layer, x, terms=3)
        np.testing.assert_allclose(found.controls["linear"][layer, :3], linear, rtol=1e-2, atol=2e-3)


def test_the_bilinear_mlp_computes_the_quadratic(lm):
    """For any coefficients, with biases in the model: what was moved into weights, biases and the linear map."""
    coefficients = jax.random.normal(jax.random.key(3), (2, 5, 6))
    form, x = with_coefficients(lm, coefficients), jax.random.normal(jax.random.key(4), (7, 8))
    for layer in range(2):
        original, new = (jax.tree.map(lambda w, i=layer: w[i], one.params["layers"]["mlp"]) for one in (lm, form))
        a, b = (np.float64(x) @ np.float64(original[f"w_{s}"]).T + np.float64(original[f"b_{s}"]) for s in "lr")
        c = np.asarray(coefficients[layer], np.float64)
        hidden = c[0] + c[1] * a + c[2] * b + c[3] * a**2 + c[4] * a * b
        expected = hidden @ np.asarray(original["w_p"], np.float64).T + np.asarray(original["b_p"])
        np.testing.assert_allclose(run_module(MLP(form.config), new, x), expected, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(quadratic_output(original, coefficients[layer], x), expected, rtol=2e-4, atol=2e-4)


def test_position_0_keeps_the_original(lm, form):
    """A first token sees only itself, so its logits are those of the model. The later ones are not."""
    ours, theirs = form.lm.logits(HELD_OUT), lm.logits(HELD_OUT)
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], atol=1e-5)
    assert np.abs(np.asarray(ours - theirs))[:, 1:].max(axis=(0, 2)).min() > 1e-3


def test_r2_is_that_of_the_outputs_on_held_out_tokens(lm, form):
    u = RNG.normal(size=(3, 8))
    ours = form.certificate.of(u)
    for layer, x in enumerate(inputs(lm, HELD_OUT)):
        x = jnp.asarray(x)
        original, new = (jax.tree.map(lambda w, i=layer: w[i], one.params["layers"]["mlp"]) for one in (lm, form.lm))
        y, error = (np.asarray(part, np.float64) for part in (
            run_module(MLP(lm.config), original, x),
            run_module(MLP(lm.config), original, x) - run_module(MLP(form.lm.config), new, x),
        ))  # fmt: skip
        centred = y - y.mean(axis=0)
        np.testing.assert_allclose(form.certificate.r2[layer], 1 - (error**2).sum() / (centred**2).sum(), atol=1e-4)
        by_hand = 1 - ((error @ u.T) ** 2).sum(axis=0) / ((centred @ u.T) ** 2).sum(axis=0)
        np.testing.assert_allclose(ours[layer], by_hand, atol=1e-3)


def test_the_loss_of_one_layer_is_that_of_a_form_of_this_layer(lm, form):
    for layer in range(2):
        alone = bilinear_form(lm, TOKENS, held_out=HELD_OUT, layers=[layer])
        added = float(alone.lm.loss(HELD_OUT)) - float(lm.loss(HELD_OUT))
        np.testing.assert_allclose(form.certificate.loss_added[layer], added, atol=2e-5)
        np.testing.assert_allclose(alone.certificate.loss_added_all, added, atol=2e-5)
        other = 1 - layer
        assert alone.certificate.r2[other] == 1 and alone.certificate.loss_added[other] == 0
        np.testing.assert_allclose(alone.certificate.r2[layer], form.certificate.r2[layer], atol=1e-5)
    everything = float(form.lm.loss(HELD_OUT)) - float(lm.loss(HELD_OUT))
    np.testing.assert_allclose(form.certificate.loss_added_all, everything, atol=2e-5)
    np.testing.assert_allclose(form.certificate.loss, float(lm.loss(HELD_OUT)), atol=1e-5)
    assert form.certificate.tokens == form.certificate.loss_tokens == 9 * 11


def test_the_loss_of_a_removed_layer_is_that_of_its_mean(lm, form):
    for layer in range(2):
        mean = lm.capture(TOKENS, [("mlp_out", layer)])["mlp_out", layer][:, 1:].mean(axis=(0, 1))

        def removed(y, mean=mean):
            return jnp.broadcast_to(mean, y.shape).at[:, 0].set(y[:, 0])

        added = float(lm.loss(HELD_OUT, edits={("mlp_out", layer): removed})) - float(lm.loss(HELD_OUT))
        np.testing.assert_allclose(form.certificate.loss_removed[layer], added, atol=2e-5)


def test_controls_are_worse(form):
    assert (form.certificate.r2 > form.certificate.controls["linear"].r2).all()
    assert (form.certificate.r2 > form.certificate.controls["shuffled"].r2).all()


def test_a_bilinear_model_is_its_own_form():
    lm = random_lm(dataclasses.replace(CONFIG, gate=None))
    found = bilinear_form(lm, TOKENS)
    assert found.lm is lm
    np.testing.assert_allclose(found.certificate.r2, 1, atol=1e-6)
    np.testing.assert_allclose(found.certificate.loss_added, 0, atol=1e-6)
    assert (np.abs(found.certificate.loss_removed) > 1e-3).all()


def test_in_sequence_a_layer_is_fitted_on_what_the_form_feeds_it(lm, form):
    found = bilinear_form(lm, TOKENS, held_out=HELD_OUT, sequential=True, batch_size=5)
    mlp, plain = found.lm.params["layers"]["mlp"], form.lm.params["layers"]["mlp"]
    np.testing.assert_allclose(mlp["w_r"][0], plain["w_r"][0], rtol=1e-4, atol=1e-4)
    coefficients = least_squares(lm, 1, inputs(found.lm, TOKENS)[1])
    expected = with_coefficients(lm, jnp.asarray(coefficients, jnp.float32)[None].repeat(2, axis=0))
    np.testing.assert_allclose(mlp["w_r"][1], expected.params["layers"]["mlp"]["w_r"][1], rtol=1e-2, atol=2e-3)
    assert np.abs(np.asarray(mlp["w_r"][1] - plain["w_r"][1])).max() > 1e-2


@pytest.fixture(scope="module")
def massive():
    """A model in which token 3 makes an output thousands of times as long as the others, in layer 1 alone."""
    lm = random_lm(dataclasses.replace(CONFIG, gains=False, tied=False, attn_scale=0.0, d_hidden=7))
    w_e = lm.params["w_e"].at[:, 0].set(0).at[3].set(0).at[3, 0].set(50.0)
    mlp = {name: weight.at[1, -1].set(0) for name, weight in lm.params["layers"]["mlp"].items() if name != "w_p"}
    mlp = {name: weight.at[1, -1, 0].set(100.0) for name, weight in mlp.items()}
    mlp["w_p"] = lm.params["layers"]["mlp"]["w_p"].at[0, 0].set(0)
    params = lm.params | {"w_e": w_e, "layers": lm.params["layers"] | {"mlp": mlp}}
    tokens = np.where(TOKENS == 3, 4, TOKENS)
    tokens[::3, 5] = 3  # 8 of 264
    return dataclasses.replace(lm, params=params), tokens


def test_swapped_in_place_or_as_a_model_of_its_own_is_the_same(massive):
    lm = massive[0]
    coefficients = jax.random.normal(jax.random.key(3), (2, 5, lm.config.d_hidden))
    x = embedded(lm, jnp.asarray(TOKENS, jnp.int32))
    lengths = through_layers(lm, x, lambda *given: jnp.linalg.norm(given[2]["mlp_out"], axis=-1))[1]
    above = jnp.stack([jnp.median(lengths[0]), jnp.median(lengths[1])])  # half of the tokens keep the original
    expected = after_layers(with_coefficients(lm, coefficients, above), x)
    np.testing.assert_allclose(after_swapped(lm, coefficients, above, x), expected, rtol=1e-3, atol=1e-3)


def test_other_massive_positions_keep_the_original_too(massive):
    lm, tokens = massive
    lengths = np.linalg.norm(np.asarray(lm.capture(tokens, [("mlp_out", 1)])["mlp_out", 1]), axis=-1)
    assert lengths[tokens == 3].min() > 200 * np.median(lengths)  # as planted
    found = bilinear_form(lm, tokens, held_out=tokens)
    assert found.certificate.kept.tolist() == [0, 8]
    ours, theirs = (one.capture(tokens, [("mlp_out", 1)])["mlp_out", 1] for one in (found.lm, lm))
    streams = [one.capture(tokens, [("mlp_in", 1)])["mlp_in", 1] for one in (found.lm, lm)]
    original = jax.tree.map(lambda w: w[1], found.lm.params["layers"]["original"])
    expected = run_module(MLP(found.lm.config.original), original, streams[0])
    np.testing.assert_allclose(ours[tokens == 3], expected[tokens == 3], rtol=1e-4)
    assert found.certificate.r2[1] > 0.9
    assert np.linalg.norm(np.asarray(ours - theirs)[tokens == 3], axis=-1).max() > 0  # the stream differs before it


def test_generation_with_the_cache_continues_as_without(massive, form):
    """Also where a massive position keeps the original, and after position 0."""
    lm, tokens = massive
    for model in (bilinear_form(lm, tokens, held_out=tokens).lm, form.lm):
        from bilinear_jax.nn.generation import generate

        prompt = np.array([[2, 3, 4]])
        new = generate(model.config, model.params, prompt, max_length=6, temperature=0)
        row = prompt
        for token in np.asarray(new)[0]:
            assert int(np.argmax(np.asarray(model.logits(row))[0, -1])) == token
            row = np.concatenate([row, [[token]]], axis=1)


def test_batches_and_masked_tokens_do_not_matter(lm, form):
    garbage = np.concatenate([TOKENS, RNG.integers(0, 13, (5, 12))])
    mask = np.zeros(garbage.shape, bool)
    mask[:24, 1:] = True
    found = bilinear_form(lm, garbage, held_out=HELD_OUT, token_mask=mask, batch_size=2, loss_tokens=10**6)
    for name in ("r2", "loss_added", "loss_removed"):
        np.testing.assert_allclose(getattr(found.certificate, name), getattr(form.certificate, name), atol=2e-4)


def test_a_form_is_saved_and_folded_like_any_model(form, tmp_path):
    save_model(tmp_path / "form", form.lm.config, form.lm.params, origin={})
    again = load_model(tmp_path / "form")
    assert again.config == form.lm.config
    expected = form.lm.logits(HELD_OUT)
    np.testing.assert_array_equal(LanguageModel(again.params, again.config).logits(HELD_OUT), expected)
    folded = form.lm.fold_norms()
    assert not folded.config.gains
    np.testing.assert_allclose(folded.logits(HELD_OUT), expected, rtol=1e-3, atol=1e-4)


def test_bad_input(lm, form):
    with pytest.raises(ValueError, match="plain MLPs"):
        bilinear_form(random_lm(dataclasses.replace(CONFIG, bilinear=False)), TOKENS)
    with pytest.raises(ValueError, match="a bilinear form already"):
        bilinear_form(form.lm, TOKENS)
    with pytest.raises(UnknownNameError, match="layer"):
        bilinear_form(lm, TOKENS, layers=[2])
    with pytest.raises(ValueError, match="at least 4, or held_out"):
        bilinear_form(lm, TOKENS[:3])
    with pytest.raises(ValueError, match="rows"):
        form.certificate.of(np.ones((1, 7)))
    broken = dataclasses.replace(lm, params=lm.params | {"w_e": lm.params["w_e"].at[0].set(jnp.nan)})
    with pytest.raises(ValueError, match="not finite"):
        bilinear_form(broken, TOKENS, held_out=HELD_OUT)
