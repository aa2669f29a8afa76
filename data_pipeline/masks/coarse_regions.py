"""A coarse region map from the CT alone, for volumes that have none: lungs by side, airway, heart zone and spine.

It is good for sides and zones. The lobes are the lungs cut by planes where the fissures usually run, hence only rough
(`types.COARSE` marks such a map); what cannot be told from density and place alone stays 0. Arrays are canonical,
(z, y, x) = (superior, posterior, left), so the patient's left is at large x.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.labels import REGION_BY_NAME
from rectvlm.types import Int16Volume, MaskVolume

BoolVolume = NDArray[np.bool_]
HuVolume = NDArray[np.float32]

_WORKING_SPACING_MM = 5.0
"""Sampling that the work is done at."""
_MIN_BODY_HU, _MAX_LUNG_HU, _MIN_LUNG_HU, _MIN_BONE_HU = -400, -500, -975, 150
_MIN_LUNG_ML = 100.0
_MIN_POCKET_SHARE = 0.08
"""A second pocket of lung has at least this share of the largest."""
_IN_PLANE_NEIGHBORS = np.zeros((3, 3, 3), bool)
_IN_PLANE_NEIGHBORS[1, 1, :] = _IN_PLANE_NEIGHBORS[1, :, 1] = True


def estimate_coarse_regions(ct: Int16Volume, spacing: tuple[float, float, float]) -> MaskVolume:
    """Region ids (Z, Y, X) estimated from the CT; all 0 where no lung is found.

    Args:
        ct: (Z, Y, X) HU, canonical.
        spacing: (z, y, x) in mm.
    """
    hu, steps = _downsample_ct(ct, spacing)
    size = np.array(spacing) * steps
    out = np.zeros(hu.shape, np.uint8)
    body = _find_body(hu)
    inside = _fill_slices(body)
    gas = _find_gas(hu, inside, size)
    if gas is None:
        return np.zeros(ct.shape, np.uint8)
    frame = _ChestLandmarks.from_gas(hu, inside, gas, size)
    airway = _find_airway(inside & (hu < _MAX_LUNG_HU), frame)
    left, right = _split_lungs(gas & ~airway, inside, hu, frame)
    for side, lung in (("right", right), ("left", left)):
        _write_lobes(out, lung, side)
    out[_find_heart_zone(hu, left, right, frame)] = REGION_BY_NAME["heart"].id
    out[frame.spine_mask & (out == 0)] = REGION_BY_NAME["spine"].id
    out[airway] = REGION_BY_NAME["trachea"].id
    places = [np.arange(n) // step for n, step in zip(ct.shape, steps, strict=True)]
    return out[np.ix_(*places)]


def _downsample_ct(
    ct: Int16Volume, spacing: tuple[float, float, float]
) -> tuple[HuVolume, list[int]]:
    """The volume at about 5 mm, float32, and the voxels that became one along each axis.

    Of each block some three voxels an axis are averaged: enough against noise, and quick.
    """
    inner = [max(1, round(_WORKING_SPACING_MM / 3 / size)) for size in spacing]
    outer = [
        max(1, round(_WORKING_SPACING_MM / (step * size)))
        for step, size in zip(inner, spacing, strict=True)
    ]
    part = ct[:: inner[0], :: inner[1], :: inner[2]]
    part = np.pad(
        part, [(0, -n % step) for n, step in zip(part.shape, outer, strict=True)], mode="edge"
    )
    # One axis after the other, fastest in memory last: a mean over three axes at once is far slower.
    values: HuVolume = part.astype(np.float32)
    for axis, step in enumerate(outer):
        shape = (*values.shape[:axis], -1, step, *values.shape[axis + 1 :])
        values = values.reshape(shape).mean(axis=axis + 1)
    return values, [one * two for one, two in zip(inner, outer, strict=True)]


def _find_body(hu: HuVolume) -> BoolVolume:
    """The largest solid part, without table and sheets."""
    solid = ndimage.binary_opening(hu > _MIN_BODY_HU, _IN_PLANE_NEIGHBORS)
    parts, count = ndimage.label(solid)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count else solid


def _fill_slices(mask: BoolVolume) -> BoolVolume:
    """Each slice with its holes: what is outside and does not reach the slice's edge belongs to it."""
    outside, _ = ndimage.label(~mask, _IN_PLANE_NEIGHBORS)
    edges = [outside[:, 0], outside[:, -1], outside[:, :, 0], outside[:, :, -1]]
    open_air = np.zeros(outside.max() + 1, bool)
    open_air[np.unique(np.concatenate([edge.ravel() for edge in edges]))] = True
    return mask | ~open_air[outside]


