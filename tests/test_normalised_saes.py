"""An SAE with an applied ``normalize``: every function says of it what it says of the one with the factor folded in.

The factors are powers of two: folding them in rounds nothing, so no top-k and no sign of an eigenvector can differ.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from tokenizers import Tokenizer, decoders, models

from bilinear_jax.explain.account import account
from bilinear_jax.explain.logits import logit_effects, logit_effects_of
from bilinear_jax.explain.overview import feature_weights
from bilinear_jax.explain.select import select_features
from bilinear_jax.explain.similarity import cosine_similarity, functional_similarity, inner_product
from bilinear_jax.explain.spectra import effective_rank, kurtosis
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.activations import top_activations
from bilinear_jax.measure.correlation import low_rank_correlation
from bilinear_jax.measure.evaluation import evaluate_saes
from bilinear_jax.measure.interventions import ablate_pairs, steer
from bilinear_jax.measure.pairs import pair_summaries
from bilinear_jax.nn.activations import SparseCodes
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.pages import neuronpedia
from bilinear_jax.pages.gather import gather
from bilinear_jax.pages.options import PageOptions
from bilinear_jax.show.visualizer import Visualizer

FEATURE = 3
TOKENS = np.random.default_rng(9).integers(0, 11, (5, 7))
SMALL = PageOptions(batch_size=5, contexts=2, groups=2, samples=2, window=1, bins=4, pairs=5, eigenpairs=2, reads=3)


def random_sae(config: SAEConfig, seed: int) -> SAE:
    sae, rng = SAE.init(config, jax.random.key(seed)), np.random.default_rng(seed)
    params = {name: value + 0.3 * rng.normal(size=value.shape).astype("f4") for name, value in sae.params.items()}
    return SAE(params, config)


def folded(sae: SAE) -> SAE:
    """The plain SAE of the same function, by the formula of the forward pass: n W_dec TopK(W_enc (x / n - b)) + n b."""
    n, params = sae.config.normalize, sae.params
    params = params | {"w_enc": params["w_enc"] / n, "w_dec": params["w_dec"] * n, "b_dec": params["b_dec"] * n}
    return SAE(params, dataclasses.replace(sae.config, apply_normalize=False, normalize=None))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(lm, input SAE, output SAE) with the factors applied, and folded in."""
    place = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE({chr(ord("a") + n): n for n in range(11)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(place / "tokenizer.json"))
    config = TransformerConfig(1, 1, 8, 12, 16, 11, bias=True)
    lm = LanguageModel(published.make_params(config), config, tokenizer_source=str(place))
    options = {"encoder_bias": True, "apply_normalize": True}
    inp = random_sae(SAEConfig("resid_mid", 0, 8, 3, 4, normalize=4.0, passthrough=(2,), **options), 0)
    out = random_sae(SAEConfig("mlp_out", 0, 8, 3, 4, normalize=0.25, **options), 1)
    return (lm, inp, out), (lm, folded(inp), folded(out))


def tracer(lm: LanguageModel, inp: SAE, out: SAE, **options) -> Tracer:
    return Tracer(lm, 0, inp, out, **options)


def pairs_of(lm, inp, out) -> dict[int, np.ndarray]:
    return {FEATURE: np.array([[0, 1], [2, 2], [5, 9], [7, 3]])}


def pages(lm, inp, out):
    """The facts of the pages, without the provenance, which has the hashes of the SAEs; and Neuronpedia's rows."""
    site = gather(tracer(lm, inp, out), [FEATURE, 7], tokens=TOKENS, options=SMALL, command="", dataset="")
    facts = [page.activity for page in site.outputs]
    names = {"dataset": "rows", "rows": 5, "tokens_per_row": 7, "model_id": "small"}
    with tempfile.TemporaryDirectory() as folder:
        path = neuronpedia.export(lm, out, facts, Path(folder) / "out", **names)
        return [site.outputs, site.inputs, json.loads((path / "batch-0.json").read_text())["features"]]


def overview(*parts):
    found = next(feature_weights(tracer(*parts), [FEATURE], eigenpairs=3, reads=2, pairs=4))
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}


def similarities(*parts):
    made = tracer(*parts)
    inside = made.tensor.in_basis(made.basis).out_basis(made.directions)
    other = tracer(parts[0], folded_if_needed(parts[1]), folded_if_needed(parts[2]))
    plain = other.tensor.in_basis(other.basis).out_basis(other.directions)
    return [f(inside, plain) for f in (inner_product, cosine_similarity, functional_similarity)]


