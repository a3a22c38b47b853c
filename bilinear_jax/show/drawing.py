"""What all figures share: colours, checks of arrays, and a figure that does not touch matplotlib's global state."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "RdBu"  # red is negative, white is 0, blue is positive; safe for red-green colour blindness
NEGATIVE, POSITIVE = "#b2182b", "#2166ac"  # the same red and blue
WRITTEN_OUT = 12  # a heat map with at most this many labels shows the value of each cell


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, without a window and not among matplotlib's open figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    return figure


def finite(name: str, array: Any) -> np.ndarray:
    """The array in float64. Raises ``ValueError``, with its name, if a value is not finite."""
    array = np.asarray(array, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are not finite")
    return array


def short(value: float) -> str:
    """A number in at most six characters.

    Example:
        >>> short(3.14159), short(-0.00012)
        ('3.14', '-1e-4')
    """
    return f"{value + 0.0:.2f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
