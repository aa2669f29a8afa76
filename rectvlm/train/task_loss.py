"""The loss of one task, a mean over what is known.

A batch in which nothing is known gives a loss of 0 with a graph, so that its backward pass touches
the same modules in the same order as every other rank's.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class TaskLoss:
    """A task's loss over a batch."""

    value: Tensor
    """Scalar float32, with a graph."""
    count: Tensor
    """Scalar, the number of values in the mean; 0 if the batch says nothing about the task."""


def mean_of_known(values: Tensor, known: Tensor) -> Tensor:
    """Mean of the values where `known` (bool) is True; 0 with a graph where it never is."""
    return (values * known).sum() / known.sum().clamp_min(1)
