"""``bilinear-jax tour``: the method on one layer of a language model, in one call."""

import argparse
from pathlib import Path
from typing import Any

from bilinear_jax.commands import common
from bilinear_jax.store.terminal import say

HELP = "explain a feature of a language model from its weights, step by step"
EXAMPLES = """examples:
  bilinear-jax tour
      the language chapter on the model that ships with the package; figures in tour/
  bilinear-jax tour --model tdooms/fw-medium --layer 7 --out figures
      a published model
  bilinear-jax tour --model SmolLM2-135M-Instruct.Q4_1.gguf --data stories.txt
      a gated model: its bilinear form on a text of yours, and what raises the logit of one token
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=common.folder, default="tour", help="folder for the figures (default: tour)")
    model = "built-in name, folder, GGUF file or hub name (default: ts-nano); for one with gated MLPs, give --data too"
    parser.add_argument("--model", default="ts-nano", help=model)
    layer = "the layer whose MLP is explained (default: 2; of a gated model, the one that moves the token's logit most)"
    parser.add_argument("--layer", type=common.natural, help=layer)
    common.add_data(parser, default=" (only for a gated model)")
    token = "of a gated model: the token whose logit is explained, with its space (default: a frequent one)"
    parser.add_argument("--token", type=common.unicode, help=token)


def run(options: argparse.Namespace) -> None:
    if options.data is not None:
        from bilinear_jax.commands.tour_gated import tour_gated

        tour_gated(options)
    elif options.token is not None:
        raise common.WrongUse("--token is for a gated model, and needs a text: give --data too")
    else:
        tour(options.out, options.model, 2 if options.layer is None else options.layer)


def tour(out: str | Path = "tour", model: str = "ts-nano", layer: int = 2) -> None:
    """Run every step on one layer of a model. Print the results and save the figures in ``out``.

    Args:
        out: the folder for ``cosines.png``, ``spectrum.png`` and ``interactions.png``, which replace older ones. It is
            made if it does not exist.
        model: as for ``load``. It needs SAEs at mlp-in and mlp-out of the layer, and a corpus.
        layer: the layer whose MLP is explained.

    Raises:
        OSError: if ``out`` cannot be written. This is checked before anything is loaded.
        ValueError: if the model has gated MLPs. Their tour is ``commands.tour_gated``.
    """
    import jax
    import jax.numpy as jnp

    import bilinear_jax as bj
    from bilinear_jax.show.visualizer import top_tokens

    out = common.figures_folder(out)
    lm = bj.load(model)
    if lm.config.gate is not None:
        raise ValueError(
            f"{model} has gated MLPs, which are no tensors: give --data TEXT, and the tour makes their bilinear form"
        )
    tracer = bj.Tracer(lm, layer=layer)
    out.mkdir(parents=True, exist_ok=True)

    common.heading("The model")
    c = lm.config
    size = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    say(f"{model}: {c.n_layer} bilinear layers, d_model {c.d_model}, {size / 1e6:.1f} million parameters. It writes:\n")
    say(str(lm.generate("Once upon a time", max_length=60, temperature=0.7, seed=0)))

    common.heading(f"Two SAEs around the MLP of layer {layer}")
    say(f"input  {tracer.inp.name}: {tracer.inp.config.n_features} features")
    say(f"output {tracer.out.name}: {tracer.out.config.n_features} features")

    common.heading("All output features, ranked by the sum of their two largest |eigenvalues|")
    top = tracer.top_eigh(k=2)
    _, best = jax.lax.top_k(jnp.abs(top.values).sum(axis=1), 10)
    say("               sum  +- at most  they explain")
    for number in best.tolist():
        say(f"  feature {number:5d}  {_sum_and_share(top, number)}")
    say(f"{int(top.converged.sum())} of {tracer.n_features} features converged; none of their matrices was built.")
    title = "Cosines between the decoder columns of the ten best"
    common.save_figure(bj.figures.heat_map(tracer.cosines(best), best, title=title), out / "cosines.png")

    common.heading("What the best two fire on")
    feature = int(best[0])
    bj.Visualizer(lm, tracer.out)(feature, int(best[1]), k=5)

    common.heading(f"How feature {feature} is made")
    spectrum = bj.spectra.eigh(tracer.tensor, tracer.directions[feature][None]).values[0]
    title = f"Eigenvalues of output feature {feature}"
    common.save_figure(bj.figures.eigenvalue_spectrum(spectrum, title=title), out / "spectrum.png")
    matrix, inputs, explained = tracer.interaction_submatrix(feature, n=50)
    title = f"What makes output feature {feature}: its 50 largest interactions"
    common.save_figure(bj.figures.heat_map(matrix, inputs, title=title), out / "interactions.png")
    pairs = _largest_pairs(matrix, inputs, 5)
    fires_on = top_tokens(bj.Visualizer(lm, tracer.inp), [feature for pair in pairs for feature in pair[:2]])
    for *pair, entry in pairs:
        both = (f"{feature} ({' '.join(fires_on[feature]) or 'dead'})" for feature in pair)
        say(f"  {entry:+.3f}  {'  x  '.join(both)}")

    common.heading("What was found")
    value, bound = float(jnp.abs(top.values[feature]).sum()), float(top.bounds[feature].sum())
    share = float(top.explained[feature])
    say(f"Output feature {feature} of {tracer.out.name} has the largest top-two eigenvalues, {value:.3f}")
    say(f"(error at most {bound:.0e}). These two explain {share:.1%} of the squares of its interaction matrix.")
    size = tracer.basis.shape[1]
    say(f"Its 50 largest of {size**2:,} interactions are between {len(inputs)} input features. Their sub-matrix")
    say(f"holds {float(explained):.1%} of the squares of the whole.")
    say(f"Figures: {', '.join(str(out / name) for name in ('cosines.png', 'spectrum.png', 'interactions.png'))}")


def _sum_and_share(top: Any, feature: int) -> str:
    value, bound = abs(top.values[feature]).sum(), top.bounds[feature].sum()
    return f"{float(value):.3f}   {float(bound):.0e}      {float(top.explained[feature]):6.1%}"


def _largest_pairs(matrix, inputs, n: int) -> list[tuple[int, int, float]]:
    """(input feature, input feature, interaction) of the largest pairs. Off the diagonal, both orders are one pair."""
    import numpy as np

    rows, columns = np.tril_indices(len(matrix))
    both = np.asarray(matrix)[rows, columns] * np.where(rows == columns, 1, 2)
    largest = np.argsort(-np.abs(both))[:n]
    return [(int(inputs[rows[i]]), int(inputs[columns[i]]), float(both[i])) for i in largest]
