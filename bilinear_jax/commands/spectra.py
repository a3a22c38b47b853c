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
  bilinear-jax spectra --layer 2 --scan
      also the features that two eigenpairs explain best, and those that look like a negation, beside random directions
"""
SMALLEST = 4e-6
SCAN_ROWS, SCAN_TOKENS, SCAN_EXAMPLES = 128, 256, 3
"""Of --scan: rows of the dataset, the most tokens of a row, and the features that are shown with texts."""

SCANS = {
    "explained": "Explained best by two eigenpairs (average precision)",
    "negation": "Most like a negation (driven by one eigenpair, vetoed by another: the smaller of gain and vetoed)",
}
SCORES = {
    "average_precision_one": "AP: 1",
    "average_precision_two": "AP: 2",
    "r2_active_one": "R2: 1",
    "r2_active_two": "R2: 2",
    "gain": "gain",
    "vetoed": "vetoed",
}
"""The columns of a scan, by the names of the scores."""

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
    parser.add_argument(
        "--scan",
        action="store_true",
        help="also rank them by how well two eigenpairs explain them, and by how much one vetoes another, on --data",
    )
    common.add_data(parser)
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from bilinear_jax.explain.select import select_features

    if not SMALLEST <= options.rtol < 1:
        raise common.WrongUse(f"--rtol must be at least {SMALLEST:g} (for float32) and below 1, got {options.rtol}")
    if options.data is not None and not options.scan:
        raise common.WrongUse("--data is the text of the scan: give --scan too")
    if options.scan and not options.use_encoder:
        raise common.WrongUse("--scan asks what makes a feature fire (its encoder row): leave out --no-use-encoder")
    tracer = common.load_tracer(options, common.load_model(options))
    features = select_features(options.features, tracer)
    data = common.load_tokens(options, tracer.lm, SCAN_ROWS, SCAN_TOKENS) if options.scan else None
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
        **({} if data is None else {"scan": scanned(tracer, features, options.n, data)}),
    }


def scanned(tracer, features: list[int], n: int, data: common.Tokens) -> dict[str, Any]:
    """The n best features of each ranking of a scan, the first ones with texts."""
    from bilinear_jax.explain.scan import RANKINGS, scan
    from bilinear_jax.store.files import finite_or_null

    found, held = scan(tracer, data.ids, features=features), data.ids[len(data.ids) // 2 :]
    result: dict[str, Any] = {"text": data.name, "chosen": found.tokens[0], "scored": found.tokens[1]}
    for by in RANKINGS:
        result[by] = []
        for rank, row in enumerate(found.rows(n, by)):
            one: dict[str, Any] = finite_or_null(row)
            for name in ("fires", "silent") if rank < SCAN_EXAMPLES else ():
                at = getattr(found, name)[features.index(row["feature"])]
                one[name] = common.texts_at(tracer.lm, held, [place for place in at.tolist() if place[0] >= 0])
            result[by].append(one)
    return result


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
            *(_scan_lines(result["scan"]) if "scan" in result else []),
        ]
    )


def _scan_lines(scan: dict[str, Any]) -> list[str]:
    lines = []
    for by, how in SCANS.items():
        titles = ["rank", "feature", "fires at", by, "control", *SCORES.values()]
        rows = []
        for rank, row in enumerate(scan[by]):
            numbers = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("value", "control", *SCORES)]
            rows.append([rank + 1, row["feature"], row["firings"], *numbers])
        lines += ["", f"== {how}", common.columns(titles, rows)]
        for row in scan[by]:
            for name, when in (("fires", "driven, and fires"), ("silent", "driven, and does not fire")):
                lines += [f"  {row['feature']}, {when}: {' '.join(one.split())}" for one in row.get(name, [])]
    return [
        *lines,
        "",
        f"Chosen on {scan['chosen']} tokens of {scan['text']}, and scored on {scan['scored']} others.",
        "control: the value at the same rank among as many random output directions; a feature has to beat it.",
        "AP: average precision of 1 and of 2 eigenpairs; R2: that of the pre-activation where the feature fires.",
    ]
