"""Sites of the transformer: golden activations, capture that stops early, edits, and the transformations of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sites import capture, captured_loss, default_token_mask, forward, loss, token_array
from bilinear_jax.nn.transformer import SITES, Transformer, TransformerConfig, cross_entropy

CONFIG = TransformerConfig(n_layer=3, n_head=2, d_model=8, d_hidden=12, n_ctx=16, n_vocab=11)
TOKENS = jnp.asarray([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])


@pytest.fixture(scope="module")
def params():
    return LanguageModel.init(CONFIG, jax.random.key(0)).params


def test_forward_is_the_module(params):
    module = Transformer(CONFIG).apply({"params": params}, TOKENS)
    np.testing.assert_allclose(forward(CONFIG, params, TOKENS), module, rtol=1e-6, atol=1e-6)


def test_golden_activations(golden):
    expected = {key: value for key, value in golden.expected.items() if key.startswith("act.")}
    assert len(expected) == 3 * 7
    got = golden.lm.capture(golden.ids, sorted({key.split(".")[1] for key in expected}))
    for key, value in expected.items():
        _, site, layer = key.split(".")
        golden.close(got[site][int(layer)], value)


def test_golden_views(golden):
    golden.close(golden.lm.qk[:1], golden.expected["view.qk"])
    golden.close(golden.lm.ov[:1], golden.expected["view.ov"])
    for key, shape in golden.expected.items():
        if key.startswith("viewsum."):
            assert getattr(golden.lm, key.removeprefix("viewsum.")).shape == tuple(shape)


def test_one_layer_equals_its_slice_of_all(params):
    run = jax.jit(lambda sites: capture(CONFIG, params, TOKENS, sites), static_argnums=0)
    everywhere = run(SITES)
    for layer in range(CONFIG.n_layer):
        here = run(tuple((site, layer) for site in SITES))
        for site in SITES:
            np.testing.assert_allclose(here[site, layer], everywhere[site][layer], rtol=1e-5, atol=1e-6)


def test_the_residual_stream_adds_up(params):
    got = capture(CONFIG, params, TOKENS, ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])
    middle = got["resid_pre"] + CONFIG.attn_scale * got["attn_out"]
    np.testing.assert_allclose(got["resid_mid"], middle, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["resid_post"], middle + got["mlp_out"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["resid_pre"][1:], got["resid_post"][:-1], rtol=1e-6)


def test_no_layer_after_the_last_one_needed_is_run(params):
    def flops(layer):
        run = jax.jit(lambda p: capture(CONFIG, p, TOKENS, [("resid_post", layer)]))
        return run.lower(params).compile().cost_analysis()["flops"]

    seen = []
    edits = {("mlp_in", layer): lambda x, layer=layer: seen.append(layer) or x for layer in range(3)}
    capture(CONFIG, params, TOKENS, [("resid_mid", 1)], edits)
    assert set(seen) <= {0, 1}
    assert flops(0) < flops(2)


def test_only_what_was_asked_for_comes_back(params):
    got = capture(CONFIG, params, TOKENS, ["mlp_in", ("resid_mid", 2)])
    assert set(got) == {"mlp_in", ("resid_mid", 2)}
    assert got["mlp_in"].shape == (3, 2, 5, 8)
    assert got["resid_mid", 2].shape == (2, 5, 8)
    with pytest.raises(KeyError, match="captured: 'mlp_in'"):
        got["mlp_out"]


def test_the_loss_and_the_sites_in_one_run_are_those_of_two(params):
    edits = {("mlp_out", 0): lambda y: 0.5 * y}
    mask = jnp.asarray(TOKENS) != 3
    summed, got = captured_loss(CONFIG, params, TOKENS, mask, [("mlp_in", 1), "mlp_out"], edits)
    alone = capture(CONFIG, params, TOKENS, [("mlp_in", 1), "mlp_out"], edits)
    assert list(got) == list(alone)
    for site, value in got.items():
        np.testing.assert_allclose(value, alone[site], rtol=1e-5, atol=1e-6)
    expected = loss(CONFIG, params, TOKENS, mask, edits)
    np.testing.assert_allclose(summed, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="there is no site to capture"):
        captured_loss(CONFIG, params, TOKENS, mask, [])


def test_identity_edits_change_nothing(params):
    plain = forward(CONFIG, params, TOKENS)
    for site in ("attn_out", "scores", "pattern", ("mlp_out", 1), "resid_post"):
        np.testing.assert_allclose(forward(CONFIG, params, TOKENS, {site: lambda x: x}), plain, rtol=1e-5, atol=1e-6)


def test_an_edit_of_one_layer_reaches_that_layer_only(params):
    edits = {("mlp_out", 1): jnp.zeros_like}
    before = capture(CONFIG, params, TOKENS, ["mlp_out", "resid_mid", "resid_post"])
    after = capture(CONFIG, params, TOKENS, ["mlp_out", "resid_mid", "resid_post"], edits)
    np.testing.assert_allclose(after["mlp_out"][0], before["mlp_out"][0], rtol=1e-6)
    assert not np.any(after["mlp_out"][1])
    np.testing.assert_allclose(after["resid_post"][1], before["resid_mid"][1], rtol=1e-6)
    assert np.any(after["resid_mid"][2] != before["resid_mid"][2])


def test_a_layers_own_edit_wins(params):
    edits = {"mlp_out": jnp.zeros_like, ("mlp_out", 2): jnp.ones_like}
    got = capture(CONFIG, params, TOKENS, ["mlp_out"], edits)["mlp_out"]
    assert not np.any(got[:2]) and np.all(got[2] == 1)


def test_zeroed_attention_ignores_other_tokens(params):
    other = TOKENS.at[:, 0].set(9)
    edits = {"pattern": jnp.zeros_like}
    same = forward(CONFIG, params, TOKENS, edits)[:, 1:] == forward(CONFIG, params, other, edits)[:, 1:]
    assert np.all(same)


def test_under_jit_vmap_and_grad(params):
    scales = jnp.asarray([0.0, 0.5, 1.0])
    mask = default_token_mask(TOKENS, None)

    def patched(scale):
        total, count = loss(CONFIG, params, TOKENS, mask, {("mlp_out", 1): lambda x: scale * x})
        return total / count

    one = jax.jit(patched)
    together = jax.jit(jax.vmap(patched))(scales)
    np.testing.assert_allclose(together, [one(scale) for scale in scales], rtol=1e-5)
    slope = jax.jit(jax.grad(patched))(0.5)
    step = 1e-2
    np.testing.assert_allclose(slope, (one(0.5 + step) - one(0.5 - step)) / (2 * step), rtol=2e-2, atol=1e-4)

    def sums(tokens):
        got = capture(CONFIG, params, tokens[None], ["mlp_in", ("resid_mid", 2)])
        return jax.tree.map(jnp.sum, got)

    mapped = jax.jit(jax.vmap(sums))(TOKENS)
    np.testing.assert_allclose(mapped["mlp_in"][1], sums(TOKENS[1])["mlp_in"], rtol=1e-4)


def test_the_cross_entropy_by_hand():
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    expected = [[np.log(4), np.log(10)]]
    np.testing.assert_allclose(cross_entropy(logits + 3.0, jnp.asarray([[2, 0]])), expected, rtol=1e-5)


def test_the_loss_is_that_of_predicting_the_tokens_in_the_mask(params):
    """The token at t is predicted by the logits at t - 1; position 0 by none, whatever the mask says."""
    log_p = np.asarray(jax.nn.log_softmax(forward(CONFIG, params, TOKENS)))
    mask = np.asarray([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    total, count = loss(CONFIG, params, TOKENS, jnp.asarray(mask, bool))
    np.testing.assert_allclose(total, -log_p[0, 1, 3] - log_p[1, 3, 1], rtol=1e-6)
    assert count == 2


def test_the_default_mask_drops_position_0_and_padding_only():
    tokens = jnp.asarray([[7, 2, 5, 2, 2], [2, 2, 2, 2, 5]])
    np.testing.assert_array_equal(default_token_mask(tokens, 2), [[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(default_token_mask(tokens, None), [[0, 1, 1, 1, 1]] * 2)


def test_any_split_into_batches_gives_the_same_loss(params):
    mask = default_token_mask(TOKENS, 1)
    total, count = loss(CONFIG, params, TOKENS, mask)
    rows = [loss(CONFIG, params, TOKENS[i : i + 1], mask[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(total, sum(row[0] for row in rows), rtol=1e-6)
    assert count == sum(row[1] for row in rows) == 7


@pytest.fixture(scope="module")
def whole(params):
    """Loss and gradient with everything kept, all logits at once."""
    mask = default_token_mask(TOKENS, 1)
    return jax.jit(jax.value_and_grad(lambda p: loss(CONFIG, p, TOKENS, mask)[0]))(params)


@pytest.mark.parametrize(
    "options",
    [
        {"remat": "layer"},
        {"remat": "products"},
        {"unroll": True},
        {"remat": "layer", "unroll": True},
        {"max_logits": 3 * 2 * 11},  # 5 positions in two pieces: 3 and 2
        {"max_logits": 1},  # position by position
    ],
    ids=str,
)
def test_what_saves_memory_or_time_gives_the_same_gradient(params, whole, options):
    mask = default_token_mask(TOKENS, 1)
    total, gradient = jax.jit(jax.value_and_grad(lambda p: loss(CONFIG, p, TOKENS, mask, **options)[0]))(params)
    np.testing.assert_allclose(total, whole[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, whole[1])


def test_less_is_held_for_the_gradient():
    """With remat "layer", less than a third of it: 8 layers keep their input alone. With pieces, not all logits."""
    config = TransformerConfig(n_layer=8, n_head=2, d_model=16, d_hidden=64, n_ctx=64, n_vocab=4096)
    tokens = jnp.zeros((8, 64), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]

    def held(**options):
        gradient = jax.grad(lambda p: loss(config, p, tokens, jnp.ones((8, 64), bool), **options)[0])
        return jax.jit(gradient).lower(params).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 8 * 64 * 4096
    everything, products, layer = (held(max_logits=8 * 4096, remat=remat) for remat in (None, "products", "layer"))
    assert layer < everything / 3
    assert layer < products < everything
    assert layer < logits < held(remat="layer")


def test_an_unknown_remat_is_named(params):
    with pytest.raises(ValueError, match=r"unknown remat 'all'; choose None or one of \['products', 'layer'\]"):
        forward(CONFIG, params, TOKENS, remat="all")


def test_the_loss_of_rows_and_weights_on_eight_devices(params, whole):
    """Rows over 4 devices and hidden units over 2, in pieces: the same loss and gradient."""
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((4, 2), ("rows", "units"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(path, leaf):
        axes = {"w_l": (None, "units"), "w_r": (None, "units"), "w_p": (None, None, "units")}.get(path[-1].key, ())
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    there = jax.tree_util.tree_map_with_path(place, params)
    rows = jax.device_put(jnp.tile(TOKENS, (2, 1)), NamedSharding(mesh, PartitionSpec("rows")))
    mask = default_token_mask(jnp.tile(TOKENS, (2, 1)), 1)
    sums = jax.jit(jax.value_and_grad(lambda p, t: loss(CONFIG, p, t, mask, remat="layer", max_logits=100)[0]))
    total, gradient = sums(there, rows)
    np.testing.assert_allclose(total, 2 * whole[0], rtol=1e-6)
    assert gradient["layers"]["mlp"]["w_l"].sharding.spec == PartitionSpec(None, "units")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-4, atol=1e-6), gradient, whole[1])


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (["mlp"], "no site 'mlp': choose one of resid_pre"),
        ([("mlp_in", 3)], "no layer 3 in this model's mlp_in: choose one of 0 ... 2"),
        ([("mlp_in", -1)], "no layer -1 in this model's mlp_in: choose one of 0 ... 2"),
    ],
)
def test_bad_sites_are_named(params, sites, message):
    with pytest.raises(UnknownNameError, match=message):
        capture(CONFIG, params, TOKENS, sites)


def test_no_site_is_an_error(params):
    with pytest.raises(ValueError, match="there is no site to capture: name at least one of resid_pre"):
        capture(CONFIG, params, TOKENS, [])


def test_an_edit_must_keep_the_shape(params):
    with pytest.raises(ValueError, match=r"mlp_out is \(2, 5, 8\), the edit returned \(2, 5\)"):
        forward(CONFIG, params, TOKENS, {"mlp_out": lambda x: x[..., 0]})
    with pytest.raises(UnknownNameError, match="no site 'mlpout': choose one of resid_pre"):
        forward(CONFIG, params, TOKENS, {"mlpout": lambda x: x})


def test_tokens_that_are_times_or_hidden():
    tokens = np.arange(6).reshape(2, 3)
    for bad in (tokens.astype("m8[s]"), [[np.timedelta64(1, "s")]]):
        with pytest.raises(ValueError, match=r"tokens .*must be (numbers|integers)"):
            token_array(bad)
    with pytest.raises(ValueError, match=r"tokens are a masked array that hides some of them: fill it"):
        token_array(np.ma.masked_array(tokens, tokens == 4))
    assert token_array(np.ma.masked_array(tokens)).tolist() == tokens.tolist()
