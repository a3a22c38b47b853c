"""How much of an output feature its explanation explains, on tokens that it was not chosen on, beside its controls.

An explanation is a sum of a few squares (``explain.parts``). It is chosen on the first half of some text, or on text of
your own, and scored on the rest (``explain.scores``). Beside it stand

    full       the whole pre-activation: as good as any explanation can be
    lookups    the mean of the token, and of the bigram, fitted on the choosing tokens (``explain.lookups``)
    controls   rotated: the form cut along random directions (``explain.parts``); of pairs, random pairs
               random directions: the same method for a random output direction of the same norm, which "fires" at as
               many tokens as the feature

An explanation that its controls match explains nothing that is special about the feature.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bilinear_jax.explain.batches import in_groups
from bilinear_jax.explain.feature_pairs import inputs_read
from bilinear_jax.explain.lookups import lookups
from bilinear_jax.explain.parts import Pairs, Parts, check_method, checked_numbers, partial_sums, random_directions
from bilinear_jax.explain.removed import firings_left
from bilinear_jax.explain.replaced import Recovered, recovered
from bilinear_jax.explain.samples import Layer, Samples, gather, halves
from bilinear_jax.explain.scores import Scores, largest, score
from bilinear_jax.explain.ways import Way, way_of
from bilinear_jax.linalg.devices import one_blas_thread

BYTES = 2**26  # of the predictions that are held at once; does not change the result


@dataclasses.dataclass(frozen=True)
class Explained(Scores):
    """The scores of the explanations of output features, and what to compare them with. All arrays are on the host."""

    by: str  # how the parts were chosen
    parts: tuple[int, ...]  # the number of parts in each column
    features: Int[np.ndarray, " features"]  # the output feature of each row
    firings: Int[np.ndarray, " features"]  # scoring tokens at which it fires
    tokens: tuple[int, int]  # numbers of choosing and scoring tokens
    full: Scores  # of the whole pre-activation, [features, 1]
    lookups: Mapping[str, Scores]  # token and bigram, [features, 1]
    controls: Mapping[str, Scores]  # rotated or random pairs, and random directions, [features, parts]
    inputs_read: Int[np.ndarray, "features parts"]  # the inputs that the parts read: all, or those in the pairs
    firings_left: Float[np.ndarray, "features parts"] | None  # explain.removed; None of plain directions, and of codes
    firings_left_random: Float[np.ndarray, "features parts"] | None  # the same for random directions of the input
    layer: Recovered | None  # the MLP replaced by the explanations of all features: explain.replaced

    def table(self) -> str:
        """The medians over features as a Markdown table, with a row for each number of parts.

        Example:
            >>> import bilinear_jax as bj
            >>> tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
            >>> found = tracer.explained(bj.load_corpus("ts-nano")[:8], features=range(8), parts=(1, 8))
            >>> print(found.table().splitlines()[0])
            | explanation | parts | R2 | R2 where it fires | average precision | precision | recall |
        """
        rows: list[tuple[str, ...]] = [
            ("explanation", "parts", "R2", "R2 where it fires", "average precision", "precision", "recall")
        ]
        rows.append(tuple("---" for _ in rows[0]))
        both: dict[str, Scores] = {self.by: self} | {f"control: {name}": one for name, one in self.controls.items()}
        for name, scores in both.items():
            rows += [(name, str(n), *_medians(scores, i)) for i, n in enumerate(self.parts)]
        rows += [(f"{name} lookup", "", *_medians(scores, 0)) for name, scores in self.lookups.items()]
        rows.append(("the pre-activation itself", "all", *_medians(self.full, 0)))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _medians(scores: Scores, column: int) -> list[str]:
    found = []
    for field in dataclasses.fields(Scores):
        values = getattr(scores, field.name)[:, column]
        values = values[~np.isnan(values)]
        found.append(f"{np.median(values):.3f}" if len(values) else "")
    return found


def explained(
    layer: Layer,
    features: Int[np.ndarray, " features"],
    tokens,
    choose=None,
    *,
    parts: Iterable[SupportsIndex],
    by: str,
    seed: int,
    loss: bool,
    token_mask,
    batch_size: int,
) -> Explained:
    """The scores of the explanations of some output features: see ``Tracer.explained``."""
    check_method(by)
    numbers = checked_numbers("number of parts", parts, layer.tensor.n_in)
    scoring_rows, choosing_rows, masks = halves(tokens, choose, token_mask)
    choosing, scoring = (
        gather(layer, rows, mask, batch_size) for rows, mask in zip((choosing_rows, scoring_rows), masks, strict=True)
    )
    way = way_of(by, layer, choosing, numbers, seed)
    keys = jax.random.split(jax.random.key(seed))
    most_at_once = max(1, BYTES // (8 * numbers[-1] * max(len(choosing.x), len(scoring.x))))

    def of_group(some):
        rows = jnp.asarray(layer.directions)[some]
        random = random_directions(rows, jnp.asarray(some), keys[1])
        return _of_some(layer, some, rows, random, choosing, scoring, way, numbers, keys[0])

    with one_blas_thread():
        made = in_groups(of_group, features, most_at_once)
        its_loss = recovered(layer, way, numbers, choosing, scoring_rows, masks[1], batch_size) if loss else None
    return Explained(
        **{field.name: getattr(made.scores["explanation"], field.name) for field in dataclasses.fields(Scores)},
        by=by,
        parts=numbers,
        features=np.asarray(features),
        firings=made.firings,
        tokens=(len(choosing.x), len(scoring.x)),
        full=made.scores["full"],
        lookups={name: made.scores[name] for name in ("token", "bigram")},
        controls={name: made.scores[name] for name in (way.control_name, "random directions")},
        inputs_read=made.inputs_read,
        firings_left=made.left,
        firings_left_random=made.left_random,
        layer=its_loss,
    )


class _OfSome(NamedTuple):
    """What is found of some features, on the host."""

    scores: dict[str, Scores]  # by what is scored
    firings: Int[np.ndarray, " U"]
    inputs_read: Int[np.ndarray, "U parts"]
    left: Float[np.ndarray, "U parts"] | None
    left_random: Float[np.ndarray, "U parts"] | None


def _of_some(layer: Layer, some, rows, random, choosing: Samples, scoring: Samples, way: Way, numbers, key) -> _OfSome:
    z, held_z = choosing.y @ np.asarray(rows).T, scoring.y @ np.asarray(rows).T  # [tokens, U]
    if layer.sae is None:
        fired, held_fired = np.zeros(z.T.shape, bool), np.zeros(held_z.T.shape, bool)
    else:
        fired, held_fired = (one.fired(some, layer.sae.config.n_features) for one in (choosing, scoring))

    def scores(chosen, predicted, targets=(z, held_z), firing=(fired, held_fired)) -> Scores:
        return score(chosen, targets[0].T, firing[0], predicted, targets[1].T, firing[1])

    def sums(found: Parts | Pairs):
        both = tuple(partial_sums(jnp.asarray(one.x), found, numbers) for one in (choosing, scoring))
        return jax.device_get(both)

    explanation, control = way.choose(rows, z, fired), way.control(rows, z, fired)
    made = {"explanation": scores(*sums(explanation)), way.control_name: scores(*sums(control))}
    other, held_other = choosing.y @ np.asarray(random).T, scoring.y @ np.asarray(random).T
    firing = (largest(other.T, fired.sum(axis=1)), largest(held_other.T, held_fired.sum(axis=1)))
    found = way.choose(random, other, firing[0])
    made["random directions"] = scores(*sums(found), targets=(other, held_other), firing=firing)
    for name, (chosen, predicted) in lookups(choosing, scoring, z).items():
        made[name] = scores(chosen.T[:, None], predicted.T[:, None])
    made["full"] = scores(z.T[:, None], held_z.T[:, None])
    left = left_random = None
    if layer.sae is not None and layer.inputs is None and isinstance(explanation, Parts):
        left, left_random = (
            firings_left(layer, scoring, some, held_fired, one, numbers)
            for one in (explanation.vectors, jax.random.normal(key, explanation.vectors.shape))
        )
    return _OfSome(made, held_fired.sum(axis=1), inputs_read(explanation, numbers), left, left_random)
