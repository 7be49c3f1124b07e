"""A worker whose trainings cost a fixed time and no processor, so that what is left over is the driver's, the pool's and the store's."""

import math
import time
from collections.abc import Callable

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import RawData
from stn_pipeline.jobs import Job, Outcome, Report, Worker
from stn_pipeline.tracking import Run
from stn_pipeline.training import Record

EPOCH_S = 0.6
UNKNOWN = dict.fromkeys(("train_loss", "train_accuracy", "shift", "outside", "log_det", "folded"), math.nan)


class Sleeper(Worker):
    """Sleeps through each epoch; logs and reports it as a training does."""

    def _train(self, job: Job, device_name: str, report: Report, source: Callable[[TrainConfig], RawData]) -> Outcome:
        run = Run(job.run_id)
        run.tag(self.environment)
        for number in range(1, job.config.epochs + 1):
            time.sleep(EPOCH_S)
            record = Record(number, val_loss=job.config.lr, val_accuracy=0.5, seconds=EPOCH_S, images_per_s=1.0, trouble="", **UNKNOWN)
            run.log_epoch(record)
            report(record)
        return Outcome("done", figures={"val/loss": job.config.lr, "best_epoch": 1})
