"""Training SAEs on activations: the optimiser and the loss by hand, stacks, dead features, exact resume, devices."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import Stopped, stopped_at

from bilinear_jax.language import LanguageModel
from bilinear_jax.linalg.scale import unit_columns
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import Transformer, TransformerConfig
from bilinear_jax.training.fit import ByStep, apply_optimizer, cosine_with_warmup
from bilinear_jax.training.mesh import make_mesh, one_copy, place, place_rows
from bilinear_jax.training.sae import fit_saes, sae_update, train_on_activations
from bilinear_jax.training.sae_loss import reconstruction_loss
from bilinear_jax.training.sae_recipe import Loss, SAERecipe
from bilinear_jax.training.sae_state import initial_state, sae_optimizer, saes_of, stacks
from bilinear_jax.training.unit_decoder import unit_decoder

D_MODEL, BATCH = 8, 64
SITES = [("mlp_in", 0), ("mlp_out", 1), ("resid_mid", 1)]
MEANS = {site: np.linspace(-1, 1, D_MODEL, dtype=np.float32) for site in SITES}


def planted(step: int, batch: int = BATCH) -> dict:
    """Two of 16 directions, positively, and a mean: another dictionary for every site."""
    found = {}
    for i, site in enumerate(SITES):
        directions = np.random.default_rng(i).normal(size=(16, D_MODEL))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        random = np.random.default_rng([step, i])
        codes = random.uniform(1, 2, size=(batch, 16)) * (
            random.permuted(np.arange(16) < 2 * np.ones((batch, 1)), axis=1)
        )
        found[site] = (codes @ directions + MEANS[site]).astype(np.float32)
    return found


def configs_of(*options, expansion: int = 3, k: int = 2) -> list[SAEConfig]:
    return [SAEConfig(site, layer, D_MODEL, expansion, k, **dict(options)) for site, layer in SITES]


def advanced(configs, recipe, steps: int, form: str = "scan"):
    """The state after some steps, and the metrics of the last."""
    state, metrics = initial_state(configs, recipe, MEANS), {}
    update = jax.jit(sae_update(configs, recipe, form), donate_argnums=0)
    for step in range(steps):
        state, metrics = update(state, planted(step))
    return state, metrics


# The optimiser.


def test_the_part_of_the_gradient_along_a_column_is_removed_and_the_column_kept_at_unit_length():
    columns = jnp.asarray([[1.0, 0.6], [0.0, 0.8]])
    gradient = {"w_dec": jnp.asarray([[5.0, 1.0], [2.0, 1.0]]), "b_dec": jnp.ones(2)}
    params = {"w_dec": columns, "b_dec": jnp.zeros(2)}
    optimizer = unit_decoder(optax.sgd(0.5))
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["b_dec"], [-0.5, -0.5])
    np.testing.assert_allclose(moved["w_dec"][:, 0], np.array([1, -1]) / np.sqrt(2), rtol=1e-6)  # from (5, 2), (0, 2)
    perpendicular = np.array([1, 1]) - 1.4 * np.array([0.6, 0.8])
    expected = np.array([0.6, 0.8]) - 0.5 * perpendicular
    np.testing.assert_allclose(moved["w_dec"][:, 1], expected / np.linalg.norm(expected), rtol=1e-6)


def test_the_optimiser_finds_the_decoder_at_any_depth_and_along_any_axis():
    columns = unit_columns(jax.random.normal(jax.random.key(0), (4, 6)))
    gradient = jax.random.normal(jax.random.key(1), (4, 6))

    def moved(optimizer, params, gradient):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    as_columns = moved(unit_decoder(optax.sgd(0.1)), {"w_dec": columns}, {"w_dec": gradient})["w_dec"]
    rows, gradient_rows = {"a": {"r": columns.T[None]}}, {"a": {"r": gradient.T[None]}}
    as_rows = moved(unit_decoder(optax.sgd(0.1), "r", axis=-1), rows, gradient_rows)["a"]["r"]
    np.testing.assert_allclose(as_rows[0].T, as_columns, rtol=1e-6)
    assert not np.allclose(as_columns, columns)


def test_the_optimiser_says_what_it_misses():
    optimizer = unit_decoder(optax.sgd(0.1))
    with pytest.raises(ValueError, match="no leaf called 'w_dec'"):
        optimizer.init({"w_enc": jnp.ones(2)})
    with pytest.raises(ValueError, match="needs the params"):
        optimizer.update({"w_dec": jnp.ones((2, 2))}, optimizer.init({"w_dec": jnp.ones((2, 2))}))


def test_the_learning_rate_goes_from_lr_to_final_lr():
    recipe = SAERecipe(steps=100)
    rate = cosine_with_warmup(recipe.lr, recipe.steps, recipe.warmup, recipe.final_lr)
    np.testing.assert_allclose([rate(0), rate(50), rate(100)], [1e-4, 6e-5, 2e-5], rtol=1e-5)


# The loss and the step.


def test_the_loss_by_hand():
    """W_dec = W_enc^T = I, k = 1, no biases: (3, 1) becomes (3, 0), (0, 2) itself; 1 of 9 + 1 + 4 is missed."""
    config = SAEConfig("mlp_in", 0, d_model=2, expansion=1, k=1)
    params = {"w_enc": jnp.eye(2), "w_dec": jnp.eye(2), "b_dec": jnp.zeros(2)}
    loss, parts = reconstruction_loss(config, params, jnp.asarray([[3.0, 1.0], [0.0, 2.0]]))
    np.testing.assert_allclose(loss, 1 / 14, rtol=1e-6)
    assert parts["fired"].tolist() == [True, True] and "aux" not in parts


def test_no_input_at_all_costs_nothing():
    """A batch of zeros must not make anything nan; codes of exactly 0 are no firing."""
    config = SAEConfig("mlp_in", 0, d_model=2, expansion=2, k=1)
    params = SAE.init(config, jax.random.key(0)).params
    loss_of = jax.value_and_grad(lambda p: reconstruction_loss(config, p, jnp.zeros((3, 2))), has_aux=True)
    (loss, parts), gradient = jax.jit(loss_of)(params)
    assert float(loss) == 0 and not np.any(parts["fired"])
    assert all(np.all(np.isfinite(leaf)) for leaf in gradient.values())


@pytest.mark.parametrize("form", ["scan", "dense"])
def test_steps_are_those_of_dense_autodiff_on_the_published_parameters(form):
    """Three updates of one SAE by the definition of the loss and the optimiser, with nothing stacked or transposed."""
    config = SAEConfig(*SITES[1], D_MODEL, 3, 2)
    recipe = SAERecipe(steps=10, batch_size=BATCH, lr=1e-2, final_lr=1e-3)
    rate = cosine_with_warmup(recipe.lr, recipe.steps, recipe.warmup, recipe.final_lr)
    optimizer = unit_decoder(optax.adam(rate))

    def dense_loss(params, x):
        z = (x - params["b_dec"][None]) @ params["w_enc"].T
        codes = jnp.where(z >= jax.lax.top_k(z, config.k)[0][:, -1:], z, 0.0)
        reconstruction = codes @ params["w_dec"].T + params["b_dec"][None]
        return jnp.sum((x - reconstruction) ** 2) / jnp.sum(x**2)

    start = initial_state([config], recipe, MEANS)
    params = saes_of(start, [config])[0].params
    expected = start._replace(params=params, opt_state=optimizer.init(params))
    gradient, apply = jax.jit(jax.value_and_grad(dense_loss)), jax.jit(functools.partial(apply_optimizer, optimizer))
    loss = None
    for step in range(3):
        loss, found = gradient(expected.params, jnp.asarray(planted(step)[SITES[1]]))
        params, opt_state = apply(found, expected)
        expected = expected._replace(params=params, opt_state=opt_state)
    state, metrics = advanced([config], recipe, 3, form)
    np.testing.assert_allclose(metrics[f"nmse.{config.name}"], loss, rtol=1e-5)
    found = saes_of(state, [config])[0].params
    assert found.keys() == expected.params.keys()
    for name, leaf in expected.params.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(np.linalg.norm(found["w_dec"], axis=0), 1, rtol=1e-6)


def test_saes_that_are_alike_are_stacked():
    one, two, three = configs_of()
    wide = SAEConfig("mlp_in", 0, D_MODEL, 4, 2)
    through = SAEConfig("mlp_in", 0, D_MODEL, 3, 2, passthrough=(1,), tag="through")
    assert list(stacks([one, wide, two, through, three]).values()) == [(one, two, three), (wide,), (through,)]
    with pytest.raises(ValueError, match="have the same name: give them different tags"):
        stacks([one, one])
    with pytest.raises(ValueError, match="at least one SAE"):
        stacks([])


ALIKE, OTHERS = configs_of(), configs_of(("encoder_bias", True), expansion=2, k=3)
CROWD = [OTHERS[0], ALIKE[0], ALIKE[1], ALIKE[2]]
CROWD_RECIPE = SAERecipe(steps=10, batch_size=BATCH, lr=1e-2, final_lr=1e-3, k_aux=2, dead_after=2 * BATCH)


@pytest.fixture(scope="module")
def crowd():
    """SAEs of two shapes after four steps, by when some features count as dead; and the last metrics."""
    return advanced(CROWD, CROWD_RECIPE, 4)


def test_an_sae_does_not_depend_on_who_is_trained_beside_it(crowd):
    """Neither its start nor its steps: alone, and as one of three alike among others of another shape."""
    together = saes_of(crowd[0], CROWD)
    assert [sae.config for sae in together] == CROWD
    alone = saes_of(advanced(CROWD[2:3], CROWD_RECIPE, 4)[0], CROWD[2:3])[0]
    for name, leaf in alone.params.items():
        np.testing.assert_allclose(together[2].params[name], leaf, rtol=1e-6, atol=1e-7, err_msg=name)


def test_bfloat16_activations_are_computed_with_in_float32():
    configs, recipe = configs_of(), SAERecipe(steps=10, batch_size=BATCH)
    low = {site: jnp.asarray(x, jnp.bfloat16) for site, x in planted(0).items()}
    high = {site: x.astype(jnp.float32) for site, x in low.items()}
    update = jax.jit(sae_update(configs, recipe))
    pair = [update(initial_state(configs, recipe, MEANS), batch) for batch in (low, high)]
    jax.tree.map(np.testing.assert_array_equal, *pair)


# Dead features.


def test_counters_count_tokens_since_a_feature_fired():
    """Encoder and decoder are the identity, k = 1, 10 tokens a batch: the largest coordinate's feature fires."""
    config = SAEConfig("mlp_in", 0, d_model=4, expansion=1, k=1)
    recipe = SAERecipe(steps=10, batch_size=10, lr=0.0, final_lr=0.0, dead_after=25)
    state = initial_state([config], recipe, {("mlp_in", 0): np.zeros(4, np.float32)})
    eye = jnp.eye(4)[None]
    state = state._replace(params={"stack_0": state.params["stack_0"] | {"w_enc": eye, "w_dec_rows": eye}})
    update, seen = jax.jit(sae_update([config], recipe)), []
    x = np.tile(np.asarray([[3.0, 1.0, 0.0, 0.0]], np.float32), (10, 1))
    for _ in range(3):
        state, metrics = update(state, {("mlp_in", 0): x})
        seen.append((state.extra["stack_0"]["quiet"][0].tolist(), float(metrics[f"dead.{config.name}"])))
    assert seen == [([0, 10, 10, 10], 0.0), ([0, 20, 20, 20], 0.0), ([0, 25, 25, 25], 0.75)]
    state, metrics = update(state, {("mlp_in", 0): np.roll(x, 1, axis=1)})
    assert state.extra["stack_0"]["quiet"][0].tolist() == [10, 0, 25, 25]
    assert float(metrics[f"dead.{config.name}"]) == 0.5


