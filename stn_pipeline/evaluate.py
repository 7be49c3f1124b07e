"""Score a run's network again, on its own or another data set: `python -m stn_pipeline.evaluate --run_id ...`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stn_pipeline import cli
from stn_pipeline.config import EvalConfig, TrainConfig
from stn_pipeline.errors import DataError
from stn_pipeline.texts import markdown, say

if TYPE_CHECKING:
    import torch

    from stn_pipeline.data import Splits
    from stn_pipeline.training import Checkpoint


def evaluate(argv: Sequence[str]) -> None:
    """Score as the flags say, in a run of its own that hangs under the one it scored."""
    knobs = EvalConfig.parse(cli.parse(EvalConfig, argv, "Score the network of a training run."))

    from stn_pipeline import jobs, tracking
    from stn_pipeline.training.device import describe, resolve

    tracking.knock()
    checkpoint = tracking.load_checkpoint(knobs.run_id)
    device = resolve(knobs.device)
    config = _data_config(checkpoint.config, knobs)
    splits, warnings = _load(checkpoint, config, knobs, device)
    if splits.image_shape != checkpoint.image_shape:
        raise DataError(
            f"dataset={config.dataset}: images {splits.image_shape}; run {knobs.run_id} was built for {checkpoint.image_shape}: "
            "choose a set of that shape"
        )
    for warning in warnings:
        say(f"warning: {warning}", error=True)

    title = f"eval {jobs.title_of(config, splits)}, {knobs.split}"
    used = knobs.model_copy(update={"dataset": splits.dataset, "data_dir": config.data_dir})
    with tracking.open_run(title, used, parent=knobs.run_id, device=describe(device)) as run:
        run.log_data(splits)
        run.tag({"evaluated_run": knobs.run_id} | ({"warning": "; ".join(warnings)} if warnings else {}))
        network = checkpoint.build_best().to(device)
        split = getattr(splits, knobs.split)
        if knobs.robustness:
            plain = config.model_copy(update={"distortion": "none"})
            upright = splits if config == plain else _load(checkpoint, plain, knobs, device, announce=lambda line: None)[0]
            jobs.log_robustness(run, network, getattr(upright, knobs.split), knobs.robustness, title)
        scores = jobs.evaluate_run(run, network, split, splits.classes, name=knobs.split, title=title)
        told = (f"**warning:** {markdown(warning)}" for warning in warnings)
        run.describe(jobs.headline(title, scores, "; ".join([f"Scored the best epoch of run `{knobs.run_id}`", *told]), knobs.split))
        say(f"run {run.id}  {title}: {jobs.in_words(scores)}")


def _data_config(trained: TrainConfig, knobs: EvalConfig) -> TrainConfig:
    changes: dict[str, object] = {"dataset": knobs.dataset, "image_size": 0} if knobs.dataset != "same" else {}
    changes |= {name: value for name in ("data_dir", "distortion") if (value := getattr(knobs, name)) != "same"}
    return trained.model_copy(update=changes)


def _load(
    checkpoint: "Checkpoint", config: TrainConfig, knobs: EvalConfig, device: "torch.device", announce: Callable[[str], object] = say
) -> "tuple[Splits, list[str]]":
    """Return the splits with the one to be scored ready for the run's network, and what belongs to its scores as a warning.

    Raises: DataError where there is no such split, the network does not know its classes, or was trained on all its images.
    """
    from stn_pipeline.data import Reading, load_to_score
    from stn_pipeline.data.scored import Known, make_ready

    reading = Reading(*checkpoint.reading) if checkpoint.reading else None
    if reading is None and checkpoint.config.distortion == "none":  # a run of an earlier version
        reading = Reading(*checkpoint.image_shape, 0)
    splits = load_to_score(config, knobs.split, reading, device, announce)
    same_images = config.distortion == checkpoint.config.distortion == "none"
    known = Known(knobs.run_id, checkpoint.classes, checkpoint.members, checkpoint.digests if same_images else {})
    own = knobs.dataset == "same" or splits.dataset == checkpoint.config.dataset
    return make_ready(splits, knobs.split, known, own=own)


def main() -> None:
    """Run the entry point."""
    cli.run(evaluate)


if __name__ == "__main__":
    main()
