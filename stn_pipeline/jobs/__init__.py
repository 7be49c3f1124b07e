"""Trainings, somewhere: the one training that train, a sweep and a comparison share, the driver's loop, and the pools."""

from stn_pipeline.jobs.driver import Job, Outcome, Source, drive
from stn_pipeline.jobs.local import available_cores, n_workers
from stn_pipeline.jobs.lock import only_driver
from stn_pipeline.jobs.places import Place, place
from stn_pipeline.jobs.trainings import MAX_LOSSES, Training, Trainings, times
from stn_pipeline.jobs.trial import evaluate_run, headline, in_words, log_robustness, mixed, run_trial, title_of, train_and_test
from stn_pipeline.jobs.worker import Report, Worker

__all__ = [
    "MAX_LOSSES",
    "Job",
    "Outcome",
    "Place",
    "Source",
    "Report",
    "Training",
    "Trainings",
    "Worker",
    "available_cores",
    "drive",
    "evaluate_run",
    "headline",
    "in_words",
    "log_robustness",
    "mixed",
    "n_workers",
    "only_driver",
    "place",
    "run_trial",
    "times",
    "title_of",
    "train_and_test",
]
