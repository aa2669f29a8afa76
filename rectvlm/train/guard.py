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

from rectvlm.config import GuardConfig
from rectvlm.train.lines import cut_back

FILE = "bad-steps.jsonl"
SHOWN = 8
"""Sample names in a sentence."""


class Verdict(IntEnum):
    """On a loss; the worst of all ranks counts."""

    NORMAL = 0
    LARGE = 1
    NOT_FINITE = 2


class Seen(TypedDict):
    """What one rank saw of a step."""

    rank: int
    losses: list[float | None]
    """Of its micro-batches; None is not finite, for which JSON has no number."""
    samples: list[str]


def judge(losses: Sequence[float], guard: GuardConfig) -> Verdict:
    """The worst of a rank's losses."""
    if not all(math.isfinite(loss) for loss in losses):
        return Verdict.NOT_FINITE
    return Verdict.LARGE if any(abs(loss) > guard.loss for loss in losses) else Verdict.NORMAL


def reason_of(ranks: Sequence[Seen], norm: float | None, guard: GuardConfig) -> str:
    """Why a step was skipped, in words."""
    for seen in ranks:
        if None in seen["losses"]:
            return f"the loss of rank {seen['rank']} is not finite"
    for seen in ranks:
        largest = max((abs(loss) for loss in seen["losses"] if loss is not None), default=0.0)
        if largest > guard.loss:
            return f"the loss of rank {seen['rank']} is {largest:.4g}, above train.guard.loss = {guard.loss:g}"
    if norm is None:
        return "the gradient is not finite"
    return f"the norm of the gradient is {norm:.4g}, above train.guard.norm = {guard.norm:g}"


def finite(value: float | None) -> float | None:
    """A number for JSON, which has no name for the others."""
    return value if value is not None and math.isfinite(value) else None


def shorten(names: Sequence[str]) -> str:
    """Sample names for a sentence."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


class BadSteps:
    """`bad-steps.jsonl` of a run: one line a skipped step, by rank."""

    def __init__(self, folder: Path, step: int) -> None:
        """Go on after a step: lines of later ones, which are done again, are dropped."""
        self.path = folder / FILE
        cut_back(self.path, step)

    def append(self, step: int, reason: str, norm: float | None, ranks: Sequence[Seen]) -> None:
        """Write a line."""
        line: dict[str, Any] = {"step": step, "reason": reason, "grad_norm": finite(norm), "ranks": list(ranks)}
        with self.path.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
