"""Losses, time and memory of a phase, summarized from its run's folder."""

from dataclasses import dataclass
from pathlib import Path

from rectvlm.runs.read_runs import read_run

LOSS_WINDOW_STEPS = 20
"""Number of steps that the first and the last loss are averaged over."""


@dataclass(frozen=True)
class LossChange:
    """Mean loss of a task over the first and over the last steps."""

    first: float | None
    last: float | None


@dataclass(frozen=True)
class PhaseSummary:
    """What a phase came to, read from its run's folder."""

    phase: int
    steps: int
    """Last step on record."""
    loss_first: float | None
    """Mean total loss of the first `loss_over` steps; None where no loss is on record."""
    loss_last: float | None
    """Mean total loss of the last `loss_over` steps."""
    loss_over: int
    losses: dict[str, LossChange]
    """Losses by task."""
    seconds: float
    """Duration of the command, seconds."""
    seconds_training: float
    """Duration of the optimizer steps, seconds."""
    peak_memory_bytes: float
    """Peak memory of the rank that held most, bytes."""


def summarize_phase(folder: Path, number: int, seconds: float) -> PhaseSummary:
    """Summarize the run of a phase.

    Args:
        folder: the phase's folder in the run's.
        number: number of the phase.
        seconds: duration of the phase's command.
    """
    run = read_run(folder)
    lines = run.metrics_lines
    window = max(1, min(LOSS_WINDOW_STEPS, len(lines) // 2))
    first_lines, last_lines = lines[:window], lines[-window:]
    losses: dict[str, LossChange] = {}
    for task in run.tasks:
        losses[task] = LossChange(
            first=run.mean_loss(first_lines, task),
            last=run.mean_loss(last_lines, task),
        )
    return PhaseSummary(
        phase=number,
        steps=run.last_step,
        loss_first=run.mean_loss(first_lines),
        loss_last=run.mean_loss(last_lines),
        loss_over=window,
        losses=losses,
        seconds=seconds,
        seconds_training=round(run.training_seconds, 1),
        peak_memory_bytes=run.peak_memory_bytes or 0,
    )
