"""Plain directions in place of SAEs, and bilinear forms of gated models: against explicit formulas in NumPy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain.account import account
from bilinear_jax.explain.directions import Directions
from bilinear_jax.explain.overview import feature_weights
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.measure.cofiring import co_firing
from bilinear_jax.measure.correlation import low_rank_correlation
from bilinear_jax.measure.pairs import pair_summaries
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.tensor import with_constant

D, LAYER = 8, 1
TOKENS = np.random.default_rng(3).integers(0, 11, (3, 5))
GATED: dict[str, Any] = {"n_kv_head": 1, "gains": True, "tied": True, "embed_scale": 1.5, "rms_eps": 1e-3, "bias": True}


def randomised(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / np.sqrt(a.shape[-1]), jnp.float32), tree)


@pytest.fixture(scope="module")
def form() -> LanguageModel:
    """A form that is far from its gated model: every weight is random, and so are the gains."""
    config = TransformerConfig(2, 2, D, 12, 6, 11, linear=True, original_gate="silu", original_above=True, **GATED)
    lm = LanguageModel.init(config, jax.random.key(0))
    params = randomised(lm.params)
    return LanguageModel({**params, "layers": params["layers"] | {"original_above": jnp.full(2, 1e9)}}, config)


@pytest.fixture(scope="module")
def gated(form) -> LanguageModel:
    layers = dict(form.params["layers"])
    layers["mlp"] = layers.pop("original")
    del layers["original_above"]
    return LanguageModel({**form.params, "layers": layers}, TransformerConfig(2, 2, D, 12, 6, 11, gate="silu", **GATED))


def sae(site: str, seed=0) -> SAE:
    made = SAE.init(SAEConfig(site, LAYER, D, 2, 3), jax.random.key(seed))
    return SAE(made.params | {"b_dec": jnp.full(D, 0.3)}, made.config)


def form_mlp(form: LanguageModel, x: np.ndarray) -> np.ndarray:
    """What the bilinear MLP makes of mlp_in, in float64."""
    w = {name: np.asarray(value[LAYER], np.float64) for name, value in form.params["layers"]["mlp"].items()}
    hidden = (x @ w["w_l"].T + w["b_l"]) * (x @ w["w_r"].T + w["b_r"])
    return hidden @ w["w_p"].T + w["b_p"] + x @ w["w_s"].T


def close(actual, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=atol, rtol=2e-5)


# Bilinear forms


@pytest.mark.parametrize("site", ["mlp_in", "resid_mid"])
def test_the_account_of_a_form_is_that_of_the_gated_model(form, gated, site):
    out, feature = sae("mlp_out", 1), 5
    found = account(Tracer(form, LAYER, sae(site), out), TOKENS, feature)
    got = gated.capture(TOKENS, [("mlp_in", LAYER), ("mlp_out", LAYER)])
    x, y = (np.asarray(got[name, LAYER], np.float64) for name in ("mlp_in", "mlp_out"))
    u = np.asarray(out.encoder[feature], np.float64)
    close(found.preactivation, (y - 0.3) @ u)
    close(found.total, found.preactivation)
    close(found.form, (y - form_mlp(form, x)) @ u)  # at position 0 too
    assert np.abs(found.form).min() > 1e-3


def test_the_account_of_a_gated_model_is_not_that_of_its_forms_own_stream(form, gated):
    own = form.capture(TOKENS, [("mlp_out", LAYER)])["mlp_out", LAYER]
    theirs = gated.capture(TOKENS, [("mlp_out", LAYER)])["mlp_out", LAYER]
    assert np.abs(own - theirs)[:, 1:].max() > 0.1
    assert gated.original is gated
    assert form.original.config == gated.config
    assert jax.tree.structure(form.original.params) == jax.tree.structure(gated.params)
    close(form.original.logits(TOKENS), gated.logits(TOKENS))


def test_pair_summaries_of_a_form_add_up(form, gated):
    tracer = Tracer(form, LAYER, sae("resid_mid"), sae("mlp_out", 1))
    mask = np.ones(TOKENS.shape, bool)
    summary = pair_summaries(tracer, TOKENS, {5: [(0, 1), (2, 16)]}, token_mask=mask, batch_size=2)[5]
    found = account(tracer, TOKENS, 5)
    close(sum(summary.terms.values()), np.mean(found.preactivation))
    close(summary.terms["form"], np.mean(found.form))
    close(summary.magnitude, np.mean(found.magnitude.whole))
    assert co_firing(tracer, TOKENS, token_mask=mask).tokens == mask.sum()


def test_all_eigenpairs_of_mlp_in_predict_what_the_form_makes_of_it(form, gated):
    # With the input SAE before the norm, the tracer's tensor has the gain of the norm; mlp_in has it already.
    out = sae("mlp_out", 1)
    tokens = np.random.default_rng(5).integers(0, 11, (12, 6))
    found = low_rank_correlation(Tracer(form, LAYER, sae("resid_mid"), out), tokens, ks=[D + 1], min_count=5)
    got = gated.capture(tokens, [("mlp_in", LAYER), ("mlp_out", LAYER)])
    x, y = (np.asarray(got[name, LAYER])[:, 1:].reshape(-1, D) for name in ("mlp_in", "mlp_out"))
    codes, predicted = np.asarray(out.encode(y)), form_mlp(form, x) @ np.asarray(out.encoder).T
    feature = int(np.nanargmax(found.count))
    fires = codes[:, feature] != 0
    close(found.r[0, feature], np.corrcoef(codes[fires, feature], predicted[fires, feature])[0, 1], 1e-4)


class Certified(NamedTuple):
    """What the tracer needs of a bilinear form."""

    lm: LanguageModel
    certificate: Any


class Certificate:
    def of(self, directions):
        return np.stack([np.asarray(directions).sum(axis=1), np.asarray(directions)[:, 0]])


def test_a_form_brings_its_certificate(form):
    u = np.random.default_rng(0).normal(size=(4, D)).astype(np.float32)
    tracer = Tracer(Certified(form, Certificate()), LAYER, out=u)
    assert tracer.lm is form
    close(tracer.r2([2, 0]), u[[2, 0], 0])
    close(Tracer(Certified(form, Certificate()), 0, out=u).r2(), u.sum(axis=1))
    with pytest.raises(UnknownNameError, match="no feature 4 in 4 directions"):
        tracer.r2(4)
    with pytest.raises(ValueError, match=r"a bilinear form without its certificate: make it from the form itself"):
        Tracer(form, LAYER, out=u).r2()


# Plain directions


def test_the_matrix_of_a_direction_is_the_mlp_along_it(form, gated):
    # In coordinates of r / rms(r), with the gain of the norm in the matrix.
    u = Directions.tokens(form, [3, 7])
    tracer = Tracer(form, LAYER, out=u)
    got = gated.capture(TOKENS, [("resid_mid", LAYER), ("mlp_in", LAYER)])
    r, x = (np.asarray(got[name, LAYER], np.float64) for name in ("resid_mid", "mlp_in"))
    read = with_constant(jnp.asarray(r / np.sqrt(np.mean(r**2, axis=-1, keepdims=True) + 1e-3), jnp.float32))
    q = tracer.q(slice(None))
    assert q.shape == (2, D + 1, D + 1)
    close(jnp.einsum("rsi,uij,rsj->rsu", read, q, read), form_mlp(form, x) @ np.asarray(u.vectors).T)
    close(tracer.q(1, project=True), q[1])  # the basis is that of the coordinates

    top = tracer.top_eigh(k=D + 1)
    close(np.sort(top.values, axis=1), np.linalg.eigvalsh(np.asarray(q, np.float64)))
    weights = next(feature_weights(tracer, [1], eigenpairs=2, reads=1, pairs=3))
    close(weights.weights[0], np.asarray(q[1]).flat[np.abs(q[1]).argmax()])


def test_an_entry_is_what_two_written_directions_do_together():
    lm = LanguageModel.init(TransformerConfig(2, 2, D, 12, 6, 11), jax.random.key(0))
    rng = np.random.default_rng(1)
    d, u, x = (rng.normal(size=shape).astype(np.float32) for shape in ((3, D), (2, D), (D,)))
    tracer = Tracer(lm, LAYER, inp=d, out=u)
    w = {name: np.asarray(value[LAYER], np.float64) for name, value in lm.params["layers"]["mlp"].items()}

    def along(x):
        return ((x @ w["w_l"].T) * (x @ w["w_r"].T)) @ w["w_p"].T @ u[1]

    a, b = 0.7, -1.3
    mixed = along(x + a * d[0] + b * d[2]) - along(x + a * d[0]) - along(x + b * d[2]) + along(x)
    q = tracer.q(1, project=True)
    assert q.shape == (3, 3)
    close(2 * a * b * q[0, 2], mixed)
    close(tracer.r2(), [1, 1])


def test_a_planted_linear_map_and_constant_are_found():
    config = TransformerConfig(1, 1, D, 4, 6, 11, bias=True, linear=True, original_gate="silu")
    lm = LanguageModel.init(config, jax.random.key(0))
    u, v = np.eye(D, dtype=np.float32)[[2, 5]]
    mlp = jax.tree.map(jnp.zeros_like, lm.params["layers"]["mlp"])
    mlp |= {"w_s": jnp.asarray(-6 * np.outer(u, v))[None], "b_p": jnp.asarray(0.5 * u)[None]}
    lm = LanguageModel({**lm.params, "layers": {**lm.params["layers"], "mlp": mlp}}, config)
    inputs = Directions(np.eye(D, dtype=np.float32)[[1, 5]], ("no", "yes"))
    found = Tracer(lm, 0, inp=inputs, out=u[None]).top_interactions(2, 0)
    # u . y = -6 v . x + 1/2: each pair i < j stands for two entries
    assert [tuple(map(float, row)) for row in zip(found.i, found.j, found.value, strict=True)] == [
        (1, 2, -3),
        (2, 2, 0.5),
    ]

    # The account of u itself: the map is the pair of v with the constant.
    params = {"w_enc": jnp.eye(D), "w_dec": jnp.eye(D), "b_dec": jnp.zeros(D)}
    tracer = Tracer(lm, 0, SAE(params, SAEConfig("mlp_in", 0, D, 1, D)), u[None])
    one = account(tracer, TOKENS, 0)
    got = lm.original.capture(TOKENS, ["mlp_in", "mlp_out"])
    close(one.terms["pairs"], -6 * got["mlp_in"][0] @ v + 0.5)
    close(one.form, got["mlp_out"][0] @ u - one.terms["pairs"])
    close(one.preactivation, got["mlp_out"][0] @ u)
    assert not np.asarray(one.encoder).any()


def test_rows_of_tokens_read_logits_and_write_embeddings(form):
    logits, written = Directions.tokens(form, range(11)), Directions.tokens(form, [4], of="w_e")
    r = np.asarray(form.capture(TOKENS, [("resid_post", 1)])["resid_post", 1], np.float64)
    read = r / np.sqrt(np.mean(r**2, axis=-1, keepdims=True) + 1e-3)
    close(read @ np.asarray(logits.vectors).T, form.logits(TOKENS))
    close(written.vectors[0], form.capture([[4]], [("resid_pre", 0)])["resid_pre", 0][0, 0])
    assert (written.labels, len(logits)) == (("4",), 11)


def test_differences():
    lm = load("ts-nano")
    dog, others = Directions.tokens(lm, " dog"), Directions.tokens(lm, [" Lily", 409])
    found = others - dog
    assert found.labels == (" Lily - dog", "409 - dog")
    close(found.vectors, np.asarray(lm.w_u)[[409, 409]] - np.asarray(lm.w_u)[491])
    close((dog - others).vectors, -found.vectors)
    tracer = Tracer(lm, 2, out=found)
    close(tracer.cosines([0, 1]), np.ones((2, 2)))
    assert repr(tracer) == "Tracer(layer=2, inp=256 directions, out=2 directions, use_encoder=True)"
    with pytest.raises(ValueError, match=r"shapes \(2, 256\) and \(3, 256\) have no difference"):
        _ = found - Directions(np.eye(3, 256))


def test_the_default_input_sae_stands_before_a_plain_output():
    tracer = Tracer(load("ts-nano"), 2, inp={}, out=np.eye(2, 256))
    assert tracer.inp.config.site == "mlp_in"
    assert tracer.q(0, project=True).shape == (1024, 1024)


# Errors


def test_what_needs_codes_says_so(form):
    u = np.eye(2, D)
    without = Tracer(form, LAYER, out=u)
    for use in (lambda: account(without, TOKENS, 0), lambda: co_firing(without, TOKENS), lambda: without.inp):
        with pytest.raises(ValueError, match="plain directions as inp, but this needs the codes of an input SAE: make"):
            use()
    half = Tracer(form, LAYER, sae("mlp_in"), u)
    with pytest.raises(ValueError, match="plain directions as out, but this needs the codes of an output SAE: make"):
        pair_summaries(half, TOKENS, {0: [(0, 1)]})
    with pytest.raises(UnknownNameError, match="no feature 2 in 2 directions"):
        account(half, TOKENS, 2)
    with pytest.raises(ValueError, match=r"feature is 0\.5, but one of 2 directions must be an int"):
        half.check_feature(0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Directions(np.ones(3)),
            r"shape \(3,\), but they must be rows \[n, d_model\]: for one, write u\[None\]",
        ),
        (lambda: Directions(np.ones((0, 3))), r"shape \(0, 3\)"),
        (lambda: Directions(np.full((1, 3), np.nan)), "NaN or infinite values"),
        (lambda: Directions(np.ones((2, 3)), ("one",)), "1 labels for 2 directions"),
        (lambda: Directions(np.ones((1, 3), complex)), "must hold real numbers"),
        (lambda: Directions.tokens(load("ts-nano"), "dog"), r"'dog' is 2 tokens of this model \('d', 'og'\)"),
        (lambda: Directions.tokens(load("ts-nano"), ""), r"'' is 0 tokens of this model \(none\)"),
        (lambda: Directions.tokens(load("ts-nano"), [1.5]), "1.5 is no token"),
        (lambda: Directions.tokens(load("ts-nano"), 3, of="w_o"), "of is 'w_o', but it must be 'w_u'"),
        (lambda: Tracer(load("ts-nano"), 2, out=np.ones((1, 9))), r"out is directions of width 9, .* rows \[n, 256\]"),
    ],
)
def test_no_directions(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_token():
    with pytest.raises(UnknownNameError, match=r"no token -1 in this model: choose one of 0 \.\.\. "):
        Directions.tokens(load("ts-nano"), [3, -1])
