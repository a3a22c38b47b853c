"""Every public name of ``bilinear_jax``, listed once; ``import bilinear_jax`` imports this when it is first needed."""

from bilinear_jax import (
    attribution,
    checkpoint,
    cofiring,
    cp,
    decompose,
    evaluation,
    figures,
    generation,
    image_analyses,
    image_figures,
    images,
    interactions,
    interventions,
    similarity,
    spectra,
    summaries,
)
from bilinear_jax.activations import top_activations
from bilinear_jax.checkpoint import load_sae
from bilinear_jax.correlation import low_rank_correlation
from bilinear_jax.datasets import load_token_rows
from bilinear_jax.images import image_tensor, load_image_model, pixel_eigenvectors
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.nn.image import ImageClassifier, ImageConfig
from bilinear_jax.nn.sae import SAE, SAEConfig, SparseCodes
from bilinear_jax.nn.toy import ToyConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.sources import list_saes
from bilinear_jax.tensor import BilinearTensor
from bilinear_jax.tracer import Tracer
from bilinear_jax.training.image_data import load_images
from bilinear_jax.visualizer import Visualizer, logit_effects

__all__ = [
    "SAE",
    "BilinearTensor",
    "ImageClassifier",
    "ImageConfig",
    "LanguageModel",
    "SAEConfig",
    "SparseCodes",
    "ToyConfig",
    "Tracer",
    "TransformerConfig",
    "Visualizer",
    "attribution",
    "checkpoint",
    "cofiring",
    "cp",
    "decompose",
    "evaluation",
    "figures",
    "generation",
    "image_analyses",
    "image_figures",
    "image_tensor",
    "images",
    "interactions",
    "interventions",
    "list_saes",
    "load",
    "load_image_model",
    "load_images",
    "load_sae",
    "load_token_rows",
    "logit_effects",
    "low_rank_correlation",
    "pixel_eigenvectors",
    "similarity",
    "spectra",
    "summaries",
    "top_activations",
]
