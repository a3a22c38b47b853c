"""From text to a language model to its SAEs, in a minute, on a language whose entropy is known."""

import json
import math

import jax
import numpy as np
import pytest

from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.evaluation import evaluate_saes
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store.documents import END_OF_TEXT
from bilinear_jax.store.tokenizers import train_tokenizer
from bilinear_jax.store.tokens import tokenize
from bilinear_jax.training.batches import held_out_rows
from bilinear_jax.training.language import LanguageRecipe, fit_language
from bilinear_jax.training.sae import fit_saes
from bilinear_jax.training.sae_recipe import SAERecipe

ADJECTIVES = ("big", "red", "sad", "old", "shy", "hot", "wet", "new")
NOUNS = ("cat", "dog", "pig", "hen", "owl", "fox", "cow", "bee")
VERBS = ("ran", "sat", "ate", "hid", "dug", "flew", "won", "lay")
STOP = 1 / 6  # chance that a story ends after a sentence


def stories(number: int) -> tuple[list[str], list[int]]:
    """Sentences of an adjective, a noun, and the verb that these two decide; and how many each story has."""
    random = np.random.default_rng(0)
    lengths = random.geometric(STOP, number).tolist()
    texts = []
    for length in lengths:
        pairs = random.integers(8, size=(length, 2))
        texts.append("".join(f" {ADJECTIVES[a]} {NOUNS[n]} {VERBS[(a + n) % 8]}." for a, n in pairs))
    return texts, lengths


def entries(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_text_to_language_model_to_saes(tmp_path):
    texts, lengths = stories(3000)
    (tmp_path / "stories.txt").write_text(END_OF_TEXT.join(texts))
    tokenizer = train_tokenizer(texts, n_vocab=300)
    file = tokenize(tmp_path / "stories.txt", tokenizer, tmp_path / "tokens", held_out=300)

    # What no model can beat: of a sentence, two free words of eight, and whether another follows.
    sentences = sum(lengths[-300:])
    nats = sentences * 2 * math.log(8) - 300 * math.log(STOP) - (sentences - 300) * math.log(1 - STOP)
    entropy = nats / len(file.held_out)

    config = TransformerConfig(n_layer=2, n_head=2, d_model=32, d_hidden=64, n_ctx=32, n_vocab=file.n_vocab)
    rows = held_out_rows(file.held_out, config.n_ctx)
    recipe = LanguageRecipe(steps=300, batch_size=32, lr=1e-2, warmup=20)
    config, params = fit_language(config, recipe, file.tokens, rows, tmp_path / "language", evaluate_every=50)
    losses = [entry["held_out_loss"] for entry in entries(tmp_path / "language") if "held_out_loss" in entry]
    assert losses[0] > entropy + 0.3  # it doesn't know the verbs yet
    assert losses[-1] < entropy + 0.1

    lm = LanguageModel(params, config)
    configs = [SAEConfig("mlp_in", 1, 32, expansion=4, k=4), SAEConfig("mlp_out", 0, 32, expansion=4, k=4)]
    recipe = SAERecipe(steps=350, batch_size=512, lr=3e-3, final_lr=6e-4, warmup=20, buffer_tokens=8192, rows=32)
    fresh = evaluate_saes(lm, [SAE.init(one, jax.random.key(0)) for one in configs], rows)
    saes = fit_saes(lm, configs, recipe, file.tokens, tmp_path / "saes", held_out=rows)
    trained = evaluate_saes(lm, saes, rows)
    last = entries(tmp_path / "saes")[-1]
    for name, now in trained.items():
        assert fresh[name].nmse > 0.5 and now.nmse < 0.1
        assert now.loss_recovered > 0.85 and 1 - now.loss_recovered < (1 - fresh[name].loss_recovered) / 2
        assert now.explained_variance > 0.9 and now.l0 == 4
        assert now.loss_clean == pytest.approx(losses[-1], abs=1e-3)  # the same text, the same model
        # while it trained, the same was measured by the same function
        assert last[f"held_out_nmse.{name}"] == pytest.approx(now.nmse, rel=1e-5)
        assert last[f"held_out_loss_recovered.{name}"] == pytest.approx(now.loss_recovered, rel=1e-5)
