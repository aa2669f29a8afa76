"""Patches that hold tissue: an encoder need not look at the air around the body.

Of a chest CT on a fixed grid a third to two thirds of the patches are air outside the body, and the
time of attention grows with the square of their number. Lungs and airways are air too, but inside:
what counts as outside is air that reaches the border of its slice through air alone.

Shapes: B samples, Z × Y × X voxels, z × y × x patches, N = z · y · x, M packed patches, C channels,
H heads, L places of a slice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AIR_HU = -850.0
"""HU below which all voxels of a patch of air lie: air is -1000, give or take its noise."""
TYPICAL_TISSUE_SHARE = 0.6
"""Share of the patches of a chest CT that hold tissue, for estimates of time: assumed. At `large`
two real CTs have 0.29 and 0.58, a phantom 0.39."""
TYPICAL_BOX_RATIO = 1.3
"""Patches of the box around the tissue, relative to those of tissue, for estimates: assumed. At
`large` two real CTs have 1.37 and 1.28."""
PACKED_MULTIPLE = 16
"""Numbers of packed patches, of a volume or of a slice, are multiples of this, which kernels
like."""
TYPICAL_FULLEST_SLICE = 1.3
"""Patches of tissue in the slice that has most, relative to the mean slice, for estimates: assumed.
At `large` two real CTs have 1.07 and 1.49, a phantom 1.18."""


_share_without_values: ContextVar[float] = ContextVar("_share_without_values", default=1.0)


@contextmanager
def assume_tissue_share(share: float) -> Iterator[None]:
    """Give volumes without values (on the meta device) this share of tissue; else they have 1."""
    token = _share_without_values.set(share)
    try:
        yield
    finally:
        _share_without_values.reset(token)


class TissuePatches(NamedTuple):
    """Patches of B samples that hold tissue, packed to rows of equal length."""

    numbers: Tensor
    """(B, M) int64, number of each packed patch in its volume."""
    is_tissue: Tensor
    """(B, M) bool; False where a row was filled up with patches of air, which nothing may read."""
    has_filler: bool
    """Whether `is_tissue` is False anywhere."""

    def pack(self, patches: Tensor) -> Tensor:
        """(B, N, C) to (B, M, C)."""
        return patches.gather(1, self.numbers[..., None].expand(-1, -1, patches.shape[2]))

    def unpack(self, packed: Tensor, count: int, air: float = 0.0) -> Tensor:
        """(B, M, C) to (B, `count`, C), with the value `air` in patches of air."""
        packed = packed.masked_fill(~self.is_tissue[..., None], air)
        volume = packed.new_full((len(packed), count, packed.shape[2]), air)
        return volume.scatter(1, self.numbers[..., None].expand_as(packed), packed)


class SlicePlaces(NamedTuple):
    """Places of packed patches where each slice is a row of L places, the first ones taken."""

    patch: Tensor
    """(B, z, L) int64, number of the packed patch at each place; arbitrary at an empty one."""
    is_empty: Tensor
    """(B, z, L) bool, places without a patch."""
    place: Tensor
    """(B, M) int64, place of each packed patch, 0 to z · L - 1; arbitrary for patches of air, which
    fill a row up."""

    def lay_out(self, tokens: Tensor, before: int, after: int) -> Tensor:
        """Tokens (B, `before` + M + `after`, C) to (B · z, `before` + L + `after`, C): the first
        and the last ones are in every slice."""
        b, slices, _ = self.patch.shape
        numbers = torch.arange(tokens.shape[1], device=tokens.device).expand(b, slices, -1)
        first, last = numbers[..., :before], numbers[..., tokens.shape[1] - after :]
        rows = torch.cat([first, before + self.patch, last], dim=2)
        index = rows.flatten(1)[..., None].expand(-1, -1, tokens.shape[2])
        return tokens.gather(1, index).view(b * slices, rows.shape[2], -1)

    def collect(self, rows: Tensor) -> Tensor:
        """(B · z, L, C) to (B, M, C)."""
        places = rows.unflatten(0, (len(self.place), -1)).flatten(1, 2)
        return places.gather(1, self.place[..., None].expand(-1, -1, rows.shape[2]))


def find_slice_places(
    tissue: TissuePatches, slice_index: Tensor, grid: tuple[int, int, int]
) -> SlicePlaces:
    """Lay the packed patches of each sample out by slice.

    Args:
        tissue: packed patches, those of tissue in the order of the slices.
        slice_index: (B, M) int64, slice of each packed patch.
        grid: number of patches (z, y, x) of the volume.
    """
    (b, m), (slices, y, x) = slice_index.shape, grid
    counts = slice_index.new_zeros(b, slices)
    counts = counts.scatter_add(1, slice_index, tissue.is_tissue.to(counts.dtype))
    if counts.is_meta:
        fullest = min(y * x, round(m / slices * TYPICAL_FULLEST_SLICE))
    else:
        fullest = int(counts.max())
    length = max(1, -(-fullest // PACKED_MULTIPLE)) * PACKED_MULTIPLE

    patches_before = (counts.cumsum(1) - counts).gather(1, slice_index)
    rank = tissue.is_tissue.cumsum(1) - 1 - patches_before
    nowhere = slices * length
    place = (slice_index * length + rank).masked_fill(~tissue.is_tissue, nowhere)
    numbers = torch.arange(max(m, nowhere + 1), device=place.device).expand(b, -1)
    # Where nothing is to be read, all read something else: a GPU adds the gradients of one row that
    # many read one by one.
    patch = (numbers[:, : nowhere + 1] % m).scatter(1, place, numbers[:, :m])[:, :nowhere]
    is_empty = torch.arange(length, device=place.device) >= counts[..., None]
    place = torch.where(tissue.is_tissue, place, numbers[:, :m] % nowhere)
    return SlicePlaces(patch.view(b, slices, length), is_empty, place)


def find_tissue_patches(ct: Tensor, patch: tuple[int, int, int]) -> TissuePatches:
    """Find the patches of CTs (B, Z, Y, X) HU that hold tissue or lie inside the body."""
    is_air = _reduce_patches(ct, patch) < AIR_HU
    tissue = ~_spread_from_border(is_air).flatten(1)
    return pack_patches(tissue)


def pack_patches(tissue: Tensor) -> TissuePatches:
    """Pack the patches that are True in (B, N) bool; of a sample without any, air is read."""
    n = tissue.shape[1]
    expected = round(n * _share_without_values.get())
    counts = [expected] if tissue.is_meta else tissue.sum(1).tolist()
    length = min(n, max(1, -(-max(counts) // PACKED_MULTIPLE)) * PACKED_MULTIPLE)
    # Sorting is stable, so tissue keeps its order, slices outermost.
    order = tissue.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    numbers = order[:, :length]
    return TissuePatches(numbers, tissue.gather(1, numbers), has_filler=min(counts) < length)


def pack_all(patches: Tensor) -> TissuePatches:
    """Take all of (B, N, C): of an encoder that looks at air too."""
    b, n, _ = patches.shape
    numbers = torch.arange(n, device=patches.device).expand(b, n)
    return TissuePatches(numbers, torch.ones_like(numbers, dtype=torch.bool), has_filler=False)


PatchBox = tuple[slice, slice, slice]
"""A box of patches, (z, y, x)."""


def find_tissue_boxes(tissue: TissuePatches, grid: tuple[int, int, int]) -> list[PatchBox]:
    """Smallest box of patches around the tissue of each sample; the whole grid where there is none.

    Args:
        tissue: packed patches.
        grid: number of patches (z, y, x) of the volume.
    """
    slices, rows, columns = grid
    numbers, is_tissue = tissue.numbers, tissue.is_tissue
    whole = (slice(0, slices), slice(0, rows), slice(0, columns))
    if numbers.shape[1] == slices * rows * columns and not tissue.has_filler:
        return [whole] * len(numbers)
    if numbers.is_meta:
        share = min(1.0, _share_without_values.get() * TYPICAL_BOX_RATIO)
        return [(whole[0], slice(0, round(share * rows)), whole[2])] * len(numbers)
    places = (numbers // (rows * columns), numbers // columns % rows, numbers % columns)
    limits = []
    for place, size in zip(places, grid, strict=True):
        limits.append(place.masked_fill(~is_tissue, size).amin(1))
        limits.append(place.masked_fill(~is_tissue, -1).amax(1) + 1)
    boxes: list[PatchBox] = []
    for z0, z1, y0, y1, x0, x1 in torch.stack(limits, 1).tolist():
        box = (slice(z0, z1), slice(y0, y1), slice(x0, x1))
        boxes.append(box if z0 < z1 else whole)
    return boxes


def _reduce_patches(ct: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Highest value of each patch, (B, z, y, x)."""
    for axis, side in zip((3, 2, 1), reversed(patch), strict=True):
        ct = ct.unflatten(axis, (-1, side)).amax(axis + 1)
    return ct


def _spread_from_border(is_air: Tensor) -> Tensor:
    """Which patches (B, z, y, x) of air reach the border of their slice through neighbours.

    The number of steps is limited, so that a GPU need not be waited for: air in the deepest folds
    counts as inside.
    """
    air = is_air.flatten(0, 1)[:, None].float()
    y, x = is_air.shape[2:]
    inner = F.pad(air.new_zeros(1, 1, max(0, y - 2), max(0, x - 2)), (1, 1, 1, 1), value=1.0)
    reached = air * inner[:, :, :y, :x]
    for _ in range(max(y, x)):
        rows = F.max_pool2d(reached, (3, 1), stride=1, padding=(1, 0))
        columns = F.max_pool2d(reached, (1, 3), stride=1, padding=(0, 1))
        reached = torch.maximum(rows, columns) * air
    return (reached[:, 0] > 0).view(is_air.shape)
