"""Choose dictionaries by their properties: layer, site, expansion, k, tag, activation and target."""

import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bilinear_jax.errors import UnknownNameError
from weights_convert.names import ACTIVATIONS, SAEName

_SHOWN = 12
"""The most names in a message."""


class Wanted:
    """The properties that a dictionary must have. None means any value.

    ``target`` is the site that it reconstructs: of an SAE, its own. A ``tag`` of "" is that of those without a tag.

    Raises:
        ValueError: if a number is of another type.

    Example:
        >>> wanted = Wanted(layer=2, target="mlp-out")
        >>> wanted.fits(SAEName(2, "mlp_out", 4, 20, None)), wanted.fits(SAEName(2, "mlp_in", 4, 20, None))
        (True, False)
    """

    def __init__(
        self,
        layer: int | None = None,
        site: str | None = None,
        expansion: int | float | None = None,
        k: int | None = None,
        tag: str | None = None,
        activation: str | None = None,
        target: str | None = None,
    ):
        for name, value in (("layer", layer), ("k", k)):
            if value is not None and not hasattr(value, "__index__"):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        if not isinstance(expansion, int | float | np.number | None) or isinstance(expansion, bool):
            raise ValueError(f"expansion must be a number, got {expansion!r}")
        self.layer, self.site = None if layer is None else operator.index(layer), site and site.replace("-", "_")
        self.expansion, self.k, self.tag, self.activation = expansion, k, tag, activation
        self.target = target and target.replace("-", "_")

    def fits(self, parts: SAEName) -> bool:
        """Whether a dictionary has these properties. An ``expansion`` of None is not known, and fits."""
        pairs = (
            *((self.layer, parts.layer), (self.site, parts.site), (self.k, parts.k), (self.tag, parts.tag or "")),
            *((self.activation, parts.activation), (self.target, parts.target or parts.site)),
            (self.expansion, self.expansion if parts.expansion is None else parts.expansion),
        )
        return all(value is None or value == part for value, part in pairs)

    def __str__(self) -> str:
        """As the name of a folder, with ``*`` for what is not given."""
        sites = "-to-".join(one.replace("_", "-") for one in (self.site or "*", self.target) if one)
        mark = ACTIVATIONS.get(self.activation or "topk", self.activation)
        name = "-".join(
            f"{mark}{'*' if value is None else value}"
            for mark, value in zip(("", "", "x", mark), (self.layer, sites, self.expansion, self.k), strict=True)
        )
        return f"{name}-{self.tag}" if self.tag else name


def one_of(names: Mapping[str, SAEName], wanted: Wanted, source: str | Path, known: Iterable[str] = ()) -> str:
    """The name of the one dictionary of a source that has these properties. ``known`` are more names for the message.

    Without a ``target``, SAEs are preferred to transcoders; without a ``tag``, those that have no tag.

    Raises:
        UnknownNameError: if none has them.
        ValueError: if several have them.

    Both messages list the dictionaries.
    """
    found = [name for name, parts in names.items() if wanted.fits(parts)]
    for part, value in (("target", wanted.target), ("tag", wanted.tag)):
        plain = [name for name in found if getattr(names[name], part) is None]
        found = plain if value is None and plain else found
    if not found:
        raise UnknownNameError("SAE", wanted, listed(dict.fromkeys((*names, *known))), of=str(source))
    if len(found) > 1:
        raise ValueError(
            f"{wanted} matches several SAEs in {source}: {', '.join(listed(found))}. "
            f"{how_to_choose({name: names[name] for name in found})}"
        )
    return found[0]


def how_to_choose(names: Mapping[str, SAEName], source: str | Path = "SOURCE") -> str:
    """Which keywords tell these dictionaries apart, with their values.

    Example:
        >>> how_to_choose({"a": SAEName(2, "mlp_in", 4, 20, None), "b": SAEName(2, "mlp_in", 4, 30, None)})
        'Give k (20 or 30)'
    """
    values = {
        **{name: [getattr(parts, name) for parts in names.values()] for name in ("layer", "site", "expansion", "k")},
        "target": [parts.target or parts.site for parts in names.values()],
        "tag": [parts.tag or "" for parts in names.values()],
        "activation": [parts.activation for parts in names.values()],
    }
    if len({parts.site for parts in names.values()}) > 1:
        del values["target"]
    told = [f"{name} ({_or(of)})" for name, of in values.items() if len({*of}) > 1]
    return f"Give {' or '.join(told)}" if told else f"Name one of these folders, as in {source}/{next(iter(names))}"


def _or(values: Iterable[Any]) -> str:
    shown = list(dict.fromkeys(repr(value) for value in values if value is not None))
    return " or ".join(shown[:_SHOWN])


def listed(names: Iterable[str]) -> list[str]:
    """The first names, and how many more there are."""
    names = list(names)
    return names if len(names) <= _SHOWN else [*names[:_SHOWN], f"... ({len(names) - _SHOWN} more)"]
