"""``bilinear-jax spectra``: rank output features by the extreme eigenvalues of their interaction matrices."""

import argparse
from typing import Any

from bilinear_jax.commands import common

HELP = "rank output features by their eigenvalues, each with a bound on its error"
EXAMPLES = """examples:
  bilinear-jax spectra --layer 2
      the 20 output features of layer 2 with the largest two |eigenvalues|
  bilinear-jax spectra --layer 2 --k 4 --which positive --features 3,17,20-30
      the four largest eigenvalues of some features
  bilinear-jax spectra --layer 2 --exact --n 1024 --json > spectra.json
      decompose the matrix of every feature densely: slower, but no eigenvalue can be missed
"""
SMALLEST = 4e-6
MISSED = (
    "The search can miss an eigenvalue, for one feature in a few thousand; then the error is larger. --exact cannot."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_tracer(parser)
    common.add_features(parser, "all")
    parser.add_argument("--n", type=common.positive, default=20, help="number of features to list (default: 20)")
    parser.add_argument("--k", type=common.positive, default=2, help="eigenvalues per feature (default: 2)")
    parser.add_argument(
        "--which",
        choices=["magnitude", "positive", "negative"],
        default="magnitude",
        help="the largest |eigenvalues|, the largest, or the smallest (default: magnitude)",
    )
    parser.add_argument("--rtol", type=float, default=1e-4, metavar="X", help="tolerance of their sum (default: 1e-4)")
    parser.add_argument("--project", action="store_true", help="use D^T Q D, between features of the input SAE")
    parser.add_argument("--exact", action="store_true", help="decompose every matrix densely; nothing can be missed")
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from bilinear_jax.explain.select import select_features

    if not SMALLEST <= options.rtol < 1:
        raise common.WrongUse(f"--rtol must be at least {SMALLEST:g} (for float32) and below 1, got {options.rtol}")
    tracer = common.load_tracer(options, common.load_model(options))
    features = select_features(options.features, tracer)
    request = {name: getattr(options, name) for name in ("k", "which", "rtol", "project", "exact")}
    top = tracer.top_eigh(features=features, **request)
    values = np.asarray(top.values, np.float64)
    sums = {"magnitude": np.abs(values), "positive": values, "negative": -values}[options.which].sum(axis=1)
    best = np.argsort(-sums, kind="stable")[: options.n]
    rows = [
        {
            "feature": features[place],
            "sum": float(sums[place]),
            "values": values[place].tolist(),
            "bounds": np.asarray(top.bounds[place]).tolist(),
            "explained": float(top.explained[place]),
            "converged": bool(top.converged[place]),
        }
        for place in best
    ]
    return {
        "model": options.model,
        "layer": options.layer,
        "inp": tracer.inp.name,
        "out": tracer.out.name,
        "use_encoder": options.use_encoder,
        **request,
        "n_features": len(features),
        "n_converged": int(top.converged.sum()),
        "features": rows,
    }


def text(result: dict[str, Any]) -> str:
    titles = ["feature", "sum", *(f"value {i + 1}" for i in range(result["k"])), "+- at most", "explained", "converged"]
    rows = []
    for row in result["features"]:
        numbers = [f"{value:.4f}" for value in (row["sum"], *row["values"])]
        yes = "yes" if row["converged"] else "no"
        rows.append([row["feature"], *numbers, f"{sum(row['bounds']):.0e}", f"{row['explained']:.1%}", yes])
    whose = f"D^T Q D in features of {result['inp']}" if result["project"] else "Q"
    signs = {"magnitude": "the largest |eigenvalues|", "positive": "the largest", "negative": "the smallest, negated"}
    return "\n".join(
        [
            f"{result['out']} of {result['model']}: eigenvalues of {whose} of {result['n_features']} output features",
            f"sum: of {signs[result['which']]}; +- at most: the bound on its error; explained: the fraction of the",
            "squares of the matrix that these values hold",
            "",
            common.columns(titles, rows),
            "",
            f"{result['n_converged']} of {result['n_features']} converged to a tolerance of {result['rtol']:g}.",
            *([] if result["exact"] else [MISSED]),
        ]
    )
