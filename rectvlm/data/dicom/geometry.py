"""Position of the slices of a series, from the header of each slice.

DICOM's world is LPS: x grows to the patient's left, y to the back. Ours is RAS. Neither the order
of the files nor SliceThickness says anything.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.data.dicom.headers import DicomSlice
from rectvlm.data.nifti_affine import require_possible_affine
from rectvlm.files import printable_line
from rectvlm.types import Affine, InputError

log = logging.getLogger(__name__)

_SAME_POSITION_MM = 0.01
_SAME_DIRECTION = 1e-3
"""Largest difference of direction cosines that rounding explains."""
_SAME_SPACING = 1e-3
"""Largest difference of pixel spacings that rounding explains, as a share."""
_MIN_STEP_SHARE, _MAX_STEP_SHARE = 0.5, 1.5
"""Least and largest share of the usual distance at which a slice's neighbour is the next one."""
_UNEVEN_MM, _UNEVEN_SHARE = 0.1, 0.02
"""Distance from a regular grid, in mm or as a share of the step, that rounding explains."""
_MAX_SIDESTEP_MM = 0.5
"""Largest distance of a slice's corner from the line through the first and the last one's."""
_MIN_TILT_DEGREES = 0.1
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class SliceStack:
    """Slices in the order of their positions."""

    slices: list[list[DicomSlice]]
    """Slices at each position along the normal, ascending; more than one where some are doubled."""
    positions_mm: NDArray[np.float64]
    """Position of each along the normal, from the first one on."""
    grid_mm: NDArray[np.float64]
    """Positions of a regular grid from the first to the last slice."""
    is_even: bool
    """Whether the slices lie on the grid."""
    affine: Affine
    """4 × 4, index (column, row, slice, 1) of the grid to RAS+ mm."""


def stack_slices(slices: Sequence[DicomSlice], where: Path) -> SliceStack:
    """Order the slices of a series by their positions.

    A tilted gantry needs no resampling: the affine's third axis is then not at right angles.

    Args:
        slices: of one series, in any order.
        where: source in messages.

    Raises:
        InputError: several patients, differing sizes, spacings or orientations; a single slice;
            missing slices; slices at irregular distances or shifted sideways.
    """
    _require_one_geometry(slices, where)
    first = slices[0]
    row, column = _orthonormal_axes(first, where)
    normal = np.cross(row, column)
    distances = np.array([normal @ piece.position for piece in slices])
    groups: list[list[DicomSlice]] = []
    group_distances: list[float] = []
    for index in np.argsort(distances, kind="stable"):
        if groups and distances[index] - group_distances[-1] < _SAME_POSITION_MM:
            groups[-1].append(slices[index])
        else:
            groups.append([slices[index]])
            group_distances.append(float(distances[index]))
    if len(groups) == 1:
        raise InputError(
            where,
            "is a single slice",
            expected="a volume of many",
            found=f"{len(slices)} slice{'s' * (len(slices) > 1)} at one position",
            remedy="give the whole series",
        )
    positions = np.array(group_distances) - group_distances[0]
    grid, is_even = _make_grid(positions, where)
    direction = _stack_direction(groups, positions, where)
    affine = np.eye(4)
    affine[:3, 0] = row * first.spacing[1]
    affine[:3, 1] = column * first.spacing[0]
    affine[:3, 2] = direction * grid[-1] / (len(grid) - 1)
    affine[:3, 3] = groups[0][0].position
    affine[:3] = _LPS_TO_RAS @ affine[:3]
    shape = (first.columns, first.rows, len(grid))
    require_possible_affine(affine, shape, where, "(by its slices' positions)")
    return SliceStack(groups, positions, grid, is_even, affine)


def resample_evenly(array: NDArray[Any], stack: SliceStack) -> NDArray[Any]:
    """Interpolate slices (slice, row, column) linearly at the positions of the regular grid."""
    upper = np.clip(np.searchsorted(stack.positions_mm, stack.grid_mm), 1, len(array) - 1)
    below, above = stack.positions_mm[upper - 1], stack.positions_mm[upper]
    weights = np.clip((stack.grid_mm - below) / (above - below), 0, 1)
    resampled = np.empty((len(stack.grid_mm), *array.shape[1:]), array.dtype)
    for index, (place, weight) in enumerate(zip(upper, weights, strict=True)):
        plane = array[place - 1] * (1 - weight) + array[place] * weight
        resampled[index] = np.rint(plane) if array.dtype.kind == "i" else plane
    return resampled


