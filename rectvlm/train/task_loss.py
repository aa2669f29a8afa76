"""The loss of one task: a mean over what all samples of an optimizer step teach.

An engine averages the gradients of a step's micro-batches, over accumulation and ranks. So a
micro-batch divides its sum by the step's *mean count per micro-batch*: the average of the
micro-batches is then the mean over the step, however its samples are cut into micro-batches.

A micro-batch in which nothing is known gives a loss of 0 with a graph, so that its backward pass
touches the same modules in the same order as every other rank's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from torch import Tensor

from rectvlm.train.lesion_targets import find_outlined, infer_lesions_from_labels
from rectvlm.train.phases import Task
from rectvlm.types import Batch


@dataclass
class TaskLoss:
    """A micro-batch's share of a task's loss."""

    value: Tensor
    """Scalar float32, with a graph. Its mean over a step's micro-batches is the step's loss."""
    count: float
    """What is known in the step, per micro-batch; 0 if the step says nothing about the task."""


class TargetCounts(NamedTuple):
    """Numbers of what there is to learn from, per micro-batch."""

    labels: float
    """Known labels."""
    lesions: float
    """Pairs of a sample and a lesion that an outline or a label says something about."""
    reports: float
    """Samples with a report."""
    outlined: tuple[float, ...]
    """Samples whose outline of a lesion holds a voxel, for each lesion."""

    @classmethod
    def of_batch(cls, batch: Batch) -> Self:
        """Count what one batch teaches."""
        labelled = infer_lesions_from_labels(batch.labels, batch.labels_known)
        has_outlines = batch.lesions_annotated | batch.lesions_partial
        outlined = has_outlines & find_outlined(batch.lesions)
        return cls(
            labels=float(batch.labels_known.sum()),
            lesions=float((has_outlines | labelled.known).sum()),
            reports=float(sum(report is not None for report in batch.reports)),
            outlined=tuple(outlined.sum(0).tolist()),
        )

    def to_list(self) -> list[float]:
        """All counts as one list, to be added up."""
        return [self.labels, self.lesions, self.reports, *self.outlined]

    @classmethod
    def from_list(cls, counts: Sequence[float]) -> Self:
        """Counts of `to_list`."""
        labels, lesions, reports, *outlined = counts
        return cls(labels, lesions, reports, tuple(outlined))

    def of_task(self, task: Task) -> float:
        """Count that says whether there is anything to learn for a task."""
        counts: dict[Task, float] = {
            "classification": self.labels,
            "localization": self.lesions,
            "report": self.reports,
        }
        return counts[task]


def mean_of_known(values: Tensor, known: Tensor, count: float) -> Tensor:
    """Sum of the values where `known` (bool) is True, divided by `count`; 0 where nothing is."""
    return (values * known).sum() / (count or 1.0)
