"""The localization loss: Dice and cross-entropy of the masks, alignment, consistency and denoising.

Shapes: B samples, F findings (18), L lesions (5), Z × Y × X voxels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rectvlm.config import LocalizationLossWeightsConfig
from rectvlm.labels import (
    LESION_FINDING_INDEXES,
    LESION_IS_IMPLIED_BY_FINDING,
    LESIONS,
    N_LESIONS,
)
from rectvlm.lesion_bits import lesion_mask
from rectvlm.models.localizer import LocalizerOutput
from rectvlm.train.task_loss import TaskLoss, mean_of_known


class LesionTargets(NamedTuple):
    """Lesions that annotators have outlined."""

    lesion_bits: Tensor
    """(B, Z, Y, X) uint8, lesion bits."""
    annotated: Tensor
    """(B, L) bool: all lesions of the kind are outlined, so a voxel without one is negative."""
    partial: Tensor
    """(B, L) bool: some lesions are outlined, others may be missing; never where `annotated` is."""


class LesionPresence(NamedTuple):
    """Lesions that a patient has, as far as is known."""

    present: Tensor
    """(B, L) bool: the patient has the lesion."""
    known: Tensor
    """(B, L) bool: it is known whether the patient has it; where it is not, `present` is False."""


def infer_lesions_from_labels(labels: Tensor, labels_known: Tensor) -> LesionPresence:
    """Infer lesions from labels, (B, F) and (B, F) bool.

    A finding that is absent excludes the lesion that implies it. A finding that is present proves
    the lesion only where both are the same: none is the same as ground glass, since "Lung opacity"
    may be something else.
    """
    is_same = torch.tensor(LESION_IS_IMPLIED_BY_FINDING, device=labels.device)
    columns = list(LESION_FINDING_INDEXES)
    has_finding, is_labelled = labels[:, columns] > 0.5, labels_known[:, columns]
    return LesionPresence(
        present=has_finding & is_labelled & is_same,
        known=is_labelled & (is_same | ~has_finding),
    )


def localization_loss(
    predicted: LocalizerOutput,
    targets: LesionTargets,
    labelled: LesionPresence,
    term_weights: LocalizationLossWeightsConfig,
) -> TaskLoss:
    """Dice and cross-entropy at full and half resolution, and the terms that the config weights.

    An annotated lesion counts in full. Of a lesion that is outlined in part, the drawn voxels (and
    the cells that hold one) have a cross-entropy, and nothing else does: the rest is unknown, so
    there is no Dice either.

    Alignment asks whether the patches that the localizer points at match the lesion's prompt. Its
    target comes from the outline, else from a label, so lesions without an outline are learned too.
    Consistency compares the resolutions wherever a target is known: it carries what a label teaches
    the patches on to the masks.

    Args:
        predicted: output of the localizer.
        targets: outlined lesions.
        labelled: lesions inferred from labels.
        term_weights: weights of the terms.
    """
    _check_localization_shapes(predicted, targets, labelled)
    terms = _compute_all_lesion_terms(predicted, targets, term_weights.consistency > 0)
    drawn_in_part = targets.partial & terms.present
    # Against an empty mask soft Dice is 1 whatever is predicted: only cross-entropy can say "none".
    has_dice = targets.annotated & terms.present
    known = targets.annotated | drawn_in_part
    half_resolution_loss = mean_of_known(terms.half_dice, has_dice) + mean_of_known(
        terms.half_cross_entropy, known
    )
    value = (
        mean_of_known(terms.dice, has_dice)
        + mean_of_known(terms.cross_entropy, known)
        + term_weights.half_resolution * half_resolution_loss
        + term_weights.patch_resolution * mean_of_known(terms.coarse_cross_entropy, known)
        + term_weights.denoising * predicted.denoising_loss
    )
    if term_weights.alignment > 0:
        logits = predicted.alignment_logits
        present = torch.where(known, terms.present, labelled.present).to(logits.dtype)
        known = known | labelled.known
        alignment = F.binary_cross_entropy_with_logits(logits, present, reduction="none")
        value = value + term_weights.alignment * mean_of_known(alignment, known)
    if term_weights.consistency > 0:
        compared = known & ~targets.partial
        value = value + term_weights.consistency * mean_of_known(terms.consistency, compared)
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
    """bool: the outline holds a voxel."""


def _compute_all_lesion_terms(
    predicted: LocalizerOutput, targets: LesionTargets, with_consistency: bool
) -> LesionLossTerms:
    """Terms of all lesions, (B, L).

    They are computed lesion by lesion and again in the backward pass: the intermediate results
    would take many times the memory of the logits.
    """
    full = predicted.mask_logits.unbind(1)
    half = predicted.half_mask_logits.unbind(1)
    coarse = predicted.patch_logits.unbind(1)
    terms_of_lesions = []
    for lesion in LESIONS:
        terms = checkpoint(
            _compute_lesion_terms,
            full[lesion.bit],
            half[lesion.bit],
            coarse[lesion.bit],
            lesion_mask(targets.lesion_bits, lesion),
            targets.partial[:, lesion.bit],
            with_consistency,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        terms_of_lesions.append(terms)
    columns = zip(*terms_of_lesions, strict=True)
    return LesionLossTerms(*(torch.stack(column, dim=1) for column in columns))


def _compute_lesion_terms(
    full: Tensor,
    half: Tensor,
    coarse: Tensor,
    mask: Tensor,
    partial: Tensor,
    with_consistency: bool,
) -> LesionLossTerms:
    """Terms of one lesion.

    Args:
        full, half, coarse: (B, …) logits at three resolutions.
        mask: (B, Z, Y, X) bool, the outlined lesion.
        partial: (B,) bool, the lesion is outlined in part.
        with_consistency: whether to compute the consistency term.
    """
    present = mask.flatten(1).any(1)
    drawn_in_part = partial & present
    # A cell takes the largest value, not the mean: a nodule smaller than a cell still marks it.
    half_mask = _split_into_cells(mask, half.shape[1:]).amax((2, 4, 6)).float()
    coarse_mask = _split_into_cells(mask, coarse.shape[1:]).amax((2, 4, 6)).float()
    full_mask = mask.float()
    consistency = full.new_zeros(len(full))
    if with_consistency:
        probabilities = full.sigmoid()
        for logits in (half, coarse):
            pooled = _pool_probabilities(probabilities, logits.shape[1:])
            squared_error = (logits.sigmoid() - pooled).square()
            consistency = consistency + squared_error.flatten(1).mean(1)
    return LesionLossTerms(
        dice=_soft_dice_loss(full, full_mask),
        cross_entropy=_masked_cross_entropy(full, full_mask, drawn_in_part),
        half_dice=_soft_dice_loss(half, half_mask),
        half_cross_entropy=_masked_cross_entropy(half, half_mask, drawn_in_part),
        coarse_cross_entropy=_masked_cross_entropy(coarse, coarse_mask, drawn_in_part),
        consistency=consistency,
        present=present,
    )


def _split_into_cells(volume: Tensor, grid: torch.Size) -> Tensor:
    """View (B, Z, Y, X) as (B, z, Z / z, y, Y / y, x, X / x)."""
    z, y, x = grid
    return volume.unflatten(3, (x, -1)).unflatten(2, (y, -1)).unflatten(1, (z, -1))


def _pool_probabilities(probabilities: Tensor, grid: torch.Size) -> Tensor:
    """Mean of each cell's probabilities weighted with themselves, Σ p² / Σ p.

    A plain mean would contradict the targets, in which one voxel marks its entire cell: of a patch
    that holds one nodule of 27 voxels it is 0.03. The weighted mean is 1 for any mask that is
    predicted with certainty, p where p is constant, and its gradient reaches every voxel, not only
    the largest.

    Args:
        probabilities: (B, Z, Y, X).
        grid: number of cells along each axis.

    Returns:
        (B, *grid).
    """
    cells = _split_into_cells(probabilities, grid)
    return cells.square().sum((2, 4, 6)) / cells.sum((2, 4, 6)).clamp_min(1e-12)


def _soft_dice_loss(logits: Tensor, mask: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 − 2 Σ p g / (Σ p + Σ g) over the voxels (Milletari et al., 2016), (B,).

    It equals MONAI's `DiceLoss(sigmoid=True)` to the last digit, without the seconds that importing
    MONAI takes on every rank.
    """
    p, g = logits.sigmoid().flatten(1), mask.flatten(1)
    return 1 - (2 * (p * g).sum(1) + smooth) / (p.sum(1) + g.sum(1) + smooth)


