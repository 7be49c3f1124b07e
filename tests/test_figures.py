"""What the figures promise: the numbers they show are the numbers they got, at the place where they belong."""

import subprocess
import sys
import time

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from numpy.testing import assert_allclose, assert_array_equal

from stn_pipeline import figures
from stn_pipeline.errors import ShapeError

RNG = np.random.default_rng(0)


def lattice(n, h, w):
    """Return the identity's points (n, h, w, 2): the centres of h x w pixels in [-1, 1], edge to edge."""
    y, x = np.meshgrid((2 * np.arange(h) + 1) / h - 1, (2 * np.arange(w) + 1) / w - 1, indexing="ij")
    return np.broadcast_to(np.stack([x, y], axis=-1), (n, h, w, 2)).copy()


def confusion(k):
    return RNG.integers(1, 9, k)[:, None] * np.eye(k, dtype=int) * 50 + (RNG.random((k, k)) < 0.1) * RNG.integers(1, 9, (k, k))


def labelled(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def is_png(figure):
    return figures.to_png(figure).startswith(b"\x89PNG\r\n")


# --- confusion matrix


@pytest.mark.parametrize("k", [2, 10, 43])
def test_each_nonzero_cell_shows_its_count(k):
    counts = confusion(k)
    axes = figures.confusion_matrix(counts, [f"c{i}" for i in range(k)], "t").axes[0]
    shown = np.zeros_like(counts)
    for text in axes.texts:
        column, row = (int(v) for v in text.get_position())
        shown[row, column] = int(text.get_text())
    assert_array_equal(shown, counts)
    assert len(axes.texts) == (4 if k == 2 else np.count_nonzero(counts))


def test_rows_are_the_true_classes():
    axes = figures.confusion_matrix(np.array([[5, 2], [0, 7]]), ["cat", "dog"], "t").axes[0]
    assert {t.get_position(): t.get_text() for t in axes.texts}[(1, 0)] == "2"
    assert axes.get_ylabel() == "true"
    assert axes.get_xlabel() == "predicted"
    assert axes.yaxis_inverted()


@pytest.mark.parametrize("k", [1, 100, 250])
def test_any_number_of_classes_renders_at_a_size_that_can_be_opened(k):
    figure = figures.confusion_matrix(confusion(k), [f"class number {i}" for i in range(k)], "t")
    assert is_png(figure)
    assert max(figure.get_size_inches() * figure.dpi) < 2600


def test_one_percent_of_errors_can_be_seen():
    axes = figures.confusion_matrix(np.array([[990, 10], [0, 1000]]), ["a", "b"], "t").axes[0]
    errors = axes.images[1]
    one_percent, none = errors.to_rgba(errors.get_array())[[0, 1], [1, 0], :3]
    assert_allclose(none, 1)
    assert np.abs(one_percent - 1).max() > 0.15


def test_recall_is_the_share_of_the_row_and_a_class_without_images_has_none():
    recall = figures.confusion_matrix(np.array([[9, 1], [0, 0]]), ["a", "b"], "t").axes[1]
    assert [bar.get_width() for bar in recall.patches] == [0.9, 0]
    assert [text.get_text() for text in recall.texts] == ["0.900", "none"]


def test_everything_stays_inside_of_the_figure_whatever_the_names():
    for names in (["0", "1"], ["a very long class name, far beyond use", "WWWWWWWWWWWWWWWWWWWWWW"], ["cost $5", "no$rm$al_x^2"]):
        figure = figures.confusion_matrix(np.array([[99999, 1], [2, 5]]), names, "A title " * 20)
        figure.draw_without_rendering()
        box, (wide, high) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= wide and box.y1 <= high, names


def test_a_dollar_in_a_name_is_no_formula():
    axes = figures.confusion_matrix(np.eye(2, dtype=int), ["a$b$", "$c_1$"], "$t$").axes[0]
    assert not any(label.get_parse_math() for label in [*axes.get_xticklabels(), *axes.get_yticklabels()])


def test_confusion_and_classes_must_fit():
    with pytest.raises(ShapeError, match=r"\(2, 3\), expected \(2, 2\) for 2 classes"):
        figures.confusion_matrix(np.zeros((2, 3), int), ["a", "b"], "t")


# --- curves


def curves(n, best, **changed):
    e = np.arange(1, n + 1)
    values = dict(train_loss=0.4 / e, val_loss=0.5 / e**0.5, train_accuracy=1 - 0.1 / e, val_accuracy=1 - 0.2 / e) | changed
    return figures.curves(list(e), *values.values(), best, "t")


@pytest.mark.parametrize(("n", "best"), [(1, 1), (2, 2), (50, 37)])
def test_the_best_epoch_is_marked_at_its_epoch_on_the_validation_curve(n, best):
    figure = curves(n, best)
    for axes, value in zip(figure.axes, (0.5 / best**0.5, 1 - 0.2 / best), strict=True):
        assert_allclose(labelled(axes, "_best").get_xydata(), [[best, value]])
        assert axes.get_title("left").startswith(f"best epoch {best}:")
        assert_array_equal(labelled(axes, "validation").get_xdata(), np.arange(1, n + 1))
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
        assert x0 <= 1 <= n <= x1 and y0 < value < y1
    assert figure.axes[0].get_yscale() == "log"
    assert is_png(figure)


@pytest.mark.parametrize("scale", [1, 1.05, 1.5, 3, 10, 1e4])
def test_the_loss_axis_has_ticks_to_read_whatever_its_range(scale):
    axes = curves(2, 2, train_loss=[0.0317 * scale, 0.0317], val_loss=[0.0317, 0.0317]).axes[0]
    low, high = axes.get_ylim()
    assert 2 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 9


def test_a_loss_that_is_not_finite_leaves_a_gap_and_a_cross():
    axes = curves(4, 1, train_loss=[1, 0.5, np.nan, np.inf], val_loss=[1, 2, 3, 4]).axes[0]
    assert_array_equal(labelled(axes, "train").get_ydata(), [1, 0.5, np.nan, np.nan])
    assert_array_equal(labelled(axes, "not finite").get_xdata(), [3, 4])
    assert np.isfinite(axes.get_ylim()).all()


@pytest.mark.parametrize("loss", [np.nan, 0.0, -np.inf])
def test_a_run_without_one_usable_loss_still_renders(loss):
    figure = curves(1, 0, train_loss=[loss], val_loss=[loss], train_accuracy=[np.nan], val_accuracy=[np.nan])
    assert is_png(figure)
    assert "_best" not in [line.get_label() for line in figure.axes[0].lines]


def test_curves_must_be_equally_long():
    with pytest.raises(ShapeError, match=r"\[2, 1, 2, 2, 2\]"):
        curves(2, 1, train_loss=[1.0])


# --- warps


def outline(axes):
    return labelled(axes, "outline").get_xydata()


@pytest.mark.parametrize(("high", "wide", "h", "w"), [(28, 28, 28, 28), (8, 8, 8, 8), (32, 64, 32, 64)])
def test_an_identity_grid_ends_at_the_corner_pixels(high, wide, h, w):
    images = RNG.random((2, 1, high, wide))
    axes = figures.warps(images, images[:, :, :h, :w], lattice(2, h, w), ["a", "b"], None, "t").axes[0]
    corners = outline(axes)[[0, w - 1, w + h - 1, 2 * w + h - 1]]
    assert_allclose(corners, [[0, 0], [wide - 1, 0], [wide - 1, high - 1], [0, high - 1]], atol=1e-9)
    assert tuple(axes.images[0].get_extent()) == (-0.5, wide - 0.5, high - 0.5, -0.5)


def test_one_pixel_is_two_over_the_width_and_y_points_down():
    points = lattice(1, 4, 6) + np.array([2 / 6, 2 * 2 / 4])
    axes = figures.warps(np.zeros((1, 1, 4, 6)), np.zeros((1, 1, 4, 6)), points, ["a"], None, "t").axes[0]
    assert_allclose(outline(axes)[0], [1, 2], atol=1e-9)
    assert axes.yaxis_inverted()


def test_the_mesh_lies_on_the_grid():
    points = lattice(1, 28, 28) * 0.5
    axes = figures.warps(np.zeros((1, 1, 28, 28)), np.zeros((1, 1, 28, 28)), points, ["a"], None, "t").axes[0]
    lines = axes.collections[0].get_segments()
    known = {tuple(point) for point in (((points[0] + 1) * 28 - 1) / 2).reshape(-1, 2).round(6)}
    assert len(lines) == 14
    assert all(tuple(point) in known for line in lines for point in line.round(6))


def test_a_grid_outside_of_the_image_is_shown_but_capped():
    def shown(scale):
        axes = figures.warps(np.zeros((1, 1, 10, 10)), np.zeros((1, 1, 5, 5)), lattice(1, 5, 5) * scale, ["a"], None, "t").axes[0]
        return axes.get_xlim()

    tight, wide, capped = shown(0.5), shown(1.8), shown(1000)
    assert tight[0] < -0.5 and tight[1] > 9.5
    assert wide[0] < (1 - 1.8 * 0.8) * 5 - 0.5 < -0.5
    assert capped[0] >= ((-2.1 + 1) * 10 - 1) / 2 and capped[1] <= ((2.1 + 1) * 10 - 1) / 2


def test_points_that_are_not_finite_render():
    points = lattice(2, 8, 8)
    points[0, 2, 3], points[1] = np.inf, np.nan
    assert is_png(figures.warps(np.zeros((2, 1, 8, 8)), np.zeros((2, 1, 8, 8)), points, ["a", "b"], None, "t"))


def test_wrong_predictions_are_coloured_and_marked():
    images = RNG.random((3, 3, 8, 8))
    figure = figures.warps(images, images, lattice(3, 8, 8), ["a", "b", "c"], ["a", "x", "c"], "t")
    said = [axes.xaxis.label for axes in figure.axes if axes.get_xlabel()]
    assert [text.get_text() for text in said] == ["a", "✗ x", "c"]
    assert [to_hex(text.get_color()).upper() == figures.VERMILION for text in said] == [False, True, False]


def test_colour_images_are_shown_as_they_are_and_grey_ones_grey():
    colour, grey = RNG.random((1, 3, 4, 5)), RNG.random((1, 1, 4, 5))
    for images in (colour, grey):
        above, below = figures.warps(images, images, lattice(1, 4, 5), ["a"], None, "t").axes
        assert_allclose(above.images[0].get_array(), np.broadcast_to(images[0], (3, 4, 5)).transpose(1, 2, 0))
        assert_allclose(below.images[0].get_array(), above.images[0].get_array())


def test_warps_must_belong_together():
    with pytest.raises(ShapeError, match=r"points \(2, 8, 7, 2\), 2 labels"):
        figures.warps(np.zeros((2, 1, 8, 8)), np.zeros((2, 1, 8, 8)), lattice(2, 8, 7), ["a", "b"], None, "t")


# --- warp strip


def test_a_strip_holds_each_pixel_as_a_square():
    images, warped = RNG.random((3, 3, 28, 28)), RNG.random((3, 3, 14, 20))
    strip = figures.warp_strip(images, warped)
    assert strip.dtype == np.uint8
    assert strip.shape == (2 + 84 + 2 + 56 + 2, 2 + 3 * (84 + 2), 3)  # 28 x 3, and 14 x 20 times 4
    for i in range(3):
        cell = strip[2:86, 2 + 86 * i : 86 + 86 * i]
        assert_array_equal(cell, np.kron(np.rint(images[i] * 255).transpose(1, 2, 0), np.ones((3, 3, 1))))
        cell = strip[88:144, 2 + 86 * i + 2 : 2 + 86 * i + 82]
        assert_array_equal(cell, np.kron(np.rint(warped[i] * 255).transpose(1, 2, 0), np.ones((4, 4, 1))))
    assert (strip[86:88] == 128).all() and (strip[:, 86:88] == 128).all()


def test_a_strip_clips_and_takes_grey_large_and_broken_images():
    images = np.full((1, 1, 200, 200), [[-1.0], [2.0]] * 100)
    images[0, 0, 0, 0] = np.nan
    strip = figures.warp_strip(images, images)
    assert strip.shape == (2 + 200 + 2 + 200 + 2, 204, 3)
    assert (strip[2, 2] == 0).all() and (strip[3, 2:202] == 255).all()


def test_a_strip_is_made_in_less_than_ten_milliseconds():
    images = RNG.random((12, 1, 28, 28), dtype=np.float32)
    took = []
    for _ in range(20):
        start = time.perf_counter()
        figures.warp_strip(images, images)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.01


def test_a_strip_needs_pairs():
    with pytest.raises(ShapeError, match=r"warped \(1, 1, 8, 8\)"):
        figures.warp_strip(np.zeros((2, 1, 8, 8)), np.zeros((1, 1, 8, 8)))


# --- reliability


def test_reliability_shows_accuracies_in_their_bins_and_leaves_out_empty_ones():
    accuracy, count = np.array([np.nan, 0.25, 0.5, 0.9]), np.array([0, 4, 10, 1000])
    figure = figures.reliability(np.array([np.nan, 0.4, 0.6, 0.95]), accuracy, count, 0.051, "t")
    above, below = figure.axes
    bars, gaps = above.containers
    assert_allclose([bar.get_height() for bar in bars], accuracy[1:])
    assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in bars], [0.375, 0.625, 0.875])
    assert_allclose([gap.get_y() + gap.get_height() for gap in gaps], [0.4, 0.6, 0.95])
    assert_allclose([bar.get_height() for bar in below.containers[0]], count[1:])
    assert "0.0510" in above.get_title("left")
    assert is_png(figure)


