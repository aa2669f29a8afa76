"""The canonical grid of a sample: its position in the patient, and the way to it and back.

The world is RAS+ mm. Canonical axes are (z, y, x) = (superior, posterior, left), so index x grows
towards the patient's left. Every position comes from an affine (4 × 4, voxel centres to world);
array indexes alone say nothing about sides.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.data.resample import resample_array, resample_nearest
from rectvlm.labels import AIR_HU, LESIONS, N_LESIONS
from rectvlm.lesion_bits import lesion_mask, pack_lesion, present_lesions
from rectvlm.types import Affine, InputError, Int16Volume, MaskVolume

Vector = NDArray[np.float64]
"""Three numbers, one for each axis."""

_CANONICAL_DIRECTIONS = np.array([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
"""World direction of each canonical axis: superior, posterior, left."""
_COARSE_SPACING_MM = 6.0
"""Spacing at which body and lungs are found."""
_MIN_BODY_HU, _MAX_LUNG_HU = -400, -500
_HALF_COVERAGE = 0.5 - 1e-4
"""Least coverage of a voxel that keeps a lesion. Coverage sums many float32 products, and exact
halves must count as halves in every axis order."""


# Position of the grid


def canonical_affine(
    native_affine: Affine,
    native_shape: Sequence[int],
    hu: Int16Volume,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
) -> Affine:
    """Place the canonical grid around the body.

    In plane, the grid is centred on the bounding box of the body. Along z it is centred on the
    volume or, when the volume is longer than the grid, on the lungs. Grid edges fall on native
    voxel edges, so equal sampling copies voxels instead of mixing them. The result does not depend
    on the axis order of the file.

    Args:
        native_affine: native index (i, j, k, 1) to world.
        native_shape: shape of the file's array.
        hu: HU (i, j, k), of `native_shape`.
        grid: voxels (z, y, x) of the grid.
        spacing: voxel size (z, y, x) of the grid, mm.

    Returns:
        4 × 4, canonical index (z, y, x, 1) to world.
    """
    low, high = _world_bounds(native_affine, native_shape)
    extent = np.array(grid) * spacing
    centre = (low + high) / 2
    coarse_low, coarse = _resample_coarse(hu, native_affine, low, high)
    body = largest_component(ndimage.binary_opening(coarse > _MIN_BODY_HU))
    if body.any():
        begin, end = _bounding_box(body)
        centre[1:] = (coarse_low + _COARSE_SPACING_MM * (begin + end) / 2)[1:]
        if high[0] - low[0] > extent[0] + 1e-3:
            lungs = _find_lungs(coarse, body)
            begin, end = _bounding_box(lungs if lungs.any() else body)
            middle = coarse_low[0] + _COARSE_SPACING_MM * (begin[0] + end[0]) / 2
            centre[0] = np.clip(middle, low[0] + extent[0] / 2, high[0] - extent[0] / 2)
    edge = centre - extent / 2
    step = _native_voxel_size(native_affine)
    if step is not None:
        edge = low + np.floor((edge - low) / step + 0.5 + 1e-4) * step
    return _make_grid_affine(edge, np.array(spacing, np.float64))


def require_overlap(
    mask_affine: Affine,
    mask_shape: Sequence[int],
    volume_affine: Affine,
    volume_shape: Sequence[int],
    where: str = "mask",
) -> None:
    """Refuse a mask that does not lie on its volume; `where` names it in the message.

    Raises:
        InputError: the boxes of mask and volume in the world do not overlap.
    """
    mask_low, mask_high = _world_bounds(mask_affine, mask_shape)
    low, high = _world_bounds(volume_affine, volume_shape)
    if (np.minimum(mask_high, high) - np.maximum(mask_low, low) <= 0).any():
        raise InputError(
            where,
            "does not lie on its volume",
            expected=f"an overlap with {_format_bounds(low, high)} mm (superior, posterior, left)",
            found=_format_bounds(mask_low, mask_high),
            remedy="give the mask the affine of the scan that it was drawn on",
        )


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Largest connected part of a mask; the mask itself when it is empty."""
    parts, count = ndimage.label(mask)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count else mask


