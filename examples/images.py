# %% [markdown]
# # Image classifiers
#
# What does each class of a bilinear image classifier look for? Its interaction matrix Q says it. With the eigenvectors
# v_m of Q and their eigenvalues l_m, the logit of the class is `x^T Q x = sum_m l_m (v_m . x)^2`. An eigenvector is an
# image. If its eigenvalue is positive, images that are like it (or like its negative) raise the logit; if it is
# negative, they lower it.
#
# This is the image chapter of "Bilinear MLPs enable weight-based mechanistic interpretability". It uses scikit-learn's
# digits, 8 x 8 pixels, which need no download. The paper's data are MNIST:
#
#     python examples/images.py --data mnist --folder <its IDX files> --epochs 30 --batch-size 2048

# %%
import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

import bilinear_jax as bj
from bilinear_jax.images import analyses
from bilinear_jax.images import figures as image_figures
from bilinear_jax.training.images import ImageRecipe, accuracy

# %% Options of the command line
parser = argparse.ArgumentParser(description="Image classifiers read from their weights.")
parser.add_argument("--data", default="digits", help="digits, mnist, fashion-mnist, or a folder's name of IDX files")
parser.add_argument("--folder", type=Path, help="where its IDX files are (default: what BILINEAR_JAX_DATA names)")
parser.add_argument("--download", action="store_true", help="fetch mnist or fashion-mnist into the folder")
parser.add_argument("--out", type=Path, default=Path("."), help="folder of the figures (default: this one)")
parser.add_argument("--hidden", type=int, default=128, help="width of the layer, at least 10 a class (default: 128)")
parser.add_argument("--epochs", type=int, default=200, help="passes over the images (default: 200)")
parser.add_argument("--batch-size", type=int, default=256, help="images an update (default: 256)")
options, _ = parser.parse_known_args()
options.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Training, with noise and without
# Four models are trained at once, in one program: two seeds with noise on the pixels and weight decay, and the same two
# seeds with neither. The effective rank says how many eigenvectors share the work: it is 1 if there is one.

# %%
data = bj.load_images(options.data, options.folder, download=options.download)
config = bj.ImageConfig(n_inputs=data.train_images.shape[1], d_hidden=options.hidden, n_classes=len(data.classes))
regimes = {"noise .5, weight decay 1": (0.5, 1.0), "neither": (0.0, 0.0)}
recipes = [
    ImageRecipe(epochs=options.epochs, batch_size=options.batch_size, noise=noise, weight_decay=decay, seed=seed)
    for noise, decay in regimes.values()
    for seed in (0, 1)
]
stacked = bj.train_images(config, recipes, data.train_images, data.train_labels)
models = [jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(len(recipes))]
test = data.test_images, data.test_labels
for name, params in zip(regimes, models[::2], strict=True):
    rank = float(analyses.effective_ranks(config, params).mean())
    print(f"{name}: accuracy {float(accuracy(config, params, *test)):.3f}, effective rank {rank:.1f}")

# %% [markdown]
# ## Eigenvectors of a class
# The spectrum of one class has a few large eigenvalues of either sign, and many near 0. With noise and weight decay the
# first eigenvector of a class is an image of what its members have in common. Without them it is harder to read:
# compare the two galleries. (On these small images, noise and weight decay cost some accuracy.) Blue pixels count for
# the pattern, red pixels against it.

# %%
params, bare = models[0], models[2]
shown = min(5, config.n_classes - 1)
spectrum, patterns = bj.pixel_eigenvectors(config, params)
image_figures.eigenspectrum(
    spectrum.values[shown], patterns[shown], data.shape, title=f"What makes {data.classes[shown]}"
).savefig(options.out / "images-spectrum.png")
for name, trained in {"gallery": params, "gallery-without-noise": bare}.items():
    found, seen = bj.pixel_eigenvectors(config, trained)
    image_figures.eigenvector_gallery(
        found.values[:, :-4:-1], seen[:, :-4:-1], data.shape, data.classes, title="The three most positive eigenvectors"
    ).savefig(options.out / f"images-{name}.png")

# %% [markdown]
# ## How few are enough?
# Each class keeps its k eigenvectors of largest |eigenvalue|, and the rest is dropped. A few give nearly the accuracy
# of the whole model.
#
# Does another seed find the same eigenvectors? The cosine between the first eigenvectors of two seeds says it: it is 1
# if they are the same image.

# %%
ks = [k for k in (1, 2, 5, 10, 20, 50) if k < config.d_hidden] + [config.d_hidden]
for k, share in zip(ks, analyses.truncated_accuracy(config, params, *test, ks), strict=True):
    print(f"{k:4} eigenvectors a class: accuracy {float(share):.3f}")
for name, pair in zip(regimes, (models[:2], models[2:]), strict=True):
    tops = jnp.stack([analyses.most_positive(config, trained)[:, 0] for trained in pair])
    print(f"{name}: |cosine| of the first between seeds {float(analyses.eigenvector_similarity(tops).mean()):.2f}")

# %% [markdown]
# ## One image explained
# The logit of one image is a sum with one term `l (v . x)^2` for each eigenvector. The figure shows the largest terms
# of three classes. The bar "rest" is the sum of all terms that are not shown. It is near 0: the eigenvectors that are
# shown explain these logits.

# %%
image = data.test_images[0]
told = analyses.explain(config, params, image)
image_figures.explanation(
    image,
    data.shape,
    data.classes,
    told.logits,
    told.values,
    told.patterns,
    told.contributions,
    told.others,
    label=int(data.test_labels[0]),
).savefig(options.out / "images-explanation.png")

# %% [markdown]
# ## Classes against classes
# Row a, column c: what the first eigenvector of class a, as the input of the layer, adds to the logit of class c. The
# diagonal holds the largest eigenvalues. A negative entry off it means that the pattern of one class is evidence
# against the other.

# %%
table = analyses.class_interactions(config, params)
bj.figures.heat_map(table, data.classes, title="From class (row) to class").savefig(options.out / "images-classes.png")

# %% [markdown]
# ## Masks from the weights
# If the eigenvectors are what the model looks for, an image made from them should mislead it. Each mask below is made
# to activate one of the most positive eigenvectors of a class, and the others as little as possible. It is added to
# every test image, in three strengths. The control is the same mask with its pixels permuted. Masks lower the accuracy
# more than their controls do.

# %%
k = min(3, config.d_hidden // config.n_classes)
masks = analyses.adversarial_masks(config, bare, data.train_images, data.train_labels, k=k)
clean = float(accuracy(config, bare, *test))
for std in (0.1, 0.2, 0.3):
    scaled = analyses.scaled_masks(masks, std)
    others = analyses.permuted_masks(jax.random.key(0), scaled)
    kinds = (analyses.masked_accuracy(config, bare, some, *test).mean() for some in (scaled, others))
    print("clean {:.3f}, masks of std {:.1f}: {:.3f}, permuted: {:.3f}".format(clean, std, *map(float, kinds)))
image_figures.eigenvector_gallery(None, masks, data.shape, data.classes, title="Masks of each class").savefig(
    options.out / "images-masks.png"
)

# %% [markdown]
# The published numbers of these analyses, beside ours on MNIST and Fashion-MNIST, are in `docs/results.md`. The next
# chapter, `language.py`, asks the same questions of a language model.
