"""What makes a feature fire, as ``trace`` says it: eigenpairs where it fires, how much they explain, and at a token."""

from typing import Any

from bilinear_jax.commands import common

ROWS, TOKENS = 32, 256
"""Rows of the dataset in whose metric eigenpairs are, and as many to score them on; and the most tokens of a row."""

TEXTS = 2
"""Texts for each eigenpair."""

FINDS = "what its vector finds in x: share of input features"


def scored(tracer, feature: int, k: int, text: common.Tokens) -> dict[str, Any]:
    """How much the first k eigenpairs explain on one half of the rows, chosen on the other; nothing of one row."""
    import dataclasses

    from bilinear_jax.explain.scores import Scores
    from bilinear_jax.store.files import finite_or_null

    if len(text.ids) < 2:
        return {}
    numbers = sorted({n for n in (1, 2, k) if n <= k})
    found = tracer.explained(text.ids, features=[feature], parts=numbers, by="firing")

    def row(scores, column: int = 0) -> dict[str, float | None]:
        values = {field.name: float(getattr(scores, field.name)[0, column]) for field in dataclasses.fields(Scores)}
        return finite_or_null(values)

    listed = {_eigenpairs(n): row(found, column) for column, n in enumerate(numbers)}
    listed |= {f"control: {name}, {numbers[-1]}": row(one, -1) for name, one in found.controls.items()}
    listed |= {f"{name} lookup": row(one) for name, one in found.lookups.items()} | {"all eigenpairs": row(found.full)}
    tokens = {"text": text.name, "chosen": found.tokens[0], "scored": found.tokens[1]}
    return {"scores": listed, "scored_on": tokens | {"fires": int(found.firings[0])}}


def at_tokens(tracer, tokens, found, feature: int, position: int, k: int, text: common.Tokens) -> dict[str, Any]:
    """What the first k eigenpairs add at each token, and at one position what they find. ``found``: the account."""
    import numpy as np

    from bilinear_jax.explain.at_token import along_on, form_at, strongest
    from bilinear_jax.explain.parts import Parts
    from bilinear_jax.explain.samples import tensor_inputs

    rows, held = text.ids[:ROWS], text.ids[ROWS : 2 * ROWS]
    metric = tracer.metric(rows, firing=feature)
    top = tracer.top_eigh(metric.root.shape[1], [feature], metric=metric, exact=True)
    every = Parts(top.values, top.vectors)

    def terms(tokens, mask=None):  # of the first k eigenpairs, [k, rows, seq]
        along = along_on(tracer, top.vectors[:, :k], tokens, token_mask=mask)[0]
        return np.asarray(top.values)[0, :k, None, None] * along**2

    x = tensor_inputs(tracer.lm.original, (tracer.site, tracer.layer), tracer.tensor.n_in, tokens)
    at, codes, indices = (array[0, position] for array in (x, found.codes, found.indices))
    form = form_at(tracer, every, at, codes, indices, feature, n=k)
    listed: list[dict[str, Any]] = [one._asdict() | {"largest_at": []} for one in form.eigenpairs]
    if len(held):
        for one, places in zip(listed, strongest(terms(held), TEXTS), strict=True):
            texts = common.texts_at(tracer.lm, held, places.tolist())
            one["largest_at"] = [" ".join(text.split()) for text in texts]
    at_each = terms(tokens, np.ones(tokens.shape, bool))[:, 0].T
    whole = np.asarray(tracer.tensor.apply(x[0]) @ tracer.directions[feature])
    return {
        "form": {"total": form.total, "listed": form.first, "metric": text.name},
        "eigenpairs": listed,
        "eigenpairs_at": [
            {"form": float(total), "contributions": its}
            for total, its in zip(whole, at_each.astype(float).tolist(), strict=True)
        ],
    }


def _eigenpairs(n: int) -> str:
    return f"{n} eigenpair{'s' * (n > 1)}"


def scores_text(result: dict[str, Any]) -> list[str]:
    """How much the first eigenpairs explain, beside their controls."""
    columns = {"r2": "R2", "r2_active": "where it fires", "average_precision": "average precision"}
    rows = [
        [name, *("" if scores[column] is None else f"{scores[column]:.3f}" for column in columns)]
        for name, scores in result["scores"].items()
    ]
    on = result["scored_on"]
    return [
        "",
        "== How much its eigenpairs explain",
        common.columns(["", *columns.values()], rows, left=[""]),
        f"Chosen on {on['chosen']} tokens of {on['text']}, half of their weight where the feature fires; scored on",
        f"{on['scored']} others, at {on['fires']} of which it fires. R2 is of the pre-activation, average precision of",
        "where it fires. What a control matches says nothing of this feature.",
    ]


def at_tokens_text(account: dict[str, Any]) -> list[str]:
    """What each eigenpair adds at the tokens at which the feature fires, and at the position."""
    if "eigenpairs_at" not in account:
        return []
    numbers = range(1, len(account["eigenpairs"]) + 1)
    rows = []
    for token, here in zip(account["tokens"], account["eigenpairs_at"], strict=True):
        if token["activation"] or token["position"] == account["position"]:
            rest = here["form"] - sum(here["contributions"])
            values = [f"{value:+.2f}" for value in (here["form"], *here["contributions"], rest)]
            rows.append([token["position"], token["token"], f"{token['activation']:.2f}", *values])
    titles = ["position", "token", "activation", "x^T Q x", *map(str, numbers), "others"]
    return [
        "",
        "== What each eigenpair adds where it fires",
        common.columns(titles, rows, left=["token"]),
        "The eigenpairs 1, 2, ... are those of the metric above, chosen on other tokens. They and the others add up to",
        "x^T Q x. A negative one suppresses the feature.",
    ]


def at_position_text(account: dict[str, Any], named) -> list[str]:
    """The eigenpairs at one position: what their vectors find, and where else they are largest."""
    if not account.get("eigenpairs"):
        return []
    rows, texts = [], []
    for number, one in enumerate(account["eigenpairs"], 1):
        finds = ", ".join(f"{share:+.0%} {named(feature)}" for feature, share in one["finds"])
        rows.append([number, f"{one['contribution']:+.4f}", f"{one['share']:.1%}", finds])
        texts += [f"  {number} is largest at: {text}" for text in one["largest_at"]]
    form = account["form"]
    return [
        common.columns(["eigenpair", "contribution", "share", FINDS], rows, left=[FINDS]),
        f"These {len(rows)} add up to {form['listed']:+.4f} of x^T Q x, {form['total']:+.4f}.",
        *texts,
        "",
    ]
