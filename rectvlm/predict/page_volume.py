"""The CT of a case, reduced until it fits into a page, and the lesions on the same grid.

The rule: cut to the body and the lesions, voxels averaged down to `MAX_VOXELS`, HU rounded until
the compressed CT has at most `MAX_CT_BYTES`. No lesion is lost: each connected part keeps a voxel.

Canonical arrays are (z, y, x). Those of the page are (i, j, k) = (left → right, posterior →
anterior, inferior → superior), the RAS order of NIfTI.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.data.canonical_grid import largest_component, resample_to_grid
from rectvlm.data.voxel_size import voxel_spacing_mm
from rectvlm.types import Affine, Int16Volume, MaskVolume

MAX_VOXELS = 8_000_000
"""Largest number of voxels of a page's CT: a software renderer still opens it in two seconds."""
MAX_CT_BYTES = 8_500_000
"""Largest size of a page's CT, compressed, bytes; base64 adds a third."""
CROP_MARGIN_MM = 12.0
"""Margin around body and lesions, mm."""
_MIN_BODY_HU = -400
_COARSE_STEP = 4
"""Step at which the body is searched for, voxels."""


@dataclass(frozen=True)
class PageVolume:
    """CT and lesions on a page's grid."""

    ct: Int16Volume
    """HU (i, j, k) in RAS order, multiples of `hu_step`."""
    lesions: tuple[MaskVolume, ...]
    """Lesion bits (i, j, k) of each of the given volumes."""
    affine: Affine
    """4 × 4, (i, j, k, 1) to world, mm."""
    spacing_mm: tuple[float, float, float]
    """Voxel size (i, j, k), mm."""
    from_canonical: Affine
    """4 × 4, canonical index (z, y, x, 1) to (i, j, k, 1)."""
    hu_step: int
    """Step of the HU; they are exact to half of it."""
    is_resampled: bool
    """Whether voxels are means of several voxels of the CT."""
    ct_nifti_gz: bytes
    """`ct` as NIfTI with the spacing alone, compressed with gzip."""


def reduce_for_page(ct: Int16Volume, lesions: Sequence[MaskVolume], affine: Affine) -> PageVolume:
    """Cut, average and round a CT to the size of a page.

    Args:
        ct: HU (z, y, x), canonical.
        lesions: lesion bits (z, y, x), of the same shape.
        affine: canonical index to world.
    """
    spacing = np.array(voxel_spacing_mm(affine))
    crop = _find_crop(ct, lesions, spacing)
    begin = np.array([part.start for part in crop])
    size = np.array([part.stop for part in crop]) - begin
    shape = choose_shape(size, spacing)
    step = size / shape
    grid_to_canonical = np.diag([*step, 1.0])
    grid_to_canonical[:3, 3] = begin + (step - 1) / 2
    is_resampled = bool((step > 1).any())
    grid_affine = affine @ grid_to_canonical
    ct_on_grid, on_grid = ct[crop], [bits[crop] for bits in lesions]
    if is_resampled:
        ct_on_grid = resample_to_grid(ct, affine, grid_affine, shape, "ct")
        on_grid = [resample_to_grid(bits, affine, grid_affine, shape, "bits") for bits in lesions]

    to_grid = _ras_to_canonical(shape)
    ras_spacing = (spacing * step)[::-1]
    ras_ct = _to_ras(ct_on_grid)
    rounded, hu_step, nifti_gz = _compress_ct(ras_ct, ras_spacing)
    return PageVolume(
        ct=rounded,
        lesions=tuple(_to_ras(bits) for bits in on_grid),
        affine=grid_affine @ to_grid,
        spacing_mm=(float(ras_spacing[0]), float(ras_spacing[1]), float(ras_spacing[2])),
        from_canonical=np.linalg.inv((grid_to_canonical @ to_grid).astype(np.float64)),
        hu_step=hu_step,
        is_resampled=is_resampled,
        ct_nifti_gz=nifti_gz,
    )


