"""Size of a volume's voxels, from its affine."""

import numpy as np
from nibabel.affines import voxel_sizes

from rectvlm.types import Affine


def voxel_spacing_mm(affine: Affine) -> tuple[float, float, float]:
    """Lengths of a voxel's edges in mm, in the order of the array's axes."""
    first, second, third = map(float, voxel_sizes(affine))
    return first, second, third


def voxel_volume_ml(affine: Affine) -> float:
    """Volume of a voxel in ml; exact for sheared voxels too."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000
