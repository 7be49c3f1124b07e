"""A comparison from the check of its data to the answer on its page."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from stn_pipeline import tracking
from stn_pipeline.comparing.answer import answers_of
from stn_pipeline.comparing.comparefile import Block, CompareConfig
from stn_pipeline.comparing.measures import measures_of
from stn_pipeline.comparing.page import publish, told
from stn_pipeline.comparing.source import Cell, Comparison
from stn_pipeline.comparing.trained import differences, single_pairs, where
from stn_pipeline.data import Splits, load
from stn_pipeline.errors import ConfigError
from stn_pipeline.jobs import Place, drive, only_driver, place
from stn_pipeline.questions import WHERE, in_keys
from stn_pipeline.tracking import Run
from stn_pipeline.training.engine import Engine, dry_run, with_one_engine
from stn_pipeline.training.fingerprint import conditions, fingerprint

SAME_QUESTION, N_SEEDS = "comparison.question", "comparison.seeds"  # tags of a published answer


class Tuned(NamedTuple):
    """What arms chose for themselves before: knobs by block and arm; and what is told of it, a line a block."""

    knobs: Mapping[tuple[Block, str], dict[str, Any]] = {}
    told: Sequence[str] = ()


def run(
    config: CompareConfig,
    say: Callable[[str], object],
    watch: Callable[[Sequence[Comparison]], Callable[[], object]],
    command: str = "",
    tuned: Tuned | None = None,
) -> None:
    """Run a comparison to its end, or go on with it.

    `say` is told lines for the console; `watch` is given the comparison and returns what is called twice a second;
    `command` is shown in the report; `tuned` are the knobs that arms chose for themselves, and what is told of that by block.
    Raises: UserError before anything is started; JobError where a training breaks in our own code; AwayError where the
        tracking server stays away.
    """
    with only_driver("compare", config.name), place(config, say) as somewhere:
        cells = _cells(config, somewhere, say, tuned or Tuned())
        with tracking.reachable():
            experiment = tracking.experiment_id()
            parent, experiment = _parent(config, cells, experiment)
        with tracking.closing(parent, parent.close):
            comparison = Comparison(config, cells, parent, experiment, say)
            comparison.recover()
            for line in _opening(comparison):
                say(line)
            comparison.take_looks()
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
            _publish(comparison, command, tuned or Tuned())


def _publish(comparison: Comparison, command: str, tuned: Tuned) -> None:
    """Put the answers on the comparison's run, and say them."""
    config = comparison.config
    knobs = {cell.block: cell.config for cell in reversed(comparison.cells)}  # those of its first cell
    blocks, data, pairs = [], {}, {}
    for block in comparison.blocks:
        title, table = block.title, comparison.table(block)
        data[title], pairs[title] = knobs[block], single_pairs(table, config.baseline)
        blocks.append((title, where([cell.config for cell in comparison.cells if cell.block == block], title), table))
    answers = answers_of(
        blocks, config.baseline, config.rules, config.seeds.values, comparison.look,
        measures=measures_of(config.decide), claims=config.claims,
    )  # fmt: skip
    caveats = (*config.caveats, *_earlier_looks(comparison))
    before = tuned.told or [""] * len(answers)
    answers = [
        replace(one, single_pairs=pairs[one.title], caveats=tuple(filter(None, (told, *caveats, *differences(one)))))
        for one, told in zip(answers, before, strict=True)
    ]
    publish(
        comparison.parent, answers, f"compare {config.name}", config.question, command,
        lambda answer: load(data[answer.title], announce=lambda line: None), config.seeds.looks,
    )  # fmt: skip
    n_seeds = config.seeds.at_looks[comparison.look - 1]
    comparison.parent.tag({SAME_QUESTION: _digest(config, comparison.cells, with_seeds=False), N_SEEDS: str(n_seeds)})
    for line in told(answers):
        comparison.say(line)
    comparison.say(f"run {comparison.parent.id}: report.html is among its artifacts")


def _earlier_looks(comparison: Comparison) -> list[str]:
    """Tell of answers to the same question that were published with fewer seeds: each was a chance to find something."""
    question = _digest(comparison.config, comparison.cells, with_seeds=False)
    n_seeds = comparison.config.seeds.at_looks[comparison.look - 1]
    found = [record for record in tracking.search_runs({SAME_QUESTION: question}) if record.info.run_id != comparison.parent.id]
    before = sorted({n for record in found if (n := int(record.data.tags[N_SEEDS])) < n_seeds})
    if not before:
        return []
    looks = ", ".join(map(str, before))
    return [
        f"This question was answered before with {looks} seeds: this is look {len(before) + 1}, and p is not corrected for that. "
        f"Planned looks (seeds: {{looks: [{looks}, {n_seeds}]}}) are."
    ]