def test_the_auxiliary_loss_by_hand():
    """x = (3, 2, 1, 0), the identity, k = 1: the error is (0, 2, 1, 0). Of the dead 2 and 3, feature 2 gives
    (0, 0, 1, 0), which leaves 4 of 5; feature 1 would give more, and is alive."""
    config = SAEConfig("mlp_in", 0, d_model=4, expansion=1, k=1)
    params = {"w_enc": jnp.eye(4), "w_dec": jnp.eye(4), "b_dec": jnp.zeros(4)}
    x, dead = jnp.asarray([[3.0, 2.0, 1.0, 0.0]]), jnp.asarray([False, False, True, True])

    def loss(params, dead):
        return reconstruction_loss(config, params, x, dead=dead, loss=Loss(1, 0.5))

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, parts), gradient = both(params, dead)
    np.testing.assert_allclose(parts["aux"], 4 / 5, rtol=1e-6)
    np.testing.assert_allclose(total, 5 / 14 + 0.5 * 4 / 5, rtol=1e-6)
    # d/d w_dec[:, 2] of 1/2 |e - w_dec[:, 2] z|^2 / |e|^2 = -(e - e_hat) z / |e|^2 = -(0, 2, 0, 0) / 5
    np.testing.assert_allclose(gradient["w_dec"][:, 2], [0, -2 / 5, 0, 0], atol=1e-6)
    (total, parts), _ = both(params, jnp.zeros(4, bool))
    np.testing.assert_allclose([total, parts["aux"]], [5 / 14, 0], rtol=1e-6)


