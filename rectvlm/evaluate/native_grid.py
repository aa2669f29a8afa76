"""Predicted and true lesions on the grid of the CT's own file, where millimetres are those of the patient.

The prediction goes back exactly as in `rectvlm predict`: probabilities are interpolated, then cut at one half. The
truth comes from one of two places. Outlines as they were drawn, where their files are at hand, are read and brought to
the CT's grid by their affine. Else it is the outline of the shard, which was sampled to the model's grid once and comes
back the same way as the prediction: what is lost in the sampling is then lost on both sides, a part of a lesion beyond
the model's grid is not missed, and a perfect prediction on the model's grid has a Dice of 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rectvlm.data.canonical_grid import mask_to_native, require_overlap, resample_to_grid
from rectvlm.data.volume import read_mask
from rectvlm.labels import LESIONS, N_LESIONS, Lesion
from rectvlm.lesion_bits import combined_mask_value, lesion_mask, pack_lesion
from rectvlm.types import Affine, MaskVolume, SampleMeta

TruthSource = Literal["file", "shard"]
_LOWEST_RELEVANT_PROBABILITY = 0.49
"""No interpolation between lower probabilities reaches one half."""


@dataclass(frozen=True)
class NativeLesions:
    """Lesion bits of the window of the native grid in which anything was found or outlined."""

    predicted: MaskVolume
    """(i, j, k)."""
    truth: MaskVolume
    """(i, j, k)."""
    spacing_mm: tuple[float, float, float]
    """mm along i, j, k."""
    truth_sources: dict[str, TruthSource]
    """By lesion key: where the truth came from."""

    def extract_masks(self, lesion: Lesion) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Prediction and truth of one lesion."""
        return lesion_mask(self.predicted, lesion), lesion_mask(self.truth, lesion)


def lesions_to_native_grid(
    probabilities: NDArray[np.float32],
    truth: MaskVolume,
    meta: SampleMeta,
    annotated: Sequence[Lesion],
    outline_folder: Path | None = None,
) -> NativeLesions:
    """A case's lesions on its native grid.

    Args:
        probabilities: (5, z, y, x) on the model's grid.
        truth: lesion bits (z, y, x) of the shard.
        meta: of the sample.
        wanted: lesions that count, as they were annotated; the others stay empty.
        folder: where files of outlines may lie.

    Raises:
        UserError: a file of outlines that cannot be read or lies elsewhere than its CT.
    """
    native = np.array(meta.geometry.native_affine)
    grid_affine = np.array(meta.geometry.grid_affine)
    shape = meta.geometry.native_shape
    files = (
        {}
        if outline_folder is None
        else {
            lesion: path
            for lesion in annotated
            if (path := _find_outline_file(outline_folder, meta.key, lesion))
        }
    )
    drawn = np.zeros(shape, np.uint8) if files else None
    for lesion, path in files.items():
        assert drawn is not None
        drawn |= pack_lesion(_read_outline(path, native, shape), lesion)
    truth = truth & np.uint8(
        combined_mask_value(lesion for lesion in annotated if lesion not in files)
    )
    if len(annotated) < N_LESIONS:
        probabilities = probabilities.copy()
        probabilities[[lesion.bit for lesion in LESIONS if lesion not in annotated]] = 0
    window = _find_crop_box(
        (probabilities >= _LOWEST_RELEVANT_PROBABILITY).any(axis=0) | (truth > 0),
        grid_affine,
        native,
        shape,
        drawn,
    )
    corner = native.copy()
    corner[:3, 3] = (native @ [*(part.start for part in window), 1.0])[:3]
    size = [part.stop - part.start for part in window]
    predicted = mask_to_native(probabilities, grid_affine, size, corner)
    true = mask_to_native(truth, grid_affine, size, corner)
    if drawn is not None:
        true |= drawn[window]
    spacing = np.linalg.norm(native[:3, :3], axis=0)
    sources: dict[str, TruthSource] = {
        lesion.key: "file" if lesion in files else "shard" for lesion in annotated
    }
    return NativeLesions(
        predicted, true, (float(spacing[0]), float(spacing[1]), float(spacing[2])), sources
    )


def _find_outline_file(folder: Path, key: str, lesion: Lesion) -> Path | None:
    """The file of a lesion's outline, in the layout that `make preprocess` reads with `--lesions`."""
    paths = (folder / key / f"{lesion.key}{suffix}" for suffix in (".nii.gz", ".nii"))
    return next((path for path in paths if path.is_file()), None)


def _read_outline(path: Path, native: Affine, shape: tuple[int, int, int]) -> MaskVolume:
    """An outline on the grid of its CT, 0 or 1 (i, j, k): copied where the grids are one, else by its affine."""
    mask = read_mask(path)
    bits = (mask.array > 0).astype(np.uint8)
    if mask.array.shape == shape and np.allclose(mask.affine, native, atol=1e-3):
        return bits
    require_overlap(mask.affine, mask.array.shape, native, shape, str(path))
    found: MaskVolume = resample_to_grid(bits, mask.affine, native, shape, "bits")
    return found


def _find_crop_box(
    filled: NDArray[np.bool_],
    grid_affine: Affine,
    native: Affine,
    shape: Sequence[int],
    drawn: NDArray[Any] | None,
) -> tuple[slice, slice, slice]:
    """The box of the native grid that holds all that is filled on the model's grid, and all that is drawn.

    Interpolation spreads a mask by less than a voxel of either grid. At least one voxel, so that nothing needs a case
    of its own where nothing was found.
    """
    low, high = np.array(shape), np.zeros(3, int)
    if filled.any():
        begin, end = _mask_bounds(filled)
        edges = np.stack([begin - 1.5, end + 0.5])
        corners = np.stack(np.meshgrid(*edges.T, indexing="ij"), axis=-1).reshape(-1, 3)
        to_native = np.linalg.inv(native) @ grid_affine
        placed = corners @ to_native[:3, :3].T + to_native[:3, 3]
        low, high = (
            np.floor(placed.min(axis=0)).astype(int) - 1,
            np.ceil(placed.max(axis=0)).astype(int) + 2,
        )
    if drawn is not None and drawn.any():
        begin, end = _mask_bounds(drawn > 0)
        low, high = np.minimum(low, begin), np.maximum(high, end)
    low = np.clip(low, 0, np.array(shape) - 1)
    high = np.clip(high, low + 1, shape)
    a, b, c = (slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))
    return a, b, c


def _mask_bounds(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last + 1 index of a mask that is not empty, along each axis."""
    lines = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return np.array([line[0] for line in lines]), np.array([line[-1] + 1 for line in lines])
