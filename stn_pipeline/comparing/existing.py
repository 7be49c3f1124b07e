"""Runs that exist already as arms: found by an MLflow filter, told apart by knobs or tags, paired by seed."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from stn_pipeline import tracking
from stn_pipeline.comparing.answer import Answer, answers_of
from stn_pipeline.comparing.arms import Trained
from stn_pipeline.comparing.comparefile import MOST_TITLE, ExistingConfig, check_claims, check_titles
from stn_pipeline.comparing.measures import measures_of
from stn_pipeline.comparing.page import publish, told
from stn_pipeline.comparing.trained import differences, single_pairs, trained, where
from stn_pipeline.config import TEST_IMAGES, TrainConfig, default_of, short_name
from stn_pipeline.data import Splits, load
from stn_pipeline.errors import ConfigError, RunError, StnError, did_you_mean
from stn_pipeline.questions import check_in_keys
from stn_pipeline.tracking import RunRecord

PAIRED_BY = ("dataset", "seed")  # data sets are compared one by one, seeds with each other


class Found(NamedTuple):
    """A whole training: the arm it is of, its knobs, and what came of it."""

    arm: str
    config: TrainConfig
    trained: Trained


def compare_existing(asked: ExistingConfig, say: Callable[[str], object], command: str = "") -> None:
    """Compare runs that exist, as one new run with the answer on its page.

    Raises: UserError where the filter finds too little, or more than arms and seeds tell apart.
    """
    _check_filter(asked)
    found = _found(asked, say)
    baseline = _baseline(asked, [one.arm for one in found])
    check_claims(asked.claims, dict.fromkeys(one.arm for one in found), baseline)
    check_in_keys(f"by={', '.join(asked.by)}", dict.fromkeys(one.arm for one in found), MOST_TITLE)
    blocks, data, pairs = [], {}, {}
    names = Counter(short_name(dataset) for dataset in {one.config.dataset for one in found})
    for dataset in dict.fromkeys(one.config.dataset for one in found):
        own = [one for one in found if one.config.dataset == dataset]
        table: dict[str, dict[int, Trained]] = {arm: {} for arm in dict.fromkeys(one.arm for one in found)}
        for one in own:  # oldest first: of several the newest stays
            table[one.arm][one.config.seed] = one.trained
        n_older = len(own) - sum(map(len, table.values()))
        title = short_name(dataset) if names[short_name(dataset)] == 1 else dataset
        if n_older:
            say(f"{title}: {n_older} runs have the arm and seed of a newer one and are left out")
        if not table[baseline] or not any(table[arm] for arm in table if arm != baseline):
            say(f"{title}: has no run of {baseline} beside another arm and is left out")
            continue
        _check_images(asked, title, table)
        blocks.append((title, where([one.config for one in own], title), table))
        data[title], pairs[title] = own[0].config, single_pairs(table, baseline)
    if not blocks:
        raise RunError(f"runs={asked.runs}: on no data set is there {baseline} and another arm: widen the filter")
    check_titles([title for title, _, _ in blocks])
    seeds = sorted({one.config.seed for one in found})
    shared = {"measures": measures_of(asked.decide), "claims": asked.claims}
    answers = answers_of(blocks, baseline, asked.rules, seeds, None, **shared)
    caveats = ("The runs were chosen by a filter after they were trained: an answer is worth what that choice is.", *_outcomes(asked.runs))
    answers = [replace(one, single_pairs=pairs[one.title], caveats=(*caveats, *differences(one))) for one in answers]

    def splits(answer: Answer) -> Splits | None:
        try:
            return load(data[answer.title], announce=lambda line: None)
        except StnError:
            return None  # the data are not here; the report does without that picture

    with tracking.reachable():
        name = f"compare by {', '.join(asked.by)}"
        tags = {"stage": "compare"}
        run = tracking.adopt_run(name, asked, tags) or tracking.create_run(name, tracking.experiment_id(), asked, tags)
    with tracking.closing(run, run.close):
        run.tag(tracking.environment())
        publish(run, answers, name, asked.runs, command, splits)
    for line in told(answers):
        say(line)
    say(f"run {run.id}: report.html is among its artifacts")


def _check_filter(asked: ExistingConfig) -> None:
    if re.search(r"\bmetrics?\s*\.", _without_values(asked.runs)):
        raise ConfigError(
            f"runs={asked.runs}: filters on metrics, which chooses runs by their outcome, so any difference could be had: "
            "filter by params, tags and attributes"
        )


def _without_values(words: str) -> str:
    """Return a filter without what it quotes: a value may be any word."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", words)


def _outcomes(words: str) -> list[str]:
    """Return what is to be known of a filter that may leave out what went wrong."""
    if re.search(r"\bstatus\b", _without_values(words)):
        return ["The filter asks for a status, so trainings that diverged may be left out: do not trust its counts of lost ones."]
    return []


