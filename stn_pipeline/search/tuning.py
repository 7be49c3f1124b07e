"""Each arm of a comparison tuned by itself before it is compared: sweeps of equal budget, through the same search as any sweep.

The trials have a seed that no comparison trains with, so the seeds that are compared are fresh ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stn_pipeline.comparing.comparefile import Block, CompareConfig
from stn_pipeline.errors import ConfigError, did_you_mean
from stn_pipeline.questions import WHERE
from stn_pipeline.search.sweepfile import SweepConfig, in_words
from stn_pipeline.texts import quoted

if TYPE_CHECKING:
    from stn_pipeline.search.source import Search

TUNE_SEED = 500_000  # of every trial; a comparison's seeds must stay clear of it and of the confirmation's, which follow
KEYS = ("search", "trials", "sampler", "pruner", "objective", "confirm")
Key = tuple[Block, str]  # block and arm


def sweeps_of(config: CompareConfig) -> dict[Key, SweepConfig]:
    """Return the sweep of each arm in each block; none where the file does not ask for them, or where an arm has none of the knobs.

    Raises: ConfigError, one line that names the key.
    """
    if not config.tune:
        return {}
    for key in config.tune:
        if key not in KEYS:
            raise ConfigError(f"tune: unknown key {quoted(key)}: choose {', '.join(KEYS)}{did_you_mean(key, KEYS)}")
    if not {"search", "trials"} <= config.tune.keys():
        raise ConfigError("tune: needs search and trials, as in tune: {search: [lr, loc_lr_multiplier], trials: 20}")
    found = {}
    for block in config.blocks():
        for arm in config.arms:
            fixed = config.train | config.settings[block.setting] | config.arms[arm]
            where = {key: value for key in WHERE if (value := getattr(config, key))}
            keys = {"name": f"{config.name}-tune", "datasets": [block.dataset], "final": 0, "seed": TUNE_SEED, "train": fixed} | where
            try:
                sweep = SweepConfig.parse(keys | config.tune)
            except ConfigError as error:
                raise ConfigError(f"tune, arm {arm}: {error}") from error
            used = {seed for seed in (*config.seeds.values,) if seed in (TUNE_SEED, *sweep.confirm_seeds)}
            if used:
                raise ConfigError(f"seeds={min(used)}: is a seed that tune trains with ({TUNE_SEED} and those after it): leave it out")
            meant = config.config(block, arm, TUNE_SEED).learning_knobs()
            space = {knob: values for knob, values in sweep.search.items() if knob in meant}
            if space:  # of a classifier alone there is no localiser's rate to search
                found[block, arm] = sweep.model_copy(update={"search": space})
    return found


def tune(
    config: CompareConfig, say: Callable[[str], object], watch: Callable[[Sequence["Search"]], Callable[[], object]]
) -> dict[Key, dict[str, Any]]:
    """Tune every arm in every block, or go on with it; return the knobs that each chose.

    Raises: as search.sweep.run does.
    """
    sweeps = sweeps_of(config)
    if not sweeps:
        return {}
    from stn_pipeline.search.sweep import Wanted, run_studies

    wanted = [Wanted(sweep, block.dataset, f"{config.name} tune {block.title} {arm}") for (block, arm), sweep in sweeps.items()]
    searches = run_studies(f"{config.name}-tune", wanted, say, watch, adopts=False)
    return {key: dict(search.chosen) for key, search in zip(sweeps, searches, strict=True)}


def in_a_line(config: CompareConfig, block: Block, tuned: Mapping[Key, Mapping[str, Any]]) -> str:
    """Return what was tuned, and what each arm chose; that nothing was, where that is so."""
    sweeps = {arm: sweep for (where, arm), sweep in sweeps_of(config).items() if where == block}
    if not sweeps:
        return "Not tuned per arm: all arms are trained at the knobs of the file, which may suit one better than another."
    sweep = max(sweeps.values(), key=lambda one: len(one.search))
    space = "; ".join(f"{knob} in {in_words(values)}" for knob, values in sweep.search.items())
    chosen = ", ".join(
        f"{arm} {' '.join(f'{knob}={value:.3g}' if isinstance(value, float) else f'{knob}={value}' for knob, value in knobs.items())}"
        for arm in config.arms
        if (knobs := tuned.get((block, arm)))
    )
    return f"Tuned per arm before, {sweep.trials} trials each on validation with a seed of their own ({space}; {sweep.sampler}): {chosen}."