def _format_bounds(low: Vector, high: Vector) -> str:
    axes = zip("SPL", low, high, strict=True)
    return ", ".join(f"{name} {start:.0f} to {stop:.0f}" for name, start, stop in axes)


def _make_grid_affine(edge: Vector, spacing: Vector) -> Affine:
    """Affine of a canonical grid from its low edges (mm along the canonical axes) and spacing."""
    affine = np.eye(4)
    affine[:3, :3] = _CANONICAL_DIRECTIONS.T * spacing
    affine[:3, 3] = _CANONICAL_DIRECTIONS.T @ (edge + spacing / 2)
    return affine


def _world_bounds(affine: Affine, shape: Sequence[int]) -> tuple[Vector, Vector]:
    """Low and high edges of a volume's box, mm along the canonical axes (z, y, x)."""
    edges = [(-0.5, n - 0.5) for n in shape]
    corners = np.stack(np.meshgrid(*edges, indexing="ij"), axis=-1).reshape(-1, 3)
    placed = (corners @ affine[:3, :3].T + affine[:3, 3]) @ _CANONICAL_DIRECTIONS.T
    return placed.min(axis=0), placed.max(axis=0)


def _native_voxel_size(affine: Affine) -> Vector | None:
    """Voxel size along the canonical axes (z, y, x), mm; None when the native axes are oblique."""
    along = np.abs(_CANONICAL_DIRECTIONS @ affine[:3, :3])
    return along.max(axis=1) if np.count_nonzero(along > 1e-3 * along.max()) == 3 else None


def _resample_coarse(
    hu: Int16Volume, affine: Affine, low: Vector, high: Vector
) -> tuple[Vector, NDArray[np.float32]]:
    """Average a volume to a canonical 6 mm grid, where thin things such as tables fade.

    Returns:
        Low edges of the grid, mm along the canonical axes, and HU (z, y, x).
    """
    shape = np.ceil((high - low) / _COARSE_SPACING_MM - 1e-6).astype(int)
    edge = (low + high) / 2 - shape * _COARSE_SPACING_MM / 2
    grid_affine = _make_grid_affine(edge, np.full(3, _COARSE_SPACING_MM))
    return edge, resample_array(hu, affine, grid_affine, tuple(shape.tolist()), AIR_HU)


