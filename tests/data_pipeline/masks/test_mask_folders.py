"""Masks beside a data set, through real files: each lands on its side, and what no one outlined is
never negative."""

import gzip
import json
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.cases import Case, CaseData, case_to_sample
from data_pipeline.make_shards.shard_folder import preprocess
from data_pipeline.masks.mask_files import CaseMaskFiles
from data_pipeline.masks.mask_folders import MaskFolders
from rectvlm.config import load_config
from rectvlm.data.dataset import collate_samples
from rectvlm.data.volume import read_volume
from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS
from rectvlm.models import ModelOutputs
from rectvlm.models.localizer import LocalizerOutput
from rectvlm.train.objectives import compute_losses
from rectvlm.types import (
    OWN_OUTLINES,
    TOTALSEGMENTATOR_OUTLINES,
    InputError,
    Sample,
    UserError,
    Volume,
    no_lesions_source,
)
from tests.ct_rate_tree import phantom
from tests.grids import ORDERS, dice, grid_over, regrid, reorder, save

GRID, SPACING = (32, 64, 64), (8.0, 5.5, 5.5)
KEY = "train_1_a_1"
DRAWN = ("pleural_effusion", "consolidation", "ground_glass_opacity")
"""The lesions of phantom 0: right pleural effusion, left consolidation, right ground-glass
opacity."""


def bit(array: NDArray, key: str) -> NDArray:
    return array >> LESION_BY_KEY[key].bit & 1


def ct() -> Volume:
    chest = phantom(0)
    return Volume(chest.hu, chest.affine, "ct.nii.gz")


def loaded(masks: CaseMaskFiles) -> CaseData:
    return CaseData(**vars(masks.load(ct())), volume=ct())


def sample(folders: MaskFolders) -> Sample:
    case = Case(
        KEY, "train", "train_1", "phantom", partial(loaded, folders.find_masks(KEY)), ("a",)
    )
    return case_to_sample(case, GRID, SPACING)


def truth() -> Sample:
    chest = phantom(0)
    everything = dict.fromkeys(LESION_BY_KEY, True)
    whole = CaseData(
        volume=ct(),
        lesions=[Volume(chest.lesions, chest.affine, "truth")],
        lesions_annotated=everything,
    )
    return case_to_sample(
        Case(KEY, "train", "train_1", "phantom", lambda: whole, ("a",)), GRID, SPACING
    )


def turned(key: str, order: int, dtype: type = np.uint8, value: int = 1) -> tuple[NDArray, NDArray]:
    """A lesion of the phantom in one of the 48 axis orders."""
    chest = phantom(0)
    return reorder((bit(chest.lesions, key) * value).astype(dtype), chest.affine, *ORDERS[order])


def on_its_side(made: Sample, key: str, least: float) -> None:
    """A mask lies where the phantom's lesion lies, and not on the mirrored place."""
    made_bits, wanted = bit(made.lesions, key), bit(truth().lesions, key)
    assert dice(made_bits, wanted) >= least
    assert dice(made_bits[:, :, ::-1], wanted) < 0.35


# Places and sides


def test_lesion_files_in_any_axis_order_coding_and_name_land_on_their_side(tmp_path: Path) -> None:
    forms = (
        (f"{KEY}/pleural_effusion.nii.gz", 5, np.uint8, 1),
        (f"{KEY}_consolidation.nii", 18, np.float32, 1),
        (f"{KEY}/ground_glass_opacity.nii", 43, np.int16, 7),
    )
    for key, (name, order, dtype, value) in zip(DRAWN, forms, strict=True):
        array, affine = turned(key, order, dtype, value)
        if value > 1:
            # Instances by number.
            array[::2][array[::2] > 0] = 2
        save(tmp_path / name, array, affine)
    made, wanted = sample(MaskFolders(lesions=tmp_path)), truth()
    for key in DRAWN:
        np.testing.assert_array_equal(bit(made.lesions, key), bit(wanted.lesions, key))
        on_its_side(made, key, 1)
    assert made.meta.lesions_annotated == {key: key in DRAWN for key in LESION_BY_KEY}
    assert not any(made.meta.lesions_partial.values())
    assert made.meta.lesions_source == {
        key: OWN_OUTLINES if key in DRAWN else None for key in LESION_BY_KEY
    }


@pytest.mark.parametrize("order", range(0, 48, 7))
def test_a_mask_lands_on_the_same_voxels_from_every_axis_order(tmp_path: Path, order: int) -> None:
    save(tmp_path / f"{KEY}_consolidation.nii.gz", *turned("consolidation", order))
    on_its_side(sample(MaskFolders(lesions=tmp_path)), "consolidation", 1)


