"""The published numbers of image classifiers beside ours: the tables of docs/results.md.

    regimes     accuracy and effective rank with noise, weight decay, both and neither, on both datasets
    sizes       accuracy by hidden size, and how similar the first eigenvectors of different seeds are
    truncation  test error if each class keeps its k largest |eigenvalues|
    noise       accuracy by the noise in training
    masks       accuracy with masks made from the eigenvectors, and with controls

The last line has the form of all benchmarks. Here "ratio" is the published number divided by ours (not of seconds),
"max_relative_error" is the distance of ours from it, and "peak_bytes" is the memory of the whole program.

Protocol: a linear embedding, one bilinear layer, a linear head, no biases; AdamW, learning rate 1e-3 with a cosine over
epochs to 0, batches of 2048, Gaussian noise on every pixel, images in 0 ... 1. Everything is measured on the test set.
Each group of models is trained in its own folder under ``--out``. After an interruption, give the same command again:
it resumes, and does not train finished models again.

    BILINEAR_JAX_DATA=<folder of mnist/ and fashion-mnist/> python benchmarks/image_results.py --out runs/image-results
    python benchmarks/image_results.py --out runs/try --data <folder> --epochs 2 --seeds 2

The published numbers are those of the paper's code and of independent reproductions. Not all of them state every
setting: here "noise" uses hidden size 300, with the weight decay of "sizes".
"""

import argparse
import dataclasses
import itertools
import resource
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import report

from bilinear_jax.images import analyses
from bilinear_jax.images.data import ImageData, load_images
from bilinear_jax.nn.image import ImageConfig
from bilinear_jax.training.images import ImageRecipe, accuracy, train_images

REGIMES = {"none": (0.0, 0.0), "noise": (0.5, 0.0), "weight decay": (0.0, 1.0), "both": (0.5, 1.0)}
PUBLISHED_REGIMES = {  # accuracy and effective rank
    "mnist": {"none": (0.9749, 38.5), "noise": (0.9834, 82.2), "weight decay": (0.9749, 15.5), "both": (0.9801, 26.0)},
    "fashion-mnist": {
        "none": (0.8850, 47.2),
        "noise": (0.8680, 87.7),
        "weight decay": (0.8731, 11.8),
        "both": (0.8604, 20.1),
    },
}
PUBLISHED_SIZES = {  # accuracy and similarity
    30: (0.9594, 0.774),
    50: (0.9676, 0.764),
    100: (0.9762, 0.880),
    300: (0.9818, 0.793),
    500: (0.9834, 0.770),
    1000: (0.9852, 0.729),
}
PUBLISHED_TRUNCATION = {5: 0.2096, 10: 0.0630, 15: 0.0220, 20: 0.0190, 30: 0.0182}
PUBLISHED_NOISE = {0.0: 0.976, 0.2: 0.981, 0.4: 0.981, 0.6: 0.978, 0.8: 0.972}
STDS = (0.15, 0.20, 0.30)
PUBLISHED_MASKS = {
    "noise .15": {"clean": (0.979,) * 3, "mask": (0.893, 0.804, 0.587), "permuted": (0.974, 0.970, 0.956)},
    "edges only": {"clean": (0.976,) * 3, "mask": (0.457, 0.344, 0.235), "Gaussian": (0.779, 0.633, 0.405)},
}
FIRST_SEED = 42


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a table."""

    published: float | None
    mean: float
    spread: float | None  # standard deviation over seeds, or over pairs of them; None for one


Table = dict[str, dict[str, Cell]]  # by case, then by measure


class Models:
    """Trained models, by what they are; each group is trained when it is first asked for."""

    def __init__(self, out: Path, folder: Path | None, seeds: int, epochs: int | None, sizes: list[int]):
        self.out, self.folder, self.seeds, self.epochs, self.sizes = out, folder, seeds, epochs, sizes
        self._data: dict[str, ImageData] = {}

    def data(self, name: str) -> ImageData:
        if name not in self._data:
            self._data[name] = load_images(name, self.folder)
        return self._data[name]

    def group(self, name: str, config: ImageConfig, recipe: ImageRecipe) -> list:
        """The params of each seed's model."""
        data, number = self.data(name), self.seeds
        recipe = dataclasses.replace(recipe, epochs=self.epochs or recipe.epochs)
        recipes = [dataclasses.replace(recipe, seed=FIRST_SEED + n) for n in range(number)]
        around = "-residual" if config.residual else ""
        folder = (
            f"{name}-hidden{config.d_hidden}{around}-noise{recipe.noise:g}-decay{recipe.weight_decay:g}"
            f"-epochs{recipe.epochs}-seeds{number}"
        )
        print(f"== {folder}", flush=True)
        params = train_images(config, recipes, data.train_images, data.train_labels, self.out / folder)
        return [jax.tree.map(lambda leaf, n=n: leaf[n], params) for n in range(number)]

    def accuracies(self, name: str, config: ImageConfig, group: list) -> list[float]:
        data = self.data(name)
        return [float(accuracy(config, params, data.test_images, data.test_labels)) for params in group]


