"""What each task minimizes.

A loss is a mean over what is known. A batch in which nothing is known gives 0 with a graph, so that its backward pass
touches the same modules in the same order as every other rank's.

Shapes: B samples, F findings (18), L lesions (5), Z × Y × X voxels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rectvlm.config import LocalizationLossWeightsConfig, LossWeightsConfig
from rectvlm.labels import (
    LESION_FINDING_INDEXES,
    LESION_IS_IMPLIED_BY_FINDING,
    LESIONS,
    N_FINDINGS,
    N_LESIONS,
)
from rectvlm.lesion_bits import lesion_mask
from rectvlm.models import ModelOutputs
from rectvlm.models.localizer import LocalizerOutput
from rectvlm.train.phases import Task
from rectvlm.train.uncertainty_weighting import UncertaintyWeighting
from rectvlm.types import Batch


@dataclass
class TaskLoss:
    """A task's loss over a batch, and how many terms it is a mean of."""

    value: Tensor
    """Scalar float32, with a graph."""
    count: Tensor
    """Scalar: 0 when the batch says nothing about the task."""


def compute_losses(
    outputs: ModelOutputs,
    batch: Batch,
    tasks: tuple[Task, ...],
    term_weights: LocalizationLossWeightsConfig,
) -> dict[Task, TaskLoss]:
    """The loss of each task; `terms` weigh those of the localization."""
    found: dict[Task, TaskLoss] = {}
    if "classification" in tasks:
        found["classification"] = classification_loss(
            outputs.finding_logits, batch.labels, batch.labels_known
        )
    if "localization" in tasks:
        assert outputs.localization is not None
        known = LesionTargets(batch.lesions, batch.lesions_annotated, batch.lesions_partial)
        labelled = infer_lesions_from_labels(batch.labels, batch.labels_known)
        found["localization"] = localization_loss(
            outputs.localization, known, labelled, term_weights
        )
    if "report" in tasks:
        assert outputs.report_loss is not None
        has_report = outputs.report_loss.token_counts > 0
        found["report"] = TaskLoss(
            _mean_of_known(outputs.report_loss.per_sample, has_report), has_report.sum()
        )
    return found


def combine_losses(
    task_losses: dict[Task, TaskLoss],
    weights: LossWeightsConfig,
    weighting: UncertaintyWeighting | None = None,
) -> Tensor:
    """Σ weight · loss, or what learned weights make of these products."""
    weighted = torch.stack(
        [getattr(weights, task) * loss.value for task, loss in task_losses.items()]
    )
    if weighting is None:
        return weighted.sum()
    return weighting(weighted, torch.stack([loss.count > 0 for loss in task_losses.values()]))


def classification_loss(logits: Tensor, labels: Tensor, known: Tensor) -> TaskLoss:
    """Binary cross-entropy over known labels; logits, labels and known are (B, F)."""
    assert logits.shape == labels.shape == known.shape and logits.shape[1:] == (N_FINDINGS,), (
        f"logits, labels and known must be (B, {N_FINDINGS}), not "
        f"{tuple(logits.shape)}, {tuple(labels.shape)}, {tuple(known.shape)}"
    )
    assert known.dtype == torch.bool, f"known must be bool, not {known.dtype}"
    each = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
    return TaskLoss(_mean_of_known(each, known), known.sum())


class LesionTargets(NamedTuple):
    """What people have drawn."""

    lesion_bits: Tensor
    """(B, Z, Y, X) uint8, lesion bits."""
    annotated: Tensor
    """(B, L) bool."""
    partial: Tensor
    """(B, L) bool, True where outlines exist but others may be missing; never where `annotated` is."""


class LesionPresence(NamedTuple):
    """Which lesions a patient has, as far as is known."""

    present: Tensor
    """(B, L) bool."""
    known: Tensor
    """(B, L) bool; `present` is False where this is."""


def infer_lesions_from_labels(labels: Tensor, labels_known: Tensor) -> LesionPresence:
    """What findings' labels (B, F) and (B, F) bool say of lesions.

    A finding that is absent excludes the lesion that implies it. One that is present proves the lesion only where both
    are the same thing: no finding says ground glass, since "Lung opacity" may be something else.
    """
    same = torch.tensor(LESION_IS_IMPLIED_BY_FINDING, device=labels.device)
    columns = list(LESION_FINDING_INDEXES)
    has, told = labels[:, columns] > 0.5, labels_known[:, columns]
    return LesionPresence(has & told & same, told & (same | ~has))