def test_the_auxiliary_loss_revives_a_planted_dead_feature():
    """Tokens are (9, 0) and (1, 3). Feature 1 has the decoder (0, 1) that the second kind misses, but its encoder row
    (0, -0.1) loses against feature 0's (1, 0): without the auxiliary loss nothing moves it."""
    config = SAEConfig("mlp_in", 0, d_model=2, expansion=1, k=1)
    x = np.tile(np.asarray([[9.0, 0.0], [1.0, 3.0]], np.float32), (5, 1))

    def last(k_aux: int):
        recipe = SAERecipe(steps=100, batch_size=10, lr=1e-2, final_lr=1e-2, dead_after=25, k_aux=k_aux)
        state = initial_state([config], recipe, {("mlp_in", 0): np.zeros(2, np.float32)})
        planted_dead = {"w_enc": jnp.asarray([[[1.0, 0.0], [0.0, -0.1]]]), "w_dec_rows": jnp.eye(2)[None]}
        state = state._replace(params={"stack_0": state.params["stack_0"] | planted_dead})
        update, metrics = jax.jit(sae_update([config], recipe)), {}
        for _ in range(recipe.steps):
            state, metrics = update(state, {("mlp_in", 0): x})
        return state.extra["stack_0"]["quiet"][0].tolist(), float(metrics[f"nmse.{config.name}"])

    (without, missed), (revived, missed_less) = last(k_aux=0), last(k_aux=1)
    assert without == [0, 25] and revived == [0, 0]
    assert missed_less < 0.5 * missed


