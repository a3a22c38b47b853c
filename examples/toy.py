# %% [markdown]
# # Toy models
#
# One bilinear layer learns boolean functions of all pairs of its inputs. What it has learned can be read from its
# weights by eye, once they are symmetrised. This is the toy chapter of "Bilinear MLPs enable weight-based
# mechanistic interpretability".

# %%
import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from bilinear_jax.image_figures import interactions_beside
from bilinear_jax.nn.toy import ToyConfig
from bilinear_jax.tensor import BilinearTensor
from bilinear_jax.training.toy import ToyRecipe, train_toy

parser = argparse.ArgumentParser(description="Toy models of boolean functions, and their interaction matrices.")
parser.add_argument("--out", type=Path, default=Path("."), help="folder of the figures (default: this one)")
parser.add_argument("--steps", type=int, default=2000, help="updates in training, a multiple of 100 (default: 2000)")
options, _ = parser.parse_known_args()
options.out.mkdir(parents=True, exist_ok=True)
recipe = ToyRecipe(steps=options.steps)

# %% [markdown]
# ## Inputs and their pairs
# Four inputs are 0 or 1. For each of their six pairs there is an output, which should be a function of the two. "and"
# is x_i x_j; "xor" is x_i + x_j - 2 x_i x_j, and as x is x^2 for 0 and 1, that is a quadratic form as well:
# 1 on the diagonal at i and j, and -1 off it. A mix has a share of each.

# %%
tasks = {
    "and": (("and", 1.0),),
    "or": (("or", 1.0),),
    "xor": (("xor", 1.0),),
    "and + 0.5 xor": (("and", 1.0), ("xor", 0.5)),
}


def quadratic(config: ToyConfig, symmetric: bool) -> jax.Array:
    """Train a model, and return the interaction matrices of all its outputs."""
    params = jax.tree.map(lambda leaf: leaf[0], train_toy(config, recipe))
    layer = BilinearTensor.from_mlp(*(params.get(name) for name in ("w_l", "w_r", "w_p", "b_l", "b_r", "b_p")))
    return layer.interaction(jnp.eye(len(config.pairs)), symmetric=symmetric)


# %% [markdown]
# ## Raw and symmetrised
# The weights as they are say little: w_l and w_r may divide an interaction between them as they like. The symmetric
# part is all that acts on inputs, and in it the function can be read off.

# %%
for name, shares in tasks.items():
    config = ToyConfig(n_inputs=4, tasks=shares)
    matrices = quadratic(config, symmetric=False)
    pairs = [f"{name} of x{i}, x{j}" for i, j in config.pairs]
    figure = interactions_beside(matrices[:3], pairs[:3], [f"x{i}" for i in range(4)])
    figure.savefig(options.out / f"toy-{name.replace(' + 0.5 ', '-')}.png")
    first = (matrices[0] + matrices[0].T) / 2
    print(f"{name} of x0 and x1: {first[0, 0]:.2f} x0^2 + {first[1, 1]:.2f} x1^2 + {2 * first[0, 1]:.2f} x0 x1")

# %% [markdown]
# ## With a bias
# "nor" is 1 where both are 0: (1 - x_i) (1 - x_j). A layer without a bias gives 0 there. With one, the constant 1 is
# one more input, the last: its row and column hold the terms of degree 1, halved, and its corner that of degree 0. As
# x is x^2 for 0 and 1, an input's place on the diagonal and its two in the last row and column are one term: they add
# up to -1 for the two inputs of an output, and to 0 for the rest.

# %%
config = ToyConfig(n_inputs=4, tasks=(("nor", 1.0),), bias=True)
matrices = quadratic(config, symmetric=False)
figure = interactions_beside(
    matrices[:3], [f"nor of x{i}, x{j}" for i, j in config.pairs[:3]], [*(f"x{i}" for i in range(4)), "1"]
)
figure.savefig(options.out / "toy-nor.png")
