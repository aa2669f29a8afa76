"""What a batch says about its lesions: outlines, labels, and where a lesion cannot lie.

Shapes: B samples, F findings (18), L lesions (5), Z × Y × X voxels.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rectvlm.labels import LESION_FINDING_INDEXES, LESION_IS_IMPLIED_BY_FINDING, LESIONS, LOBES
from rectvlm.lesion_bits import present_lesions
from rectvlm.types import Batch

LUNG_MARGIN_MM = 15.0
"""Distance from the lobes of a region map within which a lung lesion can lie: a map leaves out
lung that is consolidated."""


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


@dataclass(frozen=True)
class LesionTargets:
    """What is known of the lesions of a batch.

    An outline decides where there is one. Otherwise a label does: "absent" is an empty outline.
    """

    bits: Tensor
    """(B, Z, Y, X) uint8, lesion bits of the outlines."""
    annotated: Tensor
    """(B, L) bool: all lesions of the kind are outlined, so a voxel without one is negative."""
    partial: Tensor
    """(B, L) bool: some lesions are outlined, others may be missing; never where `annotated` is."""
    labelled: LesionPresence
    """Lesions as the labels have them."""
    lung: Tensor
    """(B, Z, Y, X) bool: voxels where a lung lesion can lie; all of them without a region map."""
    voxel_ml: float
    """Volume of a voxel, ml."""

    @property
    def known(self) -> Tensor:
        """(B, L) bool: an outline or a label says something about the lesion."""
        return self.annotated | self.partial | self.labelled.known


def find_outlined(bits: Tensor) -> Tensor:
    """(B, L) bool: the outlines (B, Z, Y, X) of a sample hold a voxel of the lesion."""
    rows = []
    # NumPy takes one pass over the voxels, torch one for each lesion.
    for sample in bits.numpy() if bits.device.type == "cpu" else bits:
        present = present_lesions(sample)
        rows.append([lesion in present for lesion in LESIONS])
    return torch.tensor(rows, device=bits.device)


def collect_lesion_targets(batch: Batch) -> LesionTargets:
    """Collect what a batch says about its lesions."""
    return LesionTargets(
        bits=batch.lesions,
        annotated=batch.lesions_annotated,
        partial=batch.lesions_partial,
        labelled=infer_lesions_from_labels(batch.labels, batch.labels_known),
        lung=find_possible_lung(batch.regions, batch.regions_known, batch.spacing),
        voxel_ml=math.prod(batch.spacing) / 1000,
    )


def find_possible_lung(
    regions: Tensor, regions_known: Tensor, spacing: tuple[float, float, float]
) -> Tensor:
    """Voxels where a lung lesion can lie: at most `LUNG_MARGIN_MM` from a lobe, along each axis.

    Args:
        regions: (B, Z, Y, X) uint8, region ids.
        regions_known: (B,) bool, whether there is a region map.
        spacing: voxel size (z, y, x), mm.

    Returns:
        (B, Z, Y, X) bool; True everywhere for a sample without a map or whose map has no lobe.
    """
    lobes = (regions >= LOBES[0].id) & (regions <= LOBES[-1].id)
    is_mapped = regions_known & lobes.flatten(1).any(1)
    near = lobes[:, None].float()
    for axis, size in enumerate(spacing):
        reach = int(LUNG_MARGIN_MM / size)
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * reach + 1, reach
        near = F.max_pool3d(near, kernel, stride=1, padding=padding)
    return (near[:, 0] > 0) | ~is_mapped[:, None, None, None]
