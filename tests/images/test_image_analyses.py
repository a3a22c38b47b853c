"""Analyses of image classifiers, by brute force and with planted answers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.images import analyses
from bilinear_jax.images.tensor import pixel_eigenvectors
from bilinear_jax.nn.image import ImageClassifier, ImageConfig
from bilinear_jax.training.images import accuracy


def made(residual=False, n_inputs=9, d_hidden=7, n_classes=3):
    config = ImageConfig(n_inputs=n_inputs, d_hidden=d_hidden, n_classes=n_classes, residual=residual)
    images = jax.random.uniform(jax.random.key(1), (41, n_inputs))
    params = ImageClassifier(config).init(jax.random.key(0), images)["params"]
    return config, params, images


def logits_of(config, params, images):
    return np.asarray(ImageClassifier(config).apply({"params": params}, images))


def forms(params):
    """Q_c in hidden units, from the definition."""
    w_l, w_r, w_u = (
        np.asarray(w, np.float64) for w in (*(params["layers"][n][0] for n in ("w_l", "w_r")), params["w_u"])
    )
    raw = np.einsum("cm,mi,mj->cij", w_u, w_l, w_r)
    return (raw + raw.transpose(0, 2, 1)) / 2


@pytest.mark.parametrize("residual", [False, True])
def test_truncated_accuracy_rebuilds_the_matrices(residual, monkeypatch):
    """Each Q_c rebuilt from its k largest |eigenvalues|, 41 images that aren't a multiple of those held at once."""
    monkeypatch.setattr(analyses, "TOGETHER", 8)
    config, params, images = made(residual)
    labels = logits_of(config, params, images).argmax(axis=1)
    hidden = np.asarray(images @ params["w_e"].T, np.float64)
    expected = []
    for k in (1, 3, 7):
        kept = []
        for q in forms(params):
            values, vectors = np.linalg.eigh(q)
            top = np.argsort(-np.abs(values))[:k]
            kept.append((vectors[:, top] * values[top]) @ vectors[:, top].T)
        logits = np.einsum("ni,cij,nj->nc", hidden, np.stack(kept), hidden)
        logits += hidden @ np.asarray(params["w_u"]).T * residual
        expected.append((logits.argmax(axis=1) == labels).mean())
    got = analyses.truncated_accuracy(config, params, images, labels, [1, 3, 7])
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert expected[2] == 1 and expected[0] < 1  # so the case tells something


def test_bytes_are_the_same_images():
    config, params, images = made()
    pixels = np.asarray(images * 255).astype(np.uint8)
    labels = logits_of(config, params, jnp.asarray(pixels / np.float32(255))).argmax(axis=1)
    np.testing.assert_allclose(analyses.truncated_accuracy(config, params, pixels, labels, [7]), 1, rtol=1e-6)


def test_most_positive_and_class_interactions():
    config, params, _ = made()
    spectrum, images = pixel_eigenvectors(config, params)
    got = analyses.most_positive(config, params, 2)
    np.testing.assert_array_equal(got[:, 0], images[:, -1])
    np.testing.assert_array_equal(got[:, 1], images[:, -2])
    q, table = forms(params), np.asarray(analyses.class_interactions(config, params))
    for a, c in itertools.product(range(3), repeat=2):
        v = np.linalg.eigh(q[a])[1][:, -1]
        np.testing.assert_allclose(table[a, c], v @ q[c] @ v, atol=1e-5)
    np.testing.assert_allclose(np.diag(table), spectrum.values[:, -1], atol=1e-5)


def test_similarity_is_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 2, 5)).astype(np.float32) for n in (4, 3))

    def cosine(x, y):
        return abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y)

    for second, pairs in ((None, itertools.combinations(a, 2)), (b, itertools.product(a, b))):
        expected = np.mean([[cosine(x[c], y[c]) for c in range(2)] for x, y in pairs], axis=0)
        given = (jnp.asarray(a),) if second is None else (jnp.asarray(a), jnp.asarray(b))
        np.testing.assert_allclose(analyses.eigenvector_similarity(*given), expected, atol=1e-6)
    with pytest.raises(ValueError, match="no pair among 1 models"):
        analyses.eigenvector_similarity(jnp.ones((1, 2, 5)))


@pytest.mark.parametrize("residual", [False, True])
def test_an_explanation_adds_up_to_the_logits(residual):
    config, params, images = made(residual)
    told = jax.vmap(lambda image: analyses.explain(config, params, image, k=2))(images)
    logits = logits_of(config, params, images)
    np.testing.assert_allclose(told.contributions.sum(axis=2) + told.others + told.around, logits, atol=1e-5)
    np.testing.assert_allclose(told.logits, logits, atol=1e-5)
    seen = np.einsum("nckp,np->nck", told.patterns, np.asarray(images)) ** 2
    np.testing.assert_allclose(told.contributions, np.asarray(told.values) * seen, atol=1e-5)
    spectrum, pixels = pixel_eigenvectors(config, params)
    seen = np.einsum("crp,np->ncr", pixels, np.asarray(images)) ** 2
    terms = np.abs(np.asarray(spectrum.values) * seen)
    np.testing.assert_allclose(np.abs(told.contributions), np.sort(terms)[:, :, :-3:-1], atol=1e-5)
    assert bool(jnp.any(told.around != 0)) == residual


