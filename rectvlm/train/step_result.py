"""The result of one optimizer step, and its line in `metrics.jsonl`."""

from dataclasses import dataclass
from typing import Any

from rectvlm.train.recovery.bad_steps import SkippedStep


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on all ranks except for times and `sample_keys`."""

    step: int
    """Number of the step, counted from 1."""
    loss: float | None
    """Weighted sum of the losses of the tasks that have targets; None if no task has any, or if a
    rank's loss was not finite."""
    losses_by_task: dict[str, float | None]
    """Loss of each task over the step; None if no sample says anything about it."""
    learning_rates: dict[str, float]
    """Learning rate of each part of the model that trains."""
    gradient_norm: float | None
    """Norm of the gradient before clipping; None where it is not finite."""
    skipped: SkippedStep | None
    """Why the step was skipped; None if it changed the weights."""
    samples_seen: int
    """Number of samples that all ranks have taken up to the end of the step."""
    token_count: int
    """Number of patches and language positions that all ranks took in the step."""
    total_seconds: float
    """Duration of the step on this rank, seconds."""
    seconds_by_operation: dict[str, float]
    """Time that each operation took on this rank, seconds."""
    peak_memory_bytes: float
    """Largest memory that a rank has held since the start, bytes."""
    task_weights: dict[str, float] | None
    """Current weight of each task's loss, where the weights are learned."""
    sample_keys: list[str]
    """Keys of the samples that this rank took."""
    stop_signal: int
    """Number of a signal that some rank has received; 0 for none."""

    def to_metrics_line(self) -> dict[str, Any]:
        """The step's line in `metrics.jsonl`."""
        skipped = None
        if self.skipped is not None:
            skipped = {
                "reason": self.skipped.reason,
                "in_a_row": self.skipped.in_a_row,
                "samples": self.skipped.sample_keys,
            }
        line = {
            "step": self.step,
            "loss": self.loss,
            "losses": self.losses_by_task,
            "lr": self.learning_rates,
            "grad_norm": self.gradient_norm,
            "skipped": skipped,
            "samples_seen": self.samples_seen,
            "tokens": self.token_count,
            "seconds": {"total": self.total_seconds, **self.seconds_by_operation},
            "memory_bytes": self.peak_memory_bytes,
        }
        if self.task_weights is not None:
            line["task_weights"] = self.task_weights
        return line