def choose_shape(
    size: NDArray[np.int64], spacing: NDArray[np.float64], max_voxels: int = MAX_VOXELS
) -> tuple[int, int, int]:
    """Shape of the finest grid of at most `max_voxels` voxels; no axis becomes finer than it was.

    Args:
        size: voxels (z, y, x) of the CT.
        spacing: voxel size (z, y, x) of the CT, mm.
        max_voxels: largest number of voxels of the grid.
    """
    target_mm = float(spacing.min())
    while True:
        step = np.maximum(1.0, target_mm / spacing)
        shape = np.ceil(size / step - 1e-6).astype(int)
        if shape.prod() <= max_voxels:
            return int(shape[0]), int(shape[1]), int(shape[2])
        target_mm *= 1.02


def encode_mask(bits: MaskVolume) -> bytes:
    """Lesion bits (i, j, k) as bytes with i fastest, compressed with gzip."""
    return gzip.compress(bits.tobytes(order="F"), mtime=0)


def _find_crop(
    ct: Int16Volume, lesions: Sequence[MaskVolume], spacing: NDArray[np.float64]
) -> tuple[slice, ...]:
    """Box of the body and all lesions with a margin; the whole CT where no body is found."""
    step = _COARSE_STEP
    coarse = ct[:, ::step, ::step] > _MIN_BODY_HU
    body = largest_component(ndimage.binary_opening(coarse))
    if not body.any():
        return tuple(slice(0, size) for size in ct.shape)
    boxes = [_bounding_box(body) * np.array([[1, step, step]] * 2)]
    boxes[0][1, 1:] += step
    boxes += [_bounding_box(bits > 0) for bits in lesions if bits.any()]
    margin = np.ceil(CROP_MARGIN_MM / spacing).astype(int)
    low = np.maximum(np.min(boxes, axis=0)[0] - margin, 0)
    high = np.minimum(np.max(boxes, axis=0)[1] + margin, ct.shape)
    # The slices of the scan stay: a reader looks for the first and the last one.
    low[0], high[0] = 0, ct.shape[0]
    return tuple(slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))


def _bounding_box(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """First index, and last index + 1, of a mask that is not empty, (2, 3)."""
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    return np.array([[part.start for part in box], [part.stop for part in box]])


def _to_ras(array: NDArray[Any]) -> NDArray[Any]:
    """A canonical array (z, y, x) as (i, j, k): i to the patient's right, j to the front, k up.

    RAS means that coordinates grow to the right, so i runs from the patient's left.
    """
    return array[:, ::-1, ::-1].transpose(2, 1, 0)


def _ras_to_canonical(shape: tuple[int, int, int]) -> Affine:
    """4 × 4, index (i, j, k, 1) to the index (z, y, x, 1) of an array of a shape (z, y, x)."""
    matrix = np.zeros((4, 4))
    matrix[0, 2], matrix[3, 3] = 1, 1
    matrix[1, 1], matrix[1, 3] = -1, shape[1] - 1
    matrix[2, 0], matrix[2, 3] = -1, shape[2] - 1
    return matrix


def _compress_ct(
    ct: Int16Volume, spacing_mm: NDArray[np.float64]
) -> tuple[Int16Volume, int, bytes]:
    """HU (i, j, k) rounded to the smallest step with which they fit, the step, and the file."""
    step = 1
    while True:
        half = step // 2
        rounded = (np.floor_divide(ct.astype(np.int32) + half, step) * step).astype(np.int16)
        image = nib.Nifti1Image(rounded, np.diag([*spacing_mm, 1.0]))
        # Given limits, NiiVue does not look for them in all voxels.
        image.header["cal_min"], image.header["cal_max"] = -1350, 150
        compressed = gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
        if len(compressed) <= MAX_CT_BYTES:
            return rounded, step, compressed
        step *= 2
