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

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilinear_jax.facade import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A public name, from ``facade``. JAX is imported when the first is asked for: a command's help needs none."""
    import importlib

    if not name.startswith("__") or name == "__all__":
        facade = importlib.import_module("bilinear_jax.facade")
        found = vars(facade) if name in vars(facade) else globals()  # modules that it has imported are here by now
        if name in found:
            return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
