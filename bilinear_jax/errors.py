"""The error for a name that does not exist, and the check of a number of things, which all rooms share."""

import operator
from collections.abc import Iterable
from typing import Any


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ``ValueError`` unless the value is a whole number of at least ``least``.

    Example:
        >>> check_count("k", 2.5)
        Traceback (most recent call last):
        ValueError: k must be a whole number, got 2.5
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r:.60}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


class UnknownNameError(LookupError):
    """A feature, an SAE, a site or a layer does not exist. The message lists those that do.

    Attributes:
        kind: "feature", "SAE", "site" or "layer".
        given: the name that was asked for.
        known: the names that exist, as text: ``"0 ... 1023"``, or a list with commas.

    Example:
        >>> error = UnknownNameError("feature", 1024, range(1024), of="SAE 2-mlp-out-x4-k20")
        >>> print(error)
        there is no feature 1024 in SAE 2-mlp-out-x4-k20: choose one of 0 ... 1023
        >>> error.kind, error.known
        ('feature', '0 ... 1023')
    """

    def __init__(self, kind: str, given: object, known: Iterable[object], *, of: str = "", fix: str = ""):
        if isinstance(known, range) and len(known) > 1:
            self.known = f"{known[0]} ... {known[-1]}"
        else:
            self.known = ", ".join(map(str, known))
        self.kind, self.given = kind, given
        choice = f"choose one of {self.known}" if self.known else "there are none"
        where = f" in {of}" if of else ""
        super().__init__(f"there is no {kind} {given}{where}: {choice}{f'. {fix}' if fix else ''}")

    def __reduce__(self):
        # The default calls __init__ with the message alone, which fails when the error comes from another process.
        return type(self).__new__, (type(self), *self.args), self.__dict__
