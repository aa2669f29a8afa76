"""The localization loss: overlap, volumes, alignment, consistency and denoising.

Full-volume Dice and cross-entropy do not suit CT-RATE. Of most consolidations no outline exists, so
no voxel would ever be known to be empty. And at 64 × 512 × 512 voxels, the faint background of a
small lesion outweighs it: with logits of −8 it sums to fifty times the volume of a lesion of 100
voxels. So each part of a volume has the term that suits it:

- **Around an outline** overlap counts: Dice with squared probabilities (Milletari et al., 2016),
  which a faint background hardly enters, and cross-entropy.
- **Where the lesion is known to be absent** drawn volume counts, as log(1 + V / V₀). Its gradient
  is the same in a healthy case and far from a lesion, and neither litres nor specks escape it:
  however large V is, halving it gains as much.
- **Where the patient has a lesion that no one outlined**, some volume must be drawn:
  log(1 + V₀ / V).

Every term belongs to one sample and one lesion, and is averaged over the samples of a step
(`rectvlm.train.task_loss`). Shapes: B samples, L lesions (5), Z × Y × X voxels, z × y × x cells.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rectvlm.config import LocalizationLossWeightsConfig
from rectvlm.labels import LESIONS, N_LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.models.layers import run_layer
from rectvlm.models.localizer import LocalizerOutput
from rectvlm.train.lesion_targets import LesionTargets
from rectvlm.train.task_loss import TargetCounts, TaskLoss, mean_of_known

SMALL_LESION_ML = {
    "pericardial_effusion": 10.0,
    "pleural_effusion": 10.0,
    "consolidation": 5.0,
    "ground_glass_opacity": 5.0,
    "lung_nodule": 0.3,
}
"""V₀: volume of a small lesion of each kind. Less of it drawn in vain costs little."""


def localization_loss(
    predicted: LocalizerOutput,
    targets: LesionTargets,
    term_weights: LocalizationLossWeightsConfig,
    counts: TargetCounts,
) -> TaskLoss:
    """Overlap and volumes at three resolutions, and the terms that the config weights.

    Alignment asks whether the patches that the localizer points at match the lesion's prompt. Its
    target comes from the outline, else from a label. Consistency compares the resolutions: it
    carries what a label teaches the patches on to the masks.

    Args:
        predicted: output of the localizer.
        targets: what is known of the lesions.
        term_weights: weights of the terms.
        counts: what the step teaches, per micro-batch.
    """
    _check_localization_shapes(predicted, targets)
    terms = _compute_all_lesion_terms(predicted, targets, term_weights.consistency > 0)
    value = term_weights.denoising * predicted.denoising_loss
    for resolution, weight in (
        (terms.full, 1.0),
        (terms.half, term_weights.half_resolution),
        (terms.patch, term_weights.patch_resolution),
    ):
        overlap = _mean_over_lesions(resolution.overlap, terms.outlined, counts.outlined)
        volume = mean_of_known(resolution.volume, targets.known, counts.lesions)
        value = value + weight * (overlap + term_weights.volume * volume)
    if term_weights.alignment > 0:
        present = terms.outlined | targets.labelled.present & ~targets.annotated
        logits = predicted.alignment_logits
        alignment = F.binary_cross_entropy_with_logits(
            logits, present.to(logits.dtype), reduction="none"
        )
        value = value + term_weights.alignment * mean_of_known(
            alignment, targets.known, counts.lesions
        )
    if term_weights.consistency > 0:
        is_compared = targets.known & ~targets.partial
        consistency = mean_of_known(terms.consistency, is_compared, counts.lesions)
        value = value + term_weights.consistency * consistency
    return TaskLoss(value, counts.lesions)


def _mean_over_lesions(values: Tensor, outlined: Tensor, counts: Sequence[float]) -> Tensor:
    """Mean of the lesions' means: a lesion that is rarely outlined counts as much as others.

    Args:
        values: (B, L).
        outlined: (B, L) bool, values that count.
        counts: number of values in the mean of each lesion.
    """
    divisors = torch.tensor([count or 1.0 for count in counts], device=values.device)
    outlined_lesions = sum(count > 0 for count in counts)
    return (values * outlined / divisors).sum() / (outlined_lesions or 1)


class ResolutionTerms(NamedTuple):
    """Terms of one resolution; (B,) for one lesion, (B, L) for all."""

    overlap: Tensor
    """Dice loss and cross-entropy around the outline; of no meaning where there is none."""
    volume: Tensor
    """Loss of the volume that is drawn where the lesion is absent, or not drawn where the patient
    has it."""


class LesionTerms(NamedTuple):
    """Terms of the loss before they are averaged; (B,) for one lesion, (B, L) for all."""

    full: ResolutionTerms
    half: ResolutionTerms
    patch: ResolutionTerms
    consistency: Tensor
    outlined: Tensor
    """bool: the outline holds a voxel."""


class _LesionKnowledge(NamedTuple):
    """What is known of one lesion of B samples, each (B,) bool."""

    outlined: Tensor
    """An outline holds a voxel."""
    complete: Tensor
    """Every voxel without an outline is negative."""
    missed: Tensor
    """The patient has the lesion, and no one outlined it."""


def _compute_all_lesion_terms(
    predicted: LocalizerOutput, targets: LesionTargets, with_consistency: bool
) -> LesionTerms:
    """Terms of all lesions, (B, L).

    They are computed lesion by lesion, and again in the backward pass where the localizer's
    activations are: the intermediate results take many times the memory of the logits.
    """
    full = predicted.mask_logits.unbind(1)
    half = predicted.half_mask_logits.unbind(1)
    patch = predicted.patch_logits.unbind(1)
    columns = []
    for lesion in LESIONS:
        terms = run_layer(
            _compute_lesion_terms,
            (full[lesion.bit], half[lesion.bit], patch[lesion.bit]),
            targets,
            lesion.bit,
            with_consistency,
            recompute=predicted.recompute,
        )
        columns.append(terms)
    return _stack_terms(columns)


def _stack_terms(columns: list[LesionTerms]) -> LesionTerms:
    """Terms (B, L) of terms (B,) of each lesion."""

    def stack(get: Callable[[LesionTerms], Tensor]) -> Tensor:
        return torch.stack([get(terms) for terms in columns], dim=1)

    return LesionTerms(
        ResolutionTerms(stack(lambda terms: terms.full.overlap), stack(lambda t: t.full.volume)),
        ResolutionTerms(stack(lambda terms: terms.half.overlap), stack(lambda t: t.half.volume)),
        ResolutionTerms(stack(lambda terms: terms.patch.overlap), stack(lambda t: t.patch.volume)),
        consistency=stack(lambda terms: terms.consistency),
        outlined=stack(lambda terms: terms.outlined),
    )


def _compute_lesion_terms(
    logits: tuple[Tensor, Tensor, Tensor],
    targets: LesionTargets,
    bit: int,
    with_consistency: bool,
) -> LesionTerms:
    """Terms of one lesion.

    Args:
        logits: (B, …), at full and half resolution and of the patches.
        targets: what is known of the lesions.
        bit: the lesion's position in `LESIONS`.
        with_consistency: whether to compute the consistency term.
    """
    probabilities = [resolution.sigmoid() for resolution in logits]
    patch_grid = logits[-1].shape[1:]
    knowledge, mask = _describe_knowledge(targets, bit)
    mask = mask & knowledge.outlined[:, None, None, None]
    # Only a lung lesion has a place that a region map bounds well.
    possible = targets.lung if LESIONS[bit].site == "lung" else torch.ones_like(mask)
    voxel_share = targets.voxel_ml / SMALL_LESION_ML[LESIONS[bit].key]
    near = _mark_neighbour_cells(_any_in_cells(mask, patch_grid))

    terms: list[ResolutionTerms] = []
    for resolution_logits, resolution_probabilities in zip(logits, probabilities, strict=True):
        grid = resolution_logits.shape[1:]
        resolution_terms = _compute_resolution_terms(
            resolution_logits,
            resolution_probabilities,
            _any_in_cells(mask, grid),
            _any_in_cells(possible, grid),
            _enlarge_cells(near, grid),
            knowledge,
            voxel_share * mask[0].numel() / resolution_logits[0].numel(),
        )
        terms.append(resolution_terms)
    full, half, patch = probabilities
    consistency = full.new_zeros(len(full))
    if with_consistency:
        consistency = _compare_resolutions(full, half) + _compare_resolutions(full, patch)
    return LesionTerms(terms[0], terms[1], terms[2], consistency, knowledge.outlined)


def _describe_knowledge(targets: LesionTargets, bit: int) -> tuple[_LesionKnowledge, Tensor]:
    """What is known of a lesion, and its outlines (B, Z, Y, X)."""
    mask = lesion_mask(targets.bits, LESIONS[bit])
    annotated, partial = targets.annotated[:, bit], targets.partial[:, bit]
    outlined = (annotated | partial) & mask.flatten(1).any(1)
    says = ~annotated & ~outlined & targets.labelled.known[:, bit]
    present = targets.labelled.present[:, bit]
    return _LesionKnowledge(outlined, annotated | says & ~present, says & present), mask


def _compute_resolution_terms(
    logits: Tensor,
    probabilities: Tensor,
    mask: Tensor,
    possible: Tensor,
    near: Tensor,
    knowledge: _LesionKnowledge,
    cell_share: float,
) -> ResolutionTerms:
    """Terms of one lesion at one resolution.

    Args:
        logits: (B, z, y, x).
        probabilities: their sigmoid.
        mask: (B, z, y, x) bool, outlines that count.
        possible: (B, z, y, x) bool, where the lesion can lie.
        near: (B, z, y, x) bool, around an outline. There, what is not outlined counts as empty even
            where other lesions may be missing: an outline is drawn to the lesion's border.
        knowledge: what is known of the lesion.
        cell_share: volume of a cell, as a share of a small lesion's.
    """
    is_empty = ~mask & (knowledge.complete[:, None, None, None] | ~possible)
    is_far = is_empty & ~near
    squares = probabilities.square()
    drawn = cell_share * _sum_where(is_far, squares)
    in_place = cell_share * _sum_where(possible, squares)
    missing = torch.log1p(1 / in_place.clamp_min(1e-12))
    volume = torch.log1p(drawn) + torch.where(knowledge.missed, missing, 0.0)
    overlap = _dice_loss(probabilities, squares, mask, near)
    overlap = overlap + _cross_entropy(logits, mask, near)
    return ResolutionTerms(overlap, volume)


def _dice_loss(probabilities: Tensor, squares: Tensor, mask: Tensor, near: Tensor) -> Tensor:
    """1 − 2 Σ p g / (Σ p² + Σ g) around the outline (Milletari et al., 2016), (B,)."""
    shared, drawn = _sum_where(mask, probabilities), _sum_where(near, squares)
    return 1 - (2 * shared + 1e-5) / (drawn + _count(mask) + 1e-5)


def _cross_entropy(logits: Tensor, mask: Tensor, near: Tensor) -> Tensor:
    """Cross-entropy around the outline, (B,): half of it over all voxels, a quarter each over those
    inside and outside. The plain mean alone learns a small lesion too late, the balanced one alone
    draws beyond its border.
    """
    border = near & ~mask
    missed = F.softplus(-logits)
    inside, outside = _sum_where(mask, missed), _sum_where(border, missed + logits)
    voxels_inside, voxels_outside = _count(mask), _count(border)
    plain = (inside + outside) / (voxels_inside + voxels_outside).clamp_min(1)
    balanced = inside / voxels_inside.clamp_min(1) + outside / voxels_outside.clamp_min(1)
    return (plain + balanced / 2) / 2


def _sum_where(mask: Tensor, values: Tensor) -> Tensor:
    """Sum of a sample's values where the mask is True, (B,)."""
    return (values * mask).flatten(1).sum(1)


