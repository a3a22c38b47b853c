"""The ways to choose the parts of an explanation, ready for use on some choosing tokens, each with its control."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from bilinear_jax.explain.directions import Directions
from bilinear_jax.explain.feature_pairs import PairChooser
from bilinear_jax.explain.parts import (
    METRICS,
    PAIRS,
    Pairs,
    Parts,
    eigenparts,
    firing_metrics,
    own_eigenparts,
    own_rotated,
    rotated,
)
from bilinear_jax.explain.samples import Layer, Samples
from bilinear_jax.linalg.metric import Metric

Choose = Callable[[Float[Array, "U out"], Float[np.ndarray, "tokens U"], Bool[np.ndarray, "U tokens"]], Parts | Pairs]
"""The parts of some output directions, of the same number for each, from their values at the choosing tokens, and from
where they fire."""


class Way(NamedTuple):
    """A way to choose parts, and its control."""

    choose: Choose
    control: Choose
    control_name: str


def way_of(by: str, layer: Layer, choosing: Samples, numbers: tuple[int, ...], seed: int) -> Way:
    """The way of a name, see ``explain.parts``.

    Raises:
        ValueError: if the largest of the numbers is more than the parts that there are on the choosing tokens, or the
            way is by firing, and the outputs are plain directions.
    """
    most = numbers[-1]
    if by in PAIRS:
        pairs = PairChooser(layer.tensor, choosing.x, by, numbers, seed)
        _check_most(most, len(pairs.together), "pairs of input features that fire together")
        return Way(
            lambda rows, z, fired: pairs.choose(rows, z), lambda rows, z, fired: pairs.control(rows, z), "random pairs"
        )
    key, _ = jax.random.split(jax.random.key(seed))
    if by == "firing":
        if isinstance(layer.outputs, Directions):
            raise ValueError(
                f"the outputs are {layer.outputs.name}, which do not fire: explain by data or weight, or trace an SAE"
            )
        moment = choosing.moment
        _check_most(most, Metric.of(moment).root.shape[1], "directions")

        def metrics(fired) -> Metric:
            return firing_metrics(choosing.x, fired, moment)

        return Way(
            lambda rows, z, fired: own_eigenparts(layer.tensor, rows, most, metrics(fired)),
            lambda rows, z, fired: own_rotated(layer.tensor, rows, most, metrics(fired), key),
            "rotated",
        )
    metric = Metric.of(choosing.moment, shrink=METRICS[by])
    _check_most(most, metric.root.shape[1], "directions")
    return Way(
        lambda rows, z, fired: eigenparts(layer.tensor, rows, most, metric),
        lambda rows, z, fired: rotated(layer.tensor, rows, most, metric, key),
        "rotated",
    )


def _check_most(most: int, there: int, what: str) -> None:
    if most > there:
        raise ValueError(
            f"parts is up to {most}, but the input has {there} {what} on the choosing tokens: give fewer parts, or "
            "more tokens"
        )
