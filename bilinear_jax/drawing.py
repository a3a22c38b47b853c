"""What all figures share: colours, checks of what is drawn, and a figure without any global state of matplotlib."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "RdBu"  # red is negative, white is 0, blue is positive; distinguishable without red-green vision
NEGATIVE, POSITIVE = "#b2182b", "#2166ac"  # the same two
WRITTEN_OUT = 12  # up to so many labels, each cell of a heat map has its value written in it


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches, which no window and no list of open figures knows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    return figure


def finite(name: str, array: Any) -> np.ndarray:
    """The array in float64; raises ``ValueError``, with its name, if something in it is not finite."""
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
