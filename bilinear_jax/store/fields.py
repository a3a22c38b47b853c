"""The fields of a dataclass: their limits, and their comments, which are also the help texts of options."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A condition on the value of a field."""

    says: str  # the words of the error: "must ..."
    fits: Callable[[Any], bool]  # whether a value satisfies the rule
    most: float = math.inf  # the largest value


LARGEST_COUNT = 2**31 - 1  # steps, and positions in an axis, are counted as int32
COUNT = Rule("must be at least 1", lambda n: n >= 1, LARGEST_COUNT)
NOT_NEGATIVE = Rule("must be a number that is not negative", lambda x: 0 <= x < math.inf, LARGEST_COUNT)
SEED = Rule("must lie in 0 ... 2^32 - 1", lambda n: 0 <= n < 2**32)  # the seeds that JAX, NumPy and Grain all accept


def field_comments(cls: type) -> dict[str, str]:
    """The comment after ``#`` on the line of each field.

    Example:
        >>> from bilinear_jax.training.recipes import RunOptions
        >>> field_comments(RunOptions)["save_every"]
        'steps between checkpoints'
    """
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))


def check_fields(config: Any, rule: Rule, *names: str) -> None:
    """Raise ``ValueError`` if a field breaks the rule or is larger than it allows. A field that is None passes.

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
        if value is not None and rule.most < math.inf and value > rule.most:
            raise ValueError(f"{name} must be at most {rule.most}, got {value}")
