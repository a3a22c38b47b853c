# %% [markdown]
# # Shared structure
#
# The language chapter explains one output feature at a time, by eigenvectors of its own. Do features share what they
# look for? "Bilinear MLPs enable weight-based mechanistic interpretability" ends by asking for decompositions that find
# out. This chapter tries two of them on the strongest output features of the small model that ships with the package:
#
# - the higher-order singular value decomposition (HOSVD): do the features span fewer directions than there are
#   features?
# - the canonical polyadic decomposition (CP): is there a set of products of two patterns that all features share?

# %%
import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

import bilinear_jax as bj
from bilinear_jax.show.drawing import NEGATIVE, POSITIVE, new_figure

# %% Options of the command line
parser = argparse.ArgumentParser(description="Structure that output features share.")
parser.add_argument("--out", type=Path, default=Path("."), help="folder of the figure (default: this one)")
parser.add_argument("--features", type=int, default=32, help="how many output features (default: 32)")
parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64], help="shared components (default: 4 16 64)")
parser.add_argument("--steps", type=int, default=30, help="sweeps of each decomposition (default: 30)")
options, _ = parser.parse_known_args()
options.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A tensor of some features
# With one output direction for each feature, the layer becomes a tensor of these features alone: only `down` changes.
# Every feature's interaction matrix is scaled to Frobenius norm 1, so that all features count alike. If two features
# had the same function, the cosine of their matrices would be 1.

# %%
lm = bj.load("ts-nano")
tracer = bj.Tracer(lm, layer=2, inp=dict(expansion=4), out=dict(expansion=4))
strength = abs(tracer.top_eigh(k=2).values).sum(axis=1)
chosen = jax.lax.top_k(strength, options.features)[1]
directions = tracer.directions[chosen]
tensor = tracer.tensor.out_basis(directions / tracer.tensor.norms(directions)[:, None])
each = jnp.eye(options.features)
cosines = tensor.cosines(each) - each
print(f"{options.features} features; the cosine of two interaction matrices is {float(abs(cosines).max()):.2f} at most")

# %% [markdown]
# ## HOSVD: do the features span few directions?
# HOSVD finds directions in the space of the features, ordered by how much of the tensor lies along each. If every
# feature had a function of its own, unrelated to all others, each direction would hold the same share.

