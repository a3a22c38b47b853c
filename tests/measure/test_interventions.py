"""Pairs ablated and features steered: the account says by how much, brute force agrees, and nothing else moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain.account import account, site_pair
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.interventions import REMOVE, Ablation, ablate_pairs, pair_effects, removed, steer
from bilinear_jax.measure.pairs import pair_summaries
from bilinear_jax.nn.generation import generate
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig

FEATURE = 3
CASES = {
    "resid_mid with biases and passthrough": {"site": "resid_mid", "bias": True, "inp": {"passthrough": (2, 5)}},
    "lookup": {"inp": {"token_lookup": 11}},
    "normalised, two layers": {
        "n_layer": 2,
        "inp": {"normalize": 4.0, "apply_normalize": True},
        "out": {"normalize": 3.0, "apply_normalize": True},
    },
}


def random_sae(config: SAEConfig, seed: int) -> SAE:
    sae, rng = SAE.init(config, jax.random.key(seed)), np.random.default_rng(seed)
    noise = {name: jnp.asarray(rng.normal(size=value.shape), jnp.float32) for name, value in sae.params.items()}
    params = {
        name: noise[name] if name.startswith("b_") else value + 0.3 * noise[name] for name, value in sae.params.items()
    }
    return SAE(params, config)


def case(site="mlp_in", bias=False, n_layer=1, inp=(), out=()):
    config = TransformerConfig(n_layer, 1, 8, 12, 16, 11, bias=bias)
    lm = LanguageModel(published.make_params(config), config)
    saes = [
        random_sae(SAEConfig(where, n_layer - 1, 8, 3, 4, encoder_bias=True, **dict(options)), seed)
        for seed, (where, options) in enumerate(((site, inp), ("mlp_out", out)))
    ]
    return Tracer(lm, n_layer - 1, *saes), np.random.default_rng(9).integers(0, 11, (5, 7))


@pytest.fixture(scope="module", params=CASES)
def made(request):
    return case(**CASES[request.param])


def some_pairs(tracer) -> np.ndarray:
    """Every third pair of input features, in no order, and of those that are one feature twice."""
    i, j = np.triu_indices(tracer.basis.shape[1])
    pairs = np.stack([i, j], axis=1)[::3]
    return np.random.default_rng(4).permutation(pairs)


def both_sides(tracer, tokens):
    return site_pair(tracer.lm, tracer.inp, jnp.asarray(tokens, jnp.int32))


def test_the_pre_activation_falls_by_the_entries_of_the_account(made):
    tracer, tokens = made
    pairs = some_pairs(tracer)
    found = account(tracer, tokens, FEATURE)
    x, y = both_sides(tracer, tokens)
    effects = pair_effects(tracer, pairs)
    chosen = np.zeros((tracer.basis.shape[1],) * 2, bool)
    chosen[pairs[:, 0], pairs[:, 1]] = chosen[pairs[:, 1], pairs[:, 0]] = True
    indices = np.asarray(found.indices)
    here = chosen[indices[..., :, None], indices[..., None, :]]
    pairs_of_account = np.asarray(found.pairs, np.float64)
    shown = (pairs_of_account * here).sum(axis=(-2, -1))
    expected = {
        "these": shown,
        "other_pairs": (pairs_of_account * ~here).sum(axis=(-2, -1)),
        "all_else": np.asarray(found.total - found.encoder) - shown,
    }
    largest = float(found.magnitude[1].max())
    for remove in REMOVE:
        fall = removed(effects, x, y, remove) @ tracer.directions[FEATURE]
        np.testing.assert_allclose(fall, expected[remove], atol=1e-5 * largest, err_msg=remove)
    left = (y - removed(effects, x, y, "all_else")) @ tracer.directions[FEATURE] + found.encoder
    np.testing.assert_allclose(left, shown + found.encoder, atol=1e-5 * largest)


def test_brute_force_of_the_whole_output(made):
    # The MLP itself, with one feature and with the other silenced: what is bilinear in both is the pair.
    tracer, tokens = made
    x, y = both_sides(tracer, tokens)
    codes = np.asarray(tracer.inp.encode(x), np.float64)
    scale = np.asarray(x, np.float64)
    scale = 1 / np.sqrt((scale**2).mean(axis=-1)) if tracer.inp.config.site == "resid_mid" else np.ones(x.shape[:-1])
    codes = codes * scale[..., None]
    if tracer.basis.shape[1] > codes.shape[-1]:
        codes = np.concatenate([codes, np.ones((*codes.shape[:-1], 1))], axis=-1)
    left, right, down = (np.asarray(part, np.float64) for part in dataclasses.astuple(tracer.tensor))
    basis = np.asarray(tracer.basis, np.float64)

    def mlp(v):
        return ((v @ left.T) * (v @ right.T)) @ down.T

    pairs = np.array([[0, 5], [23, 2], [7, 7], [codes.shape[-1] - 1, 4]])
    often = np.argsort(-(codes != 0).sum(axis=(0, 1)))[:4]  # and such as do meet
    pairs = np.concatenate([pairs, [often[:2], often[2:], often[[3, 3]]]])
    assert len(np.unique(np.sort(pairs, axis=1), axis=0)) == len(pairs)
    expected = np.zeros(y.shape)
    for i, j in pairs:
        a, b = codes[..., i, None] * basis[:, i], codes[..., j, None] * basis[:, j]
        expected += mlp(a) if i == j else mlp(a + b) - mlp(a) - mlp(b)
    np.testing.assert_allclose(removed(pair_effects(tracer, pairs), x, y), expected, rtol=1e-4, atol=1e-4)


def test_disjoint_ablations_add_up_and_all_of_them_leave_nothing(made):
    tracer, tokens = made
    x, y = both_sides(tracer, tokens)
    i, j = np.triu_indices(tracer.basis.shape[1])
    everything = np.stack([i, j], axis=1)
    one, two = (pair_effects(tracer, some) for some in (everything[::2], everything[1::2]))
    whole = pair_effects(tracer, everything)
    atol = 1e-5 * float(jnp.abs(removed(whole, x, y)).max())
    np.testing.assert_allclose(removed(one, x, y) + removed(two, x, y), removed(whole, x, y), atol=atol)
    np.testing.assert_allclose(removed(one, x, y, "other_pairs"), removed(two, x, y), atol=atol)
    np.testing.assert_allclose(removed(whole, x, y, "other_pairs"), jnp.zeros_like(y), atol=atol)
    # with neither pairs nor anything else, only the encoder's constant is left of a pre-activation
    nothing = pair_effects(tracer, [])
    assert removed(nothing, x, y, "all_else").tolist() == y.tolist() and not removed(nothing, x, y).any()


@pytest.mark.parametrize(
    ("made", "remove"),
    [("resid_mid with biases and passthrough", "these"), *(("normalised, two layers", remove) for remove in REMOVE)],
    indirect=["made"],
)
def test_over_a_dataset(made, remove):
    tracer, tokens = made
    pairs = some_pairs(tracer)
    mask = np.random.default_rng(2).random(tokens.shape) < 0.8
    x, y = both_sides(tracer, tokens)

    def preactivations(y):
        return np.asarray(tracer.out.preactivations(y))

    codes, z = np.asarray(tracer.out.encode(y)), preactivations(y)
    feature = int(np.argmax((codes[mask] != 0).sum(axis=0)))
    fired = mask & (codes[..., feature] != 0)
    found = ablate_pairs(tracer, tokens, {feature: pairs}, remove=remove, token_mask=mask, batch_size=2)[feature]
    change = jnp.where(mask[..., None], removed(pair_effects(tracer, pairs), x, y, remove), 0)
    after = preactivations(y - change)
    assert found.tokens == mask.sum() and found.clean.fires == found.clean.kept == fired.sum() > 3
    np.testing.assert_allclose(found.change, (after - z)[mask, feature].mean(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.preactivation, z[fired, feature].mean(), rtol=1e-4)
    np.testing.assert_allclose(found.preactivation_ablated, after[fired, feature].mean(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.clean.code, codes[fired, feature].mean(), rtol=1e-4)

    whole = np.asarray(tracer.out.encode(y - change))[..., feature]
    others = np.sort(np.delete(z, feature, axis=-1), axis=-1)[..., -tracer.out.config.k]
    alone = np.where(after[..., feature] > others, after[..., feature], 0)
    column = np.asarray(tracer.out.w_dec)[:, feature] * (tracer.out.config.normalize or 1)
    of_alone = np.where(mask, codes[..., feature] - alone, 0)[..., None] * column
    for run, code, taken in ((found.whole, whole, change), (found.alone, alone, jnp.asarray(of_alone, jnp.float32))):
        assert (run.fires, run.kept) == ((mask & (code != 0)).sum(), (fired & (code != 0)).sum())
        np.testing.assert_allclose(run.code, code[fired].mean(), rtol=1e-3, atol=1e-4)
        edits = {("mlp_out", tracer.layer): lambda y, taken=taken: y - taken}
        np.testing.assert_allclose(run.loss, tracer.lm.loss(tokens, mask, edits=edits), rtol=1e-5)
    np.testing.assert_allclose(found.clean.loss, tracer.lm.loss(tokens, mask), rtol=1e-5)
    if remove == "these":
        summary = pair_summaries(tracer, tokens, {feature: pairs}, token_mask=mask)[feature]
        np.testing.assert_allclose(-found.change, summary.mean.sum(), rtol=1e-3, atol=1e-4)


def same(one: Ablation, two: Ablation) -> None:
    for a, b in zip(*(jax.tree.leaves(dataclasses.asdict(part)) for part in (one, two)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5) if not isinstance(a, str) else None


def test_no_split_into_batches_and_no_other_feature_changes_anything(made):
    tracer, tokens = made
    pairs = some_pairs(tracer)
    whole = ablate_pairs(tracer, tokens, {FEATURE: pairs}, batch_size=100)[FEATURE]
    two = ablate_pairs(tracer, tokens, {8: [(1, 2)], FEATURE: pairs}, batch_size=2)
    same(whole, two[FEATURE])
    assert list(two) == [8, FEATURE]


def test_ablating_what_never_meets_changes_nothing_bit_for_bit(made):
    tracer, tokens = made
    x, _ = both_sides(tracer, tokens)
    fires = np.asarray(tracer.inp.encode(x)).reshape(-1, tracer.inp.config.n_features) != 0
    never = np.argwhere(np.triu(fires.T.astype(int) @ fires == 0))[:5]
    found = ablate_pairs(tracer, tokens, {FEATURE: never})[FEATURE]
    assert found.clean == found.whole == found.alone or np.isnan(found.clean.code)
    assert found.change == 0 and found.clean.loss == found.whole.loss == found.alone.loss


def planted():
    """y_0 = x_0 x_1 and y_1 = x_2 x_3; neither attention nor norms; features are the coordinates."""
    config = TransformerConfig(1, 1, 4, 2, 6, 3, normalization=False)
    mlp = {
        "w_l": jnp.array([[[1.0, 0, 0, 0], [0, 0, 1, 0]]]),
        "w_r": jnp.array([[[0, 1.0, 0, 0], [0, 0, 0, 1]]]),
        "w_p": jnp.zeros((1, 4, 2)).at[0, 0, 0].set(1.0).at[0, 1, 1].set(1.0),
    }
    attention = {name: jnp.zeros((1, 4, 4)) for name in ("w_q", "w_k", "w_v", "w_o")}
    embedding = jnp.array([[2.0, 3, 0, 0], [0, 0, 3, 3], [2, 1, 3, 1]])
    lm = LanguageModel({"w_e": embedding, "w_u": embedding, "layers": {"attention": attention, "mlp": mlp}}, config)
    params = {"w_enc": jnp.eye(4), "w_dec": jnp.eye(4), "b_dec": jnp.zeros(4)}
    saes = (SAE(params, SAEConfig("mlp_in", 0, 4, 1, 4)), SAE(params, SAEConfig("mlp_out", 0, 4, 1, 1)))
    return Tracer(lm, 0, *saes), np.array([[0, 1, 2, 0]])


def test_worked_by_hand():
    # Feature 0 of y is 6, 0, 2, 6 and feature 1 is 0, 9, 3, 0; the larger one is selected: 0 at the first and the last.
    tracer, tokens = planted()
    everywhere = np.ones((1, 4), bool)

    def run(pairs, remove):
        return ablate_pairs(tracer, tokens, {0: pairs}, remove=remove, token_mask=everywhere)[0]

    found = run([(1, 0)], "these")
    assert (found.clean.fires, found.clean.code, found.preactivation) == (2, 6, 6)
    assert (found.change, found.preactivation_ablated) == (-3.5, 0)
    assert (found.whole.fires, found.whole.kept, found.whole.code) == (0, 0, 0)
    assert len({found.clean.loss, found.whole.loss, found.alone.loss}) == 3
    found = run([(1, 0)], "other_pairs")
    # without y_1, feature 0 fires at the third token too; by itself alone, feature 1 still outbids it there
    assert (found.whole.fires, found.whole.kept, found.alone.fires, found.change) == (3, 2, 2, 0)
    assert found.alone.loss == found.clean.loss != found.whole.loss
    # the SAE and the pair leave nothing out here, so that no more is removed with all else
    same(run([(1, 0)], "all_else"), dataclasses.replace(found, remove="all_else"))
    found = run([(2, 3)], "all_else")
    assert (found.whole.fires, found.alone.fires, found.preactivation_ablated) == (0, 0, 0)


def test_in_jit_vmap_and_grad():
    tracer, tokens = case(bias=True)
    x, y = both_sides(tracer, tokens)
    effects = pair_effects(tracer, some_pairs(tracer)[:20])
    whole = removed(effects, x, y)
    np.testing.assert_allclose(jax.jit(removed)(effects, x, y), whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.vmap(removed, (None, 0, 0)))(effects, x, y), whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(removed(effects, x[2, 3], y[2, 3]), whole[2, 3], rtol=1e-4, atol=1e-4)
    slope = jax.jit(jax.grad(lambda v: removed(dataclasses.replace(effects, vectors=v), x, y).sum()))
    gradient = slope(effects.vectors)
    assert gradient.shape == effects.vectors.shape and bool(jnp.isfinite(gradient).all())


def test_a_low_precision_model_is_ablated_too():
    tracer, tokens = case()
    lm = dataclasses.replace(tracer.lm, compute_dtype=jnp.bfloat16)
    tracer = Tracer(lm, tracer.layer, tracer.inp, tracer.out)
    found = ablate_pairs(tracer, tokens, {FEATURE: [(0, 1)]})[FEATURE]
    assert found.clean.loss == pytest.approx(float(lm.loss(tokens)), rel=1e-2)


def test_what_is_refused(golden):
    lm, tokens = golden.lm, golden.ids
    tracer = Tracer(lm, 1, scope=published.SCOPE)

    def run(pairs, **options):
        return ablate_pairs(tracer, tokens, pairs, **options)

    for pairs, options, message in [
        ({}, {}, "pairs must map at least one output feature"),
        ({3: []}, {}, r"of output feature 3 are .*, but they must be ints \[n, 2\] with n at least 1"),
        ({3: [(1, 2), (2, 1)]}, {}, "is given twice"),
        ({3: [(0, 1)]}, {"remove": "those"}, "remove must be one of these, other_pairs, all_else, got 'those'"),
        ({3: [(0, 1)]}, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({3: [(0, 1)]}, {"token_mask": np.zeros(tokens.shape, bool)}, "no token counts: set token_mask to True"),
        ({3: [(0, 1)]}, {"token_mask": np.ones((1, 1), bool)}, "give one value a token"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(pairs, **options)
    for pairs, words in [
        ({128: [(0, 1)]}, r"no feature 128 in SAE 1-mlp-out-x4-k6: choose one of 0 \.\.\. 127"),
        ({3: [(0, 128)]}, r"no feature 128 in SAE 1-mlp-in-x4-k6: choose one of 0 \.\.\. 127"),
    ]:
        with pytest.raises(UnknownNameError, match=words):
            run(pairs)
    with pytest.raises(ValueError, match="use_encoder=True"):
        ablate_pairs(Tracer(lm, 1, use_encoder=False, scope=published.SCOPE), tokens, {3: [(0, 1)]})
    x, y = both_sides(tracer, tokens)
    with pytest.raises(ValueError, match="remove must be one of"):
        removed(pair_effects(tracer, [(0, 1)]), x, y, "those")
    broken = dataclasses.replace(lm, params=lm.params | {"w_e": lm.params["w_e"] * jnp.nan})
    with pytest.raises(ValueError, match=r"not finite in rows 0 \.\.\."):
        ablate_pairs(Tracer(broken, 1, scope=published.SCOPE), tokens, {3: [(0, 1)]})


# Steering


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"])
def test_steering_by_hand(site):
    config = TransformerConfig(2, 1, 4, 5, 6, 3, attn_scale=0.25)
    lm, tokens = LanguageModel(published.make_params(config), config), np.array([[0, 1, 2, 0]])
    sae = SAE({"w_enc": 2 * jnp.eye(4), "w_dec": 3 * jnp.eye(4), "b_dec": jnp.ones(4)}, SAEConfig(site, 1, 4, 1, 4))
    before = np.asarray(lm.capture(tokens, [(site, 1)])[site, 1])
    where = jnp.array([[False, True, True, False]])

    def steered(**options):
        return steer(sae, 2, **options)[site, 1](jnp.asarray(before))

    unit = np.eye(4)[2]
    np.testing.assert_allclose(steered(add=5), before + 15 * unit, rtol=1e-6)
    np.testing.assert_allclose(
        steered(add=5, where=where), before + 15 * unit * np.asarray(where)[..., None], rtol=1e-6
    )
    np.testing.assert_allclose(
        steered(add=jnp.array([0.0, 1, 2, 3])), before + 3 * unit * np.arange(4)[:, None], rtol=1e-5
    )
    codes = np.asarray(sae.encode(jnp.asarray(before)))[..., 2, None]
    np.testing.assert_allclose(steered(to=4.0), before + 3 * unit * (4 - codes), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(steered(add=0.0), before)
    unedited, edited = (lm.capture(tokens, ["resid_mid", "resid_post"], edits) for edits in ({}, steer(sae, 2, add=5)))
    change = {name: np.asarray(edited[name] - unedited[name])[1] for name in unedited}
    # into the residual stream goes attn_scale times what is added to attn_out, and nothing of what is added to mlp_in
    factor = {"resid_pre": None, "attn_out": 0.25, "resid_mid": 1, "mlp_in": 0, "mlp_out": 0, "resid_post": 0}[site]
    if factor is not None:
        np.testing.assert_allclose(change["resid_mid"], np.broadcast_to(15 * factor * unit, (1, 4, 4)), atol=1e-5)
    if site in ("mlp_out", "resid_post"):
        np.testing.assert_allclose(change["resid_post"], np.broadcast_to(15 * unit, (1, 4, 4)), atol=1e-5)


def test_the_code_is_what_it_is_set_to_where_features_are_orthonormal():
    tracer, tokens = planted()
    sae = dataclasses.replace(
        tracer.inp, config=dataclasses.replace(tracer.inp.config, normalize=2.0, apply_normalize=True)
    )
    for options, expected in (({"add": 1.5}, [1.5, 3, 3, 1.5]), ({"to": 7.0}, [7] * 4), ({"to": 0}, [0] * 4)):
        value = tracer.lm.capture(tokens, [("mlp_in", 0)], edits=steer(sae, 2, **options))["mlp_in", 0]
        assert np.asarray(sae.encode(value))[0, :, 2].tolist() == expected  # x_2 / 2 is 0, 1.5, 1.5, 0


def test_taking_every_feature_out_is_what_is_left_of_an_sae(golden):
    # One after another, each feature set to 0 in turn gives x - W_dec z: the bias and the error
    lm = golden.lm
    sae = Tracer(lm, 1, scope=published.SCOPE).out
    y = lm.capture(golden.ids, [("mlp_out", 1)])["mlp_out", 1]
    codes = sae.encode(y, sparse=True)
    for feature in np.unique(codes.indices)[:3].tolist():
        left = steer(sae, feature, to=0)["mlp_out", 1](y)
        expected = y - sae.encode(y)[..., feature, None] * sae.w_dec[:, feature][None, None]
        np.testing.assert_allclose(left, expected, atol=1e-5)


def test_generation_is_steered(golden):
    # The cached generator against one pass over the whole text
    lm = golden.lm
    edits = steer(Tracer(lm, 1, scope=published.SCOPE).out, 5, add=30.0) | {"attn_out": lambda x: 0.5 * x}
    prompts, lengths = np.array([[3, 14, 15, 9], [2, 6, 0, 0]], np.int32), np.array([4, 2], np.int32)
    new = np.asarray(generate(lm.config, lm.params, prompts, lengths, max_length=6, temperature=0, edits=edits))
    plain = np.asarray(generate(lm.config, lm.params, prompts, lengths, max_length=6, temperature=0))
    assert (new != plain).any()
    for prompt, length, row in zip(prompts, lengths, new, strict=True):
        text = np.concatenate([prompt[:length], row])
        logits = np.asarray(lm.logits(text[None], edits=edits))[0, length - 1 : -1]
        assert (logits[np.arange(6), row] >= logits.max(axis=-1) - 1e-4).all()
    with pytest.raises(ValueError, match="an edit must keep the shape"):
        generate(lm.config, lm.params, prompts, lengths, max_length=2, edits={("mlp_out", 0): lambda x: x[..., :1]})
    with pytest.raises(UnknownNameError, match="no site 'mlp': choose one of resid_pre"):
        generate(lm.config, lm.params, prompts, lengths, max_length=2, edits={"mlp": lambda x: x})


def test_a_transcoder_steers_what_it_reconstructs():
    config = TransformerConfig(2, 1, 4, 5, 6, 3)
    lm, tokens = LanguageModel(published.make_params(config), config), np.array([[0, 1, 2, 0]])
    params = {"w_enc": 2 * jnp.eye(4), "w_dec": 3 * jnp.eye(4), "b_dec": jnp.ones(4)}
    sae = SAE(params, SAEConfig("mlp_in", 1, 4, 1, 4, target="mlp_out"))
    edits = steer(sae, 2, add=5)
    assert list(edits) == [("mlp_out", 1)]
    before, after = (lm.capture(tokens, ["mlp_in", "mlp_out"], edits) for edits in ({}, edits))
    np.testing.assert_array_equal(after["mlp_in"], before["mlp_in"])
    np.testing.assert_allclose(
        after["mlp_out"][1], np.asarray(before["mlp_out"][1]) + 15 * np.eye(4)[2], rtol=1e-5, atol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"is a transcoder: .* read at mlp_in, .* write to mlp_out.*: give add instead"
    ):
        steer(sae, 2, to=1.0)


def test_steering_that_is_refused(golden):
    sae = Tracer(golden.lm, 1, scope=published.SCOPE).out
    for options in ({}, {"add": 1, "to": 1}):
        with pytest.raises(ValueError, match=r"give exactly one of add \("):
            steer(sae, 3, **options)
    with pytest.raises(ValueError, match="to must be finite, got nan"):
        steer(sae, 3, to=float("nan"))
    for options in ({"add": jnp.ones(3)}, {"to": jnp.ones((4, 1, 2))}, {"add": 1, "where": jnp.ones((3, 1), bool)}):
        with pytest.raises(ValueError, match=r"has shape \(.*, but it must broadcast to the tokens, \(2, 2\)"):
            steer(sae, 3, **options)["mlp_out", 1](jnp.ones((2, 2, golden.lm.config.d_model)))
    with pytest.raises(UnknownNameError, match=r"no feature 128 in SAE 1-mlp-out-x4-k6: choose one of 0 \.\.\. 127"):
        steer(sae, 128, add=1.0)
    traced = jax.jit(lambda y, feature, much: steer(sae, feature, add=much)["mlp_out", 1](y))
    y = jnp.ones((1, 2, golden.lm.config.d_model))
    np.testing.assert_allclose(traced(y, 3, 2.0), steer(sae, 3, add=2.0)["mlp_out", 1](y), rtol=1e-6)
