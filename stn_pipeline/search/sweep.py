"""A sweep: a study a data set, side by side in one pool, from the check of the data to the answer on each study's page."""

import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from stn_pipeline import tracking
from stn_pipeline.config import MACHINE, TrainConfig
from stn_pipeline.data import Splits, load
from stn_pipeline.errors import ConfigError, RunError, StnError
from stn_pipeline.jobs import Job, Outcome, Place, drive, only_driver, place
from stn_pipeline.search.answer import every_trial_failed
from stn_pipeline.search.page import changes, publish
from stn_pipeline.search.source import Search
from stn_pipeline.search.study import Study
from stn_pipeline.search.sweepfile import SweepConfig, in_words
from stn_pipeline.texts import markdown
from stn_pipeline.tracking import Run
from stn_pipeline.training import Record
from stn_pipeline.training.engine import dry_run
from stn_pipeline.training.fingerprint import conditions

TOKEN = "study.token"  # tag by which a study finds its own run


class NoTrialError(StnError, RuntimeError):
    """Every trial of a study failed: there is nothing to answer with."""


class SideBySide:
    """Several sources as one, asked in turn."""

    def __init__(self, sources: Sequence[Search]):
        self.sources = list(sources)
        self.owner: dict[str, Search] = {}

    def next(self) -> Job | None:
        """Return the next job of the first source in turn that has one."""
        for source in list(self.sources):
            job = source.next()
            self.sources.append(self.sources.pop(0))
            if job is not None:
                self.owner[job.key] = source
                return job
        return None

    def epoch(self, job: Job, record: Record) -> bool:
        """Tell the job's source."""
        return self.owner[job.key].epoch(job, record)

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Tell the job's source."""
        self.owner[job.key].ended(job, outcome)


class Wanted(NamedTuple):
    """A study that is asked for: the keys of its sweep, its data set, and its name; by default the sweep's, with the data set's."""

    sweep: SweepConfig
    dataset: str
    name: str = ""


def run(sweep: SweepConfig, say: Callable[[str], object], watch: Callable[[Sequence[Search]], Callable[[], object]]) -> None:
    """Run a sweep to its end, or go on with it: a study a data set. As run_studies."""
    run_studies(sweep.name, [Wanted(sweep, dataset) for dataset in sweep.datasets], say, watch)


def run_studies(
    name: str,
    wanted: Sequence[Wanted],
    say: Callable[[str], object],
    watch: Callable[[Sequence[Search]], Callable[[], object]],
    *,
    adopts: bool = True,
) -> list[Search]:
    """Run studies side by side to their end, or go on with them; return them.

    name: of the file in studies/ that holds them.   adopts: whether the run that `mlflow run` made is theirs.
    `say` is told lines for the console; `watch` is given the studies and returns what is called twice a second.
    Raises: UserError before anything is started; JobError where a training breaks in our own code; AwayError where the
        tracking server stays away; NoTrialError at the end where every trial of a study failed.
    """
    failed: dict[str, str] = {}  # why there is no answer, by the id of a study's run
    with only_driver("sweep", name) as path, ExitStack() as stack:
        url = f"sqlite:///{path}.db"
        somewhere = stack.enter_context(place(wanted[0].sweep, say))
        loaded: dict[str, Splits] = {}
        checked = [_check(one, somewhere, loaded, say) for one in wanted]
        names = [one.name or _study_name(one.sweep, splits) for one, (_, splits, _) in zip(wanted, checked, strict=True)]
        if len(set(names)) < len(names):
            raise ConfigError(f"datasets: two of them are called {max(names, key=names.count)}: rename a folder")
        studies = [
            Study(url, own, one.sweep, splits.dataset, _meaning(one.sweep, config, splits), under)
            for own, one, (config, splits, under) in zip(names, wanted, checked, strict=True)
        ]
        searches = []
        with tracking.reachable():
            experiment = tracking.experiment_id()
            umbrella = tracking.adopt_run(f"sweep {name}", wanted[0].sweep, {}) if adopts and len(studies) > 1 else None
            for study, (_, splits, _) in zip(studies, checked, strict=True):
                parent, experiment = _parent(study, experiment, umbrella, splits, adopts=adopts and umbrella is None)
                stack.enter_context(tracking.closing(parent, partial(_close, parent, failed)))
                searches.append(Search(study, parent, experiment, splits.name, say))
        for search in searches:
            search.recover()
            for line in _opening(search, url):
                say(line)
        n_left = sum(search.n_left for search in searches)
        if n_left:
            pool = somewhere.pool(n_left if all(one.sweep.trials for one in wanted) else None)
            say(str(pool))
            try:
                with tracking.watched(tracking.store(), say):
                    drive(SideBySide(searches), pool, watch(searches))
            except KeyboardInterrupt:
                with tracking.in_a_hurry():
                    for search in searches:
                        search.parent.describe("**Interrupted.** The same command goes on with it.")
                raise
            pool.close()
            for search in searches:
                tracking.close_orphans(search.parent)
        answers = []
        for search in searches:
            answers.append(publish(search))
            if search.study.best is None:
                failed[search.parent.id] = f"{search.study.name}: {every_trial_failed(search)}"
                search.parent.tag({"error": answers[-1]})
                continue
            for line in answers[-1].split("\n"):
                say(f"{search.study.name}: {line}")
            _register(search, say, alone=len(searches) == 1)
        if umbrella is not None:
            umbrella.describe(
                "\n\n".join(
                    f"**{markdown(s.study.name)}** (run `{s.parent.id}`): {markdown(' '.join(a.splitlines()))}"
                    for s, a in zip(searches, answers, strict=True)
                )
            )
    if failed:
        raise NoTrialError("; ".join(failed.values()))
    return searches


