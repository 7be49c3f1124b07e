"""Comparing: paired statistics over the seeds of two arms, pure numbers in, numbers and sentences out."""

from stn_pipeline.comparing.paired import NATS, POINTS, Paired, PairingError, Unit, in_words, paired

__all__ = ["NATS", "POINTS", "Paired", "PairingError", "Unit", "in_words", "paired"]
