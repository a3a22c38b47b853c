"""The fields of a dataclass: their comments, which double as the help of a command's options, and their limits."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a field must be."""

    says: str  # as it stands in an error: "must ..."
    fits: Callable[[Any], bool]  # whether a value is so


COUNT = Rule("must be at least 1", lambda n: n >= 1)
NOT_NEGATIVE = Rule("must be a number that is not negative", lambda x: 0 <= x < math.inf)
SEED = Rule("must lie in 0 ... 2^32 - 1", lambda n: 0 <= n < 2**32)  # JAX, NumPy and Grain take these


def field_comments(cls: type) -> dict[str, str]:
    """What stands after ``#`` on the line of each field.

    Example:
        >>> from bilinear_jax.training.recipes import RunOptions
        >>> field_comments(RunOptions)["save_every"]
        'steps from checkpoint to checkpoint'
    """
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))


def check_fields(config: Any, rule: Rule, *names: str) -> None:
    """Raises ``ValueError`` for a field that breaks the rule; one that is None is left alone.

    Example:
        >>> from bilinear_jax.training.recipes import RunOptions
        >>> check_fields(RunOptions(), Rule("must be odd", lambda n: n % 2 == 1), "save_every")
        Traceback (most recent call last):
        ValueError: save_every must be odd, got 200
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not rule.fits(value):
            raise ValueError(f"{name} {rule.says}, got {value}")
