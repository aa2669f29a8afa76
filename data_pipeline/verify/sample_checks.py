"""Checks of one decoded sample: agreement with the index, geometry, HU, masks, report."""

import unicodedata
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_pipeline.verify.issues import IssueRecorder
from rectvlm.data.canonical_grid import require_overlap
from rectvlm.data.hounsfield import MAX_HU, MIN_HU, HuEvidence, to_hu
from rectvlm.data.shards import SampleLocation
from rectvlm.labels import AIR_HU, LESION_BY_KEY, REGION_BY_NAME
from rectvlm.lesion_bits import present_lesions
from rectvlm.types import COARSE_REGIONS_SOURCE, Sample, SampleMeta, UserError, Volume

_MIN_REGION_VOXELS = 20
"""Voxels of a region below which its place is not used."""
_MIN_EVIDENCE_SHARE = 0.01
"""Share of air and of soft tissue from which a doubt about HU is a note instead of a fault."""


class _RegionOrder(NamedTuple):
    """Regions that follow each other along an axis of the canonical grid in every patient."""

    axis: int
    relation: str
    """Relation of the regions with the lower mean index to the others, in words."""
    lower: tuple[str, ...]
    higher: tuple[str, ...]


_REGION_ORDERS = (
    _RegionOrder(
        2,
        "further right than",
        ("right upper lobe", "right middle lobe", "right lower lobe"),
        ("left upper lobe", "left lower lobe"),
    ),
    _RegionOrder(1, "in front of", ("heart",), ("spine",)),
    _RegionOrder(0, "below", ("liver",), ("trachea",)),
)


def check_sample(
    sample: Sample,
    location: SampleLocation,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    recorder: IssueRecorder,
) -> bool:
    """Check a decoded sample.

    Args:
        sample: to check.
        location: its record in the index.
        grid: size of the index's grid (z, y, x), voxels.
        spacing: spacing of the index's grid (z, y, x), mm.
        recorder: receives the issues.

    Returns:
        Whether its affines and voxels are sound enough for statistics.
    """
    meta = sample.meta
    for name in ("key", "split", "patient"):
        indexed, stored = getattr(location, name), getattr(meta, name)
        recorder.expect_or_fault(
            stored == indexed, f"{name} {indexed!r} as in the index", repr(stored)
        )
    outlined = tuple(lesion.key for lesion in present_lesions(sample.lesions))
    recorder.expect_or_fault(
        outlined == location.outlined, f"outlines of {location.outlined} as in the index", outlined
    )
    recorder.expect_or_fault(meta.spacing == spacing, f"a spacing of {spacing} mm", meta.spacing)
    shape = sample.ct.shape
    if not recorder.expect_or_fault(shape == grid, f"volumes of {grid} voxels", shape):
        return False
    is_usable = _check_affines(sample, recorder)
    if is_usable and _check_geometry(sample, recorder):
        _check_air_outside(sample, recorder)
    _check_hu(sample, recorder)
    _check_lesions(sample, recorder)
    _check_regions(sample, recorder)
    _check_report(meta, recorder)
    return is_usable


def _check_affines(sample: Sample, recorder: IssueRecorder) -> bool:
    """Check that both affines can be inverted and that the native shape is one."""
    geometry = sample.meta.geometry
    for name, affine in (("grid", geometry.grid_affine), ("native", geometry.native_affine)):
        if not recorder.expect_or_fault(
            _is_invertible_affine(affine), f"an invertible 4 × 4 {name} affine", affine
        ):
            return False
    return recorder.expect_or_fault(
        min(geometry.native_shape) > 0, "a native shape of positive sides", geometry.native_shape
    )


def _is_invertible_affine(rows: list[list[float]]) -> bool:
    if [len(row) for row in rows] != [4] * 4 or rows[3] != [0, 0, 0, 1]:
        return False
    affine = np.array(rows)
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9)


def _check_geometry(sample: Sample, recorder: IssueRecorder) -> bool:
    """Check that the grid's affine is canonical and that the grid lies on the native volume."""
    geometry, spacing = sample.meta.geometry, sample.meta.spacing
    grid_affine, native_affine = np.array(geometry.grid_affine), np.array(geometry.native_affine)
    axes = nib.aff2axcodes(grid_affine)
    is_straight = np.count_nonzero(np.abs(grid_affine[:3, :3]) > 1e-6) == 3
    is_canonical = recorder.expect_or_fault(
        axes == ("S", "P", "L") and is_straight,
        "grid axes that run to superior, posterior and left",
        f"{axes}{'' if is_straight else ', oblique'} in {grid_affine.tolist()}",
    )
    affine_spacing = nib.affines.voxel_sizes(grid_affine)
    recorder.expect_or_fault(
        bool(np.allclose(affine_spacing, spacing, atol=1e-6)),
        f"a grid affine with a spacing of {spacing} mm",
        affine_spacing.tolist(),
    )
    try:
        require_overlap(grid_affine, sample.ct.shape, native_affine, geometry.native_shape, "it")
    except UserError as error:
        recorder.record_fault("a grid that lies on its native volume", f"that {error}")
        return False
    return is_canonical


