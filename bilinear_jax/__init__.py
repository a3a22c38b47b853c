"""bilinear_jax: read what a bilinear network computes from its weights.

A bilinear layer ``y = down ((left x) * (right x))`` is a third-order tensor. Every output direction u has an
interaction matrix ``Q_u`` with ``u . y = x^T Q_u x``. Its eigenvectors are the inputs that the direction responds to.
In the basis of a sparse autoencoder (SAE), its entries say which input features make which output features.

Axis names, in every signature:

    batch, seq       sequences and token positions
    rows             sequences of a token dataset
    d_model          width of the residual stream
    d_hidden         hidden units of an MLP
    d_head, n_head   width and number of attention heads; n_kv_head of them have their own keys and values
    n_layer          layers; the first axis of every array under params["layers"]
    n_vocab          tokens of the vocabulary
    features, k      features of an SAE, and how many are active at a token
    out, hidden, in  the axes of a BilinearTensor's factors
    U                the output directions of one call
    rank             min(in, new) of a basis: at most this many eigenvalues of basis^T Q basis are not zero
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilinear_jax.facade import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A public name, from ``facade``, imported when it is first used. So the help of a command does not import JAX."""
    import importlib

    if not name.startswith("__") or name == "__all__":
        facade = importlib.import_module("bilinear_jax.facade")
        # Importing the facade has also put the subpackages into globals().
        found = vars(facade) if name in vars(facade) else globals()
        if name in found:
            return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
