"""One Optuna study on the driver's disk, owned by the driver alone: ask, report, prune, tell, and go on after any death.

Whatever can be derived from the trials is derived from them, so that a kill between two writes leaves nothing half-said.
A trial that was lost (its worker or the driver died) is FAIL with user attribute `lost`; the trial that tries the same
knobs again carries `retry_of`. What counts against the sweep's limit is the trials that are no retries.
"""

import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from stn_pipeline.config import Choices, Range, TrainConfig
from stn_pipeline.errors import ConfigError
from stn_pipeline.search.sweepfile import SweepConfig, holds

optuna.logging.set_verbosity(optuna.logging.WARNING)

REDRAWS = 100
FINITE_REDRAWS = 3  # a draw of gp takes half a second
MAX_LEFT = 1000
MEANING = "meaning"  # of a study, as user attribute: what must not change while it goes on
SPENT = "spent_s"
UNDER = "under"  # under what the study was trained, in turn: training code, torch, kind of device; and after how many trials
TOKEN = "token"
LOCKED_S = 120  # how long another program may have the study's file locked: a backup, a browser of databases


@dataclass(frozen=True)
class Asked:
    """A trial to run: its number, its knobs, the trial it tries again, if any, and whether it is the default configuration."""

    number: int
    params: dict[str, Any]
    retry_of: int | None
    is_default: bool


