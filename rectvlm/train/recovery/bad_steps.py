"""Bad steps, which are skipped: the loss or the gradient is not finite or far too large.

The loss is judged before the optimizer's step, the gradient within it. All ranks agree on both, so
all skip a step or none. What each rank saw of a step is gathered only when the step was skipped.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from rectvlm.config import TrainingLimitsConfig
from rectvlm.files import append_json_line
from rectvlm.finite import finite_or_none
from rectvlm.train.logging.jsonl import truncate_after_step

BAD_STEPS_FILE = "bad-steps.jsonl"
MAX_SHOWN_SAMPLES = 8
"""Number of sample keys that a warning names."""


class LossVerdict(IntEnum):
    """Verdict on a step's loss; the largest value of all ranks decides."""

    NORMAL = 0
    TOO_LARGE = 1
    NOT_FINITE = 2


@dataclass(frozen=True)
class RankObservation:
    """What one rank saw of a step; the field names are keys of `bad-steps.jsonl`."""

    rank: int
    losses: list[float | None]
    """Loss of each micro-batch; None where it is not finite."""
    samples: list[str]
    """Keys of the rank's samples."""


@dataclass(frozen=True)
class SkippedStep:
    """An optimizer step that changed no weights."""

    reason: str
    in_a_row: int
    """Number of steps skipped in a row, this one included."""
    observations: list[RankObservation]
    """Observations of all ranks, in their order."""

    @property
    def has_non_finite_loss(self) -> bool:
        """Whether some rank's loss was not finite."""
        return any(None in observation.losses for observation in self.observations)

    @property
    def sample_keys(self) -> list[str]:
        """Keys of all ranks' samples."""
        keys: list[str] = []
        for observation in self.observations:
            keys += observation.samples
        return keys


def judge_losses(losses: Sequence[float], limits: TrainingLimitsConfig) -> LossVerdict:
    """Judge a rank's losses; the worst decides."""
    if not all(math.isfinite(loss) for loss in losses):
        return LossVerdict.NOT_FINITE
    if any(abs(loss) > limits.max_loss for loss in losses):
        return LossVerdict.TOO_LARGE
    return LossVerdict.NORMAL


def explain_skipped_step(
    observations: Sequence[RankObservation],
    gradient_norm: float | None,
    limits: TrainingLimitsConfig,
) -> str:
    """Say why a step was skipped, naming the first rank with a bad loss."""
    for observation in observations:
        if None in observation.losses:
            return f"the loss of rank {observation.rank} is not finite"
    for observation in observations:
        largest = max((abs(loss) for loss in observation.losses if loss is not None), default=0.0)
        if largest > limits.max_loss:
            return (
                f"the loss of rank {observation.rank} is {largest:.4g}, above "
                f"train.limits.max_loss = {limits.max_loss:g}"
            )
    if gradient_norm is None:
        return "the gradient is not finite"
    return (
        f"the norm of the gradient is {gradient_norm:.4g}, above "
        f"train.limits.max_gradient_norm = {limits.max_gradient_norm:g}"
    )


def join_sample_names(names: Sequence[str]) -> str:
    """Join sample keys for a sentence, at most `MAX_SHOWN_SAMPLES` of them."""
    text = ", ".join(names[:MAX_SHOWN_SAMPLES])
    hidden = len(names) - MAX_SHOWN_SAMPLES
    return f"{text} and {hidden} more" if hidden > 0 else text


class BadStepsLog:
    """The file `bad-steps.jsonl` of a run: one line a skipped step, with what each rank saw."""

    def __init__(self, folder: Path, step: int) -> None:
        """Continue the file after a step, dropping lines of later steps that are done again."""
        self.path = folder / BAD_STEPS_FILE
        truncate_after_step(self.path, step)

    def append_step(self, step: int, gradient_norm: float | None, skipped: SkippedStep) -> None:
        """Append the line of a skipped step."""
        line = {
            "step": step,
            "reason": skipped.reason,
            "grad_norm": finite_or_none(gradient_norm),
            "ranks": [asdict(observation) for observation in skipped.observations],
        }
        append_json_line(self.path, line)