def _count(mask: Tensor) -> Tensor:
    """Number of a sample's True values, (B,)."""
    return mask.flatten(1).sum(1)


def _compare_resolutions(full: Tensor, coarser: Tensor) -> Tensor:
    """Mean squared difference of the probabilities at full and at a coarser resolution, (B,)."""
    pooled = _pool_probabilities(full, coarser.shape[1:])
    return (coarser - pooled).square().flatten(1).mean(1)


def _reduce_cells(
    volume: Tensor, grid: torch.Size, reduce: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Reduce (B, Z, Y, X) to one value a cell, (B, *grid).

    One axis after the other, which a CPU does three times as fast as all in one.

    Args:
        volume: (B, Z, Y, X).
        grid: number of cells along each axis.
        reduce: reduces a tensor along one axis, which goes.
    """
    for axis, size in zip((3, 2, 1), reversed(grid), strict=True):
        volume = reduce(volume.unflatten(axis, (size, -1)), axis + 1)
    return volume


def _any_in_cells(mask: Tensor, grid: torch.Size) -> Tensor:
    """Cells that hold a True voxel: a nodule smaller than a cell still marks it."""
    return mask if mask.shape[1:] == grid else _reduce_cells(mask, grid, torch.any)


def _mark_neighbour_cells(cells: Tensor) -> Tensor:
    """Marked cells (B, z, y, x) bool and those around them."""
    return F.max_pool3d(cells[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0


def _enlarge_cells(cells: Tensor, grid: torch.Size) -> Tensor:
    """Cells (B, z, y, x) on a finer grid."""
    for axis, size in enumerate(grid, start=1):
        cells = cells.repeat_interleave(size // cells.shape[axis], dim=axis)
    return cells


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
    squares = _reduce_cells(probabilities.square(), grid, torch.sum)
    return squares / _reduce_cells(probabilities, grid, torch.sum).clamp_min(1e-12)


def _check_localization_shapes(predicted: LocalizerOutput, targets: LesionTargets) -> None:
    bits, mask_logits = targets.bits, predicted.mask_logits
    assert bits.ndim == 4 and bits.dtype == torch.uint8, (
        f"lesion bits must be uint8 (B, Z, Y, X), not {bits.dtype} {tuple(bits.shape)}"
    )
    batch_size, *grid = bits.shape
    expected = (batch_size, N_LESIONS, *grid)
    assert mask_logits.shape == expected, (
        f"masks for lesion bits {tuple(bits.shape)} must be {expected}, "
        f"not {tuple(mask_logits.shape)}"
    )
    assert targets.lung.shape == bits.shape and targets.lung.dtype == torch.bool, (
        f"lung must be bool {tuple(bits.shape)}, "
        f"not {targets.lung.dtype} {tuple(targets.lung.shape)}"
    )
    lower_resolutions = {"half": predicted.half_mask_logits, "patch": predicted.patch_logits}
    for name, logits in lower_resolutions.items():
        remainders = [n % m for n, m in zip(grid, logits.shape[2:], strict=True)]
        assert logits.shape[:2] == (batch_size, N_LESIONS) and not any(remainders), (
            f"{name} logits {tuple(logits.shape)} do not divide masks {tuple(mask_logits.shape)}"
        )
    flags_by_name = {
        "annotated": targets.annotated,
        "partial": targets.partial,
        "labelled.present": targets.labelled.present,
        "labelled.known": targets.labelled.known,
    }
    for name, flags in flags_by_name.items():
        assert flags.shape == (batch_size, N_LESIONS) and flags.dtype == torch.bool, (
            f"{name} must be bool of shape ({batch_size}, {N_LESIONS}), "
            f"not {flags.dtype} {tuple(flags.shape)}"
        )
    tensors = (mask_logits, bits, targets.lung, *flags_by_name.values())
    devices = {tensor.device for tensor in tensors}
    assert len(devices) == 1, f"logits, outlines and labels must be on one device, not on {devices}"
