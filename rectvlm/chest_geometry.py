"""Compartments of the chest from a CT alone: which voxels lie in the lungs, the chest wall, …

They are found by density and position, without a trained model, and are rough: margins of a
centimetre keep a lesion at a border in the compartment where it is expected. Arrays are canonical,
(z, y, x) = (inferior → superior, anterior → posterior, patient right → left).
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.types import Int16Volume

MIN_BODY_HU = -300
MAX_LUNG_HU = -500
MIN_BONE_HU = 150
_GRID_MM = 4.0
"""Voxel size at which the compartments are found."""
_THIN_OBJECT_MM = 7.0
"""Half the thickness, rounded to voxels and at least one, below which an object is no part of the
body: table, lines and sheets. A fixed number of voxels would take the chest wall of a coarse grid.
"""
_MIN_LUNG_ML = 100.0
"""Volume of the smallest pair of lungs."""
_MIN_LUNG_PART = 0.2
"""Least volume of a lung as a share of the largest air space; bowel gas has less."""
CAVITY_MARGIN_MM = 8.0
"""Distance beyond the lungs and ribs that still counts as the chest cavity."""
_END_MARGIN_MM = 16.0
"""Distance above and below the lungs that still counts as the chest."""
_MEDIASTINUM_MM = 40.0
"""Half the width of the mediastinum at most; the heart reaches farther, and so do lungs."""
_AIRWAY_MM = 15.0
"""Distance from the midline in which air is the trachea's."""
_RIB_REACH_MM = 25.0
"""Distance beyond the lungs in which bone is a rib's; the arms' bones lie farther away."""
_RIB_SPACE_MM = 30.0
"""Thickness of the slab that holds a part of each rib, since ribs slope."""
_HEART_LEFT_MM, _HEART_RIGHT_MM = 110.0, 80.0
"""Reach of the pericardium to either side of the midline, with a large heart and its fluid."""
_HEART_ROWS, _HEART_HEIGHT = 0.8, 0.8
"""Share of the lungs, from the front and from below, in which the pericardium lies."""
_SPINE_WIDTH_MM, _MIN_SPINE_AREA_MM2 = 50.0, 150.0
"""Width of a vertebra with its processes, and its least area of bone in a slice on average."""
_SPINE_REACH_MM = 40.0
"""Distance above and below a lesion in which the spine is searched."""
_MAX_MIDLINE_OFFSET_MM = 25.0
"""Largest distance from the spine to the middle of the body; beyond it, the body is cut off."""


class Compartment(IntEnum):
    """Compartment of a voxel."""

    OUTSIDE = 0
    CHEST_WALL = 1
    """At the height of the lungs, outside the ribs: muscle, breast, axilla, arm."""
    NECK = 2
    """Above the lungs."""
    ABDOMEN = 3
    """Below the lungs."""
    MEDIASTINUM = 4
    """Between the lungs, near the midline, with the large airways."""
    LOWER_MEDIASTINUM = 5
    """Lowest third of the mediastinum, where the abdomen bulges up between the lungs."""
    AERATED_LUNG = 6
    CHEST_CAVITY = 7
    """Beside the mediastinum without air: consolidated lung, fluid, a part of heart or liver."""


@dataclass(frozen=True)
class CompartmentVotes:
    """Compartments of some voxels."""

    compartments: NDArray[np.uint8]
    """`Compartment` of each voxel."""
    touches_air: NDArray[np.bool_]
    """Whether each voxel is air or lies within a few mm of aerated lung."""
    is_near_heart: NDArray[np.bool_]
    """Whether each voxel lies where the heart and its pericardium can."""
    mm_below_lungs: NDArray[np.floating]
    """Distance of each voxel below the lowest slice of the lungs, negative above it."""


