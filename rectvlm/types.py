"""Types that all rooms share: arrays, geometry, samples, batches, and the errors that users see."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from rectvlm.labels import LESION_BY_KEY

if TYPE_CHECKING:
    import torch  # takes seconds, which a command would spend before it refuses a wrong path
    from pydicom.dataset import Dataset

Int16Volume = NDArray[np.int16]
"""HU, indexed (z, y, x) on the canonical grid or (i, j, k) on the native grid of a file."""
MaskVolume = NDArray[np.uint8]
"""Region ids or lesion bits, on the grid of their CT."""
Affine = NDArray[np.float64]
"""4 × 4 matrix, voxel index to world in mm. The world is RAS+ as in NIfTI: left has negative x."""

Split = Literal["train", "dev", "valid", "grounding"]
"""Use of a patient's cases: `train` is learned from; `dev`, taken from train, chooses checkpoints
and thresholds; `valid` is evaluated; `grounding`, cases that people outlined exhaustively
(ReXGroundingCT), measures localization alone."""
SPLITS: tuple[Split, ...] = get_args(Split)

JsonObject = dict[str, Any]
"""Tree of plain values, as a JSON file holds it."""

COARSE_REGIONS_SOURCE = "coarse"
"""`regions_source` of a map estimated from the CT: good for sides and zones; lobes are rough."""

TOTALSEGMENTATOR_OUTLINES = "TotalSegmentator"
"""`lesions_source` of outlines that another network drew."""
REXGROUNDING_OUTLINES = "ReXGroundingCT (people)"
"""`lesions_source` of outlines that radiologists drew or checked."""
OWN_OUTLINES = "own masks"
"""`lesions_source` of outlines in files or tables of the user's own, whoever drew them."""
PHANTOM_OUTLINES = "phantom"
"""`lesions_source` of outlines that are known by construction."""
UNKNOWN_OUTLINES = "unknown"
"""Word for the source of outlines where `lesions_source` says none."""

SAMPLE_SCHEMA = 3
"""Version of a sample's members, of the index and of the manifest of shards."""


class UserError(Exception):
    """An error that the user can mend.

    Its message is one sentence: what was expected, what was found, where, and what to do.
    """


class InputError(UserError):
    """A file that cannot be used; its attributes are the columns of a quarantine list."""

    def __init__(
        self, file: object, reason: str, *, expected: str, found: str, remedy: str
    ) -> None:
        """Make the message "FILE REASON: expected EXPECTED, found FOUND; REMEDY."."""
        super().__init__(f"{file} {reason}: expected {expected}, found {found}; {remedy}.")
        self.file = str(file)
        self.reason = reason
        self.expected = expected
        self.found = found
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle their positional arguments only; this one travels between processes.
        arguments = (self.file, self.reason, self.expected, self.found, self.remedy)
        return _rebuild_input_error, arguments


def _rebuild_input_error(
    file: str, reason: str, expected: str, found: str, remedy: str
) -> InputError:
    return InputError(file, reason, expected=expected, found=found, remedy=remedy)


def first_invalid_field(error: ValidationError) -> tuple[str, str]:
    """Dotted name of the first field that pydantic refused, or "top level", and the reason."""
    fault = error.errors()[0]
    return ".".join(map(str, fault["loc"])) or "top level", fault["msg"]


@dataclass(frozen=True)
class Volume:
    """A voxel array with its position in the world."""

    array: NDArray[Any]
    """Values (i, j, k) with the scaling of the file's header applied; often read-only."""
    affine: Affine
    """Index (i, j, k, 1) to world."""
    where: str
    """Name of the file or case in messages."""
    nifti_header: bytes | None = None
    """Header of the file that the affine was read from; None for an affine from elsewhere."""
    pseudonym: str | None = None
    """Name of a DICOM series in results, which says nothing of the patient; None for other files,
    which have their own names."""
    dicom_headers: "tuple[Dataset, ...] | None" = field(default=None, repr=False)
    """Headers of the DICOM files, with the patient's name, for DICOM results of a prediction; None
    elsewhere."""


@dataclass(frozen=True)
class GridGeometry:
    """Positions of a sample's canonical grid and of its file's grid in the RAS+ world, mm."""

    grid_affine: list[list[float]]
    """4 × 4, canonical index (z, y, x, 1) to world."""
    native_shape: tuple[int, int, int]
    """Shape of the file's array, (i, j, k)."""
    native_affine: list[list[float]]
    """4 × 4, native index (i, j, k, 1) to world."""


@dataclass(frozen=True)
class HuConversion:
    """Conversion of a file's numbers to HU = slope × stored + intercept, and its reason."""

    slope: float
    """Factor; 1 when the file already held HU."""
    intercept: float
    """Offset in HU; 0 when the file already held HU."""
    reason: str
    """Evidence for the conversion, in one sentence."""
    padding_voxels: int = 0
    """Number of voxels below −1024 HU, outside the field of view, that were set to air."""


def no_lesions_source() -> dict[str, str | None]:
    """`lesions_source` of a case without outlines."""
    return dict.fromkeys(LESION_BY_KEY)


