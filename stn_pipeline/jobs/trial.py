"""One tracked training, and one tracked evaluation: the network, the loop and the run brought together."""

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import torch

from stn_pipeline import figures
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split, Splits
from stn_pipeline.errors import DivergedError
from stn_pipeline.model import Network, build
from stn_pipeline.texts import markdown
from stn_pipeline.tracking import Run
from stn_pipeline.training import Checkpoint, Epoch, Record, Scores, calibration, fit, report, score
from stn_pipeline.training.device import machine
from stn_pipeline.training.engine import choose_engine
from stn_pipeline.training.fingerprint import changes, conditions, fingerprint, gone_on
from stn_pipeline.training.fit import at_chance
from stn_pipeline.training.robustness import SWEPT, plain, robustness

SHOWN_EACH_EPOCH = 12
SHOWN_AT_THE_END = 8
LEAN_CHECKPOINT_S = 10


def run_trial(
    config: TrainConfig,
    splits: Splits,
    run: Run,
    *,
    resume: Checkpoint | None = None,
    watch: Callable[[Record], object] = lambda record: None,
    tick: Callable[[int], object] = lambda n_images: None,
    lean: bool = False,
) -> Checkpoint:
    """Train, logging every epoch and keeping a checkpoint after it; the test split is not touched.

    `config.dataset` is the one really used, `splits` lie on the device, `resume` is where to go on from. `watch` is told
    each epoch's numbers and may raise to stop; `tick` is told the number of images after each step, or several. A `lean` trial logs
    no pictures, and its checkpoint only every LEAN_CHECKPOINT_S seconds and at the end.
    """
    device = splits.train.images.device
    network = build(config, splits.image_shape, splits.n_classes, splits.mean, splits.std).to(device)
    engine = choose_engine(network, config, len(splits.train))
    under = conditions(engine, device)
    under = under if resume is None else gone_on(resume.under, under)
    run.tag(machine(device) | {"engine": under["engine"], "version.code": under["code"]})
    if changes(under):
        run.tag({"went_on_under": changes(under)})
    if not lean:
        run.tag({"fingerprint": fingerprint(config, splits, under)})
    shown = splits.val.images[splits.val.spread(SHOWN_EACH_EPOCH)].float() / 255
    digests = splits.digests()
    last, kept_at = resume and replace(resume, under=under), time.monotonic()
    for epoch in _telling(run, fit(network, splits.train, splits.val, config, resume.state if resume else None, tick, engine)):
        run.log_epoch(epoch.record, None if lean else _strip(network, shown))
        last = Checkpoint(config, splits.image_shape, splits.classes, epoch.state, digests, under, splits.members, splits.reading)
        if not lean or epoch.record.number == config.epochs or time.monotonic() > kept_at + LEAN_CHECKPOINT_S:
            run.log_checkpoint(last)
            kept_at = time.monotonic()
        watch(epoch.record)
    if last is None:
        raise ValueError("run_trial trained nothing: epochs must be >= 1")
    return last


def _telling(run: Run, epochs: Iterator[Epoch]) -> Iterator[Epoch]:
    """Yield the epochs; where training diverges, leave that on the run, as a collapse is."""
    try:
        yield from epochs
    except DivergedError as error:
        run.tag({"collapsed": "true", "collapsed.why": str(error)})
        raise


