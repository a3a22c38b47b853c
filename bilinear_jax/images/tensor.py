"""Image classifiers as tensors, and the eigenvectors of their classes as images.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 4.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain.spectra import Spectrum, eigh
from bilinear_jax.nn.image import ImageConfig
from bilinear_jax.tensor import BilinearTensor
from weights_convert.image import read_image_model

BASES = ("hidden", "pixels")


class ImageModel(NamedTuple):
    """An image classifier that was loaded."""

    config: ImageConfig
    params: PyTree  # as in ``nn.image.ImageClassifier``


class PixelEigenvectors(NamedTuple):
    """What each class looks for."""

    spectrum: Spectrum  # [classes, d_hidden] eigenvalues, the most negative first, and their eigenvectors
    images: Float[Array, "classes rank n_inputs"]  # the eigenvectors as images, in the same order


def load_image_model(path: str | Path, *, residual: bool | None = None) -> ImageModel:
    """Load the config and params of an image classifier: what torch saved, or safetensors with the same names.

    A torch file may hold a state dict or a whole model, also inside the dict of a training run; names may have the
    prefixes of torch.compile and DataParallel. torch is not needed, and nothing in the file is executed (see
    ``weights_convert.pickled``).

    Args:
        path: the file. A safetensors file has a name that ends in ``.safetensors``.
        residual: whether each layer adds its output to its input; the weights do not show this. None: what the file's
            config says; False if it has none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds another kind of model, or holds several and does not say which is
            meant.
    """
    config, params = read_image_model(path, residual=residual)
    return ImageModel(ImageConfig(**config), jax.tree.map(jnp.asarray, params))


def image_tensor(
    config: ImageConfig, params: PyTree, layer: int = -1, basis: str = "hidden", *, residual: bool = False
) -> BilinearTensor:
    """One bilinear layer of a classifier as a ``BilinearTensor``. The last layer includes the head.

        last layer:      logits_c = h^T Q_c h     what the layer adds to each class; h: its input
        another layer:   its output [d_hidden], as a function of its input

    The tensor leaves out all other layers. In a model with a residual it also leaves out the path around the layer,
    which is linear in h, unless ``residual`` is set. A model of one layer without a residual is complete: ``apply``
    gives its logits.

    Args:
        config, params: the classifier.
        layer: which bilinear layer; 0 is the first, -1 the last.
        basis: the inputs of the tensor: "hidden" (the layer's own inputs ``[d_hidden]``) or "pixels" ``[n_inputs]``.
            Only the first layer is of degree 2 in the pixels.
        residual: add the path around the layer, as interactions with a constant input; this is exact. The tensor then
            has one more input, the last, which is always 1 (``tensor.with_constant``), as with biases.

    Raises:
        ValueError: for an unknown basis; for pixels with another layer than the first; for ``residual`` if the model
            has none; or for params that do not fit the config.
        UnknownNameError: if there is no such layer.

    Example:
        >>> from bilinear_jax.nn.image import ImageClassifier
        >>> config = ImageConfig(n_inputs=4, d_hidden=3, n_classes=2)
        >>> x = jnp.array([0.0, 0.5, 1.0, 0.2])
        >>> params = ImageClassifier(config).init(jax.random.key(0), x)["params"]
        >>> tensor = image_tensor(config, params, basis="pixels")
        >>> bool(jnp.allclose(tensor.apply(x), ImageClassifier(config).apply({"params": params}, x), atol=1e-6))
        True
    """
    if basis not in BASES:
        raise ValueError(f"basis must be one of {', '.join(map(repr, BASES))}, got {basis!r}")
    if not -config.n_layer <= layer < config.n_layer:
        raise UnknownNameError("layer", layer, range(-config.n_layer, config.n_layer), of="this classifier")
    layer %= config.n_layer
    if basis == "pixels" and layer:
        raise ValueError(f"layer {layer} has a higher degree than 2 in the pixels: pass basis='hidden', or layer=0")
    if residual and not config.residual:
        raise ValueError("this model has no residual: leave residual=False")
    sizes = [tuple(params[name].shape) for name in ("w_e", "w_u")]
    if sizes != [(config.d_hidden, config.n_inputs), (config.n_classes, config.d_hidden)]:
        raise ValueError(f"w_e and w_u have shapes {sizes}, which do not fit {config}: give the config of these params")
    part = {name: weight[layer] for name, weight in params["layers"].items()}
    left, right = part["w_l"], part["w_r"]
    b_left, b_right = part.get("b_l"), part.get("b_r")
    down = params["w_u"] if layer == config.n_layer - 1 else jnp.eye(config.d_hidden, dtype=left.dtype)
    if residual:  # one more hidden unit h_i * 1 for each h_i
        identity, nothing = jnp.eye(config.d_hidden, dtype=left.dtype), jnp.zeros(config.d_hidden, left.dtype)
        b_left, b_right = (nothing if bias is None else bias for bias in (b_left, b_right))
        left, right = jnp.concatenate([left, identity]), jnp.concatenate([right, jnp.zeros_like(identity)])
        b_left, b_right = jnp.concatenate([b_left, nothing]), jnp.concatenate([b_right, jnp.ones_like(nothing)])
        down = jnp.concatenate([down, down], axis=1)
    tensor = BilinearTensor.from_mlp(left, right, down, b_left, b_right)
    if basis == "hidden":
        return tensor
    embed = params["w_e"]
    if tensor.n_in > config.d_hidden:  # the embedding leaves the constant input as it is
        embed = jnp.pad(embed, ((0, 1), (0, 1))).at[-1, -1].set(1)
    return tensor.in_basis(embed)


def pixel_eigenvectors(config: ImageConfig, params: PyTree) -> PixelEigenvectors:
    """The eigenpairs of every class in the first layer's hidden basis, and their eigenvectors as images.

        Q_c = sum_r l_r v_r v_r^T      logit_c = sum_r l_r (v_r . W_e x)^2 = sum_r l_r (p_r . x)^2      p_r = W_e^T v_r

    So the overlap of x with the image p_r, positive or negative, contributes to the logit. The v_r are orthonormal, the
    p_r are not. (The eigenvectors of ``basis="pixels"`` are orthonormal in pixels, but there are more of them, with
    eigenvalues of zero.)

    Raises:
        ValueError: for more than one layer (logits are then of a higher degree) or with biases (v has one more
            coordinate than the embedding has rows). Use ``image_tensor`` and ``spectra.eigh`` for these.

    Example:
        >>> from bilinear_jax.nn.image import ImageClassifier
        >>> config = ImageConfig(n_inputs=4, d_hidden=3, n_classes=2)
        >>> params = ImageClassifier(config).init(jax.random.key(0), jnp.ones(4))["params"]
        >>> spectrum, images = pixel_eigenvectors(config, params)
        >>> spectrum.values.shape, images.shape
        ((2, 3), (2, 3, 4))
    """
    if config.n_layer > 1 or config.bias:
        raise ValueError(
            "pixel_eigenvectors needs a model of one bilinear layer without biases: use image_tensor and spectra.eigh "
            "for this one"
        )
    tensor = image_tensor(config, params)
    spectrum = eigh(tensor, jnp.eye(config.n_classes, dtype=tensor.down.dtype))
    with jax.default_matmul_precision("highest"):
        images = jnp.einsum("cri,ip->crp", jnp.swapaxes(spectrum.vectors, 1, 2), params["w_e"])
    return PixelEigenvectors(spectrum, images)
