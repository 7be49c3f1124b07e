"""What a study's own run shows: the answer first, the best knobs, the best trials by name, pictures, trials.csv."""

import csv
import io
import math
import shlex
from typing import Any

import yaml

from stn_pipeline.comparing.arms import Table
from stn_pipeline.search.answer import answer, configuration, final_pairs, finals_table, mean_and_sd, shared_seeds
from stn_pipeline.search.pictures import confirmation_picture, pictures
from stn_pipeline.search.source import Key, Search
from stn_pipeline.search.sweepfile import in_words as space_in_words
from stn_pipeline.texts import code, markdown

BEST_SHOWN = 5
CONDITIONS = {"code": "training code", "device": "kind of device"}  # what the names of training.fingerprint.conditions mean


def publish(search: Search) -> str:
    """Put everything on the study's run; return the answer, as the console shows it."""
    study, run, told = search.study, search.parent, answer(search)
    finals = finals_table(search) if search.winner else {}
    files = pictures(study.optuna, study.sweep.objective, study.name) | {"trials.csv": _csv(search).encode()}
    if search.confirmed:
        names = [f"{configuration(one.number)} {_knobs(search, one.number)}" for one in search.confirmed]
        files["confirmation.png"] = confirmation_picture(dict(zip(names, search.confirmed, strict=True)), study.sweep.objective, study.name)
        files["confirmation.csv"] = _confirmation_csv(search).encode()
    if search.winner is not None:
        best = study.config(_params(search, search.winner))
        files["best.yaml"] = yaml.safe_dump(best.model_dump(exclude={"seed"}), sort_keys=False).encode()
    run.log_files(files)
    for what, pair in final_pairs(finals).items() if finals else ():
        run.log_metrics({f"tuned/{what}": pair.arm_mean, f"default/{what}": pair.baseline_mean})
    run.log_json("answer.json", _figures(search, finals) | {"answer": told})
    run.tag({"answer": " ".join(told)} | ({} if search.winner is None else {"best_trial": str(_number(search, search.winner))}))
    run.describe(_description(search, told))
    return "\n".join(told)


def conditions(search: Search) -> list[str]:
    """Return a line for each change of code, torch or kind of device between the trainings of a study."""
    return [
        line
        for before, now in zip(search.study.history, search.study.history[1:], strict=False)
        for line in changes(before, now, f"After {now['after']} trials it went on")
    ]


def changes(before: dict[str, Any], now: dict[str, Any], told: str) -> list[str]:
    """Return a line for each condition that is not as before; `told` is how it begins."""
    names = [name for name in now if name != "after" and before.get(name) != now[name]]
    if names and not before.keys() & now.keys() - {"after"}:
        return [f"{told}; under what code, torch and kind of device the earlier trainings ran was not kept."]
    return [
        f"{told} under another {CONDITIONS.get(name, name)}: {before.get(name)} before, {now[name]} then; the two may not compare."
        for name in names
    ]


def epochs_saved(search: Search) -> tuple[int, int]:
    """Return the epochs that pruning saved, and those that the pruned and complete trials would have taken together."""
    trials = [trial for trial in search.study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    asked = [search.study.config(trial.user_attrs["params"]).epochs for trial in trials]
    ran = [max(trial.intermediate_values, default=0) for trial in trials]
    return sum(asked) - sum(ran), sum(asked)


def _number(search: Search, first: int) -> int:
    """Return the number of a configuration's complete trial, or of its first where none is."""
    return search.study.complete[first].number if first in search.study.complete else first


def _params(search: Search, number: int) -> dict[str, Any]:
    params: dict[str, Any] = search.study.trials[number].user_attrs["params"]
    return params


def _figures(search: Search, finals: Table) -> dict[str, Any]:
    study, winner = search.study, search.winner
    saved, asked = epochs_saved(search)
    figures: dict[str, Any] = {"study": study.name, "trials": search.counts(), "epochs_saved": saved, "epochs_without_pruning": asked}
    figures["spent_s"] = round(study.spent_s, 1)
    if winner is not None:
        value = study.complete[winner].value if winner in study.complete else None
        figures |= {"best": _params(search, winner), "best_trial": _number(search, winner), study.sweep.objective: value}
    if search.confirmed:
        figures["confirmation"] = [
            {
                "trial": one.number,
                "params": _params(search, one.number),
                "promised": one.promised,
                "kept": one.mean if one.done else None,
                "sd": None if math.isnan(one.sd) else one.sd,
                "n_lost": one.n_lost,
                "values": {str(seed): value for seed, value in one.values.items()},
            }
            for one in search.confirmed
        ]
    figures["chosen_by"] = f"mean of {len(study.sweep.confirm_seeds)} fresh seeds" if search.confirmed else "one shared seed"
    for what, pair in final_pairs(finals).items() if finals else ():
        numbers = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in vars(pair).items()}
        figures[what] = numbers | {arm: [finals[arm][seed].figures[what] for seed in shared_seeds(finals)] for arm in finals}
    if finals:
        figures["finals"] = {arm: {str(seed): one.state for seed, one in by_seed.items()} for arm, by_seed in finals.items()}
    return figures


