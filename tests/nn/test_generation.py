"""Generation against recomputing from scratch, which needs no cache, no bucket and no other row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn import generation, sites
from bilinear_jax.nn.generation import bucket, generate, sample
from bilinear_jax.nn.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(n_layer=2, n_head=2, d_model=16, d_hidden=24, n_ctx=64, n_vocab=40)
PROMPTS = np.random.default_rng(0).integers(0, CONFIG.n_vocab, (4, 9))
LENGTHS = np.array([9, 1, 4, 7])
KEY = jax.random.key(7)


def random_params(config, seed=0):
    """Params of order one in every array, biases too, so that nothing is near to having no effect."""
    shapes = jax.eval_shape(lambda: Transformer(config).init(KEY, jnp.zeros((1, 2), jnp.int32))["params"])
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.5 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


PARAMS = random_params(CONFIG)
forward = jax.jit(sites.forward, static_argnums=0, static_argnames="compute_dtype")


def recompute(config, params, prompt, max_length, *, row=0, temperature=0.0, top_k=None, key=KEY):
    """The new tokens of one prompt, each from a forward pass over all tokens before it."""
    tokens, row_key = list(prompt), jax.random.fold_in(key, row)
    for t in range(max_length):
        padded = np.zeros((1, config.n_ctx), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = forward(config, params, padded)[:, len(tokens) - 1]
        tokens.append(int(sample(logits, jax.random.fold_in(row_key, t)[None], temperature, top_k)[0]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "changes,temperature,top_k",
    [
        ({}, 0.0, None),
        ({}, 0.8, None),
        ({"gate": "relu", "bias": True, "attention_bias": True}, 1.3, 5),
        ({"gate": "silu", "bilinear": False, "normalization": (True, False, True)}, 0.0, None),
        (
            {
                "gate": "gelu",
                "attn_scale": 1.0,
                "normalization": (False, True, False),
                "n_head": 1,
                "n_kv_head": 1,
                "d_head": 16,
            },
            0.0,
            3,
        ),
    ],
)
def test_equal_to_recomputing_from_scratch(changes, temperature, top_k):
    config = dataclasses.replace(CONFIG, **changes)
    params = random_params(config)
    new = generate(config, params, PROMPTS, LENGTHS, max_length=16, temperature=temperature, top_k=top_k, key=KEY)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        expected = recompute(config, params, prompt[:length], 16, row=row, temperature=temperature, top_k=top_k)
        assert new[row].tolist() == expected


def test_golden_greedy_continuation(golden):
    continuation = golden.expected["greedy_continuation"]
    new = generate(golden.lm.config, golden.lm.params, continuation[:, :6], max_length=10, temperature=0.0)
    np.testing.assert_array_equal(new, continuation[:, 6:])


def test_bfloat16_takes_a_token_that_is_nearly_the_best():
    new = np.asarray(generate(CONFIG, PARAMS, PROMPTS, max_length=10, temperature=0.0, compute_dtype=jnp.bfloat16))
    logits = np.asarray(forward(CONFIG, PARAMS, np.concatenate([PROMPTS, new], axis=1)))[:, PROMPTS.shape[1] - 1 : -1]
    behind = logits.max(-1) - np.take_along_axis(logits, new[..., None], axis=-1)[..., 0]
    assert behind.max() < 0.1 * logits.std()


def test_a_row_depends_on_no_other_row_nor_on_the_buckets():
    few = generate(CONFIG, PARAMS, PROMPTS, LENGTHS, max_length=5, key=KEY)
    others = np.random.default_rng(1).integers(0, CONFIG.n_vocab, (4, 40))
    others[2, :9] = PROMPTS[2]
    many = generate(CONFIG, PARAMS, others, np.array([40, 3, LENGTHS[2], 8]), max_length=24, key=KEY)
    np.testing.assert_array_equal(many[2, :5], few[2])
    assert (many[0, :5] != few[0]).any()


def test_rows_draw_different_numbers_and_keys_decide():
    same = np.repeat(PROMPTS[:1], 4, axis=0)
    new = generate(CONFIG, PARAMS, same, max_length=12, key=KEY)
    assert len({tuple(row.tolist()) for row in new}) == 4
    assert (generate(CONFIG, PARAMS, same, max_length=12, key=jax.random.key(8)) != new).any()
    np.testing.assert_array_equal(generate(CONFIG, PARAMS, same, max_length=12, key=KEY), new)


@pytest.mark.parametrize("top_k", [None, 4])
def test_frequencies_are_those_of_the_tempered_softmax(top_k):
    rows, temperature = 4096, 1.7
    new = generate(
        CONFIG, PARAMS, np.repeat(PROMPTS[:1], rows, axis=0), max_length=1, temperature=temperature, top_k=top_k
    )
    logits = np.asarray(forward(CONFIG, PARAMS, PROMPTS[:1]), np.float64)[0, -1] / temperature
    if top_k is not None:
        logits[np.argsort(logits)[:-top_k]] = -np.inf
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    counts = np.bincount(np.asarray(new)[:, 0], minlength=CONFIG.n_vocab)
    assert (counts[expected == 0] == 0).all()
    assert (np.abs(counts - rows * expected) <= 5 * np.sqrt(rows * expected * (1 - expected))).all()


def test_top_k_of_one_is_greedy():
    greedy = generate(CONFIG, PARAMS, PROMPTS, max_length=8, temperature=0)
    np.testing.assert_array_equal(generate(CONFIG, PARAMS, PROMPTS, max_length=8, temperature=2.0, top_k=1), greedy)


def test_stop():
    free = np.asarray(generate(CONFIG, PARAMS, PROMPTS, LENGTHS, max_length=16, key=KEY))
    stop = int(free[0, 2])
    new = np.asarray(generate(CONFIG, PARAMS, PROMPTS, LENGTHS, max_length=16, key=KEY, stop_token=stop))
    for ours, unstopped in zip(new.tolist(), free.tolist(), strict=True):
        end = unstopped.index(stop) if stop in unstopped else 16
        assert ours == unstopped[:end] + [stop] * (16 - end)
    assert new[0, 2:].tolist() == [stop] * 14


def test_padding_may_hold_anything():
    padded = np.where(np.arange(9)[None] < LENGTHS[:, None], PROMPTS, -12345)
    new = generate(CONFIG, PARAMS, padded, LENGTHS, max_length=16, temperature=0.0)
    np.testing.assert_array_equal(new, generate(CONFIG, PARAMS, PROMPTS, LENGTHS, max_length=16, temperature=0.0))


def test_fills_the_context_to_its_last_token():
    prompt = np.random.default_rng(2).integers(0, CONFIG.n_vocab, (1, 60))
    new = generate(CONFIG, PARAMS, prompt, max_length=4, temperature=0.0)
    assert new[0].tolist() == recompute(CONFIG, PARAMS, prompt[0], 4)


def test_inside_jit_and_vmap():
    keys = jax.random.split(KEY, 2)

    @jax.jit
    def run(params, prompts, lengths, temperature):
        def one(key):
            return generate(CONFIG, params, prompts, lengths, max_length=6, temperature=temperature, key=key)

        return jax.vmap(one)(keys)

    sampled = run(PARAMS, PROMPTS, LENGTHS, 1.0)
    for key, ours in zip(keys, sampled, strict=True):
        np.testing.assert_array_equal(ours, generate(CONFIG, PARAMS, PROMPTS, LENGTHS, max_length=6, key=key))
    greedy = generate(CONFIG, PARAMS, PROMPTS, LENGTHS, max_length=6, temperature=0.0)
    np.testing.assert_array_equal(run(PARAMS, PROMPTS, LENGTHS, 0.0), jnp.stack([greedy, greedy]))


def test_one_program_for_each_bucket():
    def programs(seq, max_length, **options):
        generate(CONFIG, PARAMS, PROMPTS[:1, :seq], max_length=max_length, **options)
        return generation._generate._cache_size()

    first = programs(2, 3, temperature=1.0)
    assert programs(9, 16, temperature=0.3, key=KEY, stop_token=7) == first
    assert programs(9, 17) == first + 1


def test_buckets():
    sizes = [bucket(n, 4096) for n in range(1, 4097)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size <= 1.25 * n for n, size in enumerate(sizes, 1) if n > 64)
    assert len(set(sizes)) == 28
    assert bucket(60, 63) == 63


@pytest.mark.parametrize(
    "options,words",
    [
        ({"max_length": 56}, "at most 55 new tokens fit"),
        ({"max_length": 64}, "do not fit the context of 64: at most 55 new tokens fit"),
        ({"prompts": np.zeros((1, 64), int), "max_length": 10}, "shorten it to 63 tokens or fewer"),
        (
            {"prompts": np.zeros((1, 0), int)},
            r"prompts have shape \(1, 0\), but they must be \[batch, seq\], with at least one of each",
        ),
        ({"lengths": np.array([3, 0, 2, 1])}, r"lengths\[1\] is 0, but it must be between 1 and 9"),
        ({"lengths": np.array([3, 1, 10, 1])}, r"lengths\[2\] is 10"),
        ({"max_length": 0}, "max_length is 0, but the number of new tokens must be"),
        ({"temperature": -0.5}, "temperature must be 0"),
        ({"top_k": 0}, "top_k is 0, but it must be between 1 and 40"),
        ({"top_k": 41}, "top_k is 41, but it must be between 1 and 40"),
        ({"stop_token": 40}, "stop_token 40 lies outside the vocabulary 0 ... 39"),
        ({"prompts": np.array([[1, 40]])}, "token 40 lies outside the vocabulary 0 ... 39"),
        ({"prompts": np.array([[1, -1]])}, "token -1 lies outside the vocabulary"),
    ],
)
def test_errors_name_the_mend(options, words):
    arguments = {"prompts": PROMPTS, "lengths": None, "max_length": 5} | options
    with pytest.raises(ValueError, match=words):
        generate(CONFIG, PARAMS, **arguments)


def test_one_length_a_row():
    with pytest.raises(ValueError, match="there are 4 rows: give one length for each row"):
        generation._checked(CONFIG, PROMPTS, np.array([3, 1]), 5, 1.0, None, None)


@pytest.fixture
def lm(tmp_path):
    """A model whose tokenizer knows the words w0 ... w38 and ends a text with <end>; it adds no token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(39)} | {"<end>": 39}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path)
    return LanguageModel(PARAMS, CONFIG, tokenizer_source=str(tmp_path))


