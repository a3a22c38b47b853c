"""``bilinear-jax trace --readable``: the product, its values at tokens and its scores, against the dictionary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import parsed, refused

import bilinear_jax as bj
from bilinear_jax.commands import trace
from bilinear_jax.training.sae_reads import narrowed
from bilinear_jax.training.sae_start import start_from

LAYER, FEATURE, TEXT = 2, 3, "Tom had a big dog."


@pytest.fixture(scope="module")
def lm():
    return bj.load("ts-nano")


@pytest.fixture(scope="module")
def scope(lm, tmp_path_factory):
    """A readable transcoder of ts-nano as it begins, with three weights a factor, and some rows of tokens."""
    parts = dict(target="mlp_out", bilinear_encoder=True, encoder_bias=True, product_bias=True, tag="readable")
    config = bj.SAEConfig("mlp_in", LAYER, 256, 1, 20, inputs=1024, inputs_k=20, reads=3, **parts)
    rows = bj.load_corpus("ts-nano")[:6, :32]
    sites = lm.capture(jnp.asarray(rows, jnp.int32), [("mlp_in", LAYER), ("mlp_out", LAYER)])
    samples = {place: np.asarray(value).reshape(-1, 256) for place, value in sites.items()}
    inp = bj.load_sae("ts-nano", site="mlp-in", layer=LAYER)
    params = start_from(lm, samples, {LAYER: inp})(config, bj.SAE.init(config, jax.random.key(0)).params)
    params["w_enc"] = narrowed(params["w_enc"], jnp.ones(1024), jnp.asarray(3))
    folder = tmp_path_factory.mktemp("scope")
    bj.save_sae(folder / config.name, bj.SAE(params, config), origin={})
    np.save(folder / "rows.npy", rows)
    return folder


def test_it_prints_the_product_its_values_and_its_scores(lm, scope):
    words = ["--layer", LAYER, "--feature", FEATURE, "--scope", scope, "--data", scope / "rows.npy", "--text", TEXT]
    found = parsed("trace", "--readable", *words, cwd=scope)
    sae = bj.load_dictionary(scope)
    product = bj.products.product(sae, FEATURE)
    assert found["inputs_read"] == product.inputs_read <= 6
    for side in ("left", "right"):
        terms = {term["input"]: term["weight"] for term in found[side]["terms"]}
        row = np.asarray(sae.params["w_enc"])[FEATURE + (side == "right") * 256]
        assert terms == {int(i): pytest.approx(float(row[i])) for i in np.flatnonzero(row)}
    x = lm.capture(lm.encode(TEXT), [("mlp_in", LAYER)])["mlp_in", LAYER][0]
    z, active = np.asarray(sae.preactivations(x))[:, FEATURE], np.asarray(sae.encode(x))[:, FEATURE]
    rows = found["account"]["tokens"]
    np.testing.assert_allclose([row["preactivation"] for row in rows], z, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([row["activation"] for row in rows], active, rtol=1e-4, atol=1e-4)
    made = [row["left"] * row["right"] + found["constant"] for row in rows]
    np.testing.assert_allclose(made, z, rtol=1e-4, atol=1e-4)
    place = found["account"]["position"]
    assert place == 1 + np.argmax(z[1:])
    for side in ("left", "right"):
        adds = sum(one["adds"] for one in found["account"]["active"] if one["side"] == side)
        assert adds + found[side]["constant"] == pytest.approx(rows[place][side], abs=1e-4)
    assert found["scores"]["this product"]["r2"] == pytest.approx(1, abs=1e-3)
    half = np.load(scope / "rows.npy")[3:]
    scores = bj.evaluation.evaluate_sae(lm, sae, half)
    assert found["layer_scores"]["all features"]["loss_recovered"] == pytest.approx(scores.loss_recovered, abs=1e-4)
    text = trace.text(found)
    assert f"sums of {product.inputs_read} features of 2-mlp-in-x4-k20" in text and "control: a random" in text


def test_a_dictionary_that_is_not_readable_is_refused(tmp_path):
    words = ["--layer", LAYER, "--feature", FEATURE, "--out-sae", "tag=no"]
    refused("trace", "--readable", *words, cwd=tmp_path, status=1, message="no")