class ChestGeometry:
    """Lungs, ribs and midline of one CT, for the compartments of its voxels."""

    def __init__(self, ct: Int16Volume, spacing: tuple[float, float, float]) -> None:
        self.ct = ct
        self.spacing = spacing
        self._steps = tuple(max(1, round(_GRID_MM / mm)) for mm in spacing)
        self._mm = np.multiply(self._steps, spacing)
        thin = ct[:: self._steps[0], :: self._steps[1], :: self._steps[2]]
        body = _find_body(thin, float(self._mm[1]))
        self._body = ndimage.maximum_filter(body, size=3)
        lungs = _find_lungs(thin, body, float(np.prod(self._mm)) / 1000)
        self.lung_slices: tuple[int, int] | None = None
        """First and last slice with at least 5% of the lung area of the widest slice."""
        if lungs is None:
            return
        area = lungs.sum(axis=(1, 2))
        low, high = np.flatnonzero(area > 0.05 * area.max())[[0, -1]]
        depth = len(ct)
        step = self._steps[0]
        self.lung_slices = int(low) * step, min(depth - 1, (int(high) + 1) * step - 1)
        self._low, self._high = int(low), int(high)
        slices = np.arange(self.lung_slices[0], self.lung_slices[1] + 1)
        self._midline = find_midline(ct, slices, spacing)
        self._measure_cavity(thin, body, lungs)

    def _measure_cavity(
        self, thin: Int16Volume, body: NDArray[np.bool_], lungs: NDArray[np.bool_]
    ) -> None:
        """Half widths of the chest cavity and of the gap between the lungs, by slice and row.

        Both are mirrored about the midline, since one lung may hold no air at all.
        """
        columns = np.arange(thin.shape[2]) * self._steps[2]
        offsets = np.abs(columns - self._midline) * self.spacing[2]
        outer = np.where(lungs, offsets, 0).max(axis=2)
        is_beside_airways = lungs & (offsets > _AIRWAY_MM)
        self._inner = np.where(is_beside_airways, offsets, np.inf).min(axis=2)
        self._touches_lung = ndimage.maximum_filter(is_beside_airways, size=3)
        smooth = ndimage.uniform_filter(thin, size=(1, 2, 2))
        is_rib = (smooth > MIN_BONE_HU) & body & (offsets <= outer.max() + _RIB_REACH_MM)
        ribs = np.where(is_rib, offsets, 0).max(axis=2)
        slab = _odd_size(_RIB_SPACE_MM, self._mm[0])
        gap = _odd_size(_RIB_SPACE_MM, self._mm[1])
        ribs = ndimage.maximum_filter(ribs, size=(slab, 1))
        self._half_width = ndimage.grey_closing(np.maximum(outer, ribs), size=(1, gap))
        rows = np.flatnonzero(lungs[self._low : self._high + 1].any(axis=(0, 2)))
        self._lung_rows = float(rows[0]) * self._steps[1], float(rows[-1]) * self._steps[1]

    def classify(
        self, voxels: NDArray[np.intp], margin_mm: float = CAVITY_MARGIN_MM
    ) -> CompartmentVotes:
        """Compartments of voxels in a CT that shows lungs (`lung_slices`).

        Args:
            voxels: flat indexes of the CT, (N,).
            margin_mm: distance beyond the lungs and ribs that still counts as the chest cavity.
        """
        assert self.lung_slices is not None, "no lungs, no compartments"
        z, y, x = np.unravel_index(voxels, self.ct.shape)
        thin_z, thin_y, thin_x = (
            np.minimum(index // step, size - 1)
            for index, step, size in zip((z, y, x), self._steps, self._body.shape, strict=True)
        )
        nearest_z = np.clip(thin_z, self._low, self._high)
        offset = (x - self._midline) * self.spacing[2]
        reach = [_odd_size(2 * margin_mm, mm) for mm in self._mm[:2]]
        half_width = ndimage.maximum_filter(self._half_width, size=reach)[nearest_z, thin_y]
        in_cavity = (half_width > 0) & (np.abs(offset) <= half_width + margin_mm)
        has_air = self.ct.reshape(-1)[voxels] < MAX_LUNG_HU
        between_lungs = np.minimum(self._inner[nearest_z, thin_y], _MEDIASTINUM_MM)
        touches_lung = self._touches_lung[thin_z, thin_y, thin_x]
        is_middle = (np.abs(offset) < between_lungs) & ~touches_lung
        low, high = self.lung_slices
        height_share = (z - low) / max(high - low, 1)
        mm_below = (low - z) * self.spacing[0]
        mm_above = (z - high) * self.spacing[0]

        compartments = np.full(voxels.size, Compartment.CHEST_CAVITY, np.uint8)
        compartments[has_air] = Compartment.AERATED_LUNG
        compartments[is_middle] = Compartment.MEDIASTINUM
        compartments[is_middle & (height_share < 1 / 3)] = Compartment.LOWER_MEDIASTINUM
        compartments[~in_cavity] = Compartment.CHEST_WALL
        compartments[mm_above > _END_MARGIN_MM] = Compartment.NECK
        compartments[mm_below > _END_MARGIN_MM] = Compartment.ABDOMEN
        compartments[~self._body[thin_z, thin_y, thin_x]] = Compartment.OUTSIDE
        first, last = self._lung_rows
        row_share = (y - first) / max(last - first, 1.0)
        is_near_heart = (
            in_cavity
            & ~has_air
            & (offset < _HEART_LEFT_MM)
            & (offset > -_HEART_RIGHT_MM)
            & (row_share < _HEART_ROWS)
            & (height_share < _HEART_HEIGHT)
            & (mm_below <= _END_MARGIN_MM)
        )
        return CompartmentVotes(compartments, touches_lung | has_air, is_near_heart, mm_below)


def _odd_size(reach_mm: float, step_mm: float) -> int:
    return 2 * round(reach_mm / step_mm / 2) + 1


def _find_body(thin: Int16Volume, row_mm: float) -> NDArray[np.bool_]:
    """The body with all that it encloses, without table, lines and sheets."""
    tissue = thin > MIN_BODY_HU
    in_plane = ndimage.generate_binary_structure(3, 1)
    in_plane[[0, 2]] = False
    iterations = max(1, round(_THIN_OBJECT_MM / row_mm))
    parts, count = ndimage.label(ndimage.binary_opening(tissue, in_plane, iterations=iterations))
    if not count:
        parts, count = ndimage.label(tissue)
    sizes = np.bincount(parts.reshape(-1))
    sizes[0] = 0
    if not count:
        return tissue
    body = ndimage.binary_dilation(parts == sizes.argmax(), in_plane, mask=tissue)
    # A lung that the field of view cuts off has no chest wall on that side.
    for edge in (0, -1):
        body[:, :, edge] = fill_between(body[:, :, edge], 1)
        body[:, edge] = fill_between(body[:, edge], 1)
    return fill_between(body, 1) & fill_between(body, 2)


def _find_lungs(
    thin: Int16Volume, body: NDArray[np.bool_], voxel_ml: float
) -> NDArray[np.bool_] | None:
    """The air spaces of the chest with airways; None where they are too small for lungs."""
    spaces, count = ndimage.label(body & (thin < MAX_LUNG_HU))
    if not count:
        return None
    sizes = np.bincount(spaces.reshape(-1))
    sizes[0] = 0
    if sizes.max() * voxel_ml < _MIN_LUNG_ML:
        return None
    return np.asarray((sizes >= _MIN_LUNG_PART * sizes.max())[spaces])


def _subsample_in_plane(ct: Int16Volume) -> tuple[Int16Volume, int]:
    """Leave out rows and columns until a slice has about 128 × 128; return the step too."""
    step = max(1, max(ct.shape[1:]) // 128)
    return ct[:, ::step, ::step], step


def find_midline(
    ct: Int16Volume, slices: NDArray[np.intp], spacing: tuple[float, float, float]
) -> float:
    """Column of the body's midline in the given slices: the median middle of its outermost columns.

    Columns with little tissue (table, lines, sheets) do not count. Where the spine lies elsewhere,
    the body is cut off at a side, and the spine decides.
    """
    thin, step = _subsample_in_plane(ct)
    chosen = slices[:: max(1, slices.size // 16)]
    body = _find_body_middle(thin[chosen])
    middle = body * step if body is not None else (ct.shape[2] - 1) / 2
    reach = round(_SPINE_REACH_MM / spacing[0])
    around = slice(max(0, int(slices[0]) - reach), int(slices[-1]) + reach + 1)
    column_mm = spacing[2] * step
    spine = _find_spine_column(thin[around], column_mm, spacing[1] * step)
    if spine is not None and abs(spine * step - middle) * spacing[2] > _MAX_MIDLINE_OFFSET_MM:
        return spine * step
    return middle


def _find_body_middle(slices: Int16Volume) -> float | None:
    columns = (slices > MIN_BODY_HU).sum(axis=1)
    middles = []
    for column in columns:
        wide = np.flatnonzero(column > max(2, 0.15 * column.max()))
        if wide.size:
            middles.append((wide[0] + wide[-1]) / 2)
    return float(np.median(middles)) if middles else None


def _find_spine_column(slices: Int16Volume, column_mm: float, row_mm: float) -> float | None:
    """Column with most bone of the back: ribs are thin and spread, the spine is in every slice."""
    body: NDArray[np.bool_] = np.asarray((slices > MIN_BODY_HU).any(axis=2))
    rows = np.arange(slices.shape[1])
    first = body.argmax(axis=1)[:, None]
    last = slices.shape[1] - 1 - body[:, ::-1].argmax(axis=1)[:, None]
    back = rows >= first + 0.5 * (last - first)
    bone = ((slices > MIN_BONE_HU) & back[:, :, None]).sum(axis=(0, 1)).astype(float)
    width = max(1, round(_SPINE_WIDTH_MM / column_mm))
    bone_in_width = np.convolve(bone, np.ones(width), mode="same")
    best = int(bone_in_width.argmax())
    if bone_in_width[best] * column_mm * row_mm / len(slices) < _MIN_SPINE_AREA_MM2:
        return None
    columns = np.arange(bone.size)
    near = np.abs(columns - best) <= width / 2
    return float(np.average(columns[near], weights=bone[near]))


def fill_between(body: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """True from the first to the last true voxel along an axis."""
    size = body.shape[axis]
    first = np.expand_dims(np.where(body.any(axis), body.argmax(axis), size), axis)
    last = size - 1 - np.expand_dims(np.flip(body, axis).argmax(axis), axis)
    along = np.arange(size, dtype=np.int32).reshape(
        [-1 if n == axis else 1 for n in range(body.ndim)]
    )
    return np.asarray((along >= first) & (along <= last))
