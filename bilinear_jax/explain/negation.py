"""Two squares of a form, one that drives it and one that suppresses it, and whether the second vetoes the first.

    z = u . y = x^T Q_u x = sum_i l_i (p_i . x)^2     eigenpairs in a metric of the choosing tokens: ``explain.parts``
    d(x) = l_+ (p_+ . x)^2                            drives: its largest positive part; 0 if there is none
    s(x) = |l_-| (p_- . x)^2                          suppresses: its negative part of largest |l|; 0 if there is none

Everything is chosen on *choosing* tokens and scored on other tokens, the *scoring* ones.

    driven      d > 0 and d >= t, where t is the value of d that as many choosing tokens reach as the feature fires at
    gain        AP(d - s, fires) - AP(d, fires)           over all scoring tokens; AP is the average precision
    vetoed      AP(s, does not fire) - chance             over the driven scoring tokens
    negation    the smaller of gain and vetoed

A feature that fires on A and B, but not on A and not B, is driven at both, and s tells them apart: both numbers are
high. ``chance`` is the mean AP of all orders of the driven tokens. With n of them, m of which do not fire, it is
``(H_n + (m - 1) (n - H_n) / (n - 1)) / n`` with ``H_n = 1 + 1/2 + ... + 1/n``: a little above the share ``m / n``. The
two vectors are orthogonal in the metric by construction, so their cosine says nothing, and none is given.

Features that fire at fewer than ``LEAST`` choosing or scoring tokens are not scored: all their scores are nan. So is
vetoed where all driven tokens fire, or there is none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.explain.parts import Parts, eigenparts, own_eigenparts, squares
from bilinear_jax.explain.scores import average_precision, score, thresholds
from bilinear_jax.linalg.metric import Metric
from bilinear_jax.tensor import BilinearTensor

LEAST = 20  # tokens at which a feature that is scored fires, of the choosing and of the scoring ones
ROUNDING = 1e-5  # a part below this share of the largest |l| is none
EXAMPLES = 3  # tokens that are kept of each kind


class Seen(NamedTuple):
    """What is seen of some output directions on some text."""

    x: Float[np.ndarray, "tokens in"]
    z: Float[np.ndarray, "U tokens"]  # the pre-activations
    fired: Bool[np.ndarray, "U tokens"]


def scanned(
    tensor: BilinearTensor, rows: Float[Array, "U out"], metric: Metric, choosing: Seen, scoring: Seen
) -> dict[str, Any]:
    """The arrays of a ``scan.Scan`` of output directions; ``fires`` and ``silent`` are places among the scoring tokens.

    ``metric``: one for all, or one for each, stacked.

    Example:
        >>> tensor = BilinearTensor(jnp.array([[1.0, 1.0]]), jnp.array([[1.0, -1.0]]), jnp.ones((1, 1)))  # a^2 - b^2
        >>> x = np.random.default_rng(0).normal(size=(2, 500, 2)).astype(np.float32)
        >>> halves = [Seen(one, z, z > 2) for one in x for z in [(one**2 @ np.array([1, -1], np.float32))[None]]]
        >>> metric = Metric.of(np.eye(2))
        >>> found = scanned(tensor, jnp.ones((1, 1)), metric, *halves)
        >>> float(found["average_precision_two"][0]), bool(found["gain"][0] > 0.05), bool(found["vetoed"][0] > 0.2)
        (1.0, True, True)
    """
    k = min(2, metric.root.shape[-1])
    # The negative parts are the positive ones of -Q, so that one shape is compiled.
    both = jnp.concatenate([rows, -rows])
    if metric.root.ndim == 2:
        top = eigenparts(tensor, both, k, metric, which="positive")
    else:
        metrics = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), metric)
        top = own_eigenparts(tensor, both, k, metrics, which="positive")
    values = top.values.reshape(2, -1, k)
    none = values <= ROUNDING * jnp.max(jnp.abs(values), axis=(0, 2))[None, :, None]
    values = jnp.where(none, 0, values) * jnp.array([1.0, -1.0])[:, None, None]
    values, vectors = (jnp.concatenate([*one], axis=1) for one in (values, top.vectors.reshape(2, -1, k, tensor.n_in)))
    terms = [np.asarray(squares(jnp.asarray(one.x), Parts(values, vectors))) for one in (choosing, scoring)]
    first = np.argsort(-np.abs(np.asarray(values)), axis=1, kind="stable")[:, :2, None]
    chosen, sums = (np.take_along_axis(one, first, axis=1).cumsum(axis=1) for one in terms)
    of_sums = score(chosen, choosing.z, choosing.fired, sums, scoring.z, scoring.fired)
    drives, suppresses, fired = terms[1][:, 0], -terms[1][:, k], scoring.fired
    driven = (drives >= thresholds(terms[0][:, :1], choosing.fired)) & (drives > 0)
    silent, fires = driven & ~fired, driven & fired
    # Tokens that are not driven come last, where they do not change an average precision.
    vetoed = average_precision(np.where(driven, suppresses, -np.inf), silent)
    scores = {
        "average_precision_one": of_sums.average_precision[:, 0],
        "average_precision_two": of_sums.average_precision[:, 1],
        "r2_active_one": of_sums.r2_active[:, 0],
        "r2_active_two": of_sums.r2_active[:, 1],
        "gain": average_precision(drives - suppresses, fired) - average_precision(drives, fired),
        "vetoed": vetoed - chance(driven.sum(axis=1), silent.sum(axis=1)),
    }
    scored = np.minimum(choosing.fired.sum(axis=1), fired.sum(axis=1)) >= LEAST
    return {name: np.where(scored, one, np.nan) for name, one in scores.items()} | {
        "firings": fired.sum(axis=1),
        "driven": driven.sum(axis=1),
        "fires": _first(-suppresses, fires),
        "silent": _first(suppresses, silent),
    }


def chance(n: Int[np.ndarray, " U"], m: Int[np.ndarray, " U"]) -> Float[np.ndarray, " U"]:
    """The mean average precision of all orders of n items, m of which count; nan if m is 0.

    Example:
        >>> chance(np.array([2, 3]), np.array([1, 3])).round(4).tolist()  # (1 + 1/2) / 2, and always 1
        [0.75, 1.0]
    """
    harmonic = np.cumsum(1 / np.arange(1, max(n.max(), 1) + 1))[np.maximum(n, 1) - 1]
    found = (harmonic + (m - 1) * (n - harmonic) / np.maximum(n - 1, 1)) / np.maximum(n, 1)
    return np.where(m > 0, found, np.nan)


def _first(values: Float[np.ndarray, "U tokens"], of: Bool[np.ndarray, "U tokens"]) -> Int[np.ndarray, "U examples"]:
    """The places of the ``EXAMPLES`` largest values among those of which ``of`` is true; -1 where there are fewer."""
    values = np.where(of, values, -np.inf)
    places = np.argsort(-values, axis=1, kind="stable")[:, :EXAMPLES]
    places = np.pad(places, ((0, 0), (0, EXAMPLES - places.shape[1])))
    return np.where(np.arange(EXAMPLES) < of.sum(axis=1)[:, None], places, -1)
