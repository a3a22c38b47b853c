"""The transformer's pieces against their definitions, and every option of its config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.attention import QUERY_BLOCK, attend, attend_causally, rms_norm, rotary_turns, rotate
from bilinear_jax.nn.sites import forward
from bilinear_jax.nn.transformer import MLP, TransformerConfig, swish

SHAPE = dict(n_layer=2, n_head=2, d_model=8, d_hidden=6, n_ctx=8, n_vocab=11)
TOKENS = jnp.asarray([[1, 2, 3, 4], [4, 3, 2, 1]])

run = jax.jit(forward, static_argnums=0, static_argnames="compute_dtype")


def random_params(config: TransformerConfig) -> dict:
    return LanguageModel.init(config, jax.random.key(0)).params


def test_golden_logits_and_next_tokens(golden):
    logits = golden.lm.logits(golden.ids)
    golden.close(logits[..., ::8], golden.expected["logits.every8"])
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), golden.expected["greedy_next"])
    golden.close(golden.lm.loss(golden.ids, np.ones_like(golden.ids)), golden.expected["loss"][0])


def test_rms_norm_has_no_gain_and_its_epsilon_inside_the_root():
    np.testing.assert_allclose(rms_norm(jnp.asarray([3.0, 4.0])), np.array([3, 4]) / np.sqrt(12.5), rtol=1e-6)
    np.testing.assert_allclose(rms_norm(jnp.asarray([1e-4, 0.0])), [1e-4 / np.sqrt(0.5e-8 + 1e-8), 0], rtol=1e-5)


def test_rotation_depends_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))

    def score(query_position, key_position):
        turned = (
            rotate(x[None], rotary_turns(jnp.asarray([position]), 8))
            for x, position in ((q, query_position), (k, key_position))
        )
        return jnp.vdot(*turned)

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


@pytest.mark.parametrize("seq", [1, QUERY_BLOCK, 2 * QUERY_BLOCK + 3])
@pytest.mark.parametrize("n_kv_head", [1, 2, 6])
def test_causal_attention_in_blocks_is_attention(seq, n_kv_head):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, seq, n, 4)) for i, n in enumerate((6, n_kv_head, n_kv_head)))
    expected = attend(q, k, v, jnp.tril(jnp.ones((1, seq, seq), bool)))
    np.testing.assert_allclose(attend_causally(q, k, v), expected, atol=2e-6)


def test_rotation_pairs_halves():
    """At position 1 the first pair (0, 4) of a head of 8 turns by one radian."""
    turned = rotate(jnp.zeros((1, 1, 8)).at[..., 0].set(1.0), rotary_turns(jnp.asarray([1]), 8))[0, 0]
    np.testing.assert_allclose(turned[jnp.asarray([0, 4])], [np.cos(1), np.sin(1)], rtol=1e-6)
    assert np.count_nonzero(turned) == 2


@pytest.mark.parametrize(
    ("gate", "expected"),
    [(None, -6.0), ("relu", 0.0), ("silu", -6 / (1 + np.exp(2))), ("gelu", -6 * 0.02275013)],
)
def test_the_gate_acts_on_the_left_side(gate, expected):
    """left = -2, right = 3: gate(-2) * 3."""
    config = TransformerConfig(1, 1, 2, 1, 4, 3, gate=gate)
    weights = {"w_l": [[-2.0, 0.0]], "w_r": [[0.0, 3.0]], "w_p": [[1.0], [0.0]]}
    params = jax.tree.map(jnp.asarray, weights, is_leaf=lambda leaf: isinstance(leaf, list))
    y = MLP(config).apply({"params": params}, jnp.ones(2))
    np.testing.assert_allclose(y, [expected, 0.0], rtol=1e-5, atol=1e-6)


def test_swish_goes_from_silu_to_exactly_half_its_input():
    x = jnp.asarray([-3.0, 0.1, 2.0])
    np.testing.assert_array_equal(swish(x, 1.0), jax.nn.silu(x))
    np.testing.assert_array_equal(swish(x, 0.0), x / 2)
    np.testing.assert_allclose(swish(x, 0.5)[2], 2 / (1 + np.exp(-1)), rtol=1e-6)


def test_beta_reaches_every_layer_and_only_swish():
    config = TransformerConfig(**SHAPE, gate="silu")
    params = random_params(config)
    np.testing.assert_allclose(
        run(config, params, TOKENS, beta=1.0), forward(config, params, TOKENS), rtol=1e-6, atol=1e-7
    )
    for layer in range(2):
        w_p = params["layers"]["mlp"]["w_p"].at[layer].set(0.0)  # the other layer's MLP alone writes anything
        weights = params | {"layers": params["layers"] | {"mlp": params["layers"]["mlp"] | {"w_p": w_p}}}
        one, none = (run(config, weights, TOKENS, beta=beta) for beta in (1.0, 0.0))
        assert np.max(np.abs(one - none)) > 1e-3
    with pytest.raises(ValueError, match="beta needs gate='silu', but this model has gate=None"):
        forward(TransformerConfig(**SHAPE), params, TOKENS, beta=jnp.asarray(0.0))


def test_queries_in_blocks_attend_as_all_at_once():
    """300 tokens are three blocks; an edit of the pattern takes them all at once."""
    config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=6, n_ctx=300, n_vocab=11)
    tokens = jax.random.randint(jax.random.key(1), (2, 300), 0, 11)
    params = random_params(config)
    blocks = run(config, params, tokens)
    whole = forward(config, params, tokens, {"pattern": lambda x: x})
    np.testing.assert_allclose(blocks, whole, rtol=1e-4, atol=1e-6)
    for end in (128, 129, 299):  # the first token of a block, the second, and the last of all
        changed = run(config, params, tokens.at[:, end:].add(1) % 11)
        np.testing.assert_array_equal(changed[:, :end], blocks[:, :end])


@pytest.mark.parametrize("bilinear", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", [None, "relu"])
def test_every_kind_of_mlp_runs_and_has_its_params(bilinear, bias, gate):
    config = TransformerConfig(**SHAPE, bilinear=bilinear, bias=bias, attention_bias=bias, gate=gate)
    params = random_params(config)
    names = {"w_l", "w_p"} | ({"w_r"} if bilinear else set()) | ({"b_l", "b_p"} if bias else set())
    assert set(params["layers"]["mlp"]) == names | ({"b_r"} if bias and bilinear else set())
    assert params["layers"]["mlp"]["w_l"].shape == (2, 6, 8)
    assert ("b_q" in params["layers"]["attention"]) == bias
    assert np.all(np.isfinite(run(config, params, TOKENS)))


def test_biases_act():
    config = TransformerConfig(**SHAPE, bias=True, attention_bias=True)
    params = random_params(config)
    plain = run(config, params, TOKENS)
    for room, name in [("mlp", "b_l"), ("mlp", "b_r"), ("mlp", "b_p"), ("attention", "b_v"), ("attention", "b_q")]:
        layers = {**params["layers"], room: {**params["layers"][room], name: params["layers"][room][name] + 1.0}}
        assert np.any(np.abs(run(config, {**params, "layers": layers}, TOKENS) - plain) > 1e-4), name


@pytest.mark.parametrize("which", range(3))
def test_each_normalization_can_be_left_out(which):
    full = TransformerConfig(**SHAPE)
    flags = tuple(i != which for i in range(3))
    params = random_params(full)
    with_it = run(full, params, TOKENS)
    without = run(TransformerConfig(**SHAPE, normalization=flags), params, TOKENS)
    assert np.any(np.abs(with_it - without) > 1e-3)


def test_attention_scale_is_a_factor_on_the_output_of_attention():
    config = TransformerConfig(**SHAPE)
    assert config.attn_scale == 0.5  # 1 / sqrt(2 * 2)
    params = random_params(config)
    doubled = run(TransformerConfig(**SHAPE, attn_scale=1.0), params, TOKENS)
    by_edit = forward(config, params, TOKENS, {"attn_out": lambda x: 2.0 * x})
    np.testing.assert_allclose(doubled, by_edit, rtol=1e-5, atol=1e-6)


def test_causality():
    config = TransformerConfig(**SHAPE)
    params = random_params(config)
    changed = TOKENS.at[:, 3].set(9)
    same = run(config, params, TOKENS)[:, :3] == run(config, params, changed)[:, :3]
    assert np.all(same)


def test_bfloat16_compute_keeps_float32_params_and_logits():
    config = TransformerConfig(**SHAPE)
    params = random_params(config)
    low = run(config, params, TOKENS, compute_dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32
    assert 0 < np.max(np.abs(low - run(config, params, TOKENS))) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(gate="swish"), "unknown gate 'swish'"),
        (dict(d_model=9), "d_model .9. must be a multiple of 2 n_head"),
        (dict(n_layer=0), "n_layer must be at least 1"),
        (dict(normalization=(True, False)), r"normalization is \(True, False\), but it must be one bool or three"),
    ],
)
def test_bad_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SHAPE | change))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 11]], "token 11 lies outside the vocabulary 0 ... 10"),
        ([[-1, 2]], "token -1 lies outside"),
        ([1, 2], r"tokens\[None\]"),
        ([[1] * 9], "9 tokens do not fit the context of 8"),
        ([[0.5]], r"tokens of type float\d\d and shape .* are not integers"),
    ],
)
def test_bad_tokens_are_named(tokens, message):
    config = TransformerConfig(**SHAPE)
    lm = LanguageModel.init(config, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        lm.logits(jnp.asarray(tokens))


def test_a_language_model_is_an_argument_of_jit_and_grad():
    config = TransformerConfig(**SHAPE)
    lm = LanguageModel.init(config, jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda model: model.loss(TOKENS)))(lm)
    assert gradient.params["w_u"].shape == lm.w_u.shape
    assert np.any(gradient.params["layers"]["mlp"]["w_p"] != 0)


def test_views_of_a_plain_mlp_have_no_right_side():
    config = TransformerConfig(**SHAPE, bilinear=False, gate="relu")
    lm = LanguageModel.init(config, jax.random.key(0))
    with pytest.raises(ValueError, match="no right side"):
        _ = lm.w_r
    with pytest.raises(AttributeError, match="no attribute 'w_x'"):
        _ = lm.w_x