def _require_one_geometry(slices: Sequence[DicomSlice], where: Path) -> None:
    """Refuse slices that do not fit together.

    Raises:
        InputError: several patients, sizes, pixel spacings or orientations.
    """
    patients = {piece.patient_hash for piece in slices}
    if len(patients) > 1:
        raise InputError(
            where,
            "mixes several patients in one series",
            expected="one patient",
            found=f"{len(patients)} patients",
            remedy="export the series again",
        )
    sizes = sorted({(piece.rows, piece.columns) for piece in slices})
    if len(sizes) > 1:
        raise InputError(
            where,
            "mixes slices of several sizes",
            expected="one number of rows and columns",
            found=", ".join(f"{rows} × {columns}" for rows, columns in sizes[:4]),
            remedy="export the reconstructions as series of their own",
        )
    spacings = np.array([piece.spacing for piece in slices])
    if not np.allclose(spacings, spacings[0], rtol=_SAME_SPACING, atol=0):
        raise InputError(
            where,
            "mixes slices of several pixel spacings",
            expected="one pixel spacing",
            found=f"{spacings.min():.4g} to {spacings.max():.4g} mm",
            remedy="export the reconstructions as series of their own",
        )
    orientations = np.array([piece.orientation for piece in slices])
    if np.abs(orientations - orientations[0]).max() > _SAME_DIRECTION:
        raise InputError(
            where,
            "mixes slices of several orientations",
            expected="parallel slices",
            found=f"direction cosines that differ by {np.ptp(orientations, axis=0).max():.2g}",
            remedy="export each orientation as a series of its own",
        )


def _orthonormal_axes(
    first: DicomSlice, where: Path
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors along a row and along a column, LPS.

    Raises:
        InputError: they are no unit vectors, or not at right angles.
    """
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if np.abs(np.array(lengths) - 1).max() > 0.01 or abs(row @ column) > 0.01:
        raise InputError(
            where,
            "has no valid orientation",
            expected="two unit vectors at right angles (ImageOrientationPatient)",
            found=", ".join(f"{value:.4g}" for value in first.orientation),
            remedy="export the series again",
        )
    row, column = row / lengths[0], column / lengths[1]
    column = column - (row @ column) * row
    return row, column / np.linalg.norm(column)


def _make_grid(positions: NDArray[np.float64], where: Path) -> tuple[NDArray[np.float64], bool]:
    """A regular grid from the first to the last position, and whether the slices lie on it.

    Raises:
        InputError: slices are missing, or lie at irregular distances.
    """
    steps = np.diff(positions)
    step = float(np.median(steps))
    widest = int(np.argmax(steps))
    if steps[widest] > _MAX_STEP_SHARE * step:
        n_gaps = np.count_nonzero(steps > _MAX_STEP_SHARE * step)
        others = f", and {n_gaps - 1} more gaps" if n_gaps > 1 else ""
        raise InputError(
            where,
            "has missing slices",
            expected=f"a slice every {step:.4g} mm",
            found=f"a gap of {steps[widest]:.4g} mm after slice {widest + 1} of "
            f"{len(positions)}{others}",
            remedy="export the whole series again",
        )
    if steps.min() < _MIN_STEP_SHARE * step:
        raise InputError(
            where,
            "has slices at irregular distances",
            expected=f"a slice every {step:.4g} mm",
            found=f"slices that are {steps.min():.4g} mm apart",
            remedy="export each reconstruction as a series of its own",
        )
    even = np.linspace(0, positions[-1], len(positions))
    tolerance = max(_UNEVEN_MM, _UNEVEN_SHARE * step)
    if np.abs(even - positions).max() <= tolerance:
        return even, True
    grid = np.linspace(0, positions[-1], max(2, round(positions[-1] / step) + 1))
    log.warning(
        "%s: slices are %.4g to %.4g mm apart, so they are resampled every %.4g mm",
        printable_line(where),
        steps.min(),
        steps.max(),
        grid[1],
    )
    return grid, False


def _stack_direction(
    groups: Sequence[Sequence[DicomSlice]], positions: NDArray[np.float64], where: Path
) -> NDArray[np.float64]:
    """Way from slice to slice for each mm along the normal, LPS; longer than 1 for a tilted gantry.

    Raises:
        InputError: the slices' corners do not lie on one line.
    """
    corners = np.array([piece.position for group in groups for piece in group])
    along = np.repeat(positions, [len(group) for group in groups])
    direction: NDArray[np.float64] = (corners[-1] - corners[0]) / positions[-1]
    line = corners[0] + along[:, None] * direction
    distance = np.linalg.norm(corners - line, axis=1).max()
    if distance > _MAX_SIDESTEP_MM:
        raise InputError(
            where,
            "has slices that are shifted sideways",
            expected="slices along one line",
            found=f"a slice {distance:.3g} mm beside it",
            remedy="export each acquisition as a series of its own",
        )
    length = float(np.linalg.norm(direction))
    tilt = float(np.degrees(np.arccos(min(1.0, 1 / length))))
    if tilt > _MIN_TILT_DEGREES:
        log.info("%s: gantry tilt of %.1f°, kept in the affine", printable_line(where), tilt)
    return direction