# Runs.


def test_saes_learn_a_planted_dictionary_together(tmp_path):
    configs = configs_of()
    recipe = SAERecipe(steps=300, batch_size=BATCH, lr=2e-2, final_lr=1e-3, form="scan")
    saes = train_on_activations(ByStep(planted), configs, recipe, tmp_path, MEANS)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for sae, config in zip(saes, configs, strict=True):
        assert sae.config == config
        assert lines[-1][f"nmse.{sae.name}"] < min(0.1, 0.6 * lines[0][f"nmse.{sae.name}"])
        np.testing.assert_allclose(np.linalg.norm(sae.w_dec, axis=0), 1, rtol=1e-6)


def test_a_run_that_goes_on_has_the_same_form_and_the_same_bits(tmp_path, monkeypatch):
    """The second half would be measured to be fastest in another form."""
    configs = configs_of()
    recipe = SAERecipe(steps=12, batch_size=BATCH, dead_after=3 * BATCH, k_aux=2, form="fastest")
    measured = iter(["gather", "gather", "dense"])
    monkeypatch.setattr("bilinear_jax.training.sae.fastest_form", lambda *shape: next(measured))

    whole = train_on_activations(stopped_at(None, planted), configs, recipe, tmp_path / "whole", MEANS, save_every=5)
    with pytest.raises(Stopped):
        train_on_activations(stopped_at(7, planted), configs, recipe, tmp_path / "halved", MEANS, save_every=5)
    halved = train_on_activations(stopped_at(None, planted), configs, recipe, tmp_path / "halved", MEANS, save_every=5)
    for mine, other in zip(halved, whole, strict=True):
        for name, leaf in other.params.items():
            np.testing.assert_array_equal(mine.params[name], leaf, err_msg=name)
    assert json.loads((tmp_path / "halved" / "config.json").read_text())["form"] == "gather"
    assert next(measured) == "dense"  # nothing was measured a third time