def regimes(models: Models) -> dict[str, Table]:
    config, tables = ImageConfig(), {}
    for name, published in PUBLISHED_REGIMES.items():
        table = tables.setdefault(f"Regimes, {name}", {})
        for regime, (noise, decay) in REGIMES.items():
            group = models.group(name, config, ImageRecipe(noise=noise, weight_decay=decay))
            ranks = [float(analyses.effective_ranks(config, params).mean()) for params in group]
            table[regime] = {
                "accuracy": cell(published[regime][0], models.accuracies(name, config, group)),
                "effective rank": cell(published[regime][1], ranks),
            }
    return tables


def sizes(models: Models) -> dict[str, Table]:
    table, tops = {}, {}
    for size in models.sizes:
        published, alike = PUBLISHED_SIZES[size]
        config = ImageConfig(d_hidden=size)
        group = models.group("mnist", config, ImageRecipe(noise=0.4))
        tops[size] = jnp.stack([analyses.most_positive(config, params)[:, 0] for params in group])
        table[f"hidden size {size}"] = {
            "accuracy": cell(published, models.accuracies("mnist", config, group)),
            "similarity": cell(alike, [alike_in(*pair) for pair in itertools.combinations(tops[size], 2)]),
        }
    for size, top in tops.items():
        if size != 300 and 300 in tops:
            pairs = itertools.product(top, tops[300])
            table[f"hidden size {size}"]["similarity to 300"] = cell(None, [alike_in(*pair) for pair in pairs])
    return {"Hidden size (MNIST, weight decay 1, noise .4)": table}


def alike_in(first, second) -> float:
    """The mean over classes of the similarity of two models' eigenvectors."""
    return float(analyses.eigenvector_similarity(first[None], second[None]).mean())


def truncation(models: Models) -> dict[str, Table]:
    config, data = ImageConfig(d_hidden=300), models.data("mnist")
    group = models.group("mnist", config, ImageRecipe(noise=0.4))
    ks = [*PUBLISHED_TRUNCATION, config.d_hidden]
    errors = 1 - np.array(
        [analyses.truncated_accuracy(config, params, data.test_images, data.test_labels, ks) for params in group]
    )
    table = {f"k = {k}": {"error": cell(PUBLISHED_TRUNCATION.get(k), errors[:, n])} for n, k in enumerate(ks)}
    return {"Truncation (MNIST, hidden size 300)": table}


def noise(models: Models) -> dict[str, Table]:
    config, table = ImageConfig(d_hidden=300), {}
    for std, published in PUBLISHED_NOISE.items():
        group = models.group("mnist", config, ImageRecipe(noise=std))
        table[f"noise {std:g}"] = {"accuracy": cell(published, models.accuracies("mnist", config, group))}
    return {"Noise in training (MNIST, hidden size 300, weight decay 1)": table}


