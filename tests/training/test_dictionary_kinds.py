"""Training each kind of dictionary: gradients against dense autodiff, thresholds, starts, resume, devices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import Stopped, stopped_at

from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.evaluation import evaluate_saes
from bilinear_jax.nn.activations import batch_threshold, jump, least_threshold, places, step
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.training.harvest import TOKENS as TOKEN_IDS
from bilinear_jax.training.mesh import make_mesh, one_copy, place, place_rows
from bilinear_jax.training.sae import fit_saes, sae_update, train_on_activations
from bilinear_jax.training.sae_loss import reconstruction_loss, training_slots
from bilinear_jax.training.sae_recipe import Loss, SAERecipe
from bilinear_jax.training.sae_start import start_from
from bilinear_jax.training.sae_state import initial_state, saes_of

D, TOKENS = 8, 48
MANY = 16  # times d_model: more features than places for active ones

TRANSCODERS = {
    "sae": {},
    "transcoder": dict(target="mlp_out", encoder_bias=True),
    "skip": dict(target="mlp_out", encoder_bias=True, skip=True),
    "bilinear": dict(target="mlp_out", bilinear_encoder=True, product_bias=True),
    "bilinear-linear": dict(target="mlp_out", bilinear_encoder=True, product_bias=True, linear_term=True),
    "readable": dict(
        **dict(target="mlp_out", bilinear_encoder=True, encoder_bias=True, product_bias=True),
        **dict(inputs=12, inputs_k=4, reads=3),
    ),
    "lookup": dict(token_lookup=12),
    "skip-lookup": dict(target="mlp_out", encoder_bias=True, skip=True, token_lookup=12),
}
LOSS = Loss(k_aux=3, aux_coefficient=0.5, matryoshka=(0.25, 0.5), bandwidth=0.4)


def config_of(kind: str, activation: str, expansion: int = MANY) -> SAEConfig:
    return SAEConfig("mlp_in", 0, D, expansion, 3, tag=kind, activation=activation, **TRANSCODERS[kind])


def params_of(config: SAEConfig, key: int = 0, threshold: float = 1.0) -> dict:
    params = SAE.init(config, jax.random.key(key)).params
    keys = dict(zip(params, jax.random.split(jax.random.key(key + 1), len(params)), strict=True))
    found = {name: leaf + 0.3 * jax.random.normal(keys[name], leaf.shape) for name, leaf in params.items()}
    if "threshold" in params:
        found["threshold"] = jnp.full(params["threshold"].shape, threshold)
    return found


def dense_loss(config: SAEConfig, params: dict, x, y, tokens, dead, loss: Loss, weight: float):
    """The loss as its module defines it, with every code written out, for JAX to differentiate."""
    centre = params["b_dec"][None] if config.centred else 0.0
    h = x - centre
    if config.inputs is not None:
        bias, rows = jax.lax.stop_gradient((params["b_in"], params["w_in"]))
        z = (x - bias[None]) @ rows.T
        h = jnp.where(z >= jnp.sort(z, axis=1)[:, -config.inputs_k, None], z, 0)
    h = h @ params["w_enc"].T
    h = h + params["b_enc"][None] if config.encoder_bias else h
    if config.bilinear_encoder:
        left, right, *linear = jnp.split(h, config.encoder_blocks, axis=-1)
        z = left * right + params["b_z"][None] + (linear[0] if linear else 0.0)
    else:
        z = h

    def top(z, k):
        chosen = jnp.zeros(z.shape, bool).at[jnp.arange(len(z))[:, None], jax.lax.top_k(z, k)[1]].set(True)
        return jnp.where(chosen, z, 0.0)

    l0 = 0.0
    if config.activation in ("topk", "topk_relu"):
        codes = top(z, config.k)
        codes = jnp.maximum(codes, 0) if config.activation == "topk_relu" else codes
    elif config.activation == "batchtopk":
        codes = jnp.maximum(top(z.reshape(1, -1), config.k * len(x)).reshape(z.shape), 0)
    elif config.activation == "jumprelu":
        its = jnp.broadcast_to(params["threshold"], z.shape)
        codes = jump(jnp.maximum(z, 0), its, loss.bandwidth)
        l0 = jnp.sum(step(jnp.maximum(z, 0), its, loss.bandwidth)) / len(x)
    else:
        codes = jnp.maximum(z, 0)
    skip = x @ params["w_skip"].T if config.skip else 0.0
    beside = params["b_dec"][None] + skip
    if config.token_lookup:
        beside = beside + jax.nn.one_hot(tokens, config.token_lookup) @ params["w_lookup"]
    total, errors = 0.0, []
    for share in (*loss.matryoshka, 1):
        first = (jnp.arange(config.n_features) < round(share * config.n_features))[None]
        errors.append(y - jnp.where(first, codes, 0) @ params["w_dec"].T - beside)
        total = total + jnp.sum(errors[-1] ** 2) / jnp.sum(y**2) / (len(loss.matryoshka) + 1)
    if config.activation == "jumprelu":
        total = total + weight * (l0 / config.k - 1) ** 2
    if config.activation == "relu":
        total = total + weight * jnp.mean(jnp.sum(codes, axis=-1)) / jnp.sqrt(jnp.mean(jnp.sum(y**2, axis=-1)))
    missed = jax.lax.stop_gradient(errors[-1])
    among = top(jnp.where(dead[None], z, -jnp.inf), loss.k_aux)
    if config.activation == "topk_relu":
        among = jnp.maximum(among, 0)
    guess = jnp.where(dead[None], among, 0) @ params["w_dec"].T
    return total + loss.aux_coefficient * jnp.sum((missed - guess) ** 2) / jnp.sum(missed**2)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    config = TransformerConfig(n_layer=2, n_head=2, d_model=D, d_hidden=20, n_ctx=16, n_vocab=10)
    return LanguageModel.init(config, jax.random.key(0))


CASES = [(kind, "topk", 1.0) for kind in TRANSCODERS] + [
    (kind, activation, threshold)
    for kind, activation in [
        *(("sae", "topk_relu"), ("sae", "batchtopk"), ("skip", "relu"), ("transcoder", "jumprelu")),
        *(("bilinear", "batchtopk"), ("bilinear-linear", "jumprelu"), ("lookup", "batchtopk")),
    ]
    for threshold in (0.05, 3.0)[activation == "topk_relu" :]  # more active features than places, and fewer
]
"""Every kind of encoder and target, and every activation; both are separate parts."""


@pytest.mark.parametrize(("kind", "activation", "threshold"), CASES)
def test_loss_and_gradients_are_those_of_dense_autodiff(kind, activation, threshold):
    """Also where a token has more active features than places, and where a threshold is moved by what lies below it."""
    config = config_of(kind, activation, 6 if activation == "relu" and threshold > 1 else MANY)  # 48 all have a place
    params = params_of(config, threshold=threshold)
    keys = jax.random.split(jax.random.key(5), 3)
    x = jax.random.normal(keys[0], (TOKENS, D))
    y = x if config.target is None else jax.random.normal(keys[1], (TOKENS, D))
    dead = jax.random.bernoulli(keys[2], 0.3, (config.n_features,))
    tokens = jnp.arange(TOKENS) ** 2 % 12  # some ids several times, others never

    def ours(params):
        return reconstruction_loss(config, params, x, y, tokens=tokens, dead=dead, loss=LOSS, weight=0.7)[0]

    def dense(params):
        return dense_loss(config, params, x, y, tokens, dead, LOSS, 0.7)

    with jax.default_matmul_precision("highest"):
        (value, found), (other, expected) = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, dense))
    np.testing.assert_allclose(value, other, rtol=1e-5)
    for name, leaf in expected.items():
        if name == "threshold" and activation == "batchtopk":
            continue  # not trained by its gradient
        scale = max(float(jnp.max(jnp.abs(leaf))), 1e-6)
        np.testing.assert_allclose(found[name] / scale, leaf / scale, atol=1e-5, err_msg=name)
    if activation == "jumprelu":
        assert float(jnp.max(jnp.abs(found["threshold"]))) > 0
    if config.token_lookup:
        assert np.any(np.asarray(found["w_lookup"]), axis=1).tolist() == [id in (0, 1, 4, 9) for id in range(12)]


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_both_ways_of_computing_a_batch_are_taken(activation, monkeypatch):
    """With as many places as features nothing is dense, with few all is: the numbers are equal."""
    config = config_of("sae", activation)
    params, x = params_of(config, threshold=0.3), jax.random.normal(jax.random.key(5), (TOKENS, D))
    found = []
    for slots in (config.n_features, 4):
        monkeypatch.setattr("bilinear_jax.training.sae_loss.training_slots", lambda config, slots=slots: slots)
        with jax.default_matmul_precision("highest"):
            loss_of = jax.value_and_grad(
                lambda params: reconstruction_loss(config, params, x, loss=LOSS, weight=0.7), has_aux=True
            )
            found.append(jax.jit(loss_of)(params))
    (((loss, parts), gradient), ((other, its), expected)) = found
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    np.testing.assert_array_equal(parts["fired"], its["fired"])
    np.testing.assert_allclose(parts["l0"], its["l0"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected)


@pytest.mark.parametrize("number", [1, 7, 100, 5000])
def test_the_threshold_of_a_batch_is_that_of_a_sort(number):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(40, 30)), jnp.float32).at[0, 0].set(jnp.nan)
    z = z.at[1].set(0.5)  # ties
    positive = np.sort(np.asarray(z)[np.asarray(z) > 0])[::-1]
    expected = positive[number - 1] if number <= len(positive) else 0
    assert float(batch_threshold(z, number)) == expected


def test_jumps_derivative_by_the_threshold_by_hand():
    """Threshold 2, bandwidth .5: entries within .5 of it have the derivatives -t / 1 and -1 / 1."""
    z, t = jnp.asarray([1.4, 1.6, 2.4, 2.6]), jnp.full(4, 2.0)
    by_z, by_t = jax.grad(lambda z, t: jnp.sum(jump(z, t, 0.5)), argnums=(0, 1))(z, t)
    assert by_z.tolist() == [0, 0, 1, 1] and by_t.tolist() == [0, -2, -2, 0]
    by_z, by_t = jax.grad(lambda z, t: jnp.sum(step(z, t, 0.5)), argnums=(0, 1))(z, t)
    assert by_z.tolist() == [0, 0, 0, 0] and by_t.tolist() == [0, -1, -1, 0]


def test_l0_of_a_batch_is_k_and_the_running_threshold_gives_it_afterwards():
    config = config_of("sae", "batchtopk")
    recipe, means = SAERecipe(steps=20, batch_size=512, lr=1e-4), {("mlp_in", 0): np.zeros(D, np.float32)}
    state, update = initial_state([config], recipe, means), jax.jit(sae_update([config], recipe))
    metrics = {}
    for i in range(20):
        state, metrics = update(state, {("mlp_in", 0): jax.random.normal(jax.random.key(i), (512, D))})
    np.testing.assert_allclose(metrics[f"l0.{config.name}"], 3, rtol=1e-5)
    [sae] = saes_of(state, [config])
    codes = sae.encode(jax.random.normal(jax.random.key(99), (4096, D)))
    np.testing.assert_allclose(jnp.mean(jnp.sum(codes > 0, axis=-1)), 3, rtol=0.05)
    assert float(sae.params["threshold"]) > 0 and float(codes[codes != 0].min()) > float(sae.params["threshold"])


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_l0_is_trained_to_its_target(lm, activation):
    """It starts at the target with JumpReLU and far above it with ReLU."""
    config = config_of("sae", activation, expansion=6)
    recipe = SAERecipe(steps=600, batch_size=256, lr=1e-2, final_lr=1e-3, sparsity=1.0)
    directions = jax.random.normal(jax.random.key(7), (30, D))

    def batch(i):
        sparse = jax.random.bernoulli(jax.random.key(i), 0.1, (256, 30)).astype(jnp.float32)
        return {("mlp_in", 0): sparse @ directions}

    start = start_from(lm, batch(0))
    state = initial_state([config], recipe, {("mlp_in", 0): np.zeros(D, np.float32)}, start)
    update, metrics = jax.jit(sae_update([config], recipe)), []
    for i in range(recipe.steps):
        state, found = update(state, batch(i))
        metrics.append(float(found[f"l0.{config.name}"]))
    np.testing.assert_allclose(np.mean(metrics[-20:]), 3, rtol=0.15)
    if activation == "jumprelu":
        np.testing.assert_allclose(metrics[0], 3, rtol=0.4)
    else:
        assert metrics[0] > 10


def test_a_frozen_decoder_stays_as_it_is():
    config = config_of("sae", "topk")
    recipe, means = SAERecipe(steps=5, lr=1e-2, frozen_decoder=True), {("mlp_in", 0): np.zeros(D, np.float32)}
    state = initial_state([config], recipe, means)
    before, update = saes_of(state, [config])[0], jax.jit(sae_update([config], recipe))
    for i in range(5):
        state, _ = update(state, {("mlp_in", 0): jax.random.normal(jax.random.key(i), (TOKENS, D))})
    after = saes_of(state, [config])[0]
    np.testing.assert_allclose(after.w_dec, before.w_dec, atol=1e-6)
    assert float(jnp.max(jnp.abs(after.w_enc - before.w_enc))) > 1e-3


# The start.


def test_a_bilinear_transcoder_with_all_units_starts_as_the_mlp(lm):
    """24 features for 20 hidden units: with all active, each unit counts once, and the four turned ones once more."""
    mlp = {name: leaf[1] for name, leaf in lm.params["layers"]["mlp"].items()}
    x = jax.random.normal(jax.random.key(1), (200, D)) + 1.0
    y = ((x @ mlp["w_l"].T) * (x @ mlp["w_r"].T)) @ mlp["w_p"].T
    config = SAEConfig("mlp_in", 1, D, 2.5, 20, bilinear_encoder=True, target="mlp_out")
    start = start_from(lm, {("mlp_in", 1): x, ("mlp_out", 1): y})
    sae = SAE(start(config, SAE.init(config, jax.random.key(2)).params), config)
    np.testing.assert_allclose(sae.decode_directions(sae.preactivations(x)), y, rtol=1e-3, atol=1e-4)
    assert np.all(np.mean(sae.preactivations(x), axis=0) > 0)  # turned so that they can be the largest
    np.testing.assert_allclose(np.linalg.norm(sae.w_dec, axis=0), 1, rtol=1e-5)
    few = dataclasses.replace(config, expansion=1, k=4)
    chosen = SAE(start(few, SAE.init(few, jax.random.key(2)).params), few)
    sizes = np.sqrt(np.mean(np.asarray(sae.preactivations(x)) ** 2, axis=0))
    np.testing.assert_allclose(
        np.sqrt(np.mean(np.asarray(chosen.preactivations(x)) ** 2, axis=0)), np.sort(sizes)[::-1][:8], rtol=1e-4
    )


def test_a_linear_transcoder_starts_with_the_least_squares_map(lm):
    x = jax.random.normal(jax.random.key(1), (400, D)) + 2.0
    y = x @ jax.random.normal(jax.random.key(3), (D, D)).T + 5.0
    start = start_from(lm, {("mlp_in", 0): x, ("mlp_out", 0): y})
    config = config_of("skip", "topk")
    sae = SAE(start(config, SAE.init(config, jax.random.key(2)).params), config)
    expected = (np.asarray(y) - np.asarray(y).mean(axis=0)) @ np.asarray(sae.w_dec)
    np.testing.assert_allclose(sae.preactivations(x), expected, atol=0.1)
    assert not np.any(sae.params["w_skip"])


def test_a_frozen_decoder_stays_random_with_a_start(lm):
    x = jax.random.normal(jax.random.key(1), (100, D))
    samples, means = {("mlp_in", 0): x, ("mlp_out", 0): x}, {("mlp_out", 0): np.zeros(D, np.float32)}
    config, start = config_of("bilinear", "topk"), start_from(lm, samples)
    states = [initial_state([config], SAERecipe(1, frozen_decoder=frozen), means, start) for frozen in (False, True)]
    started, frozen = (saes_of(state, [config])[0] for state in states)
    random = saes_of(initial_state([config], SAERecipe(1), means), [config])[0]
    np.testing.assert_array_equal(frozen.w_dec, random.w_dec)
    np.testing.assert_array_equal(frozen.params["w_enc"], started.params["w_enc"])
    assert not np.array_equal(started.w_dec, random.w_dec)


# The token lookup.


def test_a_lookup_finds_what_belongs_to_tokens_and_leaves_the_feature_to_the_codes():
    """Each token has a row, and one feature is sparse. Eight features, one active, cannot be 40 rows."""
    rows = np.random.default_rng(0).normal(size=(40, D)).astype(np.float32)
    rows[:, 0] = 0

    def batch(i: int) -> dict:
        random = np.random.default_rng([1, i])
        ids = random.integers(0, 40, 256).astype(np.int32)
        codes = (random.uniform(1, 3, 256) * (random.random(256) < 0.3)).astype(np.float32)
        return {("mlp_in", 0): rows[ids] + codes[:, None] * np.eye(D, dtype=np.float32)[:1], TOKEN_IDS: ids}

    plain = SAEConfig("mlp_in", 0, D, 1, 1, activation="topk_relu", encoder_bias=True)
    configs = [plain, dataclasses.replace(plain, token_lookup=40, tag="lookup")]
    recipe = SAERecipe(steps=1000, batch_size=256, lr=2e-2, final_lr=0.0)
    state = initial_state(configs, recipe, {("mlp_in", 0): np.zeros(D, np.float32)})
    update = jax.jit(sae_update(configs, recipe))
    for i in range(recipe.steps):
        state, _ = update(state, batch(i))
    without, found = saes_of(state, configs)
    new = batch(recipe.steps)
    x, ids = jnp.asarray(new["mlp_in", 0]), new[TOKEN_IDS]
    assert float(jnp.sum((found(x, ids)[0] - x) ** 2) / jnp.sum(x**2)) < 0.005
    assert float(jnp.sum((without(x)[0] - x) ** 2) / jnp.sum(x**2)) > 0.2
    # up to one constant and the feature's own direction, the rows are those that were planted
    learned, planted = (part[:, 1:] - part[:, 1:].mean(axis=0) for part in (np.asarray(found.params["w_lookup"]), rows))
    assert np.sum((learned - planted) ** 2) < 0.05 * np.sum(planted**2)


def test_a_lookup_needs_the_ids_of_the_model(lm, tmp_path):
    """Before any step: a table of another size, or batches without ids."""
    config, tokens = SAEConfig("mlp_in", 0, D, 2, 3, token_lookup=9), np.zeros(3000, np.int32)
    with pytest.raises(ValueError, match=r"token_lookup of 0-mlp-in-x2-k3 is 9, but the model has 10 token ids: set"):
        fit_saes(lm, [config], RECIPE, tokens, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match=r"0-mlp-in-x2-k3 has a token lookup, but the batches have no token ids: give"):
        sae_update([config], RECIPE)(initial_state([config], RECIPE, MEANS), {("mlp_in", 0): np.zeros((4, D))})


def test_dictionaries_with_and_without_a_lookup_are_harvested_together(lm, tmp_path):
    """What is harvested for the plain one stays the same; the other reconstructs what it cannot."""
    tokens = np.random.default_rng(0).integers(0, 10, 3000)
    plain = SAEConfig("resid_pre", 0, D, 1, 1)
    configs = [plain, dataclasses.replace(plain, token_lookup=10, tag="lookup")]
    recipe = SAERecipe(steps=60, batch_size=64, lr=3e-2, buffer_tokens=512, rows=8)
    alone = fit_saes(lm, configs[:1], recipe, tokens, tmp_path / "alone")
    both = fit_saes(lm, configs, recipe, tokens, tmp_path / "both")
    jax.tree.map(np.testing.assert_array_equal, alone[0].params, both[0].params)
    found = evaluate_saes(lm, both, tokens[:160].reshape(10, 16))
    assert found[both[1].name].nmse < 0.5 * found[plain.name].nmse


# Runs.


def both_sites(i: int) -> dict:
    x = jax.random.normal(jax.random.key(i), (64, D))
    ids = jax.random.randint(jax.random.key(i), 64, 0, 12)
    return {("mlp_in", 0): x, ("mlp_out", 0): x**2 - 1, TOKEN_IDS: ids}


ALL = [config_of("bilinear", "batchtopk", 3), config_of("sae", "relu", 3), config_of("lookup", "topk", 3)]
ALL.append(config_of("readable", "topk", 3))
MEANS = {("mlp_in", 0): np.zeros(D, np.float32), ("mlp_out", 0): np.zeros(D, np.float32)}
RECIPE = SAERecipe(steps=8, batch_size=64, lr=1e-2)


def test_kinds_train_in_one_run_which_goes_on_with_the_same_bits(tmp_path):
    whole = train_on_activations(stopped_at(None, both_sites), ALL, RECIPE, tmp_path / "whole", MEANS, save_every=3)
    with pytest.raises(Stopped):
        train_on_activations(stopped_at(5, both_sites), ALL, RECIPE, tmp_path / "halved", MEANS, save_every=3)
    halved = train_on_activations(stopped_at(None, both_sites), ALL, RECIPE, tmp_path / "halved", MEANS, save_every=3)
    for mine, other in zip(halved, whole, strict=True):
        assert mine.config == other.config
        jax.tree.map(np.testing.assert_array_equal, mine.params, other.params)
    assert np.all(np.any(np.asarray(whole[2].params["w_lookup"]), axis=1))
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"nmse.{config.name}" for config in ALL} <= last.keys()


def test_kinds_over_eight_devices_gives_what_one_device_gives():
    mesh = make_mesh(data=2, model=4)
    states = []
    for placed in (None, mesh):
        state = place(initial_state(ALL, RECIPE, MEANS), placed)
        update = jax.jit(sae_update(ALL, RECIPE))
        for i in range(3):
            batch = jax.tree.map(np.asarray, both_sites(i))
            state, _ = update(state, batch if placed is None else place_rows(batch, placed))
        if placed is not None:
            shards = state.params["stack_2"]["w_lookup"].addressable_shards
            assert {shard.data.shape for shard in shards} == {(1, 3, D)}  # 12 ids over 4 devices
        states.append(one_copy(state, placed))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), states[0].params, states[1].params
    )


def test_transcoders_are_harvested_from_both_sites(lm, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 10, 3000)
    configs = [SAEConfig("mlp_in", 1, D, 2, 3, **options) for options in list(TRANSCODERS.values())[1:2]]
    recipe = SAERecipe(steps=60, batch_size=64, lr=1e-2, buffer_tokens=512, rows=8)
    [found] = fit_saes(lm, configs, recipe, tokens, tmp_path)
    captured = lm.capture(tokens[:160].reshape(10, 16), [("mlp_in", 1), ("mlp_out", 1)])
    x, y = captured["mlp_in", 1], captured["mlp_out", 1]
    error = jnp.sum((found(x[:, 1:])[0] - y[:, 1:]) ** 2) / jnp.sum(y[:, 1:] ** 2)
    assert float(error) < 0.6


@pytest.mark.parametrize("number", [2, 3, 30])
def test_places_of_active_features(number):
    assert training_slots(SAEConfig("mlp_in", 0, D, 100, number, activation="batchtopk")) == max(64, 4 * number)
    assert training_slots(SAEConfig("mlp_in", 0, D, 6, number, activation="batchtopk")) == 48
    assert training_slots(SAEConfig("mlp_in", 0, D, 100, number, activation="jumprelu")) == 2 * max(64, 4 * number)


@pytest.mark.parametrize("features", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("slots", [1, 7, 100])
def test_places_are_those_of_the_chosen_features_group_by_group(features, slots):
    rng = np.random.default_rng(features)
    group = rng.integers(0, 3, (20, features))
    group[0], group[1] = 0, 2  # all in the first group; none in any
    indices, counts = places([jnp.asarray(group == 0), jnp.asarray(group == 1)], slots)
    assert indices.shape == (20, slots) and int(indices.max()) < features and int(indices.min()) >= 0
    for row, its, first, both in zip(group, np.asarray(indices), *map(np.asarray, counts), strict=True):
        wanted = [*np.flatnonzero(row == 0), *np.flatnonzero(row == 1)]
        assert (first, both) == (np.sum(row == 0), len(wanted))
        assert its[: min(both, slots)].tolist() == wanted[:slots]


@pytest.mark.parametrize("shape", [(48, 128), (64, 1024), (7, 33)])
def test_least_threshold_is_not_above_that_of_the_batch(shape):
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=shape), np.sort(rng.normal(size=shape)), -rng.random(shape)]
    batches = np.asarray([*drawn, *drawn], np.float32)
    batches[3:, 0, 0] = np.nan

    @jax.jit
    def thresholds(z):
        return [(least_threshold(z, number), batch_threshold(z, number)) for number in (1, 20, 200)]

    for least, of_batch in (pair for z in batches for pair in thresholds(z)):
        assert float(least) <= float(of_batch)
