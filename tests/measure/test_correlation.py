"""Low-rank correlation: planted answers, the identity at full rank, brute force, and every split the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.measure.correlation import LowRankCorrelation, _pearson, low_rank_correlation
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig

D = 4  # d_model of the planted models


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def planted(x, left, right, down, encoder, biases=None, **sae) -> tuple[Tracer, np.ndarray]:
    """A tracer of a model whose MLP sees row t of x at token t (no attention, no norm), and each token once."""
    n_vocab, hidden = len(x), len(left)
    config = TransformerConfig(1, 1, D, hidden, 8, n_vocab, normalization=False, bias=biases is not None)
    mlp = {"w_l": left, "w_r": right, "w_p": down, **(biases or {})}
    layers = {
        "attention": {name: jnp.zeros((1, D, D)) for name in ("w_q", "w_k", "w_v", "w_o")},
        "mlp": {name: jnp.asarray(np.asarray(weight)[None], jnp.float32) for name, weight in mlp.items()},
    }
    embedding = jnp.asarray(x, jnp.float32)
    lm = LanguageModel({"w_e": embedding, "w_u": embedding, "layers": layers}, config)
    saes = [SAE.init(SAEConfig(site, 0, D, len(encoder) // D, 1), jax.random.key(0)) for site in ("mlp_in", "mlp_out")]
    out = SAE(
        saes[1].params | {name: jnp.asarray(sae.pop(name), jnp.float32) for name in ("b_dec", "b_enc") if name in sae},
        dataclasses.replace(saes[1].config, **{"k": len(encoder), **sae}),
    )
    out.params["w_enc"] = jnp.asarray(encoder, jnp.float32)
    return Tracer(lm, 0, saes[0], out), np.arange(n_vocab).reshape(-1, 8)


def everywhere(tokens) -> np.ndarray:
    return np.ones(tokens.shape, bool)


def test_planted_ranks():
    # hidden units: v.x squared, and (a.x) (b.x) with orthogonal a and b: one eigenpair, and a pair +l, -l
    v, a, b = np.array([1.0, 2, 0, 1]), np.array([1.0, 0, 2, 0]), np.array([0, 1.0, 0, 1])
    down = np.zeros((D, 2))
    down[0, 0], down[1, 1] = 1, 3
    tracer, tokens = planted(normal(400, D), [v, a], [v, b], down, np.eye(D)[[0, 1, 1, 0]] * [[1], [1], [-2], [-5]])
    found = low_rank_correlation(tracer, tokens, (1, 2), token_mask=everywhere(tokens))
    r = np.asarray(found.r)
    assert np.array_equal(found.count, [400] * 4)  # a negative code is an activation too
    np.testing.assert_allclose(r[:, [0, 3]], 1, atol=1e-5)
    np.testing.assert_allclose(r[1, [1, 2]], 1, atol=1e-5)
    assert (r[0, [1, 2]] > 0.3).all() and (r[0, [1, 2]] < 0.9).all()
    np.testing.assert_allclose(found.mean, r.mean(axis=1), rtol=1e-5)
    assert found.share_above(0.95).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "sae",
    [
        {"k": 3},
        {"k": 3, "b_dec": normal(D, seed=5), "encoder_bias": True, "b_enc": normal(8, seed=6)},
        {"k": 8, "normalize": 3.0, "apply_normalize": True},
    ],
)
def test_all_eigenpairs_give_the_activation(biased, sae):
    biases = {"b_l": normal(5, seed=7), "b_r": normal(5, seed=8), "b_p": normal(D, seed=9)} if biased else None
    factors = normal(5, D, seed=2), normal(5, D, seed=3), normal(D, 5, seed=4)
    tracer, tokens = planted(normal(240, D), *factors, normal(8, D, seed=1), biases, **sae)
    found = low_rank_correlation(tracer, tokens, [D + biased], token_mask=everywhere(tokens))
    assert found.count.sum() == 240 * sae["k"]
    np.testing.assert_allclose(found.r, 1, atol=1e-5)


@pytest.fixture(scope="module")
def micro() -> LanguageModel:
    return load(published.MODEL, attn_scale=published.SCALE)


@pytest.fixture(scope="module")
def corpus(micro) -> np.ndarray:
    return np.random.default_rng(0).integers(3, micro.config.n_vocab, (60, 12))


@pytest.mark.parametrize("compute_dtype", [jnp.float32, jnp.bfloat16])
def test_brute_force(micro, corpus, compute_dtype):
    """Dense Q, numpy's eigh and corrcoef, on a model with attention and norms, and 6 of 128 features active."""
    lm = dataclasses.replace(micro, compute_dtype=compute_dtype)
    tracer, ks = Tracer(lm, 1, scope=published.SCOPE), (1, 2, 5, 32)
    found = low_rank_correlation(tracer, corpus, ks, batch_size=60)

    got = lm.capture(corpus, [("mlp_in", 1), ("mlp_out", 1)])
    x, y = (np.asarray(got[site, 1][:, 1:], np.float32).reshape(-1, 32) for site in ("mlp_in", "mlp_out"))
    codes = np.asarray(tracer.out.encode(jnp.asarray(y)), np.float64)
    assert np.array_equal(found.count, (codes != 0).sum(axis=0))
    measured = np.flatnonzero((codes != 0).sum(axis=0) > 10)
    assert 20 < len(measured) < 128 and np.array_equal(found.features, [len(measured)] * 4)
    assert np.array_equal(np.isfinite(found.r), np.isin(np.arange(128), measured) & np.ones((4, 1), bool))
    for feature in measured[:12]:
        values, vectors = np.linalg.eigh(np.asarray(tracer.q(int(feature)), np.float64))
        order = np.argsort(-np.abs(values))
        active = codes[:, feature] != 0
        terms = values[order] * (x[active].astype(np.float64) @ vectors[:, order]) ** 2
        expected = [np.corrcoef(terms[:, :k].sum(axis=1), codes[active, feature])[0, 1] for k in ks]
        np.testing.assert_allclose(found.r[:, feature], expected, atol=2e-5)


