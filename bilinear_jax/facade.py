"""Every public name of ``bilinear_jax``, listed once; ``import bilinear_jax`` imports this when it is first needed."""

from bilinear_jax import (
    attribution,
    checkpoint,
    cofiring,
    decompose,
    evaluation,
    figures,
    generation,
    interactions,
    interventions,
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
    "interventions",
    "load",
    "load_sae",
    "logit_effects",
    "low_rank_correlation",
    "spectra",
    "summaries",
    "top_activations",
]
