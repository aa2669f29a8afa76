"""Predicted and true lesions on the grid of the CT's own file, where millimetres are the patient's.

The prediction goes back exactly as in `rectvlm predict`: probabilities are interpolated, then cut
at one half. The truth comes from one of two places. Outlines as they were drawn, where their files
are at hand, are read and brought to the CT's grid by their affine. Otherwise the outline of the
shard, which was sampled to the model's grid once, comes back in the same way as the prediction:
what is lost in the sampling is then lost on both sides, a part of a lesion beyond the model's grid
is not missed, and a perfect prediction on the model's grid has a Dice of 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rectvlm.data.canonical_grid import mask_to_native, resample_to_grid
from rectvlm.data.mask_placement import require_on_volume
from rectvlm.data.volume import read_mask
from rectvlm.data.voxel_size import voxel_spacing_mm
from rectvlm.labels import LESIONS, N_LESIONS, Lesion
from rectvlm.lesion_bits import combined_mask_value, lesion_mask, pack_lesion
from rectvlm.types import Affine, MaskVolume, SampleMeta

TruthSource = Literal["file", "shard"]
"""Source of a true outline: a file as it was drawn, or the shard."""
_LOWEST_RELEVANT_PROBABILITY = 0.49
"""Probability below which a voxel cannot matter: no interpolation between such reaches one half."""


@dataclass(frozen=True)
class NativeLesions:
    """Lesion bits in the box of the native grid that holds every predicted and true lesion."""

    predicted: MaskVolume
    """Predicted lesion bits, (i, j, k)."""
    truth: MaskVolume
    """True lesion bits, (i, j, k)."""
    spacing_mm: tuple[float, float, float]
    """Voxel spacing along i, j, k, mm."""
    truth_sources: dict[str, TruthSource]
    """Source of the truth by lesion key."""

    def extract_masks(self, lesion: Lesion) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Masks of one lesion: predicted and true."""
        return lesion_mask(self.predicted, lesion), lesion_mask(self.truth, lesion)


def lesions_to_native_grid(
    probabilities: NDArray[np.float32],
    truth: MaskVolume,
    meta: SampleMeta,
    annotated: Sequence[Lesion],
    outline_folder: Path | None = None,
) -> NativeLesions:
    """Bring a case's lesions to its native grid.

    Args:
        probabilities: predicted probabilities on the model's grid, (5, z, y, x).
        truth: true lesion bits of the shard, (z, y, x).
        meta: metadata of the sample.
        annotated: lesions that count; the others stay empty.
        outline_folder: folder of outlines as they were drawn.

    Raises:
        UserError: A file of outlines cannot be read or lies elsewhere than its CT.
    """
    native_affine = np.array(meta.geometry.native_affine)
    grid_affine = np.array(meta.geometry.grid_affine)
    native_shape = meta.geometry.native_shape

    files = _find_outline_files(outline_folder, meta.key, annotated)
    drawn = _read_outlines(files, native_affine, native_shape) if files else None
    from_shard = combined_mask_value(lesion for lesion in annotated if lesion not in files)
    truth = truth & np.uint8(from_shard)
    if len(annotated) < N_LESIONS:
        probabilities = probabilities.copy()
        probabilities[[lesion.bit for lesion in LESIONS if lesion not in annotated]] = 0

    filled = (probabilities >= _LOWEST_RELEVANT_PROBABILITY).any(axis=0) | (truth > 0)
    box = _find_crop_box(filled, grid_affine, native_affine, native_shape, drawn)
    box_affine = native_affine.copy()
    box_affine[:3, 3] = (native_affine @ [*(side.start for side in box), 1.0])[:3]
    box_shape = [side.stop - side.start for side in box]
    native_truth = mask_to_native(truth, grid_affine, box_shape, box_affine)
    if drawn is not None:
        native_truth |= drawn[box]

    return NativeLesions(
        predicted=mask_to_native(probabilities, grid_affine, box_shape, box_affine),
        truth=native_truth,
        spacing_mm=voxel_spacing_mm(native_affine),
        truth_sources={lesion.key: "file" if lesion in files else "shard" for lesion in annotated},
    )


def _find_outline_files(
    folder: Path | None, key: str, annotated: Sequence[Lesion]
) -> dict[Lesion, Path]:
    """Files of a case's outlines, in the layout that `make preprocess` reads with `--lesions`."""
    if folder is None:
        return {}
    files = {}
    for lesion in annotated:
        for suffix in (".nii", ".nii.gz"):
            path = folder / key / f"{lesion.key}{suffix}"
            if path.is_file():
                files[lesion] = path  # the packed file counts where both exist
    return files


def _read_outlines(
    files: dict[Lesion, Path], native_affine: Affine, native_shape: tuple[int, int, int]
) -> MaskVolume:
    """Lesion bits of drawn outlines on the grid of their CT, (i, j, k)."""
    bits = np.zeros(native_shape, np.uint8)
    for lesion, path in files.items():
        bits |= pack_lesion(_read_outline(path, native_affine, native_shape), lesion)
    return bits


def _read_outline(
    path: Path, native_affine: Affine, native_shape: tuple[int, int, int]
) -> MaskVolume:
    """One outline on the grid of its CT, 0 or 1, (i, j, k).

    It is copied where both grids are the same, else resampled by its affine.
    """
    volume = read_mask(path)
    mask = (volume.array > 0).astype(np.uint8)
    if mask.shape == native_shape and np.allclose(volume.affine, native_affine, atol=1e-3):
        return mask
    require_on_volume(volume, native_affine, native_shape, "its CT")
    resampled: MaskVolume = resample_to_grid(
        mask, volume.affine, native_affine, native_shape, "bits"
    )
    return resampled


def _find_crop_box(
    filled: NDArray[np.bool_],
    grid_affine: Affine,
    native_affine: Affine,
    native_shape: Sequence[int],
    drawn: MaskVolume | None,
) -> tuple[slice, slice, slice]:
    """Box of the native grid that holds all filled voxels of the model's grid and all drawn ones.

    Interpolation spreads a mask by less than a voxel of either grid. The box has at least one
    voxel, so that a case without lesions needs no treatment of its own.
    """
    low, high = np.array(native_shape), np.zeros(3, int)
    if filled.any():
        begin, end = _mask_bounds(filled)
        edges = np.stack([begin - 1.5, end + 0.5])
        corners = np.stack(np.meshgrid(*edges.T, indexing="ij"), axis=-1).reshape(-1, 3)
        grid_to_native = np.linalg.inv(native_affine) @ grid_affine
        native_corners = corners @ grid_to_native[:3, :3].T + grid_to_native[:3, 3]
        low = np.floor(native_corners.min(axis=0)).astype(int) - 1
        high = np.ceil(native_corners.max(axis=0)).astype(int) + 2
    if drawn is not None and drawn.any():
        begin, end = _mask_bounds(drawn > 0)
        low, high = np.minimum(low, begin), np.maximum(high, end)

    low = np.clip(low, 0, np.array(native_shape) - 1)
    high = np.clip(high, low + 1, native_shape)
    i, j, k = (slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))
    return i, j, k


def _mask_bounds(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last + 1 index of a mask that is not empty, along each axis."""
    begin, end = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for axis in range(3):
        other_axes = tuple({0, 1, 2} - {axis})
        indexes = np.flatnonzero(mask.any(axis=other_axes))
        begin[axis], end[axis] = indexes[0], indexes[-1] + 1
    return begin, end
