"""The figures of a run, drawn from plain numpy arrays: matplotlib in, `Figure` out, nothing logged or shown here.

Figures use the object API, so no pyplot state, no backend and no open window is involved, and the style lives in an
rc_context around each function: a caller's rcParams stay as they were.

Legend: n images, C channels, H W input size, h w output size, K classes, E epochs, M calibration bins.
Colours: Okabe and Ito's palette, safe for colour-blind readers. Blue is validation or right, orange is training,
vermilion is wrong, in every figure.
"""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stn_pipeline.errors import ShapeError

Array = npt.NDArray[Any]

ORANGE, BLUE, VERMILION = "#E69F00", "#0072B2", "#D55E00"
TRAIN, VAL, WRONG = ORANGE, BLUE, VERMILION
INK, GREY, PALE = "#222222", "#6E6E6E", "#E4E4E4"

# parse_math is off because class names and titles are the user's: a "$" in a folder's name is not a formula.
STYLE: Any = {
    "figure.dpi": 140, "figure.facecolor": "white", "axes.facecolor": "white", "text.parse_math": False,
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
    "figure.titlesize": 11, "figure.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": GREY,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.axisbelow": True,
    "grid.color": PALE, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.6,
    "figure.constrained_layout.wspace": 0.06,
}  # fmt: skip
_RIGHT_MAP = LinearSegmentedColormap.from_list("right", ["#FFFFFF", "#8CC4E2", BLUE, "#00456C"])
_WRONG_MAP = LinearSegmentedColormap.from_list("wrong", ["#FFFFFF", "#F9BE92", VERMILION, "#702F00"])
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_STRIP_CELL, _STRIP_GAP, _STRIP_GREY = 84, 2, 128


def to_png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file, at the figure's own resolution (140 dpi for those made here)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")
    return buffer.getvalue()


