"""What each task minimizes: findings, lesions, and the report.

Shapes: B samples, F findings (18), L lesions (5), Z × Y × X voxels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rectvlm.config import LocalizationLossWeightsConfig, LossWeightsConfig
from rectvlm.labels import N_FINDINGS
from rectvlm.models import ModelOutputs
from rectvlm.train.lesion_targets import collect_lesion_targets
from rectvlm.train.localization_loss import localization_loss
from rectvlm.train.phases import Task
from rectvlm.train.task_loss import TargetCounts, TaskLoss, mean_of_known
from rectvlm.train.uncertainty_weighting import UncertaintyWeighting
from rectvlm.types import Batch


def compute_losses(
    outputs: ModelOutputs,
    batch: Batch,
    tasks: tuple[Task, ...],
    term_weights: LocalizationLossWeightsConfig,
    counts: TargetCounts | None = None,
) -> dict[Task, TaskLoss]:
    """The loss of each task.

    Args:
        outputs: of the model for the batch.
        batch: the samples of one micro-batch.
        tasks: tasks to learn.
        term_weights: weights of the terms of the localization loss.
        counts: what the step that the batch belongs to teaches, per micro-batch; by default the
            batch is a step of its own.
    """
    counts = TargetCounts.of_batch(batch) if counts is None else counts
    losses_by_task: dict[Task, TaskLoss] = {}
    if "classification" in tasks:
        losses_by_task["classification"] = classification_loss(
            outputs.finding_logits, batch.labels, batch.labels_known, counts.labels
        )
    if "localization" in tasks:
        assert outputs.localization is not None
        targets = collect_lesion_targets(batch)
        losses_by_task["localization"] = localization_loss(
            outputs.localization, targets, term_weights, counts
        )
    if "report" in tasks:
        assert outputs.report_loss is not None
        has_report = outputs.report_loss.token_counts > 0
        value = mean_of_known(outputs.report_loss.per_sample, has_report, counts.reports)
        losses_by_task["report"] = TaskLoss(value, counts.reports)
    return losses_by_task


def combine_losses(
    task_losses: dict[Task, TaskLoss],
    weights: LossWeightsConfig,
    weighting: UncertaintyWeighting | None = None,
) -> Tensor:
    """Σ weight · loss, or the total that learned weights make of these products."""
    weighted = torch.stack(
        [getattr(weights, task) * loss.value for task, loss in task_losses.items()]
    )
    if weighting is None:
        return weighted.sum()
    # A task of weight 0 has no loss that would hold its learned factor in place.
    is_known = torch.tensor(
        [loss.count > 0 and getattr(weights, task) > 0 for task, loss in task_losses.items()]
    )
    return weighting(weighted, is_known.to(weighted.device))


def classification_loss(
    logits: Tensor, labels: Tensor, known: Tensor, known_count: float
) -> TaskLoss:
    """Binary cross-entropy over the known labels.

    Args:
        logits, labels, known: (B, F); `known` is bool.
        known_count: number of known labels in the mean.
    """
    assert logits.shape == labels.shape == known.shape and logits.shape[1:] == (N_FINDINGS,), (
        f"logits, labels and known must be (B, {N_FINDINGS}), not "
        f"{tuple(logits.shape)}, {tuple(labels.shape)}, {tuple(known.shape)}"
    )
    assert known.dtype == torch.bool, f"known must be bool, not {known.dtype}"
    cross_entropy = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
    return TaskLoss(mean_of_known(cross_entropy, known, known_count), known_count)
