"""The language chapter in one call: find an output feature by its spectrum, and trace it to its input features."""

import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import bilinear_jax as bj


def tour(out: str | Path = "tour", model: str = "ts-nano", layer: int = 2) -> None:
    """Every step of the chapter on one layer of a model; prints what it finds and saves the figures in ``out``.

    Args:
        out: folder for ``cosines.png``, ``spectrum.png`` and ``interactions.png``; made if it is missing.
        model: what ``load`` takes; it needs SAEs at mlp-in and mlp-out of the layer, and a corpus.
        layer: the layer whose MLP is explained.

    Raises:
        OSError: if ``out`` can't be written (before anything is computed).
    """
    out = Path(out)
    lm = bj.load(model)
    tracer = bj.Tracer(lm, layer=layer)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the figures can't be written to {out} ({error}): name another folder with --out") from error

    _heading("The model")
    c = lm.config
    size = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    print(
        f"{model}: {c.n_layer} bilinear layers, d_model {c.d_model}, {size / 1e6:.1f} million parameters. It writes:\n"
    )
    print(lm.generate("Once upon a time", max_length=60, temperature=0.7, seed=0))

    _heading(f"Two SAEs around the MLP of layer {layer}")
    print(f"input  {tracer.inp.name}: {tracer.inp.config.n_features} features")
    print(f"output {tracer.out.name}: {tracer.out.config.n_features} features")

    _heading("All output features, ranked by the sum of their two largest |eigenvalues|")
    scores = tracer.compute(bj.spectra.truncated_eigenvalues, k=2)
    values, best = jax.lax.top_k(scores, 10)
    for feature, value in zip(best.tolist(), values.tolist(), strict=True):
        print(f"  feature {feature:5d}  {value:.3f}")
    title = "Cosines between the decoder columns of the ten best"
    _save(bj.figures.heat_map(tracer.cosines(best), best, title=title), out, "cosines")

    _heading("What the best two fire on")
    feature = int(best[0])
    bj.Visualizer(lm, tracer.out)(feature, int(best[1]), k=5)

    _heading(f"How feature {feature} is made")
    spectrum = np.asarray(bj.spectra.eigh(tracer.tensor, tracer.directions[feature][None]).values[0])
    _save(bj.figures.eigenvalue_spectrum(spectrum, title=f"Eigenvalues of output feature {feature}"), out, "spectrum")
    squares = np.sort(spectrum**2)[::-1]
    q = tracer.q(feature, project=True)
    matrix, inputs = tracer.interaction_submatrix(feature, n=50)
    title = f"What makes output feature {feature}: its 50 largest interactions"
    _save(bj.figures.heat_map(matrix, inputs, title=title), out, "interactions")
    visualizer = bj.Visualizer(lm, tracer.inp)
    for row, column, entry in _largest_pairs(matrix, inputs, 5):
        print(f"  {entry:+.3f}  {_describe(visualizer, row)}  x  {_describe(visualizer, column)}")

    _heading("What was found")
    print(f"Output feature {feature} of {tracer.out.name} has the largest top-two eigenvalues, {float(values[0]):.3f}.")
    print(f"Those two explain {squares[:2].sum() / squares.sum():.1%} of its interaction matrix (share of squares).")
    print(f"Its 50 largest of {q.size:,} interactions lie between {len(inputs)} input features; the sub-matrix of")
    print(f"these holds {float(jnp.sum(matrix**2) / jnp.sum(q**2)):.1%} of the squares of the whole.")
    print(f"Figures: {', '.join(str(out / name) for name in ('cosines.png', 'spectrum.png', 'interactions.png'))}")


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _save(figure, out: Path, name: str) -> None:
    figure.savefig(out / f"{name}.png", dpi=150)
    print(f"saved {out / name}.png", file=sys.stderr)


def _largest_pairs(matrix, inputs, n: int) -> list[tuple[int, int, float]]:
    """(input feature, input feature, interaction) of the largest pairs; off the diagonal both orders are one pair."""
    rows, columns = np.tril_indices(len(matrix))
    both = np.asarray(matrix)[rows, columns] * np.where(rows == columns, 1, 2)
    largest = np.argsort(-np.abs(both))[:n]
    return [(int(inputs[rows[i]]), int(inputs[columns[i]]), float(both[i])) for i in largest]


def _describe(visualizer: "bj.Visualizer", feature: int) -> str:
    """A feature's number and the tokens that it fires on most."""
    contexts = visualizer.contexts(feature, k=10)[feature]
    tokens = Counter(text.strip() for context in contexts for text, _, focused in context.glyphs() if focused)
    return f"{feature} ({' '.join(token for token, _ in tokens.most_common(3)) or 'dead'})"
