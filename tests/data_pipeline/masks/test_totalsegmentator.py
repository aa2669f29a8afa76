"""TotalSegmentator's outputs: each class goes to its region, in either numbering, and left never
becomes right."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.masks.mask_folders import MaskFolders
from data_pipeline.masks.totalsegmentator import (
    LESION_TASKS,
    TOTAL_V1,
    TOTAL_V2,
    read_lesions,
    read_regions,
    region_of_class,
)
from rectvlm.data.canonical_grid import canonical_affine, resample_to_grid
from rectvlm.labels import LESION_BY_KEY, REGION_BY_NAME, REGIONS
from rectvlm.lesion_places import locate_lesions
from rectvlm.types import InputError, Volume
from tests.ct_rate_tree import phantom
from tests.grids import ORDERS, dice, grid_over, regrid, reorder, save

KEY = "train_1_a_1"
EXPECTED = {
    "lung_upper_lobe_right": "right upper lobe",
    "lung_middle_lobe_right": "right middle lobe",
    "lung_lower_lobe_right": "right lower lobe",
    "lung_upper_lobe_left": "left upper lobe",
    "lung_lower_lobe_left": "left lower lobe",
    "trachea": "trachea",
    "heart": "heart",
    "heart_atrium_left": "heart",
    "heart_ventricle_right": "heart",
    "heart_myocardium": "heart",
    "atrial_appendage_left": "heart",
    "aorta": "aorta",
    "pulmonary_vein": "pulmonary veins",
    "superior_vena_cava": "great vessels",
    "brachiocephalic_trunk": "great vessels",
    "brachiocephalic_vein_left": "great vessels",
    "subclavian_artery_right": "great vessels",
    "common_carotid_artery_left": "great vessels",
    "esophagus": "esophagus",
    "thyroid_gland": "thyroid",
    "vertebrae_T7": "spine",
    "vertebrae_S1": "spine",
    "spinal_cord": "spine",
    "sacrum": "spine",
    "sternum": "sternum",
    "costal_cartilages": "sternum",
    "liver": "liver",
    "spleen": "spleen",
    "stomach": "stomach",
    "kidney_left": "other upper abdominal organs",
    "adrenal_gland_right": "other upper abdominal organs",
    "pancreas": "other upper abdominal organs",
    "inferior_vena_cava": "other upper abdominal organs",
    **{f"rib_{side}_{n}": f"{side} ribs" for side in ("left", "right") for n in range(1, 13)},
}
OUTSIDE = (
    "colon",
    "small_bowel",
    "humerus_left",
    "clavicula_right",
    "autochthon_left",
    "brain",
    "hip_left",
    "skull",
)
TS = {name: number for number, name in TOTAL_V2.items()}
TS1 = {name: number for number, name in TOTAL_V1.items()}
CLASS = {
    region.id: next(name for name in sorted(TS) if region_of_class(name) == region.id)
    for region in REGIONS
}
"""One class of each region."""


def as_classes(regions: NDArray, numbers: dict[str, int] = TS) -> NDArray:
    """A region map in TotalSegmentator's numbers."""
    table = np.zeros(21, np.uint8)
    for number, name in CLASS.items():
        table[number] = numbers.get(name, 0)
    return table[regions]


def ct() -> Volume:
    chest = phantom(3)
    return Volume(chest.hu, chest.affine, "ct.nii.gz")


def named(path: Path, classes: dict[int, str]) -> Path:
    """Write the class names into a file's header as TotalSegmentator does."""
    rows = "".join(
        f'<Label Key="{number}" Red="1" Green="2" Blue="3" Alpha="1"><![CDATA[{name}]]></Label>'
        for number, name in classes.items()
    )
    table = f"<LabelTable>{rows}</LabelTable>"
    volume = f'<VolumeInformation Index="0">{table}</VolumeInformation>'
    text = f'<?xml version="1.0" encoding="UTF-8"?><CaretExtension>{volume}</CaretExtension>'
    image = nib.load(path)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", text.encode()))
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), path)
    return path


# The table


