"""Image classifiers: many at once as each alone, the update against Optax by hand, learning, bad input."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilinear_jax.nn.image import ImageClassifier, ImageConfig
from bilinear_jax.training.images import ImageRecipe, accuracy, image_state, image_update, train_images
from bilinear_jax.training.noise import random_words

CONFIG = ImageConfig(n_inputs=6, d_hidden=8, n_classes=3)
RECIPE = ImageRecipe(epochs=3, batch_size=16, noise=0.3, weight_decay=0.5, lr=0.01)


def data(n=40):
    """The class is which third of the image is brightest."""
    images = np.random.default_rng(0).uniform(0, 1, (n, 6)).astype(np.float32)
    return images, images.reshape(n, 3, 2).sum(axis=2).argmax(axis=1)


def test_many_at_once_end_as_each_alone():
    recipes = [RECIPE, dataclasses.replace(RECIPE, seed=1), dataclasses.replace(RECIPE, noise=0.0, weight_decay=0.0)]
    together = train_images(CONFIG, recipes, *data())
    for number, recipe in enumerate(recipes):
        alone = train_images(CONFIG, recipe, *data())
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(operator.itemgetter(number), together), alone)
    different = jax.tree.map(lambda leaf: float(jnp.abs(leaf[0] - leaf[1]).max()), together)
    assert min(jax.tree.leaves(different)) > 1e-3


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, n_layer=2, bias=True, residual=True)])
def test_a_step_is_that_of_adamw_at_the_rate_of_its_epoch(config):
    """One batch an epoch, without noise, so that order doesn't matter."""
    images, labels = data(16)
    recipe = dataclasses.replace(RECIPE, noise=0.0, epochs=4)
    params = jax.tree.map(lambda leaf: leaf[0], image_state(config, [recipe]).params)
    got = train_images(config, recipe, images, labels)
    optimizer = optax.adamw(lambda epoch: 0.01 * (1 + jnp.cos(jnp.pi * epoch / 4)) / 2, weight_decay=0.5)
    state = optimizer.init(params)

    def loss(params):
        logits = ImageClassifier(config).apply({"params": params}, jnp.asarray(images))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(16), labels])

    for _ in range(4):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, params)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_random_words_are_those_of_jax(size):
    for key in (jax.random.key(0), jax.random.fold_in(jax.random.key(2**32 - 1), 5), jax.random.key(3, impl="rbg")):
        np.testing.assert_array_equal(random_words(key, size), jax.random.bits(key, (size,)))


def test_noise_is_that_of_every_pixel():
    """Images of 0 give no gradient but through the noise; its variance is that of the gradient's terms."""
    recipe = dataclasses.replace(RECIPE, epochs=1, lr=1e-3, weight_decay=0.0)
    images, labels = np.zeros((16, 6), np.float32), np.arange(16) % 3
    start = image_state(CONFIG, [recipe]).params
    for noise, moves in ((0.0, False), (0.3, True)):
        one = dataclasses.replace(recipe, noise=noise)
        params = train_images(CONFIG, [one], images, labels)
        moved = bool((params["w_e"] != start["w_e"]).all())
        assert moved == moves


def test_it_learns_and_pixels_may_be_bytes():
    images, labels = data(256)
    recipe = ImageRecipe(epochs=60, batch_size=64, lr=0.01, weight_decay=0.1, noise=0.05)
    as_bytes = np.round(images * 255).astype(np.uint8)
    params = train_images(CONFIG, recipe, as_bytes, labels)
    assert accuracy(CONFIG, params, as_bytes, labels) > 0.95
    np.testing.assert_array_equal(
        accuracy(CONFIG, params, as_bytes, labels), accuracy(CONFIG, params, as_bytes / np.float32(255), labels)
    )


def test_an_interrupted_run_goes_on(tmp_path):
    images, labels = data()
    whole = train_images(CONFIG, RECIPE, images, labels)
    state, update = image_state(CONFIG, [RECIPE]), jax.jit(image_update(CONFIG, [RECIPE]))
    for _ in range(3):
        state, metrics = update(state, (jnp.asarray(images), jnp.asarray(labels, jnp.int32)))
    assert set(metrics) == {"loss", "accuracy"}
    first = train_images(CONFIG, RECIPE, images, labels, tmp_path / "run")
    again = train_images(CONFIG, RECIPE, images, labels, tmp_path / "run")
    for other in (first, again, jax.tree.map(lambda leaf: leaf[0], state.params)):
        jax.tree.map(np.testing.assert_array_equal, whole, other)
    with pytest.raises(ValueError, match="another"):
        train_images(CONFIG, dataclasses.replace(RECIPE, seed=5), images, labels, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another config \(data_sha256: "):
        train_images(CONFIG, RECIPE, images, labels[::-1], tmp_path / "run")


def test_what_is_refused():
    images, labels = data()
    for wrong, message in [
        ((images[:, :5], labels), r"\[n, 6\]"),
        ((images * 255, labels), "pixels must lie in 0 ... 1"),
        (((images * 255).astype(int), labels), "pixels must lie in 0 ... 1"),
        ((images.astype(str), labels), "uint8 in 0 ... 255 or numbers in 0 ... 1"),
        ((images, labels + 1), "labels must lie in 0 ... 2"),
        ((images, labels[:-1]), r"labels \(39,\) must have shapes \[n, 6\] and \[n\]"),
        ((images, labels.astype(float)), "labels must be ints"),
        ((images[:10], labels[:10]), "a batch needs 16 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_images(CONFIG, RECIPE, *wrong)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed must lie in 0 \.\.\. 2\^32 - 1, got {seed}"):
            ImageRecipe(seed=seed)
    with pytest.raises(ValueError, match="have the same batch_size"):
        train_images(CONFIG, [RECIPE, dataclasses.replace(RECIPE, batch_size=8)], images, labels)
    with pytest.raises(ValueError, match="there are no recipes: give at least one"):
        train_images(CONFIG, [], images, labels)
    with pytest.raises(ValueError, match=r"noise must be a number that is not negative, got -1\.0"):
        ImageRecipe(noise=-1.0)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        ImageRecipe(epochs=0)
