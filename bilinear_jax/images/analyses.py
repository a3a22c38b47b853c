"""Analyses of the eigenvectors of an image classifier: how many are needed, how similar they are, what one image shows.

For one bilinear layer without biases (``pixel_eigenvectors``):

    logit_c = sum_r l_cr (p_cr . x)^2 + (W_u W_e x)_c        p_cr = W_e^T v_cr

l and v are the eigenvalues and eigenvectors of class c in the layer's own inputs; p are the eigenvectors as images.
Only a model with a residual has the last term, the path around the layer.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 4.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree, Shaped

from bilinear_jax.explain.spectra import effective_rank
from bilinear_jax.images.tensor import image_tensor, pixel_eigenvectors
from bilinear_jax.nn.image import ImageClassifier, ImageConfig, check_labelled, check_pixels, unit_range
from bilinear_jax.nn.transformer import run_module

TOGETHER = 500
"""Number of images whose terms are held at once. An image has one term per class and eigenvector."""


def truncated_accuracy(
    config: ImageConfig, params: PyTree, images: Any, labels: Any, ks: Sequence[int]
) -> Float[Array, " ks"]:
    """For each k, the accuracy of the classifier if every class keeps only its k largest |eigenvalues|.

        logit_c = sum over the k largest |l_cr| of l_cr (p_cr . x)^2, plus the residual's path if there is one

    Args:
        config, params: the classifier.
        images: ``[n, n_inputs]``, uint8 in 0 ... 255, or any other numbers in 0 ... 1.
        labels: ``[n]`` ints in 0 ... classes - 1.
        ks: numbers of eigenvalues to keep, each in 1 ... d_hidden. d_hidden gives the accuracy of the model.

    Raises:
        ValueError: if a k is out of range, if images or labels are refused by ``nn.image.check_labelled``, or if the
            model has more than one layer or biases.

    Memory: ``500 * classes * d_hidden`` numbers, in addition to the images.

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
    return _truncated_accuracy(config, tuple(map(int, ks)), params, *check_labelled(config, images, labels))


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
    """The effective rank of every class, ``(sum |l|)^2 / sum l^2`` of the eigenvalues of ``pixel_eigenvectors``.

    See ``spectra.effective_rank``.

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
    """The eigenvectors of the k most positive eigenvalues of every class as images, the most positive first.

    Raises:
        ValueError: if k is not in 1 ... d_hidden, or the model has more than one layer or biases.
    """
    _check_k(config, k)
    return pixel_eigenvectors(config, params)[1][:, : -k - 1 : -1]


def eigenvector_similarity(
    first: Shaped[Array | np.ndarray, "models classes n_inputs"], second: Any = None
) -> Float[Array, " classes"]:
    """For each class, the mean |cosine| between the eigenvectors of two models, over pairs of models.

    The absolute value is taken because an eigenvector has no sign of its own. No model is compared with itself. Without
    ``second``, n models make n (n - 1) / 2 pairs. With ``second`` (for instance models of another size) every model is
    compared with all others: models * others pairs.

    Args:
        first: one image per class for every model, such as ``most_positive(config, params)[:, 0]``.
        second: the same for other models, ``[others, classes, n_inputs]``.

    Raises:
        ValueError: if there is no pair, or if the numbers of classes or pixels differ.

    Example:
        >>> a = jnp.array([[[1.0, 0.0]], [[-1.0, 0.0]], [[0.0, 2.0]]])  # three models of one class
        >>> [round(float(eigenvector_similarity(*given)[0]), 4) for given in ((a,), (a[:2], a[2:]), (a, a[:1]))]
        [0.3333, 0.0, 0.6667]
    """
    first = jnp.asarray(first, jnp.float32)
    other = first if second is None else jnp.asarray(second, jnp.float32)
    pairs = len(first) * (len(first) - 1) if second is None else len(first) * len(other)
    if not pairs:
        raise ValueError(
            f"there is no pair among {len(first)} models{'' if second is None else f' and {len(other)} others'}: give "
            "more models"
        )
    if first.shape[1:] != other.shape[1:]:
        raise ValueError(
            f"first has shape {first.shape} and second {other.shape}, but they must agree in classes and pixels"
        )
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
    values: Array  # [classes, k]: eigenvalues of the k eigenvectors of largest |contribution|, the largest first
    patterns: Array  # [classes, k, n_inputs]: these eigenvectors as images
    contributions: Array  # [classes, k]: what each of them adds to the logit, l (p . x)^2
    others: Array  # [classes]: what all other eigenvectors add together
    around: Array  # [classes]: what the path around the layer adds; 0 without a residual


def explain(config: ImageConfig, params: PyTree, image: Any, k: int = 4) -> Explanation:
    """What the eigenvectors contribute to the logits of one image: for each class the k largest |contributions|.

    The logits are the sums of all terms, so they agree with those of the model up to rounding. It works under ``jit``,
    and under ``vmap`` for many images.

    Args:
        config, params: the classifier.
        image: ``[n_inputs]``, uint8 in 0 ... 255, or any other numbers in 0 ... 1.
        k: eigenvectors per class, in 1 ... d_hidden.

    Raises:
        ValueError: if k is out of range, the image has another size or range, or the model has more than one layer or
            biases.

    Example:
        >>> config = ImageConfig(n_inputs=2, d_hidden=2, n_classes=1)
        >>> layers = {"w_l": jnp.eye(2)[None], "w_r": jnp.eye(2)[None]}
        >>> params = {"w_e": jnp.eye(2), "layers": layers, "w_u": jnp.array([[1.0, -3.0]])}
        >>> told = explain(config, params, jnp.array([1.0, 0.5]), k=1)
        >>> [float(told.logits[0]), float(told.contributions[0, 0]), float(told.others[0])]
        [0.25, 1.0, -0.75]
    """
    _check_k(config, k)
    image = unit_range(check_pixels(image))
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
    """How the most positive eigenvector of each class changes the logits of all classes.

        entry (a, c) = v_a^T Q_c v_a        v_a: the unit eigenvector of the largest eigenvalue of Q_a, in hidden units

    If the layer's input is v_a, the layer adds this entry to the logit of c. The diagonal holds the largest
    eigenvalues. A negative entry means that evidence for class a is evidence against class c.

    Raises:
        ValueError: if the model has more than one layer or biases.

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
    """Masks to add to images. Each should activate one of the k most positive eigenvectors of a class, and no other.

        V [classes k, d_hidden]: these eigenvectors as rows       V V^+ = 1
        mask = W_e^T (a column of V^+), with the sign that makes its mean product with the mean images of the other
               classes positive

    Each column of the pseudo-inverse V^+ overlaps with one eigenvector. But the layer sees a mask through
    ``W_e W_e^T``: unless that is a multiple of the identity, the mask activates other eigenvectors too. Scale the
    masks with ``scaled_masks``.

    Args:
        config, params: the classifier.
        images, labels: a dataset (as in ``truncated_accuracy``) for the signs; it must contain every class.
        k: eigenvectors per class; ``classes * k`` is at most d_hidden.
        pixels: ``[n_inputs]`` booleans: where a mask may differ from 0, such as ``edge_pixels``. None: everywhere.

    Returns:
        The masks, that of the most positive eigenvector first.

    Raises:
        ValueError: if k is too large; if a class has no image; if images, labels or pixels have another shape; or if
            the model has more than one layer or biases.
    """
    if not 1 <= k * config.n_classes <= config.d_hidden:
        raise ValueError(
            f"{config.n_classes} classes with {k} eigenvectors each do not fit into {config.d_hidden} dimensions: "
            f"k must lie in 1 ... {config.d_hidden // config.n_classes}"
        )
    images, labels = check_labelled(config, images, labels)
    labels = np.asarray(labels)
    if pixels is not None and np.shape(pixels) != (config.n_inputs,):
        raise ValueError(f"pixels must be [{config.n_inputs}] booleans, got shape {np.shape(pixels)}")
    missing = sorted(set(range(config.n_classes)) - set(labels.tolist()))
    if missing:
        raise ValueError(f"the dataset has no images of the classes {missing}: give images of all classes")
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
    """The pixels whose mean over the images, in 0 ... 1, is below the limit: the empty pixels at the edges.

    Raises:
        ValueError: if images are not ``[n, n_inputs]`` with n at least 1, or are refused by ``nn.image.check_pixels``.

    Example:
        >>> edge_pixels(np.array([[0, 255, 1], [0, 0, 0]], np.uint8)).tolist()
        [True, False, True]
    """
    images = check_pixels(images)
    if images.ndim != 2 or not len(images):
        raise ValueError(f"images must be [n, n_inputs], n >= 1; got shape {images.shape}")
    return unit_range(images).mean(axis=0) < limit