def test_the_input_is_what_the_mlp_sees_wherever_the_input_sae_reads(micro, corpus):
    tracers = (Tracer(micro, 1, inp={"site": site}, scope=published.SCOPE) for site in ("mlp-in", "resid-mid"))
    one, other = (low_rank_correlation(tracer, corpus, (1, 32)).r for tracer in tracers)
    assert np.array_equal(one, other, equal_nan=True)


@pytest.mark.parametrize("batch_size", [1, 7, 59])
def test_every_split_gives_the_same(micro, corpus, batch_size, monkeypatch):
    tracer = Tracer(micro, 2, scope=published.SCOPE)
    whole = low_rank_correlation(tracer, corpus, batch_size=1000, ks=(1, 3))
    monkeypatch.setattr("bilinear_jax.measure.correlation.FEATURES_AT_ONCE", 20 + batch_size)
    split = low_rank_correlation(tracer, corpus, batch_size=batch_size, ks=(1, 3))
    assert np.array_equal(split.count, whole.count)
    np.testing.assert_allclose(split.r, whole.r, atol=1e-5)


def test_position_0_and_padding_do_not_count_unless_they_are_asked_for(micro, corpus):
    lm = dataclasses.replace(micro, config=dataclasses.replace(micro.config, pad_id=0))
    tracer, padded = Tracer(lm, 1, scope=published.SCOPE), corpus.copy()
    padded[:, 9:] = 0
    cut = low_rank_correlation(tracer, corpus[:, :9], (1, 2))
    found = low_rank_correlation(tracer, padded, (1, 2))
    assert found.count.sum() == 60 * 8 * 6
    assert np.array_equal(found.count, cut.count)
    np.testing.assert_allclose(found.r, cut.r, atol=1e-5)
    every = low_rank_correlation(tracer, padded, (1, 2), token_mask=everywhere(padded))
    assert every.count.sum() == 60 * 12 * 6


def test_min_count_must_be_exceeded():
    # Feature i of 4 reads x_i^2, which is 0 but for 3 + i tokens
    x = normal(24, D)
    for i in range(D):
        x[3 + i :, i] = 0
    tracer, tokens = planted(x, np.eye(D), np.eye(D), np.eye(D), np.eye(D))
    found = low_rank_correlation(tracer, tokens, (1,), token_mask=everywhere(tokens), min_count=4)
    assert found.count.tolist() == [3, 4, 5, 6]
    assert np.isfinite(found.r).tolist() == [[False, False, True, True]]
    assert found.features.tolist() == [2]
    with pytest.raises(ValueError, match="more than 6 of the 24 tokens that count; the most active one is active at 6"):
        low_rank_correlation(tracer, tokens, (1,), token_mask=everywhere(tokens), min_count=6)


def test_constant_predictions_and_activations_have_no_r():
    # y_0 = 10 x_0^2 + x_1^2 and x_0 = 1.1: its first eigenpair predicts a constant. y_2 = x_0^2: the activation is one.
    # Feature 3 has a zero encoder row and fires by its bias alone.
    x = normal(80, D)
    x[:, 0] = 1.1
    down = np.zeros((D, 3))
    down[0], down[1], down[2] = [10, 1, 0], [0, 0, 1], [1, 0, 0]
    encoder = np.diag([1.0, 1, 1, 0])
    sides = np.eye(D)[:3]
    tracer, tokens = planted(x, sides, sides, down, encoder, encoder_bias=True, b_enc=[0, 0, 0, 2.5])
    found = low_rank_correlation(tracer, tokens, (1, 2), token_mask=everywhere(tokens))
    assert found.count.tolist() == [80] * 4
    assert np.isnan(found.r).tolist() == [[True, False, True, True], [False, False, True, True]]
    assert found.features.tolist() == [1, 2]
    np.testing.assert_allclose(found.mean, 1, atol=1e-5)
    assert found.share_above().tolist() == [1, 1]


