"""Every public name of ``bilinear_jax``, listed once; ``import bilinear_jax`` imports this when it is first needed."""

from bilinear_jax import images
from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain import cp, interactions, products, similarity, spectra
from bilinear_jax.explain.account import account
from bilinear_jax.explain.directions import Directions
from bilinear_jax.explain.hosvd import hosvd
from bilinear_jax.explain.logits import logit_effects
from bilinear_jax.explain.scan import scan
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.images.data import load_images
from bilinear_jax.images.tensor import image_tensor, load_image_model, pixel_eigenvectors
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.measure import evaluation
from bilinear_jax.measure.activations import top_activations
from bilinear_jax.measure.bilinear_form import BilinearForm, bilinear_form
from bilinear_jax.measure.cofiring import co_firing, strongest_pairs
from bilinear_jax.measure.correlation import low_rank_correlation
from bilinear_jax.measure.evaluation import evaluate_saes
from bilinear_jax.measure.interventions import ablate_pairs, steer
from bilinear_jax.measure.pairs import pair_summaries
from bilinear_jax.measure.saebench import saebench_adapter
from bilinear_jax.measure.squares import intervene_on_squares
from bilinear_jax.nn.activations import SparseCodes
from bilinear_jax.nn.image import ImageClassifier, ImageConfig
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.toy import ToyConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.show import figures
from bilinear_jax.show.visualizer import Visualizer
from bilinear_jax.store.checkpoint import load_sae, save_model, save_sae, training_of
from bilinear_jax.store.convert import convert, export
from bilinear_jax.store.datasets import load_corpus, load_token_rows
from bilinear_jax.store.dictionaries import load_dictionaries, load_dictionary
from bilinear_jax.store.sources import list_saes
from bilinear_jax.store.upload import upload
from bilinear_jax.tensor import BilinearTensor
from bilinear_jax.training.images import ImageRecipe, train_images
from bilinear_jax.training.runs import train_language, train_saes

__all__ = [
    "SAE",
    "BilinearForm",
    "BilinearTensor",
    "Directions",
    "ImageClassifier",
    "ImageConfig",
    "ImageRecipe",
    "LanguageModel",
    "SAEConfig",
    "SparseCodes",
    "ToyConfig",
    "Tracer",
    "TransformerConfig",
    "UnknownNameError",
    "Visualizer",
    "ablate_pairs",
    "account",
    "bilinear_form",
    "co_firing",
    "convert",
    "cp",
    "evaluate_saes",
    "evaluation",
    "export",
    "figures",
    "hosvd",
    "image_tensor",
    "images",
    "interactions",
    "intervene_on_squares",
    "list_saes",
    "load",
    "load_corpus",
    "load_dictionaries",
    "load_dictionary",
    "load_image_model",
    "load_images",
    "load_sae",
    "load_token_rows",
    "logit_effects",
    "low_rank_correlation",
    "pair_summaries",
    "pixel_eigenvectors",
    "products",
    "saebench_adapter",
    "save_model",
    "save_sae",
    "scan",
    "similarity",
    "spectra",
    "steer",
    "strongest_pairs",
    "top_activations",
    "train_images",
    "train_language",
    "train_saes",
    "training_of",
    "upload",
]
