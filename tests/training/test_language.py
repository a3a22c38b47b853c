"""The language recipe: what an update is, annealing a gate away, and micro runs past fixed marks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tokenizers import processors

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sites import forward
from bilinear_jax.nn.transformer import MLP, TransformerConfig
from bilinear_jax.store.tokenizers import save_tokenizer, train_tokenizer
from bilinear_jax.training import language
from bilinear_jax.training.batches import held_out_rows
from bilinear_jax.training.language import (
    LanguageRecipe,
    dropout,
    fit_language,
    initial_state,
    language_optimizer,
    language_update,
    without_gate,
)
from bilinear_jax.training.mesh import make_mesh

CONFIG = TransformerConfig(n_layer=2, n_head=2, d_model=16, d_hidden=32, n_ctx=16, n_vocab=8, pad_id=0)
GATED = dataclasses.replace(CONFIG, gate="silu", bias=True)


def stream(seed: int, length: int) -> np.ndarray:
    """A language that a small model can learn: a token and the one before decide the next, 1 time in 8 by chance."""
    random = np.random.default_rng(seed)
    tokens = [1, 2]
    while len(tokens) < length:
        rule = 1 + (2 * tokens[-1] + tokens[-2]) % 7
        tokens.append(rule if random.random() < 7 / 8 else int(random.integers(1, 8)))
    return np.asarray(tokens, np.int32)


TRAINING, HELD_OUT = stream(0, 20_000), held_out_rows(stream(1, 2_000), CONFIG.n_ctx)
BATCH = TRAINING[: 16 * 16].reshape(16, 16)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_update(config, batch=BATCH, params=None, **fields):
    recipe = LanguageRecipe(**({"steps": 100, "batch_size": 16, "clip": 0.1} | fields))
    start = initial_state(config, recipe, params)
    return jax.jit(language_update(config, recipe))(start, jnp.asarray(batch))


# A run


@pytest.fixture(scope="module")
def swiglu(tmp_path_factory):
    """A SwiGLU model trained by the published recipe, and what was logged."""
    directory = tmp_path_factory.mktemp("swiglu")
    recipe = LanguageRecipe(steps=200, batch_size=32, lr=1e-2, warmup=10)
    config, params = fit_language(GATED, recipe, TRAINING, HELD_OUT, directory, evaluate_every=100)
    assert config is GATED
    return params, lines(directory / "metrics.jsonl")


def test_adamw_learns_the_rule(swiglu):
    """Chance is log 7 = 1.95 nats. The rule's own entropy: p = 7/8 + 1/56 for the right token, 1/56 for each of
    the six others, which is 0.10 + 0.43 = 0.53 nats."""
    params, metrics = swiglu
    held_out = [entry["held_out_loss"] for entry in metrics if "held_out_loss" in entry]
    assert len(held_out) == 2
    assert held_out[-1] < held_out[0] < 1.95
    assert held_out[-1] < 0.9
    np.testing.assert_allclose(LanguageModel(params, GATED).loss(HELD_OUT), held_out[-1], rtol=1e-4)


def test_muon_learns_the_rule(tmp_path):
    recipe = LanguageRecipe(steps=150, batch_size=16, optimizer="muon", lr=0.02, warmup=10, decay="cosine")
    fit_language(CONFIG, recipe, TRAINING, HELD_OUT, tmp_path)
    assert lines(tmp_path / "metrics.jsonl")[-1]["held_out_loss"] < 0.95


# One update


@pytest.fixture(scope="module")
def whole():
    """The first update of all rows at once: the new state, and its metrics."""
    return one_update(CONFIG)


def assert_same_update(one, other):
    """Adam's first moment after one step is a tenth of the clipped gradient: that must agree, and so the metrics."""
    (state, metrics), (expected_state, expected) = one, other
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, expected)
    moments = [optax.tree.get(state.opt_state, "mu") for state in (state, expected_state)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *moments)


