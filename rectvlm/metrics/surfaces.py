"""Distances between the surfaces of two masks, in mm, by MONAI."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

Bools = NDArray[np.bool_]

TOLERANCE_MM = 2.0
"""How far a surface may lie from the true one and still be right."""


def hd95(predicted: Bools, truth: Bools, spacing: Sequence[float]) -> float | None:
    """95th percentile of the Hausdorff distance, mm; None where a mask is empty, which has no surface.

    MONAI's definition: surface voxels are those that an erosion by the six neighbours removes; the 95th percentile of
    the distances from the one surface to the other is taken in both directions, and the larger one is the result.

    Args:
        predicted: (I, J, K).
        truth: (I, J, K).
        spacing: mm along each axis.
    """
    from monai.metrics import compute_hausdorff_distance  # seconds to import, and a first phase has no masks

    if not predicted.any() or not truth.any():
        return None
    with _silent():
        found = compute_hausdorff_distance(
            _one(predicted), _one(truth), include_background=True, percentile=95, spacing=[float(mm) for mm in spacing]
        )
    return float(found)


def surface_dice(
    predicted: Bools, truth: Bools, spacing: Sequence[float], tolerance: float = TOLERANCE_MM
) -> float | None:
    """Share of both surfaces that lies within `tolerance` mm of the other one (Nikolov et al. 2018).

    MONAI with `use_subvoxels`, which is the definition of DeepMind's `surface-distance`: the surface runs between
    voxels, and each piece counts with its area in mm², so that the figure does not depend on the sampling. None where
    both masks are empty, 0 where one is. Arguments as for `hd95`.
    """
    from monai.metrics import compute_surface_dice

    if not predicted.any() or not truth.any():
        return 0.0 if predicted.any() or truth.any() else None
    with _silent():
        found = float(
            compute_surface_dice(
                _one(predicted),
                _one(truth),
                class_thresholds=[float(tolerance)],
                include_background=True,
                spacing=[float(mm) for mm in spacing],
                use_subvoxels=True,
            )
        )
    assert not math.isnan(found)
    return found


@contextmanager
def _silent() -> Iterator[None]:
    """MONAI calls functions of its own that it deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _one(mask: Bools) -> torch.Tensor:
    """One sample, one class: (1, 1, I, J, K)."""
    return torch.from_numpy(np.ascontiguousarray(mask))[None, None]