@contextmanager
def sheet(width: float, height: float, title: str) -> Iterator[Figure]:
    """Lend an empty figure of that size (inches) in this style to those who draw for themselves; make the PNG inside."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        _title(figure, _wrapped(title, width)[0])
        yield figure


@matplotlib.rc_context(STYLE)
def confusion_matrix(confusion: Array, classes: Sequence[str], title: str) -> Figure:
    """Return the confusion matrix with counts in its cells and the recall of each class beside it.

    Colour is the share of the true class (the row), raised to 0.4 so that an error of 1 % can be seen; its scale is
    always 0..1, so figures of two runs compare. Right answers and errors have a hue each. Counts too small to read are
    left out, and so are zeros beyond four classes.

    Args:
        confusion: (K, K) counts, rows are the true class and columns the predicted one.
        classes: K names; those beyond 18 characters are cut.
        title: shown above, wrapped.

    Raises:
        ShapeError: confusion is not square or classes do not fit it.
    """
    k = len(classes)
    if confusion.shape != (k, k) or k == 0:
        raise ShapeError(f"confusion has shape {confusion.shape}, expected ({k}, {k}) for {k} classes, at least one")
    totals, right = confusion.sum(axis=1), np.diagonal(confusion)
    share = confusion / np.maximum(totals, 1)[:, None]  # (K, K), a class without images is a row of zeros
    cell = min(max(0.28, min(0.9, 5 / k)), 13 / k)  # inches
    names = [_short(name, 18) for name in classes]
    name_size = min(8.0, 72 * cell * 0.8) if k <= 110 else 6.0
    every = int(np.ceil(name_size * 1.1 / (72 * cell)))  # name each class where the rows are high enough to
    name_in = max(0.1, *(TextPath((0, 0), name, size=name_size).get_extents().width / 72 for name in names))
    angle = 0 if name_in < 0.9 * cell * every else 45 if k <= 20 else 90

    # In inches: a layout engine misplaces what stands beside axes of fixed aspect.
    side, recall_in = cell * k, min(max(0.5, 0.14 * cell * k), 1.2)
    left, below = name_in + 0.5, 0.55 + name_in * np.sin(np.radians(angle))
    wide = max(4.4, left + side + recall_in + 1.3)
    heading, heading_in = _wrapped(title, wide)
    top = heading_in + 0.5
    figure = Figure(figsize=(wide, top + side + below))
    _title(figure, heading)
    axes = _place(figure, left, top, side, side)
    norm, diagonal = PowerNorm(0.4, vmin=0, vmax=1), np.eye(k, dtype=bool)
    axes.imshow(np.ma.masked_where(~diagonal, share), cmap=_RIGHT_MAP, norm=norm)
    errors = axes.imshow(np.ma.masked_where(diagonal, share), cmap=_WRONG_MAP, norm=norm)
    shown = range(0, k, every)
    axes.set_xticks(shown, [names[i] for i in shown], fontsize=name_size)
    axes.set_yticks(shown, [names[i] for i in shown], fontsize=name_size)
    if angle:
        for label in axes.get_xticklabels():
            label.set(rotation=angle, ha="right", va="top" if angle == 45 else "center", rotation_mode="anchor")
    axes.set_xticks(np.arange(k + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=PALE, linewidth=min(0.6, cell * 2))
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="true")

    count_size = min(10.0, 72 * cell * 0.5, 72 * cell * 0.85 / (0.62 * len(str(confusion.max()))))
    if count_size >= 5:
        for i, j in np.ndindex(k, k):
            if confusion[i, j] or k <= 4:
                red, green, blue, _ = (_RIGHT_MAP if i == j else _WRONG_MAP)(norm(share[i, j]))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                axes.text(j, i, str(confusion[i, j]), ha="center", va="center", fontsize=count_size, color="white" if dark else INK)

    recall = _place(figure, left + side + 0.15, top, recall_in, side)
    recall.barh(np.arange(k), right / np.maximum(totals, 1), height=0.8, color=BLUE, alpha=0.3)
    recall.set(xlim=(0, 1), ylim=(k - 0.5, -0.5), xticks=[0, 1], yticks=[], title="recall")
    recall.spines["left"].set_visible(False)
    if cell >= 0.2:
        for i in range(k):
            text = f"{right[i] / totals[i]:.3f}" if totals[i] else "none"
            recall.text(0.06, i, text, va="center", fontsize=min(8.0, 72 * cell * 0.4), color=INK)

    bar_axes = _place(figure, left + side + recall_in + 0.45, top, 0.12, min(side, 3))
    bar = figure.colorbar(errors, cax=bar_axes, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1], format=_PLAIN, label="share of the true class")
    bar.outline.set_visible(False)
    bar_axes.set_title("errors")
    n = int(totals.sum())
    summary = f"accuracy {right.sum() / max(n, 1):.4f}, {n - right.sum():,} errors in {n:,} images"
    figure.text(0.1 / wide, 1 - (heading_in + 0.1) / figure.get_figheight(), summary, color=GREY, va="center")
    return figure


@matplotlib.rc_context(STYLE)
def curves(
    epochs: Sequence[int],
    train_loss: Sequence[float],
    val_loss: Sequence[float],
    train_accuracy: Sequence[float],
    val_accuracy: Sequence[float],
    best_epoch: int,
    title: str,
) -> Figure:
    """Return loss (log axis) and accuracy over the epochs, with the epoch that was kept marked in both.

    Values that are not finite leave a gap and a cross on the axis at their epoch.

    Args:
        epochs: E numbers from 1.
        train_loss: E values, nats per image.
        val_loss: the same of the validation split.
        train_accuracy: E fractions 0..1.
        val_accuracy: the same of the validation split.
        best_epoch: the epoch that was kept; one that is not in `epochs` (a run that diverged at once) is not marked.
        title: shown above, wrapped.

    Raises:
        ShapeError: the sequences differ in length or are empty.
    """
    series = [np.asarray(values, dtype=float) for values in (epochs, train_loss, val_loss, train_accuracy, val_accuracy)]
    if not epochs or len({values.shape for values in series}) > 1:
        raise ShapeError(f"curves of lengths {[len(values) for values in series]}, expected one value per epoch, at least one epoch")
    x = series[0]
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, train, val in ((left, *series[1:3]), (right, *series[3:5])):
        for values, colour, name, marker in ((train, TRAIN, "train", "s"), (val, VAL, "validation", "o")):
            values = np.where(np.isfinite(values), values, np.nan)
            size = np.clip(30 / len(x), 1.5, 4.5)
            axes.plot(x, values, color=colour, label=name, marker=marker, markersize=size, clip_on=False)
            lost = x[np.isnan(values)]
            if len(lost):
                at_axis = axes.get_xaxis_transform()
                axes.plot(lost, np.zeros(len(lost)), "x", color=WRONG, label="not finite", transform=at_axis, clip_on=False)
        if best_epoch in epochs:
            best = val[list(epochs).index(best_epoch)]
            axes.axvline(best_epoch, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            axes.plot([best_epoch], [best], "o", mfc="none", mec=VAL, mew=1.4, markersize=9, label="_best", clip_on=False)
            axes.set_title(f"best epoch {best_epoch}: validation {'loss' if axes is left else 'accuracy'} {best:.4f}")
        axes.set(xlabel="epoch", xlim=(x.min() - 0.5, x.max() + 0.5) if len(x) < 3 else (min(x.min(), 1) - 0.02 * len(x), x.max()))
        epoch_axis(axes)
        axes.grid(axis="y")
    left.set_ylabel("loss (nats per image)")
    log_axis(left, np.concatenate(series[1:3]))
    right.set_ylabel("accuracy")
    right.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    seen = np.concatenate(series[3:5])
    seen = seen[np.isfinite(seen)] if np.isfinite(seen).any() else np.array([0.0, 1.0])
    margin = max(0.05 * float(np.ptp(seen)), 0.002)
    right.set_ylim(max(0.0, float(seen.min()) - margin), min(1.0, float(seen.max()) + margin))
    named = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))  # one "not finite" for both series
    left.legend(named.values(), named.keys())
    _title(figure, _wrapped(title, figure.get_figwidth())[0])
    return figure


@matplotlib.rc_context(STYLE)
def warps(images: Array, warped: Array, points: Array, labels: Sequence[str], predicted: Sequence[str] | None, title: str) -> Figure:
    """Return one column per image: where the network looks (its sampling grid on the input), and what it then sees.

    The outline joins the outermost sampling points; a dot marks the output's top left corner, so a turn or a flip can
    be read. All columns share one scale; what lies beyond [-2, 2] is cut.

    Convention: points are (x, y), x right, y down, and [-1, 1] spans the image's edges: pixel index (x + 1) W / 2 - 1/2.

    Args:
        images: (n, C, H, W) 0..1, C = 3 is RGB, any other C is shown as its mean.
        warped: (n, C, h, w) 0..1.
        points: (n, h, w, 2) source points.
        labels: n true class names.
        predicted: n predicted class names, wrong ones in vermilion; None draws none.
        title: shown above, wrapped.

    Raises:
        ShapeError: the arrays do not belong together.
    """
    n = len(images)
    lengths = {n, len(labels), n if predicted is None else len(predicted)}
    if images.ndim != 4 or warped.ndim != 4 or points.shape != (n, *warped.shape[2:], 2) or len(warped) != n or lengths != {n} or n == 0:
        raise ShapeError(
            f"images {images.shape}, warped {warped.shape}, points {points.shape}, {len(labels)} labels: "
            "expected (n, C, H, W), (n, C, h, w), (n, h, w, 2), n labels, n > 0"
        )
    size = np.array(images.shape[:1:-1])  # (W, H)
    pixels = ((np.where(np.isfinite(points), points, np.nan) + 1) * size - 1) / 2  # (n, h, w, 2) pixel indices
    near = points[np.isfinite(points).all(axis=-1)].reshape(-1, 2).clip(-2, 2)
    low = np.minimum(near.min(axis=0, initial=-1), -1) - 0.06
    high = np.maximum(near.max(axis=0, initial=1), 1) + 0.06
    (x0, y0), (x1, y1) = ((low + 1) * size - 1) / 2, ((high + 1) * size - 1) / 2

    width = 1.35 if n > 3 else 1.9  # inches
    heights = width * (y1 - y0) / (x1 - x0), width * warped.shape[2] / warped.shape[3]
    left, step = 0.8, width + 0.08
    wide = max(4.2, left + n * step + 0.05)
    heading, heading_in = _wrapped(title, wide)
    top = heading_in + 0.3
    under = top + heights[0] + 0.08
    bottom = under + heights[1]
    figure = Figure(figsize=(wide, bottom + (0.35 if predicted is not None else 0.12)))
    _title(figure, heading)
    for i in range(n):
        above, below = _place(figure, left + i * step, top, width, heights[0]), _place(figure, left + i * step, under, width, heights[1])
        _picture(above, images[i])
        above.set(facecolor=PALE, xlim=(x0, x1), ylim=(y1, y0))
        above.set_title(_short(labels[i], 16), loc="center", color=INK)
        _mesh(above, pixels[i])
        _picture(below, warped[i])
        if predicted is not None:
            wrong = predicted[i] != labels[i]
            colour = WRONG if wrong else INK
            name = _short(predicted[i], 16)
            below.set_xlabel(f"✗ {name}" if wrong else name, color=colour, weight="bold" if wrong else "normal")
            below.spines[:].set(visible=wrong, color=colour, linewidth=2)
    rows = [("true", top - 0.12), ("input, grid", top + heights[0] / 2), ("warped", under + heights[1] / 2), ("predicted", bottom + 0.12)]
    for text, down in rows[: 3 if predicted is None else 4]:
        figure.text((left - 0.08) / figure.get_figwidth(), 1 - down / figure.get_figheight(), text, color=GREY, ha="right", va="center")
    return figure


def warp_strip(images: Array, warped: Array) -> npt.NDArray[np.uint8]:
    """Return a montage, inputs above and warped images beneath, quick enough to be made at each epoch.

    Each pixel becomes a square of whole pixels, so that a cell is about 84 pixels wide; separators are mid-grey, which
    shows on dark and on light pages.

    Args:
        images: (n, C, H, W) 0..1, C = 3 is RGB, any other C is shown as its mean.
        warped: (n, C, h, w) 0..1.

    Returns:
        (H', W', 3) RGB.

    Raises:
        ShapeError: the arrays do not belong together.
    """
    if images.ndim != 4 or warped.ndim != 4 or len(images) != len(warped) or len(images) == 0:
        raise ShapeError(f"images {images.shape}, warped {warped.shape}: expected (n, C, H, W) and (n, C, h, w), n > 0")
    rows = [_enlarged(images), _enlarged(warped)]  # (n, height, width, 3) each
    cell = max(row.shape[2] for row in rows)
    n, gap = len(images), _STRIP_GAP
    strip = np.full((sum(row.shape[1] + gap for row in rows) + gap, n * (cell + gap) + gap, 3), _STRIP_GREY, np.uint8)
    top = gap
    for row in rows:
        height, width = row.shape[1:3]
        for i, picture in enumerate(row):
            left = gap + i * (cell + gap) + (cell - width) // 2
            strip[top : top + height, left : left + width] = picture
        top += height + gap
    return strip


@matplotlib.rc_context(STYLE)
def reliability(bin_confidence: Array, bin_accuracy: Array, bin_count: Array, ece: float, title: str) -> Figure:
    """Return the calibration diagram: accuracy against confidence in bins of equal width, and how full the bins are.

    Whiskers are Wilson's 95 % intervals, so a bin of three images is not read as a miscalibration.

    Args:
        bin_confidence: (M,) mean confidence in each bin, 0..1; anything where the bin is empty.
        bin_accuracy: (M,) share of right answers in each bin, 0..1.
        bin_count: (M,) images in each bin; bin m holds confidences from m / M to (m + 1) / M.
        ece: expected calibration error, 0..1.
        title: shown above, wrapped.

    Raises:
        ShapeError: the three are not one value per bin.
    """
    m = len(bin_count)
    if not bin_confidence.shape == bin_accuracy.shape == bin_count.shape == (m,) or m == 0:
        raise ShapeError(f"bins have shapes {bin_confidence.shape}, {bin_accuracy.shape}, {bin_count.shape}, expected one (M,), M > 0")
    full = bin_count > 0
    centre, confidence, accuracy, count = ((np.arange(m) + 0.5) / m)[full], bin_confidence[full], bin_accuracy[full], bin_count[full]
    figure = Figure(figsize=(4.2, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 0.92 / m
    above.bar(centre, accuracy, width, color=BLUE, alpha=0.75, label="accuracy")
    above.bar(centre, confidence - accuracy, width, accuracy, color=VERMILION, alpha=0.35, label="gap to the confidence")
    above.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
    z2 = 1.96**2
    middle = (accuracy + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * (accuracy * (1 - accuracy) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    above.vlines(centre, middle - half, middle + half, color=INK, linewidth=1, label="95 % interval")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    above.set_title(f"expected calibration error {ece:.4f}, {int(bin_count.sum()):,} images")
    figure.legend(loc="outside lower center", ncols=2)
    below.bar(centre, count, width, color=GREY)
    below.set(yscale="log", ylim=(0.7, 2 * max(1, int(bin_count.max()))), xlabel="confidence", ylabel="images")
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    below.yaxis.set_minor_locator(NullLocator())
    figure.align_ylabels()
    _title(figure, _wrapped(title, figure.get_figwidth())[0])
    return figure


def _short(name: str, longest: int) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _wrapped(title: str, wide: float) -> tuple[str, float]:
    """Return the title in lines that fit `wide` inches, and how many inches from the top they take."""
    text = textwrap.fill(title, int(wide * 72 / (11 * 0.66)))
    return text, 0.15 + 0.19 * len(text.splitlines())


def _title(figure: Figure, text: str) -> None:
    wide, high = figure.get_size_inches()
    placed = {} if figure.get_layout_engine() else {"y": 1 - 0.1 / high}  # a y of our own would switch the engine's off
    figure.suptitle(text, x=0.1 / wide, ha="left", va="top", **placed)


def _place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes by inches from the left and from the top of a figure that has its final size."""
    wide, high = figure.get_size_inches()
    return figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))