@pytest.mark.parametrize("fields", [{"accumulation": 4, "remat": "layer"}, {"accumulation": 2}], ids=str)
def test_parts_of_a_batch_add_up_to_the_batch(whole, fields):
    assert_same_update(one_update(CONFIG, **fields), whole)


def test_the_gradient_is_clipped_and_its_norm_logged(whole):
    """Against the definition: the mean loss over all tokens but the first of each row."""

    def mean_loss(params):
        log_p = jax.nn.log_softmax(forward(CONFIG, params, jnp.asarray(BATCH)))
        return -jnp.mean(jnp.take_along_axis(log_p[:, :-1], jnp.asarray(BATCH)[:, 1:, None], axis=-1))

    state, metrics = whole
    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(initial_state(CONFIG, LanguageRecipe(steps=1)).params)
    norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient)))
    assert norm > 0.11
    np.testing.assert_allclose([metrics["loss"], metrics["gradient_norm"]], [loss, norm], rtol=1e-5)
    moment = optax.tree.get(state.opt_state, "mu")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 0.1 * 0.1 / norm * b, rtol=1e-3, atol=1e-8), moment, gradient
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_and_not_biases(optimizer):
    """With no gradient, a weight loses lr * weight_decay of itself; the embeddings only in AdamW."""
    recipe = LanguageRecipe(steps=10, optimizer=optimizer, lr=0.5, weight_decay=0.1, warmup=0)
    params = jax.tree.map(jnp.ones_like, initial_state(GATED, recipe).params)
    rule = language_optimizer(recipe)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(rule.update)(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    changed = jax.tree_util.tree_map_with_path(lambda path, leaf: (path[-1].key, float(jnp.mean(leaf))), updates)
    for name, change in jax.tree.leaves(changed, is_leaf=lambda leaf: isinstance(leaf, tuple)):
        kept = name.startswith("b_") or (optimizer == "muon" and name in ("w_e", "w_u"))
        np.testing.assert_allclose(change, 0 if kept else -0.05, atol=1e-6, err_msg=name)


def test_learning_rates_rise_and_fall_as_the_recipe_says():
    linear = LanguageRecipe(steps=100, lr=1.0, warmup=10, final=0.2).rate(1.0)
    cosine = LanguageRecipe(steps=100, lr=1.0, warmup=10, final=0.2, decay="cosine").rate(1.0)
    np.testing.assert_allclose([linear(s) for s in (0, 5, 10, 55, 100)], [0, 0.5, 1, 0.6, 0.2], atol=1e-6)
    np.testing.assert_allclose([cosine(s) for s in (0, 5, 10, 55, 100)], [0, 0.5, 1, 0.6, 0.2], atol=1e-6)
    assert linear(32) < cosine(32)
    assert LanguageRecipe(steps=100, warmup=0).rate(1.0)(0) == 1


def test_bfloat16_is_of_activations_only(whole):
    low, low_metrics = one_update(CONFIG, compute_dtype="bfloat16")
    metrics = whole[1]
    assert {leaf.dtype for leaf in jax.tree.leaves((low.params, optax.tree.get(low.opt_state, "mu")))} == {
        jnp.dtype("float32")
    }
    assert low_metrics["loss"].dtype == jnp.float32
    assert 0 < abs(low_metrics["loss"] / metrics["loss"] - 1) < 0.01
    assert abs(low_metrics["gradient_norm"] / metrics["gradient_norm"] - 1) < 0.05


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The folders of one run, on one device, and on a mesh: rows over 4 devices, weights over 2, in two parts."""
    folder = tmp_path_factory.mktemp("runs")
    save_tokenizer(train_tokenizer(["once upon a time"] * 3, n_vocab=257), folder)
    config = dataclasses.replace(CONFIG, n_vocab=257)
    recipe = LanguageRecipe(steps=3, batch_size=16, warmup=0, lr=1e-2, accumulation=2)
    (folder / "one").mkdir()
    (folder / "one" / "samples.jsonl").write_text('{"step": 2, "text": "old"}\n{"step": 9, "text": "old"}\n')
    for name, mesh in {"one": None, "mesh": make_mesh(data=4, model=2)}.items():
        options = {"tokenizer": folder, "prompts": ["once", "a"], "mesh": mesh, "evaluate_every": 1}
        _, params = fit_language(config, recipe, TRAINING, HELD_OUT[:8], folder / name, **options)
    assert params["layers"]["mlp"]["w_l"].sharding.spec == jax.sharding.PartitionSpec(None, "model", None)
    return folder / "one", folder / "mesh"


def test_a_run_on_a_mesh_is_the_run_of_one_device(two_runs):
    one, mesh = (lines(folder / "metrics.jsonl") for folder in two_runs)
    assert len(one) == 3
    for entry, other in zip(one, mesh, strict=True):
        for key in ("loss", "gradient_norm", "held_out_loss"):
            assert entry[key] == pytest.approx(other[key], rel=1e-5)


def test_samples_go_on_without_the_end_that_the_tokenizer_puts_after_texts(tmp_path):
    tokenizer = train_tokenizer(["once upon a time"] * 3, n_vocab=257)
    end = "<|endoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 0)])
    save_tokenizer(tokenizer, tmp_path)
    config = dataclasses.replace(CONFIG, n_vocab=257)
    with pytest.warns(UserWarning, match=r"puts '<\|endoftext\|>' after every text: the samples go on") as told:
        language._check_prompts(config, tmp_path, ["once", "a"])
        lm = dataclasses.replace(LanguageModel.init(config, jax.random.key(0)), tokenizer_source=str(tmp_path))
        language._add_samples(tmp_path / "samples.jsonl", 1, lm, ["once"])
    assert len(told) == 1
    expected = lm.generate("once", max_length=CONFIG.n_ctx - 4, seed=1, keep_end=False)
    assert lines(tmp_path / "samples.jsonl") == [{"step": 1, "text": expected}]


def test_another_text_of_the_same_length_is_another_run(tmp_path, monkeypatch):
    known = []

    def fit(*_, config, **options):
        known.append(config)
        raise InterruptedError

    monkeypatch.setattr("bilinear_jax.training.language.fit", fit)
    for tokens in (TRAINING, TRAINING.copy(), TRAINING[::-1]):
        with pytest.raises(InterruptedError):
            fit_language(CONFIG, LanguageRecipe(steps=1, batch_size=2), tokens, HELD_OUT, tmp_path)
    assert known[0] == known[1]
    assert {key for key in known[0] if known[0][key] != known[2][key]} == {"data_sha256"}


def test_samples_are_written_once_each_whatever_was_there(two_runs):
    """At every evaluation; what a run that was cut short wrote for a later step is written again, not twice."""
    one, mesh = (lines(folder / "samples.jsonl") for folder in two_runs)
    assert [entry["step"] for entry in one] == [1, 1, 2, 2, 3, 3]
    assert [entry["text"].startswith(prompt) for entry, prompt in zip(one, ["once", "a"] * 3, strict=True)]
    assert "old" not in {entry["text"] for entry in one}
    assert one == mesh


# Annealing


def test_beta_falls_from_1_to_exactly_0_over_its_share_of_the_steps():
    recipe = LanguageRecipe(steps=70, anneal=0.3)
    betas = [float(recipe.beta(jnp.int32(step))) for step in (0, 7, 20, 21, 69)]
    np.testing.assert_allclose(betas[:3], [1, 1 - 7 / 21, 1 / 21], rtol=1e-5)
    assert betas[3:] == [0, 0]
    assert LanguageRecipe(steps=70).beta(jnp.int32(3)) is None


def test_the_folded_model_is_the_gated_one_at_beta_0_bit_for_bit(swiglu):
    params, _ = swiglu
    config, folded = without_gate(GATED, params)
    assert config == dataclasses.replace(GATED, gate=None)
    tokens = jnp.asarray(HELD_OUT[:4])
    gated = jax.jit(lambda p: forward(GATED, p, tokens, beta=jnp.asarray(0.0)))(params)
    np.testing.assert_array_equal(jax.jit(lambda p: forward(config, p, tokens))(folded), gated)
    assert np.max(np.abs(gated - forward(GATED, params, tokens))) > 0.1


def test_a_trained_swiglu_ends_bilinear(swiglu, tmp_path):
    """The gate is gone (without its biases the MLP is an even function), and the loss is hardly above the SwiGLU's."""
    params, before = swiglu
    recipe = LanguageRecipe(steps=100, batch_size=32, lr=3e-3, warmup=5, anneal=0.3)
    config, folded = fit_language(GATED, recipe, TRAINING, HELD_OUT, tmp_path, params=params, evaluate_every=20)
    metrics = lines(tmp_path / "metrics.jsonl")
    assert {entry["step"]: entry["beta"] for entry in metrics}[40] == 0
    assert metrics[0]["beta"] == pytest.approx(1 - 19 / 30)
    assert config.gate is None
    mlp = {name: leaf[0] for name, leaf in folded["layers"]["mlp"].items()}
    mlp |= {"b_l": jnp.zeros(32), "b_r": jnp.zeros(32)}
    x = jax.random.normal(jax.random.key(0), (5, 16))
    both = [MLP(config).apply({"params": mlp}, sign * x) for sign in (1, -1)]
    np.testing.assert_array_equal(*both)
    np.testing.assert_allclose(LanguageModel(folded, config).loss(HELD_OUT), metrics[-1]["held_out_loss"], rtol=1e-5)
    assert metrics[-1]["held_out_loss"] < before[-1]["held_out_loss"] + 0.05
    assert params["w_u"].sum() != folded["w_u"].sum()  # the start is still there: it was not donated
    with pytest.raises(ValueError, match="start:"):
        fit_language(GATED, recipe, TRAINING, HELD_OUT, tmp_path)


def test_fine_tuning_starts_at_the_start(swiglu):
    params, _ = swiglu
    _, metrics = one_update(GATED, HELD_OUT[:16], params=params, anneal=0.3)
    np.testing.assert_allclose(metrics["loss"], LanguageModel(params, GATED).loss(HELD_OUT[:16]), rtol=1e-5)
    assert metrics["beta"] == 1


@pytest.mark.parametrize("change", [{"gate": None}, {"gate": "relu"}, {"bilinear": False}], ids=str)
def test_only_a_swiglu_can_be_annealed(change, tmp_path):
    config = dataclasses.replace(GATED, **change)
    with pytest.raises(ValueError, match="a SwiGLU model, with gate='silu' and bilinear=True, but this model has"):
        fit_language(config, LanguageRecipe(steps=1, anneal=0.3), TRAINING, HELD_OUT, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": HELD_OUT[:0]}, r"held_out must be token ids \[rows, seq\] .* of shape \(0, "),
        ({"held_out": HELD_OUT[:, :1]}, r"2 \.\.\. \d+ per row"),
        ({"held_out": HELD_OUT.astype(float)}, "got float64"),
        ({"held_out": HELD_OUT - 1000}, "from -"),
        ({"tokens": TRAINING + 1000}, "lie outside the vocabulary"),
        ({"save_every": 0}, "save_every, .* must be at least 1"),
    ],
)
def test_what_cannot_be_trained_on_is_told_before_a_step(tmp_path, change, message):
    """And not as a loss that is NaN, or null on held-out text."""
    given = {"config": CONFIG, "tokens": TRAINING, "held_out": HELD_OUT} | change
    with pytest.raises(ValueError, match=message):
        fit_language(recipe=LanguageRecipe(steps=2, batch_size=2), directory=tmp_path, **given)


@pytest.mark.parametrize("prompt", ["once " * 20, ""])
def test_a_prompt_that_cannot_be_continued_is_told_before_a_step(tmp_path, prompt):
    """And not at the first evaluation, where what was trained until then would be lost."""
    tokenizer = train_tokenizer(["once upon a time"] * 3, n_vocab=257)
    tokenizer.post_processor = processors.Sequence([])
    save_tokenizer(tokenizer, tmp_path)
    recipe, prompts = LanguageRecipe(steps=2, batch_size=2), ["o", prompt]
    with pytest.raises(
        ValueError, match=rf"the prompt {prompt!r} has {len(prompt)} tokens, .* to be continued .*: give another"
    ):
        fit_language(CONFIG, recipe, TRAINING, HELD_OUT, tmp_path / "run", tokenizer=tmp_path, prompts=prompts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of 'adamw', 'muon'; got 'sgd'"),
        ({"decay": "sqrt"}, "decay must be one of 'linear', 'cosine'"),
        ({"remat": "all"}, "remat must be one of None, 'products', 'layer'"),
        ({"compute_dtype": "float16"}, "compute_dtype must be one of 'float32', 'bfloat16'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 10, "accumulation": 4}, "4 does not divide batch_size 10"),
        ({"anneal": 30.0}, "anneal must lie in 0 ... 1, got 30"),
        ({"final": -0.5}, "final must lie in 0 ... 1"),
        ({"lr": -1e-3}, "lr must be a number that is not negative, got -0.001"),
        ({"embed_lr": float("nan")}, "embed_lr must be a number that is not negative, got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1, got"),
        ({"clip": 0.0}, "clip must be greater than 0, got 0"),
        ({"seed": -1}, "seed must lie in 0 ... 2.32 - 1, got -1"),
    ],
)
def test_recipes_that_make_no_sense_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LanguageRecipe(**({"steps": 10} | fields))


def test_dropout_drops_its_share_keeps_the_mean_and_depends_on_the_step():
    """And it is the same again for a step, so a resumed run has the same bits."""
    edits = dropout(2, 0.25, jax.random.key(0))
    assert sorted(edits) == sorted([("resid_pre", 0), *((s, i) for i in range(2) for s in ("attn_out", "mlp_out"))])
    ones = jnp.ones((8, 32, 64))
    found = {place: np.asarray(edit(ones)) for place, edit in edits.items()}
    for values in found.values():
        assert np.mean(values == 0) == pytest.approx(0.25, abs=0.02)
        assert set(np.unique(values)) == {0.0, np.float32(4 / 3)}
    kept = [values != 0 for values in found.values()]
    assert not any(np.array_equal(one, other) for i, one in enumerate(kept) for other in kept[:i])
    again = dropout(2, 0.25, jax.random.key(0))["mlp_out", 1](ones)
    np.testing.assert_array_equal(again, found["mlp_out", 1])
    assert not np.array_equal(dropout(2, 0.25, jax.random.key(1))["mlp_out", 1](ones), again)
    assert not dropout(2, 0.0, jax.random.key(0))


def test_a_step_with_dropout_is_another_and_its_parts_drop_other_values():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8, (4, 16)))
    rows = jnp.concatenate([tokens[:1]] * 4)
    recipe = LanguageRecipe(steps=2, batch_size=4, dropout=0.5)
    start = initial_state(CONFIG, recipe)
    losses = [float(LanguageModel(start.params, CONFIG).loss(rows))]  # of no dropout
    for parts in (1, 2):
        update = jax.jit(language_update(CONFIG, dataclasses.replace(recipe, accumulation=parts)))
        losses.append(float(update(start, rows)[1]["loss"]))
    assert len({round(loss, 5) for loss in losses}) == 3
    assert all(np.isfinite(losses))
