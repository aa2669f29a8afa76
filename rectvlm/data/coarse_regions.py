"""A coarse region map from the CT alone: lungs by side, airway, heart zone and spine.

It serves volumes that have no map, and is good for sides and zones. Its lobes are the lungs cut by
planes where the fissures usually run, hence only rough (`types.COARSE_REGIONS_SOURCE` marks such a
map). What density and place alone do not tell stays 0. Arrays are canonical, (z, y, x) = (superior,
posterior, left), so the patient's left is at large x.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.chest_geometry import fill_between
from rectvlm.labels import REGION_BY_NAME
from rectvlm.types import Int16Volume, MaskVolume

BoolVolume = NDArray[np.bool_]
HuVolume = NDArray[np.float32]

_WORKING_SPACING_MM = 5.0
"""Spacing of the downsampled copy that regions are found in, mm, about."""
_MIN_BODY_HU, _MAX_LUNG_HU, _MIN_LUNG_HU, _MIN_BONE_HU = -400, -500, -975, 150
_MIN_LUNG_ML = 100.0
_MIN_POCKET_SHARE = 0.08
"""Least share of the largest pocket of gas that a second pocket of lung has."""
_MIN_SPINE_MM3 = 20e3
"""Volume of spine from which it gives the midline, mm³."""
_IN_PLANE_NEIGHBORS = np.zeros((3, 3, 3), bool)
_IN_PLANE_NEIGHBORS[1, 1, :] = _IN_PLANE_NEIGHBORS[1, :, 1] = True


def estimate_coarse_regions(ct: Int16Volume, spacing: tuple[float, float, float]) -> MaskVolume:
    """Estimate region ids (Z, Y, X) from a CT; all are 0 where no lung is found.

    Args:
        ct: HU (Z, Y, X), canonical.
        spacing: voxel size (z, y, x), mm.
    """
    hu, steps = _downsample_ct(ct, spacing)
    voxel_size = np.array(spacing) * steps
    inside = _fill_slices(_close_at_edges(_find_body(hu)))
    gas = _find_gas(hu, inside, voxel_size)
    if gas is None:
        return np.zeros(ct.shape, np.uint8)
    landmarks = _ChestLandmarks.from_gas(hu, inside, gas, voxel_size)
    airway = _find_airway(inside & (hu < _MAX_LUNG_HU), landmarks)
    left_lung, right_lung = _split_lungs(gas & ~airway, inside, landmarks)

    regions = np.zeros(hu.shape, np.uint8)
    _write_lobes(regions, right_lung, "right")
    _write_lobes(regions, left_lung, "left")
    heart = _find_heart_zone(hu, left_lung, right_lung, landmarks)
    regions[heart] = REGION_BY_NAME["heart"].id
    regions[landmarks.spine_mask & (regions == 0)] = REGION_BY_NAME["spine"].id
    regions[airway] = REGION_BY_NAME["trachea"].id
    indexes = [np.arange(size) // step for size, step in zip(ct.shape, steps, strict=True)]
    return regions[np.ix_(*indexes)]


def _downsample_ct(
    ct: Int16Volume, spacing: tuple[float, float, float]
) -> tuple[HuVolume, list[int]]:
    """Average a volume to about 5 mm; return it with the number of voxels that became one, by axis.

    About three voxels of each block and axis are averaged: enough against noise, and quick.
    """
    strides = [max(1, round(_WORKING_SPACING_MM / 3 / size)) for size in spacing]
    values: HuVolume = ct[:: strides[0], :: strides[1], :: strides[2]].astype(np.float32)
    steps = []
    # By axis, fastest in memory last: a mean over three axes at once is far slower.
    for axis, stride in enumerate(strides):
        block = max(1, round(_WORKING_SPACING_MM / (stride * spacing[axis])))
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[axis] = (0, -values.shape[axis] % block)
        values = np.pad(values, padding, mode="edge")
        shape = (*values.shape[:axis], -1, block, *values.shape[axis + 1 :])
        values = values.reshape(shape).mean(axis=axis + 1)
        steps.append(stride * block)
    return values, steps


def _find_body(hu: HuVolume) -> BoolVolume:
    """Find the largest solid component, which leaves table and sheets out."""
    solid = ndimage.binary_opening(hu > _MIN_BODY_HU, _IN_PLANE_NEIGHBORS)
    return _keep_largest_component(solid)


def _keep_largest_component(mask: BoolVolume, neighbors: NDArray[Any] | None = None) -> BoolVolume:
    components, count = ndimage.label(mask, neighbors)
    if not count:
        return mask
    return np.asarray(components == 1 + np.argmax(np.bincount(components.ravel())[1:]))


def _close_at_edges(body: BoolVolume) -> BoolVolume:
    """Close the body at the edges of slices that cut it: a lung that reaches one is no open air."""
    closed = body.copy()
    for edge in (0, -1):
        closed[:, :, edge] = fill_between(body[:, :, edge], 1)
        closed[:, edge] = fill_between(body[:, edge], 1)
    return closed


def _fill_slices(mask: BoolVolume) -> BoolVolume:
    """Fill the holes of each slice: areas outside the mask that do not reach the slice's edge."""
    outside, count = ndimage.label(~mask, _IN_PLANE_NEIGHBORS)
    is_open_air = np.zeros(count + 1, bool)
    for edge in (outside[:, 0], outside[:, -1], outside[:, :, 0], outside[:, :, -1]):
        is_open_air[np.unique(edge)] = True
    return mask | ~is_open_air[outside]


