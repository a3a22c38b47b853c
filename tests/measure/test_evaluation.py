"""SAE metrics: by hand on two tokens, against the original, and the same for every split into batches."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure import evaluation
from bilinear_jax.measure.correlation import low_rank_correlation
from bilinear_jax.measure.evaluation import (
    PATCHED,
    SAESums,
    edited_loss,
    evaluate_sae,
    evaluate_saes,
    merge,
    sae_sums,
    table,
    to_json,
)
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
    assert metrics.mse == pytest.approx((0.25 + 4) / (2 * 2))
    assert metrics.tokens == 2


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


def test_the_default_mask_leaves_position_0_as_it_is(by_hand):
    # only token 1 counts and is patched; the logits at token 0, which predict it, are untouched
    metrics = evaluate_sae(*by_hand, TOKENS)
    assert metrics.tokens == 1 and metrics.nmse == pytest.approx(4 / 16) and metrics.l1 == 4.0
    assert math.isnan(metrics.explained_variance)  # one token is its own mean
    assert metrics.loss_patched == metrics.loss_zeroed == metrics.loss_clean == pytest.approx(math.log(2))
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
        golden.close([np.ldexp(sums.squared_error, 2 * sums.exponent) / (sums.tokens * 32)], expected["mse"])
        golden.close([sums.squared_error / sums.squared_norm], expected["nmse"])
        golden.close([sums.absolute / sums.tokens], expected["l1"])


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_squares_that_float32_cannot_hold(by_hand, scale):
    """By hand: x is (0, s) and (0, 4 s), its reconstruction half of it, mean (0, 2.5 s)."""
    lm, sae = by_hand
    mlp = lm.params["layers"]["mlp"]
    layers = lm.params["layers"] | {"mlp": mlp | {"w_p": mlp["w_p"] * scale}}
    lm = dataclasses.replace(lm, params=lm.params | {"layers": layers})
    found = evaluate_sae(lm, sae, TOKENS, BOTH)
    np.testing.assert_allclose([found.nmse, found.explained_variance], [0.25, 1 - 4.25 / 4.5], rtol=1e-5)
    np.testing.assert_allclose(found.mse, 4.25 / 4 * scale**2, rtol=1e-5)


def numbers(metrics) -> dict:
    return {name: value for name, value in dataclasses.asdict(metrics).items() if name != "correlation"}


def test_every_split_into_batches_gives_the_same(golden, scope):
    sae = scope["1-mlp-out-x4-k6"]
    mask = golden.expected["attention_mask"].astype(bool)
    mask[:, 0] = False
    mask[0] = False  # with rows one by one, a batch without a token
    one, two = (evaluate_sae(golden.lm, sae, golden.ids, mask, batch_size) for batch_size in (1, 2))
    assert one.tokens == mask.sum()
    np.testing.assert_allclose(list(numbers(two).values()), list(numbers(one).values()), rtol=1e-5)


def test_several_at_once_are_as_one_by_one_and_run_the_model_no_more_than_needed(golden, scope, monkeypatch):
    one = scope["1-mlp-out-x4-k6"]
    wider = dataclasses.replace(one, config=dataclasses.replace(one.config, k=9))
    saes = [scope["2-mlp-in-x4-k6"], one, wider]
    run = []
    jitted = evaluation._edited_loss
    monkeypatch.setattr(evaluation, "_edited_loss", lambda *args: run.append(args[2]) or jitted(*args))
    together = evaluate_saes(golden.lm, saes, golden.ids, batch_size=2)
    # of every batch: clean once, each SAE once, each of the two sites zeroed once
    assert sorted(run) == sorted([0, 1, 1, 1, 2, 2] * math.ceil(len(golden.ids) / 2))
    for sae in saes:
        alone = evaluate_sae(golden.lm, sae, golden.ids, batch_size=2)
        np.testing.assert_allclose(
            list(numbers(together[sae.name]).values()), list(numbers(alone).values()), rtol=1e-6, atol=1e-7
        )
    with pytest.raises(ValueError, match="two SAEs are named 2-mlp-in-x4-k6"):
        evaluate_saes(golden.lm, [saes[0], saes[0]], golden.ids)
    with pytest.raises(ValueError, match="at least one SAE"):
        evaluate_saes(golden.lm, [], golden.ids)


def test_other_parameters_are_not_compiled_for(by_hand):
    lm, sae = by_hand
    evaluate_sae(lm, sae, TOKENS, BOTH)
    functions = evaluation._sae_sums, evaluation._edited_loss
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
        assert 1 - sums.squared_error / sums.spread == pytest.approx(expected, rel=1e-4)
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


def test_the_sums_work_inside_jit_vmap_and_grad(by_hand):
    lm, sae = by_hand
    mask = jnp.asarray(BOTH)
    rows = jnp.array([[0, 1], [1, 0]])
    every = jnp.arange(3)
    losses = jax.jit(jax.vmap(lambda how: edited_loss(lm, sae, how, rows[1:], mask)[0]))(every)
    # from token 1, (2, 0), token 0 is predicted: the logits are (2, 4), (2, 2), (2, 0)
    expected = [math.log(1 + math.exp(2)), math.log(2), math.log(1 + math.exp(-2))]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    (sums,) = jax.jit(jax.vmap(lambda row: sae_sums(lm, [sae], row[None], mask)))(rows)
    np.testing.assert_allclose(np.ldexp(sums.squared_error, 2 * sums.exponent), [0.25 + 4] * 2)

    def patched(w_dec):
        changed = dataclasses.replace(sae, params=sae.params | {"w_dec": w_dec})
        return edited_loss(lm, changed, PATCHED, jnp.asarray(TOKENS), mask)[0]

    # d loss / d w_dec[1, 1]: the logit of token 1 is w_dec[1, 1] * code 1, so p_1 - 1
    gradient = jax.jit(jax.grad(patched))(sae.w_dec)
    p = math.exp(0.5) / (math.exp(0.5) + math.e)
    assert float(gradient[1, 1]) == pytest.approx(p - 1, rel=1e-5)
