"""Lesion masks as bits: one byte a voxel holds the five lesions, which may overlap.

Every function takes NumPy arrays and torch tensors alike and returns what it was given.
"""

from collections.abc import Iterable
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectvlm.labels import LESIONS, Lesion


@overload
def lesion_mask(bits: Tensor, lesion: Lesion) -> Tensor: ...
@overload
def lesion_mask(bits: NDArray[Any], lesion: Lesion) -> NDArray[np.bool_]: ...
def lesion_mask(bits: Any, lesion: Lesion) -> Any:
    """Mask of one lesion: bool, of the shape of `bits`."""
    return (bits & lesion.mask_value) != 0


@overload
def pack_lesion(mask: Tensor, lesion: Lesion) -> Tensor: ...
@overload
def pack_lesion(mask: NDArray[Any], lesion: Lesion) -> NDArray[np.uint8]: ...
def pack_lesion(mask: Any, lesion: Lesion) -> Any:
    """Lesion bits (uint8) of one lesion's mask, which holds False and True or 0 and 1."""
    mask = mask.to(torch.uint8) if isinstance(mask, Tensor) else np.asarray(mask, np.uint8)
    return mask << lesion.bit


@overload
def unpack_lesions(bits: Tensor, axis: int = 0) -> Tensor: ...
@overload
def unpack_lesions(bits: NDArray[Any], axis: int = 0) -> NDArray[np.bool_]: ...
def unpack_lesions(bits: Any, axis: int = 0) -> Any:
    """Masks of all lesions: bool, stacked along a new axis in the order of `labels.LESIONS`."""
    masks = [lesion_mask(bits, lesion) for lesion in LESIONS]
    return torch.stack(masks, axis) if isinstance(bits, Tensor) else np.stack(masks, axis)


@overload
def pack_lesions(masks: Tensor, axis: int = 0) -> Tensor: ...
@overload
def pack_lesions(masks: NDArray[Any], axis: int = 0) -> NDArray[np.uint8]: ...
def pack_lesions(masks: Any, axis: int = 0) -> Any:
    """Lesion bits (uint8) of the masks of all lesions, which are stacked along `axis`."""
    assert masks.shape[axis] == len(LESIONS), masks.shape
    by_lesion = masks.movedim(axis, 0) if isinstance(masks, Tensor) else np.moveaxis(masks, axis, 0)
    bits = pack_lesion(by_lesion[0], LESIONS[0])
    for lesion in LESIONS[1:]:
        bits |= pack_lesion(by_lesion[lesion.bit], lesion)
    return bits


def present_lesions(bits: Tensor | NDArray[Any]) -> tuple[Lesion, ...]:
    """Lesions that at least one voxel carries."""
    if isinstance(bits, Tensor):
        return tuple(lesion for lesion in LESIONS if lesion_mask(bits, lesion).any())
    union = int(np.bitwise_or.reduce(bits, axis=None))
    return tuple(lesion for lesion in LESIONS if union & lesion.mask_value)


def combined_mask_value(lesions: Iterable[Lesion]) -> int:
    """Value of a voxel that carries all of the given lesions."""
    return sum(lesion.mask_value for lesion in set(lesions))
