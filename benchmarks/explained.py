"""How much of an output feature its first eigenpairs explain, on text that nothing was chosen on, beside the controls.

On every layer of a model, for SAEs of the MLP's output that are trained here (the rates and sizes of
``benchmarks/dictionaries.py``), by ``Tracer.explained``: medians over features, and means over seeds with the largest
distance from them.

    methods     eigenpairs in the metric of the data, and by weight; where the model has SAEs on both sides of the MLP,
                pairs of input features of these, by weight, by data and by forward selection; with ``--readable``, the
                products of readable transcoders
    baselines   lookups of the token and of the bigram
    controls    the form cut along random directions; random pairs; random output directions; SAEs whose decoder
                columns stayed random; SAEs of a model with random weights

For the SAEs of the first seed also the share of the MLP's effect on the loss that is left if all its features are
replaced by their explanations.

    python benchmarks/explained.py          # ts-nano, all layers, three seeds
    python benchmarks/explained.py --readable runs/readable --trained nothing
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from dictionaries import trained

import bilinear_jax as bj
from bilinear_jax.explain.explained import Explained
from bilinear_jax.explain.parts import PAIRS
from bilinear_jax.explain.replaced import Recovered
from bilinear_jax.explain.scores import Scores
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE
from bilinear_jax.show.drawing import new_figure

METHODS = ("data", "firing", "weight")
READABLE = "readable transcoder"
NAMES = {by: f"eigenpairs by {by}" for by in METHODS}


def medians(scores: Scores, column: int) -> dict[str, float]:
    named = {"r2": scores.r2, "r2_active": scores.r2_active, "average_precision": scores.average_precision}
    return {f"median_{name}": float(np.nanmedian(values[:, column])) for name, values in named.items()}


def cases_of(found: Explained, layer: int, dictionary: str, seed: int, control: bool) -> list[dict]:
    """One case for each method and number of parts."""
    method = dictionary if dictionary == READABLE else NAMES.get(found.by, found.by)
    reads = np.median(found.inputs_read, axis=0).tolist()
    own = {method: (found, found.parts, reads, control)}
    own |= {f"{name}, {method}": (scores, found.parts, reads, True) for name, scores in found.controls.items()}
    if found.by == METHODS[0]:
        every = zip(found.lookups.items(), (1, 2), strict=True)
        own |= {f"{name} lookup": (scores, (0,), [tokens], control) for (name, scores), tokens in every}
        own |= {"the whole pre-activation": (found.full, (0,), reads[-1:], control)}
    base = {"layer": layer, "dictionary": dictionary, "seed": seed}
    return [
        base | {"method": name, "parts": number, "inputs_read": its, "control": is_control} | medians(scores, column)
        for name, (scores, numbers, inputs, is_control) in own.items()
        for column, (number, its) in enumerate(zip(numbers, inputs, strict=True))
    ]


SHOWN = {
    "eigenpairs by data": ("o", "#777777"),
    "eigenpairs by firing": ("D", "#000000"),
    "pairs by weight": ("v", "#b2182b"),
    "pairs by data": ("s", "#e08214"),
    "pairs greedy": ("^", "#1b7837"),
    READABLE: ("*", "#2166ac"),
}
"""The explanations in the figure, each with its marker and colour."""


def frontier(cases: list[dict], path: Path) -> None:
    """R2 of the median feature against the input features that a person must read; hollow: random directions."""
    layers = sorted({case["layer"] for case in cases})
    figure = new_figure(4.2 * len(layers) + 1.5, 3.8)
    for place, layer in enumerate(layers):
        axes = figure.add_subplot(1, len(layers), place + 1)
        for name, (marker, colour) in SHOWN.items():
            for control in (False, True):
                its = [
                    (case["inputs_read"], case["median_r2"])
                    for case in cases
                    if case["layer"] == layer
                    and not case["dictionary"].startswith("SAE,")
                    and case["method"] == ("random directions, " if control else "") + name
                ]
                if its:
                    face = {"markerfacecolor": "none", "linestyle": ":"} if control else {"label": name}
                    size = 12 if marker == "*" else 6
                    axes.plot(*zip(*sorted(its), strict=True), marker=marker, color=colour, markersize=size, **face)
        axes.set(xscale="log", xlabel="input features read", ylabel="R2 of the median feature", title=f"layer {layer}")
        axes.set_ylim(-0.05, 1.05)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, bbox_inches="tight")


def table(cases: list[dict]) -> str:
    """A row for each layer, dictionary, method and number of parts: R2, where it fires, and average precision."""
    rows: dict[tuple, list[dict]] = {}
    for case in cases:
        rows.setdefault(tuple(case[name] for name in ("layer", "dictionary", "method", "parts")), []).append(case)
    titles = ("layer", "dictionary", "method", "parts", "inputs read", "R2", "R2 where it fires", "average precision")
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for key, its in rows.items():
        cells = [f"{np.mean([case['inputs_read'] for case in its]):g}"]
        for name in ("median_r2", "median_r2_active", "median_average_precision"):
            values = np.array([case[name] for case in its])
            cells.append(f"{values.mean():.3f} ± {np.abs(values - values.mean()).max():.3f}")
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ts-nano")
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--features", type=int, default=48, help="random features of each SAE")
    parser.add_argument("--rows", type=int, default=32, help="rows to choose on, and as many to score on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--k", type=int, default=30)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--n-ctx", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1.0, help="a factor on the learning rates")
    parser.add_argument("--out", type=Path, default=Path("runs/explained"))
    parser.add_argument("--figure", type=Path, help="draw R2 against the input features read, and save it here")
    parser.add_argument("--readable", type=Path, help="a folder with readable transcoders of the model")
    parser.add_argument("--trained", choices=["all", "nothing"], default="all", help="whether to train and score SAEs")
    options = parser.parse_args()

    lm = bj.load(options.model)
    corpus = np.asarray(bj.load_corpus(options.model))
    choose, score, train = corpus[: options.rows], corpus[options.rows : 2 * options.rows], corpus[2 * options.rows :]
    options.layers = list(range(lm.config.n_layer)) if options.layers is None else options.layers
    random = LanguageModel.init(lm.config, jax.random.key(0))
    runs = {
        "SAE": (lm, options.seeds, False),
        "SAE, decoder frozen at random": (lm, 1, True),
        "SAE of a random model": (random, 1, False),
    }
    cases, layers = of_the_model(lm, score, choose, options), []
    for name, (model, seeds, frozen) in runs.items() if options.trained == "all" else ():
        out = options.out / name.replace(", ", "-").replace(" ", "-")
        for sae in trained(model, ["sae"], train.reshape(-1), options, out, seeds, frozen):
            layer, seed = sae.config.layer, int((sae.config.tag or "").rpartition("-")[2])
            tracer = bj.Tracer(model, layer, unused_input(sae), sae)
            some = np.sort(np.random.default_rng(seed).permutation(tracer.n_features)[: options.features])
            for by in METHODS if name == "SAE" else METHODS[:1]:
                loss = name == "SAE" and seed == 0 and by == METHODS[0]
                arguments = {"features": some, "parts": options.parts, "by": by, "seed": seed, "loss": loss}
                found = tracer.explained(score, choose, **arguments)
                cases += cases_of(found, layer, name, seed, control=name != "SAE")
                if found.layer is not None:
                    layers.append({"layer": layer} | of_layer(found.layer))
    print(table(cases))
    if options.figure is not None:
        frontier(cases, options.figure)
    if layers:
        print("\n| layer | cost of removing it, nats | the SAE itself | mean output of the token |", end="")
        print("".join(f" {n} |" for n in options.parts))
        print("| --- " * (4 + len(options.parts)) + "|")
    for one in layers:
        numbers = [one["removed"] - one["clean"], one["sae_recovered"], one["token_recovered"], *one["recovered"]]
        print(f"| {one['layer']} | {' | '.join(f'{value:.3f}' for value in numbers)} |")
    print(json.dumps({"model": options.model, "features": options.features, "cases": cases, "layers": layers}))


def of_the_model(lm: LanguageModel, score, choose, options) -> list[dict]:
    """The cases of dictionaries that exist: pairs of input features, and products of readable transcoders."""
    cases = []
    for layer in options.layers:
        try:
            inp, out = (bj.load_sae(options.model, site=site, layer=layer) for site in ("mlp_in", "mlp_out"))
        except bj.UnknownNameError:
            continue
        named = {"SAE of the model": (out, (*METHODS[:2], *PAIRS), options.parts)}
        if options.readable is not None:
            chosen = {"layer": layer, "site": "mlp_in", "target": "mlp_out"}
            named[READABLE] = bj.load_dictionary(options.readable, **chosen), METHODS[2:], [2]
        for name, (sae, ways, parts) in named.items():
            tracer = bj.Tracer(lm, layer, inp, sae)
            some = np.sort(np.random.default_rng(0).permutation(tracer.n_features)[: options.features])
            for by in ways:
                found = tracer.explained(score, choose, features=some, parts=parts, by=by)
                cases += cases_of(found, layer, name, 0, control=False)
    return cases


def unused_input(sae: SAE) -> SAE:
    """An input SAE, which a tracer has and eigenpairs do not use."""
    return SAE.init(bj.SAEConfig("mlp_in", sae.config.layer, sae.config.d_model, 1, 1), jax.random.key(0))


def of_layer(found: Recovered) -> dict:
    names = ("clean", "removed", "sae_recovered", "token_recovered", "recovered")
    return {name: getattr(found, name) for name in names}


if __name__ == "__main__":
    main()