def _close(parent: Run, failed: dict[str, str], status: str) -> None:
    parent.close("FAILED" if parent.id in failed else status)


def _check(
    wanted: Wanted, somewhere: Place, loaded: dict[str, Splits], say: Callable[[str], object]
) -> tuple[TrainConfig, Splits, dict[str, str]]:
    """Return the default configuration and the data, both fit to be trained, and the conditions that they are trained under."""
    config = wanted.sweep.config(wanted.dataset)
    device = somewhere.resolve(config.device, config.precision)
    splits = loaded.get(config.data) or load(config, announce=say)
    loaded[config.data] = splits
    engine = dry_run(config, splits, device, say)
    return config.model_copy(update={"dataset": splits.dataset}), splits, conditions(engine, device)


def _study_name(sweep: SweepConfig, splits: Splits) -> str:
    return sweep.name if len(sweep.datasets) == 1 else f"{sweep.name}-{splits.name}"


def _meaning(sweep: SweepConfig, config: TrainConfig, splits: Splits) -> dict[str, str]:
    """Return what decides what a trial's value means, in words."""
    fixed = config.model_dump(exclude={*MACHINE, "seed", *sweep.search})
    data = {"data": " ".join(splits.digests()[name] for name in ("train", "val"))}
    own = {"objective": sweep.objective, "direction": sweep.direction, "seed": str(sweep.seed)}
    searched = {f"search.{knob}": in_words(space) for knob, space in sweep.search.items()}
    return {f"train.{knob}": str(value) for knob, value in fixed.items()} | searched | own | data


def _parent(study: Study, experiment: str, umbrella: Run | None, splits: Splits, *, adopts: bool) -> tuple[Run, str]:
    """Return the study's own run, and its experiment: the one it had, the one that `mlflow run` made, or a new one."""
    name = f"sweep {study.name}"
    known = tracking.search_runs({TOKEN: study.token}) if study.token else []
    if not known and study.trials:
        raise RunError(
            f"study {study.name}: its run is not in {tracking.store()}: set MLFLOW_TRACKING_URI to the store that it began in, "
            f"or begin another study (--name {study.sweep.name}-2)"
        )
    if known:
        run = Run(known[0].info.run_id)
        run.reopen()
        if adopts and (made := tracking.adopt_run(f"{name} again", study.sweep, {})) is not None:
            made.describe(f"The sweep goes on in its own run, `{run.id}`.")
        return run, str(known[0].info.experiment_id)
    study.token = study.token or uuid.uuid4().hex  # before the run, so that a kill between leaves no run that nobody finds
    tags = {"stage": "sweep", "study": study.name, TOKEN: study.token, "dataset_used": splits.dataset}
    adopted = tracking.adopt_run(name, study.sweep, tags) if adopts else None
    run = adopted or tracking.create_run(name, experiment, study.sweep, tags, umbrella.id if umbrella else "")
    run.tag(tracking.environment())
    run.log_data(splits)
    return run, experiment


def _opening(search: Search, url: str) -> list[str]:
    study, counts = search.study, search.counts()
    searched = "; ".join(f"{knob} in {in_words(space)}" for knob, space in study.sweep.search.items())
    limits = [f"{study.sweep.trials} trials"] * bool(study.sweep.trials) + [f"{study.sweep.time_limit_s:g} s"] * bool(
        study.sweep.time_limit_s
    )
    lines = [f"study {study.name}: {' or '.join(limits)} of {searched}; run {search.parent.id}, trials in {url}"]
    if (confirm := study.sweep.confirm) is not None:
        lines.append(f"then the best {confirm.top} and the default again with {confirm.seeds} fresh seeds, whose mean chooses the winner")
    if any(counts.values()):
        told = [*(f"{n} {kind}" for kind, n in counts.items() if n), *search.confirmation_so_far()]
        lines.append("going on: " + ", ".join(told))
        lines += changes(study.history[-1], study.under, "going on") if search.n_left else []
    outside = {knob: value for knob, value in study.sweep.default.items() if not study.holds(knob, value)}
    return lines + [
        f"{knob}={value}, the default, lies outside what is searched; trial 0 has it all the same" for knob, value in outside.items()
    ]


def _register(search: Search, say: Callable[[str], object], *, alone: bool) -> None:
    """Register the winner's retrained model that did best on validation, once."""
    sweep = search.study.sweep
    if not sweep.register_as:
        return
    done = [final for (number, _), final in search.finals.items() if number == search.winner and final.figures]
    if search.winner is None:
        say(f"{search.study.name}: nothing is registered: the confirmation is not done, so there is no winner")
        return
    if not done:
        say(f"{search.study.name}: nothing is registered: no final training of the winner was done")
        return
    champion = min(done, key=lambda final: (final.figures or {})["val/loss"])
    if tracking.find_run(search.parent.id).data.tags.get("registered.run") == champion.run.id:
        return
    name = sweep.register_as if alone else f"{sweep.register_as}-{search.label}"
    version = champion.run.register(name)
    search.parent.tag({"registered": f"{name} version {version}", "registered.run": champion.run.id})
    what = ", with the default configuration," if search.winner == 0 else ""
    say(f"{search.study.name}: run {champion.run.id}{what} is models:/{name}@{tracking.CHAMPION}, version {version}")
