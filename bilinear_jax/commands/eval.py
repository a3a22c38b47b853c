"""``bilinear-jax eval``: the loss of a language model, and the scores of its SAEs."""

import argparse
import json
import math
from typing import Any

from bilinear_jax.commands import common

HELP = "the loss of a model on a text, and how well its SAEs stand in for what they read"
EXAMPLES = """examples:
  bilinear-jax eval
      the model that ships with the package and all its SAEs, on 256 rows of its corpus
  bilinear-jax eval --model runs/mine/model --data stories.txt.gz --rows 1000 --saes none
      the loss of your own model on the first 1,000 rows of a text
  bilinear-jax eval --saes 2-mlp-in-x4-k20,2-mlp-out-x4-k20 --data tokens.npy --json
      two SAEs, on token ids [rows, seq], as JSON
"""
COLUMNS = ("nmse", "explained_variance", "l0", "dead", "loss_patched", "loss_zeroed", "loss_added", "loss_recovered")
NOTE = """nmse: squared error / squared norm; l0: active features a token; dead: share of the features that never fire;
loss patched: with the site replaced by the reconstruction, zeroed: by 0; loss added: (patched - clean) / clean;
loss recovered: 1 - (patched - clean) / (zeroed - clean)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_data(parser)
    parser.add_argument(
        "--rows", type=common.positive, default=256, help="rows of n_ctx tokens, the first; all if fewer (default: 256)"
    )
    parser.add_argument(
        "--saes", default="all", help="all, none, or names such as 2-mlp-in-x4-k20, with commas between (default: all)"
    )
    parser.add_argument("--scope", help="folder or hub name of the SAEs (default: where the model's own are)")
    parser.add_argument(
        "--correlation-ks",
        type=common.positive,
        nargs="+",
        default=[],
        metavar="K",
        help="also how well so many eigenpairs predict the features of each SAE at mlp_out; takes longer than the rest",
    )
    parser.add_argument("--batch-size", type=common.positive, default=16, help="rows at once (default: 16)")
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from bilinear_jax import evaluation

    lm = common.load_model(options)
    saes = _saes(options)
    tokens, name = common.load_tokens(options, lm, options.rows)
    scores, size = {}, options.batch_size
    if saes:
        metrics = evaluation.evaluate_saes(lm, saes, tokens, batch_size=size, correlation_ks=options.correlation_ks)
        scores = json.loads(evaluation.to_json(metrics))
        first = next(iter(metrics.values()))
        loss, count = first.loss_clean, first.tokens
    else:
        loss, count = mean_loss(lm, tokens, size)
    shape = {"rows": len(tokens), "seq": tokens.shape[1]}
    return {"model": options.model, "data": name, **shape, "tokens": count, "loss": loss, "saes": scores}


def _saes(options: argparse.Namespace) -> list[Any]:
    from bilinear_jax.checkpoint import load_sae, sae_names
    from weights_convert.names import parse_sae_name

    if options.saes == "none":
        return []
    scope = options.model if options.scope is None else options.scope
    names = sae_names(scope) if options.saes == "all" else options.saes.split(",")
    found = []
    for name in names:
        parts = parse_sae_name(name)
        if parts is None:
            raise common.WrongUse(f"--saes: {name!r} is no SAE's name; one is such as 2-mlp-in-x4-k20")
        found.append(load_sae(scope, parts.site, parts.layer, parts.expansion, parts.k, parts.tag))
    return found


def mean_loss(lm, tokens, batch_size: int) -> tuple[float, int]:
    """Mean cross entropy in nats, and of how many tokens: all but position 0 and the padding at the end of each row."""
    from tqdm.auto import tqdm

    from bilinear_jax.activations import check_dataset, token_batches

    check_dataset(tokens, None)
    total, count = 0.0, 0
    with tqdm(total=len(tokens), desc="loss", disable=None, unit="row") as bar:
        for _, batch, mask in token_batches(lm, tokens, None, min(batch_size, len(tokens))):
            number = int(mask.sum())
            if number:
                total, count = total + float(lm.loss(batch, mask)) * number, count + number
            bar.update(min(len(batch), len(tokens) - bar.n))
    if not count:
        raise ValueError("no token is predicted: rows need at least two tokens that are no padding")
    return total / count, count


def text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']} on {result['rows']} rows of {result['seq']} tokens of {result['data']}",
        f"loss: {result['loss']:.4f} nats a token over {result['tokens']:,} tokens, all but position 0 and padding "
        f"(perplexity {math.exp(result['loss']):.2f})",
    ]
    if not result["saes"]:
        return "\n".join(lines)
    ks = sorted({k for scores in result["saes"].values() for k in scores["correlation"]}, key=int)
    rows = []
    for name, scores in result["saes"].items():
        numbers = [scores[column] for column in COLUMNS] + [scores["correlation"].get(k) for k in ks]
        rows.append([name, *("" if number is None else f"{number:.4g}" for number in numbers)])
    titles = ["SAE", *(column.replace("_", " ") for column in COLUMNS), *(f"r at k = {k}" for k in ks)]
    return "\n".join([*lines, "", common.columns(titles, rows, left=["SAE"]), "", NOTE])