@pytest.mark.parametrize("angles", [(0, 0, 0), (0, 0, 12), (10, -15, 8)])
@pytest.mark.parametrize("spacing", [2.5, 4.0])
def test_a_mask_on_another_grid_lands_on_its_place(
    tmp_path: Path, angles: tuple, spacing: float
) -> None:
    chest = phantom(0)
    for number, key in enumerate(DRAWN):
        grid, shape = grid_over(chest.affine, chest.hu.shape, spacing + number, angles)
        drawn = regrid(bit(chest.lesions, key), chest.affine, grid, shape)
        save(tmp_path / KEY / f"{key}.nii.gz", *reorder(drawn, grid, *ORDERS[11 * number + 3]))
    made = sample(MaskFolders(lesions=tmp_path))
    for key in DRAWN:
        on_its_side(made, key, 0.75)


def test_files_of_one_lesion_and_of_several_sources_unite(tmp_path: Path) -> None:
    array, affine = turned("consolidation", 0)
    half = array.copy()
    half[: int(np.median(np.nonzero(array)[0]))] = 0
    save(tmp_path / f"{KEY}/consolidation.nii.gz", half, affine)
    save(tmp_path / f"{KEY}_consolidation.nii.gz", array - half, affine)
    assert half.any() and (array - half).any()
    on_its_side(sample(MaskFolders(lesions=tmp_path)), "consolidation", 1)
    # A nodule map on a coarser grid of its own, united with them.
    chest = phantom(0)
    grid, shape = grid_over(chest.affine, chest.hu.shape, 5)
    nodule = regrid(bit(chest.lesions, "ground_glass_opacity"), chest.affine, grid, shape) * 2
    save(tmp_path / "ts/ts_lung_nodules" / f"{KEY}.nii.gz", nodule.astype(np.uint8), grid)
    both = sample(MaskFolders(lesions=tmp_path, ts_seg=tmp_path / "ts"))
    on_its_side(both, "consolidation", 1)
    assert (
        dice(bit(both.lesions, "lung_nodule"), bit(truth().lesions, "ground_glass_opacity")) > 0.75
    )
    assert both.meta.lesions_source == {
        **no_lesions_source(),
        "consolidation": OWN_OUTLINES,
        "lung_nodule": TOTALSEGMENTATOR_OUTLINES,
    }


# What is refused


def refused(tmp_path: Path, words: str) -> InputError:
    with pytest.raises(InputError, match=words) as error:
        sample(MaskFolders(lesions=tmp_path))
    assert (
        KEY in error.value.file
        and error.value.expected
        and error.value.found
        and error.value.remedy
    )
    return error.value


def moved(affine: NDArray, x: float = 0, y: float = 0, z: float = 0) -> NDArray:
    out = affine.copy()
    out[:3, 3] += (x, y, z)
    return out


def test_a_mask_off_the_volume_is_refused(tmp_path: Path) -> None:
    array, affine = turned("consolidation", 0)
    save(tmp_path / f"{KEY}_consolidation.nii.gz", array, moved(affine, z=2000))
    error = refused(tmp_path, "does not lie on its volume")
    assert "superior" in error.expected and "give the mask the affine of the scan" in str(error)


@pytest.mark.parametrize("shift", [{"z": 120}, {"z": -90}, {"x": 130}, {"y": 110}])
def test_a_mask_of_another_patients_grid_is_refused(
    tmp_path: Path, shift: dict[str, float]
) -> None:
    array, affine = turned("consolidation", 0)
    save(tmp_path / f"{KEY}_consolidation.nii.gz", array, moved(affine, **shift))
    error = refused(tmp_path, r"hardly lies on its volume.* with ct\.nii\.gz")
    assert "check that it belongs to this scan" in str(error)


@pytest.mark.parametrize(
    "affine", [np.eye(4), np.diag([-1.0, -1, 1, 1]), np.diag([2.5, 2.5, 4.5, 1])]
)
def test_an_affine_that_says_nothing_is_refused(tmp_path: Path, affine: NDArray) -> None:
    save(tmp_path / f"{KEY}_consolidation.nii.gz", turned("consolidation", 0)[0], affine)
    error = refused(tmp_path, "blank header .*so left and right are unknown")
    assert "write the affine of its CT into a mask" in str(error)


def test_a_mask_without_orientation_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(turned("consolidation", 0)[0], None)
    nib.save(image, tmp_path / f"{KEY}_consolidation.nii.gz")
    refused(tmp_path, "no orientation, so left and right are unknown")


