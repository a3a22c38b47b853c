"""What makes an output feature fire, as a page shows it: its eigenpairs by firing, on rows they were not chosen on."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bilinear_jax.explain.at_token import along_on, strongest
from bilinear_jax.explain.batches import in_groups
from bilinear_jax.explain.explained import Explained
from bilinear_jax.explain.parts import Parts, firing_metrics, own_eigenparts
from bilinear_jax.explain.samples import each_input
from bilinear_jax.explain.scores import Scores
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.linalg.metric import Metric
from bilinear_jax.measure.cofiring import Observed, best_of_rows
from bilinear_jax.pages.activity import Codes, Texts, context, significant
from bilinear_jax.pages.facts import At, Context, Making, Score, Square
from bilinear_jax.pages.options import PageOptions

AT_ONCE = 32  # features whose eigenpairs are computed together; does not change the result


def making(
    tracer: Tracer, features: list[int], chosen, seen: Observed, outputs: Codes, texts: Texts, options: PageOptions
) -> dict[int, Making | None]:
    """What makes each of these features fire. None, if there are no rows for it: it takes two with tokens that count.

    Args:
        chosen: the rows of the dataset that were observed. The first of them are chosen on, the last scored on.
        seen, outputs: what was observed, and the codes of the output SAE in it.
    """
    half, seq = min(options.scored_rows, len(chosen)) // 2, chosen.shape[1]
    first = (len(chosen) - half) * seq  # the place of the first scoring token
    if not (seen.counts[: half * seq].any() and seen.counts[first:].any()):
        return dict.fromkeys(features)
    seen_by_mlp = _Choosing.of(tracer, chosen[:half], options.batch_size)
    k = min(options.squares, Metric.of(seen_by_mlp.moment).root.shape[1])
    numbers = sorted({number for number in (1, 2, k) if number <= k})
    scores = tracer.explained(
        chosen[-half:], chosen[:half], features=features, parts=numbers, by="firing", batch_size=options.batch_size
    )
    parts = _parts(tracer, features, seen_by_mlp, seen, half * seq, k)
    along = along_on(tracer, jnp.asarray(parts.vectors), chosen[-half:], batch_size=options.batch_size)
    basis, made = np.asarray(tracer.basis, np.float64), {}
    for column, feature in enumerate(features):
        firing = outputs.of(feature)
        held = firing.places >= first
        places, codes = firing.places[held], firing.codes[held]
        values, vectors = (np.asarray(part[column], np.float64) for part in parts)
        terms = values[:, None, None] * along[column].astype(np.float64) ** 2
        flat = terms.reshape(k, -1)
        form = seen.z[:, column] - seen.encoder[column]  # u . y at each token
        here = flat[:, places - first]
        weights = values[:, None] * along[column].reshape(k, -1)[:, places - first]
        finds = (seen.inputs[places].T @ weights.T).T * (vectors @ basis)  # [k, features]: l (p . x) (p . d_j) c_j
        squares = []
        for n, tokens in enumerate(strongest(terms, options.square_contexts)):
            added, whole = here[n].sum(), form[places].sum()
            order = np.argsort(-np.abs(finds[n]), kind="stable")[: options.reads] if added else []
            squares.append(
                Square(
                    value=float(values[n]),
                    mean=float(here[n].mean()) if len(places) else None,
                    share=float(added / whole) if whole else None,
                    finds=[(int(one), float(finds[n, one] / added)) for one in order],
                    contexts=[
                        _context(texts, first + int(row) * seq + int(position), flat[n], first, options)
                        for row, position in tokens
                    ],
                )
            )
        best = best_of_rows(places // seq, np.abs(codes))[: options.firings]
        made[feature] = Making(
            *scores.tokens,
            firings=len(places),
            squares=squares,
            tokens=[
                At(
                    context(texts, outputs, feature, int(places[one]), options.window),
                    float(form[places[one]]),
                    here[:, one].tolist(),
                )
                for one in best
            ],
            scores=_scores(scores, column),
        )
    return made


class _Choosing(NamedTuple):
    """What the MLP's tensor reads at the choosing tokens, and its second moment."""

    x: Float[np.ndarray, "tokens in"]
    moment: Float[np.ndarray, "in in"]

    @staticmethod
    def of(tracer: Tracer, rows, batch_size: int) -> "_Choosing":
        lm, site = tracer.lm.original, (tracer.site, tracer.layer)
        got = each_input(lm, site, tracer.tensor.n_in, rows, batch_size=batch_size)
        x = np.concatenate([np.asarray(read)[np.asarray(batch.mask)] for batch, read in got])
        return _Choosing(x, x.T.astype(np.float64) @ x / len(x))


def _parts(tracer: Tracer, features: list[int], choosing: _Choosing, seen: Observed, tokens: int, k: int) -> Parts:
    """The first k eigenpairs by firing of each feature, chosen on the first tokens that were observed."""
    counted = np.flatnonzero(seen.counts[:tokens])
    fired = seen.outputs[counted][:, features].toarray().T != 0

    def of_group(columns) -> Parts:
        some = np.asarray(features)[columns]
        metrics = firing_metrics(choosing.x, fired[columns], choosing.moment)
        return own_eigenparts(tracer.tensor, tracer.directions[some], k, metrics)

    return in_groups(of_group, np.arange(len(features)), AT_ONCE)


def _context(texts: Texts, place: int, terms: Float[np.ndarray, " tokens"], first: int, options) -> Context:
    """The tokens around one, with what a square adds at each. ``first``: the place of the first of the terms."""
    row, start, stop, shown = texts.around(place, options.window)
    begin = stop - len(shown)
    values = significant(terms[begin - first : stop - first]).tolist()
    return Context(row, start, place - begin, shown, values)


def _scores(found: Explained, row: int) -> list[Score]:
    """The scores of one feature, which is a row of what was found."""

    def score(name: str, scores: Scores, column: int, control: bool = False) -> Score:
        numbers = [float(one[row, column]) for one in (scores.average_precision, scores.r2, scores.r2_active)]
        return Score(name, *(None if np.isnan(number) else number for number in numbers), control=control)

    most = found.parts[-1]
    return [
        *(score(f"{n} eigenpair{'s' * (n > 1)}", found, column) for column, n in enumerate(found.parts)),
        *(score(f"{name}, {most}", one, -1, control=True) for name, one in found.controls.items()),
        *(score(f"{name} lookup", one, 0, control=True) for name, one in found.lookups.items()),
        score("all eigenpairs", found.full, 0),
    ]
