"""Checkpoints: one folder format for runs, exports and the Hub."""

from rectvlm.checkpoint.checkpoint import THRESHOLDS_FILE, Checkpoint, TrainingState
from rectvlm.checkpoint.run_folder import find_checkpoint

__all__ = ["THRESHOLDS_FILE", "Checkpoint", "TrainingState", "find_checkpoint"]
