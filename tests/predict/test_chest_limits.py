"""Outlines on the scan's own grid: what lies outside the chest goes, whatever the orientation."""

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from rectvlm.labels import LESIONS
from rectvlm.phantom.phantom import make_phantom
from rectvlm.predict.chest_limits import clear_outside_chest

ALL_LESIONS = sum(lesion.mask_value for lesion in LESIONS)


@pytest.mark.parametrize("code", ["RAS", "LPS", "SPL", "PIR", "ASL"])
def test_what_lies_outside_the_body_goes_and_what_lies_in_a_lung_stays(code: str) -> None:
    phantom = make_phantom(1)
    turn = ornt_transform(io_orientation(phantom.affine), axcodes2ornt(code))
    hu = np.ascontiguousarray(apply_orientation(phantom.hu, turn))
    affine = phantom.affine @ nib.orientations.inv_ornt_aff(turn, phantom.hu.shape)

    bits = np.zeros(hu.shape, np.uint8)
    in_lung = np.asarray(apply_orientation(phantom.regions, turn)) == 1
    lung = np.argwhere(in_lung)
    deep = tuple(lung[np.linalg.norm(lung - lung.mean(0), axis=1).argmin()])
    bits[deep] = ALL_LESIONS
    corner = (1, 1, 1)
    assert hu[corner] < -800
    bits[corner] = ALL_LESIONS

    assert clear_outside_chest(bits, hu, affine) == 1
    assert bits[deep] == ALL_LESIONS and bits[corner] == 0
    assert clear_outside_chest(bits, hu, affine) == 0


def test_without_outlines_nothing_is_looked_for() -> None:
    hu = np.full((4, 4, 4), -1000, np.int16)
    assert clear_outside_chest(np.zeros(hu.shape, np.uint8), hu, np.eye(4)) == 0
