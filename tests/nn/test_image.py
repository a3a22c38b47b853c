"""Images and labels of every type and range: the value of the same numbers as floats in 0 ... 1, or the one error."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilinear_jax.images import analyses, figures
from bilinear_jax.nn.image import ImageClassifier, ImageConfig, check_labelled, check_labels, check_pixels, unit_range
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.toy import Toy, ToyConfig, toy_targets
from bilinear_jax.training.images import ImageRecipe, accuracy, image_state, image_update, train_images

CONFIG = ImageConfig(n_inputs=6, d_hidden=4, n_classes=3, residual=True)
PARAMS = jax.jit(ImageClassifier(CONFIG).init)(jax.random.key(0), jnp.ones(6))["params"]
MASKS = jax.random.normal(jax.random.key(1), (2, 6))
RECIPE = ImageRecipe(epochs=1, batch_size=3, noise=0.1)
LABELS = np.array([0, 1, 2, 2, 1])

KINDS = (bool, "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", ">f4", ">i2", ml_dtypes.bfloat16)

FUNCTIONS = {
    "train_images": lambda *data: train_images(CONFIG, RECIPE, *data),
    "accuracy": lambda *data: accuracy(CONFIG, PARAMS, *data),
    "truncated_accuracy": lambda *data: analyses.truncated_accuracy(CONFIG, PARAMS, *data, [1, 4]),
    "masked_accuracy": lambda *data: analyses.masked_accuracy(CONFIG, PARAMS, MASKS, *data),
    "adversarial_masks": lambda *data: analyses.adversarial_masks(CONFIG, PARAMS, *data, k=1),
    "edge_pixels": lambda images, _: analyses.edge_pixels(images, 0.3),
    "explain": lambda images, _: analyses.explain(CONFIG, PARAMS, images[0]),
}


@st.composite
def image_sets(draw):
    """Five images of six pixels in any type, from 0 ... 1 or from a wider range."""
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random((5, 6))
    low, high = draw(st.sampled_from([(0, 1), (0, 1), (0, 2), (0, 255), (-1, 1), (0, 60000)]))
    kind = np.dtype(draw(st.sampled_from(KINDS)))
    spread = low + (high - low) * numbers
    if kind.kind in "iu":
        spread = np.clip(np.round(spread), np.iinfo(kind).min, min(np.iinfo(kind).max, 2**16))
    images = (spread > 0.5 if kind.kind == "b" else spread).astype(kind)
    return jnp.asarray(images) if draw(st.booleans()) and kind.isnative else images


def check(function, images, labels):
    """Against the float32 of the same numbers; those of bytes are divided by 255."""
    numbers = np.asarray(images).astype(np.float64)
    numbers = numbers / 255 if images.dtype == np.uint8 else numbers
    if not ((numbers >= 0) & (numbers <= 1)).all():
        with pytest.raises(ValueError, match=r"pixels must lie in 0 \.\.\. 1, got"):
            function(images, labels)
        return
    wanted, got = (function(each, labels) for each in (numbers.astype(np.float32), images))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "train_images"])
def test_any_images(name):
    @settings(deadline=None, max_examples=10 if name in ("explain", "adversarial_masks") else 30)
    @given(image_sets())
    def one(images):
        # explain takes one image: the others are made the same, so that what it must refuse is in the one
        check(FUNCTIONS[name], images[:1].repeat(len(images), axis=0) if name == "explain" else images, LABELS)

    one()


@pytest.mark.parametrize(("kind", "high"), [(bool, 1), (np.int64, 2), (np.float16, 2)])
def test_training_takes_and_refuses_the_same(kind, high):
    check(FUNCTIONS["train_images"], high * (np.arange(30).reshape(5, 6) % 3 > 0).astype(kind), LABELS)


@settings(deadline=None, max_examples=20)
@given(image_sets())
def test_the_module_gives_the_logits_of_the_numbers(images):
    """Against NumPy, in float64. The module takes any range: noise and masks leave 0 ... 1."""
    numbers = np.asarray(images).astype(np.float64) / (255 if images.dtype == np.uint8 else 1)
    h = numbers @ np.asarray(PARAMS["w_e"], np.float64).T
    w_l, w_r = (np.asarray(PARAMS["layers"][name][0], np.float64) for name in ("w_l", "w_r"))
    logits = (h + (h @ w_l.T) * (h @ w_r.T)) @ np.asarray(PARAMS["w_u"], np.float64).T
    scale = np.abs(logits).max()
    for apply in (ImageClassifier(CONFIG).apply, jax.jit(ImageClassifier(CONFIG).apply)):
        got = apply({"params": PARAMS}, np.asarray(images).astype(images.dtype.newbyteorder("=")))
        np.testing.assert_allclose(got, logits, atol=1e-5 * max(scale, 1))


LABEL_SETS = {
    "bytes": (LABELS.astype(np.uint8), None),
    "a list": (LABELS.tolist(), None),
    "big-endian": (LABELS.astype(">i4"), None),
    "negative": (LABELS - 1, r"labels must lie in 0 \.\.\. 2, got -1 \.\.\. 1"),
    "beyond the classes": (LABELS + 1, r"labels must lie in 0 \.\.\. 2, got 1 \.\.\. 3"),
    "beyond 32 bits": (LABELS + 2**32, r"labels must lie in 0 \.\.\. 2"),
    "floats": (LABELS.astype(np.float32), "labels must be ints, one per image; got float32"),
    "booleans": (LABELS > 0, "labels must be ints, one per image; got bool"),
    "one-hot": (np.eye(3, dtype=int)[LABELS], r"must have shapes \[n, 6\] and \[n\], n >= 1"),
}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("edge_pixels", "explain")])
@pytest.mark.parametrize("kind", LABEL_SETS)
def test_any_labels(name, kind):
    images, (labels, message) = np.random.default_rng(0).random((5, 6)).astype(np.float32), LABEL_SETS[kind]
    if message:
        with pytest.raises(ValueError, match=message):
            FUNCTIONS[name](images, labels)
    elif name != "train_images" or kind == "big-endian":  # training takes two seconds
        got, wanted = (FUNCTIONS[name](images, each) for each in (labels, LABELS))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_what_is_no_image():
    for images in (np.full((5, 6), 0.5 + 1j), np.full((5, 6), "a")):
        with pytest.raises(ValueError, match=r"images must be uint8 in 0 \.\.\. 255 or numbers in 0 \.\.\. 1; got"):
            unit_range(images)
    for name in FUNCTIONS:
        with pytest.raises(ValueError, match=r"pixels must lie in 0 \.\.\. 1, got nan"):
            FUNCTIONS[name](np.full((5, 6), np.nan, np.float32), LABELS)
    with pytest.raises(ValueError, match=r"images must be \[n, n_inputs\], n >= 1; got shape \(0, 6\)"):
        analyses.edge_pixels(np.zeros((0, 6)))


def test_times_and_hidden_values_are_no_numbers():
    images, labels = np.zeros((5, 6), np.uint8), np.zeros(5, int)
    hidden = np.ma.masked_array(images, np.arange(30).reshape(5, 6) == 3)
    for read in (unit_range, check_pixels, lambda values: check_labelled(CONFIG, values, labels)):
        for bad in (images.astype("m8[s]"), [np.timedelta64(0, "s")] * 6):
            with pytest.raises(ValueError, match=r"images and labels must be numbers; got timedelta64"):
                read(bad)
        with pytest.raises(ValueError, match=r"masked array that hides some of them: fill it with array.filled"):
            read(hidden)
        read(np.ma.masked_array(images))
    for bad in (labels.astype("m8[s]"), np.ma.masked_array(labels, labels == 0)):
        with pytest.raises(ValueError, match=r"images and labels (must be numbers|are a masked array)"):
            check_labels(bad, CONFIG.n_classes)
    assert unit_range(np.ma.masked_array(images)).tolist() == images.tolist()


def test_a_pure_update_reads_them_the_same():
    update, state = jax.jit(image_update(CONFIG, [RECIPE])), image_state(CONFIG, [RECIPE])
    images = np.arange(30).reshape(5, 6) % 2
    got, wanted = (update(state, (each, LABELS))[0].params for each in (images, images.astype(np.float32)))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    with pytest.raises(ValueError, match="labels must be ints"):
        update(state, (images, LABELS.astype(np.float32)))


def test_masks_may_be_integers():
    masks = np.array([[0, 1, 0, -1, 2, 0], [1, 0, 0, 0, 0, 0]])
    images = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    for kind in (np.int8, np.int64, np.float16):
        got, wanted = (
            (
                analyses.masked_accuracy(CONFIG, PARAMS, each, images, LABELS),
                analyses.scaled_masks(each, 0.5),
                analyses.permuted_masks(jax.random.key(0), each),
                analyses.eigenvector_similarity(each[:, None]),
            )
            for each in (masks.astype(kind), masks.astype(np.float32))
        )
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("label", [-1, 3])
def test_the_figure_of_an_explanation_takes_a_label_that_exists(label):
    told = analyses.explain(CONFIG, PARAMS, np.ones(6, bool))
    parts = (told.logits, told.values, told.patterns, told.contributions, told.others, told.around)
    figures.explanation(np.ones(6, bool), (2, 3), "abc", *parts, label=2)
    with pytest.raises(ValueError, match="labels must"):
        figures.explanation(np.ones(6, bool), (2, 3), "abc", *parts, label=label)


@pytest.mark.parametrize("kind", [bool, np.int32])
def test_integers_never_round_the_weights_of_another_module(kind):
    x = jnp.asarray(np.arange(12).reshape(3, 4) % 2, kind)
    exact = x.astype(jnp.float32)
    toy = ToyConfig(n_inputs=4, d_hidden=5, tasks=(("xor", 1.0), ("and", 0.5)))
    params = Toy(toy).init(jax.random.key(0), exact)
    np.testing.assert_array_equal(Toy(toy).apply(params, x), Toy(toy).apply(params, exact))
    np.testing.assert_array_equal(toy_targets(toy, x), toy_targets(toy, exact))
    sae = SAE.init(SAEConfig("mlp_out", 0, d_model=4, expansion=2, k=2), jax.random.key(1))
    np.testing.assert_array_equal(sae.encode(x), sae.encode(exact))
    dense = jnp.asarray(np.arange(16).reshape(2, 8) % 2, kind)
    np.testing.assert_array_equal(sae.decode(dense), sae.decode(dense.astype(jnp.float32)))
