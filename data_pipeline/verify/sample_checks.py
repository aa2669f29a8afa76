"""What must hold of one decoded sample: agreement with the index, geometry, HU, masks, report.

A fault is something that a reader would trip over or learn wrongly from; a note is something worth a look, such as a
lesion outlined in a case whose report does not name it.
"""

import unicodedata
from dataclasses import dataclass, field

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from rectvlm.data.canonical_grid import require_overlap
from rectvlm.data.hounsfield import MAX_HU, MIN_HU, HuEvidence, to_hu
from rectvlm.data.shards import SampleLocation
from rectvlm.labels import AIR_HU, LESION_BY_KEY, REGION_BY_NAME
from rectvlm.lesion_bits import present_lesions
from rectvlm.types import COARSE_REGIONS_SOURCE, Affine, Sample, SampleMeta, UserError, Volume

"""Samples that one remark names."""
_MIN_REGION_VOXELS = 20
"""Voxels of a region from which its place says something."""
_MIN_EVIDENCE_SHARE = 0.01
"""Share of air and of soft tissue from which a doubt about HU is a note."""
_REGION_ORDER: tuple[tuple[int, str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        2,
        "further right than",
        ("right upper lobe", "right middle lobe", "right lower lobe"),
        ("left upper lobe", "left lower lobe"),
    ),
    (1, "in front of", ("heart",), ("spine",)),
    (0, "below", ("liver",), ("trachea",)),
)
"""Axis, words, and the regions whose mean index must be the lower and the higher one."""


@dataclass(frozen=True)
class VerificationIssue:
    """One fault or note."""

    shard: str
    """File in the folder of shards."""
    sample_key: str | None
    """Key; None when it is about the file."""
    expected: str
    found: str

    def __str__(self) -> str:
        place = self.shard if self.sample_key is None else f"{self.shard}, sample {self.sample_key}"
        return " ".join(f"{place}: expected {self.expected}, found {self.found}".split())


@dataclass
class VerificationIssues:
    """Faults and notes as they are found."""

    faults: list[VerificationIssue] = field(default_factory=list)
    notes: list[VerificationIssue] = field(default_factory=list)

    def extend(self, other: "VerificationIssues") -> None:
        """Take over what another check found."""
        self.faults += other.faults
        self.notes += other.notes


@dataclass
class IssueRecorder:
    """Adds to remarks about one place."""

    issues: VerificationIssues
    shard: str
    sample_key: str | None = None

    def expect_or_fault(self, holds: bool, expected: str, found: object) -> bool:
        """Record a fault unless it holds."""
        if not holds:
            self.issues.faults.append(
                VerificationIssue(self.shard, self.sample_key, expected, str(found))
            )
        return holds

    def expect_or_note(self, holds: bool, expected: str, found: object) -> None:
        """Record a note unless it holds."""
        if not holds:
            self.issues.notes.append(
                VerificationIssue(self.shard, self.sample_key, expected, str(found))
            )


def check_sample(
    sample: Sample,
    entry: SampleLocation,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    checker: IssueRecorder,
) -> bool:
    """What must hold of a decoded sample: agreement with the index, HU, masks, geometry, report.

    Returns:
        Whether its affines and voxels are sound enough for figures.
    """
    meta = sample.meta
    for name in ("key", "split", "patient"):
        stated, held = getattr(entry, name), getattr(meta, name)
        checker.expect_or_fault(held == stated, f"{name} {stated!r} as in the index", repr(held))
    checker.expect_or_fault(meta.spacing == spacing, f"a spacing of {spacing} mm", meta.spacing)
    if not checker.expect_or_fault(
        sample.ct.shape == grid, f"volumes of {grid} voxels", sample.ct.shape
    ):
        return False
    usable = _check_affines(sample, checker)
    if usable and _check_geometry(sample, checker):
        _check_air_outside(sample, checker)
    _check_hu(sample, checker)
    _check_lesions(sample, checker)
    _check_regions(sample, checker)
    _check_report(meta, checker)
    return usable


def _check_affines(sample: Sample, checker: IssueRecorder) -> bool:
    """Both affines and the native shape can be reckoned with."""
    geometry = sample.meta.geometry
    for name, rows in (("grid", geometry.grid_affine), ("native", geometry.native_affine)):
        good = (
            [len(row) for row in rows] == [4] * 4
            and bool(np.isfinite(rows).all())
            and rows[3] == [0, 0, 0, 1]
        )
        good = good and bool(abs(np.linalg.det(np.array(rows)[:3, :3])) > 1e-9)
        if not checker.expect_or_fault(good, f"an invertible 4 × 4 {name} affine", rows):
            return False
    return checker.expect_or_fault(
        min(geometry.native_shape) > 0, "a native shape of positive sides", geometry.native_shape
    )


def _check_geometry(sample: Sample, checker: IssueRecorder) -> bool:
    """The grid's affine is canonical, and the grid lies on the native volume."""
    geometry, spacing = sample.meta.geometry, sample.meta.spacing
    grid_affine, native = np.array(geometry.grid_affine), np.array(geometry.native_affine)
    axes, straight = (
        nib.aff2axcodes(grid_affine),
        np.count_nonzero(np.abs(grid_affine[:3, :3]) > 1e-6) == 3,
    )
    canonical = checker.expect_or_fault(
        axes == ("S", "P", "L") and straight,
        "grid axes that run to superior, posterior and left",
        f"{axes}{'' if straight else ', oblique'} in {grid_affine.tolist()}",
    )
    sizes = nib.affines.voxel_sizes(grid_affine)
    checker.expect_or_fault(
        bool(np.allclose(sizes, spacing, atol=1e-6)),
        f"a grid affine with a spacing of {spacing} mm",
        sizes.tolist(),
    )
    try:
        require_overlap(grid_affine, sample.ct.shape, native, geometry.native_shape, "it")
    except UserError as error:
        return checker.expect_or_fault(
            False, "a grid that lies on its native volume", f"that {error}"
        )
    return canonical


