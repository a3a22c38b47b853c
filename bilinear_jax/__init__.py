"""bilinear_jax: read what a bilinear network computes from its weights.

A bilinear layer ``y = down ((left x) * (right x))`` is a third-order tensor. For every output direction u there is
an interaction matrix ``Q_u`` with ``u . y = x^T Q_u x``; its eigenvectors say which inputs the direction looks for, and
in the basis of a sparse autoencoder (SAE) its entries say which features make which features.

Axis names, in every signature:

    batch, seq       sequences and token positions
    rows             sequences of a token dataset
    d_model          width of the residual stream
    d_hidden         hidden units of an MLP
    d_head, n_head   width and number of attention heads
    n_layer          layers; the first axis of everything under params["layers"]
    n_vocab          tokens of the vocabulary
    features, k      features of an SAE, and how many are active at a token
    out, hidden, in  the axes of a BilinearTensor's factors
    U                output directions asked about at once
    rank             min(in, new) of a basis: as many eigenvalues of basis^T Q basis can differ from zero
"""

from bilinear_jax import (
    attribution,
    checkpoint,
    cofiring,
    decompose,
    evaluation,
    figures,
    generation,
    interactions,
    spectra,
    summaries,
)
from bilinear_jax.activations import top_activations
from bilinear_jax.checkpoint import load_sae
from bilinear_jax.correlation import low_rank_correlation
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.nn.sae import SAE, SAEConfig, SparseCodes
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.tensor import BilinearTensor
from bilinear_jax.tracer import Tracer
from bilinear_jax.visualizer import Visualizer, logit_effects

__all__ = [
    "SAE",
    "BilinearTensor",
    "LanguageModel",
    "SAEConfig",
    "SparseCodes",
    "Tracer",
    "TransformerConfig",
    "Visualizer",
    "attribution",
    "checkpoint",
    "cofiring",
    "decompose",
    "evaluation",
    "figures",
    "generation",
    "interactions",
    "load",
    "load_sae",
    "logit_effects",
    "low_rank_correlation",
    "spectra",
    "summaries",
    "top_activations",
]
