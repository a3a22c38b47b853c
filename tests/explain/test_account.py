"""The account of a pre-activation: it adds up on real models, and each term is what its formula says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain.account import TERMS, account, account_at, output_feature
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.nn.attention import rms_norm
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import MLP, TransformerConfig

D = 8


def normal(*shape, seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def case(site="mlp_in", bias=False, inp=(), out=(), expansion=3, k=3):
    """A tracer of a model that is an MLP alone, and at 5 tokens what the input SAE reads and the MLP's output."""
    config = TransformerConfig(1, 1, D, 12, 16, 11, bias=bias)
    shapes = {"w_l": (12, D), "w_r": (12, D), "w_p": (D, 12)}
    shapes |= {"b_l": (12,), "b_r": (12,), "b_p": (D,)} if bias else {}
    mlp = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    lm = LanguageModel({"layers": {"mlp": {name: weight[None] for name, weight in mlp.items()}}}, config)
    saes = []
    for seed, (where, options) in enumerate(((site, inp), ("mlp_out", out))):
        sae = SAE.init(SAEConfig(where, 0, D, expansion, k, **dict(options)), jax.random.key(seed))
        params = {name: normal(*value.shape, seed=10 * seed + len(name)) for name, value in sae.params.items()}
        saes.append(SAE(params, sae.config))
    x = 3 * normal(5, D, seed=7)
    seen = rms_norm(x) if site == "resid_mid" else x
    return Tracer(lm, 0, *saes), x, MLP(config).apply({"params": mlp}, seen)


def preactivations(out: SAE, y) -> jax.Array:
    return out.preactivations(y)


def adds_up(found, true):
    """To 1e-5 of the pre-activation, or of its root mean square where it happens to be near 0."""
    true = np.asarray(true)
    allowed = 1e-5 * np.maximum(np.abs(true), np.sqrt(np.mean(true**2)))
    for value in (found.total, found.preactivation):
        assert np.all(np.abs(np.asarray(value) - true) <= allowed)


@pytest.mark.parametrize("site", ["mlp-in", "resid-mid"])
def test_it_adds_up_on_the_shipped_model(site):
    lm = load("ts-nano")
    tracer = Tracer(lm, 2, inp={"site": site})
    tokens = lm.encode("One day, a little girl named Lily found a needle in her room. She knew it was not a toy.")
    true = preactivations(tracer.out, lm.capture(tokens, [("mlp_out", 2)])["mlp_out", 2])
    for feature in (7, 100, 1023):
        found = account(tracer, tokens, feature)
        adds_up(found, true[..., feature])
        assert found.pairs.shape == (*tokens.shape, 20, 20)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("site", ["mlp-in", "resid-mid"])
def test_it_adds_up_on_the_golden_case(golden, site, layer):
    tracer = Tracer(golden.lm, layer, inp={"site": site}, scope=published.SCOPE)
    true = preactivations(tracer.out, golden.lm.capture(golden.ids, [("mlp_out", layer)])["mlp_out", layer])
    for feature in (0, 127):
        adds_up(account(tracer, golden.ids, feature), true[..., feature])


