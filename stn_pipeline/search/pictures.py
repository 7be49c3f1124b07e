"""The pictures of a search, drawn from its study: what was tried, what came of it, which knobs mattered.

Optuna's own matplotlib pictures leave out pruned and failed trials, let one collapsed run flatten all others, and switch pyplot's
style for the whole process: the numbers are Optuna's, the drawing is in the style of figures.py. A ring or a thick line is the
best finished trial, a diamond or a dashed line the default configuration (trial 0, or its last retry).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from stn_pipeline.config import TrainConfig, unit_of
from stn_pipeline.figures import BLUE, GREY, INK, ORANGE, VERMILION, sheet, to_png
from stn_pipeline.search.confirm import Confirmed

KINDS: dict[str, dict[str, Any]] = {  # of trials, from the back to the front
    "running": {"color": GREY, "marker": ">", "markersize": 4.5},
    "lost": {"color": GREY, "marker": "x", "markersize": 5.5},
    "failed": {"color": VERMILION, "marker": "x", "markersize": 5.5},
    "pruned": {"color": ORANGE, "marker": "v", "markersize": 4.5},
    "finished": {"color": BLUE, "marker": "o", "markersize": 5},
}
ORDER = list(KINDS)
BEST: dict[str, Any] = {"color": BLUE, "marker": "o", "mfc": "none", "mew": 1.6, "markersize": 11, "label": "best"}
DEFAULT: dict[str, Any] = {"color": INK, "marker": "D", "mfc": "none", "mew": 1.2, "markersize": 8, "label": "default"}
DASHED: dict[str, Any] = {"color": INK, "linewidth": 1.4, "linestyle": (0, (4, 3)), "zorder": 6, "label": "default"}
PROMISED: dict[str, Any] = {"color": ORANGE, "marker": "D", "mfc": "none", "mew": 1.4, "linestyle": "none", "label": "promised"}
FEWEST = 8  # trials from which importances are told: a quarter of them is two


def pictures(study: optuna.Study, objective: str, title: str) -> dict[str, bytes]:
    """Return the pictures of a study as PNG by file name; one that cannot be drawn yet is left out.

    Args:
        study: of one objective; may be running. Its trials report their best value so far each epoch, from step 1.
        objective: val/loss (nats per image) or val/accuracy (0..1).
        title: shown above each, wrapped.
    """
    search = _Search(study, objective)
    n, knobs, shares = len(search.trials), len(search.knobs), importances(study)
    rows = math.ceil(knobs / 3)
    plan: dict[str, tuple[bool, float, float, Callable[[Any], None]]] = {  # whether there is anything to draw, inches, how
        "history.png": (bool(search.finished), 8.4, 4.2, search.history),
        "importances.png": (bool(shares), 6.4, 1.5 + 0.32 * knobs, lambda figure: search.importances(figure, shares)),
        "parallel_coordinates.png": (bool(search.compared), 3 + 1.5 * knobs, 4.6, search.parallel_coordinates),
        "slices.png": (bool(search.compared), 1.2 + 2.9 * max(2, min(knobs, 3)), 1.4 + 2.6 * rows, search.slices),
        "intermediate_values.png": (bool(search.reported), 8.4, 4.8, search.intermediate_values),
        "timeline.png": (n > 0, 8.4, min(1.8 + 0.12 * n, 6.5), search.timeline),
    }
    drawn = {}
    for name, (ready, wide, high, draw) in plan.items():
        if ready:
            with sheet(wide, high, title) as figure:
                draw(figure)
                named = {text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
                if named:
                    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named))
                drawn[name] = to_png(figure)
    return drawn


def confirmation_picture(confirmed: Mapping[str, Confirmed], objective: str, title: str) -> bytes:
    """Return the confirmation as PNG: for each configuration its trial's promise, its fresh seeds and their mean, the best on top."""
    told = [value for one in confirmed.values() for value in (*one.done, *([] if one.promised is None else [one.promised]))]
    with sheet(8.4, 1.6 + 0.42 * len(confirmed), title) as figure:
        axes = figure.subplots()
        for row, one in enumerate(confirmed.values()):
            seeds: dict[str, Any] = {
                "color": BLUE,
                "marker": "o",
                "markersize": 4.5,
                "alpha": 0.6,
                "linestyle": "none",
                "label": "a fresh seed",
            }
            axes.plot(one.done, [row] * len(one.done), **seeds)
            if one.done:
                axes.plot([one.mean], [row], color=INK, marker="|", markersize=15, mew=2, linestyle="none", label="their mean")
            if one.promised is not None:
                axes.plot([one.promised], [row], **PROMISED)
            if one.n_lost:
                axes.annotate(f"{one.n_lost} lost", (1, row), xycoords=("axes fraction", "data"), ha="right", va="center", color=VERMILION)
        if objective.endswith("loss") and told and min(told) > 0:
            marks = _round_log(min(told), max(told))
            axes.set_xscale("log")
            axes.set_xticks(marks, [_text(mark) for mark in marks])
            axes.minorticks_off()
        axes.set_yticks(range(len(confirmed)), list(confirmed))
        axes.set(xlabel=objective + " (nats per image)" * objective.endswith("loss"), ylim=(len(confirmed) - 0.5, -0.5))
        axes.set_title("by the mean over fresh seeds, which chooses the winner: the best on top")
        axes.grid(axis="x")
        named = {text: line for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named))
        return to_png(figure)