def epoch_axis(axes: Axes) -> None:
    """Make the x axis one of whole epochs."""
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def log_axis(axes: Axes, values: Array) -> None:
    """Make the y axis logarithmic around the positive finite values, with ticks that read as plain numbers."""
    values = values[np.isfinite(values) & (values > 0)]
    low, high = (values.min(), values.max()) if len(values) else (0.1, 1.0)
    pad = max((high / low) ** 0.05, 1.1)
    axes.set_ylim(low / pad, high * pad)  # before the scale, which warns when it has to find limits among zeros
    axes.set_yscale("log", nonpositive="mask")
    # Ticks at 1, 2, 5 would be one or none where the range is narrow, and a narrow range is as good as linear.
    subs = (1,) if high / low > 200 else (1, 2, 5) if high / low > 5 else (1, 1.5, 2, 3, 4, 6)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12) if high / low > 2 else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_PLAIN)


def _rgb(images: Array) -> Array:
    """Return (..., C, H, W) as (..., H, W, 3) in 0..1; what is not a number is black."""
    images = np.nan_to_num(images, nan=0.0).clip(0, 1)
    if images.shape[-3] != 3:
        images = np.repeat(images.mean(axis=-3, keepdims=True), 3, axis=-3)
    return np.moveaxis(images, -3, -1)