def _find_gas(hu: HuVolume, inside: BoolVolume, size: NDArray[np.float64]) -> BoolVolume | None:
    """Lungs and airway: pockets of the body with the density of lung; None when there is too little."""
    candidate = inside & (hu < _MAX_LUNG_HU)
    parts, count = ndimage.label(candidate)
    if not count:
        return None
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    # Bowel gas and air between arm and chest are empty; lung is not, even in emphysema.
    large = np.flatnonzero(sizes >= max(1, _MIN_POCKET_SHARE * sizes.max()))
    middles = ndimage.median(hu, parts, large)
    lung = large[np.atleast_1d(middles) > _MIN_LUNG_HU]
    if sizes[lung].sum() * np.prod(size) / 1000 < _MIN_LUNG_ML:
        return None
    return np.isin(parts, lung)


@dataclass(frozen=True)
class _ChestLandmarks:
    """Where things lie in the thin copy."""

    voxel_size_mm: NDArray[np.float64]
    """Voxel size (z, y, x), mm."""
    midline_column: float
    """Column of the midline."""
    spine_mask: BoolVolume
    lung_slices: tuple[int, int]
    """First and one past the last slice with lung."""
    lung_rows: tuple[int, int]
    """First (anterior) and one past the last (posterior) row with lung."""

    @classmethod
    def from_gas(
        cls, hu: HuVolume, inside: BoolVolume, gas: BoolVolume, size: NDArray[np.float64]
    ) -> "_ChestLandmarks":
        (z0, z1), (y0, y1) = (_index_range(np.any(gas, axis=other)) for other in ((1, 2), (0, 2)))
        columns = np.any(inside[z0:z1], axis=1)
        first = columns.argmax(axis=1)
        last = columns.shape[1] - 1 - columns[:, ::-1].argmax(axis=1)
        middle = float(np.median((first + last) / 2))
        spine = _find_spine(hu, inside, middle, y0 + 0.55 * (y1 - y0), size)
        found = np.nonzero(spine)[2]
        # A body that is cut off at one side has its middle elsewhere; the spine stays.
        if found.size * np.prod(size) > 20e3:
            middle = float(np.median(found))
        return cls(size, middle, spine, (z0, z1), (y0, y1))


def _index_range(mask: BoolVolume) -> tuple[int, int]:
    where = np.flatnonzero(mask)
    return int(where[0]), int(where[-1]) + 1


def _find_spine(
    hu: HuVolume, inside: BoolVolume, middle: float, front: float, size: NDArray[np.float64]
) -> BoolVolume:
    """Bone behind the middle of the chest, near the midline, closed: its discs and marrow are no denser than muscle."""
    _, y, x = np.ogrid[: hu.shape[0], : hu.shape[1], : hu.shape[2]]
    bone = inside & (hu > _MIN_BONE_HU) & (y >= front) & (abs(x - middle) * size[2] < 55)
    if not bone.any():
        return bone
    near = bone & (abs(x - np.median(np.nonzero(bone)[2])) * size[2] < 30)
    return _fill_slices(_close_mask(near, _make_ball(10.0, size))) & inside


def _find_airway(gas: BoolVolume, frame: _ChestLandmarks) -> BoolVolume:
    """Small round pockets near the midline in the upper two thirds, apart from the lungs in their slice."""
    parts, count = ndimage.label(gas, _IN_PLANE_NEIGHBORS)
    if not count:
        return gas
    areas = (
        np.bincount(parts.ravel(), minlength=count + 1)
        * frame.voxel_size_mm[1]
        * frame.voxel_size_mm[2]
    )
    centres = np.array(ndimage.center_of_mass(gas, parts, np.arange(1, count + 1)))
    off = abs(centres[:, 2] - frame.midline_column) * frame.voxel_size_mm[2]
    z0, z1 = frame.lung_slices
    keep = np.zeros(count + 1, bool)
    keep[1:] = (areas[1:] < 700) & (off < 25) & (centres[:, 0] > z0 + (z1 - z0) / 3)
    chosen = keep[parts]
    pieces, count = ndimage.label(chosen, np.ones((3, 3, 3)))
    if not count:
        return chosen
    # The trachea runs through several slices; specks between the lungs do not.
    return np.asarray(pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:]))


