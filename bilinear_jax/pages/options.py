"""What a site of feature pages shows, and of which features."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from bilinear_jax.tracer import Tracer


@dataclasses.dataclass(frozen=True)
class PageOptions:
    """How much of everything the pages show. The comment of a field is its help on the command line."""

    rows: int = 512  # rows of the dataset that are looked at, evenly spread over it; all if it has fewer
    batch_size: int = 16  # rows that are run through the model at once; it changes no result but by rounding
    contexts: int = 10  # contexts of the largest activations, each of another row
    groups: int = 3  # equal parts of a feature's activations, by size, that samples are drawn from
    samples: int = 3  # contexts drawn from each of these parts
    window: int = 10  # tokens shown on either side of the one that a context is about
    bins: int = 30  # bars of the activation histogram
    top_tokens: int = 5  # tokens that name a feature in lists
    logits: int = 10  # tokens listed as raised, and as lowered
    pairs: int = 20  # pairs of input features listed by weight, and as many by data
    pair_contexts: int = 2  # contexts in which both features of a pair fire
    eigenpairs: int = 10  # eigenvalues of the interaction matrix, at most as many as the MLP has inputs
    reads: int = 6  # input features that an eigenvector is described by
    heat_map: int = 24  # input features of the interaction heat map, those of the pairs first in their lists

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name in ("samples", "window", "logits", "pair_contexts") else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name} must be at least {least}, got {getattr(self, field.name)}")


def select_features(wanted: str, tracer: Tracer) -> list[int]:
    """The output features that a text names, in the order in which their pages are listed.

    Args:
        wanted: ``"top:N"``: the N of the largest sum of the two largest |eigenvalues| of Q, the largest first;
            ``"3,17,20-30"``: numbers and ranges, both ends included; ``"all"``.

    Raises:
        ValueError: for a text of another form, a feature that the output SAE doesn't have, one named twice, or an N
            that is not in 1 ... the number of features.

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
        if (high := max(some[-1] for some in named)) >= number:
            raise ValueError(f"output features of {tracer.out.name} are 0 ... {number - 1}, got {high}")
        return [feature for some in named for feature in some]
    if named > number:
        raise ValueError(f"top:N takes an N in 1 ... {number}, the features of {tracer.out.name}, got {wanted!r}")
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
            raise ValueError(f"top:N takes an N of at least 1, got {wanted!r}")
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


def checked_features(features: list[int], tracer: Tracer) -> list[int]:
    """The features, each once and in range; ``ValueError`` says which isn't."""
    if not features:
        raise ValueError("name at least one output feature, such as [3, 17]")
    number, seen = tracer.n_features, set()
    for feature in features:
        if not 0 <= feature < number:
            raise ValueError(f"output features of {tracer.out.name} are 0 ... {number - 1}, got {feature}")
        if feature in seen:
            raise ValueError(f"output feature {feature} is named twice: name each once")
        seen.add(feature)
    return list(features)


def _unreadable(wanted: str) -> ValueError:
    return ValueError(f"name features as 'top:200', '3,17,20-30' or 'all', got {wanted!r}")
