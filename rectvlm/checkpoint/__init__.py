"""Checkpoints: one folder format for runs, exports and the Hub."""

from rectvlm.checkpoint.checkpoint import Checkpoint, TrainingState
from rectvlm.checkpoint.run_folder import find_checkpoint

__all__ = ["Checkpoint", "TrainingState", "find_checkpoint"]
