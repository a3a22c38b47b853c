"""Readable transcoders: what they start as, how their weights are cut down, that they find planted products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.explain.products import input_codes, product
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store.dictionaries import load_dictionary
from bilinear_jax.training.fit import ByStep
from bilinear_jax.training.runs import train_saes
from bilinear_jax.training.sae import fit_saes, train_on_activations
from bilinear_jax.training.sae_reads import allowed, narrowed
from bilinear_jax.training.sae_recipe import SAERecipe
from bilinear_jax.training.sae_start import start_from

D, INPUTS = 8, 12
OPTIONS = dict(target="mlp_out", bilinear_encoder=True, encoder_bias=True, product_bias=True)
READABLE = SAEConfig("mlp_in", 0, D, 4, 3, tag="readable", inputs=INPUTS, inputs_k=5, reads=3, **OPTIONS)


@pytest.fixture(scope="module")
def lm():
    config = TransformerConfig(n_layer=1, n_head=2, d_model=D, d_hidden=16, n_ctx=12, n_vocab=20)
    return LanguageModel.init(config, jax.random.key(0))


@pytest.fixture(scope="module")
def inputs():
    """An SAE of mlp_in with rows that are not its columns, and a bias."""
    sae = SAE.init(SAEConfig("mlp_in", 0, D, INPUTS / D, 5), jax.random.key(1))
    noise = [0.2 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(sae.params.values())]
    return SAE({name: leaf + add for (name, leaf), add in zip(sae.params.items(), noise, strict=True)}, sae.config)


def test_it_starts_as_the_mlp_on_what_the_input_sae_reconstructs(lm, inputs):
    x = jax.random.normal(jax.random.key(2), (40, D))
    config = dataclasses.replace(READABLE, expansion=2, k=16)  # all 16 hidden units, all active
    start = start_from(lm, {("mlp_in", 0): x, ("mlp_out", 0): x}, {0: inputs})
    params = SAE.init(config, jax.random.key(3)).params
    made = SAE(start(config, params) | {"b_dec": jnp.zeros(D)}, config)
    mlp = {name: leaf[0] for name, leaf in lm.params["layers"]["mlp"].items()}
    seen = inputs(x)[0]
    np.testing.assert_allclose(made(x)[0], ((seen @ mlp["w_l"].T) * (seen @ mlp["w_r"].T)) @ mlp["w_p"].T, atol=1e-5)
    assert not np.allclose(seen, x, atol=0.1)
    np.testing.assert_allclose(input_codes(made, x), inputs.encode(x), atol=1e-6)


@pytest.mark.parametrize("number", [1, 3, 7, 12, 40])
def test_the_weights_that_stay_are_those_of_a_sort(number):
    random = np.random.default_rng(number)
    weights, power = random.normal(size=(2, 9, INPUTS)).astype(np.float32), random.uniform(0.01, 9, (2, INPUTS))
    weights[:, 2, 3:] = 0  # fewer than may stay
    found = narrowed(jnp.asarray(weights), jnp.asarray(power, jnp.float32), jnp.asarray(number))
    matters = weights**2 * power[:, None]
    rank = np.argsort(np.argsort(-matters, axis=-1), axis=-1)
    np.testing.assert_array_equal(found, np.where(rank < number, weights, 0))


def test_equal_weights_are_not_more_than_may_stay():
    found = narrowed(jnp.ones((1, 6)), jnp.ones(6), jnp.asarray(4))
    assert np.count_nonzero(found) <= 4


def test_the_number_falls_from_all_to_reads_and_stays():
    recipe = SAERecipe(steps=100, narrow=0.5)
    numbers = [int(allowed(READABLE, recipe, jnp.asarray(step))) for step in (0, 25, 50, 51, 99)]
    assert numbers == [INPUTS, 6, 3, 3, 3]  # sqrt(12 * 3) = 6 half way


def test_a_run_reads_few_inputs_keeps_the_input_sae_and_resumes_with_the_same_bits(lm, inputs, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 20, 4000)
    recipe = SAERecipe(steps=24, batch_size=32, lr=0.01, rows=4, buffer_tokens=64)

    def run(folder, stop=None):
        def log(step, metrics):
            if step == stop:
                raise KeyboardInterrupt

        options = {"inputs": {0: inputs}, "save_every": 5, "log_every": 1, "log": log}
        return fit_saes(lm, [READABLE], recipe, tokens, tmp_path / folder, **options)[0]

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", 14)
    resumed = run("parts")
    for name, leaf in whole.params.items():
        np.testing.assert_array_equal(leaf, resumed.params[name])
    np.testing.assert_array_equal(whole.params["w_in"], inputs.params["w_enc"])
    np.testing.assert_array_equal(whole.params["b_in"], inputs.params["b_dec"])
    counts = np.count_nonzero(whole.params["w_enc"], axis=1)
    assert counts.max() == READABLE.reads
    x = jax.random.normal(jax.random.key(4), (30, D))
    found = product(whole, 5)
    assert found.inputs_read <= 6
    np.testing.assert_allclose(found.of(input_codes(whole, x)), whole.preactivations(x)[:, 5], rtol=1e-4, atol=1e-5)


def planted(step: int):
    """A batch of x that are their own codes, and y with two products: x_0 (x_1 + x_2) and x_3 x_4."""
    random = np.random.default_rng(step)
    x = random.exponential(size=(256, D)) * (random.uniform(size=(256, D)) < 0.5)
    y = np.zeros_like(x)
    y[:, 5], y[:, 6] = x[:, 0] * (x[:, 1] + x[:, 2]), x[:, 3] * x[:, 4]
    return {("mlp_in", 0): x.astype(np.float32), ("mlp_out", 0): y.astype(np.float32)}


def test_planted_products_are_found(tmp_path):
    config = SAEConfig("mlp_in", 0, D, 1, 8, tag="readable", inputs=D, inputs_k=D, reads=2, **OPTIONS)
    recipe = SAERecipe(steps=1500, lr=0.02, final_lr=1e-3)
    means = {("mlp_out", 0): np.zeros(D, np.float32)}

    def start(config, params):
        return params | {"w_in": jnp.eye(D), "b_in": jnp.zeros(D)}

    sae = train_on_activations(ByStep(planted), [config], recipe, tmp_path, means, start=start, log_every=500)[0]
    batch = planted(0)
    x, y = jnp.asarray(batch["mlp_in", 0]), batch["mlp_out", 0]
    assert np.sum((np.asarray(sae(x)[0]) - y) ** 2) < 0.02 * np.sum(y**2)
    for column, inputs in ((5, {0, 1, 2}), (6, {3, 4})):
        writes = np.abs(np.asarray(sae.w_dec[column])) * np.asarray(sae.encode(x)).std(axis=0)
        best = product(sae, int(writes.argmax()))
        large = [one.features[np.abs(one.weights) > 0.25 * np.abs(one.weights[0])] for one in (best.left, best.right)]
        assert {*np.concatenate(large).tolist()} == inputs


def test_a_tracer_of_it_is_of_the_codes_and_two_parts_with_few_inputs_are_all(lm, inputs):
    weights = jax.random.normal(jax.random.key(5), (64, INPUTS))
    weights = narrowed(weights, jnp.ones(INPUTS), jnp.asarray(3))
    params = SAE.init(READABLE, jax.random.key(6)).params | {"w_enc": weights, "w_in": inputs.params["w_enc"]}
    sae = SAE(params | {"b_in": inputs.decoder_bias, "b_enc": jnp.full(64, 0.3)}, READABLE)
    tracer = Tracer(lm, 0, inputs, sae)
    tokens = np.asarray(jax.random.randint(jax.random.key(7), (30, 12), 0, 20))
    found = tracer.explained(tokens, parts=(1, 2), by="weight")
    np.testing.assert_allclose(found.r2[:, 1], 1, atol=1e-3)
    assert (found.inputs_read[:, 1] <= 7).all() and np.median(found.controls["random directions"].r2[:, 1]) < 0.7
    pairs = tracer.explained(tokens, features=[4], parts=(13,), by="pairs by weight")
    f = input_codes(sae, jax.random.normal(jax.random.key(8), (9, D)))
    one = np.concatenate([f, np.ones((9, 1), np.float32)], axis=1)
    z = np.einsum("ti,ij,tj->t", one, tracer.q(4), one)
    np.testing.assert_allclose(z, product(sae, 4).of(f) - product(sae, 4).constant, rtol=1e-4, atol=1e-5)
    assert pairs.r2[0, 0] > 0.5 and tracer.metric(tokens).root.shape[0] == INPUTS + 1
    other = SAE.init(inputs.config, jax.random.key(9))
    with pytest.raises(ValueError, match="reads the codes of another SAE"):
        Tracer(lm, 0, other, sae)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"reads": 13}, "reads is 13, but it must be between 1 and 12"),
        ({"inputs_k": None}, "give all three"),
        ({"target": None}, "only a bilinear transcoder"),
        ({"linear_term": True}, "without a linear term"),
    ],
)
def test_a_config_that_cannot_be(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(READABLE, **change)


def test_inputs_that_do_not_fit_are_refused(lm, inputs, tmp_path):
    tokens, recipe = np.arange(400) % 20, SAERecipe(steps=1)
    other = SAE.init(dataclasses.replace(inputs.config, k=4), jax.random.key(0))
    linear = SAE.init(dataclasses.replace(inputs.config, encoder_bias=True), jax.random.key(0))
    for given, says in (({}, "give it as inputs={0: sae}"), ({0: other}, "and k 4"), ({0: linear}, "plain top-k SAE")):
        with pytest.raises(ValueError, match=says):
            fit_saes(lm, [READABLE], recipe, tokens, tmp_path, inputs=given)
    with pytest.raises(ValueError, match="no readable transcoder"):
        product(inputs, 0)


def test_a_recipe_reads_the_sae_that_the_model_has(run, text):
    grid = {"saes.expansions": "2", "saes.ks": "3", "saes.layers": "0"}
    small = {"recipe.steps": "2", "recipe.batch_size": "16", "recipe.rows": "2", "recipe.buffer_tokens": "32"}
    options = grid | small | {"data.held_out": "10", "run.evaluate_every": "9"}
    train_saes("ts-nano", text, run, overrides=options | {"saes.sites": "mlp_in"})
    reads = {"saes.kinds": "readable-transcoder", "saes.inputs_expansion": "2", "saes.inputs_k": "3", "saes.reads": "2"}
    model = run / "model"
    other = run.parent / f"{run.name}-readable"
    for _ in range(2):  # the second time, the transcoder is there, and the SAE that it reads is not
        train_saes("ts-nano", text, other, model=model, overrides=options | reads)
    sae = load_dictionary(other / "scope")
    assert sae.name == "0-mlp-in-to-mlp-out-x2-k3-readable"
    np.testing.assert_array_equal(
        sae.params["w_in"], load_dictionary(load(model).source, site="mlp_in").params["w_enc"]
    )
    with pytest.raises(Exception, match="x4"):
        train_saes(
            "ts-nano",
            text,
            run.parent / "none",
            model=model,
            overrides=options | reads | {"saes.inputs_expansion": "4"},
        )
