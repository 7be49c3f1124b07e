"""Comparing: arms over paired seeds. Numbers in, verdicts out (paired, arms); the trainings that give them; the page that shows them."""

from stn_pipeline.comparing.arms import MEASURES, Measure
from stn_pipeline.comparing.paired import NATS, POINTS, Paired, PairingError, Unit, in_words, paired

__all__ = ["MEASURES", "NATS", "POINTS", "Measure", "Paired", "PairingError", "Unit", "in_words", "paired"]