@dataclass(frozen=True)
class SampleMeta:
    """Metadata of a sample; `KEY.json` in a shard, whose keys are these field names."""

    key: str
    """Name of the sample, unique in a data set."""
    split: Split
    """Split of the sample's patient."""
    source: str
    """Data set and file that the volume came from."""
    patient: str
    """Id of the patient, who is in one split only."""
    scan: str
    """Id of the examination; the sample's key for a scan of one volume. Reconstructions of a scan
    share labels and report, so results count scans."""
    labels: dict[str, int | None]
    """All 18 findings: 1 present, 0 absent, None unknown. Unknown is never read as negative."""
    findings: str | None
    """Findings section of the report; None without one."""
    impression: str | None
    """Impression section of the report; None without one."""
    spacing: tuple[float, float, float]
    """Grid spacing (z, y, x), mm."""
    geometry: GridGeometry
    """Positions of the canonical and the native grid."""
    hu: HuConversion
    """Conversion of the file's numbers to HU."""
    lesions_annotated: dict[str, bool]
    """Whether every lesion of a kind was outlined, by lesion key. Not annotated is not absent."""
    regions_source: str | None
    """Origin of the region map; None without a map, `COARSE_REGIONS_SOURCE` for an estimate from
    the CT."""
    indication: str | None = None
    """Reason for the examination, as it was known before the CT; None where it is not known."""
    technique: str | None = None
    """Technique of the examination, in words; None where it is not known."""
    lesions_partial: dict[str, bool] = field(
        default_factory=lambda: dict.fromkeys(LESION_BY_KEY, False)
    )
    """Whether some lesions of a kind are outlined while others may not be, by lesion key. Drawn
    voxels are sure and empty ones unknown; such a lesion does not count as annotated."""
    lesions_source: dict[str, str | None] = field(default_factory=no_lesions_source)
    """Who or what outlined each lesion, by lesion key: one of the words above or another name,
    several joined by " + "; None where the lesion was not annotated, or nobody knows."""
    series: dict[str, str | float | None] = field(default_factory=dict)
    """Properties of the reconstruction (kernel, slice spacing) and the reason for its choice."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that made the sample, by name."""
    schema: int = SAMPLE_SCHEMA
    """Version of this schema."""


@dataclass
class Sample:
    """One case as a shard stores it."""

    ct: Int16Volume
    """HU (Z, Y, X)."""
    lesions: MaskVolume
    """Lesion bits (Z, Y, X); see `lesion_bits`."""
    regions: MaskVolume
    """Region ids (Z, Y, X), 0 to 20; all 0 when `meta.regions_source` is None."""
    meta: SampleMeta


@dataclass
class Batch:
    """B stacked samples on one grid of Z × Y × X voxels."""

    keys: list[str]
    ct: "torch.Tensor"
    """(B, Z, Y, X) int16, HU."""
    lesions: "torch.Tensor"
    """(B, Z, Y, X) uint8, lesion bits."""
    regions: "torch.Tensor"
    """(B, Z, Y, X) uint8, region ids."""
    regions_known: "torch.Tensor"
    """(B,) bool: False where no region map exists."""
    lesions_annotated: "torch.Tensor"
    """(B, 5) bool: True where every lesion of a kind was outlined."""
    lesions_partial: "torch.Tensor"
    """(B, 5) bool: True where some lesions of a kind were outlined and others may be missing; never
    together with `lesions_annotated`."""
    labels: "torch.Tensor"
    """(B, 18) float32: 1 present, 0 absent or unknown; always read with `labels_known`."""
    labels_known: "torch.Tensor"
    """(B, 18) bool."""
    reports: list[str | None]
    """Target text of each sample, sections included; None without a report."""
    spacing: tuple[float, float, float]
    """Grid spacing (z, y, x), mm."""
    metas: list[SampleMeta]
    """Metadata of each sample."""

    def to(self, device: "torch.device | str") -> "Batch":
        """Copy the tensors to a device, asynchronously from pinned memory."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory; torch's DataLoader calls this."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def without_outlines(self) -> "Batch":
        """The same samples as if no one had annotated a lesion."""
        import torch

        return replace(
            self,
            lesions=torch.zeros_like(self.lesions),
            lesions_annotated=torch.zeros_like(self.lesions_annotated),
            lesions_partial=torch.zeros_like(self.lesions_partial),
        )

    def _map_tensors(self, function: "Callable[[torch.Tensor], torch.Tensor]") -> "Batch":
        import torch

        changed = {}
        for batch_field in fields(self):
            value = getattr(self, batch_field.name)
            if isinstance(value, torch.Tensor):
                changed[batch_field.name] = function(value)
        return replace(self, **changed)  # type: ignore[arg-type]


@dataclass
class BatchPrediction:
    """Outputs of the model for a batch of B samples on a grid of Z × Y × X voxels."""

    finding_probabilities: "torch.Tensor"
    """(B, 18) float32."""
    lesion_probabilities: "torch.Tensor"
    """(B, 5, Z, Y, X) float32, in the order of `labels.LESIONS`."""
    reports: list[str] | None
    """Generated reports, sections included; None when none was asked for or the model has no
    generator."""
    global_tokens: "torch.Tensor"
    """(B, C) float32: the encoder's summary of each volume."""

    def require_finite(self, keys: list[str]) -> None:
        """Refuse NaN: compared with a threshold, it would read as "absent".

        Args:
            keys: keys of the batch's samples, for the message.

        Raises:
            UserError: a probability is not finite.
        """
        for kind, probabilities in (
            ("findings", self.finding_probabilities),
            ("lesions", self.lesion_probabilities),
        ):
            if not probabilities.isfinite().all():
                raise UserError(
                    f"The model's probabilities of {kind} for {', '.join(keys)} are not finite: "
                    "use another checkpoint."
                )
