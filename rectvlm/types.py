"""Types that several rooms share: arrays, geometry, a sample, a batch, and the error a user sees."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rectvlm.labels import LESION_BY_KEY

Int16Volume = NDArray[np.int16]
"""HU, indexed (z, y, x) in the canonical frame or (i, j, k) in a file's own."""
MaskVolume = NDArray[np.uint8]
"""Region ids, or lesion bits, on the same grid as its CT."""
Affine = NDArray[np.float64]
"""4 × 4, voxel index to world in mm; world is RAS+ (x to the patient's left is negative), as in NIfTI."""

Split = Literal["train", "valid"]

JsonObject = dict[str, Any]
"""A JSON object at a file's border, before or after it has a type of its own."""

COARSE_REGIONS_SOURCE = "coarse"
"""The source of a region map that was estimated from the CT alone: good for sides and zones, not for lobes."""


class UserError(Exception):
    """Something that the user can mend: one sentence with what was expected, what was found, where, and what to do."""


class InputError(UserError):
    """A file that cannot be used, in the parts that a quarantine list keeps."""

    def __init__(
        self, file: object, reason: str, *, expected: str, found: str, remedy: str
    ) -> None:
        """One sentence: FILE REASON: expected EXPECTED, found FOUND; REMEDY."""
        super().__init__(f"{file} {reason}: expected {expected}, found {found}; {remedy}.")
        self.file, self.reason, self.expected, self.found, self.remedy = (
            str(file),
            reason,
            expected,
            found,
            remedy,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by their positional arguments alone; this one crosses process borders.
        parts = (self.file, self.reason, self.expected, self.found, self.remedy)
        return _rebuild_input_error, parts


def _rebuild_input_error(
    file: str, reason: str, expected: str, found: str, remedy: str
) -> InputError:
    return InputError(file, reason, expected=expected, found=found, remedy=remedy)


@dataclass(frozen=True)
class Volume:
    """An array with its place in the world."""

    array: NDArray[Any]
    """(i, j, k), numbers as the file means them (its header's own scaling applied), often read-only."""
    affine: Affine
    """4 × 4, index to RAS+ mm."""
    where: str
    """The file or case, for messages."""


@dataclass(frozen=True)
class GridGeometry:
    """Where a sample's grid lies, and where it came from, so that masks can go back.

    The world is RAS+ millimetres throughout.
    """

    grid_affine: list[list[float]]
    """4 × 4, canonical index (z, y, x, 1) to world."""
    native_shape: tuple[int, int, int]
    """Shape of the file's array, (i, j, k)."""
    native_affine: list[list[float]]
    """4 × 4 of the file, index (i, j, k, 1) to world."""


@dataclass(frozen=True)
class HuConversion:
    """How a file's numbers became Hounsfield units, and why."""

    slope: float
    intercept: float
    """HU = slope × stored + intercept; 1 and 0 when the file already held HU."""
    reason: str
    """The evidence, in one sentence."""
    padding_voxels: int = 0
    """Voxels below −1024 HU, outside the field of view, that were set to air."""


@dataclass(frozen=True)
class SampleMeta:
    """Everything of a sample but its arrays; `KEY.json` in a shard."""

    key: str
    split: Split
    source: str
    """Data set and file that the volume came from."""
    patient: str
    """Patient id: a patient is in one split only."""
    scan: str
    """The examination. Its reconstructions share labels and report, so results count scans; the key itself where
    there is only one volume."""
    labels: dict[str, int | None]
    """All 18 findings: 1 present, 0 absent, None unknown. Unknown is never read as negative."""
    findings: str | None
    """The report's Findings section, None when there is none."""
    impression: str | None
    """The report's Impression section, None when there is none."""
    spacing: tuple[float, float, float]
    """Grid spacing (z, y, x) in mm."""
    geometry: GridGeometry
    hu: HuConversion
    lesions_annotated: dict[str, bool]
    """By lesion key: whether every lesion of the kind was outlined. A lesion that was not annotated is not absent."""
    regions_source: str | None
    """Where the region map came from; None when there is none, `COARSE` when it was estimated from the CT."""
    lesions_partial: dict[str, bool] = field(
        default_factory=lambda: dict.fromkeys(LESION_BY_KEY, False)
    )
    """By lesion key: some are outlined, others may not be. What is drawn is sure, what is empty is unknown; such a
    lesion does not count as annotated."""
    lesions_source: str | None = None
    """Where the outlines came from; None when there are none."""
    series: dict[str, str | float | None] = field(default_factory=dict)
    """What is known of the reconstruction (kernel, slice spacing, and why it was chosen), for the record."""
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = 2


@dataclass
class Sample:
    """One case as it stands in a shard."""

    ct: Int16Volume
    """HU (Z, Y, X)."""
    lesions: MaskVolume
    """Lesion bits (Z, Y, X); see `labels.LESIONS`."""
    regions: MaskVolume
    """Region ids (Z, Y, X), 0 to 20; all 0 when `meta.regions_source` is None."""
    meta: SampleMeta


@dataclass
class Batch:
    """Samples stacked for the device. B samples on a grid of Z × Y × X voxels."""

    keys: list[str]
    ct: torch.Tensor
    """(B, Z, Y, X) int16, HU."""
    lesions: torch.Tensor
    """(B, Z, Y, X) uint8, lesion bits."""
    regions: torch.Tensor
    """(B, Z, Y, X) uint8, region ids."""
    regions_known: torch.Tensor
    """(B,) bool: False where no region map exists."""
    lesions_annotated: torch.Tensor
    """(B, 5) bool: False where a lesion was not looked for."""
    lesions_partial: torch.Tensor
    """(B, 5) bool: True where outlines exist but others may be missing; never where `lesions_annotated` is."""
    labels: torch.Tensor
    """(B, 18) float32, 0 or 1; 0 where unknown, so always read with `labels_known`."""
    labels_known: torch.Tensor
    """(B, 18) bool."""
    reports: list[str | None]
    """The target text of each sample, sections included; None where there is no report."""
    spacing: tuple[float, float, float]
    """(z, y, x) in mm."""
    metas: list[SampleMeta]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on a device (pinned memory is copied asynchronously)."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; called by torch's DataLoader."""
        pinned: dict[str, Any] = {
            f.name: getattr(self, f.name).pin_memory()
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **pinned)


@dataclass
class BatchPrediction:
    """What the model says of a batch. B samples on a grid of Z × Y × X voxels."""

    finding_probabilities: torch.Tensor
    """(B, 18) float32, probabilities."""
    lesion_probabilities: torch.Tensor
    """(B, 5, Z, Y, X) float32, probabilities in the order of `labels.LESIONS`."""
    reports: list[str] | None
    """Generated text, sections included; None when no report was asked for or the model has no generator."""

    def require_finite(self, keys: list[str]) -> None:
        """Stop at what no number is: compared with a threshold, it would read as "absent".

        Args:
            keys: of the batch's samples, for the message.

        Raises:
            UserError: a probability is not finite.
        """
        for what, found in (
            ("findings", self.finding_probabilities),
            ("lesions", self.lesion_probabilities),
        ):
            if not found.isfinite().all():
                raise UserError(
                    f"The model's probabilities of {what} for {', '.join(keys)} are not finite: use another checkpoint."
                )
