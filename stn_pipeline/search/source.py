"""A study as a source of jobs: its trials, their confirmation, then the winner and the default once more; each one MLflow run.

Everything that survives a kill lies in the study and in the runs' tags; `recover` brings the two together again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from stn_pipeline.config import TrainConfig
from stn_pipeline.jobs import MAX_LOSSES, Job, Outcome, Training, Trainings, times
from stn_pipeline.search.confirm import Confirmed, ranking
from stn_pipeline.search.study import Asked, Study
from stn_pipeline.search.sweepfile import short
from stn_pipeline.texts import markdown
from stn_pipeline.tracking import CHILD_OF, Run, create_run, search_runs, unless_gone
from stn_pipeline.training import Record

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


@dataclass
class Trial:
    """A trial that runs: what was asked, its run, and its best value so far."""

    asked: Asked
    run: Run
    best: float | None = None


class Key(NamedTuple):
    """A training that no study knows: what for, the number of the trial that tried its configuration first, and its fresh seed."""

    stage: Literal["confirm", "final"]
    number: int
    seed: int


class Search:
    """One study, run to its end: a Source for `drive`.

    `say` is told a line for the console when a job ends.
    """

    def __init__(self, study: Study, parent: Run, experiment: str, label: str, say: Callable[[str], object]):
        self.study, self.parent, self.experiment, self.label, self.say = study, parent, experiment, label, say
        self.running: dict[str, Trial] = {}
        self.trainings: Trainings[Key] = Trainings()

    def recover(self) -> None:
        """Close what an earlier driver left open: its trials are lost, their runs end as the study says."""
        for trial in self.study.unfinished:
            self.study.end(trial.number, "FAIL", lost="driver")
        states = {trial.number: trial.state.name for trial in self.study.trials}
        for child in search_runs({CHILD_OF: self.parent.id}):
            tags, run, number = child.data.tags, Run(child.info.run_id), int(child.data.tags.get("trial", -1))
            stage = tags.get("stage")
            if stage == "confirm" or stage == "final":
                self.trainings.adopt(Key(stage, number, int(tags["seed"])), child, tested=stage == "final")
            elif child.info.status == "RUNNING":
                state = states.get(number, "FAIL")
                if state == "COMPLETE":
                    run.log_metrics({f"best/{self.study.sweep.objective}": float(self.study.trials[number].value or 0.0)})
                self._close(run, state, "" if state != "FAIL" else "Lost: the driver was stopped; a later trial tries it again.")

    @property
    def n_left(self) -> int:
        """Number of jobs still to be started or ended, as far as known."""
        return self.study.n_left + len(self.running) + len(self.trainings.running) + self._n_planned()

    @property
    def finals(self) -> dict[tuple[int, int], Training]:
        """The final trainings, by trial number and seed."""
        return {(key.number, key.seed): training for key, training in self.trainings.by_key.items() if key.stage == "final"}

    @property
    def confirmed(self) -> list[Confirmed]:
        """The configurations that are confirmed, the best first; a training that is not over counts as lost."""
        complete, sweep = self.study.complete, self.study.sweep
        candidates = []
        for number in self._candidates():
            promised = complete[number].value if number in complete else None
            candidates.append(Confirmed(number, promised, {seed: self._value(number, seed) for seed in sweep.confirm_seeds}))
        return ranking(candidates, smaller_is_better=sweep.direction == "minimize")

    def _value(self, number: int, seed: int) -> float | None:
        training = self.trainings.by_key.get(Key("confirm", number, seed))
        value = math.nan if training is None or training.figures is None else training.figures[self.study.sweep.objective]
        return value if math.isfinite(value) else None

    @property
    def winner(self) -> int | None:
        """Number under which the winner was first tried; 0 is the default, None where none is known yet.

        It is the best on fresh seeds; without a confirmation, the best trial.
        """
        if not self._candidates():
            return next(iter(self.study.complete), None)
        return None if self._wanted("confirm") or self._is_running("confirm") else self.confirmed[0].number

    @property
    def chosen(self) -> dict[str, Any]:
        """The winner's values of the knobs that are searched; empty where there is no winner yet."""
        return {} if self.winner is None else dict(self.study.trials[self.winner].user_attrs["params"])

    def _candidates(self) -> list[int]:
        candidates = self.study.candidates
        return candidates if len(candidates) > 1 else []  # the default alone has nobody to be compared with

    # what to do next

    def next(self) -> Job | None:
        """Return the next trial; once all have ended the next training of the confirmation, and after those the next final one."""
        job = self._next()
        if job is not None:
            self.study.keep_under()
        return job

    def _next(self) -> Job | None:
        asked = self.study.ask()
        if asked is not None:
            return self._trial_job(asked)
        if self.running:
            return None
        wanted = self._wanted("confirm") or (self._wanted("final") if not self._is_running("confirm") else [])
        return self._training_job(wanted[0]) if wanted else None

    def _wanted(self, stage: Literal["confirm", "final"]) -> list[Key]:
        """Return the trainings of a stage that are still to be started, all configurations with a seed before the next seed."""
        sweep = self.study.sweep
        if stage == "confirm":
            numbers, seeds = self._candidates(), sweep.confirm_seeds
        else:
            winner = self.winner
            numbers, seeds = [] if winner is None else list(dict.fromkeys((winner, 0))), sweep.final_seeds
        return [key for seed in seeds for number in numbers if self.trainings.is_open(key := Key(stage, number, seed))]

    def _is_running(self, stage: str) -> bool:
        return any(key.stage == stage for key in self.trainings.running.values())

    def _n_planned(self) -> int:
        """Return the number of trainings beyond the trials that are still to be started, as far as known."""
        sweep, trials_to_come = self.study.sweep, bool(self.study.n_left or self.running)
        n_confirm = len(self._wanted("confirm"))
        if sweep.confirm is not None and trials_to_come:
            expected = 1 + min(sweep.confirm.top, max(sweep.trials - 1, 0) or sweep.confirm.top)
            n_confirm += sweep.confirm.seeds * max(0, expected - len(self._candidates()))
        if self.winner is not None:
            return n_confirm + len(self._wanted("final"))
        return n_confirm + (2 * sweep.final if trials_to_come or self._candidates() else 0)

    def _trial_job(self, asked: Asked) -> Job:
        config = self.study.config(asked.params)
        again = "" if asked.retry_of is None else f" (t{asked.retry_of:03d} again)"
        tags = {"stage": "trial", "state": "RUNNING", "trial": str(asked.number), "study": self.study.name}
        tags |= {"default": "true"} if asked.is_default else {}
        tags |= {} if asked.retry_of is None else {"retry_of": str(asked.retry_of)}
        run = self._create(f"{self.label} t{asked.number:03d} {short(asked.params)}{again}", config, tags)
        self.study.started(asked.number, run.id)
        key = f"{self.study.name} t{asked.number:03d}"
        self.running[key] = Trial(asked, run)
        lost = "" if asked.retry_of is None else self.study.trials[asked.retry_of].user_attrs.get("run_id", "")
        return Job(key, run.id, config, resume=lost)

    def _training_job(self, key: Key) -> Job:
        stage, number, seed = key
        params = self.study.trials[number].user_attrs["params"]
        config = self.study.config(params, seed)
        arm = "default" if number == 0 else "tuned" if stage == "final" else f"t{number:03d}"
        name = f"{stage} {arm} s{seed}"
        run = self.trainings.again(key)
        if run is None:
            tags = {"stage": stage, "arm": arm, "state": "RUNNING", "trial": str(number), "seed": str(seed), "study": self.study.name}
            run = self._create(f"{self.label} {name} {short(params)}", config, tags)
        return self.trainings.job(key, f"{self.study.name} {name}", config, run, whole=stage == "final")

    def _create(self, name: str, config: TrainConfig, tags: dict[str, str]) -> Run:
        return create_run(name, self.experiment, config, tags, self.parent.id)

    # what is heard

    def epoch(self, job: Job, record: Record) -> bool:
        """Report a trial's best value so far; say whether it shall go on, as the default configuration always does."""
        if job.key not in self.running:
            self._count_time(self.trainings.running[job.key])
            return True
        work = self.running[job.key]
        smaller_is_better = self.study.sweep.direction == "minimize"
        value = record.val_loss if self.study.sweep.objective == "val/loss" else record.val_accuracy
        work.best = value if work.best is None else min(work.best, value) if smaller_is_better else max(work.best, value)
        goes_on = self.study.report(work.asked.number, record.number, work.best)
        return goes_on or work.asked.is_default

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Tell the study how a job ended, and close its run."""
        if job.key in self.running:
            self._trial_ended(job, self.running.pop(job.key), outcome)
        else:
            self._training_ended(job, outcome)

    def _training_ended(self, job: Job, outcome: Outcome) -> None:
        key = self.trainings.running[job.key]
        told = self.trainings.ended(job, outcome)
        if key.stage == "confirm" and self.trainings.by_key[key].n_lost >= MAX_LOSSES:  # else the next call could choose another winner
            self.trainings.give_up(key, told)
        self._count_time(key)
        self.say(f"{job.key}: {told}")

    def _count_time(self, key: Key) -> None:
        if key.stage == "confirm":
            self.study.keep_spent()

    def _trial_ended(self, job: Job, work: Trial, outcome: Outcome) -> None:
        objective, number = self.study.sweep.objective, work.asked.number
        trial = self.study.trials[number]
        epochs = max(trial.intermediate_values, default=0)
        so_far = "no epoch" if work.best is None else f"{objective} {work.best:.4f}"
        metrics: dict[str, float] = {}
        if outcome.kind == "done":
            before = self.study.best
            self.study.end(number, "COMPLETE", work.best)
            metrics = times(outcome) | {f"best/{objective}": work.best or 0.0}
            better = " (best so far)" if self.study.best != before else ""
            text, state, note = f"{so_far}{better}", "COMPLETE", f"**{so_far}**, the best of {epochs} epochs."
        elif outcome.kind == "stopped":
            self.study.end(number, "PRUNED")
            text = f"pruned after {epochs} of {job.config.epochs} epochs, {so_far}"
            state, note = "PRUNED", f"**Pruned** after {epochs} of {job.config.epochs} epochs: {so_far}, behind the others by then."
        elif outcome.kind == "failed":
            self.study.end(number, "FAIL", reason=outcome.reason)
            text, state, note = f"failed: {outcome.reason}", "FAIL", f"**Failed.** {markdown(outcome.reason)}"
        else:
            self.study.end(number, "FAIL", lost="driver" if outcome.kind == "interrupted" else "worker", reason=outcome.reason)
            text, state = f"lost after {epochs} epochs: {outcome.reason.splitlines()[0]}", "FAIL"
            note = f"**Lost.** {markdown(outcome.reason)}"
        with unless_gone(work.run.id):
            if metrics:
                work.run.log_metrics(metrics)
            if state == "FAIL":
                work.run.tag({"error": outcome.reason})
            self._close(work.run, state, note)
        if state == "COMPLETE" and self.study.best is not None:
            self.parent.log_metrics({f"best/{objective}": float(self.study.best.value or 0.0)}, step=number)
        self.say(f"{self.label} t{number:03d} {short(work.asked.params)}: {text}")

    @staticmethod
    def _close(run: Run, state: str, note: str) -> None:
        run.tag({"state": state})
        if note:
            run.describe(note)
        run.close(STATUS[state])

    # what there is to say

    def counts(self) -> dict[str, int]:
        """Return the numbers of trials: done, pruned, failed, lost."""
        count = dict.fromkeys(("done", "pruned", "failed", "lost"), 0)
        for trial in self.study.trials:
            kind = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "lost" if "lost" in trial.user_attrs else "failed"}
            if trial.state.name in kind:
                count[kind[trial.state.name]] += 1
        return count

    @property
    def state(self) -> str:
        """The best value so far and the numbers of trials, in words."""
        best = self.study.best
        told = f"{self.label}: " + ("no trial done" if best is None else f"best {best.value:.4f} (t{best.number:03d})")
        return ", ".join([told, *(f"{n} {kind}" for kind, n in self.counts().items() if n), *self.confirmation_so_far()])

    def confirmation_so_far(self) -> list[str]:
        """Return how many trainings of the confirmation are over, in words; nothing before one is."""
        keys = [Key("confirm", number, seed) for number in self._candidates() for seed in self.study.sweep.confirm_seeds]
        n_over = sum(key in self.trainings.by_key and self.trainings.by_key[key].is_over for key in keys)
        return [f"confirmation {n_over} of {len(keys)}"] if n_over else []
