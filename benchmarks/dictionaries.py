"""Which dictionary explains an MLP best, at equal l0 and equal parameters, on text that nothing was chosen on.

Five kinds, on every layer of a model, all trained on the same activations:

    SAE on the output       reads the MLP's output, and reconstructs it: it sees the answer
    transcoder              reads the MLP's input, linear encoder
    skip transcoder         the same with a linear map beside its features
    bilinear transcoder     reads the MLP's input, each feature is one product of two directions
    hidden units            no dictionary: the k hidden units that write most at a token, the others at their mean

Equal parameters: an SAE of 4 d features has 8 d^2 weights; a skip transcoder 3.5 d, a bilinear one 2.67 d features.
Learning rates are the best of .001, .003 and .01 for each kind, found on layer 2 of ts-nano and other text; the skip
transcoder has that of the transcoder. ``--rate`` multiplies all of them. The start of a bilinear transcoder has no
randomness, so its seeds are one.

Controls: the same with decoder columns frozen at random, and for a model with random weights (an SAE, and a bilinear
transcoder).

    python benchmarks/dictionaries.py                          # ts-nano, all layers, three seeds
    python benchmarks/dictionaries.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data tinystories.txt.gz --layers 10 \
        --seeds 1 --steps 300 --rate .33

It goes on where it was stopped (``--out``). Scores are means over seeds, with the largest distance from them.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import bilinear_jax as bj
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.evaluation import evaluate_saes
from bilinear_jax.nn.architecture import GATES
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import SAEConfig
from bilinear_jax.nn.sites import capture
from bilinear_jax.store.tokens import tokenize
from bilinear_jax.training.recipes import KINDS
from bilinear_jax.training.sae import fit_saes
from bilinear_jax.training.sae_recipe import SAERecipe

SCORES = ("fvu", "loss_recovered", "loss_added", "l0", "dead")
EXPANSION = {"sae": 4.0, "transcoder": 4.0, "skip-transcoder": 3.5, "bilinear-transcoder": 8 / 3}
RATES = {"sae": 1e-2, "transcoder": 1e-2, "skip-transcoder": 1e-2, "bilinear-transcoder": 3e-3}
WITH_CONTROLS = ("sae", "bilinear-transcoder")


def configs_of(kind: str, lm: LanguageModel, layers: Sequence[int], k: int, seeds: int) -> list[SAEConfig]:
    d = lm.config.d_model
    site, features = "mlp_out" if kind == "sae" else "mlp_in", round(EXPANSION[kind] * d)
    return [
        SAEConfig(site, layer, d, features / d, k, tag=f"{kind}-{seed}", **KINDS[kind])
        for layer in layers
        for seed in range(seeds)
    ]


def trained(lm: LanguageModel, kinds: Sequence[str], tokens, options, out: Path, seeds: int, frozen: bool = False):
    """Dictionaries of some kinds: one run for each learning rate, each in one pass over the text."""
    found = []
    for its_rate in sorted({RATES[kind] for kind in kinds}):
        rate = its_rate * options.rate
        configs = [
            config
            for kind in kinds
            if RATES[kind] == its_rate
            for config in configs_of(kind, lm, options.layers, options.k, seeds)
        ]
        recipe = SAERecipe(
            steps=options.steps,
            batch_size=2048,
            lr=rate,
            final_lr=rate / 10,
            warmup=50,
            n_ctx=options.n_ctx,
            frozen_decoder=frozen,
        )
        found += fit_saes(lm, configs, recipe, tokens, out / f"{rate:g}", save_every=100, log_every=50)
    return found


def parts_of(tag: str | None) -> tuple[str, int]:
    """The kind and the seed in the tag of a dictionary."""
    kind, _, seed = (tag or "").rpartition("-")
    return kind, int(seed)


def scores_of(lm: LanguageModel, saes: Sequence[SAE], rows: np.ndarray) -> dict[tuple[str, int], list[dict]]:
    """The scores of each kind at each layer, one entry a seed."""
    collected: dict[tuple[str, int], list[dict]] = {}
    for seed in sorted({parts_of(sae.config.tag)[1] for sae in saes}):
        # The same tag for all seeds: then their evaluation is compiled once.
        its = [
            SAE(sae.params, dataclasses.replace(sae.config, tag=kind))
            for sae in saes
            for kind, its_seed in [parts_of(sae.config.tag)]
            if its_seed == seed
        ]
        for sae, one in zip(its, evaluate_saes(lm, its, rows).values(), strict=True):
            found = {"fvu": 1 - one.explained_variance} | {score: getattr(one, score) for score in SCORES[1:]}
            collected.setdefault((sae.config.tag or "", sae.config.layer), []).append(found)
    return collected


def hidden_units(lm: LanguageModel, layer: int, rows: np.ndarray, k: int) -> dict[str, float]:
    """The k hidden units that write most at a token, the others at their mean: its fraction of variance unexplained."""
    mlp = {name: leaf[layer] for name, leaf in lm.params["layers"]["mlp"].items()}

    @jax.jit
    def parts(tokens):
        x = capture(lm.config, lm.params, tokens, [("mlp_in", layer)])["mlp_in", layer].astype(jnp.float32)
        return GATES[lm.config.gate](x @ mlp["w_l"].T) * (x @ mlp["w_r"].T), lm.token_mask(tokens)

    hidden = []
    for start in range(0, len(rows), 8):
        h, counted = jax.device_get(parts(jnp.asarray(rows[start : start + 8])))
        hidden.append(h[counted])
    h = np.concatenate(hidden)
    w_p = np.asarray(mlp["w_p"], np.float32)
    size = np.abs(h) * np.linalg.norm(w_p, axis=0)
    least = np.partition(size, -k, axis=1)[:, -k, None]
    y, y_hat = h @ w_p.T, np.where(size >= least, h, h.mean(axis=0)) @ w_p.T
    error = (y - y.mean(axis=0)) - (y_hat - y_hat.mean(axis=0))
    return {"fvu": float(np.sum(error**2) / np.sum((y - y.mean(axis=0)) ** 2)), "l0": float(k)}


def summary(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """The mean of each score over seeds, and the largest distance from it."""
    found = {}
    for score in rows[0]:
        values = np.array([row[score] for row in rows])
        found[score] = [float(values.mean()), float(np.abs(values - values.mean()).max())]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ts-nano")
    parser.add_argument(
        "--data", type=Path, help="a text, read and encoded as for training; default: the corpus of the model"
    )
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--k", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1.0, help="a factor on all learning rates")
    parser.add_argument("--n-ctx", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows of n-ctx tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/dictionaries"))
    options = parser.parse_args()

    lm = bj.load(options.model)
    if options.data is None:
        corpus = np.asarray(bj.load_corpus(options.model))
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        ids = np.asarray(tokenize(options.data, lm.tokenizer, options.out / "tokens").tokens)
        corpus = ids[: len(ids) // options.n_ctx * options.n_ctx].reshape(-1, options.n_ctx)
    held, train = corpus[: options.rows], corpus[options.rows : -options.rows].reshape(-1)
    options.layers = list(range(lm.config.n_layer)) if options.layers is None else options.layers
    random = LanguageModel.init(lm.config, jax.random.key(0))
    runs = {
        "trained": (lm, list(EXPANSION), options.seeds, False),
        "frozen decoder": (lm, list(WITH_CONTROLS), 1, True),
        "random model": (random, list(WITH_CONTROLS), 1, False),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for run, (model, kinds, seeds, frozen) in runs.items():
        saes = trained(model, kinds, train, options, options.out / run.replace(" ", "-"), seeds, frozen)
        scores = scores_of(model, saes, held)
        for layer in options.layers:
            for kind in kinds:
                found[f"{run}, {kind}, layer {layer}"] = summary(scores[kind, layer])
            if run != "frozen decoder" and model.config.bilinear:
                found[f"{run}, hidden units, layer {layer}"] = summary([hidden_units(model, layer, held, options.k)])
        (options.out / "scores.json").write_text(json.dumps(found, indent=2) + "\n")
    print("| dictionary | layer | FVU | loss recovered | loss added | l0 | dead |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in found.items():
        kind, layer = name.rsplit(", layer ", 1)
        cells = [f"{row[score][0]:.3f} ± {row[score][1]:.3f}" if score in row else "" for score in SCORES]
        print(f"| {kind.removeprefix('trained, ')} | {layer} | {' | '.join(cells)} |")
    print(json.dumps({"model": options.model, "k": options.k, "steps": options.steps, "scores": found}))


if __name__ == "__main__":
    main()