def test_the_class_lists_are_those_of_totalsegmentator() -> None:
    assert (len(TOTAL_V2), len(TOTAL_V1)) == (117, 104)
    known = {
        1: "spleen",
        5: "liver",
        10: "lung_upper_lobe_left",
        14: "lung_lower_lobe_right",
        16: "trachea",
    }
    known |= {
        25: "sacrum",
        32: "vertebrae_T12",
        43: "vertebrae_T1",
        51: "heart",
        52: "aorta",
        90: "brain",
    }
    known |= {
        62: "superior_vena_cava",
        92: "rib_left_1",
        104: "rib_right_1",
        116: "sternum",
        117: "costal_cartilages",
    }
    assert {number: TOTAL_V2[number] for number in known} == known
    old = {
        7: "aorta",
        13: "lung_upper_lobe_left",
        17: "lung_lower_lobe_right",
        18: "vertebrae_L5",
        42: "esophagus",
    }
    old |= {
        43: "trachea",
        44: "heart_myocardium",
        49: "pulmonary_artery",
        50: "brain",
        58: "rib_left_1",
    }
    old |= {70: "rib_right_1", 93: "face", 104: "urinary_bladder"}
    assert {number: TOTAL_V1[number] for number in old} == old


def test_each_class_goes_to_its_region() -> None:
    for name, region in EXPECTED.items():
        assert region_of_class(name) == REGION_BY_NAME[region].id, name
    for name in (*OUTSIDE, "lung", "unheard_of", ""):
        assert region_of_class(name) == 0, name
    assert {region_of_class(name) for name in TOTAL_V2.values()} == set(range(21))
    for region in REGIONS:
        for pattern in region.totalsegmentator_classes:
            assert any(
                region_of_class(name) == region.id and name.startswith(pattern.rstrip("*"))
                for name in TS | TS1
            )


def test_a_class_with_a_side_never_goes_to_a_region_of_the_other() -> None:
    for name in {*TOTAL_V1.values(), *TOTAL_V2.values()}:
        region = region_of_class(name) and REGIONS[region_of_class(name) - 1]
        if region and region.side is not None:
            assert region.side in name.split("_"), name


@pytest.mark.parametrize("version", [TOTAL_V2, TOTAL_V1], ids=["2", "1"])
def test_every_number_of_a_map_is_translated(tmp_path: Path, version: dict[int, str]) -> None:
    array = np.zeros((12, 12, 12), np.uint8)
    array.flat[: len(version)] = sorted(version)
    # As large as lungs, so that the version shows.
    array[6:] = next(number for number, name in version.items() if name == "lung_upper_lobe_right")
    affine = np.diag([10.0, 10, 10, 1])
    affine[:3, 3] = 5
    mask, how = read_regions(save(tmp_path / "m.nii.gz", array, affine))
    np.testing.assert_array_equal(
        mask.array, np.vectorize(lambda n: region_of_class(version.get(n, "")))(array)
    )
    assert how == f"TotalSegmentator, version {2 if version is TOTAL_V2 else 1} classes"


# Maps and folders


def loaded(tmp_path: Path, **folders: Path) -> tuple[Volume | None, str | None]:
    masks = MaskFolders(**folders).find_masks(KEY).load(ct())
    return masks.regions, masks.regions_source


def on_grid(regions: Volume) -> NDArray:
    chest = phantom(3)
    grid, spacing = (32, 64, 64), (8.0, 5.5, 5.5)
    placed = canonical_affine(chest.affine, chest.hu.shape, chest.hu, grid, spacing)
    return resample_to_grid(regions.array, regions.affine, placed, grid, "labels")


def wanted() -> NDArray:
    return on_grid(Volume(phantom(3).regions, phantom(3).affine, "truth"))


