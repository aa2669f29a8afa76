"""ReXGroundingCT: which findings are a lesion, what its partial outlines say, and whom it keeps out
of training."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.cases import case_to_sample
from data_pipeline.ct_rate.cases import list_ct_rate_cases
from data_pipeline.ct_rate.options import CtRateOptions
from data_pipeline.masks import rexgrounding
from data_pipeline.masks.loaded_masks import LoadedMasks
from data_pipeline.masks.mask_folders import MaskFolders
from data_pipeline.masks.rexgrounding import infer_lesions
from rectvlm.data.dataset import collate_samples
from rectvlm.labels import LESION_BY_KEY, LESIONS
from rectvlm.types import (
    OWN_OUTLINES,
    REXGROUNDING_OUTLINES,
    InputError,
    UserError,
    Volume,
    no_lesions_source,
)
from tests.ct_rate_tree import Tree, _lps, phantom
from tests.grids import dice, reorder

KEY = "train_1_a_1"
GGO, SOLID, FLUID = "ground_glass_opacity", "consolidation", "pleural_effusion"
FINDINGS = (
    ("2c", "Ground-glass opacity in the right middle and lower lobes"),
    ("1c", "Emphysema in both lungs"),
    ("2b", "Consolidation in the left lower lobe"),
    ("2e", "Right pleural effusion"),
)
SHOWN = {0: GGO, 2: SOLID, 3: FLUID}
"""The lesion of phantom 0 that each finding outlines."""


def bit(array: NDArray, key: str) -> NDArray:
    return array >> LESION_BY_KEY[key].bit & 1


def ct() -> Volume:
    hu, affine = _lps(phantom(0), phantom(0).hu)
    return Volume(hu, affine, "ct.nii.gz")


def truth() -> NDArray:
    return _lps(phantom(0), phantom(0).lesions)[0]


def stack(findings: Sequence[tuple[str, str]] = FINDINGS, empty: Sequence[int] = ()) -> NDArray:
    """(finding, i, j, k), instances by number; the mask of a finding that is none of ours covers a
    corner."""
    array = np.zeros((len(findings), *ct().array.shape), np.uint8)
    array[:, :20, :20, :20] = 1
    for number, key in SHOWN.items():
        if number < len(findings):
            array[number] = bit(truth(), key)
            array[number][..., ::2] *= 3
    array[list(empty)] = 0
    return array


def row(
    findings: Sequence[tuple[str, str]] = FINDINGS, name: str = KEY, **more: Any
) -> dict[str, Any]:
    words = {str(n): text for n, (_, text) in enumerate(findings)}
    return {"name": f"{name}.nii.gz", "findings": words} | {
        "categories": {str(n): category for n, (category, _) in enumerate(findings)},
        "protocol": "protocol1",
        **more,
    }


def write(
    folder: Path,
    array: NDArray | None = None,
    split: str = "train",
    table: str = "dataset.json",
    **more: Any,
) -> Path:
    """A download with one volume."""
    folder.mkdir(exist_ok=True)
    (folder / table).write_text(json.dumps({split: [row(**more)]}))
    if array is not None:
        (folder / "segmentations").mkdir(exist_ok=True)
        # The released headers describe four axes of 1 mm: their place is that of the CT's array.
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "segmentations" / f"{KEY}.nii.gz")
    return folder


def load(folder: Path, volume: Volume | None = None) -> LoadedMasks:
    return MaskFolders(rexgrounding=folder).find_masks(KEY).load(volume or ct())


def keys(flags: dict[str, bool]) -> set[str]:
    return {key for key, value in flags.items() if value}


# Partial and whole outlines


def test_training_outlines_are_partial_and_lie_on_the_voxels_of_the_ct(tmp_path: Path) -> None:
    found = load(write(tmp_path, stack()))
    assert keys(found.lesions_partial) == set(SHOWN.values()) and not keys(found.lesions_annotated)
    assert found.lesions_source == {
        key: REXGROUNDING_OUTLINES if key in SHOWN.values() else None for key in LESION_BY_KEY
    }
    (lesions,) = found.lesions
    np.testing.assert_array_equal(lesions.affine, ct().affine)
    wanted = sum(bit(truth(), key) << LESION_BY_KEY[key].bit for key in SHOWN.values())
    # Emphysema, which covers a corner, is no lesion of ours and leaves no voxel.
    np.testing.assert_array_equal(lesions.array, wanted)


@pytest.mark.parametrize("split", ["val", "test"])
def test_validation_outlines_are_whole_for_what_the_report_names(
    tmp_path: Path, split: str
) -> None:
    found = load(write(tmp_path, stack(), split))
    assert keys(found.lesions_annotated) == set(SHOWN.values()) and not keys(found.lesions_partial)
    # What no finding names is not annotated, hence not absent.
    assert (
        not found.lesions_annotated["lung_nodule"]
        and not found.lesions_annotated["pericardial_effusion"]
    )


def test_a_finding_with_an_empty_mask_says_nothing(tmp_path: Path) -> None:
    found = load(write(tmp_path, stack(empty=[0]), "val"))
    assert not found.lesions_annotated[GGO] and not found.lesions_partial[GGO]
    assert keys(found.lesions_annotated) == {SOLID, FLUID}
    # Two findings of a kind, one of them without its outline: some are drawn, one is missing.
    twice = (*FINDINGS, ("2c", "Ground-glass opacity in the left upper lobe"))
    found = load(write(tmp_path, stack(twice, empty=[4]), "val", findings=twice))
    assert found.lesions_partial[GGO] and not found.lesions_annotated[GGO]


def test_a_case_without_a_mask_or_without_a_row_says_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    for key in (KEY, "train_2_a_1"):
        found = MaskFolders(rexgrounding=tmp_path).find_masks(key).load(ct())
        assert not keys(found.lesions_annotated) and not keys(found.lesions_partial)
        assert found.lesions_source == no_lesions_source() and not found.lesions


def test_partial_outlines_reach_the_batch_as_such(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "CT-RATE")
    tree.add(KEY, 0)
    options = CtRateOptions(
        masks=MaskFolders(rexgrounding=_with_a_held_out_case(write(tmp_path / "rex", stack())))
    )
    result = list_ct_rate_cases(tree.write(), options)
    made = case_to_sample(result.cases[0], (32, 64, 64), (8.0, 5.5, 5.5))
    batch = collate_samples([made])
    drawn = [lesion.key in SHOWN.values() for lesion in LESIONS]
    assert batch.lesions_partial[0].tolist() == drawn and not batch.lesions_annotated.any()
    assert result.policy["rexgrounding_masks"] is True
    # Emphysema.
    assert result.counts["findings of ReXGroundingCT that are none of the five lesions"] == 1
    # The right effusion and opacity at small x, the left consolidation at large x.
    for key, side in ((FLUID, -1), (GGO, -1), (SOLID, 1)):
        where = np.argwhere(bit(made.lesions, key))
        assert len(where) and (where[:, 2].mean() - 31.5) * side > 5


HELD_OUT = "patient of the validation or test part of ReXGroundingCT"


@pytest.mark.parametrize("dev_share", [0.0, 0.99])
def test_exhaustive_cases_are_a_split_of_their_own_by_patient(
    tmp_path: Path, dev_share: float
) -> None:
    """Another volume and scan of such a patient, and a patient whose mask is withheld, stay out."""
    tree = Tree(tmp_path / "CT-RATE")
    tree.add(KEY, 0)
    for name in ("train_1_a_2", "train_1_b_1", "train_2_a_1", "train_3_a_1", "valid_1_a_1"):
        tree.add(name)
    rex = write(tmp_path / "rex", stack(), "val")
    parts = {"val": [row()], "test": [row(name="train_2_a_1")], "train": [row(name="train_3_a_1")]}
    (rex / "dataset.json").write_text(json.dumps(parts))
    _write_other_masks(tmp_path)
    masks = MaskFolders(rexgrounding=rex, lesions=tmp_path / "own", ts_seg=tmp_path / "ts")

    result = list_ct_rate_cases(tree.write(), CtRateOptions(masks=masks, dev_share=dev_share))
    split_by_key = {case.key: case.split for case in result.cases}
    assert split_by_key.pop("train_3_a_1") == ("dev" if dev_share else "train")
    assert split_by_key == {KEY: "grounding", "valid_1_a_1": "valid"}
    assert result.dropped[HELD_OUT] == ("train_1_a_2", "train_1_b_1", "train_2_a_1")
    if dev_share:
        return
    # Only people's outlines count there: no nodules of a network, no opacity from another file.
    (case,) = (case for case in result.cases if case.split == "grounding")
    meta = case_to_sample(case, (32, 64, 64), (8.0, 5.5, 5.5)).meta
    assert meta.split == "grounding" and keys(meta.lesions_annotated) == set(SHOWN.values())
    assert set(meta.lesions_source.values()) == {REXGROUNDING_OUTLINES, None}
    assert not any(meta.lesions_partial.values())


def _write_other_masks(folder: Path) -> None:
    """A nodule map of TotalSegmentator and an own outline of an opacity for the first volume."""
    for name, value in ((f"ts/ts_lung_nodules/{KEY}.nii.gz", 2), (f"own/{KEY}/{GGO}.nii.gz", 1)):
        (folder / name).parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(bit(truth(), GGO) * np.uint8(value), ct().affine), folder / name)


def test_without_its_masks_no_case_of_rexgrounding_is_used(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "CT-RATE")
    for name in (KEY, "train_2_a_1"):
        tree.add(name)
    table = write(tmp_path / "rex", split="val") / "dataset.json"
    result = list_ct_rate_cases(tree.write(), CtRateOptions(hold_out=(table,)))
    assert [case.key for case in result.cases] == ["train_2_a_1"]
    assert result.dropped[HELD_OUT] == (KEY,)


def _with_a_held_out_case(folder: Path) -> Path:
    table = json.loads((folder / "dataset.json").read_text())
    table["val"] = [row(name="train_9_a_1")]
    (folder / "dataset.json").write_text(json.dumps(table))
    return folder


def test_whole_outlines_of_another_source_count_before_partial_ones(tmp_path: Path) -> None:
    rex = write(tmp_path / "rex", stack())
    one = phantom(0)
    (tmp_path / "l" / KEY).mkdir(parents=True)
    nib.save(
        nib.Nifti1Image(bit(one.lesions, GGO), one.affine), tmp_path / "l" / KEY / f"{GGO}.nii.gz"
    )
    found = MaskFolders(rexgrounding=rex, lesions=tmp_path / "l").find_masks(KEY).load(ct())
    assert keys(found.lesions_annotated) == {GGO} and keys(found.lesions_partial) == {SOLID, FLUID}
    assert found.lesions_source == {
        **no_lesions_source(),
        GGO: f"{OWN_OUTLINES} + {REXGROUNDING_OUTLINES}",
        SOLID: REXGROUNDING_OUTLINES,
        FLUID: REXGROUNDING_OUTLINES,
    }


# What a finding is


@pytest.mark.parametrize(
    ("category", "words", "lesions"),
    [
        ("2c", "Ground-glass opacities in both lungs", {GGO: "sure"}),
        (
            "2c",
            "Ground glass and consolidation in the left lung",
            {GGO: "perhaps", SOLID: "perhaps"},
        ),
        ("2d", "Nodule of 5 mm in the right upper lobe", {"lung_nodule": "sure"}),
        ("1e", "Micronodules in both lungs", {"lung_nodule": "perhaps"}),
        ("2b", "Consolidation in the left lower lobe", {SOLID: "sure"}),
        ("2b", "Atelectasis in the left lower lobe", {}),
        ("2b", "Consolidation and atelectasis at the right base", {SOLID: "perhaps"}),
        (
            "2b",
            "Consolidation with surrounding ground-glass areas",
            {SOLID: "perhaps", GGO: "perhaps"},
        ),
        ("2b", "Density increase in the lingula", {SOLID: "perhaps"}),
        ("2e", "Bilateral pleural effusion", {FLUID: "sure"}),
        ("2e", "Pleural thickening on the right", {}),
        ("2e", "Pleural effusion and thickening", {FLUID: "perhaps"}),
        (
            "2e",
            "Pleural and pericardial effusion",
            {FLUID: "perhaps", "pericardial_effusion": "perhaps"},
        ),
        ("1c", "Emphysema", {}),
        ("2f", "Honeycombing with ground glass", {}),
        ("2g", "Pneumothorax", {}),
        ("2h", "Cavity with a nodule in it", {"lung_nodule": "perhaps"}),
        ("3a", "Pericardial effusion", {}),
        ("", "Ground-glass opacity", {}),
    ],
)
def test_what_a_finding_is(category: str, words: str, lesions: dict[str, str]) -> None:
    assert infer_lesions(category, words) == infer_lesions(category, words.upper()) == lesions


def test_a_mask_that_may_hold_more_is_not_drawn_and_takes_away_the_certainty(
    tmp_path: Path,
) -> None:
    findings = (
        ("2c", "Ground-glass opacity on the right"),
        ("2b", "Consolidation with ground-glass on the left"),
    )
    array = stack(findings)
    array[1] = bit(truth(), SOLID)
    found = load(write(tmp_path, array, "val", findings=findings))
    np.testing.assert_array_equal(
        found.lesions[0].array, bit(truth(), GGO) << LESION_BY_KEY[GGO].bit
    )
    assert keys(found.lesions_partial) == {GGO} and not keys(found.lesions_annotated)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["", *rexgrounding.CATEGORY_RULES, *rexgrounding.POSSIBLE_LESIONS, "1c", "3"]),
    st.text(max_size=40),
)
def test_any_words_have_a_meaning(category: str, words: str) -> None:
    for key, certainty in infer_lesions(category, words).items():
        assert key in LESION_BY_KEY and certainty in ("sure", "perhaps")


# Files


@pytest.mark.parametrize("block", [7, 1000, 1 << 20])
@pytest.mark.parametrize("dtype", ["u1", ">i2", "<f4"])
def test_blocks_types_and_packing_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block: int
) -> None:
    rng = np.random.default_rng(0)
    array = (rng.random((4, 6, 5, 7)) < 0.3) * rng.integers(1, 4, (4, 6, 5, 7))
    folder = write(tmp_path, array.astype(dtype))
    packed = folder / "segmentations" / f"{KEY}.nii.gz"
    small = Volume(np.zeros((6, 5, 7), np.int16), ct().affine, "ct")
    monkeypatch.setattr(rexgrounding, "_BLOCK_BYTES", block)
    wanted = sum((array[n] > 0) << LESION_BY_KEY[key].bit for n, key in SHOWN.items())
    np.testing.assert_array_equal(load(folder, small).lesions[0].array, wanted)
    data = gzip.decompress(packed.read_bytes())
    packed.write_bytes(gzip.compress(data[:400]) + gzip.compress(data[400:]))
    np.testing.assert_array_equal(load(folder, small).lesions[0].array, wanted)


def test_a_volume_in_another_voxel_order_is_refused(tmp_path: Path) -> None:
    """The mask's own header is of no use, so its voxels are those of the released file or nobody
    knows whose."""
    folder = write(tmp_path, stack())
    volume = ct()
    for order, flips in (((0, 1, 2), (True, False, False)), ((1, 0, 2), (False, False, False))):
        array, affine = reorder(volume.array, volume.affine, order, flips)
        with pytest.raises(
            InputError, match=r"is not in the voxel order of the masks.*expected LPS"
        ):
            load(folder, Volume(array, affine, "ct.nii.gz"))


def test_a_mask_of_another_volume_or_of_other_findings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"does not fit its volume: expected shape \(4, 144, 144, .*found \(3, "
    ):
        load(write(tmp_path / "a", stack()[:3]))
    with pytest.raises(InputError, match="does not fit its volume"):
        load(write(tmp_path / "b", stack()[..., :-1]))
    with pytest.raises(InputError, match="does not fit its volume"):
        load(write(tmp_path / "c", stack()[0]))


def test_damage_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, stack())
    path = folder / "segmentations" / f"{KEY}.nii.gz"
    data = path.read_bytes()
    for broken, words in (
        (data[: len(data) // 2], "is cut short or damaged"),
        (data[:-6], "is cut short or damaged"),
        (gzip.compress(gzip.decompress(data)[:-1000]), "is cut short or damaged"),
        (b"", "cannot be read"),
        (b"nothing" * 99, "cannot be read"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=words) as error:
            load(folder)
        assert error.value.file == str(path)
    image = nib.Nifti1Image(stack(), np.eye(4))
    image.header.set_slope_inter(1, 5)
    nib.save(image, path)
    with pytest.raises(InputError, match="adds 5 to every voxel"):
        load(folder)


# Tables


def test_the_challenges_table_is_read_too_and_training_keeps_the_weaker_promise(
    tmp_path: Path,
) -> None:
    write(tmp_path, stack(), "val", table="MICCAI_challenge_dataset.json")
    assert keys(load(tmp_path).lesions_annotated)
    write(tmp_path, None, "train")
    assert keys(load(tmp_path).lesions_partial) and not keys(load(tmp_path).lesions_annotated)


def test_withheld_cases_may_lack_their_categories(tmp_path: Path) -> None:
    table = {"val": [row()], "test": [{"name": "train_7_a_1.nii.gz", "findings": {"0": "Nodule"}}]}
    write(tmp_path, stack())
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    assert keys(load(tmp_path).lesions_annotated) == set(SHOWN.values())
    assert rexgrounding.find_record(tmp_path, "train_7_a_1") == rexgrounding.RexVolumeRecord(
        True, (("", "Nodule"),)
    )


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "no json",
        '{"train": [{"findings": {}}]}',
        '{"train": [{"name": "a", "findings": {"1": "x"}}]}',
        '{"train": [3]}',
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json is not a table of ReXGroundingCT"):
        MaskFolders(rexgrounding=tmp_path).find_masks(KEY)


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no ReXGroundingCT folder"):
        MaskFolders(rexgrounding=tmp_path).find_masks(KEY)


def test_a_table_that_changes_is_read_again(tmp_path: Path) -> None:
    import os

    folder = write(tmp_path, stack())
    assert not keys(load(folder).lesions_annotated)
    write(folder, None, "val")
    os.utime(folder / "dataset.json", ns=(1, 1))
    assert keys(load(folder).lesions_annotated)
    assert {path.name for path in MaskFolders(rexgrounding=folder).find_masks(KEY).paths} == {
        f"{KEY}.nii.gz",
        "dataset.json",
    }


# Leakage


def test_patients_of_its_other_parts_stay_out_of_training_by_its_own_tables(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "CT-RATE")
    for name in (KEY, "train_1_b_1", "train_2_a_1", "train_3_a_1", "valid_1_a_1"):
        tree.add(name)
    rex = write(tmp_path / "rex", None, "val")
    (rex / "MICCAI_challenge_dataset.json").write_text(
        json.dumps({"test": [row(name="train_3_a_1")]})
    )
    result = list_ct_rate_cases(tree.write(), CtRateOptions(masks=MaskFolders(rexgrounding=rex)))
    assert [case.key for case in result.cases] == ["train_2_a_1", "valid_1_a_1"]
    held = result.dropped["patient of the validation or test part of ReXGroundingCT"]
    assert held == (KEY, "train_1_b_1", "train_3_a_1")


def test_sides_would_be_seen(tmp_path: Path) -> None:
    """The proofs above can fail: a mirrored mask agrees with nothing."""
    found = load(write(tmp_path, stack()[:, ::-1])).lesions[0].array
    assert dice(bit(found, SOLID), bit(truth(), SOLID)) < 0.1