CASES = {
    "plain": {},
    "biases of the MLP": {"bias": True},
    "before the norm": {"site": "resid_mid"},
    "before the norm, with biases": {"site": "resid_mid", "bias": True},
    "passthrough": {"inp": {"passthrough": (1, 6)}},
    "passthrough before the norm, with biases": {"site": "resid_mid", "bias": True, "inp": {"passthrough": (0,)}},
    "a lookup": {"inp": {"token_lookup": 11, "normalize": 4.0, "apply_normalize": True}, "out": {"token_lookup": 11}},
    "a lookup before the norm, with biases": {
        "site": "resid_mid",
        "bias": True,
        "inp": {"token_lookup": 11, "passthrough": (0,)},
    },
    "normalised": {
        "inp": {"normalize": 4.0, "apply_normalize": True},
        "out": {"normalize": 3.0, "apply_normalize": True},
    },
    "recorded and not applied": {"inp": {"normalize": 4.0}, "out": {"normalize": 3.0}},
    "encoder biases": {"inp": {"encoder_bias": True}, "out": {"encoder_bias": True}},
    "a bilinear encoder": {"inp": {"bilinear_encoder": True}},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_each_term_is_its_formula(options):
    # In float64 and with dense codes. A term in a wrong place would leave the sum as it is.
    tracer, x, y = case(**options)
    feature, tokens = 5, jnp.asarray([3, 0, 10, 3, 7])
    found = account_at(output_feature(tracer, feature), x, y, tokens=tokens)
    true = preactivations(tracer.out, y)[:, feature]
    np.testing.assert_allclose(found.preactivation, true, rtol=1e-4)
    # These random SAEs reconstruct nothing, so that large terms cancel: to float32's rounding of those.
    np.testing.assert_allclose(found.total, true, atol=1e-6 * float(found.magnitude[1].max()))

    q, basis, inp = np.asarray(tracer.q(feature), np.float64), np.asarray(tracer.basis, np.float64), tracer.inp
    scale = (
        1 / np.sqrt(np.mean(np.asarray(x, np.float64) ** 2, axis=1)) if inp.config.site == "resid_mid" else np.ones(5)
    )
    factor = inp.config.normalize if inp.config.apply_normalize else 1
    codes = np.asarray(inp.encode(x), np.float64)
    b, p = np.asarray(inp.b_dec, np.float64) * factor, np.zeros((5, D))
    p[:, list(inp.config.passthrough)] = np.asarray(x)[:, list(inp.config.passthrough)]
    if inp.config.token_lookup:
        p += factor * np.asarray(inp.params["w_lookup"], np.float64)[tokens]
    e = np.asarray(x, np.float64) - codes @ np.asarray(inp.w_dec, np.float64).T * factor - b - p
    b, p, e, f = (part * scale[:, None] for part in (np.broadcast_to(b, p.shape), p, e, codes))
    if options.get("bias"):
        f = np.concatenate([f, np.ones((5, 1))], axis=1)
        b, p, e = (np.pad(part, ((0, 0), (0, 1))) for part in (b, p, e))
    assert basis.shape[1] == f.shape[1]
    read = f @ basis.T

    def form(left, right):
        return np.einsum("ti,ij,tj->t", left, q, right)

    out = tracer.out
    encoder = -np.asarray(out.w_enc)[feature] @ np.asarray(out.b_dec)
    encoder += np.asarray(out.params["b_enc"])[feature] if out.config.encoder_bias else 0
    expected = {
        "pairs": form(read, read),
        "feature_bias": 2 * form(read, b),
        "bias": form(b, b),
        "passthrough": 2 * form(p, read + b) + form(p, p),
        "error_cross": 2 * form(e, read + b + p),
        "error_error": form(e, e),
        "form": np.zeros(5),
        "encoder": np.full(5, encoder),
    }
    assert list(found.terms) == list(TERMS) == list(expected)
    size = np.abs(list(expected.values())).max()
    for name, values in expected.items():
        np.testing.assert_allclose(found.terms[name], values, rtol=1e-4, atol=1e-5 * size, err_msg=name)

    weights, single = np.asarray(tracer.q(feature, project=True)), 2 * (b @ q) @ basis
    for t in range(5):
        i, c = np.asarray(found.indices[t]), f[t, np.asarray(found.indices[t])]
        assert set(i) >= set(np.flatnonzero(f[t]))
        np.testing.assert_allclose(found.codes[t], c, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.pairs[t], np.outer(c, c) * weights[np.ix_(i, i)], rtol=1e-4, atol=1e-5 * size)
        np.testing.assert_allclose(found.feature_bias[t], c * single[t, i], rtol=1e-4, atol=1e-5 * size)
    of_pairs, of_all = found.magnitude
    np.testing.assert_allclose(of_pairs, np.abs(found.pairs).sum(axis=(1, 2)), rtol=1e-5)
    other = np.abs(found.feature_bias).sum(axis=1) + sum(np.abs(expected[name]) for name in list(TERMS)[2:])
    np.testing.assert_allclose(of_all - of_pairs, other, rtol=1e-4, atol=1e-5 * size)


def test_worked_by_hand():
    # y = x_0 x_1 and the SAE's features are the coordinates; b = (0, 1), k = 1: x = (2, 4) has f = (0, 3), e = (2, 0)
    config = TransformerConfig(1, 1, 2, 1, 4, 3)
    mlp = {"w_l": jnp.array([[[1.0, 0]]]), "w_r": jnp.array([[[0, 1.0]]]), "w_p": jnp.array([[[1.0], [0]]])}
    lm = LanguageModel({"layers": {"mlp": mlp}}, config)
    params = {"w_enc": jnp.eye(2), "w_dec": jnp.eye(2), "b_dec": jnp.array([0.0, 1.0])}
    inp = SAE(params, SAEConfig("mlp_in", 0, 2, 1, 1))
    out = SAE({**params, "b_dec": jnp.array([0.5, 0])}, SAEConfig("mlp_out", 0, 2, 1, 1))
    found = account_at(output_feature(Tracer(lm, 0, inp, out), 0), jnp.array([2.0, 4.0]), jnp.array([8.0, 0.0]))
    terms = {name: float(value) for name, value in found.terms.items()}
    # 2 e^T Q (D f + b) = 2 * 2 * (1/2) * (3 + 1) = 8
    assert terms == {name: {"error_cross": 8.0, "encoder": -0.5}.get(name, 0.0) for name in TERMS}
    assert (float(found.total), float(found.preactivation), found.indices.tolist()) == (7.5, 7.5, [1])


def test_whatever_runs_at_once(monkeypatch):
    tracer, x, y = case(site="resid_mid", bias=True)
    output = output_feature(tracer, 5)
    whole = account_at(output, x, y)

    def same(other):
        for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6 * float(whole.magnitude[1].max()))

    same(jax.jit(account_at)(output, x, y))
    same(jax.jit(jax.vmap(account_at, (None, 0, 0)))(output, x, y))
    same(jax.tree.map(lambda a: a.reshape(5, *a.shape[2:]), account_at(output, x[:, None], y[:, None])))
    of_feature = jax.jit(jax.vmap(lambda feature: account_at(output_feature(tracer, feature), x, y)))
    features = of_feature(jnp.array([2, 5]))
    same(jax.tree.map(lambda a: a[1], features))
    monkeypatch.setattr("bilinear_jax.explain.account.TOKENS_AT_ONCE", 2)
    same(account_at(output, x, y))


