"""Score a run's network again, on its own or another data set: `python -m stn_pipeline.evaluate --run_id ...`."""

from collections.abc import Sequence

from stn_pipeline import cli
from stn_pipeline.config import EvalConfig, TrainConfig
from stn_pipeline.errors import DataError
from stn_pipeline.texts import say


def evaluate(argv: Sequence[str]) -> None:
    """Score as the flags say, in a run of its own that hangs under the one it scored."""
    knobs = EvalConfig.parse(cli.parse(EvalConfig, argv, "Score the network of a training run."))

    from stn_pipeline import jobs, tracking
    from stn_pipeline.data import load
    from stn_pipeline.training.device import describe, resolve

    tracking.knock()
    checkpoint = tracking.load_checkpoint(knobs.run_id)
    device = resolve(knobs.device)
    config = _data_config(checkpoint.config, checkpoint.image_shape, knobs)
    splits = load(config, device)
    expected = (checkpoint.image_shape, len(checkpoint.classes))
    if (splits.image_shape, splits.n_classes) != expected:
        raise DataError(
            f"dataset={config.dataset}: images {splits.image_shape} in {splits.n_classes} classes; "
            f"run {knobs.run_id} was built for {expected[0]} in {expected[1]}: choose a set of that shape"
        )
    if splits.classes != checkpoint.classes:
        renamed = next(pair for pair in zip(splits.classes, checkpoint.classes, strict=True) if pair[0] != pair[1])
        say(f"warning: a class is called {renamed[0]} here and was {renamed[1]} in training", error=True)

    title = f"eval {jobs.title_of(config, splits)}, {knobs.split}"
    used = knobs.model_copy(update={"dataset": splits.dataset, "data_dir": config.data_dir})
    with tracking.open_run(title, used, parent=knobs.run_id, device=describe(device)) as run:
        run.log_data(splits)
        run.tag({"evaluated_run": knobs.run_id})
        network = checkpoint.build_best().to(device)
        split = getattr(splits, knobs.split)
        if knobs.robustness:
            plain = config.model_copy(update={"distortion": "none"})
            upright = splits if config == plain else load(plain, device, announce=lambda line: None)
            jobs.log_robustness(run, network, getattr(upright, knobs.split), knobs.robustness, title)
        scores = jobs.evaluate_run(run, network, split, splits.classes, name=knobs.split, title=title)
        run.describe(jobs.headline(title, scores, f"Scored the best epoch of run `{knobs.run_id}`", knobs.split))
        say(f"run {run.id}  {title}: {jobs.in_words(scores)}")


def _data_config(trained: TrainConfig, image_shape: tuple[int, int, int], knobs: EvalConfig) -> TrainConfig:
    changes: dict[str, object] = {}
    if knobs.dataset != "same":
        square = knobs.dataset.startswith("folder:") and image_shape[1] == image_shape[2]
        changes = {"dataset": knobs.dataset, "image_size": image_shape[1] if square else 0}
    changes |= {name: value for name in ("data_dir", "distortion") if (value := getattr(knobs, name)) != "same"}
    return trained.model_copy(update=changes)


def main() -> None:
    """Run the entry point."""
    cli.run(evaluate)


if __name__ == "__main__":
    main()