def _masked_cross_entropy(logits: Tensor, mask: Tensor, drawn_in_part: Tensor) -> Tensor:
    """Mean over all voxels, or over those in the mask where it is drawn in part, (B,)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none").flatten(1)
    weights = torch.where(drawn_in_part[:, None], mask.flatten(1), 1.0)
    return (cross_entropy * weights).sum(1) / weights.sum(1)


def _check_localization_shapes(
    predicted: LocalizerOutput, targets: LesionTargets, labelled: LesionPresence
) -> None:
    bits, mask_logits = targets.lesion_bits, predicted.mask_logits
    assert bits.ndim == 4 and bits.dtype == torch.uint8, (
        f"lesion bits must be uint8 (B, Z, Y, X), not {bits.dtype} {tuple(bits.shape)}"
    )
    batch_size, *grid = bits.shape
    expected = (batch_size, N_LESIONS, *grid)
    assert mask_logits.shape == expected, (
        f"masks for lesion bits {tuple(bits.shape)} must be {expected}, "
        f"not {tuple(mask_logits.shape)}"
    )
    lower_resolutions = {"half": predicted.half_mask_logits, "coarse": predicted.patch_logits}
    for name, logits in lower_resolutions.items():
        remainders = [n % m for n, m in zip(grid, logits.shape[2:], strict=True)]
        assert logits.shape[:2] == (batch_size, N_LESIONS) and not any(remainders), (
            f"{name} logits {tuple(logits.shape)} do not divide masks {tuple(mask_logits.shape)}"
        )
    flags_by_name = {
        "annotated": targets.annotated,
        "partial": targets.partial,
        "labelled.present": labelled.present,
        "labelled.known": labelled.known,
    }
    for name, flags in flags_by_name.items():
        assert flags.shape == (batch_size, N_LESIONS) and flags.dtype == torch.bool, (
            f"{name} must be bool of shape ({batch_size}, {N_LESIONS}), "
            f"not {flags.dtype} {tuple(flags.shape)}"
        )
    devices = {tensor.device for tensor in (mask_logits, *targets, *labelled)}
    assert len(devices) == 1, f"logits, outlines and labels must be on one device, not on {devices}"
