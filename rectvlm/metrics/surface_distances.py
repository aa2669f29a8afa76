"""Distances between the surfaces of two masks, in mm, as MONAI defines them."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from rectvlm.metrics.arrays import BoolArray

if TYPE_CHECKING:
    import torch

SURFACE_TOLERANCE_MM = 2.0
"""Largest distance of a surface from the true one that counts as right, mm."""


def hd95(predicted: BoolArray, truth: BoolArray, spacing_mm: Sequence[float]) -> float | None:
    """95th percentile of the Hausdorff distance, mm; None where a mask is empty.

    MONAI's definition: surface voxels are those that an erosion by the six neighbours removes; the
    95th percentile of the distances from the one surface to the other is taken in both directions,
    and the larger one is the result.

    Args:
        predicted: predicted mask, (I, J, K).
        truth: true mask, (I, J, K).
        spacing_mm: voxel spacing along each axis, mm.
    """
    # Seconds to import, and a first phase has no masks.
    from monai.metrics import compute_hausdorff_distance

    if not predicted.any() or not truth.any():
        return None
    with warnings.catch_warnings():
        # MONAI calls functions of its own that it deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        distance = compute_hausdorff_distance(
            _as_monai_tensor(predicted),
            _as_monai_tensor(truth),
            include_background=True,
            percentile=95,
            spacing=[float(mm) for mm in spacing_mm],
        )
    return float(distance)


def surface_dice(
    predicted: BoolArray,
    truth: BoolArray,
    spacing_mm: Sequence[float],
    tolerance_mm: float = SURFACE_TOLERANCE_MM,
) -> float | None:
    """Share of both surfaces within `tolerance_mm` of the other one (Nikolov et al. 2018).

    None where both masks are empty, 0 where one is.

    The definition is that of DeepMind's `surface-distance`, and of MONAI with `use_subvoxels`: the
    surface runs between voxels, and each element counts with its area in mm², so that the figure
    does not depend on the sampling. Areas are MONAI's; its own function convolves the volume in
    float32, which takes several GB for a whole CT.

    Args:
        predicted: predicted mask, (I, J, K).
        truth: true mask, (I, J, K).
        spacing_mm: voxel spacing along each axis, mm.
        tolerance_mm: largest distance that counts as right, mm.
    """
    if not predicted.any() or not truth.any():
        return 0.0 if predicted.any() or truth.any() else None
    points, areas = _surface_elements(predicted, spacing_mm)
    true_points, true_areas = _surface_elements(truth, spacing_mm)
    # In float32 as in MONAI: a distance of exactly the tolerance is within it, whatever its last
    # bit.
    distances = KDTree(true_points).query(points)[0].astype(np.float32)
    true_distances = KDTree(points).query(true_points)[0].astype(np.float32)
    near = areas[distances <= tolerance_mm].sum()
    true_near = true_areas[true_distances <= tolerance_mm].sum()
    return float((near + true_near) / (areas.sum() + true_areas.sum()))


def _surface_elements(
    mask: BoolArray, spacing_mm: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Elements of a mask's surface.

    Returns:
        Positions between eight voxels, mm, (M, 3), and the area of the surface at each, mm², (M,).
    """
    from monai.metrics.utils import get_code_to_measure_table

    area_table, powers = get_code_to_measure_table([float(mm) for mm in spacing_mm])
    padded = np.pad(mask, 1)
    codes = np.zeros([size + 1 for size in mask.shape], np.uint8)
    depth, height, width = codes.shape
    for i, j, k in np.ndindex(2, 2, 2):
        shifted = padded[i : i + depth, j : j + height, k : k + width]
        codes += np.uint8(int(powers[(0, 0, i, j, k)])) * shifted

    is_surface = (codes != 0) & (codes != np.uint8(255))
    positions = np.argwhere(is_surface).astype(np.float64) * np.asarray(spacing_mm, np.float64)
    areas = area_table.numpy().astype(np.float64)[codes[is_surface]]
    return positions, areas


def _as_monai_tensor(mask: BoolArray) -> "torch.Tensor":
    """One sample of one class: (1, 1, I, J, K)."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(mask))[None, None]