def _cells(config: CompareConfig, somewhere: Place, say: Callable[[str], object], tuned: Tuned) -> list[Cell]:
    """Return the trainings, a seed of all arms after another, so that what is stopped early has whole pairs.

    Every data set is loaded and every network built once, so that nothing is found wrong after hours.
    """
    cells = []
    known: dict[str, Splits] = {}
    compiling: dict[tuple[Block, str], dict[str, Any]] = {}
    engines: dict[tuple[Block, str], Engine] = {}
    for seed in config.seeds.values:
        known.clear()  # a split for each seed, but never those of two at once
        is_first = seed == config.seeds.values[0]
        for block in config.blocks():
            asked = {arm: config.config(block, arm, seed, tuned.knobs.get((block, arm))) for arm in config.arms}
            devices = {arm: somewhere.resolve(knobs.device, knobs.precision) for arm, knobs in asked.items()}
            for knobs in asked.values():
                if knobs.data not in known:
                    known[knobs.data] = load(knobs, announce=say if is_first else lambda line: None)
            _check_images(block, {arm: known[knobs.data] for arm, knobs in asked.items()})
            if is_first:
                chosen = with_one_engine([(knobs, known[knobs.data], devices[arm]) for arm, knobs in asked.items()], say)
                compiling |= {(block, arm): {"compile": knobs.compile} for arm, knobs in zip(asked, chosen, strict=True)}
            for arm, knobs in asked.items():
                splits, device = known[knobs.data], devices[arm]
                knobs = knobs.model_copy(update={"dataset": splits.dataset} | compiling[block, arm])
                if is_first:
                    engines[block, arm] = dry_run(knobs, splits, device, say)
                name = fingerprint(knobs, splits, conditions(engines[block, arm], device))
                cells.append(Cell(Block(splits.dataset, block.setting), arm, seed, knobs, name))
    names = {(in_keys(cell.block.title), cell.arm, cell.seed) for cell in cells}
    if len(names) < len(cells):
        raise ConfigError(f"datasets={', '.join(config.datasets)}: two of them have one name: leave one out, or rename a folder")
    return cells


def _check_images(block: Block, splits: dict[str, Splits]) -> None:
    """Check that all arms of a block are tested on the same images: the file's keys say so, and the pixels must."""
    tested: dict[str, str] = {}
    for arm, own in splits.items():
        tested.setdefault(own.digests()["test"], arm)
    if len(tested) > 1:
        raise ConfigError(
            f"arms {' and '.join(tested.values())}: their test images differ on {block.dataset}, so nothing can be compared: "
            "were the files changed just now? else put what differs under settings:"
        )


def _parent(config: CompareConfig, cells: list[Cell], experiment: str) -> tuple[Run, str]:
    """Return the comparison's own run, and its experiment: the one it had, the one that `mlflow run` made, or a new one."""
    name, tags = f"compare {config.name}", {"stage": "compare", "comparison": config.name, "comparison.asked": _digest(config, cells)}
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


def _digest(config: CompareConfig, cells: list[Cell], *, with_seeds: bool = True) -> str:
    """Return a digest of what is asked; without seeds, of all that stays the same when only more of them are trained."""
    if with_seeds:
        asked = {key: value for key, value in config.plain().items() if key not in WHERE}
        asked["cells"] = [cell.fingerprint for cell in cells]
    else:
        first = config.seeds.values[0]
        asked = {"baseline": config.baseline, "decide": config.decide}
        asked["arms"] = [[*cell.block, cell.arm, cell.config.learning_knobs() | {"seed": 0}] for cell in cells if cell.seed == first]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _opening(comparison: Comparison) -> list[str]:
    config = comparison.config
    cells, n_blocks = {cell.fingerprint for cell in comparison.cells}, len(comparison.blocks)
    seeds = " or ".join(map(str, config.seeds.at_looks))
    told = f"compare {config.name}: {', '.join(config.arms)} (baseline {config.baseline}), {seeds} seeds"
    told += f", {n_blocks} times (data sets, settings)" if n_blocks > 1 else ""
    lines = [f"{told}: {'at most ' * bool(config.seeds.looks)}{len(cells)} trainings; run {comparison.parent.id}"]
    n_own = sum(training.is_over for training in comparison.trainings.by_key.values()) - len(comparison.reused)
    if n_own or comparison.reused:
        lines.append(f"going on: {n_own} done before, {len(comparison.reused)} runs of others with the same knobs, seed, data and code")
    if len(config.seeds.values) == 1:
        lines.append("one seed says nothing about noise: give seeds: 2 or more for an interval")
    return lines
