"""Figures of matrices, spectra, correlations and certificates: functions of arrays that return a matplotlib ``Figure``.

They do not touch matplotlib's global state and do not open a window. Save a figure with ``figure.savefig``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bilinear_jax.show.drawing import COLOURS, NEGATIVE, POSITIVE, WRITTEN_OUT, finite, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(matrix: Any, labels: Any = None, title: str | None = None, unit: str = "") -> "Figure":
    """A heat map of a square matrix: red is negative, white is 0, blue is positive. Both axes have the same labels.

    The colour scale is symmetric around 0 and ends at the largest |entry|. The first row is at the top. The figure
    grows with the matrix, so every label can be read. Up to 12 rows, the values are written in the cells.

    Args:
        matrix: ``[n, n]``, finite; for instance cosines between features, or ``Tracer.interaction_submatrix``.
        labels: n labels, for instance feature numbers; by default 0 ... n - 1.
        title: text above the figure.
        unit: what the colours measure; the label of the colour bar.

    Raises:
        ValueError: if the matrix is not square, is empty or is not finite, or if the number of labels is not n.

    Example:
        >>> figure = heat_map([[1.0, -0.5], [-0.5, 1.0]], labels=[3834, 751], unit="cosine similarity")
        >>> [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        ['3834', '751']
    """
    matrix = finite("matrix", matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"a heat map needs a square matrix [n, n], got shape {matrix.shape}")
    n = len(matrix)
    labels = [str(label) for label in (range(n) if labels is None else labels)]
    if len(labels) != n:
        raise ValueError(f"a matrix of {n} rows needs {n} labels, got {len(labels)}")

    longest = max(map(len, labels))
    cell = 0.62 if n <= WRITTEN_OUT else max(0.19, 4.5 / n)  # inches
    font = min(10.0, cell * 45)  # points; a label must fit into its cell
    side, margin = max(n * cell, 2.0), 0.15 + longest * font * 0.65 / 72
    gap, bar, below = 0.25, 0.22, 0.25
    width = max(margin + side + gap + bar + 0.9, margin + 0.1 * len(title or "") + 0.2)
    height = below + side + margin + (0.35 if title else 0)
    figure = new_figure(width, height)
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
            axes.text(j, i, short(value), ha="center", va="center", fontsize=9, color=colour)
    bar_axes = figure.add_axes(((margin + side + gap) / width, below / height, bar / width, side / height))
    figure.colorbar(image, cax=bar_axes, label=unit or None)
    if title:
        figure.suptitle(title, x=margin / width, y=1 - 0.12 / height, ha="left", va="top", fontsize=12)
    return figure


def eigenvalue_spectrum(values: Any, title: str | None = None) -> "Figure":
    """The eigenvalues of one interaction matrix, from the largest to the smallest.

    Positive eigenvalues are blue and filled, negative ones are red and hollow. The legend gives the number of each, and
    their share of the sum of all squares (the squared Frobenius norm of the matrix).

    Args:
        values: ``[in]``, finite, in any order.
        title: text above the figure.

    Raises:
        ValueError: if the values are not a vector, are empty, or are not finite.

    Example:
        >>> figure = eigenvalue_spectrum([-2.0, 0.0, 1.0])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['1 positive: 20 % of the squared norm', '1 negative: 80 % of the squared norm']
    """
    values = finite("values", values)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"a spectrum needs eigenvalues [in], got shape {values.shape}")
    values = np.sort(values)[::-1]
    total = float(np.sum(values**2)) or 1.0
    ranks = np.arange(1, len(values) + 1)
    size = float(np.clip(900 / len(values), 6, 60))  # points^2

    figure = new_figure(7.0, 4.0)
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


def correlation_curve(ks: Any, correlations: Any, threshold: float = 0.75, title: str | None = None) -> "Figure":
    """How well k eigenpairs predict features: the mean correlation over k, and the share above a threshold.

    The left panel shows the mean over features as a line, and the middle half of the features, between the quartiles,
    as a band. Its title says how many features have a correlation. The right panel shows the share of features whose
    correlation exceeds the threshold. The axis of k is logarithmic.

    Args:
        ks: ``[n_ks]``, ascending, at least 1.
        correlations: ``[n_ks, features]``, in -1 ... 1; nan if a feature has none. For instance ``r`` of
            ``low_rank_correlation``.
        threshold: the right panel counts features whose correlation is larger.
        title: text above the figure.

    Raises:
        ValueError: if there is not one row of correlations for each k; if no feature has a correlation at some k; if a
            correlation lies outside -1 ... 1; or if ks do not ascend from 1 or more.

    Example:
        >>> figure = correlation_curve([1, 2], [[0.25, 0.5, float("nan")], [0.75, 1.0, float("nan")]])
        >>> [panel.lines[0].get_ydata().tolist() for panel in figure.axes]
        [[0.375, 0.875], [0.0, 50.0]]
    """
    ks, r = finite("ks", ks), np.asarray(correlations, np.float64)
    if ks.ndim != 1 or r.ndim != 2 or len(r) != len(ks) or not r.size:
        raise ValueError(f"a curve needs ks [n_ks] and correlations [n_ks, features], got {ks.shape} and {r.shape}")
    if ks[0] < 1 or (np.diff(ks) <= 0).any():
        raise ValueError(f"ks must ascend from 1 or more, got {ks.tolist()}")
    known = ~np.isnan(r)
    if (np.abs(r[known]) > 1 + 1e-6).any():
        raise ValueError(f"correlations must lie in -1 ... 1, got {r[known][np.argmax(np.abs(r[known]))]:g}")
    features = known.sum(axis=1)
    if not features.all():
        raise ValueError(f"no feature has a correlation at k = {ks[features == 0][0]:g}: all are nan")
    mean, shares = np.nanmean(r, axis=1), 100 * (r > threshold).sum(axis=1) / features
    low, high = np.nanquantile(r, [0.25, 0.75], axis=1)

    figure = new_figure(8.0, 3.6)
    left, right = figure.subplots(1, 2)
    style = {"color": POSITIVE, "marker": "o", "markersize": 4}
    left.plot(ks, mean, label="mean", **style)
    left.fill_between(ks, low, high, color=POSITIVE, alpha=0.2, linewidth=0, label="middle half of the features")
    right.plot(ks, shares, **style)
    several = "" if features.min() == features.max() else f"{features.min()} to "
    left.set_title(f"{several}{features.max()} features", loc="left", fontsize=10)
    left.set_ylabel("Pearson's r with the activation")
    left.set_ylim(min(0.0, 1.1 * float(low.min()), 1.1 * float(mean.min())), 1.02)
    left.legend(frameon=False, loc="best")
    right.set_ylabel(f"features with r > {threshold:g} (%)")
    right.set_ylim(0, 102)
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(2.0 ** np.arange(np.floor(np.log2(ks[0])), np.ceil(np.log2(ks[-1])) + 1))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("k, number of eigenpairs")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.set_layout_engine("constrained")
    return figure


LOWEST_R2 = -0.25
"""A certificate's figure shows no lower R2; what lies below is at its lower edge."""


def certificate(
    r2: Mapping[str, Any],
    loss_added: Mapping[str, Any],
    loss_removed: Any,
    error: Any,
    title: str | None = None,
) -> "Figure":
    """How far a bilinear form and its controls stand for the MLPs of a model, layer by layer.

    The left panel shows R2. The right panel shows the loss added when one layer is replaced, on an axis that is
    logarithmic from 0.01 nats on, with grey bars for the loss added when the layer's MLP is removed: the scale on which
    to read the others. The first kind, the form, is filled and has error bars; the controls are hollow.

    Args:
        r2: by name, ``[n_layer]``, the form first. nan, or None, is not shown.
        loss_added: by name, ``[n_layer]``, with the same names.
        loss_removed: ``[n_layer]``.
        error: ``[n_layer]``, the standard errors of the form's losses.
        title: text above the figure.

    Raises:
        ValueError: if the names differ, there is no layer, the arrays differ in length, or a loss is not finite.

    Example:
        >>> r2 = {"form": [0.9, 0.95], "linear": [0.5, -2.0]}
        >>> figure = certificate(r2, {"form": [0.01, 0.0], "linear": [0.2, 0.1]}, [1.5, 0.3], [0.005, 0.004])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['R2 of the MLP', 'loss added (nats a token)']
    """
    if list(r2) != list(loss_added) or not r2:
        raise ValueError(f"R2 is given of {list(r2)}, but losses of {list(loss_added)}: give both of the same")
    scores = {name: np.asarray(values, np.float64) for name, values in r2.items()}
    losses = {name: finite(f"loss_added of {name}", values) for name, values in loss_added.items()}
    removed, error = finite("loss_removed", loss_removed), finite("error", error)
    shapes = {array.shape for array in (*scores.values(), *losses.values(), removed, error)}
    if len(shapes) > 1 or removed.ndim != 1 or not removed.size:
        raise ValueError(f"a certificate needs arrays [n_layer] of one length, got {sorted(shapes)}")
    layers = np.arange(len(removed))

    figure = new_figure(max(9.0, 4.5 + 0.16 * len(layers)), 4.0)
    left, right = figure.subplots(1, 2)
    right.bar(layers, removed, width=0.8, color="0.88", label="the MLP removed", zorder=0)
    styles = zip(("o", "s", "D", "^", "v"), (POSITIVE, NEGATIVE, "0.35", "0.6", "black"), strict=True)
    for place, (name, (marker, colour)) in enumerate(zip(scores, styles, strict=False)):
        face = "white" if place else colour
        style = {"marker": marker, "color": colour, "markerfacecolor": face, "markersize": 4, "linewidth": 0.8}
        left.plot(layers, np.maximum(scores[name], LOWEST_R2), label=name, clip_on=False, **style)
        right.errorbar(layers, losses[name], yerr=None if place else error, label=name, capsize=2, **style)
    lowest = min(0.0, *(float(np.nanmin(values, initial=0.0)) for values in scores.values()))
    left.set_ylim(max(lowest, LOWEST_R2), 1.02)
    left.set_ylabel("R2 of the MLP")
    right.set_yscale("symlog", linthresh=0.01)
    right.yaxis.set_major_formatter("{x:g}")
    right.set_ylabel("loss added (nats a token)")
    right.axhline(0, color="0.5", linewidth=0.8, zorder=1)
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.legend(*right.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.set_layout_engine("constrained")
    return figure
