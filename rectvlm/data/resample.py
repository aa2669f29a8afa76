"""Resampling of voxel arrays from one affine to another, the same for every axis order of a file.

Coarser grids average over each voxel's box, weighted by overlap (no aliasing); finer ones
interpolate linearly. Affines map voxel centres to the world. A shift of a hair makes ties between
two voxels fall in the same direction for every axis order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from rectvlm.types import Affine


def resample_array(
    array: NDArray[Any],
    affine: Affine,
    target_affine: Affine,
    target_shape: tuple[int, int, int],
    fill: float,
    dtype: type[np.float32] | type[np.int16] = np.float32,
) -> NDArray[Any]:
    """Resample by averaging or linear interpolation, axis by axis where the axes allow it.

    Args:
        array: values on any axes.
        affine: array index to world.
        target_affine: target index to world.
        target_shape: shape of the result.
        fill: value outside the array.
        dtype: type of the result; int16 is rounded.
    """
    to_target = np.linalg.inv(target_affine) @ affine
    axes = _match_axes(to_target, array.shape)
    if axes is None:
        array, to_target = _straighten_oblique(array, to_target, target_shape, fill)
        axes = (0, 1, 2)
    weights = []
    for axis, source_axis in enumerate(axes):
        step, offset = to_target[axis, source_axis], to_target[axis, 3]
        weights.append(_axis_weights(array.shape[source_axis], target_shape[axis], step, offset))
    return _apply_axis_weights(array.transpose(axes), weights, fill, dtype)


def resample_nearest(
    array: NDArray[Any],
    affine: Affine,
    target_affine: Affine,
    target_shape: tuple[int, int, int],
    fill: int,
) -> NDArray[Any]:
    """Take the array's value at each target voxel's centre; arguments as `resample_array`."""
    pull = np.linalg.inv(affine) @ target_affine
    # A hair off the centre, in target indexes, for ties.
    pull[:3, 3] += pull[:3, :3] @ np.full(3, 1e-4)
    axes = _match_axes(pull, target_shape)
    if axes is None:
        return ndimage.affine_transform(
            array,
            pull[:3, :3],
            pull[:3, 3],
            target_shape,
            array.dtype,
            order=0,
            mode="grid-constant",
            cval=fill,
        )

    # axes[s] is the target axis that source axis s follows.
    source_indexes, is_inside = [], []
    for source_axis, target_axis in enumerate(axes):
        targets = np.arange(target_shape[target_axis])
        position = pull[source_axis, target_axis] * targets + pull[source_axis, 3]
        index = np.rint(position).astype(int)
        inside = (index >= 0) & (index < array.shape[source_axis])
        source_indexes.append(index[inside])
        is_inside.append(inside)
    order = np.argsort(axes)
    values = array.transpose(order)[np.ix_(*[source_indexes[axis] for axis in order])]
    out = np.full(target_shape, fill, array.dtype)
    out[np.ix_(*[is_inside[axis] for axis in order])] = values
    return out


def _match_axes(to_target: Affine, shape: Sequence[int]) -> tuple[int, int, int] | None:
    """Source axis that each target axis follows; None when they are oblique beyond rounding."""
    linear = np.abs(to_target[:3, :3])
    axes = tuple(int(axis) for axis in linear.argmax(axis=1))
    off_axis = linear.copy()
    off_axis[range(3), axes] = 0
    drift = off_axis @ np.array(shape)
    size = linear[range(3), axes]
    is_aligned = sorted(axes) == [0, 1, 2] and bool((drift < 0.05 * np.minimum(size, 1)).all())
    return (axes[0], axes[1], axes[2]) if is_aligned else None


def _straighten_oblique(
    array: NDArray[Any], to_target: Affine, target_shape: tuple[int, int, int], fill: float
) -> tuple[NDArray[np.float32], Affine]:
    """Interpolate an oblique array on the target's axes, at about its own sampling.

    Returns:
        The array, cut to the target, and its affine to target indexes.
    """
    linear = to_target[:3, :3]
    # Source voxels in a target voxel along each target axis: the finest contributing axis decides.
    finest = np.abs(np.linalg.inv(linear)).max(axis=0)
    factor = np.maximum(1, np.rint(finest)).astype(int)
    step = 1.0 / factor
    shape = tuple(int(n) for n in factor * target_shape)
    straight = np.diag([*step, 1.0])
    straight[:3, 3] = step / 2 - 0.5
    pull = np.linalg.inv(to_target) @ straight
    moved = ndimage.affine_transform(
        array,
        pull[:3, :3],
        pull[:3, 3],
        shape,
        np.float32,
        order=1,
        mode="grid-constant",
        cval=fill,
    )
    return moved, straight


def _axis_weights(n_source: int, n_target: int, step: float, offset: float) -> sparse.csr_array:
    """Weights (n_target, n_source) along one axis.

    Source voxel i lies at `step · i + offset` in target indexes; voxels are boxes around their
    centres. A row sums to the share of its voxel that lies inside the source.
    """
    if abs(step) <= 1:
        rows, columns, values = _overlap_weights(n_source, step, offset)
    else:
        rows, columns, values = _linear_weights(n_source, n_target, step, offset)
    keep = (rows >= 0) & (rows < n_target) & (values > 1e-6)
    entries = (values[keep].astype(np.float32), (rows[keep], columns[keep]))
    return sparse.csr_array(entries, shape=(n_target, n_source))


_WeightEntries = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Rows (target), columns (source) and values of a weight matrix."""