@pytest.mark.parametrize("name", ["nodule.nii.gz", "Lung nodule.nii", "ggo.nii.gz"])
def test_a_lesion_file_whose_name_is_no_lesion_is_refused_not_passed_over(
    tmp_path: Path, name: str
) -> None:
    save(tmp_path / KEY / "consolidation.nii.gz", *turned("consolidation", 0))
    save(tmp_path / KEY / name, *turned("consolidation", 0))
    error = refused(tmp_path, "is the mask of nothing that is known")
    assert "lung_nodule" in error.expected and error.found == name


def test_anatomical_classes_beside_lesions_are_no_strays(tmp_path: Path) -> None:
    save(tmp_path / KEY / "consolidation.nii.gz", *turned("consolidation", 0))
    for name in ("heart.nii.gz", "humerus_left.nii.gz", "heart_atrium_left.nii.gz"):
        (tmp_path / KEY / name).touch()
    (tmp_path / KEY / "._consolidation.nii.gz").touch()
    assert sample(MaskFolders(lesions=tmp_path)).meta.lesions_annotated["consolidation"]


def test_a_stray_file_belongs_to_the_identity_of_its_case(tmp_path: Path) -> None:
    """Once it is moved away, as its message asks, the case is made again."""
    save(tmp_path / KEY / "consolidation.nii.gz", *turned("consolidation", 0))
    before = MaskFolders(lesions=tmp_path).find_masks(KEY).paths
    stray = tmp_path / KEY / "ggo.nii.gz"
    stray.touch()
    assert MaskFolders(lesions=tmp_path).find_masks(KEY).paths == (*before, stray)


def test_the_folder_of_a_predicted_case_is_taken_back(tmp_path: Path) -> None:
    for name in ("consolidation.nii.gz", "lesions.nii.gz"):
        save(tmp_path / KEY / name, *turned("consolidation", 0))
    (tmp_path / KEY / "findings.json").write_text("{}")
    annotated = sample(MaskFolders(lesions=tmp_path)).meta.lesions_annotated
    assert annotated["consolidation"] and not annotated["lung_nodule"]


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="none is not a folder: expected the one given as lesions masks"
    ):
        MaskFolders(lesions=tmp_path / "none")


def test_what_cannot_be_read_is_set_aside_and_the_rest_is_complete(tmp_path: Path) -> None:
    """Through a run: a damaged mask, one of strange values and a missing one beside a good one."""
    array, affine = turned("consolidation", 0)
    folder = tmp_path / "masks"
    keys = [f"train_{n}_a_1" for n in range(1, 5)]
    for key in keys[:3]:
        save(folder / f"{key}_consolidation.nii.gz", array, affine)
    damaged = folder / f"{keys[0]}_consolidation.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    save(folder / f"{keys[1]}_consolidation.nii.gz", array * np.float32(0.5), affine)
    masks = MaskFolders(lesions=folder)
    cases = [
        Case(key, "train", key, f"case {key}", partial(loaded, masks.find_masks(key)), (key,))
        for key in keys
    ]
    preprocess(cases, tmp_path / "shards", GRID, SPACING, samples_per_shard=4)
    rows = [
        json.loads(line) for line in (tmp_path / "shards/quarantine.jsonl").read_text().splitlines()
    ]
    assert [row["key"] for row in rows] == keys[:2]
    assert "cut short" in rows[0]["reason"] and "is not a mask" in rows[1]["reason"]
    index = json.loads((tmp_path / "shards/index.json").read_text())
    assert json.dumps(index).count('"train_3_a_1"') and json.dumps(index).count('"train_4_a_1"')


# Annotated, absent, unknown


def test_an_empty_mask_says_absent_and_a_missing_one_says_nothing(tmp_path: Path) -> None:
    array, affine = turned("consolidation", 0)
    save(tmp_path / KEY / "consolidation.nii.gz", array, affine)
    save(tmp_path / KEY / "lung_nodule.nii.gz", np.zeros_like(array), affine)
    made = sample(MaskFolders(lesions=tmp_path))
    annotated = made.meta.lesions_annotated
    assert {key for key, value in annotated.items() if value} == {"consolidation", "lung_nodule"}
    assert not bit(made.lesions, "lung_nodule").any()
    batch = collate_samples([made])
    assert batch.lesions_annotated[0].tolist() == [
        lesion.key in ("consolidation", "lung_nodule") for lesion in LESIONS
    ]
    nothing = sample(MaskFolders(lesions=tmp_path / KEY))
    assert not any(nothing.meta.lesions_annotated.values())
    assert nothing.meta.lesions_source == no_lesions_source()