def test_two_runs_of_one_recipe_have_the_same_bits(tmp_path, monkeypatch):
    """Nothing is timed unless it is asked for: timing could choose another form, and so other bits, the second time."""
    measured = iter(["gather", "dense"])
    monkeypatch.setattr("bilinear_jax.training.sae.fastest_form", lambda *shape: next(measured))
    recipe = SAERecipe(steps=4, batch_size=BATCH)
    one, other = (
        train_on_activations(ByStep(planted), configs_of(), recipe, tmp_path / name, MEANS, save_every=4)
        for name in "ab"
    )
    for mine, its in zip(one, other, strict=True):
        for name, leaf in its.params.items():
            np.testing.assert_array_equal(mine.params[name], leaf, err_msg=name)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["form"] == "scan"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    config = TransformerConfig(n_layer=2, n_head=2, d_model=D_MODEL, d_hidden=16, n_ctx=16, n_vocab=10)
    tokens = jnp.zeros((1, 16), jnp.int32)
    return LanguageModel(jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"], config)


def test_training_on_text_goes_on_with_the_same_bits(lm, tmp_path):
    """The ninth step fails once; the eighth, amid a chunk of the activation buffer, was saved."""
    configs, tokens = configs_of()[:2], np.random.default_rng(0).integers(0, 10, 3000)
    recipe = SAERecipe(steps=9, batch_size=32, lr=1e-2, final_lr=1e-2, buffer_tokens=96, rows=4, form="scan")

    def stop(step, metrics):
        raise Stopped

    def run(name: str, log=None):
        return fit_saes(lm, configs, recipe, tokens, tmp_path / name, save_every=4, log=log)

    whole = run("whole")
    with pytest.raises(Stopped):
        run("halved", stop)
    for mine, other in zip(run("halved"), whole, strict=True):
        assert mine.w_dec.shape == (D_MODEL, 24)
        for name, leaf in other.params.items():
            np.testing.assert_array_equal(mine.params[name], leaf, err_msg=name)
    tokens[1000] = (tokens[1000] + 1) % 10
    with pytest.raises(ValueError, match=r"another config \(data_sha256: '\w{64}' -> '\w{64}'\)"):
        run("whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"configs": []}, "configs is empty: give at least one SAE to train"),
        (
            {"configs": [SAEConfig("mlp_in", 0, 2 * D_MODEL, 2, 2)]},
            "has d_model 8, but these SAEs another: 0-mlp-in-x2",
        ),
        ({"tokens": np.arange(3000)}, "outside the vocabulary"),
        ({"tokens": np.zeros(3000)}, "got float64 of shape"),
        ({"keep_every": 0}, "keep_every, .* must be at least 1"),
    ],
)
def test_what_cannot_be_trained_on_is_named(lm, tmp_path, change, message):
    recipe = SAERecipe(steps=1, batch_size=60, buffer_tokens=60, rows=4, form="scan")
    given = {"configs": configs_of()[:1], "tokens": np.zeros(3000, np.int32)} | change
    with pytest.raises(ValueError, match=message):
        fit_saes(lm, recipe=recipe, directory=tmp_path, **given)


@pytest.mark.parametrize("form", [3, "fast", [1]])
def test_a_form_of_nonsense_in_the_runs_config_is_named(lm, tmp_path, form):
    (tmp_path / "config.json").write_text(json.dumps({"form": form}))
    (tmp_path / "lock").touch()
    with pytest.raises(ValueError, match=r"unknown form .* of the sparse products; choose one of"):
        fit_saes(
            lm,
            configs_of()[:1],
            SAERecipe(steps=1, batch_size=32, rows=4, buffer_tokens=96, form="fastest"),
            np.zeros(3000, int),
            tmp_path,
        )


def test_a_buffer_larger_than_the_memory_names_the_mend(lm, tmp_path):
    recipe = SAERecipe(steps=1, batch_size=60, buffer_tokens=10**12, rows=4, form="scan")
    with pytest.raises(RuntimeError, match=r"a buffer of \d\d,[\d,]+ bytes: RESOURCE_EXHAUSTED.* Lower buffer_tokens"):
        fit_saes(lm, configs_of()[:1], recipe, np.zeros(3000, np.int32), tmp_path)


def test_decoder_biases_start_at_the_mean_activation(lm, tmp_path, monkeypatch):
    """Of the tokens that count, so without position 0; and nothing of the data is used up by it."""
    given: list = []
    monkeypatch.setattr(
        "bilinear_jax.training.sae.train_on_activations", lambda *args, **options: given.extend(args) or []
    )
    tokens = np.random.default_rng(0).integers(0, 10, 3000)
    recipe = SAERecipe(steps=1, batch_size=60, buffer_tokens=60, rows=4)
    fit_saes(lm, configs_of(), recipe, tokens, tmp_path)
    data, *_, means = given
    for site, served in next(data).items():  # 4 rows of 15 tokens that count, shuffled
        np.testing.assert_allclose(means[site], np.mean(served, axis=0), rtol=1e-4, atol=1e-5)


