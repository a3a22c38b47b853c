"""A scan of output features: which of them two eigenpairs explain, and which one eigenpair vetoes, beside a control.

    explained   the average precision of the sum of the two parts of largest |l| in ``z = sum_i l_i (p_i . x)^2``
    negation    how well the largest negative part says where the largest positive one is vetoed

The formulas are in ``explain.scores`` and ``explain.negation``.

The control is the same scan of random output directions of the same lengths, which "fire" at their largest z, at as
many tokens as the feature. The suppressing part is a part of z, so negation is above 0 for them too: only what goes
beyond the best of as many random directions is special about features. The best differ from seed to seed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bilinear_jax.errors import UnknownNameError, check_count
from bilinear_jax.explain.batches import in_groups
from bilinear_jax.explain.explained import BYTES
from bilinear_jax.explain.negation import Seen, scanned
from bilinear_jax.explain.parts import METHODS, METRICS, firing_metrics, random_directions
from bilinear_jax.explain.samples import gather, halves
from bilinear_jax.explain.scores import largest
from bilinear_jax.explain.tracer import Index, Tracer
from bilinear_jax.linalg.devices import one_blas_thread
from bilinear_jax.linalg.metric import Metric

RANKINGS = {"explained": "average_precision_two", "negation": "negation"}
SCORES = ("average_precision_one", "average_precision_two", "r2_active_one", "r2_active_two", "gain", "vetoed")


@dataclasses.dataclass(frozen=True)
class Scan:
    """The scores of some output features, and of as many random directions. All arrays are on the host."""

    features: Int[np.ndarray, " features"]
    firings: Int[np.ndarray, " features"]  # scoring tokens at which it fires
    driven: Int[np.ndarray, " features"]  # driven scoring tokens
    average_precision_one: Float[np.ndarray, " features"]
    average_precision_two: Float[np.ndarray, " features"]
    r2_active_one: Float[np.ndarray, " features"]
    r2_active_two: Float[np.ndarray, " features"]
    gain: Float[np.ndarray, " features"]
    vetoed: Float[np.ndarray, " features"]
    fires: Int[np.ndarray, "features examples 2"]  # driven tokens at which it fires, the smallest s first
    silent: Int[np.ndarray, "features examples 2"]  # driven tokens at which it does not fire, the largest s first
    tokens: tuple[int, int]  # numbers of choosing and scoring tokens
    control: "Scan | None"  # of random directions, in the order of the features; None: this is a control

    # ``fires`` and ``silent`` hold (row, position) in the scoring rows, and (-1, -1) where there is no such token.

    @property
    def negation(self) -> Float[np.ndarray, " features"]:
        """The smaller of gain and vetoed; nan if one of them is."""
        return np.minimum(self.gain, self.vetoed)

    def best(self, n: int = 10, by: str = "explained") -> list[int]:
        """The n features with the largest scores, the largest first. Fewer, if fewer are scored.

        Args:
            by: "explained" (the average precision of two parts), "negation", or the name of a score.

        Raises:
            ValueError: if n is below 1.
            UnknownNameError: if ``by`` does not exist.
        """
        return [int(self.features[place]) for place in self._order(n, by)]

    def rows(self, n: int = 10, by: str = "explained") -> list[dict[str, Any]]:
        """The scores of ``best(n, by)``, by name. "value" ranks them; "control" is the control's at the same rank."""
        values, control = self._values(by), self.control
        others = [] if control is None else control._values(by)[control._order(n, by)].tolist()
        found = []
        for rank, place in enumerate(self._order(n, by)):
            one: dict[str, Any] = {"feature": int(self.features[place])}
            one |= {name: int(getattr(self, name)[place]) for name in ("firings", "driven")}
            one |= {"value": float(values[place]), "control": others[rank] if rank < len(others) else float("nan")}
            found.append(one | {name: float(getattr(self, name)[place]) for name in SCORES})
        return found

    def table(self, n: int = 10, names: Mapping[int, str] | Sequence[str] | None = None, by: str = "explained") -> str:
        """The n best features as a Markdown table; beside each, the value of the control at the same rank.

        Args:
            names: what to call each feature, by its number.
            by: as for ``best``, with the same errors.

        Example:
            >>> import bilinear_jax as bj
            >>> tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
            >>> found = bj.scan(tracer, bj.load_corpus("ts-nano")[:8], features=range(8))
            >>> print(found.table(2, by="negation").splitlines()[0])
            | rank | feature | fires at | negation | control | AP: 1 | AP: 2 | R2: 1 | R2: 2 | gain | vetoed |
        """
        titles = ["rank", "feature", *([] if names is None else ["name"]), "fires at", by, "control"]
        titles += ["AP: 1", "AP: 2", "R2: 1", "R2: 2", "gain", "vetoed"]
        rows = [titles, ["---"] * len(titles)]
        for rank, row in enumerate(self.rows(n, by)):
            named = [] if names is None else [str(names[row["feature"]])]
            numbers = [f"{row[name]:.3f}" for name in ("value", "control", *SCORES)]
            rows.append([str(rank + 1), str(row["feature"]), *named, str(row["firings"]), *numbers])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _values(self, by: str) -> Float[np.ndarray, " features"]:
        if by not in (known := (*RANKINGS, *SCORES)):
            raise UnknownNameError("by", repr(by), known, of="rankings of a scan")
        return getattr(self, RANKINGS.get(by, by))

    def _order(self, n: int, by: str) -> Int[np.ndarray, " best"]:
        check_count("n", n)
        values = self._values(by)
        return np.argsort(-values, kind="stable")[: min(n, np.sum(~np.isnan(values)))]  # nan is last


