"""How figures look: colours, type, titles in lines that fit, axes placed by inches; and a figure as a PNG file."""

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

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
PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")


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
        put_title(figure, wrapped(title, width)[0])
        yield figure


def shortened(name: str, longest: int) -> str:
    """Return a name, cut where it is longer than that."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def wrapped(title: str, wide: float) -> tuple[str, float]:
    """Return the title in lines that fit `wide` inches, and how many inches from the top they take."""
    text = textwrap.fill(title, int(wide * 72 / (11 * 0.66)))
    return text, 0.15 + 0.19 * len(text.splitlines())


def put_title(figure: Figure, text: str) -> None:
    """Put a title at the top left."""
    wide, high = figure.get_size_inches()
    placed = {} if figure.get_layout_engine() else {"y": 1 - 0.1 / high}  # a y of our own would switch the engine's off
    figure.suptitle(text, x=0.1 / wide, ha="left", va="top", **placed)


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
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
    axes.yaxis.set_major_formatter(PLAIN_NUMBERS)
