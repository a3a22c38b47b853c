"""The baseline of all explanations: the mean pre-activation of a token, or of the last two tokens, and no more.

    token    m(t)     = (sum of z at t + mean z) / (times seen + 1)
    bigram   m(s, t)  = (sum of z at s, t + m(t)) / (times seen + 1)        s the token before t

fitted on the choosing tokens. What was seen once or never leans on the coarser mean.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from bilinear_jax.explain.samples import Samples


def lookups(
    choosing: Samples, scoring: Samples, target: Float[np.ndarray, "tokens U"]
) -> Mapping[str, tuple[Float[np.ndarray, "tokens U"], Float[np.ndarray, "other U"]]]:
    """The predictions of each lookup, by name, at the choosing and at the scoring tokens.

    Args:
        choosing, scoring: the tokens that it is fitted on, and others.
        target: the pre-activations at the choosing tokens.
    """
    overall = np.broadcast_to(target.mean(axis=0), (len(choosing.token) + len(scoring.token), target.shape[1]))
    tokens = np.concatenate([choosing.token, scoring.token]).astype(np.int64)
    previous = np.concatenate([choosing.previous, scoring.previous]).astype(np.int64)
    by_token = _means(tokens, target, overall)
    by_bigram = _means(previous * (int(tokens.max()) + 1) + tokens, target, by_token)
    split = len(choosing.token)
    return {"token": (by_token[:split], by_token[split:]), "bigram": (by_bigram[:split], by_bigram[split:])}


def _means(
    key: Int[np.ndarray, " all"], target: Float[np.ndarray, "tokens U"], coarser: Float[np.ndarray, "all U"]
) -> Float[np.ndarray, "all U"]:
    """The mean target of each key among the first tokens, and the coarser mean counted once, at all tokens."""
    _, group = np.unique(key, return_inverse=True)
    known = group[: len(target)]
    order = np.argsort(known, kind="stable")
    starts = np.flatnonzero(np.diff(known[order], prepend=-1))
    sums = np.zeros((group.max() + 1, target.shape[1]), np.float32)
    sums[known[order][starts]] = np.add.reduceat(target[order], starts, axis=0)
    counts = np.bincount(known, minlength=len(sums)).astype(np.float32)
    return (sums[group] + coarser) / (counts[group] + 1)[:, None]


def token_means(
    token: Int[np.ndarray, " tokens"], y: Float[np.ndarray, "tokens out"], n_vocab: int
) -> Float[np.ndarray, "n_vocab out"]:
    """The mean y of every token of the vocabulary: the formula of the token lookup above, for y in place of z."""
    every = np.concatenate([token, np.arange(n_vocab, dtype=token.dtype)])
    return _means(every, y, np.broadcast_to(y.mean(axis=0), (len(every), y.shape[1])))[len(token) :]