def test_what_only_rounding_varies_is_constant():
    y = normal(50, seed=1).astype(np.float64)
    noise = 3.3 * (1 + np.finfo(np.float32).eps * normal(50).astype(np.float64))
    assert np.isnan(_pearson(np.stack([noise, y], axis=1), y)).tolist() == [True, False]
    assert np.isnan(_pearson(y[:, None], noise)).all()


def test_an_offset_does_not_cancel():
    # y = (v.x)^2 + 10,000: in float32, sums of squares would leave nothing of the deviations
    x, v = normal(4000, D), np.array([0.5, 1, 0, -1])
    offset = {"b_l": [0.0], "b_r": [0.0], "b_p": [1e4, 0, 0, 0]}
    tracer, tokens = planted(x, [v], [v], np.eye(D)[:, :1], np.eye(D), offset)
    found = low_rank_correlation(tracer, tokens, (2,), token_mask=everywhere(tokens))
    np.testing.assert_allclose(found.r[0, 0], 1, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(5, 40), st.integers(0, 2**32 - 1), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3))
def test_pearson(n, seed, offset, scale):
    rng = np.random.default_rng(seed)
    p, y, order = rng.normal(size=(n, 3)), rng.normal(size=n), rng.permutation(n)
    r = _pearson(p, y)
    np.testing.assert_allclose(r, [np.corrcoef(column, y)[0, 1] for column in p.T], atol=1e-10)
    np.testing.assert_allclose(_pearson(scale * (p + offset), (offset - y) / scale), -r, atol=1e-8)
    np.testing.assert_allclose(_pearson(p[order], y[order]), r, atol=1e-10)


def test_ks_come_back_in_order_and_once(micro, corpus):
    tracer = Tracer(micro, 1, scope=published.SCOPE)
    found = low_rank_correlation(tracer, corpus, [3, 1, 3])
    assert found.ks.tolist() == [1, 3]
    every = low_rank_correlation(tracer, corpus, np.arange(1, 5))
    np.testing.assert_allclose(every.r[np.array([0, 2])], found.r, atol=1e-6)


def test_the_summaries_work_inside_jit_and_leave_nan_out():
    r = jnp.array([[0.1, jnp.nan, 0.5, 0.9], [jnp.nan] * 4])
    found = LowRankCorrelation(r, jnp.array([11, 2, 20, 30]), jnp.array([1, 2]))
    mean, quartiles, share = jax.jit(lambda found: (found.mean, found.quartiles, found.share_above(0.5)))(found)
    np.testing.assert_allclose(mean, [0.5, np.nan], atol=1e-6)
    np.testing.assert_allclose(quartiles[:, 0], [0.3, 0.5, 0.7], atol=1e-6)
    assert np.isnan(quartiles[:, 1]).all()
    np.testing.assert_allclose(share, [1 / 3, np.nan], atol=1e-6)
    assert len(jax.tree.leaves(found)) == 3


def test_wrong_use_is_told(micro, corpus):
    tracer = Tracer(micro, 1, scope=published.SCOPE)
    for ks in ([], [0, 1], [1, 33]):
        with pytest.raises(ValueError, match=r"each k must lie in 1 \.\.\. 32 \(the inputs of the MLP\), .*; got"):
            low_rank_correlation(tracer, corpus, ks)
    for size in ("batch_size", "min_count"):
        with pytest.raises(ValueError, match=f"^{size} must be at least 1, got 0"):
            low_rank_correlation(tracer, corpus, (1,), **{size: 0})
    with pytest.raises(ValueError, match=r"tokens of shape .* are not \[rows, seq\]"):
        low_rank_correlation(tracer, corpus[0], (1,))
    with pytest.raises(ValueError, match="do not fit the context of"):
        low_rank_correlation(tracer, np.ones((2, micro.config.n_ctx + 1), int), (1,))
    with pytest.raises(ValueError, match="give one value a token"):
        low_rank_correlation(tracer, corpus, (1,), token_mask=everywhere(corpus[:, 1:]))
    with pytest.raises(ValueError, match="no token counts: set token_mask to True"):
        low_rank_correlation(tracer, corpus, (1,), token_mask=~everywhere(corpus))
    decoder = Tracer(micro, 1, use_encoder=False, scope=published.SCOPE)
    with pytest.raises(ValueError, match="make it with use_encoder=True"):
        low_rank_correlation(decoder, corpus, (1,))
    broken = dataclasses.replace(micro, params=micro.params | {"w_e": micro.params["w_e"] * jnp.nan})
    with pytest.raises(ValueError, match=r"not finite in rows 0 \.\.\. 15"):
        low_rank_correlation(Tracer(broken, 1, scope=published.SCOPE), corpus, (1,))