def test_reliability_whiskers_are_wilsons_interval():
    scipy_stats = pytest.importorskip("scipy.stats")
    one = np.array([0.9])
    above = figures.reliability(one, one, np.array([50]), 0.0, "t").axes[0]
    interval = scipy_stats.binomtest(45, 50).proportion_ci(method="wilson")
    assert_allclose(above.collections[0].get_segments()[0][:, 1], [interval.low, interval.high], atol=1e-4)


def test_reliability_without_any_image_renders():
    assert is_png(figures.reliability(np.full(5, np.nan), np.full(5, np.nan), np.zeros(5, int), float("nan"), "t"))


# --- the module


def test_figures_leave_the_callers_style_alone_and_ignore_it():
    plain = figures.to_png(curves(3, 2))
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20, "savefig.dpi": 50}):
        before = dict(matplotlib.rcParams)
        figures.confusion_matrix(np.eye(2, dtype=int), ["a", "b"], "t")
        restyled = figures.to_png(curves(3, 2))
        assert dict(matplotlib.rcParams) == before
    assert restyled == plain


def test_importing_the_figures_loads_no_pyplot_mlflow_or_optuna():
    code = "import sys, stn_pipeline.figures; print([m for m in ('matplotlib.pyplot', 'mlflow', 'optuna') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
