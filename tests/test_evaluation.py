"""SAE metrics: by hand on two tokens, against the original, and the same for every split into batches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.evaluation import evaluate_sae, sae_sums
from bilinear_jax.language import LanguageModel
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
    assert metrics.loss_patched == metrics.loss_zeroed == metrics.loss_clean == pytest.approx(math.log(2))
    assert math.isnan(metrics.loss_recovered) and metrics.loss_added == 0


def test_wrong_use_is_told(by_hand):
    with pytest.raises(ValueError, match="leaves no token"):
        evaluate_sae(*by_hand, TOKENS, np.zeros((1, 2), bool))
    with pytest.raises(ValueError, match="token_mask has shape"):
        evaluate_sae(*by_hand, TOKENS, np.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"tokens are \[rows, seq\]"):
        evaluate_sae(*by_hand, TOKENS[0])


@pytest.fixture(scope="module")
def scope(golden):
    from bilinear_jax.checkpoint import load_sae

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

    @jax.jit
    def all_sums(lm, saes):  # the losses aren't asked for, so they aren't run
        return [sae_sums(lm, sae, tokens, mask)._replace(losses=None, predicted=None) for sae in saes]

    for sae, sums in zip(saes, all_sums(golden.lm, saes), strict=True):
        expected = {key: golden.expected[f"sae.{sae.name}.{key}"] for key in ("mse", "nmse", "l1")}
        golden.close([sums.squared_error / (sums.tokens * 32)], expected["mse"])
        golden.close([sums.squared_error / sums.squared_norm], expected["nmse"])
        golden.close([sums.absolute / sums.tokens], expected["l1"])


def test_every_split_into_batches_gives_the_same(golden, scope):
    sae = scope["1-mlp-out-x4-k6"]
    mask = golden.expected["attention_mask"].astype(bool)
    mask[:, 0] = False
    one = evaluate_sae(golden.lm, sae, golden.ids, mask)
    other = evaluate_sae(golden.lm, sae, golden.ids, mask, batch_size=2)
    assert one.tokens == other.tokens == 21 + 25 + 5
    np.testing.assert_allclose(dataclasses.astuple(other), dataclasses.astuple(one), rtol=1e-5)


def test_the_sums_work_inside_jit_vmap_and_grad(by_hand):
    lm, sae = by_hand
    mask = jnp.asarray(BOTH)
    many = jax.jit(jax.vmap(lambda row: sae_sums(lm, sae, row[None], mask)))(jnp.array([[0, 1], [1, 0]]))
    # from token 1, (2, 0), token 0 is predicted: the logits are (2, 4), (2, 2), (2, 0)
    expected = [math.log(1 + math.exp(2)), math.log(2), math.log(1 + math.exp(-2))]
    np.testing.assert_allclose(many.losses[1], expected, rtol=1e-5)

    def patched(w_dec):
        changed = dataclasses.replace(sae, params=sae.params | {"w_dec": w_dec})
        return sae_sums(lm, changed, jnp.asarray(TOKENS), mask).losses[1]

    # d loss / d w_dec[1, 1]: the logit of token 1 is w_dec[1, 1] * code 1, so p_1 - 1
    gradient = jax.jit(jax.grad(patched))(sae.w_dec)
    p = math.exp(0.5) / (math.exp(0.5) + math.e)
    assert float(gradient[1, 1]) == pytest.approx(p - 1, rel=1e-5)
