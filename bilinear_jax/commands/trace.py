"""``bilinear-jax trace``: explain an output feature from the weights, and exactly at the tokens of a text."""

import argparse
from typing import Any

from bilinear_jax.commands import common, trace_eigenpairs, trace_readable

HELP = "explain one output feature: its eigenvalues, its interactions, the exact account at a token"
EXAMPLES = """examples:
  bilinear-jax trace --layer 2 --feature 7
      from the weights: its eigenvalues, and its 20 largest interactions with what their input features fire on
  bilinear-jax trace --layer 2 --feature 7 --text "Once upon a time, there was a little girl."
      also every term of its pre-activation at each token, and the pairs of input features at the strongest one
  bilinear-jax trace --layer 2 --feature 7 --text "Once upon a time" --position 3 --n 5 --json
      at the fourth token, five pairs, as JSON
  bilinear-jax trace --layer 2 --feature 7 --readable --scope runs/readable --text "Once upon a time"
      a feature of a readable transcoder: a product of two short sums of input features, and nothing else
"""
EIGENVECTOR = "its eigenvector: cosine with input features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_tracer(parser)
    common.add_data(parser)
    parser.add_argument("--feature", type=common.natural, required=True, help="the output feature")
    parser.add_argument("--n", type=common.positive, default=20, help="pairs of input features (default: 20)")
    parser.add_argument("--k", type=common.positive, default=6, help="eigenvalues (default: 6)")
    parser.add_argument(
        "--text", type=common.unicode, help="the exact account of the feature at the tokens of this text"
    )
    parser.add_argument(
        "--position", type=common.natural, help="position of the token to explain, from 0 (default: the strongest)"
    )
    parser.add_argument(
        "--readable",
        action="store_true",
        help="a feature of a readable transcoder, as the product that it is",
    )
    common.add_keep_end(parser)
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.text is None and options.position is not None:
        raise common.WrongUse("--position needs a text: give --text too")
    if options.text is not None and not options.use_encoder:
        raise common.WrongUse("--text explains what makes a feature fire (its encoder row): leave out --no-use-encoder")
    if options.readable:
        return trace_readable.run(options)
    from bilinear_jax.explain.account import account

    lm = common.load_model(options)
    tracer = common.load_tracer(options, lm)
    result = {
        "model": options.model,
        "layer": options.layer,
        "inp": tracer.inp.name,
        "out": tracer.out.name,
        "use_encoder": options.use_encoder,
        "feature": options.feature,
    }
    if options.k > tracer.tensor.n_in:
        raise ValueError(f"--k is {options.k}, but each feature has {tracer.tensor.n_in} eigenvalues: ask for fewer")
    result |= from_weights(tracer, options.feature, options.k, options.n)
    text = _metric_text(options, lm)
    if options.text is not None:
        tokens = lm.encode(options.text, keep_end=options.keep_end)
        found = account(tracer, tokens, options.feature)
        result["account"] = at_tokens(tracer, tokens, options.feature, found, options.n, options.position)
        if text is not None:
            position = result["account"]["position"]
            options_at = options.feature, position, options.k, text
            result["account"] |= trace_eigenpairs.at_tokens(tracer, tokens, found, *options_at)
    if text is not None:
        result |= trace_eigenpairs.scored(tracer, options.feature, options.k, text)
    return result | _fires_on(options, tracer, result)


def from_weights(tracer, feature: int, k: int, n: int) -> dict[str, Any]:
    """The k largest |eigenvalues| with what their eigenvectors read, and the n largest interactions."""
    import dataclasses

    from bilinear_jax.explain.overview import feature_weights
    from bilinear_jax.measure.cofiring import entries

    found = next(feature_weights(tracer, [feature], eigenpairs=k, reads=3, pairs=n))
    shares = entries(found.pairs) * found.weights**2 / (found.projected or 1.0)
    listed = [
        {"i": int(i), "j": int(j), "weight": float(weight), "share": float(share)}
        for (i, j), weight, share in zip(found.pairs, found.weights, shares, strict=True)
    ]
    return {
        "norm": found.norm,
        "effective_rank": found.effective_rank,
        "eigenpairs": [dataclasses.asdict(pair) for pair in found.eigenpairs],
        "explained": found.explained,
        "interactions": listed,
        "interactions_share": float(shares.sum()),
    }


