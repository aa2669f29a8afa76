import re
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from rectvlm.chest_geometry import ChestGeometry, Compartment
from rectvlm.config import load_config
from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS, REGION_BY_NAME
from rectvlm.lesion_bits import lesion_mask
from rectvlm.lesion_places import (
    LesionPlace,
    LobeIndex,
    describe_lobes,
    describe_places,
    find_voxels_outside_chest,
    locate_lesions,
)
from rectvlm.models.cues import describe_cues
from rectvlm.types import Sample
from tests.conftest import phantom_sample

WIDE_GRID = ["data.grid=[32,64,64]", "data.spacing=[8.0,5.5,5.5]"]
"""Shows arms and breasts too."""
SPACING = (8.0, 3.6, 3.6)
SHAPE = (32, 96, 96)


def bit(key: str) -> np.uint8:
    return np.uint8(LESION_BY_KEY[key].mask_value)


def chest() -> tuple[np.ndarray, np.ndarray]:
    """A canonical body with two lungs of upper and lower lobes: the left is at large x."""
    ct = np.full(SHAPE, -1000, np.int16)
    ct[:, 20:76, 10:86] = 40
    regions = np.zeros(SHAPE, np.uint8)
    for side, columns in (("right", slice(16, 44)), ("left", slice(52, 80))):
        ct[4:28, 26:70, columns] = -850
        regions[4:16, 26:70, columns] = REGION_BY_NAME[f"{side} lower lobe"].id
        regions[16:28, 26:70, columns] = REGION_BY_NAME[f"{side} upper lobe"].id
    return ct, regions


def lesion(key: str, *boxes: tuple[slice, slice, slice]) -> np.ndarray:
    out = np.zeros(SHAPE, np.uint8)
    for box in boxes:
        out[box] |= bit(key)
    return out


def chest_with_abdomen() -> np.ndarray:
    """The chest with 128 mm more of the body below, so that the lungs begin at slice 20."""
    ct, _ = chest()
    return np.concatenate([ct[:1].repeat(16, axis=0), ct])


RIGHT_LOW = (slice(5, 10), slice(30, 40), slice(20, 30))
LEFT_LOW = (slice(5, 10), slice(30, 40), slice(60, 70))
LEFT_HIGH = (slice(22, 26), slice(30, 40), slice(60, 70))


@pytest.mark.parametrize(
    ("boxes", "words", "side", "geometry"),
    [
        ([RIGHT_LOW], "right lower lobe", "right", "right lung, lower zone"),
        ([LEFT_HIGH], "left upper lobe", "left", "left lung, upper zone"),
        ([RIGHT_LOW, LEFT_LOW], "both lower lobes", "both", "both lungs, lower zones"),
        ([LEFT_LOW, LEFT_HIGH], "left lung", "left", "left lung, upper and lower zones"),
        (
            [RIGHT_LOW, LEFT_HIGH],
            "right lower lobe and left upper lobe",
            "both",
            "both lungs, upper and lower zones",
        ),
    ],
)
def test_lung_lesion_with_and_without_a_map(
    boxes: list, words: str, side: str, geometry: str
) -> None:
    ct, regions = chest()
    mask = lesion("consolidation", *boxes)
    (known,) = locate_lesions(mask, ct, regions, SPACING)
    assert (known.wording, known.side, known.basis) == (words, side, "regions")
    assert known.volume_ml == pytest.approx((mask > 0).sum() * np.prod(SPACING) / 1000)
    (guess,) = locate_lesions(mask, ct, None, SPACING)
    assert (guess.wording, guess.side, guess.basis, guess.regions) == (
        geometry,
        side,
        "geometry",
        (),
    )
    assert "lobe" not in guess.wording
    (empty_map,) = locate_lesions(mask, ct, np.zeros_like(regions), SPACING)
    assert empty_map == guess


def test_regions_come_largest_share_first() -> None:
    ct, regions = chest()
    mask = lesion("consolidation", LEFT_LOW, (slice(22, 24), slice(30, 40), slice(60, 70)))
    (place,) = locate_lesions(mask, ct, regions, SPACING)
    assert place.regions == ("left lower lobe", "left upper lobe")


def test_a_lesion_outside_every_lobe_goes_to_the_nearest() -> None:
    ct, regions = chest()
    box = (slice(5, 10), slice(40, 50), slice(80, 84))
    (place,) = locate_lesions(lesion("consolidation", box), ct, regions, SPACING)
    assert place.regions == ("left lower lobe",)


