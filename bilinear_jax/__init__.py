"""bilinear_jax: read what a bilinear network computes from its weights.

A bilinear layer ``y = down ((left x) * (right x))`` is a third-order tensor. For every output direction u there is
an interaction matrix ``Q_u`` with ``u . y = x^T Q_u x``; its eigenvectors say which inputs the direction looks for, and
in the basis of a sparse autoencoder (SAE) its entries say which features make which features.

Axis names, in every signature:

    batch, seq      sequences and token positions
    d_model         width of the residual stream
    d_hidden        hidden units of an MLP
    d_head, n_head  width and number of attention heads
    n_layer         layers; the first axis of everything under params["layers"]
    n_vocab         tokens of the vocabulary
    features, k     features of an SAE, and how many are active at a token
    out, hidden, in the three axes of a BilinearTensor's factors
    U               output directions asked about at once
"""

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "BilinearTensor": "bilinear_jax.tensor",
    "LanguageModel": "bilinear_jax.language",
    "SAE": "bilinear_jax.nn.sae",
    "SAEConfig": "bilinear_jax.nn.sae",
    "SparseCodes": "bilinear_jax.nn.sae",
    "Tracer": "bilinear_jax.tracer",
    "TransformerConfig": "bilinear_jax.nn.transformer",
    "Visualizer": "bilinear_jax.visualizer",
    "load": "bilinear_jax.language",
    "load_sae": "bilinear_jax.checkpoint",
}
_MODULES = ("checkpoint", "figures", "generation", "spectra", "visualizer")

__all__ = sorted([*_PUBLIC, *_MODULES])

if TYPE_CHECKING:
    from bilinear_jax import checkpoint, figures, generation, spectra, visualizer
    from bilinear_jax.checkpoint import load_sae
    from bilinear_jax.language import LanguageModel, load
    from bilinear_jax.nn.sae import SAE, SAEConfig, SparseCodes
    from bilinear_jax.nn.transformer import TransformerConfig
    from bilinear_jax.tensor import BilinearTensor
    from bilinear_jax.tracer import Tracer
    from bilinear_jax.visualizer import Visualizer


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"bilinear_jax.{name}")
    raise AttributeError(f"module 'bilinear_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
