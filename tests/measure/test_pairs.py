"""Pairs over a dataset: brute force from the accounts of single tokens, planted answers, and every split the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain import overview
from bilinear_jax.explain.account import account
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.cofiring import CoFiring, co_firing, strongest_pairs
from bilinear_jax.measure.pairs import pair_summaries
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig

FEATURE = 3


@pytest.fixture(scope="module", params=["micro", "biased", "lookup"])
def made(request, golden):
    if request.param == "lookup":
        tracer, tokens = published.biased_tracer()
        config = dataclasses.replace(tracer.inp.config, token_lookup=11, passthrough=())
        rows = jnp.asarray(np.random.default_rng(2).normal(size=(11, 8)), jnp.float32)
        return Tracer(tracer.lm, 0, SAE(tracer.inp.params | {"w_lookup": rows}, config), tracer.out), tokens
    if request.param == "biased":
        return published.biased_tracer()
    tokens = np.random.default_rng(0).integers(3, golden.lm.config.n_vocab, (6, 12))
    return Tracer(golden.lm, 1, scope=published.SCOPE), tokens


def test_brute_force(made):
    tracer, tokens = made
    found = account(tracer, tokens, FEATURE)
    kept = np.arange(tokens.shape[1]) > 0  # position 0 doesn't count
    indices, codes, z, terms = jax.tree.map(
        lambda a: np.asarray(a)[:, kept].reshape(-1, *a.shape[2:]).astype(float if a.dtype == np.float32 else int),
        (found.indices, found.codes, found.preactivation, found.terms),
    )
    number, features = len(z), tracer.basis.shape[1]
    dense = np.zeros((number, features))
    np.put_along_axis(dense, indices, codes, axis=1)
    q = np.asarray(tracer.q(FEATURE, project=True), np.float64)

    co = co_firing(tracer, tokens, batch_size=4)
    fires = (dense != 0).astype(int)
    assert co.tokens == number
    i, j = co.pairs.T
    assert np.array_equal(np.triu(fires.T @ fires).nonzero(), [i, j])
    np.testing.assert_array_equal(co.count, (fires.T @ fires)[i, j])
    np.testing.assert_allclose(co.product, (dense.T @ dense)[i, j], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(co.magnitude, (np.abs(dense).T @ np.abs(dense))[i, j], rtol=1e-4)

    size = np.triu(np.where(np.eye(features), 1, 2) * np.abs(q) * (np.abs(dense).T @ np.abs(dense)))
    strongest = strongest_pairs(tracer, co, FEATURE, n=12)
    order = np.argsort(-size, axis=None)[:12]
    assert np.array_equal(strongest.T, np.unravel_index(order, size.shape))

    never = np.argwhere(np.triu(fires.T @ fires == 0) & (q != 0))[:1]
    pairs = np.concatenate([strongest[:, ::-1], never, [[features - 1, features - 1]]])
    pairs = pairs[np.unique(np.sort(pairs, axis=1), axis=0, return_index=True)[1]]
    got = pair_summaries(tracer, tokens, {0: [(0, 1)], FEATURE: pairs}, batch_size=4)[FEATURE]
    i, j = pairs.T
    parts = np.where(i == j, 1, 2) * q[i, j] * dense[:, i] * dense[:, j]
    np.testing.assert_array_equal(got.pairs, pairs)
    np.testing.assert_allclose(got.weight, q[i, j], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.mean, parts.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.mean_magnitude, np.abs(parts).mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.joint, (fires[:, i] * fires[:, j]).mean(axis=0))
    np.testing.assert_allclose(got.rates, fires.mean(axis=0)[pairs])
    np.testing.assert_array_equal(got.interference, (fires[:, i] * fires[:, j]).sum(axis=0) == 0)
    assert got.interference.any()
    expected = [1 - (z - parts[:, : m + 1].sum(axis=1)).var() / z.var() for m in range(len(pairs))]
    np.testing.assert_allclose(got.r2, expected, rtol=1e-4, atol=1e-4)
    of_pairs, of_all = (np.mean(np.asarray(part)[:, kept]) for part in found.magnitude)
    np.testing.assert_allclose([got.magnitude_pairs, got.magnitude], [of_pairs, of_all], rtol=1e-4)
    np.testing.assert_allclose(got.share, np.abs(parts).sum() / (number * of_all), rtol=1e-4)
    np.testing.assert_allclose(got.share_of_pairs, np.abs(parts).sum() / (number * of_pairs), rtol=1e-4)
    for name, values in terms.items():
        shown = parts.sum(axis=1).mean() if name == "pairs" else 0
        np.testing.assert_allclose(got.terms[name], np.mean(values) - shown, rtol=1e-4, atol=1e-4 * of_all)
    np.testing.assert_allclose(sum(got.terms.values()), z.mean(), atol=1e-5 * of_all)


def test_no_split_into_batches_changes_anything(made, monkeypatch):
    tracer, tokens = made
    pairs = {FEATURE: tracer.top_interactions(6, FEATURE), 1: [(2, 2), (5, 4)]}
    mask = np.random.default_rng(1).random(tokens.shape) < 0.7
    whole = pair_summaries(tracer, tokens, pairs, token_mask=mask, batch_size=100)
    monkeypatch.setattr(overview, "TILE", 7)
    for batch_size in (1, 4):
        other = pair_summaries(tracer, tokens, pairs, token_mask=mask, batch_size=batch_size)
        for feature in pairs:
            one, two = (dataclasses.asdict(part[feature]) for part in (whole, other))
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            assert two["tokens"] == mask.sum()


def test_planted():
    # y_0 = 2 x_0 x_1 + x_2 x_3 without attention and norms; features are the coordinates, two of which each token has
    config = TransformerConfig(1, 1, 4, 2, 4, 4, normalization=False)
    mlp = {
        "w_l": jnp.array([[[1.0, 0, 0, 0], [0, 0, 1, 0]]]),
        "w_r": jnp.array([[[0, 1.0, 0, 0], [0, 0, 0, 1]]]),
        "w_p": jnp.zeros((1, 4, 2)).at[0, 0].set(jnp.array([2.0, 1])),
    }
    attention = {name: jnp.zeros((1, 4, 4)) for name in ("w_q", "w_k", "w_v", "w_o")}
    embedding = jnp.array([[1.0, 3, 0, 0], [2, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]])
    lm = LanguageModel({"w_e": embedding, "w_u": embedding, "layers": {"attention": attention, "mlp": mlp}}, config)
    params = {"w_enc": jnp.eye(4), "w_dec": jnp.eye(4), "b_dec": jnp.zeros(4)}
    tracer = Tracer(lm, 0, *(SAE(params, SAEConfig(site, 0, 4, 1, 2)) for site in ("mlp_in", "mlp_out")))
    tokens = np.array([[0, 1, 2, 3]])
    got = pair_summaries(tracer, tokens, {0: [(2, 3), (1, 0)]}, token_mask=np.ones((1, 4), bool))[0]
    assert got.weight.tolist() == [0.5, 1.0]
    assert got.mean.tolist() == [0, (2 * 3 + 2 * 2) / 4] and got.terms["shown"] == 2.5
    assert got.joint.tolist() == [0, 0.5] and got.rates.tolist() == [[0.25, 0.25], [0.75, 0.75]]
    assert got.interference.tolist() == [True, False] and got.chance.tolist() == [1 / 16, 9 / 16]
    assert got.r2.tolist() == [0, 1] and (got.share, got.share_of_pairs, got.tokens) == (1, 1, 4)

    nothing = pair_summaries(tracer, tokens, {2: [(0, 1)]}, token_mask=np.ones((1, 4), bool))[2]
    assert np.isnan(nothing.r2).all() and np.isnan(nothing.share) and not nothing.interference.any()


def test_pairs_that_never_meet_are_found_as_such():
    co = CoFiring(np.array([[0, 0], [0, 5], [2, 3]]), np.array([4, 1, 2]), np.array([1.0, -2, 3]), np.ones(3), 9)
    found = co.find(np.array([[3, 2], [7, 9], [5, 0], [0, 1]]))
    assert found.count.tolist() == [2, 0, 1, 0] and found.product.tolist() == [3, 0, -2, 0]
    none = CoFiring(np.zeros((0, 2), int), np.zeros(0, int), *np.zeros((2, 0)), 9).find(np.array([[1, 2]]))
    assert none.count.tolist() == [0]


def test_what_is_refused(golden):
    lm, tokens = golden.lm, golden.ids
    tracer = Tracer(lm, 1, scope=published.SCOPE)

    def run(pairs, **options):
        return pair_summaries(tracer, tokens, pairs, **options)

    for pairs, message in [
        ({}, "pairs must map at least one output feature"),
        ({3: []}, r"of output feature 3 are .*, but they must be ints \[n, 2\] with n at least 1"),
        ({3: [(1.5, 2.0)]}, r"ints \[n, 2\]"),
        ({3: [(1, 2), (2, 1)]}, r"the pair \(1, 2\) of output feature 3 is given twice"),
        ({3: tracer.top_interactions(2, 4)}, "for output feature 3 were found for 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(pairs)
    for pairs, words in [
        ({128: [(0, 1)]}, r"no feature 128 in SAE 1-mlp-out-x4-k6: choose one of 0 \.\.\. 127"),
        ({3: [(0, 128)]}, r"no feature 128 in SAE 1-mlp-in-x4-k6: choose one of 0 \.\.\. 127"),
    ]:
        with pytest.raises(UnknownNameError, match=words):
            run(pairs)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run({3: [(0, 1)]}, batch_size=0)
    with pytest.raises(ValueError, match="no token counts: set token_mask to True"):
        run({3: [(0, 1)]}, token_mask=np.zeros(tokens.shape, bool))
    with pytest.raises(ValueError, match="no token counts: set token_mask to True"):
        co_firing(tracer, tokens, token_mask=np.zeros(tokens.shape, bool))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        strongest_pairs(tracer, co_firing(tracer, tokens), 3, n=0)
    with pytest.raises(ValueError, match="use_encoder=True"):
        co_firing(Tracer(lm, 1, use_encoder=False, scope=published.SCOPE), tokens)
    broken = dataclasses.replace(lm, params=lm.params | {"w_e": lm.params["w_e"] * jnp.nan})
    with pytest.raises(ValueError, match=r"not finite in rows 0 \.\.\."):
        pair_summaries(Tracer(broken, 1, scope=published.SCOPE), tokens, {3: [(0, 1)]})