def _check_images(asked: ExistingConfig, title: str, table: dict[str, dict[int, Trained]]) -> None:
    """Check that the runs of a seed were scored on the same images."""
    for seed in {seed for by_seed in table.values() for seed in by_seed}:
        tested: dict[str, str] = {}
        for arm, by_seed in table.items():
            if seed in by_seed and by_seed[seed].state == "done":
                tested.setdefault(by_seed[seed].digests.get("test", "unknown"), arm)
        if len(tested) > 1:
            raise RunError(
                f"runs={asked.runs}: {' and '.join(tested.values())} were scored on different test images of {title} (seed {seed}): "
                "compare runs of the same images, or score them with eval on the same"
            )


def _found(asked: ExistingConfig, say: Callable[[str], object]) -> list[Found]:
    records = tracking.filter_runs(asked.runs)
    whole = [(record, config) for record in records if (config := _training(record)) is not None]
    if not whole:
        raise RunError(f"runs={asked.runs}: finds {len(records)} runs and no whole training among them: write another filter")
    if len(whole) < len(records):
        n_others = len(records) - len(whole)
        say(f"{n_others} of the {len(records)} runs found are no whole trainings (trials, sweeps, evaluations) and are left out")
    found = [Found(_arm(asked.by, record, config), config, trained(record)) for record, config in whole]
    _check_alike(asked, found)
    versions = {record.data.tags["version.code"] for record, _ in whole if "version.code" in record.data.tags}
    if len(versions) > 1:
        say(f"the runs come from {len(versions)} versions of the training code ({', '.join(sorted(versions))})")
    return found


def _check_alike(asked: ExistingConfig, found: list[Found]) -> None:
    """Check that nothing but what was named tells the arms apart; where a tag was named, that each arm is one network."""
    by_tag = bool(set(asked.by) - TrainConfig.model_fields.keys())
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault((one.config.dataset, one.arm if by_tag else ""), []).append(one.config.learning_knobs())
    for knob in sorted(TEST_IMAGES & set(asked.by) - {"dataset"}):
        if len({str(getattr(one.config, knob)) for one in found}) > 1:
            raise ConfigError(
                f"by={knob}: decides the test images, so nothing could be compared: compare at one {knob}, or score runs with eval"
            )
    for knob in TrainConfig.model_fields:
        for (_, arm), meanings in groups.items():
            values = Counter(str(meaning[knob]) for meaning in meanings if knob in meaning)
            if len(values) > 1 and knob not in (*asked.by, *PAIRED_BY):
                counts = ", ".join(f"{value} in {n}" for value, n in values.most_common())
                where = f"in all runs of {arm}" if arm else "in all"
                way_out = f"narrow the filter, or put {knob} into --by"
                raise RunError(f"runs={asked.runs}: {knob} is not the same {where} ({counts} runs): {way_out}")


def _training(record: RunRecord) -> TrainConfig | None:
    """Return the knobs of a run that is a whole training, or was meant to be one; None for any other run."""
    tags, params = record.data.tags, record.data.params
    if tags.get("stage") in ("trial", "confirm", "sweep", "compare") or "seed" not in params or record.info.status == "RUNNING":
        return None
    values: dict[str, Any] = {name: value for name, value in params.items() if name in TrainConfig.model_fields}
    try:
        return TrainConfig.parse(values | ({"dataset": tags["dataset_used"]} if "dataset_used" in tags else {}))
    except ConfigError:
        return None


def _arm(by: tuple[str, ...], record: RunRecord, config: TrainConfig) -> str:
    words = []
    for name in by:
        if name in TrainConfig.model_fields:
            value = str(getattr(config, name))
            value = value.lower() if value in ("True", "False") else value
        elif name in record.data.tags:
            value = record.data.tags[name]
        else:
            raise RunError(
                f"by={name}: is no knob, and run {record.info.run_id} has no such tag{did_you_mean(name, TrainConfig.model_fields)}"
            )
        words.append(value if len(by) == 1 else f"{name}={value}")
    return " ".join(words)


def _baseline(asked: ExistingConfig, arms: list[str]) -> str:
    names = list(dict.fromkeys(arms))
    if len(names) < 2:
        raise RunError(
            f"by={', '.join(asked.by)}: all {len(arms)} runs are of one arm ({names[0]}): widen the filter, or choose another knob"
        )
    if asked.baseline in names:
        return asked.baseline
    if asked.baseline:
        raise ConfigError(f"baseline={asked.baseline}: is no arm here: choose {', '.join(names)}{did_you_mean(asked.baseline, names)}")
    fields = TrainConfig.model_fields
    defaults = [default_of(fields[name]) for name in asked.by if name in fields]
    usual = defaults[0] if len(asked.by) == 1 and defaults else " ".join(f"{n}={d}" for n, d in zip(asked.by, defaults, strict=False))
    if usual in names:
        return usual
    raise ConfigError(f"baseline: missing; none of the arms is the default: choose {', '.join(names)}")
