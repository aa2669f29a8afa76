"""Outlines on the scan's own grid, cut to where a lesion can be.

The model cuts its outlines on its own grid, whose voxels are larger. Interpolated to the scan they
would reach a voxel's width beyond.
"""

import nibabel as nib
import numpy as np
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_places import find_voxels_outside_chest
from rectvlm.types import Affine, Int16Volume, MaskVolume


def clear_outside_chest(bits: MaskVolume, hu: Int16Volume, affine: Affine) -> int:
    """Remove outlines where the CT shows that no lesion can lie, in place.

    Args:
        bits: lesion bits (i, j, k).
        hu: HU (i, j, k).
        affine: 4 × 4, index (i, j, k, 1) to world, mm.

    Returns:
        Number of voxels of which an outline was removed.
    """
    to_canonical = ornt_transform(io_orientation(affine), axcodes2ornt(("S", "P", "L")))
    # A view, so that what is removed from it is removed from `bits`.
    canonical_bits = apply_orientation(bits, to_canonical)
    canonical_affine = affine @ inv_ornt_aff(to_canonical, bits.shape)
    z_mm, y_mm, x_mm = nib.affines.voxel_sizes(canonical_affine).tolist()
    canonical_hu = np.ascontiguousarray(apply_orientation(hu, to_canonical))
    outside = find_voxels_outside_chest(
        np.ascontiguousarray(canonical_bits), canonical_hu, (z_mm, y_mm, x_mm)
    )
    for key, flat in outside.items():
        voxels = np.unravel_index(flat, canonical_bits.shape)
        canonical_bits[voxels] &= np.uint8(~LESION_BY_KEY[key].mask_value & 0xFF)
    return int(np.unique(np.concatenate([[], *outside.values()])).size)