def scaled_masks(masks: Shaped[Array | np.ndarray, "*masks n_inputs"], std: float) -> Float[Array, "*masks n_inputs"]:
    """The masks scaled to the standard deviation ``std`` over their pixels. A constant mask becomes 0.

    Example:
        >>> scaled_masks(jnp.array([[2.0, -2.0], [0.0, 0.0]]), 0.5).tolist()
        [[0.5, -0.5], [0.0, 0.0]]
    """
    masks = jnp.asarray(masks, jnp.float32)
    spread = masks.std(axis=-1, keepdims=True)
    return jnp.where(spread > 0, std * masks / jnp.where(spread > 0, spread, 1), 0)


def permuted_masks(
    key: Key[Array, ""], masks: Shaped[Array | np.ndarray, "*masks n_inputs"], pixels: Any = None
) -> Float[Array, "*masks n_inputs"]:
    """The control for masks: the values of each mask in a random order, shuffled among the given pixels only.

    Example:
        >>> shuffled = permuted_masks(jax.random.key(0), jnp.array([[1.0, 2.0, 0.0, 3.0]]), [True, True, False, True])
        >>> float(shuffled[0, 2]), sorted(shuffled[0].tolist())
        (0.0, [0.0, 1.0, 2.0, 3.0])
    """
    masks = jnp.asarray(masks, jnp.float32)
    chosen = np.arange(masks.shape[-1]) if pixels is None else np.flatnonzero(np.asarray(pixels))
    shuffled = jax.random.permutation(key, masks[..., chosen], axis=-1, independent=True)
    return masks.at[..., chosen].set(shuffled)


def masked_accuracy(
    config: ImageConfig, params: PyTree, masks: Shaped[Array | np.ndarray, "*masks n_inputs"], images: Any, labels: Any
) -> Float[Array, "*masks"]:
    """The accuracy with each mask added to all images. Their sum may leave 0 ... 1. For any classifier.

    Raises:
        ValueError: if images or labels are refused by ``nn.image.check_labelled``, or a mask has another size.
    """
    masks = jnp.asarray(masks, jnp.float32)
    images, labels = check_labelled(config, images, labels)
    if masks.shape[-1] != config.n_inputs:
        raise ValueError(f"masks must have {config.n_inputs} pixels in their last axis, got shape {masks.shape}")
    return _masked_accuracy(config, params, masks, images, labels)


@functools.partial(jax.jit, static_argnums=0)
def _masked_accuracy(config, params, masks, images, labels):
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
