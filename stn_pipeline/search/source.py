"""A study as a source of jobs: its trials, then the winner and the default again with fresh seeds; each one MLflow run.

Everything that survives a kill lies in the study and in the runs' tags; `recover` brings the two together again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stn_pipeline.config import TrainConfig
from stn_pipeline.jobs import Job, Outcome, Training, Trainings, times
from stn_pipeline.search.study import Asked, Study
from stn_pipeline.search.sweepfile import short
from stn_pipeline.texts import markdown
from stn_pipeline.tracking import CHILD_OF, Run, create_run, search_runs
from stn_pipeline.training import Record

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


@dataclass
class Trial:
    """A trial that runs: what was asked, its run, and its best value so far."""

    asked: Asked
    run: Run
    best: float | None = None


class Search:
    """One study, run to its end: a Source for `drive`.

    `say` is told a line for the console when a job ends.
    """

    def __init__(self, study: Study, parent: Run, experiment: str, label: str, say: Callable[[str], object]):
        self.study, self.parent, self.experiment, self.label, self.say = study, parent, experiment, label, say
        self.running: dict[str, Trial] = {}
        self.trainings: Trainings[tuple[int, int]] = Trainings()  # the final ones, by trial number and seed

    def recover(self) -> None:
        """Close what an earlier driver left open: its trials are lost, their runs end as the study says."""
        for trial in self.study.unfinished:
            self.study.end(trial.number, "FAIL", lost="driver")
        states = {trial.number: trial.state.name for trial in self.study.trials}
        for child in search_runs({CHILD_OF: self.parent.id}):
            tags, run, number = child.data.tags, Run(child.info.run_id), int(child.data.tags.get("trial", -1))
            if tags.get("stage") == "final":
                self.trainings.adopt((number, int(tags["seed"])), child)
            elif child.info.status == "RUNNING":
                state = states.get(number, "FAIL")
                if state == "COMPLETE":
                    run.log_metrics({f"best/{self.study.sweep.objective}": float(self.study.trials[number].value or 0.0)})
                self._close(run, state, "" if state != "FAIL" else "Lost: the driver was stopped; a later trial tries it again.")

    @property
    def n_left(self) -> int:
        """Number of jobs still to be started or ended, as far as known."""
        return self.study.n_left + len(self.running) + len(self.trainings.running) + len(self._missing_finals(planned=True))

    @property
    def finals(self) -> dict[tuple[int, int], Training]:
        """The final trainings, by trial number and seed."""
        return self.trainings.by_key

    @property
    def winner(self) -> int | None:
        """Number under which the best complete trial was first tried; 0 is the default configuration."""
        best = self.study.best
        return None if best is None else self.study.chain(best.number)[-1]

    # what to do next

    def next(self) -> Job | None:
        """Return the next trial, or once all have ended the next final training."""
        asked = self.study.ask()
        if asked is not None:
            return self._trial_job(asked)
        if self.running:
            return None
        missing = self._missing_finals()
        return self._final_job(*missing[0]) if missing else None

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

    def _missing_finals(self, planned: bool = False) -> list[tuple[int, int]]:
        """Return trial and seed of the final trainings that are not done, a pair after another."""
        sweep = self.study.sweep
        if self.winner is None:
            return [(0, 0)] * 2 * sweep.final if planned else []
        numbers = dict.fromkeys((self.winner, 0))
        wanted = [(number, sweep.seed + 1 + i) for i in range(sweep.final) for number in numbers]
        return [key for key in wanted if self.trainings.is_open(key)]

    def _final_job(self, number: int, seed: int) -> Job:
        params = self.study.trials[number].user_attrs["params"]
        config = self.study.config(params, seed)
        arm = "default" if number == 0 else "tuned"
        run = self.trainings.again((number, seed))
        if run is None:
            tags = {"stage": "final", "arm": arm, "state": "RUNNING", "trial": str(number), "seed": str(seed), "study": self.study.name}
            run = self._create(f"{self.label} final {arm} s{seed} {short(params)}", config, tags)
        return self.trainings.job((number, seed), f"{self.study.name} final {arm} s{seed}", config, run)

    def _create(self, name: str, config: TrainConfig, tags: dict[str, str]) -> Run:
        return create_run(name, self.experiment, config, tags, self.parent.id)

    # what is heard

    def epoch(self, job: Job, record: Record) -> bool:
        """Report a trial's best value so far; say whether it shall go on, as the default configuration always does."""
        if job.key not in self.running:
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
            self.say(f"{job.key}: {self.trainings.ended(job, outcome)}")

    def _trial_ended(self, job: Job, work: Trial, outcome: Outcome) -> None:
        objective, number = self.study.sweep.objective, work.asked.number
        trial = self.study.trials[number]
        epochs = max(trial.intermediate_values, default=0)
        so_far = "no epoch" if work.best is None else f"{objective} {work.best:.4f}"
        if outcome.kind == "done":
            before = self.study.best
            self.study.end(number, "COMPLETE", work.best)
            work.run.log_metrics(times(outcome) | {f"best/{objective}": work.best or 0.0})
            better = " (best so far)" if self.study.best != before else ""
            text, state, note = f"{so_far}{better}", "COMPLETE", f"**{so_far}**, the best of {epochs} epochs."
        elif outcome.kind == "stopped":
            self.study.end(number, "PRUNED")
            text = f"pruned after {epochs} of {job.config.epochs} epochs, {so_far}"
            state, note = "PRUNED", f"**Pruned** after {epochs} of {job.config.epochs} epochs: {so_far}, behind the others by then."
        elif outcome.kind == "failed":
            self.study.end(number, "FAIL", reason=outcome.reason)
            work.run.tag({"error": outcome.reason})
            text, state, note = f"failed: {outcome.reason}", "FAIL", f"**Failed.** {markdown(outcome.reason)}"
        else:
            self.study.end(number, "FAIL", lost="worker" if outcome.kind == "lost" else "driver", reason=outcome.reason)
            work.run.tag({"error": outcome.reason})
            text, state = f"lost after {epochs} epochs: {outcome.reason.splitlines()[0]}", "FAIL"
            note = f"**Lost.** {markdown(outcome.reason)}"
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
        return ", ".join([told, *(f"{n} {kind}" for kind, n in self.counts().items() if n)])

    def pairs(self, what: str) -> tuple[list[float], list[float]]:
        """Return a test figure of the winner and of the default, seed by seed, where both are there."""
        both: list[tuple[float, float]] = []
        for seed in sorted({seed for _, seed in self.finals}):
            found: list[Any] = [self.finals.get((number or 0, seed)) for number in (self.winner, 0)]
            if all(final is not None and final.figures is not None for final in found):
                both.append((found[0].figures[what], found[1].figures[what]))
        return [tuned for tuned, _ in both], [default for _, default in both]
