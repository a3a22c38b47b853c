"""What the eigenvectors of an image classifier say: how few suffice, how alike they are, what they see in one image.

For one bilinear layer without biases (``images.pixel_eigenvectors``):

    logit_c = sum_r l_cr (p_cr . x)^2 + (W_u W_e x)_c        p_cr = W_e^T v_cr

with l and v the eigenvalues and eigenvectors of class c in the layer's own inputs, p those as images, and the last
term, the path around the layer, only in a model with a residual.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 4.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from bilinear_jax.images import image_tensor, pixel_eigenvectors
from bilinear_jax.nn.image import ImageClassifier, ImageConfig, check_labelled, unit_range
from bilinear_jax.nn.transformer import run_module
from bilinear_jax.spectra import effective_rank

TOGETHER = 500
"""Images whose terms are held at once: each has one a class and eigenvector."""


def truncated_accuracy(
    config: ImageConfig, params: PyTree, images: Any, labels: Any, ks: Sequence[int]
) -> Float[Array, " ks"]:
    """The accuracy if every class keeps only its k largest |eigenvalues|, for each k.

        logit_c = sum over the k largest |l_cr| of l_cr (p_cr . x)^2, and the residual's path, if there is one

    Args:
        images: ``[n, n_inputs]``, uint8 of 0 ... 255, or floating point of 0 ... 1.
        labels: ``[n]`` ints.
        ks: how many to keep, each in 1 ... d_hidden. With all of them it is the accuracy of the model.

    Raises:
        ValueError: for a k out of range, no image, more than one layer, or biases.

    Memory: ``500 * classes * d_hidden`` numbers beside the images.

    Example:
        >>> config = ImageConfig(n_inputs=2, d_hidden=2, n_classes=2)
        >>> eye = jnp.eye(2)  # logits (x_0^2 + 3 x_1^2, 2 x_0^2)
        >>> layers = {"w_l": eye[None], "w_r": eye[None]}
        >>> params = {"w_e": eye, "layers": layers, "w_u": jnp.array([[1.0, 3.0], [2.0, 0.0]])}
        >>> x, labels = jnp.array([[0.9, 0.6], [0.8, 0.1], [0.9, 0.5]]), jnp.array([0, 1, 1])
        >>> (3 * truncated_accuracy(config, params, x, labels, [1, 2])).round().tolist()  # k = 1: 3 x_1^2, 2 x_0^2
        [2.0, 3.0]
    """
    if not len(ks) or not all(1 <= k <= config.d_hidden for k in ks):
        raise ValueError(f"each k must lie in 1 ... {config.d_hidden} (the eigenvalues of a class), got {list(ks)}")
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    check_labelled(config, images, labels)
    return _truncated_accuracy(config, tuple(map(int, ks)), params, images, labels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _truncated_accuracy(config, ks, params, images, labels):
    spectrum, pixels = pixel_eigenvectors(config, params)
    order = jnp.argsort(-jnp.abs(spectrum.values), axis=1)
    values = jnp.take_along_axis(spectrum.values, order, axis=1)
    pixels = jnp.take_along_axis(pixels, order[:, :, None], axis=1)

    def right(row):
        image, label = row
        x = unit_range(image)
        partial = jnp.cumsum(values * (pixels @ x) ** 2, axis=1)[:, jnp.array(ks) - 1]
        logits = partial + _around(config, params, x)[:, None]
        return jnp.argmax(logits, axis=0) == label

    with jax.default_matmul_precision("highest"):
        found = jax.lax.map(right, (images, labels), batch_size=min(TOGETHER, len(images)))
        return found.mean(axis=0)


def effective_ranks(config: ImageConfig, params: PyTree) -> Float[Array, " classes"]:
    """``(sum |l|)^2 / sum l^2`` of every class's eigenvalues, those of ``pixel_eigenvectors``: see ``spectra``.

    Example:
        >>> config = ImageConfig(n_inputs=2, d_hidden=2, n_classes=2)
        >>> layers = {"w_l": jnp.eye(2)[None], "w_r": jnp.eye(2)[None]}
        >>> params = {"w_e": jnp.eye(2), "layers": layers, "w_u": jnp.array([[1.0, -1.0], [5.0, 0.0]])}
        >>> effective_ranks(config, params).round(3).tolist()
        [2.0, 1.0]
    """
    tensor = image_tensor(config, params)
    return effective_rank(tensor.interaction(jnp.eye(config.n_classes, dtype=tensor.down.dtype)))


def most_positive(config: ImageConfig, params: PyTree, k: int = 1) -> Float[Array, "classes k n_inputs"]:
    """The eigenvectors of the k most positive eigenvalues of every class, as images, the most positive first.

    Raises:
        ValueError: if k is not in 1 ... d_hidden; for more than one layer, or biases.
    """
    _check_k(config, k)
    return pixel_eigenvectors(config, params)[1][:, : -k - 1 : -1]


def eigenvector_similarity(
    first: Float[Array, "models classes n_inputs"], second: Array | None = None
) -> Float[Array, " classes"]:
    """The mean |cosine| of each class's eigenvectors over all pairs of different models.

    Eigenvectors have no sign, hence the absolute value. No model is compared with itself: of n models, without
    ``second``, there are n (n - 1) / 2 pairs; with it (models of another size, for instance) there are models * others.

    Args:
        first: one image a class of every model, such as ``most_positive(config, params)[:, 0]``.
        second: the same of other models, ``[others, classes, n_inputs]``.

    Raises:
        ValueError: if there is no pair, or if classes or pixels don't agree.

    Example:
        >>> a = jnp.array([[[1.0, 0.0]], [[-1.0, 0.0]], [[0.0, 2.0]]])  # three models of one class
        >>> [round(float(eigenvector_similarity(*given)[0]), 4) for given in ((a,), (a[:2], a[2:]), (a, a[:1]))]
        [0.3333, 0.0, 0.6667]
    """
    other = first if second is None else second
    pairs = len(first) * (len(first) - 1) if second is None else len(first) * len(other)
    if not pairs:
        raise ValueError(f"there is no pair among {len(first)} models{'' if second is None else ' and the others'}")
    if first.shape[1:] != other.shape[1:]:
        raise ValueError(f"images of both must agree in classes and pixels, got {first.shape} and {other.shape}")
    first, other = (images / jnp.linalg.norm(images, axis=-1, keepdims=True) for images in (first, other))
    with jax.default_matmul_precision("highest"):
        cosines = jnp.abs(jnp.einsum("mcp,ncp->mnc", first, other))
    if second is None:
        cosines = jnp.where(jnp.eye(len(first), dtype=bool)[:, :, None], 0, cosines)
    return cosines.sum(axis=(0, 1)) / pairs


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "values", "patterns", "contributions", "others", "around"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Explanation:
    """The logits of one image as sums: ``logits = contributions.sum(1) + others + around``."""

    logits: Array  # [classes]
    values: Array  # [classes, k]: eigenvalues of the k eigenvectors that add or take most, in that order
    patterns: Array  # [classes, k, n_inputs]: those eigenvectors as images
    contributions: Array  # [classes, k]: what each adds to the logit, l (p . x)^2
    others: Array  # [classes]: what all eigenvectors that aren't named add together
    around: Array  # [classes]: what the path around the layer adds; 0 without a residual


def explain(config: ImageConfig, params: PyTree, image: Float[Array, " n_inputs"], k: int = 4) -> Explanation:
    """What the eigenvectors of every class make of one image: the k of the largest |contribution| to each logit.

    The logits are the sums of all terms, so they agree with the model's own only to rounding. Can be called under
    ``jit``, and under ``vmap`` for many images.

    Args:
        image: of 0 ... 1.

    Raises:
        ValueError: if k is not in 1 ... d_hidden; for an image of another size, more than one layer, or biases.

    Example:
        >>> config = ImageConfig(n_inputs=2, d_hidden=2, n_classes=1)
        >>> layers = {"w_l": jnp.eye(2)[None], "w_r": jnp.eye(2)[None]}
        >>> params = {"w_e": jnp.eye(2), "layers": layers, "w_u": jnp.array([[1.0, -3.0]])}
        >>> told = explain(config, params, jnp.array([1.0, 0.5]), k=1)
        >>> [float(told.logits[0]), float(told.contributions[0, 0]), float(told.others[0])]
        [0.25, 1.0, -0.75]
    """
    _check_k(config, k)
    if image.shape != (config.n_inputs,):
        raise ValueError(f"explain takes one image of {config.n_inputs} pixels, got shape {image.shape}")
    spectrum, pixels = pixel_eigenvectors(config, params)
    with jax.default_matmul_precision("highest"):
        terms = spectrum.values * (pixels @ image) ** 2
        around = _around(config, params, image)
    order = jnp.argsort(-jnp.abs(terms), axis=1)
    values, terms = (jnp.take_along_axis(array, order, axis=1) for array in (spectrum.values, terms))
    patterns = jnp.take_along_axis(pixels, order[:, :k, None], axis=1)
    others = terms[:, k:].sum(axis=1)
    return Explanation(terms.sum(axis=1) + around, values[:, :k], patterns, terms[:, :k], others, around)


def class_interactions(config: ImageConfig, params: PyTree) -> Float[Array, "classes classes"]:
    """What the pattern that each class most looks for does to all classes.

        entry (a, c) = v_a^T Q_c v_a        v_a the unit eigenvector of the largest eigenvalue of Q_a, in hidden units

    An input that is v_a in the layer's basis raises the logit of c by that much, by the layer. The diagonal holds the
    largest eigenvalues; a negative entry is a class whose evidence speaks against another.

    Raises:
        ValueError: for more than one layer, or biases.

    Example:
        >>> config = ImageConfig(n_inputs=2, d_hidden=2, n_classes=2)
        >>> layers = {"w_l": jnp.eye(2)[None], "w_r": jnp.eye(2)[None]}
        >>> params = {"w_e": jnp.eye(2), "layers": layers, "w_u": jnp.array([[1.0, -3.0], [-2.0, 5.0]])}
        >>> class_interactions(config, params).tolist()  # v_0 = (1, 0), v_1 = (0, 1)
        [[1.0, -2.0], [-3.0, 5.0]]
    """
    top = pixel_eigenvectors(config, params)[0].vectors[:, :, -1]
    with jax.default_matmul_precision("highest"):
        return image_tensor(config, params).apply(top)


def adversarial_masks(
    config: ImageConfig, params: PyTree, images: Any, labels: Any, k: int = 10, pixels: Any = None
) -> Float[Array, "classes k n_inputs"]:
    """Masks to add to images, each to stir one of the k most positive eigenvectors of a class and none of the others.

        V [classes k, d_hidden]: those eigenvectors as rows       V V^+ = 1
        mask = W_e^T (a column of V^+), positive in mean product with the mean images of the other classes

    Columns of the pseudo-inverse V^+ meet one eigenvector each; as masks they are seen through ``W_e W_e^T``, so a mask
    stirs the others too, as far as that isn't a multiple of the identity. To be scaled by ``scaled_masks``.

    Args:
        images, labels: a dataset (as in ``truncated_accuracy``) for the signs; every class must occur.
        k: eigenvectors a class, ``classes * k`` at most d_hidden.
        pixels: ``[n_inputs]`` booleans, where a mask may differ from 0, such as ``edge_pixels``; None: everywhere.

    Returns:
        The masks, of the most positive eigenvector first.

    Raises:
        ValueError: for a larger k, a class without images, images, labels or pixels of another shape, more than one
            layer, or biases.
    """
    if not 1 <= k * config.n_classes <= config.d_hidden:
        raise ValueError(
            f"{config.n_classes} classes of {k} eigenvectors can't be told apart in {config.d_hidden} dimensions: "
            f"k must lie in 1 ... {config.d_hidden // config.n_classes}"
        )
    images, labels = jnp.asarray(images), np.asarray(labels)
    check_labelled(config, images, labels)
    if pixels is not None and np.shape(pixels) != (config.n_inputs,):
        raise ValueError(f"pixels must be [{config.n_inputs}] booleans, got shape {np.shape(pixels)}")
    missing = sorted(set(range(config.n_classes)) - set(labels.tolist()))
    if missing:
        raise ValueError(f"the signs of masks need images of all classes; there are none of {missing}")
    images = unit_range(images)
    means = jnp.stack([images[labels == c].mean(axis=0) for c in range(config.n_classes)])
    vectors = pixel_eigenvectors(config, params)[0].vectors[:, :, : -k - 1 : -1]  # [classes, d_hidden, k]
    with jax.default_matmul_precision("highest"):
        rows = jnp.swapaxes(vectors, 1, 2).reshape(-1, config.d_hidden)
        masks = (jnp.linalg.pinv(rows).T @ params["w_e"]).reshape(config.n_classes, k, config.n_inputs)
        if pixels is not None:
            masks = jnp.where(jnp.asarray(pixels), masks, 0)
        overlaps = jnp.einsum("ckp,cp->ck", masks, means.sum(axis=0, keepdims=True) - means)
    return jnp.where(overlaps < 0, -1, 1)[:, :, None].astype(masks.dtype) * masks


def edge_pixels(images: Any, limit: float = 0.01) -> Bool[Array, " n_inputs"]:
    """The pixels whose mean over the images, of 0 ... 1, is below the limit: those that hold nothing, at the edges.

    Example:
        >>> edge_pixels(np.array([[0, 255, 1], [0, 0, 0]], np.uint8)).tolist()
        [True, False, True]
    """
    return unit_range(jnp.asarray(images)).mean(axis=0) < limit


def scaled_masks(masks: Float[Array, "*masks n_inputs"], std: float) -> Float[Array, "*masks n_inputs"]:
    """Masks of a standard deviation, taken over all pixels of each; a constant one becomes 0.

    Example:
        >>> scaled_masks(jnp.array([[2.0, -2.0], [0.0, 0.0]]), 0.5).tolist()
        [[0.5, -0.5], [0.0, 0.0]]
    """
    spread = masks.std(axis=-1, keepdims=True)
    return jnp.where(spread > 0, std * masks / jnp.where(spread > 0, spread, 1), 0)


def permuted_masks(
    key: Key[Array, ""], masks: Float[Array, "*masks n_inputs"], pixels: Any = None
) -> Float[Array, "*masks n_inputs"]:
    """The control: the values of each mask in a random order of their own, among the given pixels only.

    Example:
        >>> shuffled = permuted_masks(jax.random.key(0), jnp.array([[1.0, 2.0, 0.0, 3.0]]), [True, True, False, True])
        >>> float(shuffled[0, 2]), sorted(shuffled[0].tolist())
        (0.0, [0.0, 1.0, 2.0, 3.0])
    """
    chosen = np.arange(masks.shape[-1]) if pixels is None else np.flatnonzero(np.asarray(pixels))
    shuffled = jax.random.permutation(key, masks[..., chosen], axis=-1, independent=True)
    return masks.at[..., chosen].set(shuffled)


@functools.partial(jax.jit, static_argnums=0)
def masked_accuracy(
    config: ImageConfig, params: PyTree, masks: Float[Array, "*masks n_inputs"], images: Any, labels: Any
) -> Float[Array, "*masks"]:
    """The accuracy with each mask added to all images, as it is: pixels may leave 0 ... 1. For any classifier."""
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    check_labelled(config, images, labels)
    if masks.shape[-1] != config.n_inputs:
        raise ValueError(f"masks must have {config.n_inputs} pixels in their last axis, got shape {masks.shape}")
    x = unit_range(images)

    def one(mask):
        logits = run_module(ImageClassifier(config), params, x + mask[None])
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    return jax.lax.map(one, masks.reshape(-1, masks.shape[-1])).reshape(masks.shape[:-1])


def _around(config: ImageConfig, params: PyTree, x: Float[Array, " n_inputs"]) -> Float[Array, " classes"]:
    """What the path around the layer adds to each logit."""
    if not config.residual:
        return jnp.zeros(config.n_classes, x.dtype)
    return params["w_u"] @ (params["w_e"] @ x)


def _check_k(config: ImageConfig, k: int) -> None:
    if not 1 <= k <= config.d_hidden:
        raise ValueError(f"k must lie in 1 ... {config.d_hidden} (the eigenvectors of a class), got {k}")
