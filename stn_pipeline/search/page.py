"""What a study's own run shows: the answer first, the best knobs, the best trials by name, pictures, trials.csv."""

import csv
import io
import math
import shlex
from statistics import mean, stdev
from typing import Any

import yaml

from stn_pipeline.comparing.arms import Trained, contrasts
from stn_pipeline.comparing.measures import ACCURACY, LOSS
from stn_pipeline.comparing.paired import Paired, paired
from stn_pipeline.comparing.sentences import described, verdict_sentence
from stn_pipeline.comparing.verdicts import Rules, judge
from stn_pipeline.search.pictures import pictures
from stn_pipeline.search.source import Search
from stn_pipeline.search.sweepfile import in_words as space_in_words

BEST_SHOWN = 5
UNITS = {"test/loss": LOSS, "test/accuracy": ACCURACY}


def publish(search: Search) -> str:
    """Put everything on the study's run; return the answer, as the console shows it."""
    study, run = search.study, search.parent
    answer = _answer(search)
    run.log_files(pictures(study.optuna, study.sweep.objective, study.name) | {"trials.csv": _csv(search).encode()})
    if study.best is not None:
        best = study.config(study.best.user_attrs["params"])
        run.log_files({"best.yaml": yaml.safe_dump(best.model_dump(exclude={"seed"}), sort_keys=False).encode()})
        run.log_metrics({f"tuned/{what}": pair.arm_mean for what, pair in _pairs(search).items()})
        run.log_metrics({f"default/{what}": pair.baseline_mean for what, pair in _pairs(search).items()})
    run.log_json("answer.json", _figures(search) | {"answer": answer})
    run.tag({"answer": " ".join(answer)} | ({} if study.best is None else {"best_trial": str(study.best.number)}))
    run.describe(_description(search, answer))
    return "\n".join(answer)


def epochs_saved(search: Search) -> tuple[int, int]:
    """Return the epochs that pruning saved, and those that the pruned and complete trials would have taken together."""
    trials = [trial for trial in search.study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    asked = [search.study.config(trial.user_attrs["params"]).epochs for trial in trials]
    ran = [max(trial.intermediate_values, default=0) for trial in trials]
    return sum(asked) - sum(ran), sum(asked)


def _pairs(search: Search) -> dict[str, Paired]:
    found = {what: search.pairs(what) for what in UNITS}
    return {what: paired(*values) for what, values in found.items() if values[0]} if search.winner else {}


def _answer(search: Search) -> list[str]:
    """Return whether tuning helped, a sentence a figure; without final trainings, what validation says."""
    study, sweep = search.study, search.study.sweep
    if study.best is None:
        return ["No trial has finished yet."]
    if search.winner == 0:
        best = f"Tuning found nothing better than the default: {_short(search, study.best.number)} was best on validation."
        loss, accuracy = (search.pairs(what)[1] for what in UNITS)
        if len(loss) < 2:
            return [best]
        spread = f"test loss {mean(loss):.4f} ± {stdev(loss):.4f}, accuracy {mean(accuracy):.4f} ± {stdev(accuracy):.4f}"
        return [best, f"The default: {spread} (mean ± sd of {len(loss)} seeds)."]
    pairs = _pairs(search)
    if pairs:
        missing = max(0, sweep.final - next(iter(pairs.values())).n)
        by_what = {what: search.pairs(what) for what in UNITS}
        table = {
            arm: {
                seed: Trained("done", {what: own[i][seed] for what, own in by_what.items()}) for seed in range(len(by_what["test/loss"][0]))
            }
            for i, arm in enumerate(("tuned", "default"))
        }
        verdict = judge(table["tuned"], table["default"], ("tuned", "default"), Rules())
        lines = [verdict_sentence(verdict, contrasts(table, "default", LOSS)[0], study.dataset) + "."]
        lines += [f"Test accuracy: {described(contrasts(table, 'default', ACCURACY)[0])}."]
        return lines + ([f"{missing} of {sweep.final} pairs are missing: {_why_missing(search)}."] if missing else [])
    why = f"the final trainings are missing: {_why_missing(search)}" if sweep.final else "final is 0, so no test split was read"
    values = f"{_short(search, study.best.number)} against {_default_value(search)} of the default configuration, on validation"
    return [f"Best: {values}, one seed each: not yet an answer ({why})."]


def _why_missing(search: Search) -> str:
    failed = [final.failed for final in search.finals.values() if final.failed]
    return failed[0] if failed else "they were not trained to the end; the same command goes on"


def _short(search: Search, number: int) -> str:
    trial = search.study.trials[number]
    return f"{search.study.sweep.objective} {trial.value:.4f} (trial t{number:03d})"


def _default_value(search: Search) -> str:
    values = [trial.value for trial in search.study.trials if trial.value is not None and search.study.is_default(trial.number)]
    return f"{values[0]:.4f}" if values else "none (it failed)"


def _figures(search: Search) -> dict[str, Any]:
    study = search.study
    saved, asked = epochs_saved(search)
    figures: dict[str, Any] = {"study": study.name, "trials": search.counts(), "epochs_saved": saved, "epochs_without_pruning": asked}
    figures["spent_s"] = round(study.spent_s, 1)
    if study.best is not None:
        figures |= {"best": study.best.user_attrs["params"], "best_trial": study.best.number, study.sweep.objective: study.best.value}
    for what, pair in _pairs(search).items():
        numbers = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in vars(pair).items()}
        figures[what] = numbers | dict(zip(("tuned", "default"), search.pairs(what), strict=True))
    return figures


