"""The picture of a bench: whose epochs are how fast, and how the cost of an image grows."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from stn_pipeline.figures import BLUE, GREY, INK, ORANGE, log_axis, sheet, to_png

COLUMNS = 3
OURS: dict[str, Any] = {"color": BLUE, "marker": "o"}
PLAIN: dict[str, Any] = {"color": GREY, "marker": "s"}
OTHERS: dict[str, Any] = {"color": ORANGE, "marker": "^"}
STYLES = {"engine": OURS, "plain": PLAIN}


def picture(rows: Sequence[dict[str, Any]], growth: dict[str, dict[str, dict[str, list[float]]]], title: str) -> bytes:
    """Return the picture as PNG.

    rows: one a contender: its `name`, its `loop`, its `images_per_s` (a value a repeat).
    growth: by knob, by its value, by the contender's name: microseconds an image, a value a repeat.
    """
    deep = math.ceil(len(growth) / COLUMNS)
    bars_high, panels_high = 0.8 + 0.28 * len(rows), 0.4 + 2.3 * deep
    loops = {row["name"]: row["loop"] for row in rows}
    with sheet(9.0, bars_high + panels_high + 0.4, title) as figure:
        heights = [bars_high, panels_high] if growth else [bars_high]
        above, *below = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _bars(above.subplots(), rows)
        for part in below:
            axes = part.subplots(deep, COLUMNS, squeeze=False).ravel()
            for index, (knob, values) in enumerate(growth.items()):
                _growth(axes[index], knob, values, loops)
                axes[index].set_ylabel("" if index % COLUMNS else "µs an image")
            for axis in axes[len(growth) :]:
                axis.set_axis_off()
            part.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return to_png(figure)


def _spread(samples: Sequence[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Return the median of each sample, and how far below and above it the sample goes."""
    middles = [median(sample) for sample in samples]
    below = [middle - min(sample) for middle, sample in zip(middles, samples, strict=True)]
    above = [max(sample) - middle for middle, sample in zip(middles, samples, strict=True)]
    return middles, [below, above]


def _bars(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    middles, spread = _spread([[speed / 1000 for speed in row["images_per_s"]] for row in rows])
    colours = [STYLES.get(row["loop"], OTHERS)["color"] for row in rows]
    axis.barh(range(len(rows)), middles, xerr=spread, color=colours, height=0.66, error_kw={"linewidth": 1, "ecolor": INK})
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("thousand images a second, of all processes together: median, smallest and largest")
    for index, (middle, above) in enumerate(zip(middles, spread[1], strict=True)):
        axis.annotate(f"{middle:.1f}", (middle + above, index), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axis.margins(x=0.1)


def _growth(axis: Any, knob: str, values: dict[str, dict[str, list[float]]], loops: dict[str, str]) -> None:
    numeric = all(value.isdecimal() and int(value) > 0 for value in values)
    places = [float(value) if numeric else index for index, value in enumerate(values)]
    for name in next(iter(values.values())):
        middles, spread = _spread([values[value][name] for value in values])
        style = STYLES.get(loops.get(name, ""), OTHERS)
        axis.errorbar(places, middles, yerr=spread, label=name, markersize=4, linestyle="-" if numeric else "none", **style)
    axis.set_title(knob)
    log_axis(axis, np.array([sample for told in values.values() for sample in told.values()]))
    if numeric:
        axis.set_xscale("log")
    axis.set_xticks(places, list(values))
    axis.minorticks_off()
    axis.margins(x=0.12)
    axis.grid(axis="y")


def pools_picture(rows: Sequence[dict[str, Any]], trial_s: float, title: str) -> bytes:
    """Return the picture of trials an hour, and of what each costs beside its own length, by the number of workers, as PNG.

    rows: one a pool and number of workers: `place`, `workers`, `trials_per_hour` and `overhead_s` (a value a repeat).
    """
    styles = dict(zip(dict.fromkeys(row["place"] for row in rows), (OURS, OTHERS), strict=False))
    counts = sorted({row["workers"] for row in rows})
    with sheet(9.0, 3.4, title) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(counts, [3600 / trial_s * n for n in counts], color=GREY, linewidth=1, linestyle="--", label="no overhead")
        for place, style in styles.items():
            own = [row for row in rows if row["place"] == place]
            for axis, what in ((left, "trials_per_hour"), (right, "overhead_s")):
                middles, spread = _spread([row[what] for row in own])
                axis.errorbar([row["workers"] for row in own], middles, yerr=spread, label=place, markersize=4, **style)
        left.set_ylabel("trials an hour")
        right.set_ylabel("overhead, worker-seconds a trial")
        right.set_ylim(bottom=0)
        left.set_ylim(bottom=0)
        left.legend()
        for axis in (left, right):
            axis.set_xlabel("workers")
            axis.set_xticks(counts)
            axis.grid(axis="y")
        return to_png(figure)