def whole(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that have every parameter; the default configuration lacks those whose default is out of range."""
    names = {name for trial in trials for name in trial.params}
    return [trial for trial in trials if names and names == trial.params.keys()]


def importances(study: optuna.Study) -> dict[str, float]:
    """Return how much each parameter decides whether a trial is in the best quarter, summing to 1; nothing if too few tell.

    Pruned trials count, with their last value: among survivors alone a bad learning rate never shows. In 36 simulated sweeps
    (hyperband, 30 to 100 trials) the knob that mattered most came first in 32; by Optuna's default, which takes finished trials
    and the best tenth, in 8.
    """
    chosen = [
        trial for trial in whole(study.get_trials(deepcopy=False)) if _kind(trial) in ("finished", "pruned") and _is_finite(trial.value)
    ]
    if len(chosen) < FEWEST or len(chosen[0].params) < 2 or len({trial.value for trial in chosen}) < 2:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # with scikit-learn: a second

    copy = optuna.create_study(direction=study.direction)
    copy.add_trials([optuna.create_trial(value=trial.value, params=trial.params, distributions=trial.distributions) for trial in chosen])
    with warnings.catch_warnings(action="ignore"):
        return get_param_importances(copy, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25))


@dataclass(frozen=True)
class _Scale:
    """An axis: where a value stands, in units of its own from low to high; the values its ticks name; how far to spread equals."""

    label: str
    place: Callable[[Any], float]
    low: float
    high: float
    marks: Sequence[Any]
    spread: float = 0.0

    def of(self, trial: FrozenTrial, name: str) -> float:
        # The golden section's multiples are even at any number of trials, and the same at each drawing.
        return self.place(trial.params[name]) + self.spread * (trial.number * 0.618 % 1 - 0.5)

    def ticks(self) -> tuple[list[float], list[str]]:
        return [self.place(mark) for mark in self.marks], [_text(mark) for mark in self.marks]


def _of_parameter(name: str, trials: Sequence[FrozenTrial]) -> _Scale:
    """Return a scale over the searched range, or the choices, of a parameter."""
    spaces: list[Any] = [trial.distributions[name] for trial in trials]
    unit = unit_of(TrainConfig.model_fields[name]) if name in TrainConfig.model_fields else ""
    label = f"{name} ({unit})" if unit else name
    if isinstance(spaces[-1], optuna.distributions.CategoricalDistribution):
        choices = list(dict.fromkeys(choice for space in spaces for choice in space.choices))
        return _Scale(label, choices.index, -0.5, len(choices) - 0.5, choices, 0.4)
    low, high = min(space.low for space in spaces), max(space.high for space in spaces)
    place, marks = (math.log10, _round_log(low, high)) if spaces[-1].log else (float, _round(low, high))
    margin = 0.04 * (place(high) - place(low)) or 0.5
    return _Scale(label, place, place(low) - margin, place(high) + margin, marks)


def _of_objective(objective: str, values: Sequence[float | None], down: bool, best: float | None = None) -> _Scale:
    """Return a scale, log for a loss, from the best to the worst value that is at most four times as far out as the median.

    What lies beyond, such as a collapsed run, stands on the edge; so does what has no value. A loss 1.6 times the best or an
    accuracy 0.02 below it is never beyond.
    """
    sign, usual, least = (1, 0.2, 0.01) if down else (-1, 0.02, 0.002)
    place: Callable[[Any], float] = (lambda value: math.log10(max(value, 1e-4))) if down else float
    worse = np.sort([sign * place(value) for value in values])
    near = worse[0] if best is None else sign * place(best)
    far = worse[worse <= worse[0] + max(4 * (np.median(worse) - worse[0]), usual)].max()
    margin = max(0.06 * (far - near), least)
    edge = sign * float(far + margin)
    low, high = sorted((sign * float(near - margin), edge))
    marks = _round_log(10**low, 10**high) if down else _round(low, high)
    unit = " (nats per image)" if objective.endswith("loss") else ""
    return _Scale(objective + unit, lambda value: min(max(place(value), low), high) if _is_finite(value) else edge, low, high, marks)


def _round(low: float, high: float) -> list[float]:
    """Return four to ten round numbers between two."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    step = next(step / part for part in (1, 2, 5) if (high - low) * part / step >= 4 or part == 5)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _round_log(low: float, high: float) -> list[float]:
    """Return round numbers between two positive ones: by decades where those lie far apart, evenly where near."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        marks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        if len(inside := [mark for mark in marks if low * (1 - 1e-9) <= mark <= high * (1 + 1e-9)]) >= 4:
            return inside
    return _round(low, high)


def _text(value: Any) -> str:
    return f"{value:.6g}".replace("e-0", "e-") if isinstance(value, float) else str(value).lower()


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _kind(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL:
        return "lost" if "lost" in trial.user_attrs else "failed"
    return {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned"}.get(trial.state, "running")


class _Search:
    """A study, and what its pictures share: all trials that began, the finished ones, those that have every parameter."""

    def __init__(self, study: optuna.Study, objective: str) -> None:
        self.objective, self.down = objective, study.direction == StudyDirection.MINIMIZE
        self.trials = [trial for trial in study.get_trials(deepcopy=False) if trial.datetime_start]
        finished = [trial for trial in self.trials if _kind(trial) == "finished" and _is_finite(trial.value)]
        sign = 1 if self.down else -1
        self.finished = sorted(finished, key=lambda trial: (sign * (trial.value or 0), trial.number), reverse=True)  # the best is last
        self.best = self.finished[-1] if finished else None
        self.default: FrozenTrial | None = None
        for trial in self.trials:
            if trial.user_attrs.get("retry_of", trial.number) == (self.default.number if self.default else 0):
                self.default = trial
        self.whole = whole(self.trials)
        self.knobs = list(self.whole[0].params) if self.whole else []
        self.compared = [trial for trial in self.finished if self.knobs and len(trial.params) == len(self.knobs)]
        curves = ((trial, {e: v for e, v in sorted(trial.intermediate_values.items()) if _is_finite(v)}) for trial in self.trials)
        self.reported = sorted([pair for pair in curves if pair[1]], key=lambda pair: ORDER.index(_kind(pair[0])))
        kinds = [_kind(trial) for trial in self.trials]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in reversed(KINDS) if kind in kinds)
        self.summary = f"best {self.best.value:.4f} in trial {self.best.number}; {counts}" if self.best else counts

    def history(self, figure: Any) -> None:
        axes, scale = figure.subplots(), _of_objective(self.objective, [trial.value for trial in self.finished], self.down)
        self._points(axes, scale, self.trials, lambda trial: trial.number)
        numbers = sorted(trial.number for trial in self.finished)
        heights = [scale.place(trial.value) for trial in sorted(self.finished, key=lambda trial: trial.number)]
        so_far = (np.minimum if self.down else np.maximum).accumulate(heights)
        ends = [*numbers, self.trials[-1].number], [*so_far, so_far[-1]]
        axes.step(*ends, where="post", color=BLUE, linewidth=1.2, zorder=1, label="best so far")
        axes.set(xlabel="trial", ylabel=scale.label, xlim=(-0.6, self.trials[-1].number + 0.6))
        axes.set_title(f"{self.summary}; on the edge: worse, or no value", pad=9)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)

    def importances(self, figure: Any, shares: dict[str, float]) -> None:
        axes = figure.subplots()
        axes.bar_label(axes.barh(list(shares), list(shares.values()), height=0.6, color=BLUE), fmt="%.2f", padding=3)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        n = sum(_kind(trial) in ("finished", "pruned") for trial in self.whole)
        axes.set(xlim=(0, 1.1 * max(shares.values())), xlabel="importance (PED-ANOVA; all sum to 1)")
        axes.set_title(f"what tells the best quarter of {n} finished and pruned trials apart" + "; few, so rough" * (n < 30))

    def parallel_coordinates(self, figure: Any) -> None:
        axes, objective = figure.subplots(), _of_objective(self.objective, [trial.value for trial in self.compared], self.down)
        scales = [*(_of_parameter(name, self.whole) for name in self.knobs), objective]

        def draw(trial: FrozenTrial, **style: Any) -> None:
            places = [scale.of(trial, name) for scale, name in zip(scales, self.knobs, strict=False)]
            places += [objective.place(trial.value)] if _kind(trial) == "finished" else []
            axes.plot([(place - scale.low) / (scale.high - scale.low) for place, scale in zip(places, scales, strict=False)], **style)

        for trial in self.whole:
            if _kind(trial) == "pruned":
                draw(trial, color=ORANGE, linewidth=0.7, alpha=0.45, label="pruned")
        for i, trial in enumerate(self.compared, 1):
            draw(trial, color=BLUE, linewidth=1.1, alpha=0.12 + 0.7 * (i / len(self.compared)) ** 2, label="finished")
        if self.compared[-1] is self.best:
            draw(self.best, color=BLUE, linewidth=3, label="best")
        if self.default in self.whole:
            draw(self.default, **DASHED)
        for i, scale in enumerate(scales):
            axes.axvline(i, color=GREY, linewidth=0.8, zorder=1)
            for place, text in zip(*scale.ticks(), strict=True):
                box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
                height = (place - scale.low) / (scale.high - scale.low)
                axes.text(i - 0.02, height, text, ha="right", va="center", fontsize=7.5, bbox=box)
        axes.set(xlim=(-0.35, len(scales) - 0.85), ylim=(0, 1), yticks=[], title="the darker, the better")
        axes.set_xticks(range(len(scales)), [scale.label.replace(" (", "\n(") for scale in scales])
        axes.tick_params(axis="x", length=0)
        axes.spines[:].set_visible(False)

    def slices(self, figure: Any) -> None:
        rows = math.ceil(len(self.knobs) / 3)
        grid = figure.subplots(rows, math.ceil(len(self.knobs) / rows), sharey=True, squeeze=False)
        scale = _of_objective(self.objective, [trial.value for trial in self.compared], self.down)
        for axes, name in zip(grid.flat, self.knobs, strict=False):
            across = _of_parameter(name, self.whole)
            self._points(axes, scale, self.whole, partial(across.of, name=name))
            places, texts = across.ticks()
            turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len("".join(texts)) > 32 else {}
            axes.set_xticks(places, texts, **turned)
            axes.set(xlabel=across.label, xlim=(across.low, across.high))
        for axes in grid.flat[len(self.knobs) :]:
            axes.remove()
        for axes in grid[:, 0]:
            axes.set_ylabel(scale.label)
        grid[0, 0].set_title("on the edge: worse, or no value", pad=9)

    def intermediate_values(self, figure: Any) -> None:
        first = [next(iter(curve.values())) for _, curve in self.reported]
        best = (min if self.down else max)(value for _, curve in self.reported for value in curve.values())
        axes, scale = figure.subplots(), _of_objective(self.objective, first, self.down, best)
        for trial, curve in self.reported:
            style = {"linewidth": 0.9, "alpha": 0.7, "markevery": [-1], "label": _kind(trial)} | KINDS[_kind(trial)]
            thick = {"linewidth": 2.6, "alpha": 1, "label": "best", "zorder": 5} if trial is self.best else {}
            for chosen in (style | thick, *([DASHED] if trial is self.default else [])):
                axes.plot(list(curve), [scale.place(value) for value in curve.values()], **chosen)
        self._upright(axes, scale)
        axes.set(xlabel="epoch", ylabel=f"{scale.label}, best so far", title=self.summary)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)

    def timeline(self, figure: Any) -> None:
        axes, starts = figure.subplots(), [trial.datetime_start for trial in self.trials if trial.datetime_start]
        first, last = min(starts), max([*starts, *(trial.datetime_complete for trial in self.trials if trial.datetime_complete)])
        span_s = max((last - first).total_seconds(), 1.0)
        unit, unit_s = next((unit, s) for unit, s in (("s", 1), ("min", 60), ("h", 3600)) if span_s < 180 * s or unit == "h")
        for trial, start in sorted(zip(self.trials, starts, strict=True), key=lambda pair: ORDER.index(_kind(pair[0]))):
            begin, end = (((when or last) - first).total_seconds() / unit_s for when in (start, trial.datetime_complete))
            wide = max(end - begin, span_s / unit_s / 200)
            style = {
                "color": KINDS[_kind(trial)]["color"],
                "hatch": "////" * (_kind(trial) == "lost"),
                "edgecolor": "white",
                "linewidth": 0,
            }
            axes.barh(trial.number, wide, left=begin, height=0.8, label=_kind(trial), **style)
            words = ["default"] * (trial is self.default) + ["best"] * (trial is self.best)
            words += [f"retry of {trial.user_attrs['retry_of']}"] if "retry_of" in trial.user_attrs else []
            axes.annotate(", ".join(words), (begin + wide, trial.number), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set(xlabel=f"{unit} since {first:%Y-%m-%d %H:%M}", ylabel="trial", xlim=(0, 1.13 * span_s / unit_s), title=self.summary)
        axes.set_ylim(self.trials[-1].number + 0.6, -0.6)
        axes.locator_params(axis="y", integer=True, min_n_ticks=1)
        axes.grid(axis="x")

    def _points(self, axes: Any, scale: _Scale, trials: Sequence[FrozenTrial], across: Callable[[FrozenTrial], float]) -> None:
        self._upright(axes, scale)
        layers = [([trial for trial in trials if _kind(trial) == kind], style | {"label": kind}) for kind, style in KINDS.items()]
        layers += [
            ([trial for trial in trials if trial is self.best], BEST),
            ([trial for trial in trials if trial is self.default], DEFAULT),
        ]
        for chosen, style in layers:
            if chosen and style["label"] != "running":
                heights = [scale.place(trial.value) for trial in chosen]
                axes.plot([across(trial) for trial in chosen], heights, linestyle="none", clip_on=False, **style)

    def _upright(self, axes: Any, scale: _Scale) -> None:
        axes.set_ylim(scale.low, scale.high)
        axes.set_yticks(*scale.ticks())
        axes.grid(axis="y")
