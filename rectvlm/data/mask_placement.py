"""Where a mask lies on its volume, and how much of it the mask spans."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rectvlm.data.canonical_grid import require_overlap
from rectvlm.types import Affine, InputError, Volume

MIN_OVERLAP_SHARE = 0.75
"""Least share of the shorter box, the mask's or the volume's, that the two have in common along
each axis. In one scan, one box holds the other (a mask of part of it, a crop of the CT), so the
share is near 1. Three quarters leave room for two crops of one scan, and still detect most masks of
another patient, who lay elsewhere on the table."""
MIN_COVERED_SHARE = 2 / 3
"""Least share of the volume along each axis that a mask's box must span for its empty voxels to
mean that there is nothing. A box around the body or the lungs spans it; in a smaller box no one
knows whether the rest was looked at."""


def require_on_volume(
    mask: Volume, volume_affine: Affine, volume_shape: Sequence[int], volume_name: str
) -> None:
    """Refuse a mask that its affine places elsewhere than on the volume.

    Raises:
        InputError: its box hardly overlaps the volume's.
    """
    require_overlap(mask.affine, mask.array.shape, volume_affine, volume_shape, mask.where)
    overlap_mm, mask_size_mm, volume_size_mm = _measure_overlap(mask, volume_affine, volume_shape)
    share = (overlap_mm / np.minimum(mask_size_mm, volume_size_mm)).min()
    if share < MIN_OVERLAP_SHARE:
        raise InputError(
            mask.where,
            "hardly lies on its volume",
            expected=f"at least {MIN_OVERLAP_SHARE:.0%} of the shorter of the two boxes in common "
            f"along each axis",
            found=f"{share:.0%} with {volume_name}",
            remedy="check that it belongs to this scan",
        )


def covers_volume(mask: Volume, volume: Volume) -> bool:
    """Whether a mask spans enough of its volume for its empty voxels to mean absence."""
    overlap_mm, _, volume_size_mm = _measure_overlap(mask, volume.affine, volume.array.shape)
    return bool((overlap_mm / volume_size_mm).min() >= MIN_COVERED_SHARE)


def _measure_overlap(
    mask: Volume, volume_affine: Affine, volume_shape: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Sizes (x, y, z) of the overlap of two boxes, of the mask's and of the volume's box, mm."""
    mask_low, mask_high = _bounding_box_mm(mask.affine, mask.array.shape)
    low, high = _bounding_box_mm(volume_affine, volume_shape)
    overlap = np.minimum(mask_high, high) - np.maximum(mask_low, low)
    return np.clip(overlap, 0, None), mask_high - mask_low, high - low


def _bounding_box_mm(
    affine: Affine, shape: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Low and high corner (x, y, z) of the box along the world's axes that holds an array, mm."""
    edges = [(-0.5, size - 0.5) for size in shape]
    corners = np.array(np.meshgrid(*edges)).reshape(3, -1)
    world = affine[:3, :3] @ corners + affine[:3, 3:]
    return world.min(axis=1), world.max(axis=1)
