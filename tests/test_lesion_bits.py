"""Lesion masks as bits and back, for NumPy arrays and torch tensors."""

import numpy as np
import pytest
import torch

from rectvlm.labels import LESION_BY_KEY, LESIONS, N_LESIONS
from rectvlm.lesion_bits import (
    combined_mask_value,
    lesion_mask,
    pack_lesion,
    pack_lesions,
    present_lesions,
    unpack_lesions,
)

NODULE, EFFUSION = LESION_BY_KEY["lung_nodule"], LESION_BY_KEY["pericardial_effusion"]
BITS = np.array([[0, 1], [16, 17]], np.uint8)


def test_the_bit_of_a_lesion_is_its_place_in_the_list():
    assert [lesion.bit for lesion in LESIONS] == list(range(N_LESIONS))
    assert [lesion.mask_value for lesion in LESIONS] == [1, 2, 4, 8, 16]
    assert combined_mask_value([NODULE, EFFUSION, NODULE]) == 17


@pytest.mark.parametrize("as_given", [np.asarray, torch.tensor])
def test_masks_are_read_from_bits_and_written_to_them(as_given):
    bits = as_given(BITS)
    mask = lesion_mask(bits, NODULE)
    assert mask.dtype in (np.bool_, torch.bool) and mask.tolist() == [[False, False], [True, True]]
    packed = pack_lesion(mask, NODULE)
    assert packed.dtype in (np.uint8, torch.uint8) and packed.tolist() == [[0, 0], [16, 16]]
    assert present_lesions(bits) == (EFFUSION, NODULE)
    assert present_lesions(bits[:1, :1]) == ()


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("as_given", [np.asarray, torch.tensor])
def test_all_masks_at_once_and_back(as_given, axis: int):
    bits = as_given(np.arange(32, dtype=np.uint8).reshape(4, 8))
    masks = unpack_lesions(bits, axis)
    assert masks.shape[axis] == N_LESIONS
    assert pack_lesions(masks, axis).tolist() == bits.tolist()
    assert unpack_lesions(bits)[NODULE.bit].tolist() == lesion_mask(bits, NODULE).tolist()
