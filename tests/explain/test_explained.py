"""Explanations and their scores: identities, leaks, what a batch must not change, and planted answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain import explained as module
from bilinear_jax.explain import replaced
from bilinear_jax.explain.parts import (
    METHODS,
    eigenparts,
    firing_metrics,
    own_eigenparts,
    own_rotated,
    partial_sums,
    rotated,
)
from bilinear_jax.explain.samples import Layer, gather
from bilinear_jax.explain.scores import Scores
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.explain.ways import way_of
from bilinear_jax.language import LanguageModel
from bilinear_jax.linalg.metric import Metric
from bilinear_jax.measure.evaluation import evaluate_sae
from bilinear_jax.nn.architecture import TransformerConfig
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import SAEConfig
from bilinear_jax.nn.sites import capture
from bilinear_jax.tensor import BilinearTensor

D, FEATURES = 16, 24
CONFIG = TransformerConfig(n_layer=2, n_head=2, d_model=D, d_hidden=32, n_ctx=12, n_vocab=40)
TOKENS = np.asarray(jax.random.randint(jax.random.key(3), (24, 12), 1, 40))
NAMES = [field.name for field in dataclasses.fields(Scores)]


def tracer_of(config=CONFIG, site="mlp_in", **options):
    lm = LanguageModel.init(config, jax.random.key(0))
    biases = {
        name: jax.random.normal(jax.random.key(9), leaf.shape) for name, leaf in lm.params["layers"]["mlp"].items()
    }
    mlp = {k: v if k.startswith("w") else 0.3 * biases[k] for k, v in lm.params["layers"]["mlp"].items()}
    lm = dataclasses.replace(lm, params=lm.params | {"layers": lm.params["layers"] | {"mlp": mlp}})
    inp = SAE.init(SAEConfig(site, 1, D, 2, 4), jax.random.key(1))
    out = SAE.init(SAEConfig("mlp_out", 1, D, FEATURES / D, 5, encoder_bias=True), jax.random.key(2))
    return Tracer(lm, 1, inp, out, **options)


TRACER = tracer_of()


def all_scores(found):
    return [found, found.full, *found.lookups.values(), *found.controls.values()]


@pytest.mark.parametrize("by", METHODS)
@pytest.mark.parametrize("options", [{}, {"bias": True}])
def test_all_parts_are_the_pre_activation(by, options):
    tracer = tracer_of(dataclasses.replace(CONFIG, **options))
    found = tracer.explained(TOKENS, parts=(1, tracer.tensor.n_in), by=by)
    np.testing.assert_allclose(found.r2[:, 1], 1, atol=1e-3)
    np.testing.assert_allclose(found.full.r2, 1, atol=1e-5)
    fires = found.firings > 3
    assert fires.sum() > 5
    np.testing.assert_allclose(found.r2_active[fires, 1], 1, atol=2e-2)
    np.testing.assert_allclose(found.average_precision[fires, 1], found.full.average_precision[fires, 0], atol=1e-3)
    assert (found.r2[:, 0] < 0.95).all()


@pytest.mark.parametrize("by", ["data", "firing"])
def test_what_is_scored_was_not_seen_in_choosing(by, monkeypatch):
    """With pre-activations that have nothing to do with their tokens, whatever is fitted scores at most 0."""
    gather = module.gather

    def shuffled(*args):
        found = gather(*args)
        return found._replace(y=np.random.default_rng(len(found.y)).normal(size=found.y.shape).astype(np.float32))

    monkeypatch.setattr(module, "gather", shuffled)
    found = TRACER.explained(TOKENS, parts=(1, 4), by=by)
    for scores in (found, *found.lookups.values(), found.controls["rotated"]):
        assert np.max(scores.r2) < 0.15 and np.median(scores.r2) < 0


def test_the_halves_can_be_given_as_two_texts():
    found = TRACER.explained(TOKENS, parts=(1, 4))
    given = TRACER.explained(TOKENS[12:], TOKENS[:12], parts=(1, 4))
    for name in NAMES:
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name))
    assert found.tokens == given.tokens == (12 * 11, 12 * 11)
    other = TRACER.explained(TOKENS[12:], TOKENS[:6], parts=(1, 4))
    assert not np.array_equal(other.r2, found.r2)


def test_features_at_once_do_not_change_a_score(monkeypatch):
    found = TRACER.explained(TOKENS, parts=(1, 4), loss=True)
    monkeypatch.setattr(module, "BYTES", 7 * 8 * 4 * 132)  # seven features
    monkeypatch.setattr(replaced, "FEATURES_AT_ONCE", 5)
    other = TRACER.explained(TOKENS, parts=(1, 4), batch_size=5, loss=True)
    for one, two in zip(all_scores(found), all_scores(other), strict=True):
        for name in NAMES:
            np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.firings, other.firings)
    np.testing.assert_allclose(found.firings_left, other.firings_left)
    np.testing.assert_allclose(found.layer.losses, other.layer.losses, rtol=1e-5)
    some = TRACER.explained(TOKENS, features=[3, 17], parts=(1, 4), loss=True)
    np.testing.assert_allclose(
        some.controls["random directions"].r2, found.controls["random directions"].r2[[3, 17]], atol=1e-4
    )
    assert some.layer == found.layer and some.features.tolist() == [3, 17]


def test_a_rotation_keeps_what_the_form_has_along_its_directions():
    metric = TRACER.metric(TOKENS)
    found = rotated(TRACER.tensor, TRACER.directions[:2], 3, metric, jax.random.key(4))
    for q, values, vectors in zip(TRACER.q([0, 1]), found.values, found.vectors, strict=True):
        directions = metric.root @ (metric.root.T @ vectors.T)  # C p: what the data has along p
        np.testing.assert_allclose(jnp.diagonal(directions.T @ q @ directions), values, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(vectors @ directions, np.eye(3), atol=1e-3)
    assert (np.diff(np.abs(found.values), axis=1) <= 1e-6).all()


def test_a_value_by_firing_is_what_its_square_adds_where_the_feature_fires():
    layer = Layer(TRACER.lm, 1, TRACER.tensor, TRACER.out, TRACER.directions)
    samples = gather(layer, TOKENS)
    fired = samples.fired(np.arange(3), FEATURES)
    fired[1] = False  # as if it never fired: then it is the mean of all tokens
    metrics = firing_metrics(samples.x, fired, samples.moment)
    for found in (
        own_eigenparts(TRACER.tensor, TRACER.directions[:3], D, metrics),
        own_rotated(TRACER.tensor, TRACER.directions[:3], D, metrics, jax.random.key(0)),
    ):
        for values, vectors, where in zip(found.values, found.vectors, fired, strict=True):
            squares = np.asarray(values)[:, None] * np.asarray(samples.x @ vectors.T).T ** 2
            here = squares[:, where].mean(axis=1) if where.any() else squares.mean(axis=1)
            np.testing.assert_allclose((here + squares.mean(axis=1)) / 2, values, rtol=1e-3, atol=1e-5)
            assert (np.diff(np.abs(values)) <= 1e-6).all()


def test_by_firing_finds_the_square_that_makes_a_rare_feature_fire():
    """z = 3 a^2 + b^2 - c^2, fires where a is not 0, at 1 of 20 tokens; b and c are large everywhere."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 4)).astype(np.float32) * [1, 4, 4, 1]
    fired = np.arange(2000) % 20 == 0
    x[:, 0] = np.where(fired, 4 + 0.1 * x[:, 0], 0)
    weights = jnp.diag(jnp.array([3.0, 1, -1, 0]))
    tensor = BilinearTensor(weights, jnp.eye(4), jnp.ones((1, 4)))
    moment = x.T.astype(np.float64) @ x / len(x)
    found = own_eigenparts(tensor, jnp.ones((1, 1)), 1, firing_metrics(x, fired[None], moment))
    first = partial_sums(jnp.asarray(x, jnp.float32), found, (1,))[0, 0]
    assert first[fired].min() > first[~fired].max() > -1
    data = eigenparts(tensor, jnp.ones((1, 1)), 1, Metric.of(moment))
    assert abs(data.vectors[0, 0, 0]) < abs(found.vectors[0, 0, 0]) / 10