def test_a_mask_of_a_part_of_the_volume_says_nothing_of_the_rest(tmp_path: Path) -> None:
    """A box around a lesion, or the upper half of the chest: what is drawn is sure, what is empty
    is unknown."""
    array, affine = turned("consolidation", 0)
    where = np.argwhere(array)
    low, high = where.min(0) - 1, where.max(0) + 2
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    corner = affine.copy()
    corner[:3, 3] = (affine @ [*low, 1])[:3]
    save(tmp_path / KEY / "consolidation.nii.gz", array[box], corner)
    half, other = array.shape[0] // 2, moved(affine)
    other[:3, 3] = (affine @ [half, 0, 0, 1])[:3]
    save(tmp_path / KEY / "lung_nodule.nii.gz", np.zeros_like(array[half:]), other)
    made = sample(MaskFolders(lesions=tmp_path))
    on_its_side(made, "consolidation", 1)
    assert not any(made.meta.lesions_annotated.values())
    assert {key for key, value in made.meta.lesions_partial.items() if value} == {
        "consolidation",
        "lung_nodule",
    }


def test_a_mask_cut_to_the_body_still_says_what_is_absent(tmp_path: Path) -> None:
    array, affine = turned("consolidation", 0)
    cut = [slice(n // 8, n - n // 8) for n in array.shape]
    corner = affine.copy()
    corner[:3, 3] = (affine @ [*(part.start for part in cut), 1])[:3]
    save(tmp_path / KEY / "lung_nodule.nii.gz", np.zeros_like(array[tuple(cut)]), corner)
    assert sample(MaskFolders(lesions=tmp_path)).meta.lesions_annotated["lung_nodule"]


def test_what_no_one_outlined_moves_no_loss(tmp_path: Path) -> None:
    """From files to the loss: logits may be anything where a lesion is unknown, and nothing
    changes."""
    import torch

    array, affine = turned("consolidation", 0)
    save(tmp_path / KEY / "consolidation.nii.gz", array, affine)
    batch = collate_samples([sample(MaskFolders(lesions=tmp_path))])
    logits = torch.zeros(1, len(LESIONS), *batch.lesions.shape[1:], requires_grad=True)
    localizer_output = LocalizerOutput(
        logits, logits[..., ::2], logits[..., ::4], logits.mean((2, 3, 4)), torch.zeros(())
    )
    outputs = ModelOutputs(torch.zeros(1, len(FINDINGS)), localizer_output, None, 0)
    terms = load_config("tiny").train.localization_loss_weights
    compute_losses(outputs, batch, ("localization",), terms)["localization"].value.backward()
    assert logits.grad is not None
    moved_by = {lesion.key for lesion in LESIONS if logits.grad[0, lesion.bit].any()}
    assert moved_by == {"consolidation"}


def test_the_files_of_a_case_are_its_identity(tmp_path: Path) -> None:
    array, affine = turned("consolidation", 0)
    save(tmp_path / "l" / f"{KEY}_consolidation.nii.gz", array, affine)
    save(tmp_path / "t/ts_total/train_fixed/train_1/train_1_a" / f"{KEY}.nii.gz", array, affine)
    save(tmp_path / "t/ts_lung_nodules" / f"{KEY}.nii", array, affine)
    save(tmp_path / "r" / KEY / "heart.nii.gz", array, affine)
    mask_paths = (
        MaskFolders(lesions=tmp_path / "l", ts_seg=tmp_path / "t", regions=tmp_path / "r")
        .find_masks(KEY)
        .paths
    )
    assert {path.relative_to(tmp_path).parts[0] for path in mask_paths} == {"l", "t", "r"} and len(
        mask_paths
    ) == 3
    assert (
        not MaskFolders(lesions=tmp_path / "l", ts_seg=tmp_path / "t")
        .find_masks("train_1_a_10")
        .paths
    )


def test_a_ct_and_its_mask_are_packed_as_they_like(tmp_path: Path) -> None:
    """Two gzip members, no gzip under a .gz name: what counts is what is in the file."""
    array, affine = turned("consolidation", 0)
    path = save(tmp_path / f"{KEY}_consolidation.nii", array, affine)
    data = path.read_bytes()
    path.unlink()
    packed = tmp_path / f"{KEY}_consolidation.nii.gz"
    for content in (data, gzip.compress(data[:999]) + gzip.compress(data[999:])):
        packed.write_bytes(content)
        on_its_side(sample(MaskFolders(lesions=tmp_path)), "consolidation", 1)
    assert read_volume(packed).array.any()
