"""Each outlined lesion kind has a file of its own, where the file of all of them lies."""

from pathlib import Path

import nibabel as nib
import numpy as np

from data_pipeline.masks.mask_folders import MaskFolders
from rectvlm.data.volume import read_volume
from rectvlm.labels import LESION_BY_KEY
from rectvlm.predict.lesion_files import save_lesion_files
from tests.small_cases import AFFINE, body

POSITION_FIELDS = (
    "qform_code",
    "sform_code",
    "pixdim",
    "xyzt_units",
    "quatern_b",
    "qoffset_x",
    "srow_x",
)


def save_two_lesions(folder: Path) -> nib.Nifti1Image:
    """Save a nodule inside a consolidation; return the image of the bits."""
    _, nodule = body(0)
    bits = np.zeros_like(nodule)
    bits[4:10, 8:14, 1:8] |= LESION_BY_KEY["consolidation"].mask_value
    bits |= nodule << LESION_BY_KEY["lung_nodule"].bit
    image = nib.Nifti1Image(bits, None)
    image.header.set_sform(AFFINE, code=2)  # the sform alone, as with a tilted gantry
    image.header.set_xyzt_units("mm")
    folder.mkdir(parents=True, exist_ok=True)
    save_lesion_files(bits, image, folder)
    return image


def test_overlapping_lesions_have_a_file_each_with_the_position_of_the_whole(
    tmp_path: Path,
) -> None:
    whole = save_two_lesions(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "consolidation.nii.gz",
        "lung_nodule.nii.gz",
    }
    for key in ("consolidation", "lung_nodule"):
        image = nib.load(tmp_path / f"{key}.nii.gz")
        mask = np.asarray(image.dataobj)
        expected = np.asarray(whole.dataobj) & LESION_BY_KEY[key].mask_value
        np.testing.assert_array_equal(mask, expected > 0)
        assert mask.dtype == np.uint8
        for name in POSITION_FIELDS:
            np.testing.assert_array_equal(image.header[name], whole.header[name], name)
        assert not image.header.extensions


def test_the_files_are_masks_that_preprocessing_takes(tmp_path: Path) -> None:
    save_two_lesions(tmp_path / "lesions/case")
    nib.save(nib.Nifti1Image(body(0)[0], AFFINE), tmp_path / "ct.nii.gz")
    masks = MaskFolders(lesions=tmp_path / "lesions").find_masks("case")
    loaded = masks.load(read_volume(tmp_path / "ct.nii.gz"))
    annotated = {key for key, known in loaded.lesions_annotated.items() if known}
    assert annotated == {"consolidation", "lung_nodule"}
