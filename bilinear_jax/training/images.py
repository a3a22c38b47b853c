"""The recipe for image classifiers: many models in one call, and one epoch as one jitted scan.

Published: AdamW, learning rate 1e-3 with a cosine over epochs down to 0, batches of 2048 (the smaller last batch of an
epoch is dropped), dense Gaussian noise on the pixels, and weight decay 1 where it is used. Pixels are in [0, 1].

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 4 and its
appendix on training.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from bilinear_jax.nn.configs import check_types
from bilinear_jax.nn.image import ImageClassifier, ImageConfig, check_labelled, unit_range
from bilinear_jax.nn.transformer import run_module
from bilinear_jax.store.checksums import of_arrays
from bilinear_jax.store.fields import COUNT, NOT_NEGATIVE, SEED, check_fields
from bilinear_jax.training.fit import ByStep, TrainState, apply_optimizer, fit
from bilinear_jax.training.folder import DATA
from bilinear_jax.training.noise import pixel_noise

TOGETHER = ("epochs", "batch_size")
"""The recipe fields that must be the same for models that are trained in one call."""


@dataclasses.dataclass(frozen=True)
class ImageRecipe:
    """How to train an image classifier."""

    epochs: int = 100  # passes over the images
    batch_size: int = 2048  # images per update; an incomplete last batch of an epoch is dropped
    lr: float = 1e-3  # learning rate of the first epoch; it follows a cosine to 0, epoch by epoch
    weight_decay: float = 1.0  # decoupled, times the learning rate
    noise: float = 0.5  # standard deviation of the Gaussian noise on every pixel
    seed: int = 0  # seed of parameters, order and noise

    def __post_init__(self):
        check_types(self)
        check_fields(self, COUNT, *TOGETHER)
        check_fields(self, SEED, "seed")
        check_fields(self, NOT_NEGATIVE, "lr", "weight_decay", "noise")


def train_images(
    config: ImageConfig,
    recipes: ImageRecipe | Sequence[ImageRecipe],
    images: Any,
    labels: Any,
    directory: str | Path | None = None,
) -> PyTree:
    """Train image classifiers of one shape, one for each recipe.

    The recipes may differ in seed, noise, weight decay and learning rate. All models are trained in one program, one
    after another within each epoch. Each has its own order, noise and initial params, and ends with the same bits as if
    it were trained alone.

    Args:
        config: the shape of the classifiers.
        recipes: one recipe, or several with the same epochs and batch_size.
        images: ``[n, n_inputs]``, uint8 in 0 ... 255, or any other numbers in 0 ... 1.
        labels: ``[n]`` ints in 0 ... classes - 1.
        directory: the folder of the run. With it, an interrupted run can be resumed (see ``training.fit``). None: keep
            nothing.

    Returns:
        The params of ``ImageClassifier`` with one more axis first, ``[recipes, ...]``; without this axis for a single
        recipe.

    Raises:
        ValueError: if the recipes cannot be trained in one call, images have another size or range, labels are not
            classes, or there are fewer images than ``batch_size``.
        FloatingPointError: if a loss is not finite.

    Example:
        >>> config = ImageConfig(n_inputs=4, d_hidden=8, n_classes=2)
        >>> images, labels = jnp.eye(4), jnp.array([0, 0, 1, 1])
        >>> recipe = ImageRecipe(epochs=50, batch_size=4, noise=0.1, lr=0.05, weight_decay=0.0)
        >>> params = train_images(config, recipe, images, labels)
        >>> float(accuracy(config, params, images, labels))
        1.0
    """
    single = isinstance(recipes, ImageRecipe)
    chosen = [recipes] if single else list(recipes)
    data = check_labelled(config, images, labels)
    update = image_update(config, chosen)
    first = chosen[0]
    if len(data[0]) < first.batch_size:
        raise ValueError(f"a batch needs {first.batch_size} images, but there are {len(data[0])}: lower batch_size")
    start = image_state(config, chosen)
    described: dict = {"config": dataclasses.asdict(config), "recipes": [dataclasses.asdict(one) for one in chosen]}
    if directory is not None:
        described[DATA] = of_arrays(images, labels)
    with tempfile.TemporaryDirectory() as temporary:
        state = fit(
            update,
            start,
            ByStep(lambda _: data),
            steps=first.epochs,
            directory=temporary if directory is None else directory,
            config=described,
            save_every=first.epochs if directory is None else 20,
            name="image classifiers",
        )
    return jax.tree.map(lambda leaf: leaf[0], state.params) if single else state.params


def image_state(config: ImageConfig, recipes: Sequence[ImageRecipe]) -> TrainState:
    """The initial params and optimiser states of all recipes' models, stacked."""
    keys = jnp.stack([jax.random.key(recipe.seed) for recipe in recipes])
    module = ImageClassifier(config)
    params = jax.jit(jax.vmap(lambda key: module.init(key, jnp.zeros(config.n_inputs))["params"]))(keys)
    opt_state = jax.vmap(_optimizer().init)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def image_update(config: ImageConfig, recipes: Sequence[ImageRecipe]) -> Callable:
    """The pure function ``update(state, (images, labels)) -> (state, metrics)``: one epoch of every model.

    The loss is the mean cross entropy. The metrics are loss and accuracy on the noisy images, as means over the epoch
    and the models. Jit it with its state donated.

    Raises:
        ValueError: if there are no recipes, or if they differ in epochs or batch_size.
    """
    if not recipes:
        raise ValueError("there are no recipes: give at least one")
    for name in TOGETHER:
        if len({getattr(recipe, name) for recipe in recipes}) > 1:
            raise ValueError(f"models trained in one call must have the same {name}: train the others in another call")
    first, module = recipes[0], ImageClassifier(config, linear=_linear)
    each = {n: jnp.asarray([getattr(r, n) for r in recipes], jnp.float32) for n in ("lr", "weight_decay", "noise")}
    keys = jnp.stack([jax.random.fold_in(jax.random.key(recipe.seed), 1) for recipe in recipes])

    def loss(params, x, y):
        logits = run_module(module, params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), (jnp.argmax(logits, axis=-1) == y).mean()

    def epoch(model, images, labels, number):
        params, opt_state, key, lr, weight_decay, noise = model
        key = jax.random.fold_in(key, number)
        rate = lr * (1 + jnp.cos(jnp.pi * number.astype(jnp.float32) / first.epochs)) / 2
        batches = len(images) // first.batch_size
        order = jax.random.permutation(key, len(images))[: batches * first.batch_size].reshape(batches, -1)

        def step(carried, chosen):
            params, opt_state = carried
            place, index = chosen
            x = unit_range(images[index])
            x = x + noise * pixel_noise(jax.random.fold_in(key, place), x.shape)
            (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(params, x, labels[index])
            opt_state.hyperparams.update(learning_rate=rate, weight_decay=weight_decay)
            params, opt_state = apply_optimizer(_optimizer(), gradient, TrainState(number, params, opt_state))
            return (params, opt_state), (value, right)

        (params, opt_state), metrics = jax.lax.scan(step, (params, opt_state), (jnp.arange(batches), order))
        return (params, opt_state), [metric.mean() for metric in metrics]

    def update(state: TrainState, batch) -> tuple[TrainState, dict[str, Array]]:
        images, labels = check_labelled(config, *batch)
        models = (state.params, state.opt_state, keys, each["lr"], each["weight_decay"], each["noise"])
        (params, opt_state), (value, right) = jax.lax.map(
            lambda model: epoch(model, images, labels, state.step), models
        )
        return TrainState(state.step + 1, params, opt_state), {"loss": value.mean(), "accuracy": right.mean()}

    return update


def accuracy(config: ImageConfig, params: PyTree, images: Any, labels: Any) -> Float[Array, ""]:
    """The fraction of images whose largest logit is that of their label.

    Raises:
        ValueError: as ``train_images`` does for the same images and labels.
    """
    return _accuracy(config, params, *check_labelled(config, images, labels))


@functools.partial(jax.jit, static_argnums=0)
def _accuracy(config, params, images, labels):
    logits = run_module(ImageClassifier(config), params, images)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


@jax.custom_vjp
def _product(x: Float[Array, "... inp"], weight: Float[Array, "out inp"]) -> Float[Array, "... out"]:
    return jnp.einsum("...i,oi->...o", x, weight)


def _product_backward(saved, dy):
    """The weight's gradient as a product of two row-major matrices. On a CPU this is a sixth faster."""
    x, weight = saved
    columns = jax.lax.optimization_barrier(dy.reshape(-1, dy.shape[-1]).T)
    return dy @ weight, columns @ x.reshape(-1, x.shape[-1])


_product.defvjp(lambda x, weight: (_product(x, weight), (x, weight)), _product_backward)


def _linear(x, weight, bias=None):
    """``nn.transformer.linear`` for training. It supports first derivatives only, in reverse mode."""
    y = _product(x, weight)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def _optimizer() -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=0.0)
