"""The pictures of a comparison, drawn from plain numbers; an arm has one colour in all of them, the baseline is grey."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stn_pipeline.comparing.answer import Answer
from stn_pipeline.comparing.arms import Interval
from stn_pipeline.comparing.measures import LOSS, Measure
from stn_pipeline.comparing.paired import Paired
from stn_pipeline.figures import BLUE, GREY, INK, ORANGE, PALE, VERMILION, epoch_axis, log_axis, sheet, to_png

COLOURS = (BLUE, VERMILION, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#000000")
BASELINE = "#555555"
BETTER, WORSE, EQUAL = "#1B7837", "#762A83", "#AAAAAA"  # no arm's colours
DIAGNOSTICS = {
    "warp/shift": "mean |theta − identity|",
    "warp/outside": "share of points outside the image",
    "warp/log_det": "mean log change of area",
}
HISTORIES = ("train/loss", "val/loss", *DIAGNOSTICS)
MAX_CLASSES = 30  # of which confusion matrices are drawn side by side

Histories = Mapping[str, Mapping[int, Mapping[str, Mapping[int, float]]]]  # by arm, seed and metric: value by epoch


def colours(answer: Answer) -> dict[str, str]:
    """Return a colour an arm."""
    return {answer.baseline: BASELINE} | {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(answer.arms[1:])}


class _Row(NamedTuple):
    """A line of the forest: what it is called, its numbers, by bootstrap too where it is of all seeds, and what is claimed."""

    name: str
    colour: str
    result: Paired
    bootstrap: Interval | None
    claim: float | None


def _rows(answer: Answer, measure: Measure) -> list[_Row]:
    rows = []
    for contrast in answer.contrasts[measure]:
        colour, claim = colours(answer)[contrast.arm], answer.claims.get(contrast.arm) if measure is LOSS else None
        bootstrap = contrast.bootstrap_relative if measure.unit.relative else contrast.bootstrap
        if contrast.t.n > 1:
            rows.append(_Row(f"{contrast.arm} v {answer.baseline} (n={contrast.t.n})", colour, contrast.t, bootstrap, claim))
        if contrast.without and contrast.without.n > 1:
            rows.append(_Row(f"without collapsed seeds (n={contrast.without.n})", colour, contrast.without, None, claim))
    return rows


def forest(answers: Sequence[Answer], title: str) -> bytes | None:
    """Return every difference with its interval: thick by t (Fieller's for shares), thin by bootstrap, a cross what is claimed."""
    measures = answers[0].measures[:2]
    n_rows = sum(len(_rows(answer, measures[0])) + 1 for answer in answers)
    if not any(_rows(answer, measures[0]) for answer in answers):
        return None
    with sheet(9.2, 1.5 + 0.36 * n_rows, title) as figure:
        panels = figure.subplots(1, len(measures), sharey=True)
        margin = next((verdict.margin for verdict in answers[0].verdicts.values()), None)
        for axes, measure in zip(panels, measures, strict=True):
            placed: list[tuple[float, _Row]] = []
            y, marks = 0.0, []
            for answer in answers:
                marks.append((y, answer.title))
                y += 1
                for row in _rows(answer, measure):
                    marks.append((y, row.name))
                    placed.append((y, row))
                    y += 1
            _limits(axes, [row for _, row in placed], measure)
            for at, row in placed:
                _interval(axes, row, at, measure)
            if margin is not None and measure is measures[0]:
                half = margin * (100 if measure.unit.relative else measure.unit.scale)
                axes.axvspan(max(-half, axes.get_xlim()[0]), min(half, axes.get_xlim()[1]), color=PALE, zorder=0, linewidth=0)
            axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            axes.set_yticks([at for at, _ in marks], [text for _, text in marks])
            for label in axes.get_yticklabels():
                label.set_fontweight("bold" if label.get_text() in {answer.title for answer in answers} else "normal")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_ylim(y - 0.3, -0.7)
            axes.grid(axis="x")
            unit = "% of the baseline" if measure.unit.relative else measure.unit.name
            better = "left is better" if measure.smaller_is_better else "right is better"
            axes.set_xlabel(f"{measure.words}: difference in {unit} ({better})")
        named: dict[str, dict[str, Any]] = {"95 % interval by t": {"linewidth": 3}, "by bootstrap": {"linewidth": 1}}
        if any(answer.claims for answer in answers):
            named["claimed"] = {"marker": "x", "linestyle": "none"}
        if margin is not None:
            panels[0].axvspan(0, 0, color=PALE, label="within the margin")
        for name, style in named.items():
            panels[0].plot([], [], color=GREY, label=name, **style)
        figure.legend(loc="outside lower center", ncols=4)
        return to_png(figure)


def _numbers(row: _Row, measure: Measure) -> tuple[float, float, float]:
    """Return the middle and the ends of an interval in the units of the picture; an unbounded one reaches to both infinities."""
    result = row.result
    if not measure.unit.relative:
        return tuple(measure.unit.scale * value for value in (result.difference, result.low, result.high))  # type: ignore[return-value]
    if math.isnan(result.relative_low):
        return 100 * result.relative, -math.inf, math.inf
    return 100 * result.relative, 100 * result.relative_low, 100 * result.relative_high


def _limits(axes: Any, rows: Sequence[_Row], measure: Measure) -> None:
    """Set the x axis so that one arm with collapsed seeds does not flatten all others; what lies beyond ends in an arrow."""
    ends = [end for row in rows for end in _numbers(row, measure) if math.isfinite(end)] + [0.0]
    ends += [100 * row.claim for row in rows if row.claim is not None]
    far, near = max(map(abs, ends)), float(np.median(np.abs(ends)))
    edge = far if far < 12 * near else 6 * near
    margin = 0.08 * edge or 1.0
    axes.set_xlim(max(min(ends), -edge) - margin, min(max(ends), edge) + margin)


def _interval(axes: Any, row: _Row, y: float, measure: Measure) -> None:
    middle, low, high = _numbers(row, measure)
    left, right = axes.get_xlim()
    thick = {"color": row.colour, "linewidth": 3, "alpha": 0.85 if row.bootstrap else 0.5, "solid_capstyle": "butt"}
    axes.plot([max(low, left), min(high, right)], [y, y], **thick)
    for is_beyond, edge, arrow in ((low < left, left, "<"), (high > right, right, ">")):
        if is_beyond:
            axes.plot([edge], [y], arrow, color=row.colour, markersize=6, clip_on=False)
    if row.bootstrap is not None:
        scale = 100 if measure.unit.relative else measure.unit.scale
        ends = np.clip([scale * row.bootstrap.low, scale * row.bootstrap.high], left, right)
        axes.plot(ends, [y + 0.22, y + 0.22], color=row.colour, linewidth=1)
    if left < middle < right:
        axes.plot([middle], [y], "o", color=row.colour, mec=row.colour, mfc=row.colour if row.bootstrap else "white", markersize=6)
    if row.claim is not None:
        axes.plot([100 * row.claim], [y], "x", color=INK, markersize=7, mew=1.6)


def losses(answer: Answer, histories: Histories, title: str) -> bytes | None:
    """Return the loss per epoch of each arm, mean ± sd over the seeds, linear and log; collapsed seeds as thin lines of their own."""
    if not any(seed.get("train/loss") for arm in histories.values() for seed in arm.values()):
        return None
    with sheet(9.2, 6.4, title) as figure:
        grid = figure.subplots(2, 2, sharex=True)
        n_collapsed = 0
        for row, metric in zip(grid, ("train/loss", "val/loss"), strict=True):
            seen: list[float] = []
            for arm, colour in colours(answer).items():
                sound, collapsed = _lines(answer, histories, arm, metric)
                n_collapsed += len(collapsed)
                for axes in row:
                    for line in collapsed:
                        axes.plot(*_xy(line), color=colour, linewidth=0.8, linestyle=(0, (1, 1)), alpha=0.8)
                    if sound:
                        epochs, mean, sd = _mean(sound)
                        axes.plot(
                            epochs, mean, color=colour, label=f"{arm} (n={len(sound)})", marker="o", markersize=3 if len(epochs) < 30 else 0
                        )
                        axes.fill_between(epochs, np.maximum(mean - sd, 0.02 * mean), mean + sd, color=colour, alpha=0.15, linewidth=0)
                        seen += [*(mean + sd), *np.maximum(mean - sd, 0.3 * mean)]
            for axes in row:
                axes.grid(axis="y")
                axes.set_ylabel(f"{'training' if metric == 'train/loss' else 'validation'} loss (nats per image)")
            if seen:
                row[0].set_ylim(0, 1.05 * max(seen))
                log_axis(row[1], np.array(seen))
        for axes in grid[1]:
            axes.set_xlabel("epoch")
            epoch_axis(axes)
        grid[0][0].set_title("linear")
        grid[0][1].set_title(
            "log" + (f"; {n_collapsed // 2} collapsed trainings, dotted or beyond the axes, are not in the means" if n_collapsed else "")
        )
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        return to_png(figure)


def _lines(answer: Answer, histories: Histories, arm: str, metric: str) -> tuple[list[Mapping[int, float]], list[Mapping[int, float]]]:
    """Return the histories of an arm's sound trainings and of its collapsed ones."""
    found: tuple[list[Mapping[int, float]], list[Mapping[int, float]]] = ([], [])
    for seed, metrics in histories.get(arm, {}).items():
        if metrics.get(metric):
            found[answer.table[arm][seed].collapsed].append(metrics[metric])
    return found


def _xy(line: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return sorted(line), [line[epoch] for epoch in sorted(line)]


def _mean(lines: Sequence[Mapping[int, float]]) -> tuple[list[int], Any, Any]:
    """Return the epochs that all lines have, their mean and their sd there."""
    epochs = sorted(set.intersection(*(set(line) for line in lines)))
    values = np.array([[line[epoch] for epoch in epochs] for line in lines])
    return epochs, values.mean(axis=0), values.std(axis=0, ddof=1) if len(lines) > 1 else np.zeros(len(epochs))


def diagnostics(answer: Answer, histories: Histories, title: str) -> bytes | None:
    """Return what the localisers do, epoch by epoch: a thin line a seed, the mean of the sound ones over it."""
    arms = [arm for arm in answer.arms if any(seed.get("warp/shift") for seed in histories.get(arm, {}).values())]
    if not arms:
        return None
    with sheet(9.2, 3.4, title) as figure:
        for axes, (metric, words) in zip(figure.subplots(1, 3), DIAGNOSTICS.items(), strict=True):
            seen: list[float] = []
            for arm in arms:
                colour = colours(answer)[arm]
                sound, collapsed = _lines(answer, histories, arm, metric)
                for line in sound:
                    seen += line.values()
                    axes.plot(*_xy(line), color=colour, linewidth=0.6, alpha=0.35)
                for line in collapsed:
                    axes.plot(*_xy(line), color=colour, linewidth=0.9, linestyle=(0, (1, 1)))
                if sound:
                    epochs, mean, _ = _mean(sound)
                    axes.plot(epochs, mean, color=colour, linewidth=2.2, label=arm)
            axes.set(title=words, xlabel="epoch")
            axes.grid(axis="y")
            epoch_axis(axes)
            if seen and metric != "warp/outside":  # a collapsed localiser is a hundred times as far out
                margin = 0.1 * (max(seen) - min(seen)) or 0.1
                axes.set_ylim(min(seen) - margin, max(seen) + margin)
            elif metric == "warp/outside":
                axes.set_ylim(0, max(0.05, min(1.04, axes.get_ylim()[1])))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        return to_png(figure)


def seeds(answer: Answer, title: str) -> bytes | None:
    """Return a line a seed from the baseline to each arm, coloured by which is better: how often a single pair would mislead."""
    arms = [arm for arm in answer.arms[1:] if answer.of(arm)]
    if not arms:
        return None
    with sheet(max(4.5, 1.2 + 2.0 * len(arms)), 6.0, title) as figure:
        grid = figure.subplots(2, len(arms), sharey="row", squeeze=False)
        for row, measure in zip(grid, answer.measures[:2], strict=True):
            base = answer.values(answer.baseline, measure)
            for axes, arm in zip(row, arms, strict=True):
                own = answer.values(arm, measure)
                shared = sorted(base.keys() & own.keys())
                gains = {seed: (base[seed] - own[seed]) * (1 if measure.smaller_is_better else -1) for seed in shared}
                for seed, gain in gains.items():
                    colour = BETTER if gain > 0 else WORSE if gain < 0 else EQUAL
                    axes.plot([0, 1], [base[seed], own[seed]], color=colour, marker="o", markersize=3.5, linewidth=1)
                axes.set_xticks([0, 1], [answer.baseline, arm])
                axes.set_xlim(-0.25, 1.25)
                n_equal = sum(not gain for gain in gains.values())
                equal = f", equal in {n_equal}" if n_equal else ""
                axes.set_title(f"better in {sum(gain > 0 for gain in gains.values())} of {len(shared)}{equal}")
                axes.grid(axis="y")
            if measure is LOSS:
                log_axis(row[0], np.array([value for arm in (answer.baseline, *arms) for value in answer.values(arm, measure).values()]))
            row[0].set_ylabel(measure.words + (f" ({measure.unit.name})" if measure is LOSS else ""))
        for name, colour in (("better", BETTER), ("worse", WORSE), ("equal", EQUAL)):
            grid[0][0].plot([], [], color=colour, label=f"the arm is {name}")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return to_png(figure)


def confusions(matrices: Mapping[str, tuple[Any, Sequence[str], int]], title: str) -> bytes | None:
    """Return the confusion matrices of the arms side by side, each summed over its seeds; colour is the share of the true class.

    matrices: by arm, counts (K, K) with rows true, class names, and how many seeds are in them.
    """
    shown = {arm: found for arm, found in matrices.items() if len(found[1]) <= MAX_CLASSES}
    if not shown:
        return None
    with sheet(0.6 + 2.9 * len(shown), 3.7, title) as figure:
        for axes, (arm, (counts, classes, n)) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            errors = np.where(np.eye(len(share), dtype=bool), np.nan, 100 * share)
            picture = axes.imshow(errors, cmap="OrRd", vmin=0, vmax=max(1.0, _worst(shown)))
            axes.set_facecolor(PALE)
            ticks = range(len(classes)) if len(classes) <= 12 else range(0, len(classes), 5)
            axes.set_xticks(ticks, [str(classes[i])[:10] for i in ticks], rotation=90 if max(map(len, classes)) > 2 else 0)
            axes.set_yticks(ticks, [str(classes[i])[:10] for i in ticks])
            axes.set_title(f"{arm}: {100 * (1 - np.trace(counts) / counts.sum()):.2f} % wrong, {n} seeds")
            axes.set_xlabel("predicted")
        figure.axes[0].set_ylabel("true")
        figure.colorbar(picture, ax=figure.axes, shrink=0.75, label="% of the true class")
        return to_png(figure)


def _worst(matrices: Mapping[str, tuple[Any, Sequence[str], int]]) -> float:
    """Return the largest share of errors in a cell, in %, collapsed arms apart."""
    worst = []
    for counts, _, _ in matrices.values():
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        worst.append(float((100 * (share - np.diag(np.diag(share)))).max()))
    return float(np.median(worst)) * 1.5
