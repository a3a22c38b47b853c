"""Scores of SAEs: by hand on two tokens, against the original, and the same for every split into batches."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.explain.samples import edited_loss
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure import evaluation
from bilinear_jax.measure.correlation import low_rank_correlation
from bilinear_jax.measure.evaluation import DENSITY_EDGES, evaluate_sae, evaluate_saes, table, to_json
from bilinear_jax.measure.sums import SAESums, dictionary_sums, merge, sae_sums
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig


@pytest.fixture
def by_hand() -> tuple[LanguageModel, SAE]:
    """No attention, no norm. mlp_out = (0, x_0^2); logits = resid_post.

    Token 0 is (1, 0), token 1 is (2, 0): mlp_out is (0, 1) and (0, 4). The SAE's feature 1 reads coordinate 1 and
    writes half of it back; feature 0 reads and writes coordinate 0.
    """
    config = TransformerConfig(
        n_layer=1, n_head=1, d_model=2, d_hidden=1, n_ctx=2, n_vocab=2, normalization=(False, False, False)
    )
    nothing = jnp.zeros((1, 2, 2))
    side, down = jnp.array([[[1.0, 0.0]]]), jnp.array([[[0.0], [1.0]]])
    layers = {
        "attention": {"w_q": nothing, "w_k": nothing, "w_v": nothing, "w_o": nothing},
        "mlp": {"w_l": side, "w_r": side, "w_p": down},
    }
    params = {"w_e": jnp.array([[1.0, 0.0], [2.0, 0.0]]), "w_u": jnp.eye(2), "layers": layers}
    sae = SAE(
        {"w_enc": jnp.eye(2), "w_dec": jnp.diag(jnp.array([1.0, 0.5])), "b_dec": jnp.zeros(2)},
        SAEConfig("mlp_out", 0, d_model=2, expansion=1, k=1),
    )
    return LanguageModel(params, config), sae


TOKENS = np.array([[0, 1]])
BOTH = np.ones((1, 2), bool)


def test_reconstruction_by_hand(by_hand):
    # x: (0, 1), (0, 4); reconstructions: (0, 1/2), (0, 2); errors: 1/4, 4
    metrics = evaluate_sae(*by_hand, TOKENS, BOTH)
    assert metrics.nmse == pytest.approx((0.25 + 4) / (1 + 16))
    # about the mean (0, 5/2): 9/4 + 9/4
    assert metrics.explained_variance == pytest.approx(1 - (0.25 + 4) / 4.5)
    # coordinate 0 is 0 at both tokens and is left out
    assert metrics.explained_variance_per_dim == metrics.explained_variance
    assert metrics.cosine == pytest.approx(1)
    assert metrics.mse == pytest.approx((0.25 + 4) / (2 * 2))
    assert metrics.tokens == 2


def of_resid_post(activation: str, **params) -> SAE:
    """It reads and reconstructs resid_post, (1, 1) and (2, 4). Codes are what it reads, where they are active."""
    config = SAEConfig("resid_post", 0, 2, 1, 1 if activation == "topk" else None, activation=activation, max_active=1)
    return SAE({"w_enc": jnp.eye(2), "w_dec": jnp.eye(2), "b_dec": jnp.zeros(2)} | params, config)


def test_explained_variance_summed_and_by_coordinate_by_hand(by_hand):
    # k = 1: reconstructions (1, 0) and (0, 4); errors (0, 1) and (2, 0); about the mean (1.5, 2.5): 1/2 and 9/2
    metrics = evaluate_sae(by_hand[0], of_resid_post("topk"), TOKENS, BOTH)
    assert metrics.explained_variance == pytest.approx(1 - 5 / 5)
    assert metrics.explained_variance_per_dim == pytest.approx(((1 - 4 / 0.5) + (1 - 1 / 4.5)) / 2)
    assert metrics.cosine == pytest.approx((1 / math.sqrt(2) + 16 / (math.sqrt(20) * 4)) / 2)
    # each feature fires at one token of two, and log10(1/2) = -0.3
    assert metrics.density == (*[0] * 12, 2) and metrics.dead == 0


def test_a_token_can_have_more_active_features_than_sparse_codes_have_slots(by_hand):
    # both features are active at both tokens, but max_active is 1: sparse codes would be NaN
    metrics = evaluate_sae(by_hand[0], of_resid_post("relu"), TOKENS, BOTH)
    assert (metrics.l0, metrics.l1, metrics.nmse, metrics.cosine) == (2, (1 + 1 + 2 + 4) / 2, 0, pytest.approx(1))
    assert metrics.loss_patched == metrics.loss_clean


def test_thresholds_decide_what_is_active(by_hand):
    # feature 0 at neither token, feature 1 at the second: reconstructions (0, 0), whose cosine is 0, and (0, 4)
    metrics = evaluate_sae(
        by_hand[0], of_resid_post("jumprelu", threshold=jnp.array([2.5, 3.0])), TOKENS, BOTH, batch_size=1
    )
    assert (metrics.l0, metrics.l1, metrics.dead) == (0.5, 2, 0.5)
    assert metrics.nmse == pytest.approx((2 + 4) / (2 + 20))
    assert metrics.cosine == pytest.approx((0 + 16 / (math.sqrt(20) * 4)) / 2)
    assert metrics.density == (1, *[0] * 11, 1)


def test_the_density_counts_features_by_the_share_of_tokens():
    assert len(DENSITY_EDGES) == 14 and DENSITY_EDGES[:3] == (-math.inf, -6, -5.5) and DENSITY_EDGES[-2:] == (-0.5, 0)
    fired = np.array([0, 1, 9, 10, 31, 32, 10_000_000])  # of 10^7 tokens: 10^-7, 9e-7, 10^-6, 3.1e-6, 3.2e-6, 1
    assert evaluation._density(fired, 1e7) == (3, 2, 1, *[0] * 9, 1)


def test_sparsity_by_hand(by_hand):
    # codes: (0, 1), (0, 4): one a token, feature 0 never
    lm, sae = by_hand
    metrics = evaluate_sae(lm, sae, TOKENS, BOTH)
    assert (metrics.l0, metrics.l1, metrics.dead) == (1.0, 2.5, 0.5)
    # with k = 2 the top-k holds the 0 of feature 0, which is not active
    wider = dataclasses.replace(sae, config=dataclasses.replace(sae.config, k=2))
    metrics = evaluate_sae(lm, wider, TOKENS, BOTH)
    assert (metrics.l0, metrics.l1, metrics.dead) == (1.0, 2.5, 0.5)


def test_losses_by_hand(by_hand):
    # token 1 is predicted from the logits at token 0: clean (1, 1), patched (1, 1/2), zeroed (1, 0)
    metrics = evaluate_sae(*by_hand, TOKENS, BOTH)
    clean, patched, zeroed = math.log(2), math.log(math.e + math.exp(0.5)) - 0.5, math.log(math.e + 1)
    assert metrics.loss_clean == pytest.approx(clean)
    assert metrics.loss_patched == pytest.approx(patched)
    assert metrics.loss_zeroed == pytest.approx(zeroed)
    assert metrics.loss_added == pytest.approx((patched - clean) / clean)
    assert metrics.loss_recovered == pytest.approx(1 - (patched - clean) / (zeroed - clean))
    # the mean of the site is (0, 5/2), so the logits are (1, 5/2)
    mean = math.log(math.e + math.exp(2.5)) - 2.5
    assert metrics.loss_mean_ablated == pytest.approx(mean)
    assert metrics.loss_recovered_mean == pytest.approx(1 - (patched - clean) / (mean - clean))


def transcoder(**changes) -> SAE:
    """It reads mlp_in, (1, 0) and (2, 0), and gives (x_0 / 2, x_0) for mlp_out: the second from a feature."""
    config = SAEConfig("mlp_in", 0, d_model=2, expansion=1, k=1, target="mlp_out", skip=True)
    params = {
        "w_enc": jnp.eye(2),
        "w_dec": jnp.array([[0.0, 0.0], [1.0, 0.0]]),
        "b_dec": jnp.zeros(2),
        "w_skip": jnp.array([[0.5, 0.0], [0.0, 0.0]]),
    }
    return SAE(params, dataclasses.replace(config, **changes))


@pytest.mark.parametrize("activation", ["topk", "relu"])  # sparse codes, and dense ones row by row
def test_a_lookup_by_hand(by_hand, activation):
    # x: (0, 1), (0, 4); the feature gives (0, 1/2), (0, 2), and the rows (0, 1/2), (1, 0): errors 0, 4 + 1
    lm, sae = by_hand
    config = dataclasses.replace(sae.config, token_lookup=2, activation=activation)
    looking = SAE(sae.params | {"w_lookup": jnp.array([[0.0, 0.5], [1.0, 0.0]])}, config)
    metrics = evaluate_sae(lm, looking, TOKENS, BOTH)
    assert metrics.nmse == pytest.approx(5 / 17) and metrics.l1 == 2.5
    assert metrics.loss_patched == pytest.approx(math.log(1 + 1))  # token 1 is predicted from (1, 0 + 1)
    (sums,) = sae_sums(lm, [looking], jnp.asarray(TOKENS), jnp.asarray(BOTH))
    np.testing.assert_allclose(np.ldexp(sums.squared_error, 2 * sums.exponent), [1, 4])


def test_a_transcoder_by_hand(by_hand):
    # y: (0, 1), (0, 4); reconstructions: (1/2, 1), (1, 2); errors: 1/4, 1 + 4
    metrics = evaluate_sae(by_hand[0], transcoder(), TOKENS, BOTH)
    assert metrics.nmse == pytest.approx(5.25 / 17) and metrics.mse == pytest.approx(5.25 / 4)
    assert metrics.explained_variance == pytest.approx(1 - 5.25 / 4.5)
    # by coordinate, 0 does not vary; of coordinate 1 the errors are 0 and 2
    assert metrics.explained_variance_per_dim == pytest.approx(1 - 4 / 4.5)
    assert metrics.cosine == pytest.approx((1 / math.sqrt(1.25) + 8 / (4 * math.sqrt(5))) / 2)
    assert (metrics.l0, metrics.l1, metrics.dead) == (1, 1.5, 0.5)
    # token 1 is predicted from the logits x + mlp_out: clean (1, 1), patched (3/2, 1), zeroed (1, 0), mean (1, 5/2)
    patched = math.log(math.exp(1.5) + math.e) - 1
    assert metrics.loss_clean == pytest.approx(math.log(2)) and metrics.loss_patched == pytest.approx(patched)
    assert metrics.loss_zeroed == pytest.approx(math.log(math.e + 1))
    assert metrics.loss_mean_ablated == pytest.approx(math.log(math.e + math.exp(2.5)) - 2.5)


def test_a_target_that_comes_before_its_site_is_reconstructed_from_the_clean_run(by_hand):
    # reads mlp_out, (0, 1) and (0, 4), and gives (x_1, 0) for mlp_in: (1, 0) as it is, and (4, 0) for (2, 0)
    lm, sae = by_hand
    config = dataclasses.replace(sae.config, target="mlp_in", centred=False)
    backwards = SAE(sae.params | {"w_dec": jnp.array([[0.0, 1.0], [0.0, 0.0]])}, config)
    metrics = evaluate_sae(lm, backwards, TOKENS, BOTH)
    assert metrics.nmse == pytest.approx(4 / 5) and metrics.loss_patched == metrics.loss_clean
    # zeroed, mlp_out is 0; with the mean, (3/2, 0), mlp_out is (0, 9/4)
    assert metrics.loss_zeroed == pytest.approx(math.log(math.e + 1))
    assert metrics.loss_mean_ablated == pytest.approx(math.log(math.e + math.exp(2.25)) - 2.25)


def test_a_transcoder_of_a_whole_model_is_as_capture_and_edits_say(golden):
    config = SAEConfig("resid_mid", 1, 32, 2, activation="batchtopk", k=5, target="mlp_out", skip=True, max_active=3)
    sae = SAE.init(config, jax.random.key(0))
    random = np.random.default_rng(0)
    sae = SAE(sae.params | {"w_skip": jnp.asarray(0.1 * random.normal(size=(32, 32)), jnp.float32)}, config)
    tokens, mask = golden.ids, np.asarray(golden.lm.token_mask(golden.ids))
    got = golden.lm.capture(tokens, [("resid_mid", 1), ("mlp_out", 1)])
    y = np.asarray(got["mlp_out", 1])[mask]
    y_hat, codes = (np.asarray(part) for part in sae(got["resid_mid", 1]))
    found = evaluate_sae(golden.lm, sae, tokens, batch_size=2)
    assert found.nmse == pytest.approx(np.sum((y - y_hat[mask]) ** 2) / np.sum(y**2), rel=1e-5)
    assert found.l0 == pytest.approx((codes[mask] != 0).sum(axis=1).mean()) and found.l0 > 3

    def loss(value):
        edits = {("mlp_out", 1): lambda old: jnp.where(mask[..., None], value, old)}
        return float(golden.lm.loss(tokens, edits=edits))

    assert found.loss_clean == pytest.approx(float(golden.lm.loss(tokens)), rel=1e-5)
    assert found.loss_patched == pytest.approx(loss(y_hat), rel=1e-5)
    assert found.loss_zeroed == pytest.approx(loss(0.0), rel=1e-5)
    assert found.loss_mean_ablated == pytest.approx(loss(y.mean(axis=0)), rel=1e-5)


def test_the_default_mask_leaves_position_0_as_it_is(by_hand):
    # only token 1 counts and is patched; the logits at token 0, which predict it, are untouched
    metrics = evaluate_sae(*by_hand, TOKENS)
    assert metrics.tokens == 1 and metrics.nmse == pytest.approx(4 / 16) and metrics.l1 == 4.0
    assert math.isnan(metrics.explained_variance)  # one token is its own mean
    assert metrics.loss_patched == metrics.loss_zeroed == metrics.loss_clean == pytest.approx(math.log(2))
    assert metrics.loss_mean_ablated == metrics.loss_clean and math.isnan(metrics.loss_recovered_mean)
    assert math.isnan(metrics.explained_variance_per_dim)
    assert math.isnan(metrics.loss_recovered) and metrics.loss_added == 0


def test_wrong_use_is_told(by_hand):
    with pytest.raises(ValueError, match="no token counts: set token_mask to True"):
        evaluate_sae(*by_hand, TOKENS, np.zeros((1, 2), bool))
    with pytest.raises(ValueError, match="token_mask has shape"):
        evaluate_sae(*by_hand, TOKENS, np.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"tokens of shape .* are not \[rows, seq\]"):
        evaluate_sae(*by_hand, TOKENS[0])


@pytest.fixture(scope="module")
def scope(golden):
    from bilinear_jax.store.checkpoint import load_sae

    names = sorted({key.split(".")[1] for key in golden.expected if key.startswith("sae.")})
    folder = golden.lm.source.replace("model", "scope")
    return {name: load_sae(folder, site=name[2:].split("-x")[0], layer=int(name[0])) for name in names}


@pytest.mark.parametrize("name", ["1-mlp-out-x4-k6", "2-mlp-out-x4-k6"])
def test_golden(golden, scope, name):
    """The original counts every position, padding included."""
    metrics = evaluate_sae(golden.lm, scope[name], golden.ids, np.ones(golden.ids.shape, bool), batch_size=2)
    for key in ("mse", "nmse", "l1", "loss_patched", "loss_zeroed"):
        golden.close([getattr(metrics, key)], golden.expected[f"sae.{name}.{key}"])
    golden.close([metrics.loss_clean], golden.expected["loss"])


def test_golden_sums_of_every_site(golden, scope):
    tokens, mask = jnp.asarray(golden.ids, jnp.int32), jnp.ones(golden.ids.shape, bool)
    saes = tuple(scope.values())
    assert len(saes) == 6
    for sae, sums in zip(saes, jax.jit(sae_sums)(golden.lm, saes, tokens, mask), strict=True):
        expected = {key: golden.expected[f"sae.{sae.name}.{key}"] for key in ("mse", "nmse", "l1")}
        error = sums.squared_error.sum()
        golden.close([np.ldexp(error, 2 * sums.exponent) / (sums.tokens * 32)], expected["mse"])
        golden.close([error / sums.squared_norm.sum()], expected["nmse"])
        golden.close([sums.absolute / sums.tokens], expected["l1"])


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_squares_that_float32_cannot_hold(by_hand, scale):
    """By hand: x is (0, s) and (0, 4 s), its reconstruction half of it, mean (0, 2.5 s)."""
    lm, sae = by_hand
    mlp = lm.params["layers"]["mlp"]
    layers = lm.params["layers"] | {"mlp": mlp | {"w_p": mlp["w_p"] * scale}}
    lm = dataclasses.replace(lm, params=lm.params | {"layers": layers})
    found = evaluate_sae(lm, sae, TOKENS, BOTH)
    np.testing.assert_allclose(
        [found.nmse, found.explained_variance, found.explained_variance_per_dim, found.cosine],
        [0.25, 1 - 4.25 / 4.5, 1 - 4.25 / 4.5, 1],
        rtol=1e-5,
    )
    np.testing.assert_allclose(found.mse, 4.25 / 4 * scale**2, rtol=1e-5)


def numbers(metrics) -> list[float]:
    """All scores but the correlation."""
    found = dataclasses.asdict(metrics)
    return [*found.pop("density"), *(value for name, value in found.items() if name != "correlation")]


@pytest.mark.parametrize("kind", ["SAE", "transcoder", "lookup"])
def test_every_split_into_batches_gives_the_same(golden, scope, kind):
    sae = scope["1-mlp-out-x4-k6"]
    if kind == "transcoder":
        sae = SAE.init(
            SAEConfig("mlp_in", 1, 32, 2, activation="relu", target="mlp_out", max_active=2), jax.random.key(0)
        )
    if kind == "lookup":
        rows = jax.random.normal(jax.random.key(0), (golden.lm.config.n_vocab, 32))
        sae = SAE(sae.params | {"w_lookup": rows}, dataclasses.replace(sae.config, token_lookup=len(rows)))
    mask = golden.expected["attention_mask"].astype(bool)
    mask[:, 0] = False
    mask[0] = False  # with rows one by one, a batch without a token
    one, two = (evaluate_sae(golden.lm, sae, golden.ids, mask, batch_size) for batch_size in (1, 2))
    assert one.tokens == mask.sum()
    np.testing.assert_allclose(numbers(two), numbers(one), rtol=1e-5)


def test_several_at_once_are_as_one_by_one_and_run_the_model_no_more_than_needed(golden, scope, monkeypatch):
    one = scope["1-mlp-out-x4-k6"]
    wider = dataclasses.replace(one, config=dataclasses.replace(one.config, k=9))
    saes = [scope["2-mlp-in-x4-k6"], one, wider]
    run = []
    for name in ("_clean", "_edited_loss"):
        jitted = getattr(evaluation, name)
        monkeypatch.setattr(evaluation, name, lambda *args, jitted=jitted: run.append(args[1]) or jitted(*args))
    together = evaluate_saes(golden.lm, saes, golden.ids, batch_size=2)
    # of every batch: clean once, each SAE once, each of the two sites zeroed once, and once with its mean
    inside, out = ("mlp_in", 2), ("mlp_out", 1)
    batches = math.ceil(len(golden.ids) / 2)
    assert sorted(run, key=str) == sorted([(inside, out), inside, out, out, *[inside, out] * 2] * batches, key=str)
    for sae in saes:
        alone = evaluate_sae(golden.lm, sae, golden.ids, batch_size=2)
        np.testing.assert_allclose(numbers(together[sae.name]), numbers(alone), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="two SAEs are named 2-mlp-in-x4-k6"):
        evaluate_saes(golden.lm, [saes[0], saes[0]], golden.ids)
    with pytest.raises(ValueError, match="at least one SAE"):
        evaluate_saes(golden.lm, [], golden.ids)


def test_other_parameters_are_not_compiled_for(by_hand):
    lm, sae = by_hand
    evaluate_sae(lm, sae, TOKENS, BOTH)
    functions = evaluation._clean, evaluation._dictionary_sums, evaluation._edited_loss
    before = [function._cache_size() for function in functions]
    changed = dataclasses.replace(sae, params=sae.params | {"w_dec": jnp.eye(2)})
    assert evaluate_sae(lm, changed, TOKENS, BOTH).nmse == 0  # and they are not taken for the old ones
    assert [function._cache_size() for function in functions] == before


def test_variance_far_from_zero_survives_float32_and_any_split(by_hand):
    lm, _ = by_hand
    random = np.random.default_rng(0)
    x = (1000 + random.normal(size=(40, 2))).astype(np.float32)
    lm = dataclasses.replace(
        lm, params=lm.params | {"w_e": jnp.asarray(x)}, config=dataclasses.replace(lm.config, n_vocab=40)
    )
    sae = SAE(
        {"w_enc": jnp.eye(2), "w_dec": jnp.zeros((2, 2)), "b_dec": jnp.full(2, 1001.0)},
        SAEConfig("resid_pre", 0, 2, 1, 1),
    )
    exact = x.astype(np.float64)
    expected = 1 - np.sum((exact - 1001) ** 2) / np.sum((exact - exact.mean(axis=0)) ** 2)
    jitted = jax.jit(sae_sums)
    for batch_size in (1, 4, 20):
        sums = None
        for rows in np.array_split(np.arange(40).reshape(20, 2), 20 // batch_size):
            (found,) = jitted(lm, (sae,), jnp.asarray(rows, jnp.int32), jnp.ones(rows.shape, bool))
            sums = found if sums is None else merge(sums, found)
        assert isinstance(sums, SAESums)
        assert 1 - sums.squared_error.sum() / sums.spread.sum() == pytest.approx(expected, rel=1e-4)
        spread = sums.spread * 4.0**sums.exponent
        np.testing.assert_allclose(spread, np.sum((exact - exact.mean(axis=0)) ** 2, axis=0), rtol=1e-4)
        np.testing.assert_allclose(sums.mean, exact.mean(axis=0), rtol=1e-6)


def test_the_correlation_is_that_of_the_output_sae(golden, scope):
    saes = [scope["2-mlp-in-x4-k6"], scope["1-mlp-out-x4-k6"]]
    rows = np.random.default_rng(0).integers(0, golden.lm.config.n_vocab, (12, golden.ids.shape[1]))
    found = evaluate_saes(golden.lm, saes, rows, batch_size=2, correlation_ks=(1, 4))
    tracer = Tracer(golden.lm, 1, scope["1-mlp-in-x4-k6"], saes[1])
    expected = low_rank_correlation(tracer, rows, (1, 4), batch_size=2)
    assert found["2-mlp-in-x4-k6"].correlation == {}
    assert found["1-mlp-out-x4-k6"].correlation == pytest.approx(
        dict(zip((1, 4), np.asarray(expected.mean).tolist(), strict=True))
    )


def test_written_down(by_hand):
    lm, sae = by_hand
    metrics = {"a": evaluate_sae(lm, sae, TOKENS, BOTH), "b": evaluate_sae(lm, sae, TOKENS)}
    metrics["a"] = dataclasses.replace(metrics["a"], correlation={2: 0.5, 1: 0.25})
    head, line, first, second = table(metrics).splitlines()
    assert head.startswith("| SAE | nmse | explained variance | l0 |") and head.endswith("| r at k = 1 | r at k = 2 |")
    assert line == "|" + " --- |" * 10
    assert first.split(" | ")[-2:] == ["0.25", "0.5 |"]
    assert second.split(" | ")[:3] == ["| b", "0.25", ""] and second.split(" | ")[-3:] == ["", "", " |"]

    def refuse(constant):
        raise AssertionError(constant)

    written = json.loads(to_json(metrics), parse_constant=refuse)
    assert written["b"]["explained_variance"] is None and written["b"]["nmse"] == metrics["b"].nmse
    assert written["a"]["correlation"] == {"2": 0.5, "1": 0.25}
    assert written["a"].keys() == {field.name for field in dataclasses.fields(metrics["a"])}
    assert written["a"]["density"] == list(metrics["a"].density)
    with_control = table(metrics, {"b": dataclasses.replace(metrics["b"], nmse=0.75)}).splitlines()
    assert with_control[:4] == [head, line, first, second] and with_control[4].startswith("| b, random | 0.75 | ")


def test_the_sums_work_inside_jit_vmap_and_grad(by_hand):
    lm, sae = by_hand
    mask = jnp.asarray(BOTH)
    rows = jnp.array([[0, 1], [1, 0]])
    every = jnp.array([[0.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    losses = jax.jit(jax.vmap(lambda value: edited_loss(lm, ("mlp_out", 0), value, rows[1:], mask)[0]))(every)
    # from token 1, (2, 0), token 0 is predicted: the logits are (2, 4), (2, 2), (2, 0)
    expected = [math.log(1 + math.exp(2)), math.log(2), math.log(1 + math.exp(-2))]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    (sums,) = jax.jit(jax.vmap(lambda row: sae_sums(lm, [sae], row[None], mask)))(rows)
    np.testing.assert_allclose(np.ldexp(sums.squared_error.sum(axis=-1), 2 * sums.exponent), [0.25 + 4] * 2)

    def patched(w_dec):
        changed = dataclasses.replace(sae, params=sae.params | {"w_dec": w_dec})
        y = lm.capture(TOKENS, [("mlp_out", 0)])["mlp_out", 0]
        return edited_loss(lm, ("mlp_out", 0), dictionary_sums(changed, y, y, mask)[1], jnp.asarray(TOKENS), mask)[0]

    # d loss / d w_dec[1, 1]: the logit of token 1 is w_dec[1, 1] * code 1, so p_1 - 1
    gradient = jax.jit(jax.grad(patched))(sae.w_dec)
    p = math.exp(0.5) / (math.exp(0.5) + math.e)
    assert float(gradient[1, 1]) == pytest.approx(p - 1, rel=1e-5)
