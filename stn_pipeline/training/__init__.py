"""Training: fit (a generator of epochs), the step, the scores, the checkpoint, the device."""

from stn_pipeline.training.checkpoint import Checkpoint
from stn_pipeline.training.fit import Epoch, Record, State, fit
from stn_pipeline.training.scores import Scores, calibration, report, score

__all__ = ["Checkpoint", "Epoch", "Record", "Scores", "State", "calibration", "fit", "report", "score"]
