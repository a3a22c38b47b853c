"""Image classifiers with bilinear layers: config and Flax module.

    h_0     = W_e x                                      embed
    h_{n+1} = (W_l h_n + b_l) * (W_r h_n + b_r)          one bilinear layer, and + h_n with a residual
    logits  = W_u h_n                                    head

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 4.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Shaped

from bilinear_jax.nn.attention import linear
from bilinear_jax.nn.configs import check_plain, check_sizes, check_types


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """The shape of an image classifier; hashable, so it can be a static argument of ``jit``."""

    n_inputs: int = 784  # pixels of an image
    d_hidden: int = 256  # width of the embedding and of every bilinear layer
    n_classes: int = 10
    n_layer: int = 1  # bilinear layers
    bias: bool = False  # b_l and b_r in the bilinear layers; the embedding and the head have none
    residual: bool = False  # add each bilinear layer's output to its input

    def __post_init__(self):
        check_types(self)
        check_sizes(self, "n_inputs", "d_hidden", "n_classes", "n_layer")


class ImageClassifier(nn.Module):
    """The classifier as a Flax module: images ``[..., n_inputs]`` to logits ``[..., n_classes]``.

    The images are read by ``unit_range``: bytes, integers, booleans and 16-bit numbers give the logits of the same
    numbers in float32. Pixels may leave 0 ... 1 here, as with noise or a mask.

    Params: ``w_e [d_hidden, n_inputs]``; ``layers`` with ``w_l, w_r [n_layer, d_hidden, d_hidden]`` and, with a bias,
    ``b_l, b_r [n_layer, d_hidden]``; ``w_u [n_classes, d_hidden]``. They are initialised as torch's linear layers are:
    uniform within ``1 / sqrt(inputs of the layer)``.

    Example:
        >>> import jax
        >>> config = ImageConfig(n_inputs=4, d_hidden=3, n_classes=2)
        >>> params = ImageClassifier(config).init(jax.random.key(0), jnp.ones(4))["params"]
        >>> ImageClassifier(config).apply({"params": params}, jnp.ones((5, 4))).shape
        (5, 2)
    """

    config: ImageConfig
    linear: Callable[..., Array] = linear  # computes weight x + bias from x, weight, bias

    def setup(self):
        c = self.config
        self.w_e = self.param("w_e", _uniform(c.n_inputs), (c.d_hidden, c.n_inputs))
        self.layers = _Layers(c, self.linear)
        self.w_u = self.param("w_u", _uniform(c.d_hidden), (c.n_classes, c.d_hidden))

    def __call__(self, x: Shaped[Array | np.ndarray, "*batch n_inputs"]) -> Float[Array, "*batch n_classes"]:
        if x.shape[-1] != self.config.n_inputs:
            raise ValueError(f"images have shape {x.shape}, but their last axis must be {self.config.n_inputs} pixels")
        return self.linear(self.layers(self.linear(unit_range(x), self.w_e)), self.w_u)


class _Layers(nn.Module):
    """All bilinear layers, with stacked parameters."""

    config: ImageConfig
    linear: Callable[..., Array]

    @nn.compact
    def __call__(self, h: Float[Array, "*batch d_hidden"]) -> Float[Array, "*batch d_hidden"]:
        c = self.config
        w_l, w_r = (self.param(n, _uniform(c.d_hidden), (c.n_layer, c.d_hidden, c.d_hidden)) for n in ("w_l", "w_r"))
        b_l = b_r = [None] * c.n_layer
        if c.bias:
            b_l, b_r = (self.param(n, _uniform(c.d_hidden), (c.n_layer, c.d_hidden)) for n in ("b_l", "b_r"))
        for n in range(c.n_layer):
            product = self.linear(h, w_l[n], b_l[n]) * self.linear(h, w_r[n], b_r[n])
            h = h + product if c.residual else product
        return h


def check_labelled(config: ImageConfig, images: Any, labels: Any) -> tuple[Array, Int[Array, " n"]]:
    """A dataset as all functions take it: images as ``check_pixels`` gives them, and labels as ``check_labels`` does.

    Raises:
        ValueError: unless images are ``[n, n_inputs]``, with n at least 1, and labels ``[n]``, or as those functions.
    """
    images, labels = _array(images), _array(labels)
    if images.ndim != 2 or images.shape[1] != config.n_inputs or not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images {images.shape} and labels {labels.shape} must have shapes [n, {config.n_inputs}] and [n], n >= 1"
        )
    return check_pixels(images), check_labels(labels, config.n_classes)


def check_pixels(images: Any) -> Array:
    """Images as an array of bytes in 0 ... 255, if they are bytes, and of floating point in 0 ... 1, if they are not.

    Integers that are not bytes, booleans and 16-bit numbers become float32. Inside ``jit`` only the dtype is checked.

    Raises:
        ValueError: if a pixel that is not a byte lies outside 0 ... 1, or if pixels are not real numbers.

    Example:
        >>> check_pixels([True, False]).tolist(), check_pixels(np.array([0, 255], np.uint8)).tolist()
        ([1.0, 0.0], [0, 255])
    """
    images = _array(images)
    if images.dtype == np.uint8:
        return jnp.asarray(images)
    scaled = unit_range(images)
    if images.size and not isinstance(images, Tracer):
        low, high = float(scaled.min()), float(scaled.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"pixels must lie in 0 ... 1, got {low:g} ... {high:g}: divide them, or give uint8 in 0 ... 255"
            )
    return scaled


def check_labels(labels: Any, n_classes: int) -> Int[Array, "..."]:
    """Labels as int32. Inside ``jit`` only the dtype is checked.

    Raises:
        ValueError: if labels are not integers, or if one lies outside 0 ... n_classes - 1.
    """
    labels = _array(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be ints, one per image; got {labels.dtype} {list(labels.shape)}")
    if labels.size and not isinstance(labels, Tracer):
        low, high = int(labels.min()), int(labels.max())
        if not 0 <= low <= high < n_classes:
            raise ValueError(f"labels must lie in 0 ... {n_classes - 1}, got {low} ... {high}")
    return jnp.asarray(labels.astype(np.int32))


def unit_range(images: Any) -> Float[Array, "..."]:
    """Pixels as the classifier reads them: bytes of 0 ... 255 are divided by 255; all else keeps its value.

    The result is float32, or float64 where images are and JAX has it. No range is checked (see ``check_pixels``).

    Raises:
        ValueError: if pixels are not real numbers.

    Example:
        >>> unit_range(jnp.array([0, 255], jnp.uint8)).tolist()
        [0.0, 1.0]
    """
    images = _array(images)
    if images.dtype == np.uint8:
        return jnp.asarray(images.astype(np.float32) / 255)
    if not any(jnp.issubdtype(images.dtype, kind) for kind in (np.bool_, np.integer, np.floating)):
        raise ValueError(f"images must be uint8 in 0 ... 255 or numbers in 0 ... 1; got {images.dtype}")
    return jnp.asarray(images if images.dtype == np.float64 else images.astype(np.float32))


def _array(values: Any) -> Any:
    array = values if isinstance(values, jax.Array) else np.asanyarray(values)
    check_plain(array, "images and labels")
    return array if isinstance(array, jax.Array) else np.asarray(array)


def _uniform(inputs: int) -> nn.initializers.Initializer:
    """Uniform within ``1 / sqrt(inputs)``, as torch initialises linear layers."""
    limit = 1 / math.sqrt(inputs)
    start = nn.initializers.uniform(2 * limit)
    return lambda key, shape, dtype=jnp.float32: start(key, shape, dtype) - jnp.asarray(limit, dtype)