def folded_if_needed(sae: SAE) -> SAE:
    return folded(sae) if sae.config.apply_normalize else sae


def steered(lm, inp, out):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 8)), jnp.float32)
    edits = [steer(sae, FEATURE, **how) for sae in (inp, out) for how in ({"add": 2.0}, {"to": 1.5})]
    return [edit(x) for given in edits for edit in given.values()]


OF_WEIGHTS = {
    "logit_effects": lambda lm, inp, out: [logit_effects(lm, sae, FEATURE, k=3) for sae in (inp, out)],
    "logit_effects_of": lambda lm, inp, out: [logit_effects_of(lm, sae, [FEATURE, 5], 3) for sae in (inp, out)],
    "directions and basis": lambda *parts: [tracer(*parts).directions, tracer(*parts).basis],
    "decoder directions": lambda *parts: tracer(*parts, use_encoder=False).directions,
    "q": lambda *parts: tracer(*parts).q([FEATURE, 4], project=True),
    "q of decoder columns": lambda *parts: tracer(*parts, use_encoder=False).q([FEATURE, 4], project=True),
    "top_eigh": lambda *parts: tracer(*parts, use_encoder=False).top_eigh(k=2).values,
    "spectra": lambda *parts: [tracer(*parts).compute(f) for f in (effective_rank, kurtosis)],
    "top_interactions": lambda *parts: tracer(*parts).top_interactions(n=5),
    "interaction_submatrix": lambda *parts: tracer(*parts).interaction_submatrix(FEATURE, n=5),
    "cosines": lambda *parts: tracer(*parts).cosines([0, 1, 2]),
    "overview": overview,
    "select_features": lambda *parts: select_features("top:5", tracer(*parts)),
    "similarity": similarities,
    "steer": steered,
}
OF_TOKENS = {
    "account": lambda *parts: account(tracer(*parts), TOKENS, FEATURE),
    "pair_summaries": lambda *parts: pair_summaries(tracer(*parts), TOKENS, pairs_of(*parts)),
    "ablate_pairs": lambda *parts: ablate_pairs(tracer(*parts), TOKENS, pairs_of(*parts), remove="all_else"),
    "correlation": lambda *parts: low_rank_correlation(tracer(*parts), TOKENS, [1, 2], min_count=2),
    "evaluate_saes": lambda lm, *saes: list(evaluate_saes(lm, saes, TOKENS).values()),
    "visualizer": lambda lm, inp, out: [
        Visualizer(lm, out, TOKENS, top_activations(lm, [out], TOKENS, k=2)).text(FEATURE, logits=3)
    ],
    "pages": pages,
}


def numbers(found) -> list:
    """Every number and text in a result, in order."""
    if dataclasses.is_dataclass(found):
        return numbers([getattr(found, field.name) for field in dataclasses.fields(found)])
    if isinstance(found, dict):
        return [part for item in found.items() for part in numbers(item)]
    if isinstance(found, list | tuple):
        return [part for one in found for part in numbers(one)]
    return [found]


def compare(applied, plain) -> None:
    first, second = numbers(applied), numbers(plain)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        if one is None or isinstance(one, str | bool):
            assert one == other
        else:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_its_weights_are_those_with_the_factor_folded_in(both, name):
    compare(*(OF_WEIGHTS[name](*parts) for parts in both))


@pytest.mark.parametrize("name", OF_TOKENS)
def test_its_measurements_are_those_with_the_factor_folded_in(both, name):
    compare(*(OF_TOKENS[name](*parts) for parts in both))


def test_the_effects_are_those_of_one_more_unit_of_the_code(both):
    """By the reconstruction itself, not by the folded SAE."""
    lm, *saes = both[0]
    for sae in saes:
        one, two = (
            sae.decode(SparseCodes(jnp.full((1, 1), value), jnp.full((1, 1), 7), 24), jnp.zeros((1, 8)))[0]
            for value in (1.0, 2.0)
        )
        effects = np.asarray(lm.w_u, np.float64) @ np.asarray(two - one, np.float64)
        np.testing.assert_allclose(logit_effects(lm, sae, 7, k=3).raised_by, np.sort(effects)[::-1][:3], rtol=1e-4)
        np.testing.assert_allclose(sae.decoder[:, 7], two - one, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(sae.decoder_bias, 2 * one - two, rtol=1e-4, atol=1e-5)
        gradient = jax.jacobian(lambda x, sae=sae: sae._apply("preactivations", x))(jnp.ones(8))
        np.testing.assert_allclose(sae.encoder, gradient, rtol=1e-5, atol=1e-7)