def test_masks_stir_one_eigenvector_each():
    """With an orthogonal embedding W_e W_e^T = 1, so a mask meets its own eigenvector by 1 and the others by 0."""
    config, params, images = made(n_inputs=8, d_hidden=8)
    params = {**params, "w_e": jnp.linalg.qr(jax.random.normal(jax.random.key(2), (8, 8)))[0]}
    labels = np.arange(41) % 3
    masks = analyses.adversarial_masks(config, params, images, labels, k=2)
    met = analyses.most_positive(config, params, 2).reshape(6, 8) @ masks.reshape(6, 8).T
    np.testing.assert_allclose(jnp.abs(met), np.eye(6), atol=1e-4)
    for c, r in itertools.product(range(3), range(2)):
        others = np.mean([np.asarray(images)[labels == o].mean(axis=0) for o in range(3) if o != c], axis=0)
        assert masks[c, r] @ others > 0
    inside = np.arange(8) < 5
    part = analyses.adversarial_masks(config, params, images, labels, k=2, pixels=inside)
    assert not part[..., 5:].any()
    np.testing.assert_allclose(jnp.abs(part[..., :5]), jnp.abs(masks[..., :5]), atol=1e-6)


def test_scaled_permuted_and_accuracy_under_masks():
    config, params, images = made(residual=True)
    inside = np.arange(9) % 2 == 0
    masks = jnp.where(inside, jax.random.normal(jax.random.key(3), (2, 3, 9)), 0)
    scaled = analyses.scaled_masks(masks, 0.3)
    np.testing.assert_allclose(np.std(scaled, axis=-1), 0.3, rtol=1e-5)
    permuted = analyses.permuted_masks(jax.random.key(4), scaled, inside)
    np.testing.assert_array_equal(jnp.sort(permuted[..., inside]), jnp.sort(scaled[..., inside]))
    assert not permuted[..., ~inside].any()
    moved = np.asarray((permuted != scaled).reshape(6, 9))
    assert len({tuple(row) for row in moved}) > 1  # an order each
    labels = np.arange(41) % 3
    got = analyses.masked_accuracy(config, params, 10 * scaled, images, labels)
    for place in np.ndindex(2, 3):
        expected = (logits_of(config, params, images + 10 * scaled[place][None]).argmax(axis=1) == labels).mean()
        np.testing.assert_allclose(got[place], expected, atol=1e-6)
    assert len(np.unique(got)) > 1


def test_what_is_refused():
    config, params, images = made()
    labels = np.arange(41) % 3
    for ks in ([], [0], [8]):
        with pytest.raises(ValueError, match=r"each k must lie in 1 \.\.\. 7"):
            analyses.truncated_accuracy(config, params, images, labels, ks)
    masks = analyses.adversarial_masks(config, params, images, labels, k=1)[:, 0]
    for some, few in ((images, labels[1:]), (images[:, 1:], labels), (images[:0], labels[:0])):
        for run in (
            lambda *data: analyses.truncated_accuracy(config, params, *data, [1]),
            lambda *data: analyses.adversarial_masks(config, params, *data, k=1),
            lambda *data: analyses.masked_accuracy(config, params, masks, *data),
            lambda *data: accuracy(config, params, *data),
        ):
            with pytest.raises(
                ValueError, match=r"images \(.* and labels \(.* must have shapes \[n, 9\] and \[n\], n >= 1"
            ):
                run(some, few)
    with pytest.raises(ValueError, match=r"pixels must be \[9\] booleans, got shape \(4,\)"):
        analyses.adversarial_masks(config, params, images, labels, k=1, pixels=np.ones(4, bool))
    with pytest.raises(ValueError, match="masks must have 9 pixels"):
        analyses.masked_accuracy(config, params, masks[:, 1:], images, labels)
    with pytest.raises(ValueError, match="must agree in classes and pixels"):
        analyses.eigenvector_similarity(jnp.ones((2, 3, 9)), jnp.ones((2, 3, 8)))
    with pytest.raises(ValueError, match=r"k must lie in 1 \.\.\. 2"):
        analyses.adversarial_masks(config, params, images, labels, k=3)
    with pytest.raises(ValueError, match=r"no images of the classes \[2\]"):
        analyses.adversarial_masks(config, params, images, labels % 2, k=2)
    with pytest.raises(ValueError, match=r"k must lie in 1 \.\.\. 7 \(the eigenvectors of a class\), got 0"):
        analyses.explain(config, params, images[0], k=0)
    with pytest.raises(ValueError, match="one image of 9 pixels"):
        analyses.explain(config, params, images[0, :4])