def test_text(lm):
    texts = ["w3 w1 w4", "w5"]
    ours = lm.generate(texts, 8, temperature=0)
    for text, out in zip(texts, ours, strict=True):
        ids = [int(word[1:]) for word in text.split()]
        expected = ids + recompute(CONFIG, PARAMS, ids, 8)
        assert out == " ".join(f"w{token}" for token in expected if token != 39)
    assert lm.generate(texts[0], 8, temperature=0) == ours[0]
    assert lm.generate(texts[0], 8, seed=3) == lm.generate(texts[0], 8, seed=3)
    assert lm.generate(texts[0], 8, seed=4) != lm.generate(texts[0], 8, seed=3)


def test_text_ends_at_the_end_of_text_on_request(lm):
    w_u = jnp.asarray(PARAMS["w_u"]).at[39].mul(6.0)
    lm = dataclasses.replace(lm, params=PARAMS | {"w_u": w_u})
    free, stopped = (lm.generate("w3 w1", 40, stop=stop, seed=1).split() for stop in (False, True))
    assert stopped == free[: len(stopped)]
    assert len(stopped) < len(free) < 42


def test_each_of_several_texts_stops_by_itself(lm):
    """Where the tokens that are drawn without a stop have their first end of text; later ones are then not shown."""
    texts, ids, seed = ["w3 w1 w4", "w5", "w7 w7"], [[3, 1, 4], [5], [7, 7]], 2
    lm = dataclasses.replace(lm, params=PARAMS | {"w_u": jnp.asarray(PARAMS["w_u"]).at[39].mul(3.0)})
    padded = np.array([row + [0] * (3 - len(row)) for row in ids])
    lengths = np.array([len(row) for row in ids])
    drawn = np.asarray(generate(CONFIG, lm.params, padded, lengths, max_length=30, key=jax.random.key(seed))).tolist()
    ends = [row.index(39) if 39 in row else 30 for row in drawn]
    assert len(set(ends)) == 3 and min(ends) < 30 and any(token != 39 for token in drawn[0][ends[0] :])

    def written(cut):
        rows = [row + new[:end] for row, new, end in zip(ids, drawn, cut, strict=True)]
        return [" ".join(f"w{token}" for token in row if token != 39) for row in rows]

    assert lm.generate(texts, 30, seed=seed, stop=True) == written(ends)
    assert lm.generate(texts, 30, seed=seed, stop=False) == lm.generate(texts, 30, seed=seed) == written([30] * 3)
    assert written(ends) != written([30] * 3)


def test_errors_of_text(lm):
    with pytest.raises(ValueError, match="prompt 1 is empty, and the tokenizer adds no token"):
        lm.generate(["w1", ""])
    with pytest.raises(ValueError, match="at least one prompt"):
        lm.generate([])
    lm.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        lm.generate("w1", stop=True)
