"""A tracer through a bilinear transcoder: its matrices, spectra and interactions against its pre-activations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilinear_jax as bj
from bilinear_jax.explain.transcoders import transcoder_tensor
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.tensor import with_constant

D = 8
OPTIONS = {
    "plain": {},
    "bias": {"product_bias": True},
    "linear": {"product_bias": True, "linear_term": True},
    "all": {"product_bias": True, "linear_term": True, "encoder_bias": True},
}


def transcoder(**options) -> SAE:
    config = SAEConfig("mlp_in", 1, D, 3, 4, bilinear_encoder=True, target="mlp_out", **options)
    params = SAE.init(config, jax.random.key(0)).params
    keys = jax.random.split(jax.random.key(1), len(params))
    return SAE({n: v + jax.random.normal(k, v.shape) for k, (n, v) in zip(keys, params.items(), strict=True)}, config)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A gated model: its MLP is no tensor."""
    sizes = dict(n_layer=2, n_head=2, d_model=D, d_hidden=16, n_ctx=6, n_vocab=10)
    return LanguageModel.init(TransformerConfig(**sizes, gate="silu"), jax.random.key(0))


@pytest.fixture(scope="module")
def inp() -> SAE:
    return SAE.init(SAEConfig("mlp_in", 1, D, 2, 3), jax.random.key(3))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_tensor_gives_the_preactivations(options):
    sae, x = transcoder(**options), jax.random.normal(jax.random.key(2), (5, D))
    tensor = transcoder_tensor(sae)
    extended = with_constant(x) if tensor.n_in > D else x
    offset = sae.params["b_z"][None] if "b_z" in sae.params else 0.0
    np.testing.assert_allclose(tensor.apply(extended) + offset, sae.preactivations(x), rtol=1e-4, atol=1e-4)


def test_each_feature_has_the_two_eigenvalues_of_its_formula(lm, inp):
    sae = transcoder(product_bias=True)
    tracer = bj.Tracer(lm, 1, inp=inp, out=sae)
    a, b = np.split(np.asarray(sae.params["w_enc"]), 2)
    dot, lengths = np.sum(a * b, axis=1), np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    values = np.linalg.eigvalsh(np.asarray(tracer.q(slice(None))))
    np.testing.assert_allclose(values[:, -1], (dot + lengths) / 2, rtol=1e-4)
    np.testing.assert_allclose(values[:, 0], (dot - lengths) / 2, rtol=1e-4)
    np.testing.assert_allclose(values[:, 1:-1], 0, atol=1e-4)
    top = tracer.top_eigh(k=2)
    np.testing.assert_allclose(np.sort(top.values, axis=1), values[:, [0, -1]], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(top.explained, 1, atol=1e-4)
    assert tracer.r2([0, 5]).tolist() == [1, 1] and tracer.out is sae and tracer.n_features == 24


def test_interactions_in_the_basis_of_an_input_sae(lm, inp):
    sae = transcoder()
    tracer = bj.Tracer(lm, 1, inp=inp, out=sae)
    a, b = (np.asarray(rows) @ np.asarray(inp.decoder) for rows in jnp.split(sae.params["w_enc"], 2))
    expected = (np.einsum("ui,uj->uij", a, b) + np.einsum("ui,uj->uji", a, b)) / 2
    np.testing.assert_allclose(tracer.q([2, 7], project=True), expected[[2, 7]], rtol=1e-4, atol=1e-5)
    found = tracer.top_interactions(n=4)
    upper = np.triu(np.ones(expected.shape[1:]))
    np.testing.assert_allclose(
        np.sort(np.abs(found.value)), np.sort(np.abs(expected * upper).reshape(-1))[-4:], rtol=1e-4
    )


def test_before_the_norm_the_gain_is_in_the_tensor():
    sizes = dict(n_layer=2, n_head=2, d_model=D, d_hidden=16, n_ctx=6, n_vocab=10)
    lm = LanguageModel.init(TransformerConfig(**sizes, gains=True), jax.random.key(0))
    gain = jnp.linspace(0.5, 2, D)
    lm.params["layers"]["mlp_gain"] = lm.params["layers"]["mlp_gain"].at[1].set(gain)
    inp = SAE.init(SAEConfig("resid_mid", 1, D, 2, 3), jax.random.key(3))
    sae, x = transcoder(), jax.random.normal(jax.random.key(2), (5, D))
    tracer = bj.Tracer(lm, 1, inp=inp, out=sae)
    np.testing.assert_allclose(tracer.tensor.apply(x), sae.preactivations(x * gain[None]), rtol=1e-4, atol=1e-5)


def test_what_a_transcoder_cannot_stand_for_is_named(lm, inp):
    sae = transcoder()

    def changed(**change) -> SAE:
        return SAE(sae.params, dataclasses.replace(sae.config, **change))

    with pytest.raises(ValueError, match=r"is the transcoder 1-mlp-in-.*, but it is of layer 1, but layer 0"):
        bj.Tracer(lm, 0, inp=inp, out=sae)
    with pytest.raises(ValueError, match="but its encoder is linear, so that its features are not products"):
        bj.Tracer(lm, 1, inp=inp, out=changed(bilinear_encoder=False))
    with pytest.raises(ValueError, match="but it reads resid_mid, and must read mlp_in"):
        bj.Tracer(lm, 1, inp=inp, out=changed(site="resid_mid"))
    with pytest.raises(ValueError, match="inp is 1-mlp-in-to-mlp-out-x3-k4, a transcoder, but a tracer needs an SAE"):
        bj.Tracer(lm, 1, inp=sae, out=sae)
    with pytest.raises(ValueError, match=r"has the transcoder .* as out, but this needs an SAE of mlp_out"):
        bj.account(bj.Tracer(lm, 1, inp=inp, out=sae), jnp.zeros((1, 4), int), 3)