def train_and_test(
    config: TrainConfig,
    splits: Splits,
    run: Run,
    *,
    resume: Checkpoint | None = None,
    watch: Callable[[Record], object] = lambda record: None,
    tick: Callable[[int], object] = lambda n_images: None,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Train, then score the best epoch on the test split, log its model and pictures, and say on the run's page how it went.

    The one reader of a test split. Returns the last checkpoint and the test scores, as training.report gives them.
    """
    title = title_of(config, splits)
    if resume is None:
        run.log_data(splits)
    last = run_trial(config, splits, run, resume=resume, watch=watch, tick=tick)
    network = last.build_best()
    model_id = run.log_model(network, splits.train.images[:2].cpu().float().div(255).numpy())
    network.to(splits.test.images.device)
    scores = evaluate_run(run, network, splits.test, splits.classes, name="test", title=f"{title}, test", model_id=model_id)
    if told := at_chance(scores["accuracy"], splits.test.labels):
        run.tag({"collapsed": "true", "collapsed.why": f"test {told}"})
    run.log_files({"curves.png": curves_picture(last.state.history, last.state.best_epoch, title)})
    best = f"Best epoch {last.state.best_epoch} of {config.epochs} by validation loss"
    run.describe(headline(title, scores, best + troubles(last.state.history) + mixed(last)))
    return last, scores


def title_of(config: TrainConfig, splits: Splits) -> str:
    """Return what a run is called, as in `diffeo-coordconv mnist s3` or `cpab rotated mnist s0`."""
    return " ".join([config.arm, *([config.distortion] if config.distortion != "none" else []), splits.name, f"s{config.seed}"])


@torch.inference_mode()
def _strip(network: Network, images: torch.Tensor) -> Any:
    if network.transformer is None:
        return None
    network.eval()
    warped, _ = network.warp(images)
    return figures.warp_strip(images.cpu().numpy(), warped.float().cpu().numpy())


def evaluate_run(
    run: Run, network: Network, split: Split, classes: tuple[str, ...], *, name: str, title: str, model_id: str | None = None
) -> dict[str, Any]:
    """Score a network on a split, log metrics, report.json and pictures; return the report.

    `name` is the split's, and the metrics' prefix.
    """
    scores = score(network, split)
    summary = report(scores, classes)
    run.log_scores(name, summary, model_id)
    run.log_json(
        "confusion_matrix.json", {"classes": list(classes), "rows": "true", "columns": "predicted", "counts": scores.confusion.tolist()}
    )
    predictions = {"label": scores.labels.numpy(), "predicted": scores.predicted.numpy()}
    predictions |= {"image": scores.source_image} if scores.draws > 1 else {}
    run.log_files(_pictures(network, split, classes, scores, title) | {"predictions.npz": _npz(predictions)})
    return summary


def log_robustness(run: Run, network: Network, split: Split, n_images: int, title: str) -> None:
    """Log accuracy against rotation, scale and shift, as robustness.png and robustness.json."""
    curves = robustness(network, split, n_images)
    run.log_json("robustness.json", plain(curves))
    drawn = {name: (SWEPT[name][0], np.array([astuple(point) for point in points])) for name, points in curves.items()}
    run.log_files({"robustness.png": figures.to_png(figures.robustness(drawn, f"{title}, {min(n_images, len(split))} undistorted images"))})


def _npz(arrays: dict[str, Any]) -> bytes:
    """Return arrays of whole numbers as an .npz file, each in as few bytes as it needs."""
    small: dict[str, Any] = {name: values.astype(np.min_scalar_type(values.max())) for name, values in arrays.items()}
    file = io.BytesIO()
    np.savez_compressed(file, **small)
    return file.getvalue()


@torch.inference_mode()
def _pictures(network: Network, split: Split, classes: tuple[str, ...], scores: Scores, title: str) -> dict[str, bytes]:
    bins = calibration(scores)
    pictures = {
        "confusion_matrix.png": figures.confusion_matrix(scores.confusion.numpy(), classes, title),
        "reliability.png": figures.reliability(bins.confidence, bins.accuracy, bins.count, bins.error, title),
    }
    chosen = split.spread(SHOWN_AT_THE_END)
    images = split.images[chosen].float() / 255
    warped, points = network.eval().warp(images)
    if points is not None:
        labels, predicted = ([classes[i] for i in which[chosen.cpu()]] for which in (scores.labels, scores.predicted))
        arrays = [tensor.float().cpu().numpy() for tensor in (images, warped, points)]
        pictures["warps.png"] = figures.warps(arrays[0], arrays[1], arrays[2], labels, predicted, title)
    return {name: figures.to_png(figure) for name, figure in pictures.items()}


def in_words(scores: dict[str, Any]) -> str:
    """Return loss, accuracy and its interval, as in `loss 0.0312 nats, accuracy 0.9905 (95 % CI 0.9884 to 0.9922, n=10000)`."""
    low, high = scores["accuracy_95"]
    return f"loss {scores['loss']:.4f} nats, accuracy {scores['accuracy']:.4f} (95 % CI {low:.4f} to {high:.4f}, n={scores['n_images']})"


def headline(title: str, scores: dict[str, Any], note: str, split: str = "test") -> str:
    """Return the Markdown at the top of a run's page: the answer, the hardest classes, where the pictures are."""
    hardest = sorted(((name, row) for name, row in scores["per_class"].items() if row["n"]), key=lambda item: item[1]["f1"])[:3]
    return "\n\n".join(
        (
            f"**{markdown(title)}**: {split} {in_words(scores)}",
            f"{note}. Hardest classes by F1: " + ", ".join(f"{markdown(name)} {row['f1']:.3f}" for name, row in hardest) + ".",
            "Pictures under Artifacts: `warps.png` (where the network looks), `confusion_matrix.png`, `reliability.png`, `curves.png`; "
            "per-class figures in `report.json`. One run is an anecdote: compare several seeds before you believe a difference.",
        )
    )


def troubles(history: list[dict[str, Any]]) -> str:
    """Return a sentence on the epochs that looked collapsed, or nothing where none did."""
    troubled = [record for record in history if record["trouble"]]
    if not troubled:
        return ""
    last = troubled[-1]
    return f". **Looked collapsed** in {len(troubled)} of {len(history)} epochs, at last in epoch {last['number']}: {last['trouble']}"


def mixed(checkpoint: Checkpoint) -> str:
    """Return a sentence on a training that went on under other conditions than it began with, or nothing."""
    changed = changes(checkpoint.under)
    return f". **Went on under other conditions** ({changed}), so it has no fingerprint and no comparison reuses it" if changed else ""


def curves_picture(history: list[dict[str, Any]], best_epoch: int, title: str) -> bytes:
    """Return curves.png: losses and accuracies by epoch."""
    number, train_loss, val_loss, train_accuracy, val_accuracy = (
        [record[key] for record in history] for key in ("number", "train_loss", "val_loss", "train_accuracy", "val_accuracy")
    )
    return figures.to_png(figures.curves(number, train_loss, val_loss, train_accuracy, val_accuracy, best_epoch, title))