def scan(
    tracer: Tracer,
    tokens,
    choose=None,
    *,
    features: Index | None = None,
    by: str = "firing",
    seed: int = 0,
    token_mask=None,
    batch_size: int = 16,
) -> Scan:
    """Which output features a few eigenpairs explain, and which look like a negation, beside random directions.

        z = sum_i l_i (p_i . x)^2        gain = AP(d - s) - AP(d)        vetoed = AP(s, among the driven) - chance

    The formulas are in ``explain.negation``. A score of a feature is worth what it has beyond that of the control.

    Args:
        tokens: token ids ``[rows, seq]`` to score on. Without ``choose``, the parts are chosen on the first half of the
            rows, and scored on the second; then the rows in ``fires`` and ``silent`` are those of the second half.
        choose: other token ids, to choose the metric, the parts and the thresholds on.
        features: which output features (as for ``Tracer.q``); None: all.
        by: the metric in which the parts are chosen, "firing", "data" or "weight" (``explain.parts``).
        seed: of the random directions. They are those of ``Tracer.explained``.
        token_mask: of ``tokens``; by default the tokens that count (see ``LanguageModel.batches``).
        batch_size: rows that are run through the model at once.

    Raises:
        ValueError: if there is one row and no ``choose``, the output is plain directions, which do not fire, the tokens
            do not fit the model, or no feature is named.
        UnknownNameError: if a feature or ``by`` does not exist.

    Memory: on the host ``tokens (in + out)`` numbers, and a few times 64 MiB; by firing, also ``4 in^2`` numbers for
    each of some features at a time.

    Example:
        >>> import bilinear_jax as bj
        >>> tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
        >>> found = bj.scan(tracer, bj.load_corpus("ts-nano")[:8], features=range(8))
        >>> found.gain.shape, found.control.gain.shape, found.fires.shape
        ((8,), (8,), (8, 3, 2))
    """
    if by not in METHODS:
        raise UnknownNameError("by", repr(by), METHODS, of="metrics of a scan")
    sae = tracer.out
    layer, some = tracer.scored(features)
    scoring_rows, choosing_rows, masks = halves(tokens, choose, token_mask)
    both = [
        gather(layer, rows, mask, batch_size) for rows, mask in zip((choosing_rows, scoring_rows), masks, strict=True)
    ]
    moment, key = both[0].moment, jax.random.split(jax.random.key(seed))[1]
    metric = None if by == "firing" else Metric.of(moment, shrink=METRICS[by])

    def of_each(rows, halves):
        its = firing_metrics(both[0].x, halves[0].fired, moment) if metric is None else metric
        return scanned(layer.tensor, rows, its, *halves)

    def of_group(group):
        rows = jnp.asarray(layer.directions)[group]
        random = random_directions(rows, jnp.asarray(group), key)
        own = [Seen(one.x, np.asarray(rows) @ one.y.T, one.fired(group, sae.config.n_features)) for one in both]
        its = [np.asarray(random) @ one.y.T for one in both]
        other = [Seen(one.x, z, largest(z, one.fired.sum(axis=1))) for one, z in zip(own, its, strict=True)]
        return of_each(rows, own), of_each(random, other)

    with one_blas_thread():
        found, control = in_groups(of_group, some, max(1, BYTES // (32 * max(len(one.x) for one in both))))
    mask = masks[1] if masks[1] is not None else layer.lm.token_mask(scoring_rows)
    places = np.vstack([np.argwhere(np.asarray(mask)), [[-1, -1]]])  # of the scoring tokens; -1 is none
    for one in (found, control):
        one |= {name: places[one[name]] for name in ("fires", "silent")}
        one |= {"features": some, "tokens": (len(both[0].x), len(both[1].x))}
    return Scan(**found, control=Scan(**control, control=None))
