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

from rectvlm.config import LocalizationTerms, LossConfig
from rectvlm.labels import LESION_FINDINGS, LESION_IS_FINDING, N_FINDINGS, N_LESIONS
from rectvlm.models import Outputs
from rectvlm.models.localizer import Localization
from rectvlm.train.phases import Task
from rectvlm.train.weighting import TaskWeighting
from rectvlm.types import Batch


@dataclass
class Loss:
    """A task's loss over a batch, and how many terms it is a mean of."""

    value: Tensor
    """Scalar float32, with a graph."""
    count: Tensor
    """Scalar: 0 when the batch says nothing about the task."""


def losses(outputs: Outputs, batch: Batch, tasks: tuple[Task, ...], terms: LocalizationTerms) -> dict[Task, Loss]:
    """The loss of each task; `terms` weigh those of the localization."""
    found: dict[Task, Loss] = {}
    if "classification" in tasks:
        found["classification"] = classification(outputs.findings, batch.labels, batch.labels_known)
    if "localization" in tasks:
        assert outputs.localization is not None
        known = Outlines(batch.lesions, batch.lesions_annotated, batch.lesions_partial)
        labelled = labelled_lesions(batch.labels, batch.labels_known)
        found["localization"] = localization(outputs.localization, known, labelled, terms)
    if "report" in tasks:
        assert outputs.report is not None
        has_report = outputs.report.tokens > 0
        found["report"] = Loss(_mean(outputs.report.per_sample, has_report), has_report.sum())
    return found


def total(found: dict[Task, Loss], weights: LossConfig, weighting: TaskWeighting | None = None) -> Tensor:
    """Σ weight · loss, or what learned weights make of these products."""
    weighted = torch.stack([getattr(weights, task) * loss.value for task, loss in found.items()])
    if weighting is None:
        return weighted.sum()
    return weighting(weighted, torch.stack([loss.count > 0 for loss in found.values()]))


def classification(logits: Tensor, labels: Tensor, known: Tensor) -> Loss:
    """Binary cross-entropy over known labels; logits, labels and known are (B, F)."""
    assert logits.shape == labels.shape == known.shape and logits.shape[1:] == (N_FINDINGS,), (
        f"logits, labels and known must be (B, {N_FINDINGS}), not "
        f"{tuple(logits.shape)}, {tuple(labels.shape)}, {tuple(known.shape)}"
    )
    assert known.dtype == torch.bool, f"known must be bool, not {known.dtype}"
    each = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
    return Loss(_mean(each, known), known.sum())


class Outlines(NamedTuple):
    """What people have drawn."""

    bits: Tensor
    """(B, Z, Y, X) uint8, lesion bits."""
    annotated: Tensor
    """(B, L) bool."""
    partial: Tensor
    """(B, L) bool, True where outlines exist but others may be missing; never where `annotated` is."""


class Presence(NamedTuple):
    """Which lesions a patient has, as far as is known."""

    present: Tensor
    """(B, L) bool."""
    known: Tensor
    """(B, L) bool; `present` is False where this is."""


def labelled_lesions(labels: Tensor, labels_known: Tensor) -> Presence:
    """What findings' labels (B, F) and (B, F) bool say of lesions.

    A finding that is absent excludes the lesion that implies it. One that is present proves the lesion only where both
    are the same thing: no finding says ground glass, since "Lung opacity" may be something else.
    """
    same = torch.tensor(LESION_IS_FINDING, device=labels.device)
    columns = list(LESION_FINDINGS)
    has, told = labels[:, columns] > 0.5, labels_known[:, columns]
    return Presence(has & told & same, told & (same | ~has))


