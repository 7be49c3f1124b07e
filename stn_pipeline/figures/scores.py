"""Pictures of scores: the confusion matrix, losses and accuracies by epoch, reliability, accuracy against what is done to images."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from stn_pipeline.errors import ShapeError
from stn_pipeline.figures.style import (
    BLUE,
    GREY,
    INK,
    PALE,
PLAIN_NUMBERS,
    STYLE,
    TRAIN,
    VAL,
    VERMILION,
    WRONG,
    Array,
    epoch_axis,
    log_axis,
    place,
    put_title,
    shortened,
    wrapped,
)  # fmt: skip

_RIGHT_MAP = LinearSegmentedColormap.from_list("right", ["#FFFFFF", "#8CC4E2", BLUE, "#00456C"])
_WRONG_MAP = LinearSegmentedColormap.from_list("wrong", ["#FFFFFF", "#F9BE92", VERMILION, "#702F00"])


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
    names = [shortened(name, 18) for name in classes]
    name_size = min(8.0, 72 * cell * 0.8) if k <= 110 else 6.0
    every = int(np.ceil(name_size * 1.1 / (72 * cell)))  # name each class where the rows are high enough to
    name_in = max(0.1, *(TextPath((0, 0), name, size=name_size).get_extents().width / 72 for name in names))
    angle = 0 if name_in < 0.9 * cell * every else 45 if k <= 20 else 90

    # In inches: a layout engine misplaces what stands beside axes of fixed aspect.
    side, recall_in = cell * k, min(max(0.5, 0.14 * cell * k), 1.2)
    left, below = name_in + 0.5, 0.55 + name_in * np.sin(np.radians(angle))
    wide = max(4.4, left + side + recall_in + 1.3)
    heading, heading_in = wrapped(title, wide)
    top = heading_in + 0.5
    figure = Figure(figsize=(wide, top + side + below))
    put_title(figure, heading)
    axes = place(figure, left, top, side, side)
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

    recall = place(figure, left + side + 0.15, top, recall_in, side)
    recall.barh(np.arange(k), right / np.maximum(totals, 1), height=0.8, color=BLUE, alpha=0.3)
    recall.set(xlim=(0, 1), ylim=(k - 0.5, -0.5), xticks=[0, 1], yticks=[], title="recall")
    recall.spines["left"].set_visible(False)
    if cell >= 0.2:
        for i in range(k):
            text = f"{right[i] / totals[i]:.3f}" if totals[i] else "none"
            recall.text(0.06, i, text, va="center", fontsize=min(8.0, 72 * cell * 0.4), color=INK)

    bar_axes = place(figure, left + side + recall_in + 0.45, top, 0.12, min(side, 3))
    bar = figure.colorbar(errors, cax=bar_axes, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1], format=PLAIN_NUMBERS, label="share of the true class")
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
    put_title(figure, wrapped(title, figure.get_figwidth())[0])
    return figure


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
    put_title(figure, wrapped(title, figure.get_figwidth())[0])
    return figure


@matplotlib.rc_context(STYLE)
def robustness(curves: dict[str, tuple[str, Array]], title: str) -> Figure:
    """Return accuracy against what was done to the images, a panel each, with 95 % intervals.

    Args:
        curves: by what was done, its unit and rows (value, accuracy, low, high), accuracies 0..1.
        title: shown above, wrapped.
    """
    wide = 3.0 * len(curves)
    heading, heading_in = wrapped(title, wide)
    figure = Figure(figsize=(wide, 2.4 + heading_in), layout="constrained")
    put_title(figure, heading)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (name, (unit, rows)) in zip(panels, curves.items(), strict=True):
        value, accuracy, low, high = rows.T
        axes.fill_between(value, low, high, color=BLUE, alpha=0.2, linewidth=0)
        axes.plot(value, accuracy, color=BLUE, marker="o", markersize=3)
        axes.set(xlabel=f"{name}, {unit}", ylim=(0, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 3, 4.5, 5, 10]))
        axes.grid(axis="y")
    panels[0].set_ylabel("accuracy")
    return figure
