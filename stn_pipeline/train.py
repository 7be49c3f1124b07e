"""Train one network and evaluate it, as one MLflow run: `python -m stn_pipeline.train --transform diffeo`."""

from collections.abc import Sequence
from contextlib import ExitStack

from stn_pipeline import cli
from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import ConfigError, DataError
from stn_pipeline.texts import say

RESUME_HELP = (
    "id of an interrupted run to go on with, from its last whole epoch; with it go only --device, "
    "and --data_dir or --dataset where the data moved"
)


def train(argv: Sequence[str]) -> None:
    """Train as the flags say."""
    given = cli.parse(TrainConfig, argv, "Train a spatial transformer network and evaluate it, as one MLflow run.", {"resume": RESUME_HELP})
    run_id = given.pop("resume", None)
    if run_id is None:
        config = TrainConfig.parse(given)
    elif extra := given.keys() - {"device", "data_dir", "dataset"}:
        raise ConfigError(f"{min(extra)}: the knobs of a resumed run are its own; with --resume go only device, data_dir and dataset")

    # Only now: torch and MLflow take seconds to import, and a bad flag should not wait for them.
    from stn_pipeline import jobs, tracking
    from stn_pipeline.data import load
    from stn_pipeline.progress import Progress
    from stn_pipeline.training.device import describe, resolve
    from stn_pipeline.training.engine import dry_run

    with ExitStack() as stack:
        resume = None
        if run_id is not None:
            stack.enter_context(tracking.resuming(run_id))
            resume = tracking.load_checkpoint(run_id)
            config = TrainConfig.parse(resume.config.model_dump() | given)
        device = resolve(config.device, config.precision)
        splits = load(config, device)
        config = config.model_copy(update={"dataset": splits.dataset})
        engine = dry_run(config, splits, device, announce=say)  # before there is a run
        if resume is not None and (resume.digests, resume.classes) != (splits.digests(), splits.classes):
            raise DataError(f"resume={run_id}: {splits.dataset} has not the images it was trained on: restore them, or start a new run")

        title = jobs.title_of(config, splits)
        run = stack.enter_context(tracking.open_run(title, config, resume=run_id, device=describe(device)))
        counts = f"{len(splits.train)} train, {len(splits.val)} val, {len(splits.test)} test images"
        say(f"run {run.id}  {title}  {counts}, on {describe(device)}, {engine}")
        with Progress(config.epochs, len(splits.train), resume.state.epoch if resume else 0) as progress:
            last, scores = jobs.train_and_test(config, splits, run, resume=resume, watch=progress.watch, tick=progress.tick)
        told = f"test {jobs.in_words(scores)}. Best epoch {last.state.best_epoch} of {config.epochs} by validation loss"
        say(f"{told}{jobs.mixed(last)}.")
        print("see it: mlflow server --no-serve-artifacts, then http://127.0.0.1:5000")


def main() -> None:
    """Run the entry point."""
    cli.run(train)


if __name__ == "__main__":
    main()
