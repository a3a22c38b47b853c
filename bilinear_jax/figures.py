"""Figures of matrices and spectra. Each takes arrays and returns a matplotlib ``Figure``: ``figure.savefig(path)``.

They touch no global state of matplotlib, and open no window.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "RdBu"  # red is negative, white is 0, blue is positive; distinguishable without red-green vision
NEGATIVE, POSITIVE = "#b2182b", "#2166ac"  # the same two
WRITTEN_OUT = 12  # up to so many labels, each cell of a heat map has its value written in it


def heat_map(matrix: Any, labels: Any = None, title: str | None = None, unit: str = "") -> "Figure":
    """A square matrix in colours from red (negative) through white (0) to blue (positive), labelled on both axes.

    The colours are symmetric around 0: they reach as far as the largest |entry|. The first row is at the top. The
    figure grows with the matrix so that every label can be read; up to 12 rows, the values are written in the cells.

    Args:
        matrix: ``[n, n]``, finite; for instance cosines between features, or ``Tracer.interaction_submatrix``.
        labels: n of them, for instance feature ids; by default 0 ... n - 1.
        title: stands above the figure.
        unit: what the colours measure, beside the colour bar.

    Raises:
        ValueError: if the matrix is not square, is empty or not finite, or there are not n labels.

    Example:
        >>> figure = heat_map([[1.0, -0.5], [-0.5, 1.0]], labels=[3834, 751], unit="cosine similarity")
        >>> [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        ['3834', '751']
    """
    matrix = _finite("matrix", matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"a heat map needs a square matrix [n, n], got shape {matrix.shape}")
    n = len(matrix)
    labels = [str(label) for label in (range(n) if labels is None else labels)]
    if len(labels) != n:
        raise ValueError(f"a matrix of {n} rows needs {n} labels, got {len(labels)}")

    longest = max(map(len, labels))
    cell = 0.62 if n <= WRITTEN_OUT else max(0.19, 4.5 / n)  # inches
    font = min(10.0, cell * 45)  # points; a label stands upright in its cell
    side, margin = max(n * cell, 2.0), 0.15 + longest * font * 0.65 / 72
    gap, bar, below = 0.25, 0.22, 0.25
    width = max(margin + side + gap + bar + 0.9, margin + 0.1 * len(title or "") + 0.2)
    height = below + side + margin + (0.35 if title else 0)
    figure = _new_figure(width, height)
    axes = figure.add_axes((margin / width, below / height, side / width, side / height))
    limit = float(np.abs(matrix).max()) or 1.0
    image = axes.imshow(matrix, cmap=COLOURS, vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_xticks(range(n), labels, rotation=90, fontsize=font)
    axes.set_yticks(range(n), labels, fontsize=font)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=2, pad=2)
    axes.spines[:].set_color("0.6")
    if n <= WRITTEN_OUT:
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(j, i, _short(value), ha="center", va="center", fontsize=9, color=colour)
    bar_axes = figure.add_axes(((margin + side + gap) / width, below / height, bar / width, side / height))
    figure.colorbar(image, cax=bar_axes, label=unit or None)
    if title:
        figure.suptitle(title, x=margin / width, y=1 - 0.12 / height, ha="left", va="top", fontsize=12)
    return figure


def eigenvalue_spectrum(values: Any, title: str | None = None) -> "Figure":
    """The eigenvalues of one interaction matrix, from the largest to the smallest, positive and negative apart.

    Positive ones are blue and filled, negative ones red and hollow. The legend says how many there are of each and
    which share of the sum of all squares (the squared Frobenius norm of the matrix) they carry.

    Args:
        values: ``[in]``, finite, in any order.
        title: stands above the figure.

    Raises:
        ValueError: if the values are not a vector, are none, or are not finite.

    Example:
        >>> figure = eigenvalue_spectrum([-2.0, 0.0, 1.0])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['1 positive: 20 % of the squared norm', '1 negative: 80 % of the squared norm']
    """
    values = _finite("values", values)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"a spectrum needs eigenvalues [in], got shape {values.shape}")
    values = np.sort(values)[::-1]
    total = float(np.sum(values**2)) or 1.0
    ranks = np.arange(1, len(values) + 1)
    size = float(np.clip(900 / len(values), 6, 60))  # points^2

    figure = _new_figure(7.0, 4.0)
    axes = figure.add_subplot()
    axes.axhline(0, color="0.5", linewidth=0.8, zorder=0)
    for name, sign, colour, marker, face in (
        ("positive", 1, POSITIVE, "^", POSITIVE),
        ("negative", -1, NEGATIVE, "v", "white"),
    ):
        chosen = sign * values > 0
        share = 100 * float(np.sum(values[chosen] ** 2)) / total
        axes.vlines(ranks[chosen], 0, values[chosen], color=colour, linewidth=0.8, alpha=0.5)
        axes.scatter(
            ranks[chosen],
            values[chosen],
            s=size,
            marker=marker,
            facecolor=face,
            edgecolor=colour,
            linewidth=0.8,
            label=f"{chosen.sum()} {name}: {share:.0f} % of the squared norm",
        )
    axes.set_xlabel("rank, from the largest")
    axes.set_ylabel("eigenvalue")
    axes.margins(x=0.02)
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    if title:
        axes.set_title(title, loc="left")
    figure.set_layout_engine("constrained")
    return figure


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    return figure


def _finite(name: str, array: Any) -> np.ndarray:
    array = np.asarray(array, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are not finite")
    return array


def _short(value: float) -> str:
    """A number in at most six characters."""
    return f"{value + 0.0:.2f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
