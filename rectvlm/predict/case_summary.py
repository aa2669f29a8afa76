"""Content of `findings.json`: the findings, lesions and report of one case.

`findings.schema.json` beside this module is its JSON Schema; `findings_schema` makes it from the
types and docstrings here.
"""

from dataclasses import dataclass

from rectvlm.lesion_places import PlaceSide
from rectvlm.predict.contradictions import Contradiction
from rectvlm.predict.lesion_table import LesionComponent
from rectvlm.types import HuConversion


@dataclass(frozen=True)
class FindingSummary:
    """One finding in `findings.json`."""

    probability: float
    """Probability that the finding is present, 0 to 1."""
    threshold: float
    """Probability from which the finding is called present."""
    present: bool
    """Whether the probability reaches the threshold. The report's prompt suggests the same
    findings."""


@dataclass(frozen=True)
class ThresholdsSummary:
    """Origin of the thresholds in `findings.json`."""

    source: str
    """Data that the thresholds were fitted on, in words."""
    n_cases: int
    """Number of cases that the thresholds were fitted on."""
    not_fitted: list[str]
    """Findings whose threshold no data decided."""


@dataclass(frozen=True)
class LesionSummary:
    """One lesion in `findings.json`."""

    key: str
    """Key of the kind of lesion."""
    name: str
    """Name of the kind in text."""
    mask_value: int
    """Bit of the lesion in the mask file."""
    voxels: int
    """Number of voxels of the kind; 0 where none is outlined."""
    volume_ml: float
    """Volume of all lesions of the kind, ml."""
    place: str | None
    """Place in words; null for a lesion too small to place."""
    side: PlaceSide | None
    """Side of the patient (left, right or both); null around the heart."""
    basis: str | None
    """Source of the place."""
    plausible: bool | None
    """Whether a lesion of this kind can lie there; null where that is unknown."""
    approximate_lobes: tuple[str, ...] | None
    """Lobes that hold the lesion by the coarse region map, largest share first; null outside the
    lungs, and where the map does not tell."""


@dataclass(frozen=True)
class CaseSummary:
    """Content of `findings.json`."""

    disclaimer: str
    """What the results may not be used for."""
    file: str
    """Path of the CT; pseudonym of a DICOM series."""
    shape: list[int]
    """Shape (i, j, k) of the file's array."""
    spacing_zyx_mm: list[float]
    """Voxel size (z, y, x), mm."""
    hu: HuConversion
    """Conversion of the file's numbers to HU."""
    checkpoint: str
    """Folder of the model."""
    config: str
    """Name of the model's configuration."""
    step: int
    """Optimizer step of the checkpoint."""
    version: str
    """Version of rectvlm."""
    thresholds: ThresholdsSummary
    """Origin of the thresholds."""
    findings: dict[str, FindingSummary]
    """All 18 findings, by name."""
    lesions: list[LesionSummary] | None
    """All five kinds of lesions; null when the model has no localizer."""
    components: list[LesionComponent] | None
    """Single lesions, the rows of `lesions.csv`; null when the model has no localizer."""
    components_left_out: int
    """Number of single lesions beyond the largest ones, which are not listed."""
    components_left_out_ml: float
    """Volume of these single lesions, ml."""
    lobes_note: str
    """Source of the lobes, and how far to trust them."""
    report: dict[str, str | None] | None
    """Sections of the report; null when the model has no report generator."""
    contradictions: list[Contradiction]
    """Where the classifier's calls, the outlines and the report disagree."""
