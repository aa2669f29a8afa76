"""What each task minimizes: findings, lesions, and the report.

Shapes: B samples, F findings (18), L lesions (5), Z × Y × X voxels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rectvlm.config import LocalizationLossWeightsConfig, LossWeightsConfig
from rectvlm.labels import N_FINDINGS
from rectvlm.models import ModelOutputs
from rectvlm.train.localization_loss import (
    LesionTargets,
    infer_lesions_from_labels,
    localization_loss,
)
from rectvlm.train.phases import Task
from rectvlm.train.task_loss import TaskLoss, mean_of_known
from rectvlm.train.uncertainty_weighting import UncertaintyWeighting
from rectvlm.types import Batch


def compute_losses(
    outputs: ModelOutputs,
    batch: Batch,
    tasks: tuple[Task, ...],
    term_weights: LocalizationLossWeightsConfig,
) -> dict[Task, TaskLoss]:
    """The loss of each task; `term_weights` weight the terms of the localization loss."""
    losses_by_task: dict[Task, TaskLoss] = {}
    if "classification" in tasks:
        losses_by_task["classification"] = classification_loss(
            outputs.finding_logits, batch.labels, batch.labels_known
        )
    if "localization" in tasks:
        assert outputs.localization is not None
        targets = LesionTargets(batch.lesions, batch.lesions_annotated, batch.lesions_partial)
        labelled = infer_lesions_from_labels(batch.labels, batch.labels_known)
        losses_by_task["localization"] = localization_loss(
            outputs.localization, targets, labelled, term_weights
        )
    if "report" in tasks:
        assert outputs.report_loss is not None
        has_report = outputs.report_loss.token_counts > 0
        value = mean_of_known(outputs.report_loss.per_sample, has_report)
        losses_by_task["report"] = TaskLoss(value, has_report.sum())
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
    is_known = torch.stack([loss.count > 0 for loss in task_losses.values()])
    return weighting(weighted, is_known)


def classification_loss(logits: Tensor, labels: Tensor, known: Tensor) -> TaskLoss:
    """Binary cross-entropy over the known labels; all arguments are (B, F)."""
    assert logits.shape == labels.shape == known.shape and logits.shape[1:] == (N_FINDINGS,), (
        f"logits, labels and known must be (B, {N_FINDINGS}), not "
        f"{tuple(logits.shape)}, {tuple(labels.shape)}, {tuple(known.shape)}"
    )
    assert known.dtype == torch.bool, f"known must be bool, not {known.dtype}"
    cross_entropy = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
    return TaskLoss(mean_of_known(cross_entropy, known), known.sum())
