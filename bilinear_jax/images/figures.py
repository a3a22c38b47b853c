"""Figures of image classifiers and of toy models. Each function takes arrays and returns a matplotlib ``Figure``.

An eigenvector has no sign of its own; ``facing`` chooses one. Red is negative, white is 0 and blue is positive, as in
``show.figures``; every image has its own scale, symmetric around 0. matplotlib's global state is not touched.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bilinear_jax.errors import check_count
from bilinear_jax.nn.image import check_labels
from bilinear_jax.show.drawing import COLOURS, NEGATIVE, POSITIVE, WRITTEN_OUT, finite, new_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEUTRAL = "0.65"


def facing(patterns: Any) -> np.ndarray:
    """Images of eigenvectors ``[..., pixels]``, with the sign that makes the sum of their cubes positive.

    So the stronger side of a pattern is blue. A vector and its negative give the same image.

    Example:
        >>> facing([[-3.0, 1.0], [2.0, -1.0]]).tolist()
        [[3.0, -1.0], [2.0, -1.0]]
    """
    patterns = finite("patterns", patterns)
    return np.where((patterns**3).sum(axis=-1, keepdims=True) < 0, -patterns, patterns)


def eigenspectrum(values: Any, patterns: Any, shape: tuple[int, int], k: int = 3, title: str | None = None) -> "Figure":
    """All eigenvalues of a class as a curve, and its k most positive and k most negative eigenvectors as images.

    Args:
        values: ``[rank]``, in any order; for instance a row of ``pixel_eigenvectors(...).spectrum.values``.
        patterns: ``[rank, pixels]``, in the same order.
        shape: rows and columns of an image.
        k: number of images for each sign; fewer are shown if fewer eigenvalues have that sign.
        title: text above the figure.

    Raises:
        ValueError: if there is not one pattern of rows * columns pixels for each value; if k is below 1; or if a value
            is not finite.

    Example:
        >>> figure = eigenspectrum([-1.0, 0.0, 3.0], np.eye(3, 4), (2, 2), k=2)
        >>> [axes.get_title() for axes in figure.axes if axes.images]
        ['3.00', '-1.00']
    """
    values, patterns = finite("values", values), facing(patterns)
    _check_patterns(values, patterns, shape, 1)
    check_count("k", k)
    order = np.argsort(-values)
    values, patterns = values[order], patterns[order]
    ranks = np.arange(1, len(values) + 1)
    positive, negative = np.flatnonzero(values > 0)[:k], np.flatnonzero(values < 0)[::-1][:k]

    figure = new_figure(4.4 + 1.3 * k, 3.6)
    start = 4.4 / (4.4 + 1.3 * k)  # the curve ends and the images begin here
    axes = figure.add_axes((0.16 * start, 0.14, 0.8 * start, 0.7))
    axes.axhline(0, color="0.5", linewidth=0.8, zorder=0)
    axes.plot(ranks, values, color=NEUTRAL, linewidth=1, marker=".", markersize=3)
    place = {"left": start + 0.01, "right": 0.99, "bottom": 0.04, "top": 0.86, "hspace": 0.25, "wspace": 0.1}
    grid = figure.subplots(2, k, squeeze=False, gridspec_kw=place)
    for row, chosen, colour, marker in ((grid[0], positive, POSITIVE, "^"), (grid[1], negative, NEGATIVE, "v")):
        axes.plot(ranks[chosen], values[chosen], color=colour, marker=marker, markersize=7, linestyle="none")
        for panel, index in zip(row, chosen, strict=False):
            _show(panel, patterns[index], shape, colour)
            panel.set_title(short(values[index]), fontsize=9, pad=3, color=colour)
        for panel in row[len(chosen) :]:
            panel.set_axis_off()
    axes.set_xlabel("rank, from the largest")
    axes.set_ylabel("eigenvalue")
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    _title(figure, title)
    return figure


def eigenvector_gallery(
    values: Any, patterns: Any, shape: tuple[int, int], classes: Sequence[str], title: str | None = None
) -> "Figure":
    """The eigenvectors of all classes as images, one column per class, with the eigenvalue below each image.

    Args:
        values: ``[classes, k]`` eigenvalues. None for images that are not eigenvectors, such as masks: they keep their
            sign, and no numbers are written.
        patterns: ``[classes, k, pixels]``, for instance from ``most_positive``; the first of each class is at the top.
        shape: rows and columns of an image.
        classes: the names of the classes.
        title: text above the figure.

    Raises:
        ValueError: if the shapes do not fit each other, or a value is not finite.

    Example:
        >>> figure = eigenvector_gallery([[2.0], [1.0]], np.ones((2, 1, 4)), (2, 2), ["cat", "dog"])
        >>> [axes.get_title() for axes in figure.axes]
        ['cat', 'dog']
    """
    signed = values is None
    patterns = finite("patterns", patterns) if signed else facing(patterns)
    values = np.zeros(patterns.shape[:2]) if signed else finite("values", values)
    _check_patterns(values, patterns, shape, 2)
    _check_names(classes, len(values))
    number, k = values.shape
    above = 0.65 if title else 0.3
    width, height = 1.15 * number + 0.2, 1.3 * k + above
    figure = new_figure(width, height)
    grid = figure.subplots(k, number, squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.18})
    figure.subplots_adjust(left=0.1 / width, right=1 - 0.1 / width, bottom=0.22 / height, top=1 - above / height)
    for (row, column), panel in np.ndenumerate(grid):
        value = values[column, row]
        colour = POSITIVE if value > 0 else NEGATIVE if value < 0 else NEUTRAL
        _show(panel, patterns[column, row], shape, colour)
        if not signed:
            panel.set_xlabel(short(value), fontsize=8, labelpad=2, color=colour)
    for panel, name in zip(grid[0], classes, strict=True):
        panel.set_title(name, fontsize=10, pad=4)
    _title(figure, title)
    return figure


def explanation(
    image: Any,
    shape: tuple[int, int],
    classes: Sequence[str],
    logits: Any,
    values: Any,
    patterns: Any,
    contributions: Any,
    others: Any,
    around: Any = None,
    *,
    label: int | None = None,
    shown: int = 3,
    title: str | None = None,
) -> "Figure":
    """One image, its logits, and the eigenvectors that make the largest logits: a figure of an ``Explanation``.

    On the left are the image and, below it, all logits. On the right is a row for each class with a large logit. It
    shows the eigenvectors as images, with their contributions to the logit above them. The bars at its end are the
    parts of the logit: each eigenvector, all other eigenvectors together, and the path around the layer if it is given.
    The parts add up to the logit, which is written above the bars.

    Args:
        image: ``[pixels]``.
        shape: rows and columns of an image.
        classes: the names of all classes.
        logits: ``[classes]``.
        values, patterns, contributions: ``[classes, k]``, ``[classes, k, pixels]`` and ``[classes, k]``.
        others, around: ``[classes]``.
        label: the true class of the image, in 0 ... classes - 1.
        shown: number of classes with a row.
        title: text above the figure.

    Raises:
        ValueError: if the shapes do not fit each other, if the parts do not add up to the logits (to 1e-3 of the
            largest), if there is no such label, or if a value is not finite.
    """
    image, logits, values = finite("image", image), finite("logits", logits), finite("values", values)
    contributions, others, patterns = (
        finite("contributions", contributions),
        finite("others", others),
        facing(patterns),
    )
    rest = np.zeros_like(others) if around is None else finite("around", around)
    _check_patterns(values, patterns, shape, 2)
    number, k = values.shape
    _check_names(classes, number)
    if image.shape != (shape[0] * shape[1],):
        raise ValueError(f"the image must have {shape[0]} x {shape[1]} pixels in one axis, got shape {image.shape}")
    if contributions.shape != values.shape or any(part.shape != (number,) for part in (logits, others, rest)):
        raise ValueError(f"logits, others and around must have shape [{number}], and contributions [{number}, {k}]")
    sums = contributions.sum(axis=1) + others + rest
    if np.abs(sums - logits).max() > 1e-3 * max(np.abs(contributions).max(), np.abs(logits).max()):
        raise ValueError(f"contributions, others and around do not add up to the logits: {sums} and {logits}")
    if label is not None:
        label = int(check_labels(label, number))
    best = np.argsort(-logits)[:shown]

    names = [str(rank) for rank in range(1, k + 1)] + ["rest"] + ([] if around is None else ["around"])
    left, cell, bars, row = 2.3, 1.15, 0.4 * len(names) + 0.7, 1.5
    above = 0.3 if title else 0.0
    width, height = left + cell * k + bars, max(row * len(best), 3.6) + above
    figure = new_figure(width, height)
    height_used = (height - above) / height
    # The image, and all logits.
    half = 0.47 * height_used
    panel = figure.add_axes((0.3 / width, height_used - half, (left - 0.6) / width, half - 0.25 / height))
    panel.imshow(image.reshape(shape), cmap="gray", interpolation="nearest")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_title("input" if label is None else f"input: {classes[label]}", fontsize=9, pad=4)
    longest = max(map(len, classes))
    turn = longest > 2
    below = (0.25 + 0.075 * longest * turn) / height
    panel = figure.add_axes((0.45 / width, below + 0.05 / height, (left - 0.6) / width, half - below - 0.25 / height))
    panel.bar(range(number), logits, color=[POSITIVE if c in best else NEUTRAL for c in range(number)], width=0.75)
    panel.set_xticks(range(number), list(classes), fontsize=8, rotation=90 if turn else 0)
    panel.set_title("logits", fontsize=9, pad=3)
    _plain(panel)
    # A row for each class.
    parts = np.concatenate([contributions, others[:, None]] + ([] if around is None else [rest[:, None]]), axis=1)[best]
    low, high = min(0.0, float(parts.min())), max(0.0, float(parts.max()))
    margin = 0.08 * ((high - low) or 1.0)
    row_height = height_used / len(best)
    for place, c in enumerate(best):
        bottom = height_used - (place + 1) * row_height
        for r in range(k):
            size = min(cell - 0.1, row_height * height - 0.45)
            corner = (left + cell * r + (cell - size) / 2) / width, bottom + 0.12 / height
            panel = figure.add_axes((*corner, size / width, size / height))
            colour = POSITIVE if values[c, r] > 0 else NEGATIVE
            _show(panel, patterns[c, r], shape, colour)
            panel.set_title(f"{r + 1}:  {contributions[c, r]:+.2f}", fontsize=9, pad=3, color=colour)
        corner = (left + cell * k + 0.42) / width, bottom + 0.27 / height
        panel = figure.add_axes((*corner, (bars - 0.5) / width, row_height - 0.55 / height))
        panel.bar(range(len(names)), parts[place], color=_signs(parts[place], k), width=0.75)
        panel.set_xticks(range(len(names)), names, fontsize=7.5)
        panel.set_ylim(low - margin, high + margin)
        panel.set_title(f"{classes[c]}: {logits[c]:.2f}", fontsize=9, pad=3)
        _plain(panel)
    _title(figure, title)
    return figure


def interactions_beside(
    matrices: Any, names: Sequence[str], labels: Sequence[str] | None = None, title: str | None = None
) -> "Figure":
    """Interaction matrices of some outputs: above as the weights have them, below symmetrised.

        above  left^T diag(g) right = Q'        below  1/2 (Q' + Q'^T)

    Both give the same output for every input, but only the lower one is unique. All share one colour scale.

    Args:
        matrices: ``[outputs, in, in]``, not symmetrised: ``BilinearTensor.interaction(..., symmetric=False)``.
        names: of the outputs.
        labels: of the inputs; by default 0 ... in - 1.
        title: text above the figure.

    Raises:
        ValueError: if the matrices are not square, are empty or are not finite, or if the number of labels or names
            does not fit.

    Example:
        >>> figure = interactions_beside([[[0.0, 1.0], [0.0, 0.0]]], ["x0 and x1"])
        >>> [text.get_text() for text in figure.axes[1].texts]
        ['0.00', '0.50', '0.50', '0.00']
    """
    raw = finite("matrices", matrices)
    if raw.ndim != 3 or raw.shape[1] != raw.shape[2] or not raw.size:
        raise ValueError(f"matrices must be [outputs, in, in], at least one; got shape {raw.shape}")
    number, n = raw.shape[:2]
    _check_names(names, number, "outputs")
    labels = [str(label) for label in (range(n) if labels is None else labels)]
    _check_names(labels, n, "inputs")
    both = np.stack([raw, (raw + raw.transpose(0, 2, 1)) / 2])
    limit = float(np.abs(both).max()) or 1.0
    side = float(np.clip(0.36 * n, 1.5, 4.0))
    above, margin = 0.5 if title else 0.15, 0.55
    width, height = margin + number * (side + 0.15) + 0.85, above + 2 * (side + 0.15) + 0.3
    figure = new_figure(width, height)
    font = min(8.0, 20 * side / n)
    for row in range(2):
        for column in range(number):
            corner = (margin + column * (side + 0.15)) / width, (0.3 + (1 - row) * (side + 0.15)) / height
            panel = figure.add_axes((*corner, side / width, side / height))
            matrix = both[row, column]
            panel.imshow(matrix, cmap=COLOURS, vmin=-limit, vmax=limit, interpolation="nearest")
            panel.set_xticks(range(n), labels if row else [""] * n, fontsize=8)
            panel.set_yticks(range(n), [""] * n if column else labels, fontsize=8)
            panel.tick_params(length=0, pad=3)
            panel.spines[:].set_color("0.6")
            if not column:
                panel.set_ylabel("symmetrised" if row else "as the weights have it", fontsize=9)
            if not row:
                panel.set_title(names[column], fontsize=10, pad=4)
            if n <= WRITTEN_OUT // 2:
                for (i, j), value in np.ndenumerate(matrix):
                    colour = "white" if abs(value) > 0.6 * limit else "black"
                    panel.text(
                        j, i, f"{np.round(value, 2) + 0.0:.2f}", ha="center", va="center", fontsize=font, color=colour
                    )
    left = (margin + number * (side + 0.15) + 0.02) / width
    bar = figure.add_axes((left, 0.3 / height, 0.14 / width, (2 * side + 0.15) / height))
    figure.colorbar(figure.axes[0].images[0], cax=bar)
    bar.tick_params(labelsize=8)
    _title(figure, title)
    return figure


def _show(panel: "Axes", pattern: np.ndarray, shape: tuple[int, int], colour: str) -> None:
    limit = float(np.abs(pattern).max()) or 1.0
    panel.imshow(pattern.reshape(shape), cmap=COLOURS, vmin=-limit, vmax=limit, interpolation="nearest")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_color(colour)


def _plain(panel: "Axes") -> None:
    panel.axhline(0, color="0.5", linewidth=0.8)
    panel.tick_params(axis="y", labelsize=7.5)
    panel.tick_params(axis="x", length=0)
    panel.spines[["top", "right"]].set_visible(False)


def _signs(parts: np.ndarray, k: int) -> list[str]:
    """A colour for each bar: by sign for the k eigenvectors, grey for the other parts."""
    return [(POSITIVE if part > 0 else NEGATIVE) if place < k else NEUTRAL for place, part in enumerate(parts)]


def _title(figure: "Figure", title: str | None) -> None:
    if title:
        width, height = figure.get_size_inches()
        figure.suptitle(title, x=0.1 / width, y=1 - 0.1 / height, ha="left", va="top", fontsize=12)


def _check_patterns(values: np.ndarray, patterns: np.ndarray, shape: tuple[int, int], axes: int) -> None:
    if values.ndim != axes or not values.size or patterns.shape != (*values.shape, shape[0] * shape[1]):
        raise ValueError(
            f"each eigenvalue needs a pattern of {shape[0]} x {shape[1]} pixels in one axis, "
            f"got values of shape {values.shape} and patterns of shape {patterns.shape}"
        )


def _check_names(names: Sequence[str], number: int, what: str = "classes") -> None:
    if len(names) != number:
        raise ValueError(f"{number} {what} need {number} names, got {len(names)}")
