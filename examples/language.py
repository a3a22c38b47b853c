# %% [markdown]
# # Language modelling
#
# How SAE features make SAE features, read from the weights of a bilinear MLP. This is the language chapter of
# "Bilinear MLPs enable weight-based mechanistic interpretability" on the small model that ships with the package;
# for the paper's own, load "tdooms/fw-medium" and take layer 7 with expansion 8.

# %%
import jax

import bilinear_jax as bj

# %% [markdown]
# ## Setting up
# The model writes children's stories.

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
# ## Finding interesting output features
# Every output feature has an interaction matrix. A matrix with a few large eigenvalues has structure: rank all
# features by the sum of their two largest |eigenvalues|. (It is a heuristic.) They are found from the weights without
# building any matrix, each with a bound of its error and the share of the matrix that it explains; `exact=True`
# decomposes every matrix instead.

# %%
top = tracer.top_eigh(k=2)
scores = abs(top.values).sum(axis=1)
values, best = jax.lax.top_k(scores, 10)
for feature in best.tolist():
    error, share = float(top.bounds[feature].sum()), float(top.explained[feature])
    print(f"feature {feature}: {float(scores[feature]):.3f}, at most {error:.0e} off; it explains {share:.1%}")

# %% [markdown]
# Are any of them related? The cosines between their decoder columns tell.

# %%
cosines = bj.figures.heat_map(tracer.cosines(best), best, title="Cosines of the ten best")
cosines.savefig("cosines.png")

# %%
show_output(int(best[0]), int(best[1]), k=5)

# %% [markdown]
# ## Understanding feature interactions
# In the basis of the input SAE, entry (i, j) says how much input features i and j together make this output feature.
# Take the 50 largest entries of the whole matrix, and show the smallest sub-matrix that holds them.

# %%
feature = int(best[0])
matrix, inputs, explained = tracer.interaction_submatrix(feature, n=50)
print(f"{len(inputs)} input features hold {float(explained):.1%} of the squared interactions")
interactions = bj.figures.heat_map(matrix, inputs, title=f"What makes output feature {feature}")
interactions.savefig("interactions.png")

# %% [markdown]
# What are the two input features that interact most?

# %%
pair = tracer.top_interactions(n=1, feature=feature)
row, column = int(pair.i[0]), int(pair.j[0])
show_input(row, column, k=5)