def _metric_text(options: argparse.Namespace, lm) -> common.Tokens | None:
    """The rows of the dataset to choose eigenpairs on, and as many to score them on. None: there is no dataset."""
    try:
        return common.load_tokens(options, lm, rows=2 * trace_eigenpairs.ROWS, seq=trace_eigenpairs.TOKENS)
    except FileNotFoundError:
        if options.data is not None:
            raise
        return None


def at_tokens(tracer, tokens, feature: int, found, n: int, position: int | None) -> dict[str, Any]:
    """The account of the pre-activation at each token, and its parts at one of them."""
    import numpy as np

    from bilinear_jax.explain.account import TERMS
    from bilinear_jax.language import not_finite
    from bilinear_jax.show.text import token_label

    lm = tracer.lm
    site = "mlp_out", tracer.layer
    codes = tracer.out.encode(lm.original.capture(tokens, [site])[site], sparse=True)
    active = np.where(np.asarray(codes.indices) == feature, codes.values, 0).sum(axis=-1)[0]
    if not np.isfinite(np.asarray(codes.values)).all():
        raise not_finite("at the tokens of the text")
    preactivation, counts = np.asarray(found.preactivation)[0], np.asarray(lm.token_mask(tokens))[0]
    position = common.chosen_position(position, preactivation, counts)
    terms = {name: np.asarray(value)[0] for name, value in found.terms.items()}
    tokenizer = lm.tokenizer
    rows = [
        {
            "position": place,
            "token": token_label(tokenizer, token),
            "preactivation": float(preactivation[place]),
            "activation": float(active[place]),
            "terms": {name: float(value[place]) for name, value in terms.items()},
        }
        for place, token in enumerate(tokens[0].tolist())
    ]
    one = {name: np.asarray(getattr(found, name), np.float64)[0, position] for name in TERMS}
    sizes = {name: float(np.abs(value).sum()) for name, value in one.items()}
    whole = sum(sizes.values()) or 1.0
    pairs = _largest(one["pairs"], np.asarray(found.indices)[0, position], np.asarray(found.codes)[0, position])
    pairs = [pair | {"share": abs(pair["contribution"]) / whole} for pair in pairs[:n]]
    return {
        "tokens": rows,
        "position": position,
        "shares": {name: size / whole for name, size in sizes.items()},
        "pairs": pairs,
    }


def _largest(block, indices, codes) -> list[dict[str, Any]]:
    """The pairs that contribute in one token's account, largest first. Both orders of two features are one pair."""
    import numpy as np

    rows, columns = np.tril_indices(len(block))
    both = block[rows, columns] * np.where(rows == columns, 1, 2)
    order = np.argsort(-np.abs(both), kind="stable")
    found = []
    for place in order[both[order] != 0]:
        i, j = sorted((rows[place], columns[place]), key=lambda each: indices[each])
        features = {"i": int(indices[i]), "j": int(indices[j])}
        found.append({**features, "codes": [float(codes[i]), float(codes[j])], "contribution": float(both[place])})
    return found


def _fires_on(options: argparse.Namespace, tracer, result: dict[str, Any]) -> dict[str, Any]:
    """The tokens that each named feature fires on. Empty if there is no dataset."""
    from bilinear_jax.show.visualizer import Visualizer, top_tokens

    pairs = result["interactions"] + result.get("account", {}).get("pairs", [])
    named = {pair[side] for pair in pairs for side in "ij"}
    named |= {feature for each in result["eigenpairs"] for feature, _ in each["reads"]}
    named |= {feature for each in result.get("account", {}).get("eigenpairs", []) for feature, _ in each["finds"]}
    try:
        tokens = None if options.data is None else common.load_tokens(options, tracer.lm).ids
        inp, out = (Visualizer(tracer.lm.original, sae, tokens) for sae in (tracer.inp, tracer.out))
    except FileNotFoundError as error:
        if options.data is not None:
            raise
        return {"fires_on": None, "inputs": {}, "no_tokens": str(error)}
    constant = tracer.inp.config.n_features
    tokens_of = top_tokens(inp, sorted(named - {constant})) | {constant: ["always: the constant input"]}
    inputs = {str(feature): tokens_of[feature] for feature in sorted(named)}
    return {"fires_on": top_tokens(out, [options.feature])[options.feature], "inputs": inputs}


