# %% [markdown]
# # Language modelling
#
# A sparse autoencoder (SAE) writes an activation as a sum of a few features out of many. With one SAE on the input of
# an MLP and another on its output, the question becomes: how do input features make an output feature? If the MLP is
# bilinear, its weights answer it, and no data are needed.
#
# This is the language chapter of "Bilinear MLPs enable weight-based mechanistic interpretability", on the small model
# that ships with the package. For the paper's own model, load "tdooms/fw-medium" and take layer 7 with expansion 8.

# %%
import jax

import bilinear_jax as bj

# %% [markdown]
# ## The model
# `ts-nano` has four layers and writes children's stories.

# %%
lm = bj.load("ts-nano")
print(lm.generate("Once upon a time", max_length=60, temperature=0.7))

# %% [markdown]
# `Tracer` puts an SAE on either side of a layer's MLP. `Visualizer` shows what a feature fires on.

# %%
tracer = bj.Tracer(lm, layer=2, inp=dict(expansion=4), out=dict(expansion=4))
show_input = bj.Visualizer(lm, tracer.inp)
show_output = bj.Visualizer(lm, tracer.out)

# %% [markdown]
# ## Which output features have structure?
# Every output feature has an interaction matrix Q: with x the input of the MLP, its pre-activation is `x^T Q x`, up to
# a constant. A matrix with a few large eigenvalues has structure, so we rank all features by the sum of their two
# largest |eigenvalues|. (This is a heuristic.)
#
# The eigenvalues are found without building any matrix. Each comes with a bound of its error, and with the share of
# the matrix that it explains. With `exact=True` every matrix is built and decomposed instead.

# %%
top = tracer.top_eigh(k=2)
scores = abs(top.values).sum(axis=1)
values, best = jax.lax.top_k(scores, 10)
for feature in best.tolist():
    error, share = float(top.bounds[feature].sum()), float(top.explained[feature])
    print(f"feature {feature}: {float(scores[feature]):.3f}, at most {error:.0e} off; it explains {share:.1%}")

# %% [markdown]
# Are any of the ten related? Their decoder columns say it: a cosine near 1 means that two features stand for almost
# the same thing.

# %%
cosines = bj.figures.heat_map(tracer.cosines(best), best, title="Cosines of the ten best")
cosines.savefig("cosines.png")

# %% [markdown]
# What do the best two fire on? For each: the tokens that it raises and lowers in the model's output, and the places of
# a text where its activation is largest. The token in brackets is the one at which it fires.

# %%
show_output(int(best[0]), int(best[1]), k=5)

# %% [markdown]
# ## Which input features make it?
# Write Q in the basis of the input SAE: with D its decoder, entry (i, j) of `D^T Q D` says how much input features i
# and j together raise the output feature. The matrix is large (here 1,024 by 1,024), so take its 50 largest entries,
# and show the smallest sub-matrix that holds them.

# %%
feature = int(best[0])
matrix, inputs, explained = tracer.interaction_submatrix(feature, n=50)
print(f"{len(inputs)} input features hold {float(explained):.1%} of the squared interactions")
interactions = bj.figures.heat_map(matrix, inputs, title=f"What makes output feature {feature}")
interactions.savefig("interactions.png")

# %% [markdown]
# Which two input features interact most? They can be the same feature twice: then the output feature grows with the
# square of that one feature.

# %%
pair = tracer.top_interactions(n=1, feature=feature)
row, column = int(pair.i[0]), int(pair.j[0])
print(f"input features {row} and {column}: {float(pair.value[0]):+.3f}")
show_input(row, column, k=5)

# %% [markdown]
# ## What to keep in mind
# The share that was printed above the figure is small: many small interactions make up the rest of the matrix. And an
# interaction acts only where both of its features fire. Whether it explains an activation is a question about data.
# The guide "Explain one activation" splits the activation at one token of your own sentence exactly into such terms,
# and `docs/results.md` measures how far pairs of features explain the output features of this model.