def _check_air_outside(sample: Sample, recorder: IssueRecorder) -> None:
    """Check that the CT is air beyond the native volume.

    Where it is not, the affines do not belong to these voxels.
    """
    corners = _native_corners_on_grid(sample)
    # One voxel of tolerance on each side.
    low, high = np.floor(corners.min(axis=0)) - 1, np.ceil(corners.max(axis=0)) + 2
    begin = np.clip(low, 0, sample.ct.shape).astype(int)
    end = np.clip(high, 0, sample.ct.shape).astype(int)
    for axis in range(3):
        planes = np.moveaxis(sample.ct, axis, 0)
        for outside in (planes[: begin[axis]], planes[end[axis] :]):
            max_hu = outside.max(initial=AIR_HU)
            recorder.expect_or_fault(
                max_hu == AIR_HU,
                f"{AIR_HU} HU outside the native volume",
                f"up to {max_hu} HU on axis {axis}",
            )


def _native_corners_on_grid(sample: Sample) -> NDArray[np.float64]:
    """Corners (8, 3) of the native volume's box, as grid indexes (z, y, x)."""
    geometry = sample.meta.geometry
    edges = [(-0.5, size - 0.5) for size in geometry.native_shape]
    corners = np.stack(np.meshgrid(*edges, indexing="ij"), axis=-1).reshape(-1, 3)
    to_grid = np.linalg.inv(np.array(geometry.grid_affine)) @ np.array(geometry.native_affine)
    return corners @ to_grid[:3, :3].T + to_grid[:3, 3]


def _check_hu(sample: Sample, recorder: IssueRecorder) -> None:
    low, high = int(sample.ct.min()), int(sample.ct.max())
    recorder.expect_or_fault(
        low >= MIN_HU and high <= MAX_HU, f"HU from {MIN_HU} to {MAX_HU}", f"{low} to {high}"
    )
    is_filled = sample.ct > AIR_HU
    if not is_filled.any():
        recorder.record_fault("a CT", f"{AIR_HU} HU throughout")
        return
    # The grid may reach far beyond the file; that much air would drown the soft tissue.
    spans = []
    for axis in range(3):
        filled_planes = np.flatnonzero(is_filled.any(axis=_all_axes_but(axis)))
        spans.append(slice(filled_planes[0], filled_planes[-1] + 1))
    crop = sample.ct[tuple(spans)]
    try:
        to_hu(Volume(crop, np.array(sample.meta.geometry.grid_affine), "it"))
    except UserError as error:
        # A file that just passed may just fail when averaged to its grid; a wrong scale or offset
        # leaves no trace of air and soft tissue.
        evidence = HuEvidence.from_values(crop)
        share = min(evidence.air_share, evidence.soft_tissue_share)
        if share >= _MIN_EVIDENCE_SHARE:
            recorder.expect_or_note(False, "plausible HU", f"that {error}")
        else:
            recorder.record_fault("plausible HU", f"that {error}")


def _check_lesions(sample: Sample, recorder: IssueRecorder) -> None:
    meta = sample.meta
    for lesion in present_lesions(sample.lesions):
        recorder.expect_or_fault(
            meta.lesions_annotated[lesion.key] or meta.lesions_partial[lesion.key],
            f"no {lesion.name} outlined, since it was not annotated",
            "voxels that carry its bit",
        )
        recorder.expect_or_note(
            meta.labels[lesion.finding] != 0,
            f"{lesion.finding!r} not labelled absent, since {lesion.name} is outlined",
            "the label 0",
        )
    assert set(meta.lesions_annotated) == set(LESION_BY_KEY)


def _check_regions(sample: Sample, recorder: IssueRecorder) -> None:
    regions, source = sample.regions, sample.meta.regions_source
    if source is None:
        count = np.count_nonzero(regions)
        recorder.expect_or_fault(
            count == 0, "no regions, since they have no source", f"{count} voxels with a region"
        )
        return
    recorder.expect_or_note(
        bool(regions.any()), f"regions, since their source is {source!r}", "none on the grid"
    )
    if source == COARSE_REGIONS_SOURCE:
        # Such a map was estimated from where things lie, so their places prove nothing.
        return
    for order in _REGION_ORDERS:
        lower = _mean_index(regions, order.lower, order.axis)
        higher = _mean_index(regions, order.higher, order.axis)
        if lower is not None and higher is not None:
            recorder.expect_or_fault(
                lower < higher,
                f"the {' and '.join(order.lower)} {order.relation} the "
                f"{' and '.join(order.higher)}",
                f"mean indexes {lower:.1f} and {higher:.1f} on axis {order.axis}, as if the volume "
                f"were flipped",
            )


def _mean_index(regions: NDArray[np.uint8], names: tuple[str, ...], axis: int) -> float | None:
    """Mean index of some regions along an axis; None when they have too few voxels."""
    mask = np.isin(regions, [REGION_BY_NAME[name].id for name in names])
    counts = mask.sum(axis=_all_axes_but(axis))
    if counts.sum() < _MIN_REGION_VOXELS:
        return None
    return float(np.average(np.arange(len(counts)), weights=counts))


def _all_axes_but(axis: int) -> tuple[int, ...]:
    return tuple(index for index in range(3) if index != axis)


def _check_report(meta: SampleMeta, recorder: IssueRecorder) -> None:
    for name in ("findings", "impression", "indication", "technique"):
        letters = set(getattr(meta, name) or "") - {"\n", "\t"}
        control_letters = sorted(
            letter for letter in letters if unicodedata.category(letter) == "Cc"
        )
        recorder.expect_or_fault(
            not control_letters,
            f"{name} without control characters",
            ", ".join(f"U+{ord(letter):04X}" for letter in control_letters),
        )
