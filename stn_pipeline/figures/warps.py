"""Pictures of warps: where a network looks, and what it then sees."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from stn_pipeline.errors import ShapeError
from stn_pipeline.figures.style import GREY, INK, ORANGE, PALE, STYLE, WRONG, Array, place, put_title, shortened, wrapped

_STRIP_CELL, _STRIP_GAP, _STRIP_GREY = 84, 2, 128


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
    heading, heading_in = wrapped(title, wide)
    top = heading_in + 0.3
    under = top + heights[0] + 0.08
    bottom = under + heights[1]
    figure = Figure(figsize=(wide, bottom + (0.35 if predicted is not None else 0.12)))
    put_title(figure, heading)
    for i in range(n):
        above, below = place(figure, left + i * step, top, width, heights[0]), place(figure, left + i * step, under, width, heights[1])
        _picture(above, images[i])
        above.set(facecolor=PALE, xlim=(x0, x1), ylim=(y1, y0))
        above.set_title(shortened(labels[i], 16), loc="center", color=INK)
        _mesh(above, pixels[i])
        _picture(below, warped[i])
        if predicted is not None:
            wrong = predicted[i] != labels[i]
            colour = WRONG if wrong else INK
            name = shortened(predicted[i], 16)
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
    heading, top = wrapped(title, left + n * (cell + gap))
    top += 0.3 if columns else 0.1
    figure = Figure(figsize=(left + n * (cell + gap) + 0.05, top + rows * (cell + gap) + gap * 3 * len(arms)))
    put_title(figure, heading)
    for i, text in enumerate(columns):
        at = (left + i * (cell + gap) + cell / 2) / figure.get_figwidth(), 1 - (top - 0.12) / figure.get_figheight()
        figure.text(*at, text, color=GREY, ha="center", va="center")
    low, high = -0.3 * size - 0.5, 1.3 * size - 0.5
    for name, (warped, points) in arms.items():
        for what in ("sees",) if points is None else ("looks", "sees"):
            words = f"{name}" if what == "looks" or points is None else ""
            under = {"looks": "input, grid", "sees": "input" if points is None else "warped"}[what]
            figure.text(
                0.1 / figure.get_figwidth(), 1 - (top + 0.3) / figure.get_figheight(), shortened(words, 16), weight="bold", va="center"
            )
            figure.text(0.1 / figure.get_figwidth(), 1 - (top + 0.5) / figure.get_figheight(), under, color=GREY, va="center")
            for i in range(n):
                axes = place(figure, left + i * (cell + gap), top, cell, cell)
                _picture(axes, images[i] if what == "looks" else warped[i])
                if what == "looks" and points is not None:
                    axes.set(facecolor=PALE, xlim=(low[0], high[0]), ylim=(high[1], low[1]))
                    _mesh(axes, ((np.nan_to_num(points[i], nan=9.0).clip(-9, 9) + 1) * size - 1) / 2)
            top += cell + gap
        top += 3 * gap
    return figure


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
