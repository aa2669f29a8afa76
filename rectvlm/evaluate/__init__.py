"""Evaluation of a checkpoint: from shards to figures that can be compared (`docs/evaluation.md`)."""

from rectvlm.checkpoint import THRESHOLDS
from rectvlm.evaluate.machine import machine
from rectvlm.evaluate.run import evaluate, output_path
from rectvlm.evaluate.thresholds import read_thresholds

__all__ = ["THRESHOLDS", "evaluate", "machine", "output_path", "read_thresholds"]
