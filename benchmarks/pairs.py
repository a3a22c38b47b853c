"""How much of an output feature its pairs of input features explain, on the model that ships with the package.

For the output features of layer 2 of ts-nano with the largest two |eigenvalues|, pairs of input features are chosen

    by weight   the n largest |entries| of D^T Q D, from the weights alone
    by data     the n largest mean |contributions| over some rows of the corpus
    at random   n of the pairs that fire together in these rows: the control

and measured on other rows of the corpus, as medians over the output features:

    share       the fraction of all |terms| of the exact account (explain.account) that is in these pairs
    R2          how well the sum of these pairs alone predicts the pre-activation: 1 is perfect, 0 is as good as its
    mean fires still the fraction of the tokens where the feature fires at which it still fires without these pairs
    fires alone the same, with everything removed but these pairs

The last line has these numbers as JSON. It takes half an hour on 2 cores.

    python benchmarks/pairs.py [output features, 32 by default] [rows, 64 by default]
"""

import json
import sys

import numpy as np

import bilinear_jax as bj
from bilinear_jax.explain.select import select_features
from bilinear_jax.measure.cofiring import co_firing, strongest_pairs

NUMBERS = (5, 50, 500)
MEASURES = ("share", "R2", "fires still", "fires alone")


def chosen(tracer, found, features: list[int], n: int) -> dict[str, dict[int, np.ndarray]]:
    """n pairs of each output feature, by how they are chosen."""
    random = np.random.default_rng(0)

    def by_weight(feature: int) -> np.ndarray:
        top = tracer.top_interactions(n, feature)
        return np.stack([top.i, top.j], axis=-1)

    return {
        "by weight": {feature: by_weight(feature) for feature in features},
        "by data": {feature: strongest_pairs(tracer, found, feature, n) for feature in features},
        "at random": {feature: random.permutation(found.pairs)[:n] for feature in features},
    }


def measured(tracer, tokens, pairs: dict[int, np.ndarray]) -> dict[str, float]:
    """The median of each measure over the output features that fire."""
    summaries = bj.pair_summaries(tracer, tokens, pairs)
    runs = {
        name: bj.ablate_pairs(tracer, tokens, pairs, remove=remove)
        for name, remove in (("fires still", "these"), ("fires alone", "all_else"))
    }
    firing = [feature for feature in pairs if runs["fires still"][feature].clean.fires]
    found = {
        "share": [summaries[feature].share for feature in firing],
        "R2": [summaries[feature].r2[-1] for feature in firing],
    }
    for name, run in runs.items():
        found[name] = [run[feature].whole.kept / run[feature].clean.fires for feature in firing]
    return {name: float(np.nanmedian(values)) for name, values in found.items()} | {"features": len(firing)}


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    rows = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    lm = bj.load("ts-nano")
    tracer, corpus = bj.Tracer(lm, layer=2), bj.load_corpus("ts-nano")
    features = select_features(f"top:{number}", tracer)
    found = co_firing(tracer, corpus[:512])
    tokens = corpus[512 : 512 + rows]
    print(f"| pairs | chosen | {' | '.join(MEASURES)} |\n|---|---|{'---|' * len(MEASURES)}")
    cases = []
    for n in NUMBERS:
        for how, pairs in chosen(tracer, found, features, n).items():
            numbers = measured(tracer, tokens, pairs)
            print(f"| {n} | {how} | {' | '.join(f'{numbers[name]:.3f}' for name in MEASURES)} |", flush=True)
            cases.append({"pairs": n, "chosen": how} | numbers)
    print(json.dumps({"benchmark": "pairs", "rows": rows, "cases": cases}))


if __name__ == "__main__":
    main()
