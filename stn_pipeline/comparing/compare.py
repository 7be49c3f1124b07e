"""A comparison from the check of its data to the answer on its page."""

import hashlib
import json
from collections.abc import Callable, Sequence

from stn_pipeline import tracking
from stn_pipeline.comparing.answer import Answer
from stn_pipeline.comparing.comparefile import Block, CompareConfig
from stn_pipeline.comparing.page import publish, told
from stn_pipeline.comparing.source import Cell, Comparison
from stn_pipeline.comparing.trained import single_pairs
from stn_pipeline.data import Splits, load
from stn_pipeline.errors import ConfigError
from stn_pipeline.jobs import Place, drive, only_driver, place
from stn_pipeline.questions import WHERE, in_keys
from stn_pipeline.tracking import Run
from stn_pipeline.training.engine import rehearse
from stn_pipeline.training.fingerprint import fingerprint


def run(
    config: CompareConfig,
    say: Callable[[str], object],
    watch: Callable[[Sequence[Comparison]], Callable[[], object]],
    command: str = "",
) -> None:
    """Run a comparison to its end, or go on with it.

    `say` is told lines for the console; `watch` is given the comparison and returns what is called twice a second;
    `command` is shown in the report.
    Raises: UserError before anything is started; JobError where a training breaks in our own code; AwayError where the
        tracking server stays away.
    """
    with only_driver("compare", config.name), place(config, say) as somewhere:
        cells = _cells(config, somewhere, say)
        with tracking.reachable():
            experiment = tracking.experiment_id()
            parent, experiment = _parent(config, cells, experiment)
        with tracking.closing(parent, parent.close):
            comparison = Comparison(config, cells, parent, experiment, say)
            comparison.recover()
            for line in _opening(comparison):
                say(line)
            if comparison.n_left:
                pool = somewhere.pool(comparison.n_left)
                say(str(pool))
                try:
                    with tracking.watched(tracking.store(), say):
                        drive(comparison, pool, watch([comparison]))
                except KeyboardInterrupt:
                    with tracking.in_a_hurry():
                        parent.describe("**Interrupted.** The same command goes on with it.")
                    raise
                pool.close()
                tracking.close_orphans(parent)
            _publish(comparison, command)


def _publish(comparison: Comparison, command: str) -> None:
    """Put the answers on the comparison's run, and say them."""
    config = comparison.config
    blocks = {cell.block: cell.config for cell in reversed(comparison.cells)}  # with the knobs of its first cell
    answers, data = [], {}
    for block in dict.fromkeys(cell.block for cell in comparison.cells):
        table = comparison.table(block)
        title = block.title
        answers.append(Answer(title, table, config.baseline, config.claims, single_pairs(table, config.baseline)))
        data[title] = blocks[block]
    title = f"compare {config.name}"
    publish(
        comparison.parent, answers, title, config.question, command, lambda answer: load(data[answer.title], announce=lambda line: None)
    )
    for line in told(answers):
        comparison.say(line)
    comparison.say(f"run {comparison.parent.id}: report.html is among its artifacts")


def _cells(config: CompareConfig, somewhere: Place, say: Callable[[str], object]) -> list[Cell]:
    """Return the trainings, a seed of all arms after another, so that what is stopped early has whole pairs.

    Every data set is loaded and every network built once, so that nothing is found wrong after hours.
    """
    cells = []
    known: dict[str, Splits] = {}
    for seed in config.seeds:
        known.clear()  # a split for each seed, but never those of two at once
        for block in config.blocks():
            for arm in config.arms:
                knobs = config.config(block, arm, seed)
                device = somewhere.resolve(knobs.device, knobs.precision)
                if knobs.data not in known:
                    known[knobs.data] = load(knobs, announce=say if seed == config.seeds[0] else lambda line: None)
                splits = known[knobs.data]
                if seed == config.seeds[0]:
                    rehearse(knobs, splits, device, say)
                knobs = knobs.model_copy(update={"dataset": splits.dataset})
                cells.append(Cell(Block(splits.dataset, block.setting), arm, seed, knobs, fingerprint(knobs, splits, device)))
    names = {(in_keys(cell.block.title), cell.arm, cell.seed) for cell in cells}
    if len(names) < len(cells):
        raise ConfigError(f"datasets={', '.join(config.datasets)}: two of them have one name: leave one out, or rename a folder")
    return cells


def _parent(config: CompareConfig, cells: list[Cell], experiment: str) -> tuple[Run, str]:
    """Return the comparison's own run, and its experiment: the one it had, the one that `mlflow run` made, or a new one."""
    asked = {key: value for key, value in config.plain().items() if key not in WHERE}
    asked |= {"workers": 0, "cells": [cell.fingerprint for cell in cells]}  # workers: 0, as it was when comparisons were first named
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    name, tags = f"compare {config.name}", {"stage": "compare", "comparison": config.name, "comparison.asked": digest}
    known = tracking.search_runs(tags)
    if known:
        run = Run(known[-1].info.run_id)
        run.reopen()
        if (made := tracking.adopt_run(f"{name} again", config, {})) is not None:
            made.describe(f"The comparison goes on in its own run, `{run.id}`.")
        return run, str(known[-1].info.experiment_id)
    run = tracking.adopt_run(name, config, tags) or tracking.create_run(name, experiment, config, tags)
    run.tag(tracking.environment())
    return run, experiment


def _opening(comparison: Comparison) -> list[str]:
    config = comparison.config
    cells, n_blocks = {cell.fingerprint for cell in comparison.cells}, len(set(cell.block for cell in comparison.cells))
    told = f"compare {config.name}: {', '.join(config.arms)} (baseline {config.baseline}), {len(config.seeds)} seeds"
    told += f", {n_blocks} times (data sets, settings)" if n_blocks > 1 else ""
    lines = [f"{told}: {len(cells)} trainings; run {comparison.parent.id}"]
    n_own = sum(training.is_over for training in comparison.trainings.by_key.values()) - len(comparison.reused)
    if n_own or comparison.reused:
        lines.append(f"going on: {n_own} done before, {len(comparison.reused)} runs of others with the same knobs, seed, data and code")
    if len(config.seeds) == 1:
        lines.append("one seed says nothing about noise: give seeds: 2 or more for an interval")
    return lines