def _description(search: Search, answer: list[str]) -> str:
    study, sweep = search.study, search.study.sweep
    counts, (saved, asked) = search.counts(), epochs_saved(search)
    told = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    searched = "; ".join(f"`{knob}` in {space_in_words(space)}" for knob, space in sweep.search.items())
    parts = [f"**{' '.join(answer)}**", f"*{sweep.question}*" if sweep.question else ""]
    if study.best is not None:
        params = study.best.user_attrs["params"]
        flags = " ".join(f"--{knob} {_exact(value)}" for knob, value in (sweep.train | params).items())
        command = f"python -m stn_pipeline.train --dataset {_exact(study.dataset)} {flags}"
        parts.append(f"Best knobs (`best.yaml`): `{command}`")
        parts.append(_best_table(search))
    share = f"; pruning saved {saved} of {asked} epochs" if saved else ""
    parts.append(
        f"{len(study.trials)} trials ({told}){share}, {study.spent_s:.0f} s in all. Searched: {searched}; {sweep.sampler}, {sweep.pruner}."
    )
    parts.append(
        "Pictures under Artifacts: `history.png`, `importances.png`, `parallel_coordinates.png`, `slices.png`, `intermediate_values.png`, "
        "`timeline.png`; every trial in `trials.csv`, the figures of the answer in `answer.json`."
    )
    return "\n\n".join(part for part in parts if part)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _exact(value: Any) -> str:
    return shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))


def _best_table(search: Search) -> str:
    study = search.study
    sign = 1 if study.sweep.direction == "minimize" else -1
    complete = [trial for trial in study.trials if trial.value is not None and trial.state.name == "COMPLETE"]
    best = sorted(complete, key=lambda trial: sign * float(trial.value or 0.0))[:BEST_SHOWN]
    best += [trial for trial in complete if study.is_default(trial.number) and trial not in best]
    knobs = list(study.sweep.search)
    lines = [f"| trial | {study.sweep.objective} | {' | '.join(knobs)} | run |", "|" + "---|" * (len(knobs) + 3)]
    for trial in best:
        name = f"t{trial.number:03d}" + (" (default)" if study.is_default(trial.number) else "")
        values = " | ".join(_text(trial.user_attrs["params"][knob]) for knob in knobs)
        run_id = trial.user_attrs.get("run_id", "")
        lines.append(f"| {name} | {trial.value:.4f} | {values} | [{run_id}](#/experiments/{search.experiment}/runs/{run_id}) |")
    return "\n".join(lines)


def _csv(search: Search) -> str:
    study, text = search.study, io.StringIO()
    knobs = list(study.sweep.search)
    out = csv.writer(text)
    out.writerow(["trial", "state", study.sweep.objective, *knobs, "epochs", "started", "seconds", "retry_of", "lost", "reason", "run_id"])
    for trial in study.trials:
        own = trial.user_attrs
        out.writerow(
            [trial.number, trial.state.name, trial.value, *(own["params"][knob] for knob in knobs)]
            + [max(trial.intermediate_values, default=0), trial.datetime_start, trial.duration and trial.duration.total_seconds()]
            + [own.get(name) for name in ("retry_of", "lost", "reason", "run_id")]
        )
    return text.getvalue()