def _check_air_outside(sample: Sample, checker: IssueRecorder) -> None:
    """Beyond the native volume the CT is air: else the affines do not belong to these voxels."""
    corners = _native_corners_on_grid(sample)
    low, high = np.floor(corners.min(axis=0)) - 1, np.ceil(corners.max(axis=0)) + 2
    begin, end = (np.clip(edge, 0, sample.ct.shape).astype(int) for edge in (low, high))
    for axis in range(3):
        planes = np.moveaxis(sample.ct, axis, 0)
        for outside in (planes[: begin[axis]], planes[end[axis] :]):
            top = outside.max(initial=AIR_HU)
            checker.expect_or_fault(
                top == AIR_HU,
                f"{AIR_HU} HU outside the native volume",
                f"up to {top} HU on axis {axis}",
            )


def _native_corners_on_grid(sample: Sample) -> Affine:
    """Corners (8, 3) of the native volume's box, as grid indexes (z, y, x)."""
    geometry = sample.meta.geometry
    sides = [(-0.5, n - 0.5) for n in geometry.native_shape]
    corners = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3)
    to_grid = np.linalg.inv(np.array(geometry.grid_affine)) @ np.array(geometry.native_affine)
    return corners @ to_grid[:3, :3].T + to_grid[:3, 3]


def _check_hu(sample: Sample, checker: IssueRecorder) -> None:
    low, high = int(sample.ct.min()), int(sample.ct.max())
    checker.expect_or_fault(
        low >= MIN_HU and high <= MAX_HU, f"HU from {MIN_HU} to {MAX_HU}", f"{low} to {high}"
    )
    # The grid may reach far beyond the file; that much air would drown the soft tissue.
    filled = sample.ct > AIR_HU
    if not checker.expect_or_fault(bool(filled.any()), "a CT", f"{AIR_HU} HU throughout"):
        return
    spans = []
    for axis in range(3):
        used = np.flatnonzero(filled.any(axis=tuple(other for other in range(3) if other != axis)))
        spans.append(slice(used[0], used[-1] + 1))
    part = sample.ct[tuple(spans)]
    try:
        to_hu(Volume(part, np.array(sample.meta.geometry.grid_affine), "it"))
    except UserError as error:
        # A file that just passed may just fail when averaged to its grid; a wrong scale or offset leaves no trace.
        evidence = HuEvidence.from_values(part)
        judge = (
            checker.expect_or_note
            if min(evidence.air_share, evidence.soft_tissue_share) >= _MIN_EVIDENCE_SHARE
            else checker.expect_or_fault
        )
        judge(False, "plausible HU", f"that {error}")


def _check_lesions(sample: Sample, checker: IssueRecorder) -> None:
    meta = sample.meta
    for lesion in present_lesions(sample.lesions):
        looked = meta.lesions_annotated[lesion.key] or meta.lesions_partial[lesion.key]
        checker.expect_or_fault(
            looked,
            f"no {lesion.name} outlined, since it was not annotated",
            "voxels that carry its bit",
        )
        absent = meta.labels[lesion.finding] == 0
        checker.expect_or_note(
            not absent,
            f"{lesion.finding!r} not labelled absent, since {lesion.name} is outlined",
            "the label 0",
        )
    assert set(meta.lesions_annotated) == set(LESION_BY_KEY)


def _check_regions(sample: Sample, checker: IssueRecorder) -> None:
    regions, source = sample.regions, sample.meta.regions_source
    if source is None:
        count = np.count_nonzero(regions)
        checker.expect_or_fault(
            count == 0, "no regions, since they have no source", f"{count} voxels with a region"
        )
        return
    checker.expect_or_note(
        bool(regions.any()), f"regions, since their source is {source!r}", "none on the grid"
    )
    if source == COARSE_REGIONS_SOURCE:
        # Estimated from where things lie, so their place proves nothing.
        return
    for axis, words, lower, higher in _REGION_ORDER:
        means = [_mean_index(regions, names, axis) for names in (lower, higher)]
        if means[0] is not None and means[1] is not None:
            checker.expect_or_fault(
                means[0] < means[1],
                f"the {' and '.join(lower)} {words} the {' and '.join(higher)}",
                f"mean indexes {means[0]:.1f} and {means[1]:.1f} on axis {axis}, as if the volume were flipped",
            )


def _mean_index(regions: NDArray[np.uint8], names: tuple[str, ...], axis: int) -> float | None:
    """Mean index of some regions along an axis; None when they are hardly there."""
    where = np.isin(regions, [REGION_BY_NAME[name].id for name in names])
    along = where.sum(axis=tuple(other for other in range(3) if other != axis))
    return (
        float(np.average(np.arange(len(along)), weights=along))
        if along.sum() >= _MIN_REGION_VOXELS
        else None
    )


def _check_report(meta: SampleMeta, checker: IssueRecorder) -> None:
    for name in ("findings", "impression"):
        text = getattr(meta, name) or ""
        odd = sorted(
            {
                letter
                for letter in text
                if unicodedata.category(letter) == "Cc" and letter not in "\n\t"
            }
        )
        checker.expect_or_fault(
            not odd,
            f"{name} without control characters",
            ", ".join(f"U+{ord(letter):04X}" for letter in odd),
        )
