"""Image classifiers: the golden case, tensors of every kind of model against the model itself."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.images.tensor import image_tensor, pixel_eigenvectors
from bilinear_jax.nn.image import ImageClassifier, ImageConfig
from bilinear_jax.tensor import with_constant


@pytest.fixture(scope="module")
def micro():
    from safetensors.numpy import load_file

    arrays = load_file(Path(__file__).parents[1] / "data" / "image-micro.safetensors")
    layers = {"w_l": arrays["w_l"], "w_r": arrays["w_r"]}
    params = jax.tree.map(jnp.asarray, {"w_e": arrays["embed"], "layers": layers, "w_u": arrays["w_u"]})
    return ImageConfig(n_inputs=49, d_hidden=16, n_classes=10), params, arrays


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=5e-5, atol=5e-5)


def test_the_golden_case(micro):
    config, params, arrays = micro
    x = jnp.asarray(arrays["x"])
    close(ImageClassifier(config).apply({"params": params}, x), arrays["logits"])
    spectrum, images = pixel_eigenvectors(config, params)
    close(spectrum.values, arrays["eigenvalues"])
    close(jnp.abs(images), arrays["pixel_eigenvectors_abs"])
    close(jnp.einsum("cr,ncr->nc", spectrum.values, jnp.einsum("crp,np->ncr", images, x) ** 2), arrays["logits"])


def made(**options):
    config = ImageConfig(n_inputs=9, d_hidden=5, n_classes=3, **options)
    x = jax.random.uniform(jax.random.key(1), (7, 9))
    return config, ImageClassifier(config).init(jax.random.key(0), x)["params"], x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("basis", ["hidden", "pixels"])
def test_one_layer_is_its_tensor(bias, residual, basis):
    config, params, x = made(bias=bias, residual=residual)
    tensor = image_tensor(config, params, basis=basis, residual=residual)
    inputs = x if basis == "pixels" else x @ params["w_e"].T
    inputs = with_constant(inputs) if bias or residual else inputs
    close(tensor.apply(inputs), ImageClassifier(config).apply({"params": params}, x))


def test_without_its_residual_a_tensor_lacks_what_is_linear():
    config, params, x = made(residual=True)
    left_out = ImageClassifier(config).apply({"params": params}, x) - image_tensor(
        config, params, basis="pixels"
    ).apply(x)
    close(left_out, x @ params["w_e"].T @ params["w_u"].T)


@pytest.mark.parametrize("residual", [False, True])
def test_layers_of_a_deeper_model_follow_each_other(residual):
    config, params, x = made(n_layer=3, bias=True, residual=residual)
    h = image_tensor(config, params, 0, "pixels", residual=residual).apply(with_constant(x))
    h = image_tensor(config, params, 1, residual=residual).apply(with_constant(h))
    logits = image_tensor(config, params, residual=residual).apply(with_constant(h))
    close(logits, ImageClassifier(config).apply({"params": params}, x))


def test_what_is_refused():
    config, params, x = made(n_layer=2)
    with pytest.raises(ValueError, match="higher degree than 2 in the pixels"):
        image_tensor(config, params, 1, "pixels")
    with pytest.raises(UnknownNameError, match=r"no layer 2 in this classifier: choose one of -2 \.\.\. 1"):
        image_tensor(config, params, 2)
    with pytest.raises(ValueError, match="has no residual"):
        image_tensor(config, params, residual=True)
    with pytest.raises(ValueError, match=r"w_e and w_u have shapes .* give the config of these params"):
        image_tensor(dataclasses.replace(config, n_inputs=config.n_inputs + 1), params)
    with pytest.raises(ValueError, match="basis must be one of 'hidden', 'pixels'"):
        image_tensor(config, params, 0, "pixel")
    with pytest.raises(ValueError, match="one bilinear layer without biases"):
        pixel_eigenvectors(config, params)
    with pytest.raises(ValueError, match="their last axis must be 9 pixels"):
        ImageClassifier(config).apply({"params": params}, x[:, :4])
    with pytest.raises(ValueError, match="d_hidden must be at least 1"):
        ImageConfig(d_hidden=0)