def test_a_small_share_is_not_named() -> None:
    ct, regions = chest()
    speck = (slice(20, 21), slice(30, 34), slice(20, 30))
    (place,) = locate_lesions(lesion("lung_nodule", RIGHT_LOW, speck), ct, regions, SPACING)
    assert place.wording == "right lower lobe"


def test_pleura_and_pericardium() -> None:
    ct, regions = chest()
    fluid = (slice(5, 12), slice(70, 74), slice(55, 75))
    mask = lesion("pleural_effusion", fluid) | lesion(
        "pericardial_effusion", (slice(8, 14), slice(40, 50), slice(44, 52))
    )
    for regions_or_none in (regions, None):
        heart, pleura = locate_lesions(mask, ct, regions_or_none, SPACING)
        assert (heart.wording, heart.side) == ("around the heart", None)
        assert (pleura.wording, pleura.side) == ("left pleural space", "left")


@pytest.mark.parametrize(
    ("mm_below", "words", "is_plausible"),
    [(40, "left pleural space", True), (120, "abdomen below the lungs", False)],
)
def test_an_effusion_reaches_the_recesses_and_not_the_abdomen(
    mm_below: int, words: str, is_plausible: bool
) -> None:
    ct = chest_with_abdomen()
    mask = np.zeros(ct.shape, np.uint8)
    mask[20 - mm_below // 8, 40:50, 60:70] = bit("pleural_effusion")
    (place,) = locate_lesions(mask, ct, None, SPACING)
    assert (place.wording, place.is_plausible) == (words, is_plausible)


@pytest.mark.parametrize(("hu", "words"), [(-850, "right lung"), (20, "around the heart")])
def test_a_pericardial_effusion_beside_the_heart_is_not_in_aerated_lung(
    hu: int, words: str
) -> None:
    ct, regions = chest()
    regions[8:14, 40:50, 44:52] = REGION_BY_NAME["heart"].id
    beside = (slice(9, 13), slice(42, 48), slice(40, 43))  # 7 to 14 mm from the heart
    ct[beside] = hu
    (place,) = locate_lesions(lesion("pericardial_effusion", beside), ct, regions, SPACING)
    assert (place.wording, place.basis) == (words, "regions")


@pytest.mark.parametrize(
    ("n_right", "n_outside", "shares"),
    [
        (8, 4, {"right lower lobe": 1.0}),
        (6_000, 10_000, {"left lower lobe": 10 / 16, "right lower lobe": 6 / 16}),
    ],
)
def test_voxels_outside_every_lobe_count_in_full_where_most_are(
    n_right: int, n_outside: int, shares: dict
) -> None:
    _, regions = chest()
    beside = np.zeros(SHAPE, bool)
    beside[4:16, 20:76, 80:] = True  # nearest to the left lower lobe
    right = np.flatnonzero(regions == REGION_BY_NAME["right lower lobe"].id)[:n_right]
    outside = np.flatnonzero(beside)[:n_outside]
    assert (right.size, outside.size) == (n_right, n_outside)
    voxels = np.sort(np.concatenate([right, outside]))
    assert LobeIndex(regions, SPACING).lobe_shares(voxels, nearest_only=False) == shares


@pytest.mark.parametrize("columns", [slice(0, 48), slice(48, 96)])
def test_a_map_of_one_lung_lacks_the_other(columns: slice) -> None:
    _, regions = chest()
    assert LobeIndex(regions, SPACING).has_both_lungs
    regions[:, :, columns] = 0
    assert not LobeIndex(regions, SPACING).has_both_lungs


def test_the_lungs_end_at_their_last_slice_where_slices_are_thin() -> None:
    """Compartments are found at every second slice here."""
    ct = np.full((124, 48, 64), 40, np.int16)
    ct[18:104, 8:40, 8:28] = ct[18:104, 8:40, 36:56] = -850
    assert ChestGeometry(ct, (2.0, 4.0, 4.0)).lung_slices == (18, 103)


def test_the_mediastinum_lies_between_the_lungs_without_touching_them() -> None:
    """The lungs reach from slice 4 to 27 and leave a gap from column 44 to 51."""
    ct, _ = chest()
    places = [(6, 50, 47), (25, 50, 47), (25, 50, 44), (25, 50, 51), (25, 50, 43)]
    voxels = np.ravel_multi_index(tuple(np.transpose(places)), SHAPE)
    assert ChestGeometry(ct, SPACING).classify(voxels).compartments.tolist() == [
        Compartment.LOWER_MEDIASTINUM,
        Compartment.MEDIASTINUM,
        Compartment.CHEST_CAVITY,
        Compartment.CHEST_CAVITY,
        Compartment.AERATED_LUNG,
    ]


def test_the_heart_ends_near_the_lowest_slice_of_the_lungs() -> None:
    ct = chest_with_abdomen()
    slices = np.array([24, 19, 12])  # 32 mm above the end of the lungs, 8 and 64 mm below it
    voxels = np.ravel_multi_index((slices, [40] * 3, [47] * 3), ct.shape)
    near = ChestGeometry(ct, SPACING).classify(voxels).is_near_heart
    assert near.tolist() == [True, True, False]


def test_lesions_overlap() -> None:
    ct, regions = chest()
    mask = lesion("consolidation", RIGHT_LOW) | lesion("ground_glass_opacity", RIGHT_LOW)
    assert [place.lesion for place in locate_lesions(mask, ct, regions, SPACING)] == [
        "consolidation",
        "ground_glass_opacity",
    ]


def test_the_midline_is_the_bodys_and_not_the_arrays() -> None:
    ct, _ = chest()
    ct = np.roll(ct, -9, axis=2)
    ct[:, 90:92, :] = 100  # a table as wide as the field of view
    mask = lesion("lung_nodule", (slice(10, 14), slice(40, 50), slice(44, 47)))
    (place,) = locate_lesions(mask, ct, None, SPACING)
    assert place.side == "left"


def test_lobe_words() -> None:
    assert describe_lobes(["left lower lobe", "right lower lobe"]) == "both lower lobes"
    assert (
        describe_lobes(["right upper lobe", "right middle lobe", "right lower lobe"])
        == "right lung"
    )
    everything = [name for name in REGION_BY_NAME if name.endswith("lobe")]
    assert describe_lobes(everything) == "both lungs"
    assert describe_lobes(everything[:4]) == "right lung and left upper lobe"
    assert (
        describe_lobes(["left upper lobe", "left lower lobe", "right lower lobe"])
        == "right lower lobe and left lung"
    )


def test_describe() -> None:
    places = [
        LesionPlace(
            "consolidation", 12.2, "right", ("right lower lobe",), "regions", "right lower lobe"
        ),
        LesionPlace("pleural_effusion", 84.6, "left", (), "regions", "left pleural space"),
        LesionPlace("pericardial_effusion", 9.04, None, (), "regions", "around the heart"),
        LesionPlace("lung_nodule", 0.2, "both", (), "regions", "both upper lobes"),
    ]
    assert describe_places(places) == (
        "Lesions outlined: consolidation (12 ml) in the right lower lobe; pleural effusion "
        "(85 ml) in the left pleural space; pericardial effusion (9.0 ml) around the heart; "
        "lung nodule (0.2 ml) in both upper lobes."
    )
    assert "nodule" not in describe_places(places, min_ml=1.0)
    assert describe_places([]) == "No lesions outlined."


def test_nothing_outlined() -> None:
    ct, regions = chest()
    assert locate_lesions(np.zeros(SHAPE, np.uint8), ct, regions, SPACING) == []
    one = np.zeros(SHAPE, np.uint8)
    one[10, 40, 60] = bit("lung_nodule")
    assert locate_lesions(one, ct, regions, (1.0, 1.0, 1.0)) == []


def test_no_lungs_in_the_field_leaves_the_side_alone() -> None:
    ct, _ = chest()
    ct[ct == -850] = 30
    (place,) = locate_lesions(lesion("consolidation", RIGHT_LOW), ct, None, SPACING)
    assert (place.wording, place.is_plausible) == ("right side of the body", None)


def test_it_is_quick() -> None:
    ct, regions = chest()
    mask = lesion("pleural_effusion", LEFT_LOW) | lesion("consolidation", RIGHT_LOW)
    for regions_or_none in (regions, None):
        fastest = min(_seconds(mask, ct, regions_or_none) for _ in range(5))
        assert fastest < 0.3  # about 0.05 on an idle core


def _seconds(mask: np.ndarray, ct: np.ndarray, regions: np.ndarray | None) -> float:
    begin = time.perf_counter()
    locate_lesions(mask, ct, regions, SPACING)
    return time.perf_counter() - begin


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_body_that_is_cut_off_keeps_its_sides(side: str, padded: bool) -> None:
    """A third of the body is cut off by the volume or before; the lesion is in the other lung."""
    config = load_config("demo")
    for seed in (2, 4):
        ct = phantom_sample(seed, config).ct.copy()
        depth, height, width = ct.shape
        column = round(width * (0.6 if side == "left" else 0.4))
        box = (slice(depth // 2 - 2, depth // 2 + 2), slice(height // 2 - 6, height // 2 + 6))
        mask = np.zeros(ct.shape, np.uint8)
        mask[*box, column - 2 : column + 3] = bit("lung_nodule")
        mask[ct > -500] = 0
        assert mask.any()
        third = width // 3
        gone, kept = slice(0, third), slice(third, width)
        if side == "right":
            gone, kept = slice(width - third, width), slice(0, width - third)
        if padded:
            ct[:, :, gone] = -1024
        else:
            ct, mask = np.ascontiguousarray(ct[:, :, kept]), np.ascontiguousarray(mask[:, :, kept])
        (place,) = locate_lesions(mask, ct, None, config.data.spacing)
        assert (place.side, place.basis) == (side, "geometry")


def test_an_outline_without_its_finding_is_not_told() -> None:
    ct, regions = chest()
    mask = lesion("consolidation", RIGHT_LOW) | lesion("lung_nodule", LEFT_HIGH)
    volumes = [torch.from_numpy(volume) for volume in (mask, ct, regions)]

    def told(*findings: str) -> str:
        suggested = [0.9 if finding in findings else 0.4 for finding in FINDINGS]
        return describe_cues(suggested, [0.5] * len(FINDINGS), *volumes, SPACING)

    both = told("Consolidation", "Lung nodule")
    assert "Certain findings: lung nodule, consolidation." in both
    assert "right lower lobe" in both and "left upper lobe" in both
    assert "lung nodule (" not in told("Consolidation") and "in the right lower lobe" in told(
        "Consolidation"
    )
    assert told("Emphysema") == "Certain findings: emphysema. No lesions outlined."
    assert told() == "No findings suggested. No lesions outlined."


def painted(sample: Sample, key: str, centre: np.ndarray, radius_mm: float = 14) -> np.ndarray:
    """A ball of one lesion around a voxel of a sample."""
    index = np.stack(np.indices(sample.ct.shape), axis=-1)
    mm = (index - centre) * np.asarray(sample.meta.spacing)
    return np.where(np.linalg.norm(mm, axis=-1) < radius_mm, bit(key), np.uint8(0))


def middle_of(sample: Sample, region: str) -> np.ndarray:
    return np.argwhere(sample.regions == REGION_BY_NAME[region].id).mean(axis=0).round()


BREAST = np.array([21, 7, 43])
"""Voxel in the left breast of `patient`."""


@pytest.fixture(scope="module")
def patient() -> Sample:
    """A phantom with breasts in front of the ribs."""
    sample = phantom_sample(2, load_config("demo", WIDE_GRID))
    ct = np.array(sample.ct)
    index = np.stack(np.indices(ct.shape), axis=-1)
    for column in (20, 43):
        mm = (index - (21, 10, column)) * np.asarray(sample.meta.spacing)
        ct[
            (np.linalg.norm(mm / (50, 45, 50), axis=-1) < 1) & (ct < -300) & (index[..., 1] < 14)
        ] = 0
    return replace(sample, ct=ct)


@pytest.mark.parametrize("with_map", [True, False])
@pytest.mark.parametrize("key", ["pericardial_effusion", "lung_nodule", "pleural_effusion"])
def test_an_outline_in_the_breast_is_not_worded_as_heart_or_lung(
    patient: Sample, key: str, with_map: bool
) -> None:
    mask = painted(patient, key, BREAST, 10)
    mask[patient.regions > 0] = 0
    regions = patient.regions if with_map else None
    (place,) = locate_lesions(mask, patient.ct, regions, patient.meta.spacing)
    assert "left chest wall or breast" in place.wording and place.is_plausible is False
    assert not re.search("heart|both lungs", place.wording) and place.side == "left"
    assert "in the left chest wall or breast" in describe_places([place])


@pytest.mark.parametrize("with_map", [True, False])
@pytest.mark.parametrize(
    ("key", "region", "words", "words_with_map"),
    [
        ("lung_nodule", "esophagus", "mediastinum", "esophagus"),
        ("lung_nodule", "liver", "upper abdomen", "liver"),
        ("lung_nodule", "heart", "mediastinum", "heart"),
        ("consolidation", "spine", "mediastinum", "spine"),
        ("pericardial_effusion", "right lower lobe", "right lung", "right lung"),
        ("pleural_effusion", "left upper lobe", "left lung", "left lung"),
    ],
)
def test_a_place_where_no_such_lesion_lies_is_named(
    patient: Sample, key: str, region: str, words: str, words_with_map: str, with_map: bool
) -> None:
    mask = painted(patient, key, middle_of(patient, region), 9)
    regions = patient.regions if with_map else None
    (place,) = locate_lesions(mask, patient.ct, regions, patient.meta.spacing)
    assert (words_with_map if with_map else words) in place.wording
    assert not place.is_plausible


def test_a_nodule_in_an_airless_lobe_keeps_its_side_and_may_be_right() -> None:
    """Without a map it may as well lie in the liver."""
    ct = np.full((80, 80, 100), -1000, np.int16)
    ct[:, 10:70, 8:92] = 40
    ct[20:75, 18:62, 14:42] = ct[20:75, 18:62, 58:86] = -850
    ct[20:45, 18:62, 14:42] = 40
    mask = np.zeros(ct.shape, np.uint8)
    mask[28:33, 36:41, 24:29] = bit("lung_nodule")
    (place,) = locate_lesions(mask, ct, None, (4.0, 4.0, 4.0))
    assert place.wording == "right chest or upper abdomen, away from aerated lung"
    assert place.side == "right" and place.is_plausible is None


def test_an_outline_beside_the_body_is_outside(patient: Sample) -> None:
    mask = painted(patient, "consolidation", np.array([12, 2, 4]), 12)
    (place,) = locate_lesions(mask, patient.ct, patient.regions, patient.meta.spacing)
    assert (place.wording, place.is_plausible) == ("space outside the body", False)


def test_a_part_of_a_lesion_elsewhere_is_named_beside_the_rest(patient: Sample) -> None:
    in_lung = painted(patient, "lung_nodule", middle_of(patient, "right upper lobe"))
    in_breast = painted(patient, "lung_nodule", BREAST, 12)
    (place,) = locate_lesions(in_lung | in_breast, patient.ct, None, patient.meta.spacing)
    assert re.match("right lung, .*and left chest wall or breast", place.wording)
    assert (place.side, place.is_plausible) == ("both", False)


def test_voxels_outside_the_chest_are_found_and_those_in_it_are_not(patient: Sample) -> None:
    spacing = patient.meta.spacing
    in_lung = painted(patient, "lung_nodule", middle_of(patient, "right upper lobe"))
    in_breast = painted(patient, "lung_nodule", BREAST, 10)
    in_breast[patient.regions > 0] = 0
    in_air = painted(patient, "consolidation", np.array([12, 2, 4]), 12)
    found = find_voxels_outside_chest(in_lung | in_breast | in_air, patient.ct, spacing)
    assert set(found["lung_nodule"]) <= set(np.flatnonzero(in_breast))
    assert found["lung_nodule"].size > 0.7 * (in_breast > 0).sum()
    assert set(found["consolidation"]) == set(np.flatnonzero(in_air))
    no_lungs = np.full_like(patient.ct, 40)
    assert find_voxels_outside_chest(np.zeros_like(in_air), patient.ct, spacing) == {}
    kept = find_voxels_outside_chest(in_air, no_lungs, spacing)
    assert kept["consolidation"].size == 0


@pytest.mark.parametrize(
    "source",
    [
        "tiny",
        pytest.param("demo", marks=pytest.mark.slow),
        pytest.param("learn", marks=pytest.mark.slow),
    ],
)
def test_true_outlines_lie_in_the_chest(source: str) -> None:
    """Of a lesion's voxels hardly any is taken for chest wall, neck, abdomen or air outside: on
    coarse grids too, and where the field of view cuts the body off."""
    config = load_config(source)
    total, lost = Counter[str](), Counter[str]()
    for seed in range(8):
        sample = phantom_sample(seed, config)
        outside = find_voxels_outside_chest(sample.lesions, sample.ct, sample.meta.spacing)
        for lesion in LESIONS:
            total[lesion.key] += int(lesion_mask(sample.lesions, lesion).sum())
            lost[lesion.key] += outside.get(lesion.key, np.empty(0)).size
    shares = {key: lost[key] / total[key] for key in total if total[key]}
    assert len(shares) == len(LESIONS) and max(shares.values()) < 0.02, shares
