"""``bilinear-jax trace --readable``: a feature of a readable transcoder as the product that it is."""

import argparse
from typing import Any

from bilinear_jax.commands import common

ROWS, TOKENS = 64, 256
"""Rows of the dataset that scores and names come from, and the most tokens of a row."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    from bilinear_jax.explain.products import product
    from bilinear_jax.explain.tracer import Tracer

    lm = common.load_model(options)
    sae, inp = _dictionaries(options, lm)
    tracer = Tracer(lm, options.layer, inp, sae)
    found = product(sae, options.feature)
    result: dict[str, Any] = {
        "model": options.model,
        "layer": options.layer,
        "inp": inp.name,
        "out": sae.name,
        "feature": options.feature,
        "inputs_read": found.inputs_read,
        "constant": found.constant,
    }
    for side in ("left", "right"):
        its = getattr(found, side)
        terms = [{"input": int(i), "weight": float(w)} for i, w in zip(its.features, its.weights, strict=True)]
        result[side] = {"terms": terms, "constant": its.constant}
    if options.text is not None:
        result["account"] = at_tokens(tracer, found, lm.encode(options.text, keep_end=options.keep_end), options)
    text = common.load_tokens(options, lm, rows=ROWS, seq=TOKENS)
    return result | scored(tracer, options.feature, text) | names(tracer, found, options.feature, text)


def _dictionaries(options: argparse.Namespace, lm) -> tuple[Any, Any]:
    """The readable transcoder of the layer, and the SAE that it reads."""
    from bilinear_jax.store.dictionaries import load_dictionary

    places = [options.scope, lm.source] if options.scope else [lm.source]
    chosen: dict[str, Any] = {"tag": "readable"} | (options.out_sae or {}) | {"site": "mlp-in", "target": "mlp-out"}
    sae = load_dictionary(places[0], layer=options.layer, model=lm, **chosen)
    c = sae.config
    if c.inputs is None:
        raise ValueError(f"{sae.name} is no readable transcoder: choose one with --out-sae, or leave out --readable")
    wanted: dict[str, Any] = {"expansion": c.inputs / c.d_model, "k": c.inputs_k} | (options.inp_sae or {})
    inp = load_dictionary(places[-1], site="mlp-in", layer=options.layer, target="mlp-in", model=lm, **wanted)
    return sae, inp


def at_tokens(tracer, found, tokens, options: argparse.Namespace) -> dict[str, Any]:
    """Both sums and the pre-activation at each token, and the input features that make them at one of them."""
    import numpy as np

    from bilinear_jax.explain.products import input_codes
    from bilinear_jax.show.text import token_label

    site = "mlp_in", tracer.layer
    x = tracer.lm.original.capture(tokens, [site])[site]
    codes = input_codes(tracer.out, x)[0]
    active = np.asarray(tracer.out.encode(x))[0, :, options.feature]
    z, counts = found.of(codes), np.asarray(tracer.lm.token_mask(tokens))[0]
    position = common.chosen_position(options.position, z, counts)
    left, right = found.left.of(codes), found.right.of(codes)
    rows = [
        {
            "position": place,
            "token": token_label(tracer.lm.tokenizer, token),
            **{"left": float(left[place]), "right": float(right[place])},
            **{"preactivation": float(z[place]), "activation": float(active[place])},
        }
        for place, token in enumerate(tokens[0].tolist())
    ]
    there = [
        {"side": side, "input": int(i), "code": float(codes[position, i]), "adds": float(w * codes[position, i])}
        for side, its in (("left", found.left), ("right", found.right))
        for i, w in zip(its.features, its.weights, strict=True)
        if codes[position, i]
    ]
    return {"tokens": rows, "position": position, "active": there}


def scored(tracer, feature: int, text: common.Tokens) -> dict[str, Any]:
    """How much this explains of the feature, and all features together of the layer, each beside a control."""
    from bilinear_jax.measure.evaluation import controls, evaluate_sae
    from bilinear_jax.store.files import finite_or_null

    half = len(text.ids) // 2
    if not half:
        return {}
    found = tracer.explained(text.ids, features=[feature], parts=[2], by="weight")
    held = text.ids[half:]
    layer, control = (
        evaluate_sae(tracer.lm.original, tracer.out, held),
        controls(tracer.lm.original, [tracer.out], held),
    )
    ways = {"this product": found, "control: a random direction": found.controls["random directions"]}
    ways |= {f"{name} lookup": one for name, one in found.lookups.items()}
    result = {
        "scores": {
            name: {column: float(getattr(one, column)[0, 0]) for column in ("r2", "r2_active", "average_precision")}
            for name, one in ways.items()
        },
        "layer_scores": {
            name: {column: float(getattr(one, column)) for column in ("explained_variance", "loss_recovered")}
            for name, one in (("all features", layer), ("control: a random dictionary", *control.values()))
        },
        "scored_on": {"text": text.name, "scored": found.tokens[1]},
    }
    return finite_or_null(result)


def names(tracer, found, feature: int, text: common.Tokens) -> dict[str, Any]:
    """The tokens that the feature and its inputs fire on."""
    from bilinear_jax.show.visualizer import Visualizer, top_tokens

    inputs = sorted({int(i) for its in (found.left, found.right) for i in its.features})
    inp, out = (Visualizer(tracer.lm.original, sae, text.ids) for sae in (tracer.inp, tracer.out))
    named = {str(one): tokens for one, tokens in top_tokens(inp, inputs).items()}
    return {"fires_on": top_tokens(out, [feature])[feature], "inputs": named}


def text(result: dict[str, Any]) -> str:
    def named(one: int) -> str:
        return f"{one} ({' '.join(result['inputs'][str(one)]) or 'dead'})"

    lines = [
        f"output feature {result['feature']} of {result['out']} of {result['model']}, fires on: "
        f"{' '.join(result['fires_on']) or 'nothing (dead)'}",
        "",
        f"== It is left * right {result['constant']:+.4f}: sums of {result['inputs_read']} features of {result['inp']}",
    ]
    rows = []
    for side in ("left", "right"):
        rows += [[side, f"{term['weight']:+.4f}", named(term["input"])] for term in result[side]["terms"]]
        rows += [[side, f"{result[side]['constant']:+.4f}", "always"]]
    lines += [common.columns(["side", "weight", "input feature"], rows, left=["side", "input feature"])]
    if "scores" in result:
        lines += _scores_text(result)
    return "\n".join(lines + (_account_text(result["account"], named) if "account" in result else []))


def _scores_text(result: dict[str, Any]) -> list[str]:
    def table(scores: dict[str, Any], titles: list[str]) -> str:
        rows = [[name, *("" if v is None else f"{v:.3f}" for v in one.values())] for name, one in scores.items()]
        return common.columns(["", *titles], rows, left=[""])

    on = result["scored_on"]
    return [
        "",
        f"== How much that explains, on {on['scored']} tokens of {on['text']}",
        table(result["scores"], ["R2", "where it fires", "average precision"]),
        "Nothing of the feature is left out. What its dictionary misses of the layer, all features together, is here:",
        table(result["layer_scores"], ["explained variance", "loss recovered"]),
    ]


def _account_text(account: dict[str, Any], named) -> list[str]:
    keys = ("left", "right", "preactivation")
    rows = [
        [row["position"], row["token"], *(f"{row[key]:+.4f}" for key in keys), f"{row['activation']:.4f}"]
        for row in account["tokens"]
    ]
    titles = ["position", "token", "left", "right", "pre-activation", "activation"]
    lines = [
        "",
        "== At each token; activation 0: not among the k largest",
        common.columns(titles, rows, left=["token"]),
    ]
    one = account["tokens"][account["position"]]
    lines += ["", f"== At position {one['position']}, {one['token']}: the input features that are active there"]
    rows = [
        [each["side"], f"{each['adds']:+.4f}", f"{each['code']:.4f}", named(each["input"])]
        for each in account["active"]
    ]
    return [*lines, common.columns(["side", "adds", "code", "input feature"], rows, left=["side", "input feature"])]
