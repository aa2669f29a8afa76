"""What CT-RATE's metadata means: how sharp a kernel is, which reconstruction serves best, where a volume lies."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from data_pipeline.ct_rate.tables import SeriesMetadata, VolumeName
from rectvlm.types import Affine

KernelClass = Literal["soft", "sharp"]

_MIN_SHARP_KERNEL_NUMBER = 50
"""Siemens numbers kernels from 10 (smooth) to 90 (sharp): about 40 for soft tissue, 50 and more for lung and bone."""
_SIEMENS_KERNEL = re.compile(
    r"(?:B[a-z]?|I|J|Q[a-z]|H[a-z]?|U[a-z]?|D|T|C|S[a-z]?)(\d{2})[a-z]?\d?"
)
_CANON_KERNEL = re.compile(r"FC(\d{2})")
_SOFT_KERNEL_NAMES = {
    "A",
    "B",
    "C",
    "SB",
    "SC",
    "SA",
    "SMOOTH",
    "SOFT",
    "STANDARD",
    "STD",
    "STND",
    "DETAIL",
    "BODY",
}
"""Philips' body filters A to C and their Neusoft kin, and GE's names."""
_SHARP_KERNEL_NAMES = {
    "D",
    "E",
    "L",
    "LUNG",
    "CHEST",
    "BONE",
    "BONEPLUS",
    "EDGE",
    "SHARP",
    "ULTRA",
    "HD",
    "YA",
    "YB",
    "YC",
    "YD",
}
"""Philips' sharp (D, E), lung (L) and high-resolution (Y…) filters, and GE's names."""


def siemens_kernel_number(kernel: str | None) -> int | None:
    """The number in a Siemens kernel: 40 in Br40f, 57 in Bl57d; None where a kernel bears none."""
    found = _SIEMENS_KERNEL.fullmatch(kernel or "")
    return int(found[1]) if found else None


def kernel_class(kernel: str | None) -> KernelClass | None:
    """Whether a kernel is one for soft tissue or a sharp one, for lung and bone; None where its name does not tell."""
    number = siemens_kernel_number(kernel)
    if number is not None:
        return "sharp" if number >= _MIN_SHARP_KERNEL_NUMBER else "soft"
    canon = _CANON_KERNEL.fullmatch(kernel or "")
    if canon:
        return "soft" if int(canon[1]) < 30 else "sharp"
    name = (kernel or "").upper().replace(" ", "")
    if name in _SOFT_KERNEL_NAMES:
        return "soft"
    return "sharp" if name in _SHARP_KERNEL_NAMES else None


_USUAL_KERNEL_NUMBER = {"soft": 40, "sharp": 60}
"""The commonest Siemens number of each class."""
_MIN_EXTENT_SHARE = 0.8
"""A reconstruction of less than this part of the largest extent is a detail of the scan, such as one lung."""
_CHOICE_REASONS = (
    "its lesions were outlined",
    "covers more of the scan",
    "its slices are not farther apart than the grid's",
    "has the wanted kernel",
    "has the better slice spacing",
    "its kernel is nearer to the usual one",
    "has the lowest number",
)


def choose_reconstruction(
    names: Sequence[VolumeName],
    series: Mapping[VolumeName, SeriesMetadata],
    kernel: KernelClass,
    grid_spacing_mm: float,
    outlined: Collection[VolumeName] = (),
) -> tuple[VolumeName, str]:
    """The reconstruction of a scan that serves a grid best, and why.

    In this order: one whose lesions were outlined, since its outlines belong to no other; one that shows the whole
    scan; slices no farther apart than the grid's (more would be invented); the wanted kernel; then the widest slice
    spacing up to half of the grid's. Up to half, each voxel of the grid is the mean of at least two slices, so noise
    is averaged and nothing falls between slices (a spacing near the grid's may be thin slices with gaps: the metadata
    has no thickness); the widest of these has the fewest bytes to read and the same mean. What is unknown ranks behind
    what is known to fit. Ties go to the lower number.

    Args:
        names: of one scan, at least one.
        grid_spacing: mm between the grid's slices.
        outlined: volumes that have lesion masks.
    """
    extents = {name: _series_extent_mm(series.get(name)) for name in names}
    largest = [max(extent[axis] for extent in extents.values()) for axis in range(2)]

    def rank(name: VolumeName) -> tuple[float, ...]:
        one = series.get(name)
        # An unknown extent is taken for a whole one: most are.
        detail = any(
            0 < part < _MIN_EXTENT_SHARE * whole
            for part, whole in zip(extents[name], largest, strict=True)
        )
        spacing = one.slice_spacing_mm if one else None
        number = siemens_kernel_number(one.kernel if one else None)
        return (
            name not in outlined,
            detail,
            spacing is not None and spacing > grid_spacing_mm * 1.01,
            {kernel: 0, None: 1}.get(kernel_class(one.kernel if one else None), 2),
            *_rank_slice_spacing(spacing, grid_spacing_mm),
            abs(number - _USUAL_KERNEL_NUMBER[kernel]) if number is not None else 100,
            name.reconstruction or 0,
        )

    ranked = sorted(names, key=rank)
    if len(ranked) == 1:
        return ranked[0], "the only reconstruction"
    best, second = rank(ranked[0]), rank(ranked[1])
    first = next(
        place
        for place, (ours, theirs) in enumerate(zip(best, second, strict=True))
        if ours != theirs
    )
    # The spacing takes two places of the rank.
    return ranked[0], _CHOICE_REASONS[first - (first > 4)]


def _rank_slice_spacing(spacing: float | None, grid_spacing: float) -> tuple[int, float]:
    if spacing is None or spacing <= 0:
        return 2, 0.0
    return (0, -spacing) if spacing <= grid_spacing / 2 * 1.01 else (1, spacing)


def _series_extent_mm(series: SeriesMetadata | None) -> tuple[float, float]:
    """mm along the body and across; 0 where unknown."""
    if series is None:
        return 0.0, 0.0
    along = (series.slice_count or 0) * (series.slice_spacing_mm or 0.0)
    across = (series.row_count or 0) * (
        series.pixel_spacing_mm[0] if series.pixel_spacing_mm else 0.0
    )
    return along, across


def series_affine(series: SeriesMetadata | None) -> Affine | None:
    """4 × 4, index (i, j, k) to RAS+ mm, of a volume of the first release, whose header is blank.

    CT-RATE's own correction (`fix_metadata.py`) reads the place from the same fields: i runs along a row, j from row
    to row, k along their cross product. DICOM's world is LPS, so the first two coordinates change sign.
    None where a field is missing, or where they make no right-handed grid.
    """
    if series is None or not (
        series.pixel_spacing_mm
        and series.slice_spacing_mm
        and series.position_lps_mm
        and series.orientation_lps
    ):
        return None
    along, down = np.array(series.orientation_lps[:3]), np.array(series.orientation_lps[3:])
    affine = np.eye(4)
    affine[:3, 0] = along * series.pixel_spacing_mm[0]
    affine[:3, 1] = down * series.pixel_spacing_mm[1]
    affine[:3, 2] = np.cross(along, down) * series.slice_spacing_mm
    affine[:3, 3] = series.position_lps_mm
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (lengths > 0).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 0.99:
        return None
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
