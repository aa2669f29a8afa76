"""One mask file for each lesion kind, beside the file of all of them.

Slicer, ITK-SNAP and other viewers name a mask after its file, and show one structure of a file
whose values are 0 and 1. Preprocessing takes the same files back (`--lesions`, or a table).
"""

from pathlib import Path

import nibabel as nib
import numpy as np

from rectvlm.labels import LESIONS
from rectvlm.lesion_bits import lesion_mask, present_lesions
from rectvlm.types import MaskVolume

LESION_FILES = {lesion.key: f"{lesion.key}.nii.gz" for lesion in LESIONS}
"""Names of the files by key of the lesion."""


def save_lesion_files(bits: MaskVolume, image: nib.Nifti1Image, folder: Path) -> None:
    """Save a mask of 0 and 1 for each lesion that has a voxel.

    Args:
        bits: lesion bits (i, j, k).
        image: the image of all bits, whose position and unit the files have.
        folder: of the files.
    """
    for lesion in present_lesions(bits):
        mask = lesion_mask(bits, lesion).astype(np.uint8)
        blank_header = type(image.header)(endianness=image.header.endianness)
        # Given the header itself, nibabel would mend fields that do not decide.
        lesion_image = type(image)(mask, None, blank_header)
        for field_name in image.header:
            lesion_image.header[field_name] = image.header[field_name]
        lesion_image.header["descrip"] = f"rectvlm {lesion.name}"
        nib.save(lesion_image, folder / LESION_FILES[lesion.key])