def _find_gas(
    hu: HuVolume, inside: BoolVolume, voxel_size: NDArray[np.float64]
) -> BoolVolume | None:
    """Find lungs and airway: pockets of the body with the density of lung; None if too small."""
    pockets, count = ndimage.label(inside & (hu < _MAX_LUNG_HU))
    if not count:
        return None
    voxel_counts = np.bincount(pockets.ravel(), minlength=count + 1)
    voxel_counts[0] = 0
    large = np.flatnonzero(voxel_counts >= max(1, _MIN_POCKET_SHARE * voxel_counts.max()))
    # Bowel gas and air between arm and chest are empty; lung is not, even in emphysema.
    median_hu = np.atleast_1d(ndimage.median(hu, pockets, large))
    lung = large[median_hu > _MIN_LUNG_HU]
    if voxel_counts[lung].sum() * np.prod(voxel_size) / 1000 < _MIN_LUNG_ML:
        return None
    return np.isin(pockets, lung)


@dataclass(frozen=True)
class _ChestLandmarks:
    """Places of the chest in the downsampled copy."""

    voxel_size_mm: NDArray[np.float64]
    """Voxel size (z, y, x), mm."""
    midline_column: float
    """Column (x) of the midline."""
    spine_mask: BoolVolume
    lung_slices: tuple[int, int]
    """First slice (z) with lung, and one past the last."""
    lung_rows: tuple[int, int]
    """First (anterior) row (y) with lung, and one past the last (posterior)."""

    @classmethod
    def from_gas(
        cls, hu: HuVolume, inside: BoolVolume, gas: BoolVolume, voxel_size: NDArray[np.float64]
    ) -> "_ChestLandmarks":
        lung_slices, lung_rows = _slice_and_row_range(gas)
        columns = np.any(inside[slice(*lung_slices)], axis=1)
        first = columns.argmax(axis=1)
        last = columns.shape[1] - 1 - columns[:, ::-1].argmax(axis=1)
        midline = float(np.median((first + last) / 2))
        spine_front = lung_rows[0] + 0.55 * (lung_rows[1] - lung_rows[0])
        spine = _find_spine(hu, inside, midline, spine_front, voxel_size)
        spine_columns = np.nonzero(spine)[2]
        # A body that is cut off at one side has its middle elsewhere; the spine stays.
        if spine_columns.size * np.prod(voxel_size) > _MIN_SPINE_MM3:
            midline = float(np.median(spine_columns))
        return cls(voxel_size, midline, spine, lung_slices, lung_rows)


