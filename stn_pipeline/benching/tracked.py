"""What tracking costs a training: MLflow's share of its epochs."""

import multiprocessing
import os
import tempfile
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from statistics import median

import torch

from stn_pipeline.benching.contenders import Setting
from stn_pipeline.errors import RunError


def tracking_costs(setting: Setting, epochs: int) -> dict[str, float]:
    """Train once with a store of its own in a folder that is thrown away; return median seconds of an epoch, and of its tracking.

    As `train` tracks: metrics, a picture of warps and a checkpoint after each epoch, all waited for.

    epochs: at least 2; the first is not counted.
    """
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=_train, args=(theirs, setting, epochs, folder))
        process.start()
        theirs.close()
        try:
            costs: dict[str, float] = ours.recv()
        except (EOFError, OSError) as error:
            raise RunError("the tracked training died") from error
        process.join()
    return costs


def _train(connection: Connection, setting: Setting, epochs: int, folder: str) -> None:
    from stn_pipeline import tracking
    from stn_pipeline.jobs import run_trial

    torch.set_num_threads(setting.threads)
    splits = setting.splits()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.chdir(folder)
    config = setting.config.model_copy(update={"epochs": epochs, "compile": "auto"})
    heard: list[tuple[float, float]] = []  # when an epoch was over, tracked and all, and its seconds without that
    with tracking.open_run("bench", config) as run:
        run_trial(config, splits, run, watch=lambda record: heard.append((time.perf_counter(), record.seconds)))
    whole = [after - before for (before, _), (after, _) in pairwise(heard)]
    tracked = [both - alone for both, (_, alone) in zip(whole, heard[1:], strict=True)]
    connection.send({"epoch_s": median(whole), "tracking_s": median(tracked), "share": sum(tracked) / sum(whole)})