def test_windows_may_be_shorter_than_the_context(lm, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 10, 3000)
    recipe = SAERecipe(steps=2, batch_size=60, buffer_tokens=60, rows=4, n_ctx=8)
    short = dataclasses.replace(lm, config=dataclasses.replace(lm.config, n_ctx=8))
    found = fit_saes(lm, configs_of()[:1], recipe, tokens, tmp_path / "window")
    expected = fit_saes(short, configs_of()[:1], dataclasses.replace(recipe, n_ctx=None), tokens, tmp_path / "context")
    jax.tree.map(np.testing.assert_array_equal, found[0].params, expected[0].params)
    with pytest.raises(ValueError, match=f"n_ctx is 99, but the context of the model is {lm.config.n_ctx}: lower it"):
        fit_saes(lm, configs_of()[:1], dataclasses.replace(recipe, n_ctx=99), tokens, tmp_path / "long")


def test_the_model_may_run_in_bfloat16(lm, tmp_path, monkeypatch):
    served: list = []
    monkeypatch.setattr(
        "bilinear_jax.training.sae.train_on_activations", lambda data, *_, **__: served.append(next(data)) or []
    )
    tokens = np.random.default_rng(0).integers(0, 10, 3000)
    recipe = SAERecipe(steps=1, batch_size=60, buffer_tokens=60, rows=4)
    for dtype in (None, "bfloat16"):
        fit_saes(lm, configs_of(), dataclasses.replace(recipe, compute_dtype=dtype), tokens, tmp_path)
    for site, exact in served[0].items():
        assert not np.array_equal(exact, served[1][site])
        np.testing.assert_allclose(exact, served[1][site], atol=0.05 * float(np.abs(exact).max()))


def test_features_over_eight_devices_give_what_one_device_gives(crowd):
    mesh = make_mesh(data=2, model=4)
    state = place(initial_state(CROWD, CROWD_RECIPE, MEANS), mesh)
    update, metrics = jax.jit(sae_update(CROWD, CROWD_RECIPE), donate_argnums=0), {}
    for step in range(4):
        state, metrics = update(state, place_rows(planted(step), mesh))
    rows = state.params["stack_1"]["w_dec_rows"]
    assert {shard.data.shape for shard in rows.addressable_shards} == {(3, 24 // 4, D_MODEL)}
    expected, expected_metrics = crowd
    assert any(name.startswith("aux") and value > 0 for name, value in expected_metrics.items())
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    state = one_copy(state, mesh)
    jax.tree.map(np.testing.assert_array_equal, state.extra, expected.extra)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), state.params, expected.params)


def test_the_optimisers_state_has_one_count_and_two_moments():
    configs, recipe = configs_of(), SAERecipe(steps=10)
    state = initial_state(configs, recipe, MEANS)
    sizes = sorted({leaf.shape for leaf in jax.tree.leaves(sae_optimizer(recipe).init(state.params))})
    assert sizes == [(), (3, 8), (3, 24, 8)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(steps=10**30), "steps must be at most 2147483647, got 10{30}$"),
        (dict(k_aux=2**31), "k_aux must be at most 2147483647, got 2147483648"),
        (dict(k_aux=-1), "k_aux must be a number that is not negative, got -1"),
        (dict(aux_coefficient=float("nan")), "aux_coefficient must be a number that is not negative"),
        (dict(lr=float("inf")), "lr must be a number that is not negative, got inf"),
        (dict(seed=2**32), "seed must lie in 0 ... 2.32 - 1"),
        (dict(final_lr=1.0), r"final_lr must lie in 0 ... lr \(0.0001\), got 1.0"),
        (dict(dead_after=2**31), "dead_after must be below"),
        (dict(n_ctx=1), "n_ctx must be at least 2: position 0 is not trained on, got 1"),
        (dict(compute_dtype="half"), "compute_dtype must be float32, bfloat16 or none; got 'half'"),
        (dict(form="fast"), "form is 'fast', but it must be one of scan, gather, dense, fastest"),
    ],
)
def test_bad_recipes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SAERecipe(**(dict(steps=10) | change))
