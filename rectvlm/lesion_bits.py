"""Lesion masks as bits: one byte a voxel holds the five lesions, which may overlap.

Every function takes a NumPy array or a torch tensor and returns the same kind.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import LESIONS, Lesion

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", NDArray[Any], "Tensor")


def lesion_mask(bits: Array, lesion: Lesion) -> Array:
    """Mask of one lesion: bool, of the shape of `bits`."""
    return (bits & lesion.mask_value) != 0


def pack_lesion(mask: Array, lesion: Lesion) -> Array:
    """Lesion bits (uint8) of one lesion's mask, which holds False and True or 0 and 1."""
    if isinstance(mask, np.ndarray):
        return mask.astype(np.uint8) << lesion.bit
    return mask.byte() << lesion.bit


def unpack_lesions(bits: Array, axis: int = 0) -> Array:
    """Masks of all lesions: bool, stacked along a new axis in the order of `labels.LESIONS`."""
    masks = [lesion_mask(bits, lesion) for lesion in LESIONS]
    if isinstance(bits, np.ndarray):
        return np.stack(masks, axis)
    import torch

    return torch.stack(masks, axis)


def pack_lesions(masks: Array, axis: int = 0) -> Array:
    """Lesion bits (uint8) of the masks of all lesions, which are stacked along `axis`."""
    assert masks.shape[axis] == len(LESIONS), masks.shape
    if isinstance(masks, np.ndarray):
        by_lesion = np.moveaxis(masks, axis, 0)
    else:
        by_lesion = masks.movedim(axis, 0)
    bits = pack_lesion(by_lesion[0], LESIONS[0])
    for lesion in LESIONS[1:]:
        bits |= pack_lesion(by_lesion[lesion.bit], lesion)
    return bits


def present_lesions(bits: Array) -> tuple[Lesion, ...]:
    """Lesions that at least one voxel carries."""
    if isinstance(bits, np.ndarray):
        union = int(np.bitwise_or.reduce(bits, axis=None))
        return tuple(lesion for lesion in LESIONS if union & lesion.mask_value)
    return tuple(lesion for lesion in LESIONS if lesion_mask(bits, lesion).any())


def combined_mask_value(lesions: Iterable[Lesion]) -> int:
    """Value of a voxel that carries all of the given lesions."""
    return sum(lesion.mask_value for lesion in set(lesions))
