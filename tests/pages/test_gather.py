"""Facts of feature pages: by hand on a planted model, by brute force on random ones, and what can be missing."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import published
import pytest
from tokenizers import Tokenizer, decoders, models

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain.logits import logit_effects
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.cofiring import co_firing, strongest_pairs
from bilinear_jax.measure.pairs import pair_summaries
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.pages.gather import gather
from bilinear_jax.pages.options import PageOptions

SMALL = PageOptions(batch_size=4, contexts=3, groups=2, samples=2, window=1, bins=4, pairs=5, eigenpairs=4, reads=3)


def with_tokenizer(lm: LanguageModel, folder) -> LanguageModel:
    """The same model, with a byte-level tokenizer: "a", "b", the two bytes of "é", "x", and more for the rest."""
    rest = [chr(ord("A") + n) for n in range(lm.config.n_vocab - 5)]
    vocab = {text: token for token, text in enumerate(["a", "b", "Ã", "©", "x", *rest])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return dataclasses.replace(lm, tokenizer_source=str(folder))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """y_0 = 2 x_0 x_1 + x_2 x_3, the rest of y is 0; x is the token's embedding. Output features 1, 2 and 3 are dead.

    Input features 0 ... 3 are the coordinates; 4 writes as 0 does, and never fires.
    """
    config = TransformerConfig(1, 1, 4, 2, 6, 6, normalization=False, pad_id=5)
    mlp = {
        "w_l": jnp.array([[[1.0, 0, 0, 0], [0, 0, 1, 0]]]),
        "w_r": jnp.array([[[0, 1.0, 0, 0], [0, 0, 0, 1]]]),
        "w_p": jnp.zeros((1, 4, 2)).at[0, 0].set(jnp.array([2.0, 1])),
    }
    attention = {name: jnp.zeros((1, 4, 4)) for name in ("w_q", "w_k", "w_v", "w_o")}
    embedding = jnp.array([[3.0, 1, 0, 0], [2, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    params = {"w_e": embedding, "w_u": embedding, "layers": {"attention": attention, "mlp": mlp}}
    lm = with_tokenizer(LanguageModel(params, config), tmp_path_factory.mktemp("planted"))
    first = jnp.eye(4)[:1]
    reads = jnp.concatenate([jnp.eye(4), -first, jnp.zeros((3, 4))])
    writes = jnp.concatenate([jnp.eye(4), first, jnp.zeros((3, 4))]).T
    inp = SAE({"w_enc": reads, "w_dec": writes, "b_dec": jnp.zeros(4)}, SAEConfig("mlp_in", 0, 4, 2, 2))
    out = SAE({"w_enc": jnp.eye(4), "w_dec": jnp.eye(4), "b_dec": jnp.zeros(4)}, SAEConfig("mlp_out", 0, 4, 1, 1))
    a, b, e1, e2, x, pad = range(6)
    tokens = np.array([[a, a, b, e1, e2, pad], [pad] * 6, [b, b, x, a, b, b]])  # a row of padding alone
    return gather(Tracer(lm, 0, inp, out), [0, 2], tokens=tokens, options=SMALL, command="by hand", dataset="three")


def test_by_hand(planted):
    # The 9 tokens that count: a b é é | b x a b b; position 0 and padding don't
    page = planted.outputs[0]
    assert (page.norm, page.effective_rank) == (1.581, 3.6)  # sqrt(5 / 2) and 3^2 / (5 / 2)
    assert [(pair.value, pair.share) for pair in page.eigenpairs[2:]] in (
        [(0.5, 0.1), (-0.5, 0.1)],
        [(-0.5, 0.1), (0.5, 0.1)],
    )
    assert sorted(pair.value for pair in page.eigenpairs[:2]) == [-1, 1] and page.explained == 1
    for pair in page.eigenpairs[:2]:
        assert {one: math.copysign(1, cosine) for one, cosine in pair.reads} == {
            0: 1,
            1: math.copysign(1, pair.value),
            4: 1,
        }
        assert {abs(cosine) for _, cosine in pair.reads} == {0.7071}

    data = page.by_data
    assert [(pair.i, pair.j) for pair in data.pairs] == [(0, 1)]
    pair = data.pairs[0]
    assert (pair.weight, pair.mean) == (1, 4.667)  # where it fires, a: 6, b: 4: 28 / 6
    assert (pair.joint, pair.everywhere, pair.interference) == (1, 0.6667, False)  # 6 / 6, 6 / 9
    assert (pair.r2, data.r2, data.share, data.share_of_pairs) == (1, 1, 1, 1)
    assert data.terms["shown"] == 4.667 and sum(data.terms.values()) == 4.667
    assert [(place.row, place.start, place.focus, place.values, place.second) for place in pair.contexts] == [
        (0, 0, 1, [3, 3, 2], [1, 1, 1]),
        (2, 2, 1, [0, 3, 2], [0, 1, 1]),
    ]

    weight = {(pair.i, pair.j): pair for pair in page.by_weight.pairs}
    assert {pair: one.weight for pair, one in weight.items()} == {(0, 1): 1, (1, 4): 1, (2, 3): 0.5}  # none of weight 0
    for pair in ((1, 4), (2, 3)):
        assert weight[pair].interference and not weight[pair].contexts and weight[pair].mean == 0
    assert page.heat_map.inputs == [0, 1, 4, 2, 3] and page.heat_map.explained == 1
    assert np.array(page.heat_map.matrix).tolist() == [
        [0, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0.5],
        [0, 0, 0, 0.5, 0],
    ]


def test_what_makes_it_fire_by_hand(planted):
    made = planted.outputs[0].making  # chosen on a b é é, scored on b x a b b
    assert (made.chosen, made.scored, made.firings) == (4, 5, 4)
    assert [(one.form, one.context.row, one.context.start + one.context.focus) for one in made.tokens] == [(6, 2, 3)]
    assert sum(made.tokens[0].contributions) == pytest.approx(6, abs=1e-2)
    assert sum(square.share for square in made.squares) == pytest.approx(1, abs=1e-2)
    assert sum(square.mean for square in made.squares) == pytest.approx(4.5, abs=1e-2)  # a: 6, and three times b: 4
    first = made.squares[0]
    assert first.value > 0 and {feature for feature, share in first.finds if share} == {0, 1}
    assert sum(share for _, share in first.finds) == pytest.approx(1, abs=1e-3)
    assert [(place.row, place.start + place.focus) for place in first.contexts] == [(2, 3)]  # one row is scored on
    assert max(first.contexts[0].values) == first.contexts[0].values[first.contexts[0].focus] > 5
    scores = {score.name: score for score in made.scores}
    assert scores["all eigenpairs"].average_precision == 1 and not scores["all eigenpairs"].control
    assert scores["rotated, 3"].control and scores["random directions, 3"].control and scores["token lookup"].control


def test_activity_by_hand(planted):
    found = planted.outputs[0].activity
    assert (found.density, found.largest, found.top_tokens) == (0.6667, 6, ["a"])
    assert [(place.row, place.start + place.focus) for place in found.top.contexts] == [(0, 1), (2, 3)]
    assert (found.top.low, found.top.high, found.top.share) == (6, 6, 0.3333)
    assert [(group.low, group.high) for group in found.lower] == [(4, 6), (4, 4)]
    for group in found.lower:  # the two largest are shown already
        assert all(place.values[place.focus] == 4 for place in group.contexts) and group.contexts
    assert (found.histogram.edges, found.histogram.counts) == ([0, 1.5, 3, 4.5, 6], [0, 0, 4, 2])
    assert found.raised[0].token == "a" and found.raised[0].effect == 3 and found.lowered[0].effect == 0
    provenance = planted.provenance
    assert (provenance.rows, provenance.tokens, provenance.command, provenance.layer) == (3, 9, "by hand", 0)


def test_what_is_dead_or_rare_has_a_page(planted):
    dead = planted.outputs[1]
    assert dead.making.firings == 0 and dead.making.tokens == [] and dead.making.scores[0].average_precision is None
    assert all(square.mean is square.share is None and square.finds == [] for square in dead.making.squares)
    assert dead.activity.feature == 2 and dead.activity.density == dead.activity.largest == dead.norm == 0
    assert dead.activity.top.contexts == dead.activity.lower == dead.activity.histogram.counts == []
    assert dead.by_weight.pairs == dead.by_data.pairs == [] and dead.by_data.r2 is None and dead.by_data.share is None
    assert dead.effective_rank == dead.explained == dead.heat_map.explained == 0 and dead.heat_map.inputs == []

    pages = {page.activity.feature: page for page in planted.inputs}
    never, once = pages[4], pages[3]
    assert (never.activity.density, never.activity.top.contexts, never.activity.top_tokens) == (0, [], [])
    assert next((feeds.output, feeds.other, feeds.weight) for feeds in never.feeds) == (0, 1, 1)
    assert once.activity.density == 0.1111 and once.activity.lower == [] and once.activity.top_tokens == ["x"]
    assert [(place.row, place.tokens) for place in once.activity.top.contexts] == [(2, ["b", "x", "a"])]
    assert sum(once.activity.histogram.counts) == 1


def test_characters_are_shown_whole_and_padding_is_not(planted):
    (place,) = next(page for page in planted.inputs if page.activity.feature == 2).activity.top.contexts
    assert (place.row, place.start, place.tokens, place.values) == (0, 2, ["b", "", "é"], [0, 1, 1])


# Random models


@pytest.fixture(scope="module", params=["micro", "biased"])
def made(request, golden, tmp_path_factory):
    if request.param == "biased":
        tracer, tokens = published.biased_tracer()
    else:
        tokens = np.random.default_rng(0).integers(3, golden.lm.config.n_vocab, (6, 12))
        tracer = Tracer(golden.lm, 1, scope=published.SCOPE)
    lm = with_tokenizer(tracer.lm, tmp_path_factory.mktemp("tokenizer"))
    tracer = Tracer(lm, tracer.layer, tracer.inp, tracer.out)
    return tracer, tokens, site_of(tracer, tokens)


def firing_often(tracer, tokens):
    """The two output features that fire most in the last half of the rows."""
    fires = dense_codes(tracer.lm, tracer.out, tokens[-3:])[:, 1:] != 0
    return np.argsort(-fires.sum(axis=(0, 1)), kind="stable")[:2].tolist()


def site_of(tracer, tokens, features=None, **options):
    features = firing_often(tracer, tokens) if features is None else features
    options = dataclasses.replace(SMALL, **options)
    return gather(tracer, list(features), tokens=tokens, options=options, command="", dataset="random")


def dense_codes(lm, sae, tokens):
    """``[rows, seq, features]``."""
    site = (sae.config.site, sae.config.layer)
    return np.asarray(sae.encode(lm.capture(tokens, [site])[site]))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_activities_against_dense_codes(made):
    tracer, tokens, site = made
    seq, random = tokens.shape[1], []
    for sae, pages in ((tracer.out, site.outputs), (tracer.inp, site.inputs)):
        codes = dense_codes(tracer.lm, sae, tokens)
        for page in pages:
            found = page.activity
            mine = codes[..., found.feature]
            counted = np.abs(mine[:, 1:])
            close(found.density, np.mean(counted != 0))
            close(found.largest, counted.max())
            best = np.sort(counted.max(axis=1))[::-1]
            values = [abs(place.values[place.focus]) for place in found.top.contexts]
            close(values, best[best > 0][:3])
            shown = {(place.row, place.start + place.focus) for place in found.top.contexts}
            for group in found.lower:
                for place in group.contexts:
                    assert group.low <= abs(place.values[place.focus]) <= group.high
                    assert place.start + place.focus > 0 and (place.row, place.start + place.focus) not in shown
            for group in (found.top, *found.lower):
                for place in group.contexts:
                    start, stop = place.start, place.start + len(place.tokens)
                    close(place.values, mine[place.row, start:stop])
                    assert start == max(start + place.focus - 1, 0) and stop >= min(start + place.focus + 2, seq)
            if values:
                close(found.top.share, np.mean(counted[counted > 0] >= best[len(values) - 1]))
            signed = mine[:, 1:][mine[:, 1:] != 0]
            if signed.size:
                edges = np.linspace(min(signed.min(), 0), max(signed.max(), 0), 5)
                assert found.histogram.counts == np.histogram(signed, edges)[0].tolist()
            effects = logit_effects(tracer.lm, sae, found.feature)
            close([effect.effect for effect in found.lowered], effects.lowered_by)
            random.append(len(found.lower))
    assert max(random) > 0


def test_pairs_against_their_summaries_and_dense_codes(made):
    tracer, tokens, site = made
    codes = dense_codes(tracer.lm, tracer.out, tokens)
    for page in site.outputs:
        feature = page.activity.feature
        matrix = np.asarray(tracer.q(feature, project=True), np.float64)
        upper = np.abs(matrix[np.triu_indices(len(matrix))])
        close([abs(pair.weight) for pair in page.by_weight.pairs], np.sort(upper)[::-1][:5])
        fires = (codes[..., feature] != 0) & (np.arange(tokens.shape[1]) > 0)
        assert fires.any()
        strongest = strongest_pairs(tracer, co_firing(tracer, tokens, token_mask=fires), feature, 5).tolist()
        assert [[pair.i, pair.j] for pair in page.by_data.pairs] == strongest
        for found in (page.by_weight, page.by_data):
            pairs = [(pair.i, pair.j) for pair in found.pairs]
            here = pair_summaries(tracer, tokens, {feature: pairs}, token_mask=fires)[feature]
            whole = pair_summaries(tracer, tokens, {feature: pairs})[feature]
            for name in ("weight", "mean", "joint", "r2"):
                close([getattr(pair, name) for pair in found.pairs], getattr(here, name))
            close([pair.everywhere for pair in found.pairs], whole.joint)
            close([pair.interference for pair in found.pairs], whole.interference)
            close([found.r2, found.share, found.share_of_pairs], [here.r2[-1], here.share, here.share_of_pairs])
            close(list(found.terms.values()), [here.terms[name] for name in found.terms])
        inputs = page.heat_map.inputs
        close(page.heat_map.matrix, matrix[np.ix_(inputs, inputs)])
        close(page.heat_map.explained, (matrix[np.ix_(inputs, inputs)] ** 2).sum() / (matrix**2).sum())


def test_what_makes_a_feature_fire_against_its_eigenpairs(made):
    tracer, tokens, site = made
    rows, held = tokens[:3], tokens[3:]
    counted = np.arange(held.shape[1]) > 0
    for page in site.outputs:
        feature, found = page.activity.feature, page.making
        metric = tracer.metric(rows, firing=feature)
        top = tracer.top_eigh(6, [feature], metric=metric, exact=True)
        values, vectors = np.asarray(top.values[0], np.float64), np.asarray(top.vectors[0], np.float64)
        close([square.value for square in found.squares], values)
        x = np.asarray(tracer.lm.capture(held, [("mlp_in", tracer.layer)])["mlp_in", tracer.layer], np.float64)
        x = np.concatenate([x, np.ones((*x.shape[:2], tracer.tensor.n_in - x.shape[2]))], axis=2)
        along = np.einsum("ki,rsi->krs", vectors, x)
        terms = values[:, None, None] * along**2
        fires = (dense_codes(tracer.lm, tracer.out, held)[..., feature] != 0) & counted
        assert found.firings == fires.sum() > 0 and found.chosen == found.scored == 3 * counted.sum()
        q = np.asarray(tracer.q(feature), np.float64)
        form = np.einsum("rsi,ij,rsj->rs", x, q, x)
        close([square.mean for square in found.squares], terms[:, fires].mean(axis=1))
        close([square.share for square in found.squares], terms[:, fires].sum(axis=1) / form[fires].sum())
        codes = dense_codes(tracer.lm, tracer.inp, held)
        if tracer.site == "resid_mid":  # as the MLP sees them
            r = np.asarray(tracer.lm.capture(held, [("resid_mid", 0)])["resid_mid", 0])
            codes = codes / np.sqrt((r**2).mean(axis=-1, keepdims=True))
        codes = np.concatenate([codes, np.ones((*codes.shape[:2], tracer.basis.shape[1] - codes.shape[2]))], axis=2)
        for square, one, p, its in zip(found.squares, along, vectors, terms, strict=True):
            added = np.einsum("n,nj->j", one[fires], codes[fires] * (p @ np.asarray(tracer.basis)))
            for named, share in square.finds:
                assert share == pytest.approx(added[named] / (one[fires] ** 2).sum(), rel=1e-2, abs=1e-3)
            sizes = np.abs(its) * counted
            places = [(place.row - 3, place.start + place.focus) for place in square.contexts]
            close([sizes[place] for place in places], np.sort(sizes.max(axis=1))[::-1][:2])
            close([place.values[place.focus] for place in square.contexts], [its[place] for place in places])
        assert {named for square in found.squares for named, _ in square.finds} - {tracer.inp.config.n_features} <= {
            one.activity.feature for one in site.inputs
        }
        for at in found.tokens:
            place = (at.context.row - 3, at.context.start + at.context.focus)
            assert fires[place]
            close([at.form, *at.contributions], [form[place], *terms[(slice(None), *place)]])
        expected = tracer.explained(held, rows, features=[feature], parts=(1, 2, 6), by="firing")
        close([score.r2 for score in found.scores[:3]], expected.r2[0])


def test_one_row_cannot_be_scored(made):
    tracer, tokens, _ = made
    assert [page.making for page in site_of(tracer, tokens[:1]).outputs] == [None, None]


def test_eigenpairs_are_those_of_the_matrix(made):
    tracer, _, site = made
    columns = np.asarray(tracer.basis, np.float64)
    for page in site.outputs:
        values, vectors = np.linalg.eigh(np.asarray(tracer.q(page.activity.feature), np.float64))
        order = np.argsort(-np.abs(values))[:4]
        close([pair.value for pair in page.eigenpairs], values[order])
        close([pair.share for pair in page.eigenpairs], values[order] ** 2 / (values**2).sum())
        close([page.explained, page.norm], [(values[order] ** 2).sum() / (values**2).sum(), np.linalg.norm(values)])
        for pair, vector in zip(page.eigenpairs, vectors[:, order].T, strict=True):
            cosines = vector @ columns / np.linalg.norm(columns, axis=0)
            close([abs(cosine) for _, cosine in pair.reads], np.sort(np.abs(cosines))[::-1][:3])
            assert pair.reads[0][1] > 0


def test_neither_another_run_nor_other_batches_change_a_fact(made):
    tracer, tokens, site = made
    assert site_of(tracer, tokens) == site
    assert [page.by_data for page in site_of(tracer, tokens, batch_size=6).outputs] == [
        page.by_data for page in site.outputs
    ]


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([], ValueError, "at least one"),
        ([3, 3], ValueError, "named twice"),
        ([-1], UnknownNameError, r"no feature -1 in SAE {name}: choose one of 0 \.\.\. {last}"),
    ],
)
def test_features_that_are_refused(made, features, error, message):
    tracer, tokens, _ = made
    with pytest.raises(error, match=message.format(name=tracer.out.name, last=tracer.n_features - 1)):
        site_of(tracer, tokens, features)