# %%
singular = bj.hosvd(tensor).singular_values
shares = jnp.cumsum(singular**2) / jnp.sum(singular**2)
for n in (1, options.features // 4, options.features // 2):
    even = n / options.features
    print(f"HOSVD: {n} of {options.features} directions hold {float(shares[n - 1]):.1%}; evenly, they would {even:.1%}")

# %% [markdown]
# ## Eigenvectors of each feature, or components of all
# There are two ways to approximate the tensor B by some C. One keeps k eigenvectors of each feature: that is the best
# that patterns of its own can do. The other keeps components of CP. A component has two patterns, and a weight for
# every feature. Both are compared by the share that they explain, `1 - |B - C|^2 / |B|^2`, at the same cost: how many
# numbers they store.
#
# The control is a tensor with the same eigenvalues, in which the eigenvectors of each feature are rotated at random, so
# that nothing is shared. What CP explains of the control, it explains without any shared structure.

# %%
spectrum = bj.spectra.eigh(tensor, each)
squares = jnp.sort(spectrum.values**2, axis=1)[:, ::-1]
ks = [1, 2, 4, 8]
per_feature = [float(squares[:, :k].sum() / squares.sum()) for k in ks]
numbers_each = [k * options.features * (tensor.n_in + 1) for k in ks]

decompose = jax.jit(bj.cp.cp_als, static_argnums=(1,), static_argnames=("steps",))
found = {rank: decompose(tensor, rank, jax.random.key(0), steps=options.steps) for rank in options.ranks}
shared = [float(one.similarity) ** 2 for one in found.values()]
numbers_shared = [rank * (2 * tensor.n_in + options.features) for rank in options.ranks]

noise = jax.random.normal(jax.random.key(1), (options.features, tensor.n_in, tensor.n_in))
turned = jnp.swapaxes(jnp.linalg.qr(noise)[0], 1, 2).reshape(-1, tensor.n_in)  # an eigenvector a row
control = bj.BilinearTensor(turned, spectrum.values.reshape(-1, 1) * turned, jnp.repeat(each, tensor.n_in, axis=1))
most = max(options.ranks)
nothing_shared = float(decompose(control, most, jax.random.key(0), steps=options.steps).similarity) ** 2

for number, k, share in zip(numbers_each, ks, per_feature, strict=True):
    print(f"{number:6,} numbers: {k} eigenvectors a feature explain {share:.1%}")
for number, rank, share in zip(numbers_shared, options.ranks, shared, strict=True):
    print(f"{number:6,} numbers: {rank} shared components explain {share:.1%}")
print(f"{numbers_shared[-1]:6,} numbers: {most} components of the control explain {nothing_shared:.1%}")

# %%
figure = new_figure(6.4, 4.0)
axes = figure.subplots()
axes.plot(numbers_shared, shared, color=POSITIVE, marker="o", label="components that all features share (CP)")
axes.plot(numbers_each, per_feature, color=NEGATIVE, marker="s", label="eigenvectors of each feature")
axes.plot(
    [numbers_shared[options.ranks.index(most)]], [nothing_shared], color="0.5", marker="x", linestyle="none",
    label="CP of the control, where nothing is shared",
)  # fmt: skip
axes.set_xscale("log", base=2)
axes.xaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
axes.set_ylim(bottom=0)
axes.set_xlabel("numbers stored")
axes.set_ylabel("share of the interactions explained")
axes.legend(frameon=False, loc="upper left")
axes.spines[["top", "right"]].set_visible(False)
figure.suptitle(f"The {options.features} strongest features of layer 2", x=0.02, ha="left", fontsize=12)
figure.set_layout_engine("constrained")
figure.savefig(options.out / "decomposition.png")

# %% [markdown]
# ## Are components found again?
# A component means something only if another start finds it again. `match` pairs the components of two runs; a cosine
# of 1 says that both found the same one.

# %%
rank = options.ranks[0]
again = decompose(tensor, rank, jax.random.key(7), steps=options.steps)
same = bj.cp.match(found[rank], again)
print(f"{rank} components from another start: cosines {[round(float(cosine), 2) for cosine in same.cosines]}")

# %% [markdown]
# ## What the largest components read and write
# A component works like a hidden unit: it multiplies the dot products of two patterns with the input, and adds the
# result to every feature with a weight. Below, a pattern is described by the input features whose decoder columns have
# the largest |cosine| with it.

# %%
decoder = tracer.inp.decoder / jnp.linalg.norm(tracer.inp.decoder, axis=0, keepdims=True)


def nearest(pattern: jax.Array) -> str:
    cosines = pattern @ decoder
    best = jax.lax.top_k(abs(cosines), 3)[1].tolist()
    return ", ".join(f"{feature} ({float(cosines[feature]):+.2f})" for feature in best)


for number in range(min(3, rank)):
    parts = found[rank].tensor
    weights = parts.down[:, number]
    written = jax.lax.top_k(abs(weights), 4)[1].tolist()
    print(f"component {number}: {nearest(parts.left[number])} times {nearest(parts.right[number])}")
    print("   makes " + ", ".join(f"{int(chosen[f])} ({float(weights[f]):+.2f})" for f in written))

# %% [markdown]
# ## What to keep in mind
# With the default options, 64 shared components explain more than four eigenvectors of each feature do, at about the
# same cost, and more than they explain of the control. So these features share some structure. But both leave most of
# the tensor unexplained, and not every component is found again from another start. `docs/results.md` has the same for
# more features and more components.