def localization(found: Localization, outlines: Outlines, labelled: Presence, terms: LocalizationTerms) -> Loss:
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
    _check(found, outlines, labelled)
    bits, annotated, partial = outlines
    scales = (found.masks.unbind(1), found.half.unbind(1), found.coarse.unbind(1))
    # One lesion at a time, computed again in the backward pass: what lies between would be many times the logits.
    each = [
        checkpoint(
            _one_lesion,
            *(scale[k] for scale in scales),
            bits >> k & 1,
            partial[:, k],
            terms.consistency > 0,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for k in range(N_LESIONS)
    ]
    per = LesionTerms(*(torch.stack(values, dim=1) for values in zip(*each, strict=True)))
    drawn = partial & per.present
    # Soft Dice against an empty mask is 1 whatever is drawn: there, cross-entropy alone says "none".
    outlined, known = annotated & per.present, annotated | drawn
    value = (
        _mean(per.dice, outlined)
        + _mean(per.entropy, known)
        + terms.half * (_mean(per.half_dice, outlined) + _mean(per.half_entropy, known))
        + terms.coarse * _mean(per.coarse_entropy, known)
        + terms.denoising * found.denoising
    )
    labelled_only = labelled.known & ~known
    if terms.alignment > 0:
        wanted = torch.where(known, per.present, labelled.present).to(found.alignment.dtype)
        match = F.binary_cross_entropy_with_logits(found.alignment, wanted, reduction="none")
        value = value + terms.alignment * _mean(match, known | labelled_only)
        known = known | labelled_only
    if terms.consistency > 0:
        value = value + terms.consistency * _mean(per.consistency, known & ~partial)
    return Loss(value, known.sum())


class LesionTerms(NamedTuple):
    """Terms of the loss before they are averaged; (B,) for one lesion, (B, L) for all."""

    dice: Tensor
    entropy: Tensor
    half_dice: Tensor
    half_entropy: Tensor
    coarse_entropy: Tensor
    consistency: Tensor
    present: Tensor
    """bool: whether the outline holds a voxel."""


def _one_lesion(
    full: Tensor, half: Tensor, coarse: Tensor, mask: Tensor, partial: Tensor, consistent: bool
) -> LesionTerms:
    """Terms of one lesion from its logits (B, …) at three resolutions, mask (B, Z, Y, X) uint8 and `partial` (B,)."""
    present = mask.flatten(1).amax(1) > 0
    drawn = partial & present
    # The largest value, not the mean: a nodule smaller than a cell still marks it.
    half_mask, coarse_mask = (_cells(mask, logits.shape[1:]).amax((2, 4, 6)).float() for logits in (half, coarse))
    masks = mask.float()
    consistency = full.new_zeros(len(full))
    if consistent:
        p = full.sigmoid()
        for logits in (half, coarse):
            consistency = consistency + (logits.sigmoid() - _pooled(p, logits.shape[1:])).square().flatten(1).mean(1)
    return LesionTerms(
        _soft_dice(full, masks),
        _entropy(full, masks, drawn),
        _soft_dice(half, half_mask),
        _entropy(half, half_mask, drawn),
        _entropy(coarse, coarse_mask, drawn),
        consistency,
        present,
    )


def _cells(fine: Tensor, grid: torch.Size) -> Tensor:
    """(B, Z, Y, X) seen as (B, z, Z / z, y, Y / y, x, X / x)."""
    return fine.unflatten(3, (grid[2], -1)).unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))


def _pooled(p: Tensor, grid: torch.Size) -> Tensor:
    """Mean of each cell's probabilities, weighted with themselves: Σ p² / Σ p, (B, Z, Y, X) to (B, *grid).

    A plain mean would contradict the targets, in which a voxel marks its whole cell: of a patch that holds one nodule
    of 27 voxels it is 0.03. This one is 1 for any mask drawn surely, p where p is the same everywhere, and its gradient
    reaches every voxel, not the largest alone.
    """
    cells = _cells(p, grid)
    return cells.square().sum((2, 4, 6)) / cells.sum((2, 4, 6)).clamp_min(1e-12)


def _soft_dice(logits: Tensor, masks: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 − 2 Σ p g / (Σ p + Σ g) over the voxels (Milletari et al., 2016), (B,).

    MONAI's `DiceLoss(sigmoid=True)` to the last digit, without the seconds that importing MONAI takes on every rank.
    """
    p, g = logits.sigmoid().flatten(1), masks.flatten(1)
    return 1 - (2 * (p * g).sum(1) + smooth) / (p.sum(1) + g.sum(1) + smooth)


def _entropy(logits: Tensor, masks: Tensor, drawn: Tensor) -> Tensor:
    """Mean over the voxels, or over those in the mask alone where it is `drawn` in part: (B,)."""
    each = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").flatten(1)
    counted = torch.where(drawn[:, None], masks.flatten(1), 1.0)
    return (each * counted).sum(1) / counted.sum(1)


def _mean(values: Tensor, known: Tensor) -> Tensor:
    """Mean over what is known; 0 with a graph when nothing is."""
    return (values * known).sum() / known.sum().clamp_min(1)


def _check(found: Localization, outlines: Outlines, labelled: Presence) -> None:
    bits = outlines.bits
    assert bits.ndim == 4 and bits.dtype == torch.uint8, (
        f"lesion bits must be uint8 (B, Z, Y, X), not {bits.dtype} {tuple(bits.shape)}"
    )
    b, *grid = bits.shape
    assert found.masks.shape == (b, N_LESIONS, *grid), (
        f"masks for lesion bits {tuple(bits.shape)} must be {(b, N_LESIONS, *grid)}, not {tuple(found.masks.shape)}"
    )
    for name, logits in (("half", found.half), ("coarse", found.coarse)):
        assert logits.shape[:2] == (b, N_LESIONS) and not any(
            n % m for n, m in zip(grid, logits.shape[2:], strict=True)
        ), f"{name} logits {tuple(logits.shape)} do not divide masks {tuple(found.masks.shape)}"
    for name, flags in (
        ("annotated", outlines.annotated),
        ("partial", outlines.partial),
        ("labelled.present", labelled.present),
        ("labelled.known", labelled.known),
    ):
        assert flags.shape == (b, N_LESIONS) and flags.dtype == torch.bool, (
            f"{name} must be bool of shape ({b}, {N_LESIONS}), not {flags.dtype} {tuple(flags.shape)}"
        )
    places = {t.device for t in (found.masks, *outlines, *labelled)}
    assert len(places) == 1, f"logits, outlines and labels must be on one device, not on {places}"
