"""Trainings, somewhere: run_trial is the one training that train, a sweep and a comparison share."""

from stn_pipeline.jobs.trial import curves_picture, evaluate_run, headline, in_words, run_trial, troubles

__all__ = ["curves_picture", "evaluate_run", "headline", "in_words", "run_trial", "troubles"]
