"""The types and sizes that the fields of a config may have, wherever its values come from: Python, JSON or TOML.

And the arrays that nothing takes.
"""

import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LARGEST_SIZE = 2**31 - 1
"""The largest size of an axis: the positions in it are int32."""


def check_types(config: Any) -> None:
    """Raise ``ValueError`` if a field of a frozen dataclass does not have the type of its annotation.

    What has the same value in that type is replaced by it: lists by tuples, whole numbers by floats, and the numbers
    and arrays of NumPy by those of Python. True and false are not numbers.

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     sizes: tuple[int, ...]
        ...     def __post_init__(self):
        ...         check_types(self)
        >>> Config([1, 2])
        Config(sizes=(1, 2))
        >>> Config([1, True])
        Traceback (most recent call last):
        ValueError: sizes must be a list [a whole number, ...], got [1, True]
    """
    values = {name: getattr(config, name) for name in type_hints(type(config))}
    for name, value in typed(type(config), values).items():
        object.__setattr__(config, name, value)


def typed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for fields of a dataclass, in the types of the fields. Raises ``ValueError`` as ``check_types``."""
    found = {}
    for name, value in values.items():
        fits, found[name] = fitted(value, hint := type_hints(cls)[name])
        if not fits:
            raise ValueError(f"{name} must be {spelled(hint)}, got {value!r:.100}")
    return found


def check_sizes(config: Any, *names: str) -> None:
    """Raise ``ValueError`` unless these fields lie in 1 ... ``LARGEST_SIZE``."""
    for name in names:
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if value > LARGEST_SIZE:
            raise ValueError(f"{name} must be at most {LARGEST_SIZE}, got {value!r:.100}")


type_hints = functools.lru_cache(maxsize=64)(typing.get_type_hints)


def fitted(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a value has a type, and the value in that type."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((found for found in (fitted(value, each) for each in arguments) if found[0]), (False, None))
    if origin is typing.Literal:
        return value in arguments, value
    if origin in (tuple, Sequence):
        if not isinstance(value, list | tuple | range):
            return False, None
        types_ = (arguments[0],) * len(value) if arguments[1:] in ((), (Ellipsis,)) else arguments
        found = [fitted(part, each) for part, each in zip(value, types_, strict=False)]
        return len(value) == len(types_) and all(fits for fits, _ in found), tuple(part for _, part in found)
    if hint is float and type(value) is int:
        return abs(value) <= 2**1023, float(value) if abs(value) <= 2**1023 else None
    return type(value) is hint, value


def spelled(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(spelled, arguments))
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin in (tuple, Sequence):
        return f"a list [{', '.join('...' if each is Ellipsis else spelled(each) for each in arguments)}]"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): '"none"'}
    return words.get(hint, str(hint))


def check_plain(array: Any, what: str) -> None:
    """Raise ``ValueError`` for a masked array of NumPy that hides a value, and for times, which it counts as integers.

    Args:
        array: an array of any library, or a leaf of a pytree.
        what: what it holds, in the plural.
    """
    if np.ma.is_masked(array):
        raise ValueError(f"{what} are a masked array that hides some of them: fill it with array.filled(value)")
    if getattr(getattr(array, "dtype", None), "kind", None) == "m":
        raise ValueError(f"{what} must be numbers; got {array.dtype}")