class Study:
    """A study of one data set.

    under: what this driver trains under and a value depends on, by name, as in {"torch": "2.9.1"}.
    Raises: ConfigError where the study on disk asks another question than `meaning`.
    """

    def __init__(self, url: str, name: str, sweep: SweepConfig, dataset: str, meaning: dict[str, str], under: dict[str, str] | None = None):
        self.name, self.sweep, self.dataset, self.under = name, sweep, dataset, under or {}
        self.space = {knob: distribution(knob, space) for knob, space in sweep.search.items()}
        self.optuna = optuna.create_study(
            storage=f"{url}?timeout={LOCKED_S}",
            study_name=name,
            direction=sweep.direction,
            load_if_exists=True,
            pruner=_pruner(sweep),
            sampler=RandomSampler(),
        )
        self._trials: dict[int, Trial] = {}
        self._started: float | None = None  # by the first ask, since the start of the workers is no search
        known = self.optuna.user_attrs.get(MEANING)
        if known is None:
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                self.optuna.set_metric_names([sweep.objective])  # what optuna-dashboard calls its axes
            self.optuna.set_user_attr(MEANING, meaning)
        else:
            _check_same_question(name, known, meaning, sweep.name)
        self._spent_before = float(self.optuna.user_attrs.get(SPENT, 0.0))

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, in order."""
        return self.optuna.get_trials(deepcopy=False)

    @property
    def n_slots(self) -> int:
        """Number of trials that count against the limit."""
        return sum("retry_of" not in trial.user_attrs for trial in self.trials)

    @property
    def token(self) -> str:
        """What the study's own run is found by; nothing before it has one."""
        return str(self.optuna.user_attrs.get(TOKEN, ""))

    @token.setter
    def token(self, token: str) -> None:
        self.optuna.set_user_attr(TOKEN, token)

    @property
    def spent_s(self) -> float:
        """Seconds spent on the study by this driver and those before it, whole or killed."""
        return self._spent_before + (0.0 if self._started is None else time.monotonic() - self._started)

    def keep_spent(self) -> None:
        """Keep the seconds spent so far, for the drivers after this one."""
        self.optuna.set_user_attr(SPENT, self.spent_s)

    @property
    def _is_out_of_time(self) -> bool:
        limit_s = self.sweep.time_limit_s
        return limit_s > 0 and self.spent_s + self._confirmation_s() > limit_s

    def _confirmation_s(self) -> float:
        """Return the seconds that the confirmation will take if it starts now: whole trainings at the pace of the trials so far."""
        complete, confirm = self.complete.values(), self.sweep.confirm
        ran = [max(trial.intermediate_values, default=0) for trial in self.trials]
        if confirm is None or not complete or not sum(ran):
            return 0.0
        epochs = sum(max(trial.intermediate_values, default=0) for trial in complete) / len(complete)
        return confirm.seeds * min(confirm.top + 1, len(complete)) * epochs * self.spent_s / sum(ran)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Under what the study was trained, in turn, each with `after`, the number of trials before it; unknown where nothing was kept."""
        known: list[dict[str, Any]] = self.optuna.user_attrs.get(UNDER, [])
        return known or ([{"after": 0}] if any(trial.state.is_finished() for trial in self.trials) else [])

    def keep_under(self) -> None:
        """Keep under what this driver trains, where that is not as before."""
        history = self.history
        if not history or {**self.under, "after": history[-1]["after"]} != history[-1]:
            self.optuna.set_user_attr(UNDER, [*history, {**self.under, "after": sum(trial.state.is_finished() for trial in self.trials)}])

    def holds(self, knob: str, value: Any) -> bool:
        """Say whether a value lies in what is searched of a knob."""
        return holds(self.sweep.search[knob], value)

    @property
    def unfinished(self) -> list[FrozenTrial]:
        """The trials that are RUNNING; before the first ask, those that an earlier driver left."""
        return [trial for trial in self.trials if trial.state == TrialState.RUNNING]

    @property
    def n_left(self) -> int:
        """Number of trials still to be started, as far as known: retries and the rest of the limit."""
        waiting = sum(trial.state == TrialState.WAITING for trial in self.trials)
        retries = len(self._to_retry(self.trials))
        new = max(0, self.sweep.trials - self.n_slots) if self.sweep.trials else 1
        if self.sweep.is_finite and self.trials:
            new = sum(1 for _ in islice(self._untried(self.trials), new))
        return waiting + retries + (0 if self._is_out_of_time else new)

    @property
    def complete(self) -> dict[int, FrozenTrial]:
        """The complete trials, the best first, each under the number by which its configuration was first tried."""
        trials, sign = self.trials, 1 if self.sweep.direction == "minimize" else -1
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        complete.sort(key=lambda trial: (sign * float(trial.value or 0.0), trial.number))
        return {_chain(trials, trial.number)[-1]: trial for trial in complete}

    @property
    def best(self) -> FrozenTrial | None:
        """The best complete trial, or None where none is."""
        return next(iter(self.complete.values()), None)

    @property
    def candidates(self) -> list[int]:
        """The configurations to confirm, by the number of their first trial: the best few distinct ones, and the default, which is 0.

        Two that differ only in knobs that their network does not have are one.
        """
        confirm, complete = self.sweep.confirm, self.complete
        if confirm is None or not complete:
            return []
        found = {str(self.config(self.trials[0].user_attrs["params"]).learning_knobs()): 0}
        best: list[int] = []
        for number, trial in complete.items():
            number = found.setdefault(str(self.config(trial.user_attrs["params"]).learning_knobs()), number)
            best += [number] * (number not in best)
            if len(best) == confirm.top:
                break
        return [*best, *([] if 0 in best else [0])]

    def config(self, params: dict[str, Any], seed: int | None = None) -> TrainConfig:
        """Return the knobs of a training."""
        return self.sweep.config(self.dataset, params, seed)

    def ask(self) -> Asked | None:
        """Return the next trial, now RUNNING, or None where there is none to start: lost ones first, then a new one."""
        if self._started is None:
            self._started = time.monotonic()
        waiting = [trial for trial in self.trials if trial.state == TrialState.WAITING]
        if not waiting:
            attributes = self._next()
            if attributes is None:
                return None
            self.optuna.enqueue_trial(self._held(attributes["params"]), user_attrs=attributes)
            waiting = [trial for trial in self.trials if trial.state == TrialState.WAITING]
        params = waiting[0].user_attrs["params"]
        trial = self.optuna.ask({knob: self.space[knob] for knob in self._held(params)})
        self._trials[trial.number] = trial
        return Asked(trial.number, params, waiting[0].user_attrs.get("retry_of"), self.is_default(trial.number))

    def _held(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the params inside what is searched: a default outside of it cannot be told to Optuna."""
        return {knob: value for knob, value in params.items() if self.holds(knob, value)}

    def _next(self) -> dict[str, Any] | None:
        """Return the user attributes of the next trial."""
        trials = self.trials
        for trial in self._to_retry(trials):
            return {"params": trial.user_attrs["params"], "retry_of": trial.number}
        if self._is_out_of_time or 0 < self.sweep.trials <= self.n_slots:
            return None
        params = self._propose(trials) if trials else self.sweep.default
        return None if params is None else {"params": params}

    def _to_retry(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        retried = {trial.user_attrs.get("retry_of") for trial in trials}
        return [trial for trial in trials if trial.number not in retried and self._deserves_retry(trial)]

    def _deserves_retry(self, trial: FrozenTrial) -> bool:
        """Say whether a lost trial is to be tried again: always, but once only where its knobs may have killed the worker."""
        lost = trial.user_attrs.get("lost")
        if trial.state != TrialState.FAIL or lost is None:
            return False
        by_worker = [number for number in self.chain(trial.number) if self.trials[number].user_attrs.get("lost") == "worker"]
        return lost != "worker" or len(by_worker) == 1

    def chain(self, number: int) -> list[int]:
        """Return a trial and those that it tries again, the first one last."""
        return _chain(self.trials, number)

    def is_default(self, number: int) -> bool:
        """Say whether a trial is the default configuration."""
        return self.chain(number)[-1] == 0

    def _propose(self, trials: list[FrozenTrial]) -> dict[str, Any] | None:
        """Return knobs that were not tried and go together, or None where none are left.

        Drawn in a copy in memory, so that a rejected draw leaves no trial in the study.
        """
        tried = [trial.user_attrs["params"] for trial in trials]
        if self.sweep.is_finite and next(self._untried(trials), None) is None:
            return None
        if self.sweep.sampler != "grid":
            copy = optuna.create_study(
                study_name=self.name, direction=self.sweep.direction, pruner=self.optuna.pruner, sampler=self._sampler(len(trials))
            )
            copy.add_trials([trial if set(trial.params) == set(self.space) else _placeholder() for trial in trials])
            redraws = FINITE_REDRAWS if self.sweep.is_finite else REDRAWS
            for _ in range(redraws + (len(trials) if self.sweep.sampler == "qmc" else 0)):
                params = copy.ask(self.space).params
                if params not in tried and self._go_together(params):
                    return params
        left = list(islice(self._untried(trials), MAX_LEFT)) if self.sweep.is_finite else []
        return random.Random(self.sweep.seed + len(trials)).choice(left) if left else None

    def _untried(self, trials: list[FrozenTrial]) -> Iterator[dict[str, Any]]:
        """Return the combinations that are left, where there are only so many."""
        tried = [trial.user_attrs["params"] for trial in trials]
        return (params for params in self.sweep.combinations() if params not in tried and self._go_together(params))

    def _go_together(self, params: dict[str, Any]) -> bool:
        try:
            self.config(params)
        except ConfigError:
            return False
        return True

    def _sampler(self, n_trials: int) -> BaseSampler:
        seed = self.sweep.seed + 1000 * n_trials  # the same seed again would draw the same values again
        with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
            if self.sweep.sampler == "tpe":
                return TPESampler(seed=seed, multivariate=True, constant_liar=True)
            if self.sweep.sampler == "gp":
                return GPSampler(seed=seed)
            if self.sweep.sampler == "qmc":
                return QMCSampler(seed=self.sweep.seed, scramble=True, warn_independent_sampling=False)
            return RandomSampler(seed=seed)

    def started(self, number: int, run_id: str) -> None:
        """Note the run of a trial."""
        self._trials[number].set_user_attr("run_id", run_id)

    def report(self, number: int, epoch: int, best_so_far: float) -> bool:
        """Tell an epoch's best value so far; say whether the pruner lets the trial go on."""
        trial = self._trials[number]
        trial.report(best_so_far, epoch)
        if self.sweep.time_limit_s:
            self.keep_spent()
        return not trial.should_prune()

    def end(self, number: int, state: str, value: float | None = None, **attributes: Any) -> None:
        """Tell how a running trial ended: COMPLETE with its value, PRUNED, or FAIL."""
        for name, content in attributes.items():
            self.optuna._storage.set_trial_user_attr(self.trials[number]._trial_id, name, content)
        self.optuna.tell(number, value if state == "COMPLETE" else None, state=TrialState[state])
        self.keep_spent()


def _chain(trials: list[FrozenTrial], number: int) -> list[int]:
    numbers = [number]
    while (earlier := trials[numbers[-1]].user_attrs.get("retry_of")) is not None:
        numbers.append(earlier)
    return numbers


def _placeholder() -> FrozenTrial:
    """Return a trial that says nothing, in the place of one that a sampler could not read."""
    return create_trial(state=TrialState.FAIL)


def distribution(knob: str, space: Range | Choices) -> BaseDistribution:
    """Return Optuna's form of what is searched of a knob."""
    if isinstance(space, Choices):
        return CategoricalDistribution(space.values)
    if TrainConfig.model_fields[knob].annotation is int:
        return IntDistribution(int(space.low), int(space.high), log=space.log)
    return FloatDistribution(space.low, space.high, log=space.log)


def _pruner(sweep: SweepConfig) -> BasePruner:
    if sweep.pruner == "hyperband":
        epochs = sweep.search.get("epochs")
        most = sweep.train.get("epochs", TrainConfig.model_fields["epochs"].default)
        if epochs is not None:
            most = epochs.high if isinstance(epochs, Range) else max(epochs.values)
        return HyperbandPruner(min_resource=1, max_resource=int(most), reduction_factor=3)
    if sweep.pruner == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=2)  # steps start at 1
    return NopPruner()


def _check_same_question(name: str, known: dict[str, str], asked: dict[str, str], sweep: str) -> None:
    for key in sorted(known.keys() | asked.keys()):
        if known.get(key) != asked.get(key):
            before, now = known.get(key, "not there"), asked.get(key, "not there")
            raise ConfigError(
                f"{key}: was {before} when study {name} began, now {now}: restore it, or begin another study (--name {sweep}-2)"
            )