def _enlarged(images: Array) -> npt.NDArray[np.uint8]:
    factor = max(1, round(_STRIP_CELL / max(images.shape[2:])))
    small = (_rgb(images) * 255 + 0.5).astype(np.uint8)  # (n, H, W, 3)
    return small.repeat(factor, axis=1).repeat(factor, axis=2)


def _picture(axes: Axes, image: Array) -> None:
    axes.imshow(_rgb(image), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _mesh(axes: Axes, pixels: Array) -> None:
    """Draw the outline of a grid, at most seven lines each way within it, and a dot on its first corner.

    Args:
        axes: where to draw.
        pixels: (h, w, 2) pixel indices (x, y).
    """
    rows, columns = (np.unique(np.linspace(0, length - 1, min(length, 9)).round().astype(int))[1:-1] for length in pixels.shape[:2])
    inner = [*pixels[rows], *pixels[:, columns].swapaxes(0, 1)]
    outline = np.concatenate([pixels[0], pixels[:, -1], pixels[-1, ::-1], pixels[::-1, 0]])
    axes.add_collection(LineCollection(inner, colors=ORANGE, linewidths=0.6, alpha=0.75), autolim=False)
    halo = [Stroke(linewidth=3, foreground="black", alpha=0.6), Normal()]  # keeps orange apart from a bright image
    axes.plot(*outline.T, color=ORANGE, linewidth=1.6, label="outline", path_effects=halo, scalex=False, scaley=False)
    axes.plot(*outline[0], "o", color=ORANGE, mec="black", mew=0.6, markersize=4.5, scalex=False, scaley=False)


@matplotlib.rc_context(STYLE)
def warps_by_arm(images: Array, arms: Mapping[str, tuple[Array, Array | None]], title: str, columns: Sequence[str] = ()) -> Figure:
    """Return the same images under several networks: a row each of where it looks, and a row of what it then sees.

    Args:
        images: (n, C, H, W) 0..1.
        arms: by name, warped images (n, C, h, w) 0..1 and source points (n, h, w, 2), None without a transformer.
        title: shown above, wrapped.
        columns: what stands above each image, or nothing.

    Raises:
        ShapeError: the arrays do not belong together.
    """
    n, size = len(images), np.array(images.shape[:1:-1])
    for name, (warped, points) in arms.items():
        if images.ndim != 4 or len(warped) != n or (points is not None and points.shape != (n, *warped.shape[2:], 2)):
            raise ShapeError(f"{name}: warped {warped.shape} and its points do not fit images {images.shape}")
    cell, left, gap = 0.85, 1.3, 0.05
    rows = sum(1 if points is None else 2 for _, points in arms.values())
    heading, top = _wrapped(title, left + n * (cell + gap))
    top += 0.3 if columns else 0.1
    figure = Figure(figsize=(left + n * (cell + gap) + 0.05, top + rows * (cell + gap) + gap * 3 * len(arms)))
    _title(figure, heading)
    for i, text in enumerate(columns):
        at = (left + i * (cell + gap) + cell / 2) / figure.get_figwidth(), 1 - (top - 0.12) / figure.get_figheight()
        figure.text(*at, text, color=GREY, ha="center", va="center")
    low, high = -0.3 * size - 0.5, 1.3 * size - 0.5
    for name, (warped, points) in arms.items():
        for what in ("sees",) if points is None else ("looks", "sees"):
            words = f"{name}" if what == "looks" or points is None else ""
            under = {"looks": "input, grid", "sees": "input" if points is None else "warped"}[what]
            figure.text(
                0.1 / figure.get_figwidth(), 1 - (top + 0.3) / figure.get_figheight(), _short(words, 16), weight="bold", va="center"
            )
            figure.text(0.1 / figure.get_figwidth(), 1 - (top + 0.5) / figure.get_figheight(), under, color=GREY, va="center")
            for i in range(n):
                axes = _place(figure, left + i * (cell + gap), top, cell, cell)
                _picture(axes, images[i] if what == "looks" else warped[i])
                if what == "looks" and points is not None:
                    axes.set(facecolor=PALE, xlim=(low[0], high[0]), ylim=(high[1], low[1]))
                    _mesh(axes, ((np.nan_to_num(points[i], nan=9.0).clip(-9, 9) + 1) * size - 1) / 2)
            top += cell + gap
        top += 3 * gap
    return figure


@matplotlib.rc_context(STYLE)
def robustness(curves: dict[str, tuple[str, Array]], title: str) -> Figure:
    """Return accuracy against what was done to the images, a panel each, with 95 % intervals.

    Args:
        curves: by what was done, its unit and rows (value, accuracy, low, high), accuracies 0..1.
        title: shown above, wrapped.
    """
    wide = 3.0 * len(curves)
    heading, heading_in = _wrapped(title, wide)
    figure = Figure(figsize=(wide, 2.4 + heading_in), layout="constrained")
    _title(figure, heading)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (name, (unit, rows)) in zip(panels, curves.items(), strict=True):
        value, accuracy, low, high = rows.T
        axes.fill_between(value, low, high, color=BLUE, alpha=0.2, linewidth=0)
        axes.plot(value, accuracy, color=BLUE, marker="o", markersize=3)
        axes.set(xlabel=f"{name}, {unit}", ylim=(0, 1.02))
        axes.grid(axis="y")
    panels[0].set_ylabel("accuracy")
    return figure
