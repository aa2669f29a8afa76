"""Numbers that may be missing: None and NaN are left out of means and written to JSON as null."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def finite_or_none(value: float | None) -> float | None:
    """The value, or None where it is missing, NaN or infinite, for which JSON has no number."""
    return value if value is not None and math.isfinite(value) else None


def mean_of_finite(values: Iterable[float | None]) -> float | None:
    """Mean of the finite values; None where there are none."""
    finite_values = [value for value in map(finite_or_none, values) if value is not None]
    return float(np.mean(finite_values)) if finite_values else None


def mean_total_loss(
    losses: Sequence[float | None],
    losses_by_task: Sequence[Mapping[str, float | None]],
    weights: Mapping[str, float],
) -> float | None:
    """Mean total loss over steps; None where there is none.

    A step without targets for any task is left out. Where some tasks have none, their mean over the
    other steps takes their place: counted as 0, they would make the total look too good.

    Args:
        losses: total loss of each step, without the tasks that have no targets.
        losses_by_task: loss of each task in each step; None where it has no targets.
        weights: weight of each task's loss in the total.
    """
    tasks = {task for step_losses in losses_by_task for task in step_losses}
    weighted_means = {}
    for task in tasks:
        mean = mean_of_finite(step_losses.get(task) for step_losses in losses_by_task)
        weighted_means[task] = weights.get(task, 1.0) * (mean or 0.0)
    totals = []
    for loss, step_losses in zip(losses, losses_by_task, strict=True):
        missing = [task for task in tasks if finite_or_none(step_losses.get(task)) is None]
        has_targets = len(missing) < len(tasks) or not tasks
        if loss is not None and has_targets:
            totals.append(loss + sum(weighted_means[task] for task in missing))
    return mean_of_finite(totals)
