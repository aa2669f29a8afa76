"""Early stopping: when validation has not got better for so long that a run ends."""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rectvlm.config import ValidationConfig
from rectvlm.finite import finite_or_none
from rectvlm.runs.run_files import VALIDATION_FILE


class MetricValue(NamedTuple):
    """Value of the metric that decides which checkpoint is best, at one validation."""

    step: int
    """Number of optimizer steps done."""
    value: float | None
    """Value of the metric; None where the cases do not determine it."""


def read_metric_history(folder: Path, settings: ValidationConfig) -> list[MetricValue]:
    """Read the values of the deciding metric from a run's `validation.jsonl`."""
    path = folder / VALIDATION_FILE
    if not settings.every or not path.is_file():
        return []
    history = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line may be cut off by a kill
            line = json.loads(text)
            value = finite_or_none(line["metrics"].get(settings.best_metric))
            history.append(MetricValue(int(line["step"]), value))
    return history


def has_stopped_early(folder: Path, settings: ValidationConfig) -> bool:
    """Whether the run in a phase's folder ended early."""
    return is_patience_exhausted(read_metric_history(folder, settings), settings)


def is_patience_exhausted(history: Sequence[MetricValue], settings: ValidationConfig) -> bool:
    """Whether the last `settings.patience` validations were no better than an earlier one."""
    if not (settings.every and settings.patience):
        return False
    best_key, validations_waited = math.inf, 0
    for _, value in history:
        key = metric_sort_key(value, settings)
        validations_waited += 1
        if key < best_key:
            best_key, validations_waited = key, 0
    return validations_waited >= settings.patience


def metric_sort_key(value: float | None, settings: ValidationConfig) -> float:
    """Key of a metric's value by which the best sorts first; infinity where there is no value."""
    if value is None:
        return math.inf
    return value if settings.best_metric.startswith("loss") else -value
