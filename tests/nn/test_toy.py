"""Toy models: the golden case, truth tables, and that what is learnt can be read from the weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from bilinear_jax.nn.toy import TABLES, Toy, ToyConfig, toy_targets
from bilinear_jax.tensor import BilinearTensor
from bilinear_jax.training.toy import ToyRecipe, train_toy


def test_the_golden_case():
    arrays = load_file(Path(__file__).parent.parent / "data" / "image-micro.safetensors")
    config = ToyConfig(n_inputs=4, d_hidden=6, tasks=(("and", 1.0), ("xor", 0.5)))
    params = {f"w_{side}": jnp.asarray(arrays[f"toy_w_{side}"]) for side in "lrp"}
    x = jnp.asarray(arrays["toy_inputs"], jnp.float32)
    np.testing.assert_allclose(Toy(config).apply({"params": params}, x), arrays["toy_out"], rtol=5e-5, atol=5e-5)
    np.testing.assert_array_equal(toy_targets(config, x), arrays["toy_targets"])


@pytest.mark.parametrize(
    ("name", "function"),
    {
        "and": lambda a, b: a and b,
        "or": lambda a, b: a or b,
        "xor": lambda a, b: a != b,
        "nand": lambda a, b: not (a and b),
        "nor": lambda a, b: not (a or b),
        "xnor": lambda a, b: a == b,
    }.items(),
)
def test_every_task_is_its_function(name, function):
    config = ToyConfig(n_inputs=3, tasks=((name, 2.0),), bias=True)
    for number in range(8):
        x = [number >> bit & 1 for bit in range(3)]
        wanted = [2.0 * bool(function(x[i], x[j])) for i, j in config.pairs]
        assert toy_targets(config, jnp.asarray(x, jnp.float32)).tolist() == wanted


@pytest.mark.parametrize("tasks", [(("and", 1.0),), (("xor", 1.0),), (("nor", 1.0), ("and", 0.5))])
def test_what_it_learns_is_in_its_interaction_matrices(tasks):
    """On inputs of 0 and 1, x_i^2 = x_i: the diagonal is what an input does alone."""
    bias = "nor" in dict(tasks)
    config = ToyConfig(n_inputs=4, d_hidden=16, tasks=tasks, bias=bias)
    params = jax.tree.map(lambda leaf: leaf[1], train_toy(config, ToyRecipe(steps=1500), seeds=(0, 1)))
    tensor = BilinearTensor.from_mlp(*(params.get(f"{kind}_{side}") for kind in "wb" for side in "lrp"))
    q = np.asarray(tensor.interaction(jnp.eye(len(config.pairs))))
    for number, (i, j) in enumerate(config.pairs):
        # f(x) = c + a (x_i + x_j) + b x_i x_j
        c = sum(share * TABLES[task][0] for task, share in config.tasks)
        a = sum(share * TABLES[task][1] for task, share in config.tasks) - c
        b = sum(share * TABLES[task][3] for task, share in config.tasks) - c - 2 * a
        alone = q[number].diagonal()[:4] + (2 * q[number][:4, 4] if bias else 0)
        wanted = np.zeros((4, 4))
        wanted[i, i] = wanted[j, j] = a
        wanted[i, j] = wanted[j, i] = b / 2
        got = q[number][:4, :4].copy()
        np.fill_diagonal(got, alone)
        np.testing.assert_allclose(got, wanted, atol=0.05)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"unknown tasks \['nope'\]"):
        ToyConfig(tasks=(("nope", 1.0),))
    with pytest.raises(ValueError, match=r"nor of \(0, 0\) is 1, but a layer without a bias gives 0"):
        ToyConfig(tasks=(("nor", 1.0),))
    with pytest.raises(ValueError, match="at least 2 inputs"):
        ToyConfig(n_inputs=1)
    with pytest.raises(ValueError, match="multiple of 100"):
        ToyRecipe(steps=150)
    with pytest.raises(ValueError, match="there are no seeds: give at least one"):
        train_toy(ToyConfig(), seeds=())