def _slice_and_row_range(mask: BoolVolume) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and one past the last slice of a mask, and first and one past the last row."""
    slices = np.flatnonzero(np.any(mask, axis=(1, 2)))
    rows = np.flatnonzero(np.any(mask, axis=(0, 2)))
    return (int(slices[0]), int(slices[-1]) + 1), (int(rows[0]), int(rows[-1]) + 1)


def _find_spine(
    hu: HuVolume,
    inside: BoolVolume,
    midline: float,
    front: float,
    voxel_size: NDArray[np.float64],
) -> BoolVolume:
    """Find the bone behind row `front` near the midline, and close it.

    Its discs and marrow are no denser than muscle.
    """
    _, y, x = np.ogrid[: hu.shape[0], : hu.shape[1], : hu.shape[2]]
    is_near_midline = abs(x - midline) * voxel_size[2] < 55
    bone = inside & (hu > _MIN_BONE_HU) & (y >= front) & is_near_midline
    if not bone.any():
        return bone
    bone_column = np.median(np.nonzero(bone)[2])
    vertebrae = bone & (abs(x - bone_column) * voxel_size[2] < 30)
    return _fill_slices(_close_mask(vertebrae, _make_ball(10.0, voxel_size))) & inside


def _find_airway(gas: BoolVolume, landmarks: _ChestLandmarks) -> BoolVolume:
    """Find the trachea: pockets near the midline in the upper two thirds, apart from the lungs.

    A pocket is apart when it does not touch a lung in its slice; its area is below 7 cm².
    """
    pockets, count = ndimage.label(gas, _IN_PLANE_NEIGHBORS)
    if not count:
        return gas
    _, row_mm, column_mm = landmarks.voxel_size_mm
    areas_mm2 = np.bincount(pockets.ravel(), minlength=count + 1) * row_mm * column_mm
    centres = np.array(ndimage.center_of_mass(gas, pockets, np.arange(1, count + 1)))
    offsets_mm = abs(centres[:, 2] - landmarks.midline_column) * column_mm
    z0, z1 = landmarks.lung_slices
    is_airway = np.zeros(count + 1, bool)
    is_airway[1:] = (areas_mm2[1:] < 700) & (offsets_mm < 25) & (centres[:, 0] > z0 + (z1 - z0) / 3)
    # The trachea runs through several slices; specks between the lungs do not.
    return _keep_largest_component(is_airway[pockets], np.ones((3, 3, 3)))


def _split_lungs(
    gas: BoolVolume, inside: BoolVolume, landmarks: _ChestLandmarks
) -> tuple[BoolVolume, BoolVolume]:
    """Split the lungs into left and right, with the vessels and solid patches that they enclose.

    A lung that is apart from the other in a slice goes to the side that at least four fifths of it
    lie on, since lungs bulge over the midline in front. Where the two run together the midline cuts
    them.
    """
    pockets, count = ndimage.label(gas, _IN_PLANE_NEIGHBORS)
    is_left = np.broadcast_to(np.arange(gas.shape[2]) > landmarks.midline_column, gas.shape)
    left_shares = ndimage.mean(is_left, pockets, np.arange(count + 1)) if count else np.zeros(1)
    left_share = left_shares[pockets]
    left_gas = gas & ((left_share >= 0.8) | ((left_share > 0.2) & is_left))
    right_gas = gas & ~left_gas
    ball = _make_ball(12.0, landmarks.voxel_size_mm)
    left = _fill_slices(_close_mask(left_gas, ball)) & inside & ~right_gas
    right = _fill_slices(_close_mask(right_gas, ball)) & inside & ~left_gas
    both = left & right
    return left & ~(both & ~is_left), right & ~(both & is_left)


def _make_ball(radius_mm: float, voxel_size: NDArray[np.float64]) -> BoolVolume:
    """Voxels of a ball, at least the direct neighbors of its centre along the finest axis."""
    reach = np.maximum(1, np.floor(radius_mm / voxel_size)).astype(int)
    offsets = np.mgrid[tuple(slice(-count, count + 1) for count in reach)]
    squared_distance = ((offsets.T * voxel_size).T ** 2).sum(axis=0)
    return np.asarray(squared_distance <= max(radius_mm, float(voxel_size.min())) ** 2)


def _close_mask(mask: BoolVolume, ball: BoolVolume) -> BoolVolume:
    """Close a mask as if it continued beyond the volume's edge, where a lung may be cut."""
    padding = [size // 2 for size in ball.shape]
    padded = np.pad(mask, [(width, width) for width in padding], mode="edge")
    closed = ndimage.binary_closing(padded, ball)
    interior = tuple(slice(width, -width) for width in padding)
    return closed[interior] | mask


def _write_lobes(regions: MaskVolume, lung: BoolVolume, side: str) -> None:
    """Cut a lung where its fissures usually run, and write its lobes to a region map, in place.

    The oblique fissure falls from four fifths of the height at the back to the base, a tenth behind
    the front; the horizontal fissure of the right lung lies at half the height.
    """
    if not lung.any():
        return
    (z0, z1), (y0, y1) = _slice_and_row_range(lung)
    z, y, _ = np.ogrid[: lung.shape[0], : lung.shape[1], : lung.shape[2]]
    height, depth = (z + 0.5 - z0) / (z1 - z0), (y + 0.5 - y0) / (y1 - y0)
    is_lower = height < 0.8 * (depth - 0.1) / 0.9
    is_middle = ~is_lower & (height < 0.5) & (side == "right")
    lower_id = REGION_BY_NAME[f"{side} lower lobe"].id
    upper_id = REGION_BY_NAME[f"{side} upper lobe"].id
    lobe_ids = np.where(is_lower, lower_id, upper_id)
    lobe_ids = np.where(is_middle, REGION_BY_NAME["right middle lobe"].id, lobe_ids)
    regions[lung] = np.broadcast_to(lobe_ids, lung.shape)[lung]


def _find_heart_zone(
    hu: HuVolume, left_lung: BoolVolume, right_lung: BoolVolume, landmarks: _ChestLandmarks
) -> BoolVolume:
    """Find soft tissue between the lungs, in front of the spine, in the lower half of the chest.

    It is a zone, not an outline.
    """
    z0, z1 = landmarks.lung_slices
    y0, y1 = landmarks.lung_rows
    z, y, x = np.ogrid[: hu.shape[0], : hu.shape[1], : hu.shape[2]]
    # Row by row: from the right lung's inner edge (its last column) to the left lung's (its first).
    begin = hu.shape[2] - 1 - right_lung[:, :, ::-1].argmax(axis=2)[..., None]
    end = left_lung.argmax(axis=2)[..., None]
    has_both_lungs = (np.any(right_lung, axis=2) & np.any(left_lung, axis=2))[..., None]
    is_between = has_both_lungs & (x > begin) & (x < end)
    is_heart_level = (z >= z0 + 0.15 * (z1 - z0)) & (z < z0 + 0.55 * (z1 - z0))
    is_in_front = y < y0 + 0.7 * (y1 - y0)
    left_of_midline_mm = (x - landmarks.midline_column) * landmarks.voxel_size_mm[2]
    # The dome of the liver lies further right.
    is_near_midline = (left_of_midline_mm > -60) & (left_of_midline_mm < 100)
    is_soft_tissue = (hu > -100) & (hu < 300)
    zone = is_between & is_heart_level & is_in_front & is_near_midline & is_soft_tissue
    opened = ndimage.binary_opening(zone, _IN_PLANE_NEIGHBORS)
    return _keep_largest_component(opened) if opened.any() else zone
