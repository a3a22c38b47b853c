"""A language model that others trained, against transformers with torch: ``data/real/make.py`` made the numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from bilinear_jax.nn.generation import generate

pytestmark = pytest.mark.real_model

DATA = Path(__file__).parent / "data" / "real"
TEXTS = (DATA / "texts.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return load_file(DATA / "expected.safetensors")


@pytest.fixture(scope="module")
def logprobs(real_lm, expected):
    return jax.nn.log_softmax(real_lm.logits(expected["tokens"]), axis=-1)


def at(logprobs, tokens):
    """The log-probabilities of some tokens at each position."""
    return np.asarray(jnp.take_along_axis(logprobs, jnp.asarray(tokens), axis=-1))


def test_what_was_trained(real_lm):
    config = real_lm.config
    assert (config.family, config.n_layer, config.d_model, config.d_hidden) == ("llama", 30, 576, 1536)
    assert (config.n_head, config.n_kv_head, config.d_head, config.n_ctx) == (9, 3, 64, 8192)
    assert (config.n_vocab, config.tied, config.gate) == (49152, True, "silu")


def test_log_probabilities_of_the_text_and_of_the_likeliest(logprobs, expected):
    following = at(logprobs[:, :-1], expected["tokens"][:, 1:, None])[..., 0]
    np.testing.assert_allclose(following, expected["following"], rtol=0, atol=2e-3)
    np.testing.assert_allclose(at(logprobs, expected["largest_ids"]), expected["largest"], rtol=0, atol=2e-3)
    likelier = np.sum(np.asarray(logprobs) > expected["largest"][..., :1] + 2e-3, axis=-1)
    assert not likelier.any()


def test_the_loss_is_that_of_the_log_probabilities(real_lm, expected):
    assert abs(float(real_lm.loss(expected["tokens"])) + expected["following"].mean()) < 2e-4


def test_the_greedy_continuation_through_the_cache(real_lm, expected):
    new = generate(real_lm.config, real_lm.params, expected["prompt"], max_length=24, temperature=0.0)
    np.testing.assert_array_equal(new, expected["greedy"])


def test_generate_writes_it_as_text(real_lm):
    text = real_lm.generate("The capital of France is", max_length=24, temperature=0)  # that program is compiled
    assert text.startswith("The capital of France is Paris.")


@pytest.mark.parametrize("row", range(len(TEXTS)))
def test_the_tokenizer_gives_the_same_ids_and_the_text_back(real_lm, expected, row):
    ids = np.asarray(real_lm.encode(TEXTS[row]))[0]
    np.testing.assert_array_equal(ids[: expected["tokens"].shape[1]], expected["tokens"][row])
    assert real_lm.tokenizer.decode(ids) == TEXTS[row]


def test_the_tokenizer_gives_any_text_back(real_lm):
    text = "def f(x):\n\treturn  x**2  # naïve, 12345 €\r\n«ünï» 漢字 🙂\n\n\nI'll, they've, it's"
    assert real_lm.tokenizer.decode(np.asarray(real_lm.encode(text))[0]) == text
