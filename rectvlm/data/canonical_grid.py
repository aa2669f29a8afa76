"""The canonical frame: where a sample's grid lies in the patient, and resampling to it and back.

World is RAS+ mm. Canonical axes are (z, y, x) = (superior, posterior, left), so index x grows towards the patient's
left. Every place comes from an affine (voxel centres, 4 × 4); array indexes alone say nothing about sides.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from rectvlm.labels import AIR_HU, LESIONS, N_LESIONS
from rectvlm.lesion_bits import lesion_mask, pack_lesion, present_lesions
from rectvlm.types import Affine, InputError, Int16Volume, MaskVolume

_CANONICAL_DIRECTIONS = np.array([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
"""World direction of each canonical axis: superior, posterior, left."""
_COARSE_SPACING_MM = 6.0
_MIN_BODY_HU, _MAX_LUNG_HU = -400, -500
# Coverage sums many float32 products; exact halves must count as halves in every axis order.
_HALF_COVERAGE = 0.5 - 1e-4


# Where the grid lies


def canonical_affine(
    native_affine: Affine,
    native_shape: Sequence[int],
    hu: Int16Volume,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
) -> Affine:
    """Place the target grid around the body: 4 × 4, canonical index (z, y, x, 1) to world.

    In-plane it is centred on the bounding box of the body; along z on the volume or, when the volume is longer than
    the grid, on the lungs. Grid edges fall on native voxel edges, so equal sampling copies voxels instead of mixing
    them. The result does not depend on the axis order of the file.

    Args:
        hu: HU (i, j, k), of `native_shape`.
        grid: voxels (z, y, x).
        spacing: mm (z, y, x).
    """
    low, high = _world_bounds(native_affine, native_shape)
    extent = np.array(grid) * spacing
    centre = (low + high) / 2
    coarse_low, coarse = _resample_coarse(hu, native_affine, low, high)
    body = _largest_component(ndimage.binary_opening(coarse > _MIN_BODY_HU))
    if body.any():
        begin, end = _bounding_box(body)
        centre[1:] = (coarse_low + _COARSE_SPACING_MM * (begin + end) / 2)[1:]
        if high[0] - low[0] > extent[0] + 1e-3:
            lungs = _find_lungs(coarse, body)
            begin, end = _bounding_box(lungs if lungs.any() else body)
            middle = coarse_low[0] + _COARSE_SPACING_MM * (begin[0] + end[0]) / 2
            centre[0] = np.clip(middle, low[0] + extent[0] / 2, high[0] - extent[0] / 2)
    edge = centre - extent / 2
    step = _native_voxel_size(native_affine)
    if step is not None:
        edge = low + np.floor((edge - low) / step + 0.5 + 1e-4) * step
    return _make_grid_affine(edge, np.array(spacing, np.float64))


def _make_grid_affine(edge: NDArray[np.float64], spacing: NDArray[np.float64]) -> Affine:
    """The affine of a canonical grid from its low edges, mm along the canonical directions, and its spacing."""
    affine = np.eye(4)
    affine[:3, :3] = _CANONICAL_DIRECTIONS.T * spacing
    affine[:3, 3] = _CANONICAL_DIRECTIONS.T @ (edge + spacing / 2)
    return affine


def _world_bounds(
    affine: Affine, shape: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Low and high edges of a volume's box, mm along the canonical directions (z, y, x)."""
    corners = np.stack(
        np.meshgrid(*[(-0.5, n - 0.5) for n in shape], indexing="ij"), axis=-1
    ).reshape(-1, 3)
    placed = (corners @ affine[:3, :3].T + affine[:3, 3]) @ _CANONICAL_DIRECTIONS.T
    return placed.min(axis=0), placed.max(axis=0)


def _native_voxel_size(affine: Affine) -> NDArray[np.float64] | None:
    """Voxel size along the canonical directions (z, y, x), mm; None when the axes are oblique."""
    along = np.abs(_CANONICAL_DIRECTIONS @ affine[:3, :3])
    return along.max(axis=1) if np.count_nonzero(along > 1e-3 * along.max()) == 3 else None


