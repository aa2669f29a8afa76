"""Volumes in other axis orders and on other grids, as NIfTI files hold them."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

ORDERS = [
    (p, f)
    for p in itertools.permutations(range(3))
    for f in itertools.product((False, True), repeat=3)
]
"""All 48 ways to store a volume: order of the axes, and which of them are flipped."""


def reorder(
    array: NDArray, affine: NDArray, order: Sequence[int], flips: Sequence[bool]
) -> tuple[NDArray, NDArray]:
    """The same voxels in another axis order, with the affine that says so."""
    out, matrix = array.transpose(order), affine[:, [*order, 3]].copy()
    for axis in np.flatnonzero(flips):
        out = np.flip(out, axis)
        matrix[:3, 3] += matrix[:3, axis] * (out.shape[axis] - 1)
        matrix[:3, axis] *= -1
    return np.ascontiguousarray(out), matrix


def grid_over(
    affine: NDArray, shape: Sequence[int], spacing: float, angles: Sequence[float] = (0, 0, 0)
) -> tuple:
    """Affine and shape of a cubic grid around a volume, turned about x, y and z by degrees."""
    corners = (
        np.array(list(itertools.product(*[(0, n - 1) for n in shape]))) @ affine[:3, :3].T
        + affine[:3, 3]
    )
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    along = corners @ turn
    size = np.ceil((along.max(0) - along.min(0)) / spacing).astype(int) + 1
    grid = np.eye(4)
    grid[:3, :3] = turn * spacing
    grid[:3, 3] = turn @ (along.min(0) + along.max(0)) / 2 - grid[:3, :3] @ (size - 1) / 2
    return grid, tuple(int(n) for n in size)


def regrid(array: NDArray, affine: NDArray, grid: NDArray, shape: Sequence[int]) -> NDArray:
    """The value at each voxel of another grid, by the world's coordinates; 0 outside."""
    pull = np.linalg.inv(affine) @ grid
    return ndimage.affine_transform(
        array, pull[:3, :3], pull[:3, 3], tuple(shape), order=0, mode="grid-constant"
    )


def save(path: Path, array: NDArray, affine: NDArray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def dice(a: NDArray, b: NDArray) -> float:
    return 2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b))