def test_the_gradient_is_that_of_the_pre_activation():
    # With respect to x, and where the codes are a function of x too: what they hold more, the error holds less.
    tracer, x, y = case()
    output = output_feature(tracer, 5)
    gradient = jax.jit(jax.grad(lambda x: account_at(output, x, y).total.sum()))(x)
    np.testing.assert_allclose(gradient, 2 * x @ output.q, rtol=1e-4, atol=1e-3)


def test_nothing_of_features_times_features():
    tracer, x, y = case(expansion=13)
    text = str(jax.make_jaxpr(account_at)(output_feature(tracer, 5), x, y))
    assert "f32[5,104]" in text and "104,104" not in text


def test_a_low_precision_model_has_its_own_pre_activation(golden):
    lm = dataclasses.replace(golden.lm, compute_dtype=jnp.bfloat16)
    tracer = Tracer(lm, 1, scope=published.SCOPE)
    found = account(tracer, golden.ids, 3)
    y = lm.capture(golden.ids, [("mlp_out", 1)])["mlp_out", 1].astype(jnp.float32)
    np.testing.assert_allclose(found.preactivation, preactivations(tracer.out, y)[..., 3], rtol=1e-4, atol=1e-5)
    assert found.total.dtype == jnp.float32
    assert np.abs(found.total - found.preactivation).max() < 0.05 * np.abs(found.preactivation).max()


def test_what_has_no_account(golden):
    lm = golden.lm
    with pytest.raises(ValueError, match="use_encoder=True"):
        account(Tracer(lm, 1, use_encoder=False, scope=published.SCOPE), golden.ids, 0)
    tracer = Tracer(lm, 1, scope=published.SCOPE)
    with pytest.raises(ValueError, match="but it must be one output feature, an int"):
        account(tracer, golden.ids, [1, 2])
    with pytest.raises(UnknownNameError, match=r"no feature 128 in SAE 1-mlp-out-x4-k6: choose one of 0 \.\.\. 127"):
        account(tracer, golden.ids, 128)
    with pytest.raises(ValueError, match=r"are not \[batch, seq\]: for one row, write tokens\[None\]"):
        account(tracer, golden.ids[0], 0)
