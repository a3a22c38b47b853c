"""``bilinear-jax eval``: the loss of a language model, and the scores of its SAEs."""

import argparse
import json
import math
from typing import Any

from bilinear_jax.commands import common

HELP = "the loss of a model on a text, and how well its SAEs and transcoders reconstruct a site"
EXAMPLES = """examples:
  bilinear-jax eval
      the model that ships with the package and all its SAEs, on 256 rows of its corpus
  bilinear-jax eval --model runs/mine/model --data stories.txt.gz --rows 1000 --saes none
      the loss of your own model on the first 1,000 rows of a text
  bilinear-jax eval --saes 2-mlp-in-x4-k20,2-mlp-out-x4-k20 --data tokens.npy --json
      two SAEs, on token ids [rows, seq], as JSON
  bilinear-jax eval --controls
      below each SAE the scores of a random one of the same size, with the same number of active features
  bilinear-jax eval --model tdooms/ts-medium --attn-scale auto --data stories.txt --saes none
      find the scale of the attention's output, which older files do not give, by the loss on text like the training's
"""
COLUMNS = (
    *("nmse", "explained_variance", "cosine", "l0", "dead", "loss_patched", "loss_zeroed", "loss_mean_ablated"),
    *("loss_added", "loss_recovered", "loss_recovered_mean"),
)
CLEAR = 0.1  # nats per token: the smallest difference of losses that decides between the two attention scales
NOTE = """nmse: squared error / squared norm; cosine: of the site and its reconstruction, the mean over tokens;
l0: active features per token; dead: fraction of features that never fire;
loss patched: with the site replaced by the reconstruction, zeroed: by 0, mean ablated: by its mean over the text;
loss added: (patched - clean) / clean; loss recovered: 1 - (patched - clean) / (zeroed - clean), recovered mean: the
same with mean ablated in place of zeroed"""
CONTROLS = """random: random unit directions in place of encoder rows and decoder columns, as many active features, the
mean of the site as the bias, and the one scale that is best on this text"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser, measured_scale=True)
    common.add_data(parser)
    parser.add_argument(
        "--rows", type=common.positive, default=256, help="use at most this many rows of n_ctx tokens (default: 256)"
    )
    parser.add_argument(
        "--saes", default="all", help="all, none, or names such as 2-mlp-in-x4-k20, separated by commas (default: all)"
    )
    parser.add_argument("--scope", help="folder or hub name of the SAEs (default: those of the model)")
    parser.add_argument(
        "--correlation-ks",
        type=common.positive,
        nargs="+",
        default=[],
        metavar="K",
        help="also measure how well K eigenpairs predict the features of each SAE at mlp_out; slower than the rest",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="also score a random dictionary beside each SAE; takes somewhat longer than the SAEs themselves",
    )
    parser.add_argument("--batch-size", type=common.positive, default=16, help="rows in a batch (default: 16)")
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from bilinear_jax.language import load
    from bilinear_jax.measure import evaluation

    measured = options.attn_scale == "auto"
    lm = load(options.model, attn_scale=1.0) if measured else common.load_model(options)
    saes = _saes(options)
    tokens, name = common.load_tokens(options, lm, options.rows)
    scores, random, size = {}, {}, options.batch_size
    scales = {}
    if measured:
        scales = evaluation.attn_scale_losses(lm, tokens, size)
        lm = load(options.model, attn_scale=min(scales, key=scales.__getitem__))
        common.say_loaded(options, lm)
    if saes:
        metrics = evaluation.evaluate_saes(lm, saes, tokens, batch_size=size, correlation_ks=options.correlation_ks)
        scores = json.loads(evaluation.to_json(metrics))
        if options.controls:
            random = json.loads(evaluation.to_json(evaluation.controls(lm, saes, tokens, batch_size=size)))
        first = next(iter(metrics.values()))
        loss, count = first.loss_clean, first.tokens
    elif measured:
        loss, count = min(scales.values()), int(lm.token_mask(tokens).sum())
    else:
        loss, count = lm.mean_loss(tokens, batch_size=size)
    return {
        **{"model": options.model, "data": name, "rows": len(tokens), "seq": tokens.shape[1], "tokens": count},
        **{"loss": loss, "attn_scale": lm.config.attn_scale, "attn_scale_losses": list(scales.items()), "saes": scores},
        **({"controls": random} if options.controls else {}),
    }


def _saes(options: argparse.Namespace) -> list[Any]:
    from bilinear_jax.store.checkpoint import load_sae
    from bilinear_jax.store.sources import sae_names
    from weights_convert.names import parse_sae_name

    if options.saes == "none":
        return []
    scope = options.model if options.scope is None else options.scope
    names = sae_names(scope) if options.saes == "all" else options.saes.split(",")
    found = []
    for name in names:
        parts = parse_sae_name(name)
        if parts is None:
            raise common.WrongUse(f"--saes: {name!r} is not the name of an SAE; write for instance 2-mlp-in-x4-k20")
        found.append(load_sae(scope, **parts._asdict()))
    return found


def text(result: dict[str, Any]) -> str:
    rows = f"{result['rows']} row{'s' * (result['rows'] != 1)}"
    lines = [
        f"{result['model']} on {rows} of {result['seq']} tokens of {result['data']}",
        f"loss: {result['loss']:.4f} nats per token over {result['tokens']:,} tokens, all but position 0 and padding "
        f"(perplexity {math.exp(result['loss']):.2f})",
    ]
    lines += _measured(result)
    if not result["saes"]:
        return "\n".join(lines)
    ks = sorted({k for scores in result["saes"].values() for k in scores["correlation"]}, key=int)
    random, rows = result.get("controls", {}), []
    for name, scores in result["saes"].items():
        for label, one in [(name, scores), *([("  random", random[name])] if name in random else [])]:
            numbers = [one[column] for column in COLUMNS] + [one["correlation"].get(k) for k in ks]
            rows.append([label, *("" if number is None else f"{number:.4g}" for number in numbers)])
    titles = ["SAE", *(column.replace("_", " ") for column in COLUMNS), *(f"r at k = {k}" for k in ks)]
    notes = [NOTE, *([CONTROLS] if random else [])]
    return "\n".join([*lines, "", common.columns(titles, rows, left=["SAE"]), "", *notes])


def _measured(result: dict[str, Any]) -> list[str]:
    """The lines on the attention scale that fits, if that was asked."""
    if not result["attn_scale_losses"]:
        return []
    (best, low), (other, high) = sorted(result["attn_scale_losses"], key=lambda pair: pair[1])
    lines = [f"attn_scale {best:.6g}: loss {low:.4f}; attn_scale {other:.6g}: loss {high:.4f}"]
    if high - low < CLEAR:
        return [*lines, "too close to decide: give --data a text like the training text of the model, or more text"]
    return [*lines, f"{best:.6g} fits; load or convert the model with it: --attn-scale {best!r}"]
