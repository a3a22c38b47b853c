"""Figures of image classifiers and of toy models: eigenvectors as images. Each takes arrays and returns a ``Figure``.

Eigenvectors have no sign of their own; ``facing`` gives them one. Colours are those of ``figures``: red is negative,
white 0, blue positive, symmetric around 0 in every image. No global state of matplotlib is touched.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bilinear_jax.drawing import COLOURS, NEGATIVE, POSITIVE, WRITTEN_OUT, finite, new_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEUTRAL = "0.65"


def facing(patterns: Any) -> np.ndarray:
    """Images of eigenvectors ``[..., pixels]`` with the sign that makes the sum of their cubes positive.

    It makes the stronger side of a pattern blue, and is the same for a vector and its opposite.

    Example:
        >>> facing([[-3.0, 1.0], [2.0, -1.0]]).tolist()
        [[3.0, -1.0], [2.0, -1.0]]
    """
    patterns = finite("patterns", patterns)
    return np.where((patterns**3).sum(axis=-1, keepdims=True) < 0, -patterns, patterns)


def eigenspectrum(values: Any, patterns: Any, shape: tuple[int, int], k: int = 3, title: str | None = None) -> "Figure":
    """All eigenvalues of a class, and beside them its k most positive and k most negative eigenvectors as images.

    Args:
        values: ``[rank]``, in any order; for instance a row of ``pixel_eigenvectors``' values.
        patterns: ``[rank, pixels]``, in the same order.
        shape: rows and columns of an image.
        k: images of each sign; fewer are shown where fewer eigenvalues have that sign.
        title: stands above the figure.

    Raises:
        ValueError: if there isn't one pattern of rows * columns pixels a value, k isn't at least 1, or something is
            not finite.

    Example:
        >>> figure = eigenspectrum([-1.0, 0.0, 3.0], np.eye(3, 4), (2, 2), k=2)
        >>> [axes.get_title() for axes in figure.axes if axes.images]
        ['3.00', '-1.00']
    """
    values, patterns = finite("values", values), facing(patterns)
    _check_patterns(values, patterns, shape, 1)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    order = np.argsort(-values)
    values, patterns = values[order], patterns[order]
    ranks = np.arange(1, len(values) + 1)
    positive, negative = np.flatnonzero(values > 0)[:k], np.flatnonzero(values < 0)[::-1][:k]

    figure = new_figure(4.4 + 1.3 * k, 3.6)
    start = 4.4 / (4.4 + 1.3 * k)  # the curve ends here, and images begin
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
    """The eigenvectors of all classes as images: a column a class, the first of each at the top, over its eigenvalue.

    Args:
        values: ``[classes, k]`` eigenvalues; None for images that aren't eigenvectors, such as masks: they keep their
            sign, and no numbers are written.
        patterns: ``[classes, k, pixels]``, for instance of ``most_positive``.
        shape: rows and columns of an image.
        classes: their names.
        title: stands above the figure.

    Raises:
        ValueError: if the shapes don't fit each other, or something is not finite.

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
    """One image, its logits, and which eigenvectors make the largest of them: the parts of ``Explanation``.

    On the left the image, below it all logits. On the right a row for each of the classes of the largest logits: its
    eigenvectors as images, with what each adds to the logit above, and last a bar for each part: one for each
    eigenvector, one for all the others together, and one for the path around the layer, if it is given. The parts add
    up to the logit, which is written above them.

    Args:
        image: ``[pixels]``.
        shape: rows and columns of an image.
        classes: the names of all classes.
        logits: ``[classes]``.
        values, patterns, contributions: ``[classes, k]``, ``[classes, k, pixels]`` and ``[classes, k]``.
        others, around: ``[classes]``.
        label: the class that the image really is.
        shown: classes with a row.
        title: stands above the figure.

    Raises:
        ValueError: if the shapes don't fit each other, the parts don't add up to the logits (to 1e-3 of the largest),
            or something is not finite.
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
        raise ValueError(f"logits, others and around are [{number}], contributions [{number}, {k}]")
    sums = contributions.sum(axis=1) + others + rest
    if np.abs(sums - logits).max() > 1e-3 * max(np.abs(contributions).max(), np.abs(logits).max()):
        raise ValueError(f"contributions, others and around don't add up to the logits: {sums} and {logits}")
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
    """Interaction matrices of some outputs, as the weights have them above, symmetrised below.

        above  left^T diag(g) right = Q'        below  1/2 (Q' + Q'^T)

    Both give the same output for every input; only the lower one is unique. The colours are the same in all.

    Args:
        matrices: ``[outputs, in, in]``, not symmetrised: ``BilinearTensor.interaction(..., symmetric=False)``.
        names: of the outputs.
        labels: of the inputs; by default 0 ... in - 1.
        title: stands above the figure.

    Raises:
        ValueError: if the matrices aren't square, are none, or are not finite, or labels or names don't fit them.

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
    """A colour for each bar: of eigenvectors by sign, grey for what has no image."""
    return [(POSITIVE if part > 0 else NEGATIVE) if place < k else NEUTRAL for place, part in enumerate(parts)]


def _title(figure: "Figure", title: str | None) -> None:
    if title:
        width, height = figure.get_size_inches()
        figure.suptitle(title, x=0.1 / width, y=1 - 0.1 / height, ha="left", va="top", fontsize=12)


def _check_patterns(values: np.ndarray, patterns: np.ndarray, shape: tuple[int, int], axes: int) -> None:
    if values.ndim != axes or not values.size or patterns.shape != (*values.shape, shape[0] * shape[1]):
        raise ValueError(
            f"each eigenvalue needs a pattern of {shape[0]} x {shape[1]} pixels in one axis, "
            f"got values {values.shape} and patterns {patterns.shape}"
        )


def _check_names(names: Sequence[str], number: int, what: str = "classes") -> None:
    if len(names) != number:
        raise ValueError(f"{number} {what} need {number} names, got {len(names)}")