def _find_lungs(coarse: NDArray[np.float32], body: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Gas inside the body: the largest pocket, and any of a fifth of its size (the other lung)."""
    filled = np.stack([ndimage.binary_fill_holes(plane) for plane in body])
    gas = filled & ~body & (coarse < _MAX_LUNG_HU)
    parts, count = ndimage.label(gas)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return (sizes >= max(1, 0.2 * sizes.max()))[parts] if count else gas


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[Vector, Vector]:
    indexes = np.argwhere(mask)
    return indexes.min(axis=0).astype(float), indexes.max(axis=0) + 1.0


# To the grid and back


def resample_to_grid(
    array: NDArray[Any],
    affine: Affine,
    grid_affine: Affine,
    grid: tuple[int, int, int],
    kind: Literal["ct", "bits", "labels"],
    fill: int | None = None,
) -> NDArray[Any]:
    """Bring a native array (i, j, k) to a canonical grid (z, y, x).

    - `ct`: int16 HU, averaged or interpolated linearly.
    - `bits`: each lesion where it covers half of a voxel; each connected part of it that lies in
      the grid keeps at least its best-covered voxel.
    - `labels`: the id at each voxel's centre.

    Args:
        array: values of the given kind.
        affine: index of `array`, in any axis order, to world.
        grid_affine: canonical index to world.
        grid: voxels (z, y, x) of the grid.
        kind: meaning of the values.
        fill: value outside the array; by default −1024 HU for `ct`, 0 for masks.
    """
    if kind == "ct":
        outside = AIR_HU if fill is None else fill
        return resample_array(array, affine, grid_affine, grid, outside, np.int16)
    if kind == "labels":
        return resample_nearest(array, affine, grid_affine, grid, fill or 0)
    return _resample_lesion_bits(array, affine, grid_affine, grid)


def mask_to_native(
    mask: MaskVolume | NDArray[np.floating[Any]],
    grid_affine: Affine,
    native_shape: Sequence[int],
    native_affine: Affine,
) -> MaskVolume:
    """Bring lesions of a canonical grid to a native array: lesion bits (i, j, k).

    Args:
        mask: lesion bits (z, y, x) uint8, or probabilities (5, z, y, x); each lesion is
            interpolated by itself and cut at one half.
        grid_affine: canonical index to world.
        native_shape: shape of the result.
        native_affine: native index to world.
    """
    shape = (int(native_shape[0]), int(native_shape[1]), int(native_shape[2]))
    is_probability = np.issubdtype(mask.dtype, np.floating)
    assert mask.ndim == (4 if is_probability else 3), (mask.dtype, mask.shape)
    assert not is_probability or len(mask) == N_LESIONS, mask.shape
    bits = np.zeros(shape, np.uint8)
    for lesion in LESIONS:
        source = mask[lesion.bit] if is_probability else lesion_mask(mask, lesion)
        # Probabilities below one half everywhere stay below it under any averaging.
        if source.max() >= 0.5:
            coverage = resample_array(source, grid_affine, native_affine, shape, 0)
            bits |= pack_lesion(coverage >= _HALF_COVERAGE, lesion)
    return bits


def _resample_lesion_bits(
    native_bits: MaskVolume, affine: Affine, grid_affine: Affine, grid: tuple[int, int, int]
) -> MaskVolume:
    bits = np.zeros(grid, np.uint8)
    for lesion in present_lesions(native_bits):
        mask = lesion_mask(native_bits, lesion)
        box = ndimage.find_objects(mask.view(np.uint8))[0]
        mask = mask[box]
        mask_affine = affine.copy()
        mask_affine[:3, 3] = (affine @ [*(part.start for part in box), 1.0])[:3]
        coverage = resample_array(mask, mask_affine, grid_affine, grid, 0)
        grid_mask = coverage >= _HALF_COVERAGE
        _restore_lost_components(grid_mask, coverage, grid_affine, mask, mask_affine)
        bits |= pack_lesion(grid_mask, lesion)
    return bits


def _restore_lost_components(
    grid_mask: NDArray[np.bool_],
    coverage: NDArray[np.float32],
    grid_affine: Affine,
    mask: NDArray[np.bool_],
    mask_affine: Affine,
) -> None:
    """Add the best-covered voxel of every connected part of `mask` without one, in place."""
    parts, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    indexes = np.argwhere(parts)
    part = parts[tuple(indexes.T)]
    to_grid = np.linalg.inv(grid_affine) @ mask_affine
    # The shift of a hair breaks ties in the same direction for every axis order of the file.
    target = np.floor(indexes @ to_grid[:3, :3].T + to_grid[:3, 3] + 0.5 + 1e-6).astype(int)
    inside = ((target >= 0) & (target < grid_mask.shape)).all(axis=1)
    part, target = part[inside], target[inside]

    has_voxel = np.zeros(count + 1, bool)
    has_voxel[part[grid_mask[tuple(target.T)]]] = True
    is_lost = ~has_voxel[part]
    part, target = part[is_lost], target[is_lost]
    order = np.lexsort((*target.T, -coverage[tuple(target.T)], part))
    _, first_of_part = np.unique(part[order], return_index=True)
    grid_mask[tuple(target[order][first_of_part].T)] = True