def _split_lungs(
    gas: BoolVolume, inside: BoolVolume, hu: HuVolume, frame: _ChestLandmarks
) -> tuple[BoolVolume, BoolVolume]:
    """Left and right lung, with the vessels and solid patches that they enclose.

    Where a slice shows a lung apart from the other it goes whole to the side that most of it lies on, since lungs bulge
    over the midline in front; where the two run together the midline cuts them.
    """
    parts, count = ndimage.label(gas, _IN_PLANE_NEIGHBORS)
    is_left = np.broadcast_to(np.arange(gas.shape[2]) > frame.midline_column, gas.shape)
    share = ndimage.mean(is_left, parts, np.arange(count + 1)) if count else np.zeros(1)
    share = share[parts]
    left = gas & np.where(share >= 0.8, True, np.where(share <= 0.2, False, is_left))
    right = gas & ~left
    ball = _make_ball(12.0, frame.voxel_size_mm)
    lungs = []
    for lung, other in ((left, right), (right, left)):
        closed = _close_mask(lung, ball)
        lungs.append(_fill_slices(closed) & inside & ~other)
    both = lungs[0] & lungs[1]
    return lungs[0] & ~(both & ~is_left), lungs[1] & ~(both & is_left)


def _make_ball(radius: float, size: NDArray[np.float64]) -> BoolVolume:
    reach = np.maximum(1, np.floor(radius / size)).astype(int)
    grid = np.meshgrid(
        *[np.arange(-n, n + 1) * one for n, one in zip(reach, size, strict=True)], indexing="ij"
    )
    return np.asarray(sum(axis**2 for axis in grid) <= max(radius, float(size.min())) ** 2)


def _close_mask(mask: BoolVolume, ball: BoolVolume) -> BoolVolume:
    """Closing that treats the volume's edge as if the lung went on: it may be cut there."""
    pad = [(n // 2, n // 2) for n in ball.shape]
    wide = np.pad(mask, pad, mode="edge")
    closed = ndimage.binary_closing(wide, ball)
    return closed[tuple(slice(a, n - b) for (a, b), n in zip(pad, wide.shape, strict=True))] | mask


def _write_lobes(out: MaskVolume, lung: BoolVolume, side: str) -> None:
    """Cut a lung where its fissures usually run.

    The oblique fissure falls from four fifths of the height at the back to the base, a tenth behind the front; the
    horizontal fissure of the right lung lies at half the height.
    """
    if not lung.any():
        return
    (z0, z1), (y0, y1) = (_index_range(np.any(lung, axis=other)) for other in ((1, 2), (0, 2)))
    z, y, _ = np.ogrid[: lung.shape[0], : lung.shape[1], : lung.shape[2]]
    height, depth = (z + 0.5 - z0) / (z1 - z0), (y + 0.5 - y0) / (y1 - y0)
    lower = height < 0.8 * (depth - 0.1) / 0.9
    middle = ~lower & (height < 0.5) & (side == "right")
    names = np.where(
        lower, REGION_BY_NAME[f"{side} lower lobe"].id, REGION_BY_NAME[f"{side} upper lobe"].id
    )
    names = np.where(middle, REGION_BY_NAME["right middle lobe"].id, names)
    out[lung] = np.broadcast_to(names, lung.shape)[lung]


def _find_heart_zone(
    hu: HuVolume, left: BoolVolume, right: BoolVolume, frame: _ChestLandmarks
) -> BoolVolume:
    """Soft tissue between the lungs, in front of the spine, in the lower half of the chest: a zone, not an outline."""
    z0, z1 = frame.lung_slices
    y0, y1 = frame.lung_rows
    z, y, x = np.ogrid[: hu.shape[0], : hu.shape[1], : hu.shape[2]]
    width = hu.shape[2]
    # Row by row: from the right lung's inner edge (its last column) to the left lung's (its first).
    begin = width - 1 - right[:, :, ::-1].argmax(axis=2)[..., None]
    end = left.argmax(axis=2)[..., None]
    both = (np.any(right, axis=2) & np.any(left, axis=2))[..., None]
    between = both & (x > begin) & (x < end)
    level = (z >= z0 + 0.15 * (z1 - z0)) & (z < z0 + 0.55 * (z1 - z0))
    ahead = y < y0 + 0.7 * (y1 - y0)
    # To the right of that lies the dome of the liver.
    near = ((x - frame.midline_column) * frame.voxel_size_mm[2] > -60) & (
        (x - frame.midline_column) * frame.voxel_size_mm[2] < 100
    )
    zone = between & level & ahead & near & (hu > -100) & (hu < 300)
    parts, count = ndimage.label(ndimage.binary_opening(zone, _IN_PLANE_NEIGHBORS))
    return np.asarray(parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])) if count else zone
