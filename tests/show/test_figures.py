"""Figures: what they show, and that nothing in them is cut off."""

import itertools

import numpy as np
import pytest

from bilinear_jax.show import figures


def symmetric(n):
    matrix = np.random.default_rng(n).normal(size=(n, n))
    return matrix + matrix.T


@pytest.mark.parametrize("n", [1, 2, 10, 13, 60])
@pytest.mark.parametrize("title", [None, "Feature 3834: a title that is longer than a small figure is wide"])
def test_heat_map_labels_are_readable(n, title):
    labels = [8000 + 3 * i for i in range(n)]
    figure = figures.heat_map(symmetric(n), labels, title=title, unit="interaction")
    figure.canvas.draw()
    axes, bar = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(map(str, labels))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(map(str, labels))
    assert bar.get_ylabel() == "interaction"

    low, high = bar.get_ylim()
    shown = [tick for tick in bar.get_yticklabels() if low <= tick.get_position()[1] <= high]
    texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), *shown, bar.yaxis.label]
    texts += [figure._suptitle] if title else []
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):  # no label touches the next
        boxes = [tick.get_window_extent() for tick in ticks]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
        assert all(tick.get_fontsize() >= 6 for tick in ticks)


def test_heat_map_is_centred_at_zero_and_upright():
    matrix = np.array([[0.0, 1.0], [-4.0, 2.0]])
    image = figures.heat_map(matrix, ["a", "b"]).axes[0].images[0]
    assert np.array_equal(image.get_array(), matrix)
    assert image.get_clim() == (-4, 4)
    assert image.origin == "upper"
    low, middle, high = image.cmap(image.norm([-4.0, 0.0, 4.0]))[:, :3]
    assert low[0] > low[2] and high[2] > high[0] and middle.min() > 0.9  # red, blue, white


def test_heat_map_of_zeros():
    assert figures.heat_map(np.zeros((3, 3))).axes[0].images[0].get_clim() == (-1, 1)


def test_heat_map_writes_small_matrices_out():
    assert [t.get_text() for t in figures.heat_map([[0.5, -0.0], [1e-4, 1234.0]]).axes[0].texts] == [
        *("0.50", "0.00", "1e-4", "1e+03")
    ]
    assert not figures.heat_map(symmetric(13)).axes[0].texts


@pytest.mark.parametrize(
    ("matrix", "labels", "message"),
    [
        (np.zeros((2, 3)), None, r"square matrix \[n, n\], got shape \(2, 3\)"),
        (np.zeros((0, 0)), None, r"got shape \(0, 0\)"),
        (np.zeros((2, 2)), [1], "2 rows needs 2 labels, got 1"),
        (np.array([[np.nan]]), None, "matrix holds 1 values that are not finite"),
    ],
)
def test_heat_map_refuses(matrix, labels, message):
    with pytest.raises(ValueError, match=message):
        figures.heat_map(matrix, labels)


def test_spectrum_sorts_and_tells_signs_apart():
    figure = figures.eigenvalue_spectrum(np.array([1.0, -3.0, 0.0, 2.0]), title="Feature 7")
    figure.canvas.draw()
    (axes,) = figure.axes
    positive, negative = (c for c in axes.collections if len(c.get_offsets()) and c.get_label()[0].isdigit())
    assert np.array_equal(positive.get_offsets(), [[1, 2], [2, 1]])
    assert np.array_equal(negative.get_offsets(), [[4, -3]])
    assert not np.array_equal(positive.get_paths()[0].vertices, negative.get_paths()[0].vertices)  # other marks
    assert axes.get_title(loc="left") == "Feature 7"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        *("2 positive: 36 % of the squared norm", "1 negative: 64 % of the squared norm")
    ]


