"""How often a feature still fires once the directions of its explanation are taken out of the MLP's input.

    x'  =  x - P x          P: the projection on the first n vectors of the explanation, without a constant input

At the tokens where the feature fires, the MLP is run on x' and its output, or x' itself for a transcoder, is encoded
again. If an explanation holds what makes the feature fire, few firings are left. The control takes out as many random
directions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.explain.samples import Layer, Samples
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.transformer import MLP, run_module

MOST = 64
"""Firings of a feature at which it is tried, evenly over the tokens."""


def firings_left(
    layer: Layer,
    samples: Samples,
    features: Int[np.ndarray, " U"],
    fired: Bool[np.ndarray, "U tokens"],
    vectors: Float[Array, "U k in"],
    numbers: tuple[int, ...],
) -> Float[np.ndarray, "U numbers"]:
    """The share of its firings at which each feature still fires; nan if it never fires.

    Args:
        layer: with an SAE, or a transcoder.
        samples, fired: the tokens, and where each feature fires.
        vectors: of the explanation of each feature, the first ones first.
        numbers: how many of them are taken out.
    """
    sae = layer.sae
    assert sae is not None
    d_model = layer.lm.config.d_model
    mlp = {name: weight[layer.layer] for name, weight in layer.lm.params["layers"]["mlp"].items()}
    x, counted = np.zeros((len(features), MOST, d_model), np.float32), np.zeros((len(features), MOST), bool)
    for row in range(len(features)):
        places = np.flatnonzero(fired[row])
        places = places[np.linspace(0, len(places) - 1, min(len(places), MOST)).astype(int)]
        x[row, : len(places)], counted[row, : len(places)] = samples.x[places, :d_model], True
    module, arrays = MLP(layer.lm.config), (jnp.asarray(features), jnp.asarray(x), vectors[..., :d_model])
    still = np.asarray(_still(module, mlp, sae, *arrays, numbers))
    number = counted.sum(axis=-1, keepdims=True)
    return np.where(number > 0, np.sum(still & counted[:, None], axis=-1) / np.maximum(number, 1), np.nan)


@functools.partial(jax.jit, static_argnames=("module", "numbers"))
def _still(module: MLP, mlp, sae: SAE, features, x, vectors, numbers: tuple[int, ...]) -> Bool[Array, "U numbers most"]:
    """Whether each feature still fires at each token with the first vectors taken out."""

    def feature(one):
        feature, x, vectors = one
        with jax.default_matmul_precision("highest"):
            span = jnp.linalg.qr(vectors.T)[0]
            parts = x @ span
            left = jnp.stack([x - parts[:, :n] @ span[:, :n].T for n in numbers])
            read = left if sae.config.target is not None else run_module(module, mlp, left)
        return sae.encode(read, sparse=True).fires(feature)

    return jax.lax.map(feature, (features, x, vectors))
