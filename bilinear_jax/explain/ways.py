"""The ways to choose the parts of an explanation, ready for use on some choosing tokens, each with its control."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from bilinear_jax.explain.feature_pairs import PairChooser
from bilinear_jax.explain.parts import METHODS, Pairs, Parts, eigenparts, rotated
from bilinear_jax.explain.samples import Layer, Samples
from bilinear_jax.linalg.metric import Metric

Choose = Callable[[Float[Array, "U out"], Float[np.ndarray, "tokens U"]], Parts | Pairs]
"""The parts of some output directions, and of the same number for each; z are their values at the choosing tokens."""


class Way(NamedTuple):
    """A way to choose parts, and its control."""

    choose: Choose
    control: Choose
    control_name: str


def way_of(by: str, layer: Layer, choosing: Samples, numbers: tuple[int, ...], seed: int) -> Way:
    """The way of a name, see ``explain.parts``.

    Raises:
        ValueError: if the largest of the numbers is more than the parts that there are on the choosing tokens.
    """
    most = numbers[-1]
    if by not in METHODS:
        pairs = PairChooser(layer.tensor, choosing.x, by, numbers, seed)
        _check_most(most, len(pairs.together), "pairs of input features that fire together")
        return Way(pairs.choose, pairs.control, "random pairs")
    metric = Metric.of(choosing.moment, shrink=METHODS[by])
    _check_most(most, metric.root.shape[1], "directions")
    key, _ = jax.random.split(jax.random.key(seed))
    return Way(
        lambda rows, z: eigenparts(layer.tensor, rows, most, metric),
        lambda rows, z: rotated(layer.tensor, rows, most, metric, key),
        "rotated",
    )


def _check_most(most: int, there: int, what: str) -> None:
    if most > there:
        raise ValueError(
            f"parts is up to {most}, but the input has {there} {what} on the choosing tokens: give fewer parts, or "
            "more tokens"
        )
