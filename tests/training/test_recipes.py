"""Micro runs of the recipes: reconstruction improves past fixed marks."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.training.data import held_out_rows
from bilinear_jax.training.language import LanguageRecipe, train_language
from bilinear_jax.training.sae import SAERecipe, train_saes, with_unit_columns, without_parallel_part

CONFIG = TransformerConfig(n_layer=2, n_head=2, d_model=16, d_hidden=32, n_ctx=16, n_vocab=8, pad_id=0)


def stream(seed: int, length: int) -> np.ndarray:
    """A language that a small model can learn: a token and the one before decide the next, 1 time in 8 by chance."""
    random = np.random.default_rng(seed)
    tokens = [1, 2]
    while len(tokens) < length:
        rule = 1 + (2 * tokens[-1] + tokens[-2]) % 7
        tokens.append(rule if random.random() < 7 / 8 else int(random.integers(1, 8)))
    return np.asarray(tokens, np.int32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("language")
    recipe = LanguageRecipe(steps=150, batch_size=32, lr=1e-2, warmup=10)
    config, params = train_language(
        CONFIG, recipe, stream(0, 20_000), held_out_rows(stream(1, 2_000), CONFIG.n_ctx), directory
    )
    return LanguageModel(params, config)


def test_saes_learn_together_and_keep_unit_columns(trained, tmp_path):
    lm = trained
    configs = [SAEConfig(site, 1, 16, 4, 4) for site in ("mlp_in", "mlp_out", "resid_mid")]
    saes = train_saes(lm, configs, SAERecipe(steps=120, batch_size=16, lr=5e-3, warmup=10), stream(0, 20_000), tmp_path)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for sae in saes:
        losses = [entry[f"nmse.{sae.name}"] for entry in metrics]
        assert losses[-1] < 0.6 * losses[0]
        assert losses[-1] < 0.25
        np.testing.assert_allclose(np.linalg.norm(sae.w_dec, axis=0), 1, rtol=1e-5)


def test_two_saes_of_one_name_are_refused(trained, tmp_path):
    config = SAEConfig("mlp_in", 1, 16, 4, 4)
    with pytest.raises(ValueError, match="share a name"):
        train_saes(trained, [config, config], SAERecipe(steps=1), stream(0, 20_000), tmp_path)


def test_the_parallel_part_of_the_gradient_is_removed():
    columns = jnp.asarray([[1.0, 0.6], [0.0, 0.8]])
    gradient = {"w_dec": jnp.asarray([[5.0, 1.0], [2.0, 1.0]]), "b_dec": jnp.ones(2)}
    projected = without_parallel_part(gradient, {"w_dec": columns})
    np.testing.assert_allclose(jnp.einsum("df,df->f", projected["w_dec"], columns), 0, atol=1e-6)
    np.testing.assert_allclose(projected["w_dec"][:, 0], [0, 2])
    np.testing.assert_array_equal(projected["b_dec"], 1)
    np.testing.assert_allclose(with_unit_columns({"w_dec": 3 * columns})["w_dec"], columns, rtol=1e-6)