def _description(search: Search, answer: list[str]) -> str:
    study, sweep = search.study, search.study.sweep
    counts, (saved, asked) = search.counts(), epochs_saved(search)
    told = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    searched = "; ".join(f"`{knob}` in {space_in_words(space)}" for knob, space in sweep.search.items())
    parts = [f"**{markdown(' '.join(answer))}**", f"*{markdown(sweep.question)}*" if sweep.question else ""]
    if search.winner is not None:
        params = _params(search, search.winner)
        flags = " ".join(f"--{knob} {_exact(value)}" for knob, value in (sweep.train | params).items())
        command = f"python -m stn_pipeline.train --dataset {_exact(study.dataset)} {flags}"
        parts.append(f"Best knobs (`best.yaml`): {code(command)}")
    if study.complete:
        parts += [_best_table(search), _confirmation_table(search)]
    parts += [markdown(line) for line in conditions(search)]
    share = f"; pruning saved {saved} of {asked} epochs" if saved else ""
    parts.append(
        f"{len(study.trials)} trials ({told}){share}, {study.spent_s:.0f} s in all. Searched: {searched}; {sweep.sampler}, {sweep.pruner}."
    )
    parts.append(
        "Pictures under Artifacts: `history.png`, `importances.png`, `parallel_coordinates.png`, `slices.png`, `intermediate_values.png`, "
        f"`timeline.png`{', `confirmation.png`' * bool(search.confirmed)}; every trial in `trials.csv`"
        f"{', every fresh seed in `confirmation.csv`' * bool(search.confirmed)}, the figures of the answer in `answer.json`."
    )
    return "\n\n".join(part for part in parts if part)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _exact(value: Any) -> str:
    return shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))


def _best_table(search: Search) -> str:
    study = search.study
    complete = list(study.complete.values())
    best = complete[:BEST_SHOWN]
    best += [trial for trial in complete if study.is_default(trial.number) and trial not in best]
    knobs = list(study.sweep.search)
    lines = [f"| trial | {study.sweep.objective} | {' | '.join(knobs)} | run |", "|" + "---|" * (len(knobs) + 3)]
    for trial in best:
        name = f"t{trial.number:03d}" + (" (default)" if study.is_default(trial.number) else "")
        values = " | ".join(_text(trial.user_attrs["params"][knob]) for knob in knobs)
        run_id = trial.user_attrs.get("run_id", "")
        lines.append(f"| {name} | {trial.value:.4f} | {values} | [{run_id}](#/experiments/{search.experiment}/runs/{run_id}) |")
    return "\n".join(lines)


def _knobs(search: Search, number: int) -> str:
    return " ".join(f"{knob}={_text(value)}" for knob, value in _params(search, number).items())


def _confirmation_table(search: Search) -> str:
    if not search.confirmed:
        return ""
    objective, seeds = search.study.sweep.objective, search.study.sweep.confirm_seeds
    lines = [
        f"Confirmation: {objective} on {len(seeds)} fresh seeds ({seeds[0]} to {seeds[-1]}), the best mean first; it chooses the winner.",
        "",
        f"| configuration | promised | kept, mean ± sd | lost | {' | '.join(search.study.sweep.search)} |",
        "|" + "---|" * (4 + len(search.study.sweep.search)),
    ]
    for one in search.confirmed:
        values = " | ".join(_text(_params(search, one.number)[knob]) for knob in search.study.sweep.search)
        promised = "" if one.promised is None else f"{one.promised:.4f}"
        lines.append(f"| {configuration(one.number)} | {promised} | {mean_and_sd(one)} | {one.n_lost} of {len(one.values)} | {values} |")
    return "\n".join(lines)


def _confirmation_csv(search: Search) -> str:
    text, objective = io.StringIO(), search.study.sweep.objective
    out, knobs = csv.writer(text), list(search.study.sweep.search)
    out.writerow(["trial", "seed", objective, *knobs, "promised", "reason", "run_id"])
    for one in search.confirmed:
        for seed, value in one.values.items():
            training = search.trainings.by_key.get(Key("confirm", one.number, seed))
            why, run_id = ("", "") if training is None else (training.failed, training.run.id)
            out.writerow([one.number, seed, value, *(_params(search, one.number)[knob] for knob in knobs), one.promised, why, run_id])
    return text.getvalue()


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