@settings(max_examples=10, deadline=None)
@given(order=st.sampled_from(ORDERS), old=st.booleans(), angle=st.sampled_from([0, 0, 14]))
def test_a_map_in_any_axis_order_keeps_its_sides(
    tmp_path_factory: pytest.TempPathFactory, order: tuple, old: bool, angle: float
) -> None:
    chest, folder = phantom(3), tmp_path_factory.mktemp("ts")
    regions, affine = chest.regions, chest.affine
    if angle:
        affine, shape = grid_over(chest.affine, chest.hu.shape, 4.0, (angle / 2, 0, angle))
        regions = regrid(chest.regions, chest.affine, affine, shape)
    array, turned = reorder(as_classes(regions, TS1 if old else TS), affine, *order)
    save(folder / "ts_total/train_fixed/train_1/train_1_a" / f"{KEY}.nii.gz", array, turned)
    found_regions, how = loaded(folder, ts_seg=folder)
    assert (
        found_regions is not None and how == f"TotalSegmentator, version {1 if old else 2} classes"
    )
    got, truth = on_grid(found_regions), wanted()
    if not angle:
        both = np.isin(
            truth, [number for number, name in CLASS.items() if name in TS1] if old else range(21)
        )
        np.testing.assert_array_equal(got[both], truth[both])
    for right, left in (((1, 2, 3), (4, 5)), ((14,), (15,))):
        for own, other in ((right, left), (left, right)):
            assert dice(np.isin(got, own), np.isin(truth, own)) > (0.75 if own[0] < 6 else 0.3)
            assert not (np.isin(got, own) & np.isin(truth, other)).any()


def test_a_folder_with_one_file_a_class(tmp_path: Path) -> None:
    chest = phantom(3)
    for region in REGIONS:
        array, affine = reorder(
            (chest.regions == region.id).astype(np.float32), chest.affine, *ORDERS[29]
        )
        save(tmp_path / KEY / f"{CLASS[region.id]}.nii.gz", array, affine)
    save(
        tmp_path / KEY / "colon.nii.gz", np.ones((3, 3, 3), np.uint8), np.eye(4)
    )  # none of ours: never opened
    found_regions, how = loaded(tmp_path, regions=tmp_path)
    assert found_regions is not None and how == "one file a class"
    np.testing.assert_array_equal(on_grid(found_regions), wanted())


def test_missing_classes_leave_nothing_and_move_no_other(tmp_path: Path) -> None:
    chest = phantom(3)
    for region in (1, 3, 4, 13):
        save(
            tmp_path / KEY / f"{CLASS[region]}.nii.gz",
            (chest.regions == region).astype(np.uint8),
            chest.affine,
        )
    found_regions, _ = loaded(tmp_path, regions=tmp_path)
    assert found_regions is not None
    truth = wanted()
    np.testing.assert_array_equal(
        on_grid(found_regions), np.where(np.isin(truth, (1, 3, 4, 13)), truth, 0)
    )


def test_a_lesion_beside_a_missing_lung_is_not_worded_by_the_other(tmp_path: Path) -> None:
    """The nearest lobe of a map without left lobes is a right one."""
    chest, spacing = phantom(3), (8.0, 5.5, 5.5)
    truth = wanted()
    placed = canonical_affine(chest.affine, chest.hu.shape, chest.hu, truth.shape, spacing)
    hu = resample_to_grid(chest.hu, chest.affine, placed, truth.shape, "ct")
    for side, missing in (("left", (4, 5)), ("right", (1, 2, 3))):
        other = np.where(np.isin(truth, missing), 0, truth).astype(np.uint8)
        lesion = np.where(
            np.isin(truth, missing), np.uint8(1 << LESION_BY_KEY["consolidation"].bit), np.uint8(0)
        )
        (place,) = locate_lesions(lesion, hu, other, spacing)
        assert place.side == side and side in place.wording and "lobe" not in place.wording


def test_own_region_maps_count_before_the_downloads(tmp_path: Path) -> None:
    chest = phantom(3)
    save(tmp_path / "ts/ts_total" / f"{KEY}.nii.gz", as_classes(chest.regions), chest.affine)
    save(
        tmp_path / "own" / f"{KEY}.nii",
        as_classes(np.where(chest.regions == 8, 0, chest.regions)),
        chest.affine,
    )
    (tmp_path / "empty").mkdir()
    found_regions, _ = loaded(tmp_path, ts_seg=tmp_path / "ts", regions=tmp_path / "own")
    assert found_regions is not None and not (found_regions.array == 8).any()
    found_regions, _ = loaded(tmp_path, ts_seg=tmp_path / "ts", regions=tmp_path / "empty")
    assert found_regions is not None and (found_regions.array == 8).any()
    assert loaded(tmp_path, regions=tmp_path / "empty") == (None, None)


