"""What each task minimizes.

A loss is a mean over what is known. A batch in which nothing is known gives 0 with a graph, so that its backward pass
touches the same modules in the same order as every other rank's.

Shapes: B samples, F findings (18), L lesions (5), Z × Y × X voxels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rectvlm.config import LossConfig
from rectvlm.models import Outputs
from rectvlm.models.localizer import Localization
from rectvlm.train.phases import Task
from rectvlm.types import Batch, lesion_masks

HALF_WEIGHT, COARSE_WEIGHT, DENOISING_WEIGHT = 0.5, 0.5, 0.1


@dataclass
class Loss:
    """A task's loss over a batch, and how many terms it is a mean of."""

    value: Tensor
    """Scalar float32, with a graph."""
    count: Tensor
    """Scalar: 0 when the batch says nothing about the task."""


def losses(outputs: Outputs, batch: Batch, tasks: tuple[Task, ...]) -> dict[Task, Loss]:
    """The loss of each task."""
    found: dict[Task, Loss] = {}
    if "classification" in tasks:
        found["classification"] = classification(outputs.findings, batch.labels, batch.labels_known)
    if "localization" in tasks:
        assert outputs.localization is not None
        found["localization"] = localization(
            outputs.localization, batch.lesions, batch.lesions_annotated, batch.lesions_partial
        )
    if "report" in tasks:
        assert outputs.report is not None
        has_report = outputs.report.tokens > 0
        found["report"] = Loss(_mean(outputs.report.per_sample, has_report), has_report.sum())
    return found


def total(found: dict[Task, Loss], weights: LossConfig) -> Tensor:
    """Σ weight · loss."""
    return torch.stack([getattr(weights, task) * loss.value for task, loss in found.items()]).sum()


def classification(logits: Tensor, labels: Tensor, known: Tensor) -> Loss:
    """Binary cross-entropy over known labels; logits, labels and known are (B, F)."""
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return Loss(_mean(each, known), known.sum())


def localization(found: Localization, bits: Tensor, annotated: Tensor, partial: Tensor) -> Loss:
    """Dice and binary cross-entropy at full and half resolution; the patches that hold a lesion; the denoising error.

    A lesion counts in full where it is annotated. Where it is outlined in part, its drawn voxels (and the cells that
    hold one) carry cross-entropy and nothing else does: what is empty there is unknown, so there is no Dice either.

    Args:
        found: what the localizer says.
        bits: (B, Z, Y, X) uint8, lesion bits.
        annotated: (B, L) bool.
        partial: (B, L) bool, True where outlines exist but others may be missing; never where `annotated` is.
    """
    masks = lesion_masks(bits)
    drawn = partial & masks.flatten(2).any(2)
    # The largest value, not the mean: a nodule smaller than a cell still marks it.
    half = F.adaptive_max_pool3d(masks, found.half.shape[2:])
    coarse = F.adaptive_max_pool3d(masks, found.coarse.shape[2:])
    value = (
        _dice_and_entropy(found.masks, masks, annotated, drawn)
        + HALF_WEIGHT * _dice_and_entropy(found.half, half, annotated, drawn)
        + COARSE_WEIGHT * _mean(_entropy(found.coarse, coarse, drawn), annotated | drawn)
        + DENOISING_WEIGHT * found.denoising
    )
    return Loss(value, (annotated | drawn).sum())


def _dice_and_entropy(logits: Tensor, masks: Tensor, annotated: Tensor, drawn: Tensor) -> Tensor:
    dice = _soft_dice(logits, masks)
    # Soft Dice against an empty mask is 1 whatever is drawn: there, cross-entropy alone says "none".
    present = annotated & masks.flatten(2).any(2)
    return _mean(dice, present) + _mean(_entropy(logits, masks, drawn), annotated | drawn)


def _soft_dice(logits: Tensor, masks: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 − 2 Σ p g / (Σ p + Σ g) over the voxels (Milletari et al., 2016), (B, L).

    MONAI's `DiceLoss(sigmoid=True)` to the last digit, without the seconds that importing MONAI takes on every rank.
    """
    p, g = logits.sigmoid().flatten(2), masks.flatten(2)
    return 1 - (2 * (p * g).sum(2) + smooth) / (p.sum(2) + g.sum(2) + smooth)


def _entropy(logits: Tensor, masks: Tensor, drawn: Tensor) -> Tensor:
    """Mean over the voxels, or over those in the mask alone where it is `drawn` in part: (B, L)."""
    each = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").flatten(2)
    counted = torch.where(drawn[:, :, None], masks.flatten(2), 1.0)
    return (each * counted).sum(2) / counted.sum(2)


def _mean(values: Tensor, known: Tensor) -> Tensor:
    """Mean over what is known; 0 with a graph when nothing is."""
    return (values * known).sum() / known.sum().clamp_min(1)
