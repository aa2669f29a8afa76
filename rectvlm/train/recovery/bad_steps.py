"""Steps that are not normal: a loss or a gradient that is not finite, or far too large.

Whether a loss is normal is known before the optimizer's step and whether the gradient is within it, and both are agreed
upon by all ranks, so all skip a step or none. What a rank saw of a skipped step is gathered then and only then.
"""

import json
import math
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, TypedDict

from rectvlm.config import TrainingLimitsConfig
from rectvlm.train.logging.jsonl import truncate_after_step

BAD_STEPS_FILE = "bad-steps.jsonl"
MAX_SHOWN_SAMPLES = 8
"""Sample names in a sentence."""


class LossVerdict(IntEnum):
    """On a loss; the worst of all ranks counts."""

    NORMAL = 0
    TOO_LARGE = 1
    NOT_FINITE = 2


class RankObservation(TypedDict):
    """What one rank saw of a step."""

    rank: int
    losses: list[float | None]
    """Of its micro-batches; None is not finite, for which JSON has no number."""
    samples: list[str]


def judge_losses(losses: Sequence[float], guard: TrainingLimitsConfig) -> LossVerdict:
    """The worst of a rank's losses."""
    if not all(math.isfinite(loss) for loss in losses):
        return LossVerdict.NOT_FINITE
    return (
        LossVerdict.TOO_LARGE
        if any(abs(loss) > guard.max_loss for loss in losses)
        else LossVerdict.NORMAL
    )


def explain_skipped_step(
    ranks: Sequence[RankObservation], norm: float | None, guard: TrainingLimitsConfig
) -> str:
    """Why a step was skipped, in words."""
    for seen in ranks:
        if None in seen["losses"]:
            return f"the loss of rank {seen['rank']} is not finite"
    for seen in ranks:
        largest = max((abs(loss) for loss in seen["losses"] if loss is not None), default=0.0)
        if largest > guard.max_loss:
            return f"the loss of rank {seen['rank']} is {largest:.4g}, above train.limits.max_loss = {guard.max_loss:g}"
    if norm is None:
        return "the gradient is not finite"
    return f"the norm of the gradient is {norm:.4g}, above train.limits.max_gradient_norm = {guard.max_gradient_norm:g}"


def finite_or_none(value: float | None) -> float | None:
    """A number for JSON, which has no name for the others."""
    return value if value is not None and math.isfinite(value) else None


def join_sample_names(names: Sequence[str]) -> str:
    """Sample names for a sentence."""
    return ", ".join(names[:MAX_SHOWN_SAMPLES]) + (
        f" and {len(names) - MAX_SHOWN_SAMPLES} more" if len(names) > MAX_SHOWN_SAMPLES else ""
    )


class BadStepsLog:
    """`bad-steps.jsonl` of a run: one line a skipped step, by rank."""

    def __init__(self, folder: Path, step: int) -> None:
        """Go on after a step: lines of later ones, which are done again, are dropped."""
        self.path = folder / BAD_STEPS_FILE
        truncate_after_step(self.path, step)

    def append_step(
        self, step: int, reason: str, norm: float | None, ranks: Sequence[RankObservation]
    ) -> None:
        """Write a line."""
        line: dict[str, Any] = {
            "step": step,
            "reason": reason,
            "grad_norm": finite_or_none(norm),
            "ranks": list(ranks),
        }
        with self.path.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