def text(result: dict[str, Any]) -> str:
    if "inputs_read" in result:
        return trace_readable.text(result)

    def named(feature: int) -> str:
        tokens = result["inputs"].get(str(feature))
        return str(feature) if tokens is None else f"{feature} ({' '.join(tokens) or 'dead'})"

    on = "" if result["fires_on"] is None else f", fires on: {' '.join(result['fires_on']) or 'nothing (dead)'}"
    lines = [f"output feature {result['feature']} of {result['out']} of {result['model']}{on}"]
    if "scores" in result:
        lines += trace_eigenpairs.scores_text(result)
    if "account" in result:
        lines += _account_text(result["account"], named)
    lines += _weights_text(result, named)
    if "no_tokens" in result:
        lines += ["", f"It is not known what features fire on: {result['no_tokens']}"]
    return "\n".join(lines)


def _weights_text(result: dict[str, Any], named) -> list[str]:
    rows = [
        [f"{one['value']:+.4f}", f"{one['bound']:.0e}", f"{one['share']:.1%}", _reads(one["reads"], named)]
        for one in result["eigenpairs"]
    ]
    lines = ["", "== Eigenvalues of its interaction matrix Q, from the weights alone"]
    lines += [common.columns(["value", "+- at most", "share", EIGENVECTOR], rows, left=[EIGENVECTOR])]
    lines += [
        f"These hold {result['explained']:.1%} of the squares of Q (norm {result['norm']:.4f}, effective rank "
        f"{result['effective_rank']:.1f}).",
        "",
        f"== The largest of its interactions between input features of {result['inp']}",
    ]
    rows = [
        [f"{pair['weight']:+.4f}", f"{pair['share']:.3%}", named(pair["i"]), named(pair["j"])]
        for pair in result["interactions"]
    ]
    return [
        *lines,
        common.columns(["weight", "share", "i", "j"], rows, left=["i", "j"]),
        f"These {len(rows)} hold {result['interactions_share']:.3%} of the squares of D^T Q D. Two features add twice",
        "their weight times both activations.",
    ]


def _reads(reads, named) -> str:
    return ", ".join(f"{cosine:+.2f} {named(feature)}" for feature, cosine in reads)


def _account_text(account: dict[str, Any], named) -> list[str]:
    from bilinear_jax.explain.account import TERMS

    shown = [name for name in TERMS if any(row["terms"][name] for row in account["tokens"])]
    lines = trace_eigenpairs.at_tokens_text(account)
    if not any(row["activation"] for row in account["tokens"]):
        lines += ["", "The feature does not fire in this text: no token has it among its k largest. Below is the token"]
        lines += ["with the largest pre-activation, or that of --position."]
    one = account["tokens"][account["position"]]
    lines += ["", f"== At position {one['position']}, {one['token']}: pre-activation {one['preactivation']:.4f}"]
    lines += trace_eigenpairs.at_position_text(account, named)
    rows = [[TERMS[name], f"{one['terms'][name]:+.4f}", f"{account['shares'][name]:.1%}"] for name in shown]
    lines += ["The pre-activation in terms of input features:"]
    lines += [common.columns(["term", "sum", "share"], rows, left=["term"])]
    lines += ["share: the fraction of the |terms|; each pair and each feature is one term", ""]
    rows = [
        [f"{pair['contribution']:+.4f}", f"{pair['share']:.1%}", *(named(pair[side]) for side in "ij")]
        for pair in account["pairs"]
    ]
    lines += [common.columns(["contribution", "share", "i", "j"], rows, left=["i", "j"])]
    total = sum(pair["contribution"] for pair in account["pairs"])
    share = sum(pair["share"] for pair in account["pairs"])
    lines += [f"These {len(rows)} pairs of input features add up to {total:+.4f}, and are {share:.1%} of the |terms|."]
    rows = [
        [row["position"], row["token"], *(f"{row[name]:.4f}" for name in ("preactivation", "activation"))]
        + [f"{row['terms'][name]:+.4f}" for name in shown]
        for row in account["tokens"]
    ]
    titles = ["position", "token", "pre-activation", "activation", *(name.replace("_", " ") for name in shown)]
    lines += ["", "== At each token: the terms add up to the pre-activation; activation 0: not among the k largest"]
    return [*lines, common.columns(titles, rows, left=["token"])]
