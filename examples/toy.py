# %% [markdown]
# # Toy models
#
# A bilinear layer computes `y = w_p ((w_l x) * (w_r x))`. For every output u there is a matrix Q, its interaction
# matrix, with `y_u = x^T Q x`: entry (i, j) says how much inputs i and j together raise the output. In this chapter a
# layer learns boolean functions of pairs of its inputs. We know the right Q for each of them, so we can check that the
# weights say what the layer does.
#
# This is the toy chapter of "Bilinear MLPs enable weight-based mechanistic interpretability"
# ([arXiv 2410.08417](https://arxiv.org/abs/2410.08417)).

# %%
import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

import bilinear_jax as bj
from bilinear_jax.images.figures import interactions_beside
from bilinear_jax.training.toy import ToyRecipe, train_toy

# %% Options of the command line
parser = argparse.ArgumentParser(description="Toy models of boolean functions, and their interaction matrices.")
parser.add_argument("--out", type=Path, default=Path("."), help="folder of the figures (default: this one)")
parser.add_argument("--steps", type=int, default=2000, help="updates in training, a multiple of 100 (default: 2000)")
options, _ = parser.parse_known_args()
options.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The task
# There are four inputs, and each is 0 or 1. There are six pairs of inputs, and an output for each pair. The output
# should be a boolean function of its pair. These functions are quadratic forms, because `x^2 = x` for 0 and 1:
#
#     and   x_i x_j
#     or    x_i + x_j - x_i x_j
#     xor   x_i + x_j - 2 x_i x_j
#
# So the matrix of "xor" should have 1 on the diagonal at i and j, and -1 at (i, j) and (j, i). The last task is a
# weighted sum of two functions.

# %%
tasks = {
    "and": (("and", 1.0),),
    "or": (("or", 1.0),),
    "xor": (("xor", 1.0),),
    "and + 0.5 xor": (("and", 1.0), ("xor", 0.5)),
}
recipe = ToyRecipe(steps=options.steps)


def interaction_matrices(config: bj.ToyConfig) -> jax.Array:
    """Train a layer, and return the interaction matrices of its outputs, as the weights have them: [pairs, in, in]."""
    params = jax.tree.map(lambda leaf: leaf[0], train_toy(config, recipe))  # the first, and only, seed
    layer = bj.BilinearTensor.from_mlp(*(params.get(name) for name in ("w_l", "w_r", "w_p", "b_l", "b_r", "b_p")))
    return layer.interaction(jnp.eye(len(config.pairs)), symmetric=False)


# %% [markdown]
# ## What the weights say, before and after symmetrising
# In each figure, the upper row is `w_l^T diag(w_p[u]) w_r`: the product of the weights as they were trained. It is hard
# to read, because the two sides `w_l` and `w_r` can share an interaction in many ways: only the sum of entries (i, j)
# and (j, i) acts on the output. The lower row is the symmetric part, which has half of that sum at both places. Now
# the function can be read off.

# %%
for name, shares in tasks.items():
    config = bj.ToyConfig(n_inputs=4, tasks=shares)
    matrices = interaction_matrices(config)
    titles = [f"{name} of x{i}, x{j}" for i, j in config.pairs[:3]]
    figure = interactions_beside(matrices[:3], titles, [f"x{i}" for i in range(4)])
    figure.savefig(options.out / f"toy-{name.replace(' + 0.5 ', '-')}.png")
    first = (matrices[0] + matrices[0].T) / 2
    print(f"{name} of x0 and x1: {first[0, 0]:.2f} x0^2 + {first[1, 1]:.2f} x1^2 + {2 * first[0, 1]:.2f} x0 x1")

# %% [markdown]
# ## With a bias
# "nor" is 1 where both inputs are 0: `(1 - x_i) (1 - x_j) = 1 - x_i - x_j + x_i x_j`. A layer without a bias gives 0
# there. With biases, the constant 1 is one more input, the last. Its row and column hold the linear terms, each
# divided between two entries. Its corner holds the constant.
#
# As `x^2 = x`, the diagonal entry of an input and its two entries in the last row and column are the same term, and
# training may share it out between them in any way. Their sum is -1 for the two inputs of an output, and 0 for the
# other inputs.

# %%
config = bj.ToyConfig(n_inputs=4, tasks=(("nor", 1.0),), bias=True)
matrices = interaction_matrices(config)
titles = [f"nor of x{i}, x{j}" for i, j in config.pairs[:3]]
figure = interactions_beside(matrices[:3], titles, [*(f"x{i}" for i in range(4)), "1"])
figure.savefig(options.out / "toy-nor.png")
first = (matrices[0] + matrices[0].T) / 2
linear = jnp.diagonal(first)[:4] + 2 * first[4, :4]
print("linear terms of the first output:", ", ".join(f"{float(term):+.2f} x{i}" for i, term in enumerate(linear)))

# %% [markdown]
# ## What to remember
# An interaction matrix is read from the weights, and only its symmetric part says what the layer computes.
# `BilinearTensor.interaction` symmetrises unless it is told not to, and everything else in this package works on the
# symmetric part. The next chapter, `images.py`, does the same for a layer with hundreds of inputs, where nobody can
# read a matrix entry by entry: its eigenvectors take their place.
