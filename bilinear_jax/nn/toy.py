"""Toy models: one bilinear layer that learns boolean functions of all pairs of its inputs.

    y = W_p ((W_l x + b_l) * (W_r x + b_r)) + b_p        x in {0, 1}^n, an output for each pair i < j

What such a layer learns can be checked by eye: the interaction matrix of the output for (i, j) should be that of the
function of x_i and x_j, and nothing else.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", and the toy chapter
of its code.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

from bilinear_jax.nn.attention import linear
from bilinear_jax.nn.configs import check_types

TABLES = {
    "and": (0, 0, 0, 1),
    "or": (0, 1, 1, 1),
    "xor": (0, 1, 1, 0),
    "nand": (1, 1, 1, 0),
    "nor": (1, 0, 0, 0),
    "xnor": (1, 0, 0, 1),
}
"""Each function's values at (0, 0), (0, 1), (1, 0) and (1, 1)."""


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """The shape of a toy model and what it learns; hashable, so it can be a static argument of ``jit``."""

    n_inputs: int = 5  # boolean inputs
    d_hidden: int = 10  # hidden units; 5 inputs have 10 pairs
    tasks: tuple[tuple[str, float], ...] = (("and", 1.0),)  # functions, each with its share of the target
    bias: bool = False  # b_l, b_r and b_p; nand, nor and xnor need one, because they are 1 at (0, 0)

    def __post_init__(self):
        check_types(self)
        if self.n_inputs < 2 or self.d_hidden < 1:
            raise ValueError(
                f"a toy needs at least 2 inputs and 1 hidden unit, got {self.n_inputs} and {self.d_hidden}"
            )
        unknown = [name for name, _ in self.tasks if name not in TABLES]
        if unknown or not self.tasks:
            raise ValueError(f"unknown tasks {unknown}: give at least one of {', '.join(TABLES)}, each with its share")
        if not self.bias and (needy := [name for name, _ in self.tasks if TABLES[name][0]]):
            raise ValueError(
                f"{', '.join(needy)} of (0, 0) is 1, but a layer without a bias gives 0 there: set bias=True"
            )

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The two inputs of each output: i < j."""
        return tuple((i, j) for i in range(self.n_inputs) for j in range(i + 1, self.n_inputs))


def toy_targets(config: ToyConfig, x: Shaped[Array, "*batch n_inputs"]) -> Float[Array, "*batch pairs"]:
    """The right output for inputs of 0 and 1: for each pair, the sum of all tasks, each times its share.

    Example:
        >>> config = ToyConfig(n_inputs=3, tasks=(("and", 1.0), ("xor", 0.5)))
        >>> toy_targets(config, jnp.array([1.0, 1.0, 0.0])).tolist()  # of (0, 1), (0, 2) and (1, 2)
        [1.0, 0.5, 0.5]
    """
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    first, second = (x[..., jnp.array(part)] for part in zip(*config.pairs, strict=True))
    target = jnp.zeros_like(first)
    for name, share in config.tasks:
        neither, second_alone, first_alone, both = TABLES[name]
        value = neither * (1 - first) * (1 - second) + second_alone * (1 - first) * second
        target = target + share * (value + first_alone * first * (1 - second) + both * first * second)
    return target


class Toy(nn.Module):
    """The toy model as a Flax module: ``[..., n_inputs]`` to ``[..., pairs]``.

    Params: ``w_l, w_r [d_hidden, n_inputs]``, ``w_p [pairs, d_hidden]``, and with a bias ``b_l, b_r, b_p``. As a
    tensor: ``BilinearTensor.from_mlp(w_l, w_r, w_p, b_l, b_r, b_p)``.
    """

    config: ToyConfig

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch n_inputs"]) -> Float[Array, "*batch pairs"]:
        c = self.config
        outputs = len(c.pairs)
        shapes = {"l": (c.d_hidden, c.n_inputs), "r": (c.d_hidden, c.n_inputs), "p": (outputs, c.d_hidden)}
        weights = {s: self.param(f"w_{s}", nn.initializers.normal(1 / math.sqrt(n[1])), n) for s, n in shapes.items()}
        biases = dict.fromkeys(shapes)
        if c.bias:
            biases = {s: self.param(f"b_{s}", nn.initializers.zeros, n[:1]) for s, n in shapes.items()}
        product = linear(x, weights["l"], biases["l"]) * linear(x, weights["r"], biases["r"])
        return linear(product, weights["p"], biases["p"])