def _resample_coarse(
    hu: Int16Volume, affine: Affine, low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """The volume averaged to a canonical 6 mm grid, and that grid's low edges. Thin things such as tables fade."""
    shape = np.ceil((high - low) / _COARSE_SPACING_MM - 1e-6).astype(int)
    edge = (low + high) / 2 - shape * _COARSE_SPACING_MM / 2
    return edge, _resample_array(
        hu,
        affine,
        _make_grid_affine(edge, np.full(3, _COARSE_SPACING_MM)),
        tuple(shape.tolist()),
        AIR_HU,
    )


def _largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    parts, count = ndimage.label(mask)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count else mask


def _find_lungs(coarse: NDArray[np.float32], body: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Gas inside the body: the largest pocket and any of at least a fifth of its size (the other lung)."""
    inside = (
        np.stack([ndimage.binary_fill_holes(plane) for plane in body])
        & ~body
        & (coarse < _MAX_LUNG_HU)
    )
    parts, count = ndimage.label(inside)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return (sizes >= max(1, 0.2 * sizes.max()))[parts] if count else inside


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    where = np.argwhere(mask)
    return where.min(axis=0).astype(float), where.max(axis=0) + 1.0


def require_overlap(
    mask_affine: Affine,
    mask_shape: Sequence[int],
    volume_affine: Affine,
    volume_shape: Sequence[int],
    where: str = "mask",
) -> None:
    """Refuse a mask that does not lie on its volume.

    Raises:
        UserError: the two physical boxes do not overlap; `where` names the mask.
    """
    mask_low, mask_high = _world_bounds(mask_affine, mask_shape)
    low, high = _world_bounds(volume_affine, volume_shape)
    if (np.minimum(mask_high, high) - np.maximum(mask_low, low) <= 0).any():

        def words(a: NDArray[np.float64], b: NDArray[np.float64]) -> str:
            return ", ".join(
                f"{name} {x:.0f} to {y:.0f}" for name, x, y in zip("SPL", a, b, strict=True)
            )

        raise InputError(
            where,
            "does not lie on its volume",
            expected=f"an overlap with {words(low, high)} mm (superior, posterior, left)",
            found=words(mask_low, mask_high),
            remedy="give the mask the affine of the scan that it was drawn on",
        )


# Resampling


def resample_to_grid(
    array: NDArray[Any],
    affine: Affine,
    grid_affine: Affine,
    grid: tuple[int, int, int],
    kind: Literal["ct", "bits", "labels"],
    fill: int | None = None,
) -> NDArray[Any]:
    """A native array (i, j, k) on the grid (z, y, x).

    Downsampling averages over each voxel's box, weighted by overlap; upsampling is linear. `ct`: int16 HU. `bits`:
    each lesion by itself where it covers half of a voxel, and each connected part of it that lies in the grid keeps at
    least its best-covered voxel. `labels`: the id at each voxel's centre.

    Args:
        affine: of `array`, any axis order, flips, or oblique.
        fill: value outside the array; default −1024 HU for `ct`, 0 for masks.
    """
    if kind == "ct":
        return _resample_array(
            array, affine, grid_affine, grid, AIR_HU if fill is None else fill, np.int16
        )
    if kind == "labels":
        return _resample_nearest(array, affine, grid_affine, grid, fill or 0)
    return _resample_lesion_bits(array, affine, grid_affine, grid)


def mask_to_native(
    mask: MaskVolume | NDArray[np.floating[Any]],
    grid_affine: Affine,
    native_shape: Sequence[int],
    native_affine: Affine,
) -> MaskVolume:
    """Lesion masks of the grid on the native array: uint8 bits (i, j, k), of exactly `native_shape`.

    Args:
        mask: lesion bits (z, y, x) uint8, or probabilities (5, z, y, x); interpolated lesion by lesion, then cut
            at one half.
    """
    shape = (int(native_shape[0]), int(native_shape[1]), int(native_shape[2]))
    out = np.zeros(shape, np.uint8)
    is_probability = np.issubdtype(mask.dtype, np.floating)
    assert mask.ndim == (4 if is_probability else 3), (mask.dtype, mask.shape)
    assert not is_probability or len(mask) == N_LESIONS, mask.shape
    for lesion in LESIONS:
        source = mask[lesion.bit] if is_probability else lesion_mask(mask, lesion)
        # Probabilities below one half everywhere stay below it under any averaging.
        if source.max() >= 0.5:
            coverage = _resample_array(source, grid_affine, native_affine, shape, 0)
            out |= pack_lesion(coverage >= _HALF_COVERAGE, lesion)
    return out


def _resample_lesion_bits(
    array: MaskVolume, affine: Affine, grid_affine: Affine, grid: tuple[int, int, int]
) -> MaskVolume:
    out = np.zeros(grid, np.uint8)
    for lesion in present_lesions(array):
        mask = lesion_mask(array, lesion)
        box = ndimage.find_objects(mask.view(np.uint8))[0]
        mask = mask[box]
        placed = affine.copy()
        placed[:3, 3] = (affine @ [*(part.start for part in box), 1.0])[:3]
        coverage = _resample_array(mask, placed, grid_affine, grid, 0)
        kept = coverage >= _HALF_COVERAGE
        _restore_lost_components(mask, placed, grid_affine, coverage, kept)
        out |= pack_lesion(kept, lesion)
    return out


def _restore_lost_components(
    mask: NDArray[np.bool_],
    affine: Affine,
    grid_affine: Affine,
    coverage: NDArray[np.float32],
    kept: NDArray[np.bool_],
) -> None:
    """Give every connected part of a native mask that has no voxel in `kept` its best-covered one, in place."""
    parts, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    where = np.argwhere(parts)
    part = parts[tuple(where.T)]
    to_grid = np.linalg.inv(grid_affine) @ affine
    # The small shift breaks ties between two voxels in the same direction for every axis order of the file.
    target = np.floor(where @ to_grid[:3, :3].T + to_grid[:3, 3] + 0.5 + 1e-6).astype(int)
    inside = ((target >= 0) & (target < kept.shape)).all(axis=1)
    part, target = part[inside], target[inside]
    found = np.zeros(count + 1, bool)
    found[part[kept[tuple(target.T)]]] = True
    lost = ~found[part]
    part, target = part[lost], target[lost]
    order = np.lexsort((*target.T, -coverage[tuple(target.T)], part))
    _, first = np.unique(part[order], return_index=True)
    kept[tuple(target[order][first].T)] = True


def _resample_array(
    array: NDArray[Any],
    affine: Affine,
    target_affine: Affine,
    shape: tuple[int, int, int],
    fill: float,
    dtype: type[np.float32] | type[np.int16] = np.float32,
) -> NDArray[Any]:
    """Area-weighted (finer to coarser) or linear (coarser to finer) resampling, by axis where the axes allow it."""
    to_target = np.linalg.inv(target_affine) @ affine
    axes = _match_axes(to_target, array.shape)
    if axes is None:
        array, to_target = _straighten_oblique(array, to_target, shape, fill)
        axes = (0, 1, 2)
    weights = [
        _axis_weights(array.shape[source], shape[axis], to_target[axis, source], to_target[axis, 3])
        for axis, source in enumerate(axes)
    ]
    return _apply_axis_weights(array.transpose(axes), weights, fill, dtype)


def _match_axes(to_target: Affine, shape: Sequence[int]) -> tuple[int, int, int] | None:
    """The source axis that each target axis follows; None when the two are oblique by more than rounding."""
    linear = np.abs(to_target[:3, :3])
    axes = tuple(int(axis) for axis in linear.argmax(axis=1))
    off = linear.copy()
    off[range(3), axes] = 0
    drift = off @ np.array(shape)
    size = linear[range(3), axes]
    aligned = sorted(axes) == [0, 1, 2] and bool((drift < 0.05 * np.minimum(size, 1)).all())
    return (axes[0], axes[1], axes[2]) if aligned else None


def _straighten_oblique(
    array: NDArray[Any], to_target: Affine, shape: tuple[int, int, int], fill: float
) -> tuple[NDArray[np.float32], Affine]:
    """An oblique array, linearly, on axes parallel to the target's at about its own sampling, cut to the target.

    Returns the array and its affine to target indexes.
    """
    linear = to_target[:3, :3]
    # Source voxels a target voxel, along each target axis: the finest source axis that contributes decides.
    finest = np.abs(np.linalg.inv(linear)).max(axis=0)
    factor = np.maximum(1, np.rint(finest)).astype(int)
    step = 1.0 / factor
    out_shape = tuple(int(n) for n in factor * shape)
    straight = np.diag([*step, 1.0])
    straight[:3, 3] = step / 2 - 0.5
    pull = np.linalg.inv(to_target) @ straight
    moved = ndimage.affine_transform(
        array,
        pull[:3, :3],
        pull[:3, 3],
        out_shape,
        np.float32,
        order=1,
        mode="grid-constant",
        cval=fill,
    )
    return moved, straight


def _axis_weights(n_source: int, n_target: int, step: float, offset: float) -> sparse.csr_array:
    """Weights (n_target, n_source) of one axis; a row sums to the share of the voxel that lies inside the source.

    Source voxel i lies at `step · i + offset` in target indexes; both kinds of voxels are boxes around their centres.
    """
    source = step * np.arange(n_source) + offset
    size = abs(step)
    if size <= 1:
        lower, upper = source - size / 2, source + size / 2
        first = np.maximum(np.ceil(lower - 0.5 - 1e-6), 0).astype(int)
        # A source box no larger than a target box reaches two target voxels at most.
        rows = np.concatenate([first, first + 1])
        columns = np.tile(np.arange(n_source), 2)
        overlap = np.minimum(upper[columns], rows + 0.5) - np.maximum(lower[columns], rows - 0.5)
        values = overlap
    else:
        target = np.arange(n_target)
        place = (target - offset) / step
        inside = (place > -0.5 - 1e-6) & (place < n_source - 0.5 + 1e-6)
        place = np.clip(place, 0, n_source - 1)
        left = np.minimum(np.floor(place).astype(int), max(n_source - 2, 0))
        right = np.minimum(left + 1, n_source - 1)
        share = place - left
        rows = np.tile(target, 2)
        columns = np.concatenate([left, right])
        values = np.concatenate([1 - share, share]) * np.tile(inside, 2)
    keep = (rows >= 0) & (rows < n_target) & (values > 1e-6)
    entries = (values[keep].astype(np.float32), (rows[keep], columns[keep]))
    return sparse.csr_array(entries, shape=(n_target, n_source))


def _apply_axis_weights(
    array: NDArray[Any],
    weights: list[sparse.csr_array],
    fill: float,
    dtype: type[np.float32] | type[np.int16],
) -> NDArray[Any]:
    """Apply one weight matrix an axis to (a, b, c), plane by plane, so that no float copy of the whole exists.

    Outside counts as `fill`: the weights act on the difference from it. Whole numbers are rounded.
    """
    used = [np.unique(weight.indices) for weight in weights]
    out = np.full([weight.shape[0] for weight in weights], fill, dtype)
    if any(len(columns) == 0 for columns in used):
        return out
    crop = tuple(slice(int(columns[0]), int(columns[-1]) + 1) for columns in used)
    array = array[crop]
    weights = [weight[:, part] for weight, part in zip(weights, crop, strict=True)]
    # Planes along the slowest axis in memory, rows along the next: both are then read in order.
    slow, rows, fast = (
        int(axis) for axis in np.argsort([-abs(stride) for stride in array.strides], kind="stable")
    )
    planes, result = array.transpose(slow, rows, fast), out.transpose(slow, rows, fast)
    by_plane, by_row, by_column = weights[slow], weights[rows], weights[fast]
    # Fresh memory costs several times the arithmetic here, so two planes of it serve throughout.
    mixed, term = np.empty(planes.shape[1:], np.float32), np.empty(planes.shape[1:], np.float32)
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


def _resample_nearest(
    array: NDArray[Any],
    affine: Affine,
    target_affine: Affine,
    shape: tuple[int, int, int],
    fill: int,
) -> NDArray[Any]:
    """The source value at each target voxel's centre."""
    pull = np.linalg.inv(affine) @ target_affine
    # A hair off the centre, in target indexes, so that ties fall the same way for every axis order of the file.
    pull[:3, 3] += pull[:3, :3] @ np.full(3, 1e-4)
    axes = _match_axes(pull, shape)
    if axes is None:
        return ndimage.affine_transform(
            array,
            pull[:3, :3],
            pull[:3, 3],
            shape,
            array.dtype,
            order=0,
            mode="grid-constant",
            cval=fill,
        )
    out = np.full(shape, fill, array.dtype)
    places = [
        np.rint(pull[s, t] * np.arange(shape[t]) + pull[s, 3]).astype(int)
        for s, t in enumerate(axes)
    ]
    valid = [(place >= 0) & (place < n) for place, n in zip(places, array.shape, strict=True)]
    # axes[s] is the target axis of source axis s; reading wants the sources in the target's order.
    order = np.argsort(axes)
    source = array.transpose(order)[np.ix_(*[places[s][valid[s]] for s in order])]
    out[np.ix_(*[valid[s] for s in order])] = source
    return out
