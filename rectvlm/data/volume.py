"""Reading of CTs and masks, with a clear error for every file that cannot be used.

Formats: DICOM (`dicom`), NIfTI (`nifti_file`), MetaImage and NRRD (`itk_file`), NumPy archives
(`npz_file`), zip archives of DICOM (`zip_archive`). `hounsfield` converts the numbers to HU,
`canonical_grid` brings them to the grid of a sample.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from rectvlm.data.nifti_file import read_nifti
from rectvlm.types import Affine, InputError, Volume

FileFormat = Literal["dicom", "nifti", "itk", "npz", "zip"]
"""Kinds of files that `read_volume` reads, each by a reader of its own."""
SUFFIXES: dict[str, FileFormat] = {
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".mha": "itk",
    ".mhd": "itk",
    ".nrrd": "itk",
    ".npz": "npz",
    ".zip": "zip",
    ".dcm": "dicom",
    ".dicom": "dicom",
    ".ima": "dicom",
}
"""Formats by the end of a name, in lower case."""
_SUFFIX_PATTERN = re.compile(rf"(?:{'|'.join(map(re.escape, SUFFIXES))})$", re.IGNORECASE)
_DICOM_MAGIC = b"DICM"
_MIN_EXTENT_MM = 100
"""Shortest of the longest sides of CTs of a chest; one in centimetres has 30 to 50."""


def read_volume(
    path: Path, default_affine: Affine | None = None, series: str | None = None
) -> Volume:
    """Read a CT of any format; NIfTI, MetaImage, NRRD and NumPy voxels keep their stored type.

    Args:
        path: `.nii`, `.nii.gz`, `.mha`, `.mhd`, `.nrrd` or `.npz` file; folder of a DICOM series,
            one of its files, DICOMDIR, or `.zip` of it.
        default_affine: index to world for a NIfTI file whose header is blank, or a NumPy archive
            that declares nothing, when it is known from elsewhere.
        series: number or SeriesInstanceUID of the DICOM series; by default that of the file, or
            the chest CT of the folder or archive.

    Returns:
        The array (i, j, k) with its affine; HU for DICOM.

    Raises:
        InputError: the file does not exist, cannot be read in its format, has no position that can
            be believed, is a single slice or too small for a chest, does not fit in memory, holds
            voxels that are not finite, or holds one value throughout.
    """
    volume = _read_format(path, default_affine, series)
    if min(volume.array.shape) == 1:
        raise InputError(
            path,
            "is a single slice",
            expected="a volume of many",
            found=f"shape {volume.array.shape}",
            remedy="give the whole series",
        )
    require_chest(volume, path)
    return volume


def _read_format(path: Path, default_affine: Affine | None, series: str | None) -> Volume:
    """Read by the reader of the format; pydicom and SimpleITK are loaded when they are needed."""
    file_format = detect_format(path)
    if file_format == "nifti":
        return read_nifti(path, default_affine)
    if file_format == "npz":
        from rectvlm.data.npz_file import read_npz

        return read_npz(path, default_affine)
    if file_format == "itk":
        from rectvlm.data.itk_file import read_itk_file

        return read_itk_file(path)
    from rectvlm.data.dicom.volume import read_dicom, read_dicom_archive

    return (read_dicom_archive if file_format == "zip" else read_dicom)(path, series)


def detect_format(path: Path) -> FileFormat:
    """Format of a path by its name, and by its content where the name says nothing."""
    if path.is_dir() or path.name.upper() == "DICOMDIR":
        return "dicom"
    name = path.name.lower()
    for suffix, file_format in SUFFIXES.items():
        if name.endswith(suffix):
            return file_format
    return "dicom" if has_dicom_magic(path) else "nifti"


def has_dicom_magic(path: Path) -> bool:
    """Whether a readable file begins as DICOM files do."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(132)[128:] == _DICOM_MAGIC
    except OSError:
        return False


def strip_suffix(name: str) -> str:
    """Name of a CT without the suffix of its format."""
    return _SUFFIX_PATTERN.sub("", name)


def require_chest(volume: Volume, path: Path) -> None:
    """Refuse a volume that no chest CT can be.

    Raises:
        InputError: it is too small, or holds one value throughout.
    """
    extents = np.linalg.norm(volume.affine[:3, :3], axis=0) * volume.array.shape
    if extents.max() < _MIN_EXTENT_MM:
        raise InputError(
            path,
            "is too small for a chest",
            expected=f"a longest side of at least {_MIN_EXTENT_MM:g} mm",
            found=" × ".join(f"{extent:.4g}" for extent in extents) + " mm",
            remedy="write the series' voxel size and unit (xyzt_units) into it",
        )
    few_slices = volume.array[..., :: max(1, volume.array.shape[2] // 8)]
    is_constant = few_slices.min() == few_slices.max() and volume.array.min() == volume.array.max()
    if is_constant:
        raise InputError(
            path,
            "holds one value throughout",
            expected="a CT",
            found=f"{volume.array.flat[0]} in every voxel",
            remedy="export the series again",
        )


def read_mask(path: Path) -> Volume:
    """Read a NIfTI mask of whole numbers from 0 to 255 as uint8; it may be empty.

    Raises:
        InputError: the file cannot be read as NIfTI, or holds other values.
    """
    volume = read_nifti(path)
    array = volume.array.astype(np.uint8)
    if (array != volume.array).any():
        low, high = volume.array.min(), volume.array.max()
        raise InputError(
            path,
            "is not a mask",
            expected="whole numbers from 0 to 255",
            found=f"values from {low} to {high}",
            remedy="give the file of the mask",
        )
    return replace(volume, array=array)
