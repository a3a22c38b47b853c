"""How well predictions of a pre-activation agree with it, and with where the feature fires, on tokens of their own.

Everything that is fitted is fitted on *choosing* tokens: a constant for each prediction (the mean of what it misses),
and a threshold (the value that as many choosing tokens exceed as the feature fires at). The scores are those of other
tokens, the *scoring* ones.

    r2                 1 - sum (z - z_hat)^2 / sum (z - mean z)^2              over all tokens; 0 is as bad as the mean
    r2_active          the same over the tokens at which the feature fires     often below 0
    average_precision  sum_n (recall_n - recall_{n-1}) precision_n             of "fires here", ranked by z_hat
    precision, recall  of z_hat at or above the threshold, for "fires here"

The average precision of a constant prediction is the share of tokens at which the feature fires. Equal predictions are
taken together. Scores that do not exist, such as those of a feature that never fires, are nan.

They are computed on the host, because NumPy sorts many times faster than XLA on a CPU.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Numbers = Float[np.ndarray, "U parts"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of predictions; one column for each number of parts."""

    r2: Float[np.ndarray, "features parts"]
    r2_active: Float[np.ndarray, "features parts"]
    average_precision: Float[np.ndarray, "features parts"]
    precision: Float[np.ndarray, "features parts"]
    recall: Float[np.ndarray, "features parts"]


def score(
    chosen: Float[np.ndarray, "U parts choosing"],
    chosen_target: Float[np.ndarray, "U choosing"],
    chosen_fired: Bool[np.ndarray, "U choosing"],
    predicted: Float[np.ndarray, "U parts scoring"],
    target: Float[np.ndarray, "U scoring"],
    fired: Bool[np.ndarray, "U scoring"],
) -> Scores:
    """The scores of the predictions of each feature.

    Args:
        chosen, chosen_target, chosen_fired: predictions, pre-activations and firing at the choosing tokens.
        predicted, target, fired: the same at the scoring tokens.

    Memory: three times that of the predictions.

    Example:
        >>> z = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)
        >>> found = score(2 + z[:, None], z, z > 1, 2 + z[:, None], z, z > 1)
        >>> [float(found.r2[0, 0]), float(found.average_precision[0, 0]), float(found.recall[0, 0])]
        [1.0, 1.0, 1.0]
    """
    everywhere, here = np.ones_like(fired), np.broadcast_to(fired[:, None], predicted.shape)
    constant = chosen_target.mean(axis=-1)[:, None] - chosen.mean(axis=-1)  # the mean of what is missed
    missed = (target[:, None] - (predicted + constant[:, :, None])) ** 2
    called = predicted >= thresholds(chosen, chosen_fired)[:, :, None]
    right = np.sum(called & here, axis=-1)
    return Scores(
        r2=_r2(missed, target, everywhere),
        r2_active=_r2(missed, target, fired),
        average_precision=average_precision(predicted, here),
        precision=_share(right, called.sum(axis=-1)),
        recall=_share(right, here.sum(axis=-1)),
    )


def average_precision(score: Float[np.ndarray, "*batch n"], fired: Bool[np.ndarray, "*batch n"]):
    """``sum_n (recall_n - recall_{n-1}) precision_n`` over the distinct values of the score, from the largest down.

    Example:
        >>> average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, False, True])).round(4).item()
        0.8333
        >>> average_precision(np.zeros(4), np.array([True, False, False, False])).item()
        0.25
    """
    order = np.argsort(-score, axis=-1)
    ranked, hits = np.take_along_axis(score, order, -1), np.cumsum(np.take_along_axis(fired, order, -1), axis=-1)
    last = np.ones_like(fired)  # of its value
    last[..., :-1] = ranked[..., 1:] != ranked[..., :-1]
    before = np.zeros_like(hits)
    before[..., 1:] = np.maximum.accumulate(np.where(last, hits, 0), axis=-1)[..., :-1]
    gained = np.where(last, (hits - before) * (hits / np.arange(1, score.shape[-1] + 1)), 0)
    return _share(gained.sum(axis=-1), hits[..., -1])


def largest(values: Float[np.ndarray, "U tokens"], numbers: Int[np.ndarray, " U"]) -> Bool[np.ndarray, "U tokens"]:
    """Where the largest values of each row are, as many as the numbers say.

    Example:
        >>> largest(np.array([[3.0, 1.0, 2.0]]), np.array([2])).tolist()
        [[True, False, True]]
    """
    rank = np.argsort(np.argsort(-values, axis=1), axis=1)
    return rank < numbers[:, None]


def thresholds(chosen: Float[np.ndarray, "U parts n"], fired: Bool[np.ndarray, "U n"]) -> Numbers:
    """The value that as many choosing tokens reach as the feature fires at; infinite if it never fires."""
    ranked, number = np.sort(chosen, axis=-1), fired.sum(axis=-1)
    place = np.broadcast_to((chosen.shape[-1] - np.maximum(number, 1))[:, None, None], (*chosen.shape[:2], 1))
    return np.where(number[:, None] > 0, np.take_along_axis(ranked, place, -1)[..., 0], np.inf)


def _r2(missed, target: Float[np.ndarray, "U n"], counted: Bool[np.ndarray, "U n"]) -> Numbers:
    number = counted.sum(axis=-1)
    mean = np.sum(target, axis=-1, where=counted, dtype=np.float64) / np.maximum(number, 1)
    spread = np.sum((target - mean[:, None]) ** 2, axis=-1, where=counted)[:, None]
    left = np.sum(missed, axis=-1, where=counted[:, None], dtype=np.float64)
    return 1 - _share(left, np.broadcast_to(spread, left.shape))


def _share(part, whole):
    """The quotient; nan if the whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