@pytest.mark.parametrize("values", [np.zeros(3), np.array([1.0]), -np.ones(2)])
def test_spectrum_with_signs_missing(values, tmp_path):
    figures.eigenvalue_spectrum(values).savefig(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_spectrum_refuses():
    with pytest.raises(ValueError, match=r"eigenvalues \[in\], got shape \(2, 2\)"):
        figures.eigenvalue_spectrum(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="values holds 1 values that are not finite"):
        figures.eigenvalue_spectrum([1.0, np.inf])


R = np.array([[0.0, 0.25, 0.5, 1.0, np.nan], [-1.0, 0.75, 0.76, 1.0, 1.0]])


def test_correlation_curve():
    figure = figures.correlation_curve([2, 16], R, title="Some SAE")
    figure.canvas.draw()
    left, right = figure.axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[2, 1.75 / 4], [16, 2.51 / 5]])
    np.testing.assert_allclose(right.lines[0].get_xydata(), [[2, 25], [16, 60]])  # .75 is not above .75
    corners = {tuple(corner) for corner in left.collections[0].get_paths()[0].vertices.round(6).tolist()}
    assert corners == {(2, 0.1875), (2, 0.625), (16, 0.75), (16, 1.0)}  # the quartiles
    assert left.get_title(loc="left") == "4 to 5 features"
    assert right.get_ylabel() == "features with r > 0.75 (%)"
    for axes in figure.axes:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "4", "8", "16"]
    texts = [*(label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label)), figure._suptitle]
    boxes = [text.get_window_extent() for text in texts]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_a_correlation_curve_below_0_is_seen(tmp_path):
    figure = figures.correlation_curve(range(1, 65), np.full((64, 3), -0.5), threshold=-0.6)
    figure.savefig(tmp_path / "curve.png")
    left, right = figure.axes
    assert left.get_ylim()[0] < -0.5
    assert set(right.lines[0].get_ydata()) == {100} and right.get_ylim()[1] > 100
    assert left.get_title(loc="left") == "3 features"


@pytest.mark.parametrize(
    ("ks", "r", "message"),
    [
        ([1], R, r"got \(1,\) and \(2, 5\)"),
        ([1, 2], R[:, :0], r"correlations \[n_ks, features\], got \(2,\) and \(2, 0\)"),
        ([2, 2], R, r"ascend from 1 or more, got \[2.0, 2.0\]"),
        ([0, 2], R, "ascend from 1 or more"),
        ([1, 2], 2 * R, r"lie in -1 \.\.\. 1, got -?2"),
        ([1, 2], R * [[1], [np.nan]], "no feature has a correlation at k = 2"),
    ],
)
def test_correlation_curve_refuses(ks, r, message):
    with pytest.raises(ValueError, match=message):
        figures.correlation_curve(ks, r)


def test_no_global_state():
    from matplotlib import _pylab_helpers

    figures.heat_map(np.eye(2))
    assert not _pylab_helpers.Gcf.figs


# Certificates


R2 = {"form": [0.9, np.nan, 0.8], "linear": [0.4, 0.5, -7.0]}
LOSSES = {"form": [0.01, -0.002, 0.3], "linear": [0.2, 0.5, 4.0]}


def test_certificate_shows_every_number_and_cuts_only_r2():
    figure = figures.certificate(R2, LOSSES, [1.0, 2.0, 9.0], [0.1, 0.2, 0.3], title="a model")
    left, right = figure.axes
    form, linear = (line.get_ydata() for line in left.lines)
    np.testing.assert_array_equal(form, R2["form"])
    np.testing.assert_array_equal(linear, [0.4, 0.5, left.get_ylim()[0]])
    assert left.get_ylim()[0] == figures.LOWEST_R2
    assert [bar.get_height() for bar in right.patches] == [1, 2, 9]
    shown = {container.get_label(): container for container in right.containers[1:]}
    for name, values in LOSSES.items():
        np.testing.assert_array_equal(shown[name].lines[0].get_ydata(), values)
    ends = [segment[:, 1] for segment in shown["form"].lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[-0.09, 0.11], [-0.202, 0.198], [0.0, 0.6]])
    assert not shown["linear"].has_yerr
    assert right.get_ylim()[0] < -0.2 and right.get_ylim()[1] > 9
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["the MLP removed", "form", "linear"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_added": {"form": [0.0] * 3}}, r"R2 is given of \['form', 'linear'\], but losses of \['form'\]"),
        ({"r2": {}, "loss_added": {}}, "give both of the same"),
        ({"loss_removed": [1.0]}, r"needs arrays \[n_layer\] of one length, got \[\(1,\), \(3,\)\]"),
        ({"loss_removed": [1.0, np.nan, 1.0]}, "loss_removed holds 1 values that are not finite"),
    ],
)
def test_certificate_says_what_is_wrong(changes, message):
    given = {"r2": R2, "loss_added": LOSSES, "loss_removed": [1.0] * 3, "error": [0.1] * 3}
    with pytest.raises(ValueError, match=message):
        figures.certificate(**given | changes)