def localization_loss(
    predicted: LocalizerOutput,
    targets: LesionTargets,
    labelled: LesionPresence,
    term_weights: LocalizationLossWeightsConfig,
) -> TaskLoss:
    """Dice and binary cross-entropy at full and half resolution, and the other terms that the configuration weighs.

    A lesion counts in full where it is annotated. Where it is outlined in part, its drawn voxels (and the cells that
    hold one) carry cross-entropy and nothing else does: what is empty there is unknown, so there is no Dice either.

    Alignment asks whether the patches that the localizer points at match the lesion's prompt. Whether they should is
    known from the outline, else from a label; so lesions that no one outlined are learnt from too. Consistency compares
    resolutions wherever the one or the other is known: it carries what a label teaches the patches on to the masks.

    Args:
        found: what the localizer says.
        outlines: what was drawn.
        labelled: what labels say.
        terms: weights.
    """
    _check_localization_shapes(predicted, targets, labelled)
    bits, annotated, partial = targets
    scales = (
        predicted.mask_logits.unbind(1),
        predicted.half_mask_logits.unbind(1),
        predicted.patch_logits.unbind(1),
    )
    # One lesion at a time, computed again in the backward pass: what lies between would be many times the logits.
    each = [
        checkpoint(
            _compute_lesion_terms,
            *(scale[lesion.bit] for scale in scales),
            lesion_mask(bits, lesion),
            partial[:, lesion.bit],
            term_weights.consistency > 0,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for lesion in LESIONS
    ]
    per = LesionLossTerms(*(torch.stack(values, dim=1) for values in zip(*each, strict=True)))
    drawn = partial & per.present
    # Soft Dice against an empty mask is 1 whatever is drawn: there, cross-entropy alone says "none".
    outlined, known = annotated & per.present, annotated | drawn
    value = (
        _mean_of_known(per.dice, outlined)
        + _mean_of_known(per.cross_entropy, known)
        + term_weights.half_resolution
        * (_mean_of_known(per.half_dice, outlined) + _mean_of_known(per.half_cross_entropy, known))
        + term_weights.patch_resolution * _mean_of_known(per.coarse_cross_entropy, known)
        + term_weights.denoising * predicted.denoising_loss
    )
    labelled_only = labelled.known & ~known
    if term_weights.alignment > 0:
        wanted = torch.where(known, per.present, labelled.present).to(
            predicted.alignment_logits.dtype
        )
        match = F.binary_cross_entropy_with_logits(
            predicted.alignment_logits, wanted, reduction="none"
        )
        value = value + term_weights.alignment * _mean_of_known(match, known | labelled_only)
        known = known | labelled_only
    if term_weights.consistency > 0:
        value = value + term_weights.consistency * _mean_of_known(per.consistency, known & ~partial)
    return TaskLoss(value, known.sum())


class LesionLossTerms(NamedTuple):
    """Terms of the loss before they are averaged; (B,) for one lesion, (B, L) for all."""

    dice: Tensor
    cross_entropy: Tensor
    half_dice: Tensor
    half_cross_entropy: Tensor
    coarse_cross_entropy: Tensor
    consistency: Tensor
    present: Tensor
    """bool: whether the outline holds a voxel."""


def _compute_lesion_terms(
    full: Tensor, half: Tensor, coarse: Tensor, mask: Tensor, partial: Tensor, consistent: bool
) -> LesionLossTerms:
    """Terms of one lesion from its logits (B, …) at three resolutions, mask (B, Z, Y, X) bool and `partial` (B,)."""
    present = mask.flatten(1).amax(1) > 0
    drawn = partial & present
    # The largest value, not the mean: a nodule smaller than a cell still marks it.
    half_mask, coarse_mask = (
        _split_into_cells(mask, logits.shape[1:]).amax((2, 4, 6)).float()
        for logits in (half, coarse)
    )
    masks = mask.float()
    consistency = full.new_zeros(len(full))
    if consistent:
        p = full.sigmoid()
        for logits in (half, coarse):
            consistency = consistency + (
                logits.sigmoid() - _pool_probabilities(p, logits.shape[1:])
            ).square().flatten(1).mean(1)
    return LesionLossTerms(
        _soft_dice_loss(full, masks),
        _masked_cross_entropy(full, masks, drawn),
        _soft_dice_loss(half, half_mask),
        _masked_cross_entropy(half, half_mask, drawn),
        _masked_cross_entropy(coarse, coarse_mask, drawn),
        consistency,
        present,
    )


def _split_into_cells(fine: Tensor, grid: torch.Size) -> Tensor:
    """(B, Z, Y, X) seen as (B, z, Z / z, y, Y / y, x, X / x)."""
    return fine.unflatten(3, (grid[2], -1)).unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))


