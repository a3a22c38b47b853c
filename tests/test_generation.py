"""Generation against recomputing from scratch, which needs no cache, no bucket and no other row."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax import generation
from bilinear_jax.generation import bucket, generate, generate_text, sample
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn import sites
from bilinear_jax.nn.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(n_layer=3, n_head=2, d_model=16, d_hidden=24, n_ctx=64, n_vocab=40)
PROMPTS = np.random.default_rng(0).integers(0, CONFIG.n_vocab, (4, 9))
LENGTHS = np.array([9, 1, 4, 7])
KEY = jax.random.key(7)


def random_params(config, seed=0):
    """Params of order one in every array, biases too, so that nothing is near to having no effect."""
    shapes = jax.eval_shape(lambda: Transformer(config).init(KEY, jnp.zeros((1, 2), jnp.int32))["params"])
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.5 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


forward = jax.jit(sites.forward, static_argnums=0, static_argnames="compute_dtype")


def recompute(config, params, prompt, max_length, *, row=0, temperature=0.0, top_k=None, key=KEY, **dtype):
    """The new tokens of one prompt, each from a forward pass over all tokens before it."""
    tokens, row_key = list(prompt), jax.random.fold_in(key, row)
    for t in range(max_length):
        padded = np.zeros((1, config.n_ctx), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = forward(config, params, padded, **dtype)[:, len(tokens) - 1]
        tokens.append(int(sample(logits, jax.random.fold_in(row_key, t)[None], temperature, top_k)[0]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": "relu", "bias": True, "attention_bias": True},
        {"gate": "silu", "bilinear": False, "normalization": (True, False, True)},
        {"gate": "gelu", "attn_scale": 1.0, "normalization": (False, True, False), "n_head": 4},
    ],
)
@pytest.mark.parametrize("temperature,top_k", [(0.0, None), (0.8, None), (1.3, 5)])
def test_equal_to_recomputing_from_scratch(changes, temperature, top_k):
    config = dataclasses.replace(CONFIG, **changes)
    params = random_params(config)
    new = generate(config, params, PROMPTS, LENGTHS, max_length=20, temperature=temperature, top_k=top_k, key=KEY)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        expected = recompute(config, params, prompt[:length], 20, row=row, temperature=temperature, top_k=top_k)
        assert new[row].tolist() == expected
