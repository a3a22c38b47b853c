"""The features that a text or a list names: ``"top:200"``, ``"3,17,20-30"`` or ``"all"``, or a list of numbers."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bilinear_jax.explain.tracer import Tracer


def select_features(wanted: str, tracer: Tracer) -> list[int]:
    """The output features that a text names, in the order in which their pages are listed.

    Args:
        wanted: ``"top:N"``: the N features with the largest sum of the two largest |eigenvalues| of Q, the largest
            first; ``"3,17,20-30"``: numbers and ranges, with both ends; ``"all"``.

    Raises:
        ValueError: if the text has another form, names a feature twice, or N is not in 1 ... the number of features.
        UnknownNameError: if a feature does not exist.

    Example:
        >>> import bilinear_jax as bj
        >>> tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
        >>> select_features("3,17,20-22", tracer), len(select_features("top:5", tracer))
        ([3, 17, 20, 21, 22], 5)
    """
    number, named = tracer.n_features, parse_features(wanted)
    if named is None:
        return list(range(number))
    if isinstance(named, list):
        tracer.check_feature(max(some[-1] for some in named))
        return [feature for some in named for feature in some]
    if named > number:
        raise ValueError(
            f"N is too large in {wanted!r}: it must be between 1 and {number}, the features of {tracer.outputs.name}"
        )
    strength = jnp.abs(tracer.top_eigh(k=2).values).sum(axis=1)
    return jax.lax.top_k(strength, named)[1].tolist()


def parse_features(wanted: str) -> int | list[range] | None:
    """The N of ``"top:N"``, the ranges of ``"3,17,20-30"``, or None for ``"all"``; see ``select_features``."""
    wanted = wanted.strip()
    if wanted == "all":
        return None
    head, colon, count = wanted.partition(":")
    if colon:
        if head != "top" or not count.strip().isdecimal():
            raise _unreadable(wanted)
        if int(count) < 1:
            raise ValueError(f"N is too small in {wanted!r}: it must be at least 1")
        return int(count)
    ranges = []
    for part in wanted.split(","):
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isdecimal() for end in ends):
            raise _unreadable(wanted)
        low, high = int(ends[0]), int(ends[-1])
        if low > high:
            raise ValueError(f"the range {part.strip()} is empty: write {high}-{low}")
        ranges.append(range(low, high + 1))
    for before, after in itertools.pairwise(sorted(ranges, key=lambda some: some[0])):
        if after[0] in before:
            raise ValueError(f"output feature {after[0]} is named twice: name each once")
    return ranges


def checked_features(features: Sequence[int], tracer: Tracer) -> list[int]:
    """The features as a list.

    Raises:
        ValueError: if there is none, or one is named twice.
        UnknownNameError: if one does not exist.
    """
    if not features:
        raise ValueError("name at least one output feature, such as [3, 17]")
    seen = set()
    for feature in map(tracer.check_feature, features):
        if feature in seen:
            raise ValueError(f"output feature {feature} is named twice: name each once")
        seen.add(feature)
    return list(features)


def _unreadable(wanted: str) -> ValueError:
    return ValueError(f"cannot read {wanted!r}: name features as 'top:200', '3,17,20-30' or 'all'")