def _pool_probabilities(p: Tensor, grid: torch.Size) -> Tensor:
    """Mean of each cell's probabilities, weighted with themselves: Σ p² / Σ p, (B, Z, Y, X) to (B, *grid).

    A plain mean would contradict the targets, in which a voxel marks its whole cell: of a patch that holds one nodule
    of 27 voxels it is 0.03. This one is 1 for any mask drawn surely, p where p is the same everywhere, and its gradient
    reaches every voxel, not the largest alone.
    """
    cells = _split_into_cells(p, grid)
    return cells.square().sum((2, 4, 6)) / cells.sum((2, 4, 6)).clamp_min(1e-12)


def _soft_dice_loss(logits: Tensor, masks: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 − 2 Σ p g / (Σ p + Σ g) over the voxels (Milletari et al., 2016), (B,).

    MONAI's `DiceLoss(sigmoid=True)` to the last digit, without the seconds that importing MONAI takes on every rank.
    """
    p, g = logits.sigmoid().flatten(1), masks.flatten(1)
    return 1 - (2 * (p * g).sum(1) + smooth) / (p.sum(1) + g.sum(1) + smooth)


def _masked_cross_entropy(logits: Tensor, masks: Tensor, drawn: Tensor) -> Tensor:
    """Mean over the voxels, or over those in the mask alone where it is `drawn` in part: (B,)."""
    each = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").flatten(1)
    counted = torch.where(drawn[:, None], masks.flatten(1), 1.0)
    return (each * counted).sum(1) / counted.sum(1)


def _mean_of_known(values: Tensor, known: Tensor) -> Tensor:
    """Mean over what is known; 0 with a graph when nothing is."""
    return (values * known).sum() / known.sum().clamp_min(1)


def _check_localization_shapes(
    found: LocalizerOutput, outlines: LesionTargets, labelled: LesionPresence
) -> None:
    bits = outlines.lesion_bits
    assert bits.ndim == 4 and bits.dtype == torch.uint8, (
        f"lesion bits must be uint8 (B, Z, Y, X), not {bits.dtype} {tuple(bits.shape)}"
    )
    b, *grid = bits.shape
    assert found.mask_logits.shape == (b, N_LESIONS, *grid), (
        f"masks for lesion bits {tuple(bits.shape)} must be {(b, N_LESIONS, *grid)}, not {tuple(found.mask_logits.shape)}"
    )
    for name, logits in (("half", found.half_mask_logits), ("coarse", found.patch_logits)):
        assert logits.shape[:2] == (b, N_LESIONS) and not any(
            n % m for n, m in zip(grid, logits.shape[2:], strict=True)
        ), (
            f"{name} logits {tuple(logits.shape)} do not divide masks {tuple(found.mask_logits.shape)}"
        )
    for name, flags in (
        ("annotated", outlines.annotated),
        ("partial", outlines.partial),
        ("labelled.present", labelled.present),
        ("labelled.known", labelled.known),
    ):
        assert flags.shape == (b, N_LESIONS) and flags.dtype == torch.bool, (
            f"{name} must be bool of shape ({b}, {N_LESIONS}), not {flags.dtype} {tuple(flags.shape)}"
        )
    places = {t.device for t in (found.mask_logits, *outlines, *labelled)}
    assert len(places) == 1, f"logits, outlines and labels must be on one device, not on {places}"
