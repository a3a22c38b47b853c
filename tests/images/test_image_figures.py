"""Figures of image classifiers and toys: the right images at the right places, and nothing cut off."""

import numpy as np
import pytest

from bilinear_jax.images import figures

RNG = np.random.default_rng(0)
NAMES = ["shirt", "ankle boot", "bag"]


def shown(panel):
    return np.asarray(panel.images[0].get_array())


def all_inside(figure):
    """Every text lies within the figure; panels don't overlap."""
    figure.canvas.draw()
    axes = figure.axes
    texts = [text for panel in axes for text in (panel.title, panel.xaxis.label, panel.yaxis.label)]
    for panel in axes:
        for axis in (panel.xaxis, panel.yaxis) if panel.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            texts += [tick for place, tick in ticks if low <= place <= high]
    texts += [figure._suptitle] if figure._suptitle else []
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in boxes)
    panels = [panel.get_window_extent() for panel in axes]
    assert not any(a.overlaps(b) for i, a in enumerate(panels) for b in panels[:i])


def test_a_pattern_and_its_opposite_look_the_same():
    patterns = RNG.normal(size=(5, 6))
    np.testing.assert_array_equal(figures.facing(patterns), figures.facing(-patterns))
    np.testing.assert_array_equal(np.abs(figures.facing(patterns)), np.abs(patterns))


def test_the_eigenspectrum_shows_both_ends():
    values = np.array([0.5, -2.0, 0.0, 3.0, -1.0, 1.0])
    patterns = np.abs(RNG.normal(size=(6, 6)))
    figure = figures.eigenspectrum(values, patterns, (2, 3), k=2, title="Class 3")
    all_inside(figure)
    panels = {panel.get_title(): panel for panel in figure.axes if panel.images}
    assert list(panels) == ["3.00", "1.00", "-2.00", "-1.00"]
    for title, row in zip(panels, (3, 5, 1, 4), strict=True):
        np.testing.assert_array_equal(shown(panels[title]), patterns[row].reshape(2, 3))
        low, high = panels[title].images[0].get_clim()
        assert low == -high == -patterns[row].max()
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), np.sort(values)[::-1])


def test_a_spectrum_of_one_sign():
    figure = figures.eigenspectrum([1.0, 2.0], np.eye(2, 4), (2, 2), k=3)
    all_inside(figure)
    assert [panel.get_title() for panel in figure.axes if panel.images] == ["2.00", "1.00"]


def test_the_gallery_has_a_column_a_class():
    patterns = np.abs(RNG.normal(size=(3, 2, 4)))
    figure = figures.eigenvector_gallery(np.arange(6).reshape(3, 2), patterns, (2, 2), NAMES, title="All")
    all_inside(figure)
    for place, panel in enumerate(figure.axes):
        row, column = divmod(place, 3)
        np.testing.assert_array_equal(shown(panel), patterns[column, row].reshape(2, 2))
        assert panel.get_title() == ("" if row else NAMES[column])
        assert float(panel.get_xlabel()) == 2 * column + row


def test_masks_keep_their_sign():
    masks = -np.ones((1, 1, 4))
    panel = figures.eigenvector_gallery(None, masks, (2, 2), ["bag"]).axes[0]
    assert (shown(panel) == -1).all() and panel.get_xlabel() == ""


def explained(around):
    contributions, others = RNG.normal(size=(3, 2)), RNG.normal(size=3)
    rest = RNG.normal(size=3) if around else np.zeros(3)
    logits = contributions.sum(axis=1) + others + rest
    parts = {"values": RNG.normal(size=(3, 2)), "patterns": np.abs(RNG.normal(size=(3, 2, 4))), "others": others}
    return {
        **parts,
        "image": np.ones(4),
        "shape": (2, 2),
        "classes": NAMES,
        "logits": logits,
        "contributions": contributions,
        "around": rest if around else None,
    }


@pytest.mark.parametrize("around", [False, True])
def test_the_bars_of_an_explanation_add_up(around):
    given = explained(around)
    figure = figures.explanation(**given, label=1, shown=2, title="Why")
    all_inside(figure)
    best = np.argsort(-given["logits"])[:2]
    for place, c in enumerate(best):
        *images, bars = figure.axes[2 + 3 * place : 5 + 3 * place]
        assert bars.get_title() == f"{NAMES[c]}: {given['logits'][c]:.2f}"
        np.testing.assert_allclose(sum(bar.get_height() for bar in bars.patches), given["logits"][c])
        assert len(bars.patches) == 3 + around
        for r, panel in enumerate(images):
            np.testing.assert_array_equal(shown(panel), given["patterns"][c, r].reshape(2, 2))
    assert figure.axes[0].get_title() == "input: ankle boot"


def test_an_explanation_that_does_not_add_up_is_refused():
    given = explained(True)
    with pytest.raises(ValueError, match="do not add up to the logits"):
        figures.explanation(**{**given, "around": None})


def test_toys_raw_above_and_symmetrised_below():
    raw = RNG.normal(size=(2, 5, 5))
    figure = figures.interactions_beside(raw, ["a and b", "a and c"], list("abcde"), title="And")
    all_inside(figure)
    np.testing.assert_allclose(shown(figure.axes[1]), raw[1])
    np.testing.assert_allclose(shown(figure.axes[2]), (raw[0] + raw[0].T) / 2)
    limits = {panel.images[0].get_clim() for panel in figure.axes[:4]}
    assert limits == {(-np.abs(raw).max(), np.abs(raw).max())}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.eigenspectrum([1.0], np.ones((1, 4)), (2, 3)), "a pattern of 2 x 3 pixels"),
        (lambda: figures.eigenspectrum([1.0], np.ones((1, 4)), (2, 2), k=0), "k must be at least 1"),
        (lambda: figures.eigenspectrum([np.nan], np.ones((1, 4)), (2, 2)), "values holds 1 values that are not finite"),
        (lambda: figures.eigenvector_gallery([[1.0]], np.ones((1, 1, 4)), (2, 2), NAMES), "1 classes need 1 names"),
        (lambda: figures.interactions_beside(np.ones((2, 3)), ["a"]), r"\[outputs, in, in\]"),
        (lambda: figures.interactions_beside(np.ones((1, 3, 3)), ["a"], ["b"]), "3 inputs need 3 names, got 1"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
