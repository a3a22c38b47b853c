"""The comments of a dataclass's fields, which double as the help of a command's options."""

import inspect
import re


def field_comments(cls: type) -> dict[str, str]:
    """What stands after ``#`` on the line of each field.

    Example:
        >>> from bilinear_jax.training.recipes import RunOptions
        >>> field_comments(RunOptions)["save_every"]
        'steps from checkpoint to checkpoint'
    """
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