def test_an_empty_map_is_no_map(tmp_path: Path) -> None:
    """Regions that no one outlined must not look like a chest without any."""
    chest = phantom(3)
    save(tmp_path / f"{KEY}.nii.gz", np.zeros_like(chest.regions), chest.affine)
    assert loaded(tmp_path, regions=tmp_path) == (None, None)


# What could be a wrong side


@pytest.mark.parametrize("kept", [range(1, 21), (1, 2, 3, 13), (4, 5, 13), (14, 15), (13, 15)])
def test_a_mirrored_map_is_refused(tmp_path: Path, kept: tuple[int, ...]) -> None:
    """The array of an LPS file under an affine that says RAS: in the volume's box, on the wrong
    side."""
    chest = phantom(3)
    regions = np.where(np.isin(chest.regions, kept), chest.regions, 0).astype(np.uint8)
    axis = int(np.argmax(np.abs(chest.affine[0, :3])))
    path = named(
        save(tmp_path / f"{KEY}.nii.gz", np.flip(as_classes(regions), axis), chest.affine),
        dict(TOTAL_V2),
    )
    with pytest.raises(InputError, match="has left and right exchanged") as error:
        loaded(tmp_path, regions=tmp_path)
    assert error.value.file == str(path) and "to the left of the" in error.value.expected
    named(save(path, as_classes(regions), chest.affine), dict(TOTAL_V2))
    assert loaded(tmp_path, regions=tmp_path)[0] is not None


@pytest.mark.parametrize(
    "kept",
    [
        (
            "lung_upper_lobe_left",
            "lung_lower_lobe_left",
        ),  # 13 and 14 of version 1 are right lobes of version 2
        ("trachea", "esophagus", "thyroid_gland"),
        ("heart", "aorta"),
    ],
)
@pytest.mark.parametrize("numbers", [TS, TS1], ids=["2", "1"])
def test_numbers_that_fit_both_versions_are_refused_unless_they_are_named(
    tmp_path: Path, kept: tuple[str, ...], numbers: dict[str, int]
) -> None:
    chest = phantom(3)
    ids = {region_of_class(name) for name in kept}
    array = np.zeros_like(chest.regions)
    for name in kept:
        array[chest.regions == region_of_class(name)] = numbers.get(name, 0)
    path = save(tmp_path / f"{KEY}.nii.gz", array, chest.affine)
    if numbers is TS and "lung_upper_lobe_left" in kept:
        # 10 and 11 of version 2: as large as a lung, so neither pancreas nor gland.
        assert set(np.unique(read_regions(path)[0].array)) == {0, *ids}
    elif array.any():
        with pytest.raises(InputError, match="which version of TotalSegmentator"):
            read_regions(path)
    mask, how = read_regions(named(path, {number: name for name, number in numbers.items()}))
    assert (
        set(np.unique(mask.array)) <= {0, *ids}
        and how == "TotalSegmentator, classes named in the file"
    )
    np.testing.assert_array_equal(mask.array > 0, array > 0)


def test_names_in_the_header_count_before_the_tables(tmp_path: Path) -> None:
    chest = phantom(3)
    mine = {1: "lung_upper_lobe_right", 2: "lung_lower_lobe_left", 3: "not_one_of_ours"}
    array = np.zeros_like(chest.regions)
    array[chest.regions == 1], array[chest.regions == 5], array[chest.regions == 7] = 1, 2, 3
    found_regions, _ = read_regions(named(save(tmp_path / "m.nii.gz", array, chest.affine), mine))
    np.testing.assert_array_equal(
        found_regions.array, np.where(np.isin(chest.regions, (1, 5)), chest.regions, 0)
    )


