"""The top-k SAE and its published options, each by hand, and the transformations of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.activations import SparseCodes
from bilinear_jax.nn.sae import SAE, SAEConfig, SAEModule
from bilinear_jax.nn.transformer import run_module


def small(**options) -> SAE:
    return SAE.init(
        SAEConfig("mlp_out", 1, d_model=4, expansion=3, k=options.pop("k", 2), **options), jax.random.key(0)
    )


def with_params(sae: SAE, **params) -> SAE:
    return SAE(sae.params | {name: jnp.asarray(value) for name, value in params.items()}, sae.config)


def test_top_k_is_by_value_and_keeps_negative_codes():
    sae = with_params(small(k=2), w_enc=-np.ones((12, 4), np.float32) * np.arange(1, 13, dtype=np.float32)[:, None])
    codes = sae.encode(jnp.asarray([[0.25] * 4]))
    np.testing.assert_allclose(codes[0, :3], [-1, -2, 0])
    assert np.count_nonzero(codes) == 2


def test_the_decoder_bias_is_taken_off_before_and_put_back_after():
    b = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    sae = with_params(small(), b_dec=b)
    reconstruction, codes = sae(jnp.asarray(b)[None])
    np.testing.assert_allclose(codes, 0, atol=1e-6)
    np.testing.assert_allclose(reconstruction[0], b)


def test_encoder_bias_acts_before_the_top_k():
    sae = small(k=1, encoder_bias=True)
    sae = with_params(sae, b_enc=np.eye(12, dtype=np.float32)[5] * 100)
    assert int(sae.encode(jnp.ones((1, 4)), sparse=True).indices[0, 0]) == 5


def test_a_bilinear_encoder_multiplies_its_two_halves():
    sae = small(k=12, bilinear_encoder=True)
    assert sae.params["w_enc"].shape == (24, 4)
    x = jnp.asarray([0.3, -1.0, 2.0, 0.7])
    left, right = sae.params["w_enc"][:12] @ x, sae.params["w_enc"][12:] @ x
    np.testing.assert_allclose(sae.encode(x), left * right, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="bilinear encoder"):
        _ = sae.w_enc


def test_passthrough_adds_the_inputs_own_coordinates():
    plain, through = small(), small(passthrough=(1, 3))
    x = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_allclose(through(x)[0] - plain(x)[0], [[0, 2, 0, 4]], atol=1e-6)
    with pytest.raises(ValueError, match=r"\[1, 3\].*decode\(codes, x\)"):
        through.decode(through.encode(x))


def test_a_lookup_adds_the_row_of_each_token():
    """Codes do not depend on tokens, ids may repeat, and a normalisation that is applied scales rows as the bias."""
    table = np.arange(20, dtype=np.float32).reshape(5, 4)
    x, ids = jax.random.normal(jax.random.key(1), (3, 2, 4)), np.array([[4, 0], [1, 1], [3, 4]])
    for options, scale in (({}, 1), ({"normalize": 10.0, "apply_normalize": True}, 10)):
        sae, plain = with_params(small(token_lookup=5, **options), w_lookup=table), small(**options)
        assert not np.any(small(token_lookup=5, **options).params["w_lookup"])
        (found, codes), (expected, others) = sae(x, ids), plain(x, ids)
        np.testing.assert_array_equal(codes, others)
        np.testing.assert_allclose(found, expected + scale * table[ids], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(sae.decode(sae.encode(x, sparse=True), tokens=ids), found, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(sae.beside(x, ids), found - sae.decode_directions(codes), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, r"adds a row for each of 5 tokens, but no tokens are given: call sae\(x, tokens\) or decode\(codes, x,"),
        (
            [1],
            r"type int64 and shape \(1,\), but SAE 1-mlp-out-x3-k2 needs integers of shape \(2,\): give the token id",
        ),
        ([[1, 2]], r"shape \(1, 2\), but .* shape \(2,\)"),
        ([0.0, 1.0], "type float64"),
        (
            [0, 5],
            r"tokens have ids 0 \.\.\. 5, but SAE 1-mlp-out-x3-k2 has rows for 0 \.\.\. 4: give those of the model",
        ),
        ([-1, 2], r"tokens have ids -1 \.\.\. 2"),
        ([2**32, 0], r"tokens have ids 0 \.\.\. 4294967296"),
    ],
)
def test_tokens_that_a_lookup_cannot_take(tokens, message):
    with pytest.raises(ValueError, match=message):
        small(token_lookup=5)(jnp.ones((2, 4)), tokens)


def test_traced_ids_without_a_row_give_nan_and_not_another_row():
    sae, x, ids = small(token_lookup=5), jnp.ones((4, 4)), jnp.asarray([-1, 0, 4, 5])
    found = jax.jit(lambda sae, x, ids: sae(x, ids)[0])(sae, x, ids)
    assert np.isnan(found).all(axis=1).tolist() == [True, False, False, True]


def test_normalize_is_recorded_and_applied_only_on_request():
    x = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    recorded, applied = small(normalize=10.0), small(normalize=10.0, apply_normalize=True)
    np.testing.assert_array_equal(recorded(x)[0], small()(x)[0])
    np.testing.assert_allclose(applied.encode(x), small().encode(x / 10), rtol=1e-5)
    np.testing.assert_allclose(applied(x)[0], small()(x / 10)[0] * 10, rtol=1e-5)


def test_tied_unit_initialisation():
    sae = small()
    np.testing.assert_allclose(np.linalg.norm(sae.w_dec, axis=0), 1, rtol=1e-5)
    np.testing.assert_array_equal(sae.w_enc, sae.w_dec.T)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_sparse_and_dense_codes_say_the_same(k):
    sae = small(k=k)
    x = jax.random.normal(jax.random.key(k), (3, 2, 4))
    sparse, dense = sae.encode(x, sparse=True), sae.encode(x)
    assert dense.shape == (3, 2, 12)
    np.testing.assert_array_equal(sparse.dense(), dense)
    assert np.all(np.count_nonzero(dense, axis=-1) <= k)
    np.testing.assert_allclose(sae.decode(sparse, x), sae.decode(dense, x), rtol=1e-4, atol=1e-5)


def test_no_tokens_give_no_codes():
    assert small().encode(jnp.zeros((0, 4))).shape == (0, 12)


def test_under_jit_vmap_and_grad():
    sae, x = small(), jax.random.normal(jax.random.key(1), (5, 4))
    reconstruction, codes = sae(x)
    jitted = jax.jit(lambda s, y: s(y))(sae, x)
    np.testing.assert_allclose(jitted[0], reconstruction, rtol=1e-5, atol=1e-6)
    mapped = jax.jit(jax.vmap(lambda y: sae.encode(y, sparse=True)))(x)
    assert isinstance(mapped, SparseCodes)
    np.testing.assert_allclose(mapped.dense(), codes, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum((s(x)[0] - x) ** 2)))(sae)
    active = np.any(codes != 0, axis=0)
    np.testing.assert_array_equal(np.any(gradient.w_dec != 0, axis=0), active)


def test_names_are_the_published_ones():
    assert small().name == "1-mlp-out-x3-k2"
    assert small(tag="v1").name == "1-mlp-out-x3-k2-v1"
    assert SAEConfig("resid-mid", 0, 4, 2, 1).site == "resid_mid"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layer=-1), "layer is -1, but layers are numbered from 0"),
        (dict(k=0), "k is 0, but it must be between 1 and 8"),
        (dict(k=9), "k is 9, but it must be between 1 and 8"),
        (dict(passthrough=(4,)), r"passthrough coordinates \[4\] lie outside 0 ... 3"),
        (dict(passthrough=(1, 1)), r"passthrough is \[1, 1\], but each coordinate can be named only once"),
        (dict(tag=""), "tag is '', but it must be None or a part of a folder's name, without '/'"),
        (dict(tag="../v1"), r"tag is '\.\./v1'"),
        (dict(tag="a\\b"), r"tag is 'a\\\\b', but .* without '/', a backslash and"),
        (dict(tag="a\nb"), r"tag is 'a\\nb', but .* characters that cannot be printed"),
        (dict(tag="\x1b[2J"), r"tag is '\\x1b\[2J'"),
        (dict(tag="\u202ev"), r"tag is '\\u202ev'"),
        (dict(tag="v\ud800"), r"tag is 'v\\ud800'"),
        (dict(token_lookup=0), "token_lookup must be at least 1, got 0"),
        (dict(token_lookup=2**31), "token_lookup must be at most 2147483647, got 2147483648"),
        (dict(token_lookup=True), "token_lookup must be a whole number"),
        (dict(apply_normalize=True), "normalize is None, but apply_normalize needs a number other than 0"),
    ],
)
def test_bad_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(**(dict(site="mlp_in", layer=0, d_model=4, expansion=2, k=1) | change))


@pytest.mark.parametrize(
    ("options", "size", "encoder"),
    [
        ({}, 2 * 8 * 4 + 4, "encoder: linear, no bias; input not normalised; no coordinate passes through"),
        ({"normalize": 2.5}, 68, "encoder: linear, no bias; input not normalised; no coordinate passes through"),
        (
            {"encoder_bias": True, "normalize": 2.5, "apply_normalize": True},
            2 * 8 * 4 + 4 + 8,
            "encoder: linear, a bias; input divided by 2.5; no coordinate passes through",
        ),
        (
            {"bilinear_encoder": True, "passthrough": (1, 3)},
            3 * 8 * 4 + 4,
            "encoder: bilinear, no bias; input not normalised; coordinates 1, 3 pass through",
        ),
        (
            {"token_lookup": 5},
            2 * 8 * 4 + 4 + 5 * 4,
            "encoder: linear, no bias; input not normalised; no coordinate passes through; a row for each of 5 tokens",
        ),
    ],
)
def test_the_summary(options, size, encoder):
    sae = SAE.init(SAEConfig("attn-out", 1, d_model=4, expansion=2, k=3, tag="v1", **options), jax.random.key(0))
    assert sae.summary().splitlines() == [
        f"SAE 1-attn-out-x2-k3-v1: 8 features, 3 active at a token, {size} parameters",
        "trained on: attn_out of layer 1, d_model 4, and reconstructs it",
        encoder,
    ]


@pytest.mark.parametrize("site", ["mlp", "pattern"])
def test_a_site_that_no_sae_reads_lists_those_that_can_be_read(site):
    with pytest.raises(UnknownNameError, match=f"no site '{site}' in what an SAE can read: choose one of resid_pre"):
        SAEConfig(site, layer=0, d_model=4, expansion=2, k=1)


def test_inputs_of_another_width_are_named():
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\), but SAE .* reads vectors of 4 coordinates"):
        small().encode(jnp.ones((2, 5)))


OPTIONS = {
    "plain": {},
    "biased": dict(encoder_bias=True),
    "bilinear": dict(bilinear_encoder=True, encoder_bias=True),
    "all": dict(passthrough=(1, 3), normalize=3.0, apply_normalize=True, encoder_bias=True),
}


def dense_sae(config: SAEConfig, params, x):
    """The SAE as its docstrings define it, with every code written out, for JAX to differentiate."""
    scale = config.normalize if config.apply_normalize else 1.0
    y = (x / scale - params["b_dec"][None]) @ params["w_enc"].T
    y = y + params["b_enc"][None] if config.encoder_bias else y
    z = y[:, : config.n_features] * y[:, config.n_features :] if config.bilinear_encoder else y
    least = jax.lax.top_k(z, config.k)[0][:, -1:]
    codes = jnp.where(z >= least, z, 0.0)
    through = jnp.isin(jnp.arange(config.d_model), jnp.asarray(config.passthrough, jnp.int32)).astype(x.dtype)
    return (codes @ params["w_dec"].T + params["b_dec"][None]) * scale + through[None] * x


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameters_derivative_is_that_of_the_dense_sae(options):
    sae = small(**options)
    keys = dict(zip(sae.params, jax.random.split(jax.random.key(2), len(sae.params)), strict=True))
    params = {name: jax.random.normal(keys[name], leaf.shape) for name, leaf in sae.params.items()}
    x = jax.random.normal(jax.random.key(3), (6, 4))

    def loss(apply):
        return lambda params, x: jnp.sum((apply(params, x) - 2 * x) ** 2)

    ours = loss(lambda params, x: SAE(params, sae.config)(x)[0])
    dense = loss(lambda params, x: dense_sae(sae.config, params, x))
    pair = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, x) for f in (ours, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), *pair)


def test_codes_among_some_features_only():
    """Features 2, 5 and 7 are left: of four codes that are asked for, one is 0, and no other feature has one."""
    sae, x = small(), jax.random.normal(jax.random.key(1), (6, 4))
    among = jnp.zeros(12, bool).at[jnp.asarray([2, 5, 7])].set(True)
    codes = run_module(SAEModule(sae.config), sae.params, x, 4, among, method="encode_sparse").dense()
    z = run_module(SAEModule(sae.config), sae.params, x, method="preactivations")
    np.testing.assert_allclose(codes, jnp.where(among[None], z, 0.0), rtol=1e-6)


def test_bfloat16_activations_meet_float32_parameters():
    sae, x = small(encoder_bias=True), jnp.ones((2, 4), jnp.bfloat16)
    assert sae.decode(sae.encode(x, sparse=True)).dtype == jnp.bfloat16
