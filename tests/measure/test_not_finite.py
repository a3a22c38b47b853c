"""One encoder row whose pre-activations are not finite: every measuring function raises, also for other features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from bilinear_jax.explain.account import account
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.measure.activations import row_codes, top_activations
from bilinear_jax.measure.cofiring import co_firing, observe_all
from bilinear_jax.measure.correlation import low_rank_correlation
from bilinear_jax.measure.evaluation import evaluate_saes
from bilinear_jax.measure.interventions import ablate_pairs
from bilinear_jax.measure.pairs import pair_summaries
from bilinear_jax.nn.sae import SAE, SAEConfig

ASKED, BROKEN, K = 3, 5, 6

ROWS = {
    "NaN with the sign bit": lambda d: np.full(d, -np.nan),
    "NaN": lambda d: np.full(d, np.nan),
    "inf - inf": lambda d: np.full(d, np.inf),
    "-inf": lambda d: np.where(np.arange(d) == 0, -np.inf, 0),
    "overflow": lambda d: np.full(d, 3e38),
}

PAIRS = {ASKED: [(0, 1)]}
OF_ONE_SAE = {
    "evaluate_saes": lambda lm, sae, tokens: evaluate_saes(lm, [sae], tokens),
    "top_activations": lambda lm, sae, tokens: top_activations(lm, sae, tokens, k=2),
    "row_codes": lambda lm, sae, tokens: row_codes(lm, sae, tokens, [0, 2]),
}
OF_A_TRACER = {
    "account": (lambda tracer, tokens: account(tracer, tokens, ASKED), "inp"),
    "co_firing": (co_firing, "inp"),
    "pair_summaries": (lambda tracer, tokens: pair_summaries(tracer, tokens, PAIRS), "inp out"),
    "ablate_pairs": (lambda tracer, tokens: ablate_pairs(tracer, tokens, PAIRS), "inp out"),
    "low_rank_correlation": (lambda tracer, tokens: low_rank_correlation(tracer, tokens, (1,), min_count=1), "out"),
    "observe_all, of pages": (lambda tracer, tokens: observe_all(tracer, tokens, [ASKED], 4), "inp out"),
}


def broken(sae: SAE, kind: str) -> SAE:
    row = jnp.asarray(ROWS[kind](sae.config.d_model), jnp.float32)
    return SAE(sae.params | {"w_enc": sae.w_enc.at[BROKEN].set(row)}, sae.config)


@pytest.fixture(scope="module")
def tracer(golden):
    return Tracer(golden.lm, 1, scope=published.SCOPE)


@pytest.fixture(scope="module")
def tokens(golden):
    return np.random.default_rng(0).integers(3, golden.lm.config.n_vocab, (4, 12))


@pytest.mark.parametrize("kind", ROWS)
def test_a_preactivation_that_is_not_finite_shows_in_the_codes_whether_chosen_or_not(tracer, kind):
    """-inf is the smallest, and the top-k never chooses it; where x[0] is 0, it is NaN; where negative, the largest."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(20, tracer.out.config.d_model)), jnp.float32)
    sae = broken(tracer.out, kind)
    values = sae.encode(x, sparse=True).values
    assert (~np.isfinite(values)).any(axis=-1).all()
    assert np.isfinite(tracer.out.encode(x, sparse=True).values).all()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", OF_ONE_SAE)
def test_an_sae_is_not_measured(tracer, tokens, name, kind):
    OF_ONE_SAE[name](tracer.lm, tracer.out, tokens)
    with pytest.raises(ValueError, match=r"the model or an SAE gives values that are not finite in rows 0 \.\.\."):
        OF_ONE_SAE[name](tracer.lm, broken(tracer.out, kind), tokens)


@pytest.mark.parametrize(
    ("name", "side"), [(name, side) for name, (_, sides) in OF_A_TRACER.items() for side in sides.split()]
)
def test_a_tracer_is_not_measured(tracer, tokens, name, side):
    measure = OF_A_TRACER[name][0]
    measure(tracer, tokens)
    saes = {"inp": tracer.inp, "out": tracer.out}
    for kind in ("NaN with the sign bit", "-inf"):
        with pytest.raises(ValueError, match="the model or an SAE gives values that are not finite"):
            measure(Tracer(tracer.lm, 1, **saes | {side: broken(saes[side], kind)}), tokens)


@pytest.mark.parametrize("odd", [np.nan, np.inf, 1e25])
def test_what_a_masked_token_holds_changes_nothing(golden, odd):
    """The account of a batch read the bias of its first token, also if that does not count."""
    lm = golden.lm
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, lm.config.n_vocab, (4, 12))
    tokens[0] = 3
    mask = np.ones(tokens.shape, bool)
    mask[0] = mask[:, 0] = False
    broken = dataclasses.replace(lm, params=lm.params | {"w_e": lm.params["w_e"].at[3].set(odd)})
    saes = (published_sae("resid_mid"), published_sae("mlp_out"))
    right, found = (
        pair_summaries(Tracer(one, 1, *saes), tokens, PAIRS, token_mask=mask)[ASKED] for one in (lm, broken)
    )
    for name, value in right.terms.items():
        np.testing.assert_allclose(found.terms[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def published_sae(site: str) -> SAE:
    sae = SAE.init(SAEConfig(site, 1, d_model=32, expansion=4, k=6), jax.random.key(1))
    return SAE(sae.params | {"b_dec": jnp.full(32, 0.1)}, sae.config)