def test_directions_do_not_fire():
    tracer = Tracer(TRACER.lm, 1, out=jnp.eye(D)[:2])
    with pytest.raises(ValueError, match="2 directions, which do not fire: explain by data or weight"):
        tracer.explained(TOKENS, parts=(1,), by="firing")


@pytest.mark.parametrize("options", [{}, {"token_lookup": 40}, {"passthrough": (1,)}, {"activation": "batchtopk"}])
@pytest.mark.parametrize("by", ["data", "weight"])
def test_a_layer_replaced_by_whole_explanations_is_replaced_by_its_sae(options, by):
    config = dataclasses.replace(TRACER.out.config, **options)
    params = SAE.init(config, jax.random.key(2)).params
    if "token_lookup" in options:
        params = params | {"w_lookup": jax.random.normal(jax.random.key(6), params["w_lookup"].shape)}
    tracer = Tracer(TRACER.lm, 1, TRACER.inp, SAE(params, config))
    found = tracer.explained(TOKENS, features=[0], parts=(1, D), by=by, loss=True).layer
    scores = evaluate_sae(TRACER.lm, tracer.out, TOKENS[12:])
    assert found.clean == pytest.approx(scores.loss_clean, rel=1e-6)
    assert found.removed == pytest.approx(scores.loss_zeroed, rel=1e-6)
    assert found.sae_loss == pytest.approx(scores.loss_patched, rel=1e-6)
    assert found.losses[1] == pytest.approx(found.sae_loss, rel=1e-4) and found.losses[0] != found.losses[1]
    assert found.recovered[1] == pytest.approx(found.sae_recovered, rel=1e-2)