def masks(models: Models) -> dict[str, Table]:
    """Of each model the mean over masks of the three most positive eigenvectors of every class; spreads are of models.

    The published means are of one model; masks of one model differ much more than models do.
    """
    config, data, tables = ImageConfig(d_hidden=512, residual=True), models.data("mnist"), {}
    for name, published in PUBLISHED_MASKS.items():
        edges = analyses.edge_pixels(data.train_images) if name == "edges only" else None
        recipe = ImageRecipe(epochs=30, noise=0.15 if edges is None else 0.0, weight_decay=0.0)
        group = models.group("mnist", config, recipe)
        found: dict[tuple[float, str], list[float]] = {}
        for number, params in enumerate(group):
            made = analyses.adversarial_masks(config, params, data.train_images, data.train_labels, pixels=edges)[:, :3]
            for std in STDS:
                for kind, chosen in kinds_of_masks(jax.random.key(number), made, std, edges).items():
                    shares = analyses.masked_accuracy(config, params, chosen, data.test_images, data.test_labels)
                    found.setdefault((std, kind), []).append(float(shares.mean()))
        clean = models.accuracies("mnist", config, group)
        table = tables.setdefault(f"Masks (MNIST, {name})", {})
        for (std, kind), values in found.items():
            n = STDS.index(std)
            row = table.setdefault(f"std {std:.2f}", {"clean": cell(published["clean"][n], clean)})
            row[kind] = cell(published[kind][n] if kind in published else None, values)
    return tables


def kinds_of_masks(key, masks, std: float, edges) -> dict[str, jax.Array]:
    """Masks of a standard deviation, and their controls."""
    scaled = analyses.scaled_masks(masks, std)
    kinds = {"mask": scaled, "permuted": analyses.permuted_masks(key, scaled, edges)}
    if edges is not None:  # as published: noise in place of what is positive, and what is negative stays
        noise = std * jax.random.normal(jax.random.fold_in(key, 1), scaled.shape)
        kinds["Gaussian"] = jnp.where(scaled > 0, noise, scaled)
    return kinds


def cell(published: float | None, values: Iterable[float]) -> Cell:
    values = np.asarray(list(values), np.float64)
    return Cell(published, float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None)


def markdown(title: str, table: Table) -> str:
    """A table of docs/results.md: each measure's published number, and ours with its spread."""
    measures = list(dict.fromkeys(measure for row in table.values() for measure in row))
    lines = [f"### {title}", "", "| | " + " | ".join(f"{m}: published | ours" for m in measures) + " |"]
    lines.append("|---" * (1 + 2 * len(measures)) + "|")
    for case, row in table.items():
        texts = []
        for measure in measures:
            if measure not in row:
                texts += ["", ""]
                continue
            entry, digits = row[measure], 1 if measure == "effective rank" else 4
            spread = "" if entry.spread is None else f" ± {entry.spread:.{digits}f}"
            texts += ["" if entry.published is None else f"{entry.published:g}", f"{entry.mean:.{digits}f}{spread}"]
        lines.append(f"| {case} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def measured(name: str, entry: Cell) -> dict:
    """A case of the last line: the published number is the baseline, and nothing is timed."""
    published, mean = entry.published, entry.mean
    return {
        "case": name,
        "baseline": "published",
        "ratio": None if published is None else round(published / mean, 3),
        "max_relative_error": None if published is None else abs(mean - published) / published,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        **dataclasses.asdict(entry),
    }


PARTS = {"regimes": regimes, "sizes": sizes, "truncation": truncation, "noise": noise, "masks": masks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models and of results.md")
    parser.add_argument("--data", type=Path, help="folder of the datasets (default: what BILINEAR_JAX_DATA names)")
    parser.add_argument("--seeds", type=int, default=5, help="models of each kind, from seed 42 on (default: 5)")
    parser.add_argument("--epochs", type=int, help="another number of epochs, for a try")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which tables (default: all)")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        choices=PUBLISHED_SIZES,
        default=list(PUBLISHED_SIZES),
        help="which hidden sizes the part of that name trains (default: all)",
    )
    options = parser.parse_args()
    models = Models(options.out, options.data, options.seeds, options.epochs, options.sizes)
    tables = {}
    for part in options.parts:
        for title, table in PARTS[part](models).items():
            tables[title] = table
            print(markdown(title, table), flush=True)
    (options.out / "results.md").write_text("\n".join(markdown(*entry) for entry in tables.items()))
    report(
        "image_results",
        [
            measured(f"{title}: {case}, {measure}", entry)
            for title, table in tables.items()
            for case, row in table.items()
            for measure, entry in row.items()
        ],
    )


if __name__ == "__main__":
    main()