def test_numbers_that_are_no_class_are_refused(tmp_path: Path) -> None:
    array = as_classes(phantom(3).regions)
    array[:3, :3, :3] = 201
    with pytest.raises(
        InputError, match=r"has numbers that are no class.*117 classes from 1 to 117, found 201"
    ):
        read_regions(save(tmp_path / "m.nii.gz", array, phantom(3).affine))


def test_a_folder_without_a_class_or_on_two_grids_is_refused(tmp_path: Path) -> None:
    chest = phantom(3)
    save(tmp_path / KEY / "Left_Lung.nii.gz", chest.regions, chest.affine)
    with pytest.raises(InputError, match=r"has no anatomical class.*found Left_Lung"):
        loaded(tmp_path, regions=tmp_path)
    save(tmp_path / KEY / "heart.nii.gz", (chest.regions == 7).astype(np.uint8), chest.affine)
    flipped, affine = reorder(
        (chest.regions == 8).astype(np.uint8), chest.affine, (0, 1, 2), (True, False, False)
    )
    save(tmp_path / KEY / "aorta.nii.gz", flipped, affine)
    with pytest.raises(InputError, match="is on another grid than its neighbours"):
        loaded(tmp_path, regions=tmp_path)


# Lesion tasks


def lesions(tmp_path: Path) -> tuple[dict[str, bool], NDArray]:
    masks = MaskFolders(ts_seg=tmp_path).find_masks(KEY).load(ct())
    union = np.zeros_like(phantom(3).lesions)
    for volume in masks.lesions:
        union |= volume.array
    return masks.lesions_annotated, union


def test_lesion_tasks_say_present_or_absent_of_what_they_look_for_and_of_nothing_else(
    tmp_path: Path,
) -> None:
    chest = phantom(3)
    effusion = chest.lesions >> LESION_BY_KEY["pleural_effusion"].bit & 1
    fluid = np.where(
        effusion > 0, np.uint8(2), (np.isin(chest.regions, (1, 2, 3, 4, 5))).astype(np.uint8)
    )
    save(
        tmp_path / "ts_pleural_pericard_effusion/train_fixed/train_1/train_1_a" / f"{KEY}.nii.gz",
        fluid,
        chest.affine,
    )
    annotated, union = lesions(tmp_path)
    assert {key for key, value in annotated.items() if value} == {
        "pleural_effusion",
        "pericardial_effusion",
    }
    np.testing.assert_array_equal(union, effusion << LESION_BY_KEY["pleural_effusion"].bit)
    lung = np.isin(chest.regions, (1, 2, 3, 4, 5)).astype(np.uint8)
    save(tmp_path / "ts_lung_nodules" / f"{KEY}.nii.gz", lung, chest.affine)
    annotated, union = lesions(tmp_path)
    assert (
        annotated["lung_nodule"]
        and not annotated["consolidation"]
        and not annotated["ground_glass_opacity"]
    )
    assert not (union >> LESION_BY_KEY["lung_nodule"].bit & 1).any()


def test_a_file_of_another_task_says_nothing_of_the_lesions(tmp_path: Path) -> None:
    """Without nodules among its classes, it was never asked for nodules."""
    chest = phantom(3)
    path = save(tmp_path / "m.nii.gz", as_classes(chest.regions), chest.affine)
    with pytest.raises(InputError, match="numbers that are no class"):
        read_lesions(path, "ts_lung_nodules")
    with pytest.raises(
        InputError, match="is no output of the task ts_lung_nodules: expected lung_nodules"
    ):
        read_lesions(named(path, dict(TOTAL_V2)), "ts_lung_nodules")
    few = named(
        save(tmp_path / "n.nii.gz", (chest.regions == 1).astype(np.uint8), chest.affine),
        {1: "pleural_effusion"},
    )
    assert read_lesions(few, "ts_pleural_pericard_effusion")[1] == {"pleural_effusion"}
    assert set(LESION_TASKS) == {"ts_lung_nodules", "ts_pleural_pericard_effusion"}