def _overlap_weights(n_source: int, step: float, offset: float) -> _WeightEntries:
    source = step * np.arange(n_source) + offset
    lower, upper = source - abs(step) / 2, source + abs(step) / 2
    first = np.maximum(np.ceil(lower - 0.5 - 1e-6), 0).astype(int)
    # A source box no larger than a target box reaches two target voxels at most.
    rows = np.concatenate([first, first + 1])
    columns = np.tile(np.arange(n_source), 2)
    overlap = np.minimum(upper[columns], rows + 0.5) - np.maximum(lower[columns], rows - 0.5)
    return rows, columns, overlap


def _linear_weights(n_source: int, n_target: int, step: float, offset: float) -> _WeightEntries:
    target = np.arange(n_target)
    position = (target - offset) / step
    inside = (position > -0.5 - 1e-6) & (position < n_source - 0.5 + 1e-6)
    position = np.clip(position, 0, n_source - 1)
    left = np.minimum(np.floor(position).astype(int), max(n_source - 2, 0))
    right = np.minimum(left + 1, n_source - 1)
    right_share = position - left
    rows = np.tile(target, 2)
    columns = np.concatenate([left, right])
    return rows, columns, np.concatenate([1 - right_share, right_share]) * np.tile(inside, 2)


def _apply_axis_weights(
    array: NDArray[Any],
    weights: list[sparse.csr_array],
    fill: float,
    dtype: type[np.float32] | type[np.int16],
) -> NDArray[Any]:
    """Apply one weight matrix to each axis, plane by plane, without a float copy of the array.

    The weights act on the difference from `fill`, the value outside. Whole numbers are rounded.
    """
    used = [np.unique(weight.indices) for weight in weights]
    out = np.full([weight.shape[0] for weight in weights], fill, dtype)
    if any(len(columns) == 0 for columns in used):
        return out
    crop = tuple(slice(int(columns[0]), int(columns[-1]) + 1) for columns in used)
    array = array[crop]
    weights = [weight[:, part] for weight, part in zip(weights, crop, strict=True)]

    # Planes along the slowest axis in memory, rows along the next: both are then read in order.
    strides = [-abs(stride) for stride in array.strides]
    slow, rows, fast = (int(axis) for axis in np.argsort(strides, kind="stable"))
    planes, result = array.transpose(slow, rows, fast), out.transpose(slow, rows, fast)
    by_plane, by_row, by_column = weights[slow], weights[rows], weights[fast]

    # Fresh memory costs several times the arithmetic here, so two planes of it serve throughout.
    mixed = np.empty(planes.shape[1:], np.float32)
    term = np.empty(planes.shape[1:], np.float32)
    for target in range(by_plane.shape[0]):
        span = slice(by_plane.indptr[target], by_plane.indptr[target + 1])
        if span.start == span.stop:
            continue
        mixed[...] = 0
        for source, share in zip(by_plane.indices[span], by_plane.data[span], strict=True):
            np.copyto(term, planes[source], casting="unsafe")
            term *= share
            mixed += term
        mixed -= np.float32(fill) * by_plane.data[span].sum()
        plane = by_column @ (by_row @ mixed).T
        plane += np.float32(fill)
        result[target] = (np.rint(plane, out=plane) if dtype == np.int16 else plane).T
    return out
