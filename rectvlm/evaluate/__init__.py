"""Evaluation of a checkpoint: from shards to figures that can be compared (`docs/evaluation.md`)."""

from rectvlm.checkpoint import THRESHOLDS_FILE
from rectvlm.evaluate.run import evaluate_checkpoint, output_path
from rectvlm.evaluate.thresholds import read_thresholds
from rectvlm.machine import describe_machine

__all__ = [
    "THRESHOLDS_FILE",
    "describe_machine",
    "evaluate_checkpoint",
    "output_path",
    "read_thresholds",
]
