"""Distances between the surfaces of two masks, in mm, as MONAI defines them."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree

BoolArray = NDArray[np.bool_]

SURFACE_TOLERANCE_MM = 2.0
"""How far a surface may lie from the true one and still be right."""


def hd95(predicted: BoolArray, truth: BoolArray, spacing_mm: Sequence[float]) -> float | None:
    """95th percentile of the Hausdorff distance, mm; None where a mask is empty, which has no surface.

    MONAI's definition: surface voxels are those that an erosion by the six neighbours removes; the 95th percentile of
    the distances from the one surface to the other is taken in both directions, and the larger one is the result.

    Args:
        predicted: (I, J, K).
        truth: (I, J, K).
        spacing: mm along each axis.
    """
    from monai.metrics import (
        compute_hausdorff_distance,  # seconds to import, and a first phase has no masks
    )

    if not predicted.any() or not truth.any():
        return None
    with _ignore_deprecations():
        found = compute_hausdorff_distance(
            _as_monai_tensor(predicted),
            _as_monai_tensor(truth),
            include_background=True,
            percentile=95,
            spacing=[float(mm) for mm in spacing_mm],
        )
    return float(found)


def surface_dice(
    predicted: BoolArray,
    truth: BoolArray,
    spacing_mm: Sequence[float],
    tolerance_mm: float = SURFACE_TOLERANCE_MM,
) -> float | None:
    """Share of both surfaces that lies within `tolerance` mm of the other one (Nikolov et al. 2018).

    The definition of DeepMind's `surface-distance`, which is that of MONAI with `use_subvoxels`: the surface runs
    between voxels, and each piece counts with its area in mm², so that the figure does not depend on the sampling.
    Areas are MONAI's; its own function convolves the volume in float32, which for a whole CT takes several GB. None
    where both masks are empty, 0 where one is. Arguments as for `hd95`.
    """
    if not predicted.any() or not truth.any():
        return 0.0 if predicted.any() or truth.any() else None
    (places, areas), (true_places, true_areas) = (
        _surface_elements(mask, spacing_mm) for mask in (predicted, truth)
    )
    # As MONAI, in float32: a distance of exactly the tolerance is within it, whatever its last bit.
    near = KDTree(true_places).query(places)[0].astype(np.float32) <= tolerance_mm
    true_near = KDTree(places).query(true_places)[0].astype(np.float32) <= tolerance_mm
    return float(
        (areas[near].sum() + true_areas[true_near].sum()) / (areas.sum() + true_areas.sum())
    )


def _surface_elements(
    mask: BoolArray, spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the surface of a mask runs: corners between eight voxels, mm (M, 3), and the area at each, mm² (M,)."""
    from monai.metrics.utils import get_code_to_measure_table

    table, powers = get_code_to_measure_table([float(mm) for mm in spacing])
    code = np.zeros([n + 1 for n in mask.shape], np.uint8)
    around = np.pad(mask, 1)
    for corner in np.ndindex(2, 2, 2):
        shifted = around[
            tuple(slice(start, start + n) for start, n in zip(corner, code.shape, strict=True))
        ]
        code += np.uint8(int(powers[(0, 0, *corner)])) * shifted
    edges = (code != 0) & (code != np.uint8(255))
    places = np.argwhere(edges).astype(np.float64) * np.asarray(spacing, np.float64)
    return places, table.numpy().astype(np.float64)[code[edges]]


@contextmanager
def _ignore_deprecations() -> Iterator[None]:
    """MONAI calls functions of its own that it deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _as_monai_tensor(mask: BoolArray) -> torch.Tensor:
    """One sample, one class: (1, 1, I, J, K)."""
    return torch.from_numpy(np.ascontiguousarray(mask))[None, None]
