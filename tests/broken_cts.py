"""Small CTs for folders of them, and fifteen ways in which one is broken."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from conftest import write_nifti
from numpy.typing import NDArray

Write = Callable[[NDArray[np.int16], NDArray[np.float64], Path], object]


def _save(array: NDArray[np.generic], affine: NDArray[np.float64], path: Path) -> None:
    write_nifti(array, affine, path)


def _without_orientation(hu: NDArray[np.int16], affine: NDArray[np.float64], path: Path) -> None:
    image = nib.Nifti1Image(hu, affine)
    image.set_sform(affine, 0)
    image.set_qform(affine, 0)
    nib.save(image, path)


def _with_a_header_that_asks_for_too_much(
    hu: NDArray[np.int16], affine: NDArray[np.float64], path: Path
) -> None:
    _save(hu, affine, path)
    block = bytearray(gzip.decompress(path.read_bytes()))
    block[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(block)))


def _cut(hu: NDArray[np.int16], affine: NDArray[np.float64], path: Path) -> None:
    _save(hu, affine, path)
    path.write_bytes(path.read_bytes()[:-500])


def _with_a_flipped_byte(hu: NDArray[np.int16], affine: NDArray[np.float64], path: Path) -> None:
    _save(hu, affine, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def _with_numbers_that_are_none(
    hu: NDArray[np.int16], affine: NDArray[np.float64], path: Path
) -> None:
    array = hu.astype(np.float32)
    array[1, 1, 1] = np.nan
    _save(array, affine, path)


def _huge_voxels(hu: NDArray[np.int16], affine: NDArray[np.float64], path: Path) -> None:
    _save(hu, affine @ np.diag([1e4, 1e4, 1e4, 1]), path)


def _flat_voxels(hu: NDArray[np.int16], affine: NDArray[np.float64], path: Path) -> None:
    flat = affine.copy()
    flat[:3, 1] = flat[:3, 0] * 1.01
    image = nib.Nifti1Image(hu, flat)
    image.set_sform(flat, 1)
    nib.save(image, path)


BROKEN: dict[str, Write] = {
    "empty": lambda _hu, _affine, path: path.write_bytes(b""),
    "text": lambda _hu, _affine, path: path.write_text("no volume " * 200),
    "zip": lambda _hu, _affine, path: path.write_bytes(b"PK\x03\x04" + os.urandom(1000)),
    "cut": _cut,
    "flipped": _with_a_flipped_byte,
    "noorient": _without_orientation,
    "toolarge": _with_a_header_that_asks_for_too_much,
    "nan": _with_numbers_that_are_none,
    "kilometres": _huge_voxels,
    "flat": _flat_voxels,
    "mask": lambda hu, affine, path: _save((hu > 0).astype(np.uint8), affine, path),
    "constant": lambda hu, affine, path: _save(np.zeros_like(hu), affine, path),
    "slice": lambda hu, affine, path: _save(hu[:, :, :1], affine, path),
    "series": lambda hu, affine, path: _save(np.stack([hu, hu], -1), affine, path),
    "window": lambda hu, affine, path: _save(
        (np.clip((hu + 1000.0) / 1400.0, 0, 1) * 255).astype(np.uint8), affine, path
    ),
}
"""Writers of fifteen files that cannot be used, by the word for the fault."""
