"""What a reconstruction's metadata implies: its rank and its affine."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.ct_rate.tables import SeriesMetadata
from rectvlm.data.kernels import KernelClass, kernel_class, siemens_kernel_number
from rectvlm.types import Affine
from rectvlm.volume_names import VolumeName

_USUAL_KERNEL_NUMBER = {"soft": 40, "sharp": 60}
"""The commonest Siemens number of each class."""

_MIN_EXTENT_SHARE = 0.8
"""Share of the largest extent among a scan's reconstructions below which a reconstruction shows a
detail of the scan, such as one lung."""
_ROUNDING = 1.01
"""Factor by which a spacing may exceed a limit and still count as equal to it."""
_CHOICE_REASONS = (
    "its lesions were outlined",
    "covers more of the scan",
    "its slices are not farther apart than the grid's",
    "has the wanted kernel",
    "has the better slice spacing",
    "its kernel is nearer to the usual one",
    "has the lowest number",
)
"""Criteria of `choose_reconstruction` in their order, as the reason of a choice."""


def choose_reconstruction(
    names: Sequence[VolumeName],
    series: Mapping[VolumeName, SeriesMetadata],
    kernel: KernelClass,
    grid_spacing_mm: float,
    outlined: Collection[VolumeName] = (),
) -> tuple[VolumeName, str]:
    """Choose the reconstruction of a scan that serves a grid best; return it with the reason.

    The criteria, in their order:

    1. Its lesions were outlined, since outlines belong to one reconstruction.
    2. It shows the whole scan.
    3. Its slices are no farther apart than the grid's: what lies between them would be invented.
    4. It has the wanted kernel.
    5. Its slice spacing is the widest up to half of the grid's. Up to half, each voxel of the grid
       is the mean of at least two slices, so noise is averaged and nothing falls between slices. (A
       spacing near the grid's may be thin slices with gaps: the metadata has no thickness.) The
       widest of these has the fewest bytes to read and the same mean.
    6. Its kernel's number is nearest to the usual one of its class.
    7. It has the lowest number.

    A reconstruction whose value is unknown ranks behind those whose value is known to fit.

    Args:
        names: of one scan, at least one.
        series: metadata by name, where known.
        kernel: class of the wanted kernel.
        grid_spacing_mm: distance between the grid's slices.
        outlined: volumes that have lesion masks.
    """
    metadata = {name: series.get(name, SeriesMetadata()) for name in names}
    extents = {name: _series_extent_mm(metadata[name]) for name in names}
    largest_extent = tuple(map(max, zip(*extents.values(), strict=True)))

    def rank(name: VolumeName) -> tuple[Any, ...]:
        """A value for each criterion; the smaller one is better."""
        reconstruction = metadata[name]
        spacing = reconstruction.slice_spacing_mm
        class_ranks: dict[KernelClass | None, int] = {kernel: 0, None: 1}
        number = siemens_kernel_number(reconstruction.kernel)
        return (
            name not in outlined,
            _is_detail(extents[name], largest_extent),
            spacing is not None and spacing > grid_spacing_mm * _ROUNDING,
            class_ranks.get(kernel_class(reconstruction.kernel), 2),
            _rank_slice_spacing(spacing, grid_spacing_mm),
            abs(number - _USUAL_KERNEL_NUMBER[kernel]) if number is not None else 100,
            name.reconstruction or 0,
        )

    ranked = sorted(names, key=rank)
    best = ranked[0]
    if len(ranked) == 1:
        return best, "the only reconstruction"
    for reason, value, next_value in zip(_CHOICE_REASONS, rank(best), rank(ranked[1]), strict=True):
        if value != next_value:
            return best, reason
    raise AssertionError(f"{best} is listed twice")


def _rank_slice_spacing(spacing: float | None, grid_spacing: float) -> tuple[int, float]:
    if spacing is None or spacing <= 0:
        return 2, 0.0
    if spacing <= grid_spacing / 2 * _ROUNDING:
        return 0, -spacing
    return 1, spacing


def _series_extent_mm(series: SeriesMetadata) -> tuple[float, float]:
    """Extent of a reconstruction along the body and across, mm; 0 where unknown."""
    pixel_spacing = series.pixel_spacing_mm[0] if series.pixel_spacing_mm else 0.0
    along_body = (series.slice_count or 0) * (series.slice_spacing_mm or 0.0)
    across = (series.row_count or 0) * pixel_spacing
    return along_body, across


def _is_detail(extent: Sequence[float], largest_extent: Sequence[float]) -> bool:
    """Whether a reconstruction shows only a part of its scan; no unknown extent (0) does."""
    return any(
        0 < size < _MIN_EXTENT_SHARE * largest
        for size, largest in zip(extent, largest_extent, strict=True)
    )


def series_affine(series: SeriesMetadata) -> Affine | None:
    """The affine of a volume of the first release, whose header is blank.

    CT-RATE's own correction (`fix_metadata.py`) reads the place from the same fields: i runs along
    a row, j from row to row, k along their cross product. DICOM's world is LPS, so the first two
    coordinates change sign.

    Returns:
        4 × 4, index (i, j, k) to RAS+ mm; None where a field is missing, or where the fields make
        no right-handed grid.
    """
    if not (
        series.pixel_spacing_mm
        and series.slice_spacing_mm
        and series.position_lps_mm
        and series.orientation_lps
    ):
        return None
    row_direction = np.array(series.orientation_lps[:3])
    column_direction = np.array(series.orientation_lps[3:])
    affine = np.eye(4)
    affine[:3, 0] = row_direction * series.pixel_spacing_mm[0]
    affine[:3, 1] = column_direction * series.pixel_spacing_mm[1]
    affine[:3, 2] = np.cross(row_direction, column_direction) * series.slice_spacing_mm
    affine[:3, 3] = series.position_lps_mm

    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (lengths > 0).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 0.99:
        return None
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
