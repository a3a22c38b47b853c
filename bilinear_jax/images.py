"""Image classifiers seen through their weights: as tensors, and their eigenvectors as images.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 4.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilinear_jax.nn.image import ImageConfig
from bilinear_jax.spectra import Spectrum, eigh
from bilinear_jax.tensor import BilinearTensor
from weights_convert.image import read_image_model

BASES = ("hidden", "pixels")


def load_image_model(path: str | Path, *, residual: bool | None = None) -> tuple[ImageConfig, PyTree]:
    """The config and params of an image classifier that torch saved, as a state dict or whole; torch isn't needed.

    Nothing in the file is run, whatever it names (``weights_convert.pickled``).

    Args:
        residual: whether each layer adds to its input, which weights don't tell. None: what the file's config says,
            if it has one, and else no residual.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a damaged file, or one of another kind of model.
    """
    config, params = read_image_model(path, residual=residual)
    return ImageConfig(**config), jax.tree.map(jnp.asarray, params)


def image_tensor(
    config: ImageConfig, params: PyTree, layer: int = -1, basis: str = "hidden", *, residual: bool = False
) -> BilinearTensor:
    """One bilinear layer of a classifier as a ``BilinearTensor``; the last one with the head behind it.

        last layer:      logits_c = h^T Q_c h     what the layer adds to each class, h its input
        another layer:   its own output, [d_hidden] of them, of its input

    What it leaves out: the layers before and behind it; and in a model with a residual, unless ``residual`` is set, the
    path around the layer, which is linear in h. For one layer without a residual it leaves out nothing: ``apply`` gives
    the logits of the model.

    Args:
        layer: which bilinear layer, from 0 or, if negative, from the last.
        basis: the inputs of the tensor: "hidden", the layer's own inputs ``[d_hidden]``, or "pixels" ``[n_inputs]``,
            which only the first layer is a function of degree 2 of.
        residual: add the path around the layer, as interactions with a constant input: exact as well. The tensor then
            has one more input, the last one, which is always 1 (``tensor.with_constant``), as it has with biases.

    Raises:
        ValueError: for an unknown basis, pixels of another layer than the first, ``residual`` where the model has none,
            params of another config.
        IndexError: if there is no such layer.

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
        raise ValueError(f"basis is one of {', '.join(map(repr, BASES))}; got {basis!r}")
    if not -config.n_layer <= layer < config.n_layer:
        raise IndexError(f"layer must lie in 0 ... {config.n_layer - 1}, or count from the last; got {layer}")
    layer %= config.n_layer
    if basis == "pixels" and layer:
        raise ValueError(f"layer {layer} is of a higher degree than 2 in the pixels: take basis='hidden', or layer 0")
    if residual and not config.residual:
        raise ValueError("this model has no residual: leave residual out")
    sizes = [tuple(params[name].shape) for name in ("w_e", "w_u")]
    if sizes != [(config.d_hidden, config.n_inputs), (config.n_classes, config.d_hidden)]:
        raise ValueError(
            f"w_e and w_u have shapes {sizes}, which are not those of {config}: give the params' own config"
        )
    part = {name: weight[layer] for name, weight in params["layers"].items()}
    left, right = part["w_l"], part["w_r"]
    b_left, b_right = part.get("b_l"), part.get("b_r")
    down = params["w_u"] if layer == config.n_layer - 1 else jnp.eye(config.d_hidden, dtype=left.dtype)
    if residual:  # one more hidden unit for each h_i: h_i * 1
        identity, nothing = jnp.eye(config.d_hidden, dtype=left.dtype), jnp.zeros(config.d_hidden, left.dtype)
        b_left, b_right = (nothing if bias is None else bias for bias in (b_left, b_right))
        left, right = jnp.concatenate([left, identity]), jnp.concatenate([right, jnp.zeros_like(identity)])
        b_left, b_right = jnp.concatenate([b_left, nothing]), jnp.concatenate([b_right, jnp.ones_like(nothing)])
        down = jnp.concatenate([down, down], axis=1)
    tensor = BilinearTensor.from_mlp(left, right, down, b_left, b_right)
    if basis == "hidden":
        return tensor
    embed = params["w_e"]
    if tensor.n_in > config.d_hidden:  # the constant input stays itself
        embed = jnp.pad(embed, ((0, 1), (0, 1))).at[-1, -1].set(1)
    return tensor.in_basis(embed)


def pixel_eigenvectors(config: ImageConfig, params: PyTree) -> tuple[Spectrum, Float[Array, "classes rank n_inputs"]]:
    """The eigenpairs of every class in the first layer's hidden basis, and their eigenvectors as images.

        Q_c = sum_r l_r v_r v_r^T      logit_c = sum_r l_r (v_r . W_e x)^2 = sum_r l_r (p_r . x)^2      p_r = W_e^T v_r

    so p_r is the image whose likeness in x, positive or negative, counts. The v_r are orthonormal; the p_r aren't.
    (Eigenvectors of ``basis="pixels"`` are orthonormal in pixels instead, and there are more of them, beside zeros.)

    Returns:
        The spectrum, ``[classes, d_hidden]`` eigenvalues, the most negative first; and p, in the same order.

    Raises:
        ValueError: for more than one layer, where classes are of a higher degree, or with biases, where v has one more
            coordinate than the embedding has rows: use ``image_tensor`` and ``spectra.eigh``.

    Example:
        >>> from bilinear_jax.nn.image import ImageClassifier
        >>> config = ImageConfig(n_inputs=4, d_hidden=3, n_classes=2)
        >>> params = ImageClassifier(config).init(jax.random.key(0), jnp.ones(4))["params"]
        >>> spectrum, images = pixel_eigenvectors(config, params)
        >>> spectrum.values.shape, images.shape
        ((2, 3), (2, 3, 4))
    """
    if config.n_layer > 1 or config.bias:
        raise ValueError("this takes one bilinear layer without biases: use image_tensor and spectra.eigh")
    tensor = image_tensor(config, params)
    spectrum = eigh(tensor, jnp.eye(config.n_classes, dtype=tensor.down.dtype))
    with jax.default_matmul_precision("highest"):
        return spectrum, jnp.einsum("cri,ip->crp", jnp.swapaxes(spectrum.vectors, 1, 2), params["w_e"])