@pytest.mark.parametrize("by", METHODS)
def test_explanations_have_the_mean_of_what_they_explain(by):
    layer = Layer(TRACER.lm, 1, TRACER.tensor, TRACER.out, TRACER.directions)
    samples = gather(layer, TOKENS)
    found = replaced.explanations(layer, way_of(by, layer, samples, (1, 5), 0), (1, 5), samples)
    predicted = partial_sums(jnp.asarray(samples.x), found.parts, (1, 5)) + found.constants[:, :, None]
    wanted = (samples.y @ np.asarray(TRACER.directions).T).mean(axis=0)
    np.testing.assert_allclose(predicted.mean(axis=-1), np.stack([wanted, wanted], axis=1), atol=1e-4)


def test_firings_left_are_those_of_the_projected_input():
    found = TRACER.explained(TOKENS, parts=(2, D))
    feature = int(np.argmax(found.firings))
    metric = TRACER.metric(TOKENS[:12])
    vectors = TRACER.top_eigh(2, [feature], metric=metric).vectors[0]
    span = np.linalg.qr(np.asarray(vectors).T)[0]
    got = capture(TRACER.lm.config, TRACER.lm.params, jnp.asarray(TOKENS[12:]), [("mlp_in", 1), ("mlp_out", 1)])
    x, y = (np.asarray(got[site, 1])[:, 1:].reshape(-1, D) for site in ("mlp_in", "mlp_out"))
    fired = np.asarray(TRACER.out.encode(jnp.asarray(y)))[:, feature] != 0
    assert fired.sum() == found.firings[feature] and 5 < fired.sum() <= 64
    left = TRACER.tensor.apply(jnp.asarray(x[fired] - x[fired] @ span @ span.T))
    still = np.asarray(TRACER.out.encode(left))[:, feature] != 0
    assert found.firings_left[feature, 0] == pytest.approx(still.mean())


def test_two_parts_are_all_of_a_feature_of_a_bilinear_transcoder():
    config = SAEConfig("mlp_in", 1, D, 2, 5, bilinear_encoder=True, target="mlp_out")
    tracer = Tracer(TRACER.lm, 1, TRACER.inp, SAE.init(config, jax.random.key(5)))
    found = tracer.explained(TOKENS, parts=(1, 2))
    np.testing.assert_allclose(found.r2[:, 1], 1, atol=1e-3)
    assert found.layer is None and found.firings_left.shape == (32, 2)


def test_plain_directions_have_no_firing():
    tracer = Tracer(TRACER.lm, 1, out=np.eye(D, dtype=np.float32)[:3])
    found = tracer.explained(TOKENS, parts=(1, D))
    np.testing.assert_allclose(found.r2[:, 1], 1, atol=1e-3)
    assert np.isnan(found.average_precision).all() and found.firings_left is None and found.layer is None
    with pytest.raises(ValueError, match="leave loss out"):
        tracer.explained(TOKENS, loss=True)
    assert "| data | 16 | 1.000 |  |  |  |  |" in found.table()


def test_the_metric_of_a_tracer_is_that_of_what_its_tensor_reads():
    tracer = tracer_of(site="resid_mid")
    r = np.asarray(capture(tracer.lm.config, tracer.lm.params, jnp.asarray(TOKENS), [("resid_mid", 1)])["resid_mid", 1])
    x = r / np.sqrt((r**2).mean(axis=-1, keepdims=True))
    x = x[:, 1:].reshape(-1, D)
    metric = tracer.metric(TOKENS, batch_size=7)
    moment = x.T @ x / len(x)
    np.testing.assert_allclose(metric.root @ metric.root.T, moment, rtol=1e-3, atol=1e-4)
    fired = gather(tracer.scored([3])[0], TOKENS).fired(np.array([3]), FEATURES)
    expected, found = firing_metrics(x, fired, moment).root[0], tracer.metric(TOKENS, firing=3, batch_size=7).root
    assert 3 < fired.sum() < len(x) / 2
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(tracer.explained(TOKENS, parts=(D,)).r2, 1, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((TOKENS,), {"parts": (0,)}, ValueError, "must lie in 1 ... 16"),
        ((TOKENS,), {"parts": (17,)}, ValueError, "must lie in 1 ... 16"),
        ((TOKENS,), {"parts": ()}, ValueError, "at least one"),
        ((TOKENS[:1],), {}, ValueError, "one row, but it takes two"),
        ((TOKENS,), {"by": "size"}, UnknownNameError, "data"),
        ((TOKENS,), {"features": [99]}, UnknownNameError, "99"),
        ((TOKENS,), {"features": []}, ValueError, "name at least one"),
    ],
)
def test_bad_requests_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        TRACER.explained(*arguments, **({"parts": (1,)} | options))
