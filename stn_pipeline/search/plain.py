"""The sweep that people write first, as the reference to time ours against: Optuna's own loop, one trial at a time, no pruning."""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import optuna

from stn_pipeline.search.study import distribution
from stn_pipeline.search.sweepfile import SweepConfig


def plain_sweep(sweep: SweepConfig, epochs: int, train: Callable[[dict[str, Any]], Iterator[float]]) -> list[tuple[float, float]]:
    """Return seconds since the start and validation loss after each epoch of each trial, the default configuration first.

    `train` yields the validation loss after each epoch with these knobs.
    """
    space = {knob: distribution(knob, searched) for knob, searched in sweep.search.items()}
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=sweep.seed))
    study.enqueue_trial(sweep.default)
    heard: list[tuple[float, float]] = []
    started = time.perf_counter()

    for _ in range(sweep.trials):
        trial = study.ask(space)
        losses = []
        for loss in islice(train(trial.params), epochs):
            losses.append(loss)
            heard.append((time.perf_counter() - started, loss))
        study.tell(trial, min(losses))
    return heard
