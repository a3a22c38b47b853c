# %% [markdown]
# # Image classifiers
#
# What a bilinear layer looks for, read from its weights: the eigenvectors of each class's interaction matrix are
# images. This is the image chapter of "Bilinear MLPs enable weight-based mechanistic interpretability". By default on
# scikit-learn's digits (8 x 8), which need no download; for the paper's own:
#
#     python examples/images.py --data mnist --folder <its IDX files> --epochs 30 --batch-size 2048

# %%
import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from bilinear_jax import figures, image_analyses, image_figures
from bilinear_jax.images import pixel_eigenvectors
from bilinear_jax.nn.image import ImageConfig, unit_range
from bilinear_jax.training.image_data import load_images
from bilinear_jax.training.images import ImageRecipe, accuracy, train_images

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
# Four models at once: two seeds with noise on the pixels and weight decay, and the same two with neither.

# %%
data = load_images(options.data, options.folder, download=options.download)
config = ImageConfig(n_inputs=data.train_images.shape[1], d_hidden=options.hidden, n_classes=len(data.classes))
regimes = {"noise .5, weight decay 1": (0.5, 1.0), "neither": (0.0, 0.0)}
recipes = [
    ImageRecipe(epochs=options.epochs, batch_size=options.batch_size, noise=noise, weight_decay=decay, seed=seed)
    for noise, decay in regimes.values()
    for seed in (0, 1)
]
stacked = train_images(config, recipes, data.train_images, data.train_labels)
models = [jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(len(recipes))]
test = data.test_images, data.test_labels
for name, params in zip(regimes, models[::2], strict=True):
    rank = float(image_analyses.effective_ranks(config, params).mean())
    print(f"{name}: accuracy {float(accuracy(config, params, *test)):.3f}, effective rank {rank:.1f}")

# %% [markdown]
# ## Eigenvectors
# With noise and weight decay the first eigenvector of a class is an image of what is common to the class; without
# them it is harder to read.

# %%
params, bare = models[0], models[2]
shown = min(5, config.n_classes - 1)
spectrum, patterns = pixel_eigenvectors(config, params)
image_figures.eigenspectrum(
    spectrum.values[shown], patterns[shown], data.shape, title=f"What makes {data.classes[shown]}"
).savefig(options.out / "images-spectrum.png")
for name, trained in {"gallery": params, "gallery-without-noise": bare}.items():
    found, seen = pixel_eigenvectors(config, trained)
    image_figures.eigenvector_gallery(
        found.values[:, :-4:-1], seen[:, :-4:-1], data.shape, data.classes, title="The three most positive eigenvectors"
    ).savefig(options.out / f"images-{name}.png")

# %% [markdown]
# How few of them are enough? Each class keeps its k largest |eigenvalues|. And does another seed find the same?

# %%
ks = [k for k in (1, 2, 5, 10, 20, 50) if k < config.d_hidden] + [config.d_hidden]
for k, share in zip(ks, image_analyses.truncated_accuracy(config, params, *test, ks), strict=True):
    print(f"{k:4} eigenvectors a class: accuracy {float(share):.3f}")
for name, pair in zip(regimes, (models[:2], models[2:]), strict=True):
    tops = jnp.stack([image_analyses.most_positive(config, trained)[:, 0] for trained in pair])
    print(
        f"{name}: |cosine| of the first between seeds {float(image_analyses.eigenvector_similarity(tops).mean()):.2f}"
    )

# %% [markdown]
# ## One image explained
# A logit is a sum of one term an eigenvector, l (p . x)^2. Few of them matter; what isn't shown is in the bar "rest".

# %%
image = unit_range(jnp.asarray(data.test_images[0]))
told = image_analyses.explain(config, params, image)
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
# Row a, column c: what the first eigenvector of class a adds to the logit of class c.

# %%
table = image_analyses.class_interactions(config, params)
figures.heat_map(table, data.classes, title="From class (row) to class").savefig(options.out / "images-classes.png")

# %% [markdown]
# ## Masks from the weights
# A column of the pseudo-inverse of all classes' eigenvectors is a mask that stirs one of them and leaves the others.
# Added to every image, it misleads more than its own pixels in another order do.

# %%
k = min(3, config.d_hidden // config.n_classes)
masks = image_analyses.adversarial_masks(config, bare, data.train_images, data.train_labels, k=k)
clean = float(accuracy(config, bare, *test))
for std in (0.1, 0.2, 0.3):
    scaled = image_analyses.scaled_masks(masks, std)
    others = image_analyses.permuted_masks(jax.random.key(0), scaled)
    kinds = (image_analyses.masked_accuracy(config, bare, some, *test).mean() for some in (scaled, others))
    print("clean {:.3f}, masks of std {:.1f}: {:.3f}, permuted: {:.3f}".format(clean, std, *map(float, kinds)))
image_figures.eigenvector_gallery(None, masks, data.shape, data.classes, title="Masks of each class").savefig(
    options.out / "images-masks.png"
)
