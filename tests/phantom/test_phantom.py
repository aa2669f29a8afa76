import re
from functools import cache
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage

from rectvlm.labels import FINDINGS, LESIONS, LOBES, REGION_BY_NAME, REGIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.lesion_places import locate_lesions
from rectvlm.phantom.patient_plan import draw_patient_plan
from rectvlm.phantom.phantom import PhantomCase, make_phantom

SEEDS = range(20)
ID = {name: region.id for name, region in REGION_BY_NAME.items()}


@cache
def phantom(seed: int) -> PhantomCase:
    return make_phantom(seed)


@cache
def canonical(seed: int) -> SimpleNamespace:
    """The phantom in (superior, posterior, left) order, by nibabel."""
    p = phantom(seed)
    turn = ornt_transform(io_orientation(p.affine), axcodes2ornt(("S", "P", "L")))
    sizes = nib.affines.voxel_sizes(p.affine)
    return SimpleNamespace(
        hu=apply_orientation(p.hu, turn),
        lesions=apply_orientation(p.lesions, turn),
        regions=apply_orientation(p.regions, turn),
        spacing=tuple(float(sizes[int(np.flatnonzero(turn[:, 0] == n)[0])]) for n in range(3)),
    )


def mask_of(seed: int, key: str) -> np.ndarray:
    lesion = next(lesion for lesion in LESIONS if lesion.key == key)
    return lesion_mask(canonical(seed).lesions, lesion)


def world(p: PhantomCase, region: str) -> np.ndarray:
    """Mean RAS+ position of a region."""
    voxels = np.argwhere(p.regions == ID[region])
    assert len(voxels), f"{region} is missing"
    return (nib.affines.apply_affine(p.affine, voxels)).mean(0)


def test_same_seed_same_phantom_and_another_seed_another() -> None:
    once, again = phantom(3), make_phantom(3)
    for name in ("hu", "lesions", "regions", "affine"):
        assert np.array_equal(getattr(once, name), getattr(again, name))
    assert (once.labels, once.findings, once.true_places) == (
        again.labels,
        again.findings,
        again.true_places,
    )
    assert once.findings != phantom(4).findings


@pytest.mark.parametrize("seed", SEEDS)
def test_arrays_and_fields(seed: int) -> None:
    p = phantom(seed)
    assert (p.hu.dtype, p.lesions.dtype, p.regions.dtype) == (np.int16, np.uint8, np.uint8)
    assert p.hu.shape == p.lesions.shape == p.regions.shape
    assert set(np.unique(p.regions)) == set(range(len(REGIONS) + 1))
    assert tuple(p.labels) == FINDINGS and set(p.lesions_annotated) == {
        lesion.key for lesion in LESIONS
    }
    assert 15 <= len((p.findings + " " + p.impression).split()) <= 120
    spacing = np.sort(nib.affines.voxel_sizes(p.affine))
    assert 2.3 < spacing[0] == pytest.approx(spacing[1]) and spacing[2] <= 5


def test_axis_orders_and_directions_vary() -> None:
    codes = {nib.aff2axcodes(phantom(seed).affine) for seed in SEEDS}
    assert len(codes) >= 8
    assert len({"".join(sorted(code)) for code in codes}) >= 4


@pytest.mark.parametrize("seed", SEEDS)
def test_every_region_lies_on_its_side_of_the_world(seed: int) -> None:
    """RAS+: x grows to the patient's right, y forwards, z upwards."""
    p = phantom(seed)
    spine = world(p, "spine")
    for region in REGIONS:
        if region.side is not None:
            assert (world(p, region.name)[0] > spine[0]) == (region.side == "right"), region.name
    assert world(p, "liver")[0] > spine[0] > world(p, "spleen")[0]
    assert world(p, "heart")[0] < spine[0] and world(p, "stomach")[0] < spine[0]
    assert world(p, "sternum")[1] > world(p, "heart")[1] > spine[1]
    for side in ("right", "left"):
        assert world(p, f"{side} upper lobe")[2] > world(p, f"{side} lower lobe")[2]
        assert world(p, f"{side} upper lobe")[1] > world(p, f"{side} lower lobe")[1]
    assert world(p, "trachea")[2] > world(p, "heart")[2] > world(p, "liver")[2]


@pytest.mark.parametrize("seed", SEEDS)
def test_places_agree_with_what_was_painted(seed: int) -> None:
    p, c = phantom(seed), canonical(seed)
    painted = {place.lesion: place for place in p.true_places if p.lesions_annotated[place.lesion]}
    found = {place.lesion: place for place in locate_lesions(c.lesions, c.hu, c.regions, c.spacing)}
    assert found.keys() == painted.keys()
    for key, place in painted.items():
        assert (found[key].wording, found[key].regions, found[key].side) == (
            place.wording,
            place.regions,
            place.side,
        )
        assert found[key].volume_ml == pytest.approx(place.volume_ml)
    guessed = {
        place.lesion: place.side for place in locate_lesions(c.lesions, c.hu, None, c.spacing)
    }
    assert guessed == {key: place.side for key, place in painted.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_report_says_where_the_masks_lie(seed: int) -> None:
    p, c = phantom(seed), canonical(seed)
    text = p.findings.lower()
    for place in locate_lesions(c.lesions, c.hu, c.regions, c.spacing):
        if place.lesion == "pleural_effusion":
            side = "bilateral" if place.side == "both" else place.side
            assert re.search(rf"{side} pleural effusion", text)
        elif place.lesion == "lung_nodule":
            assert set(re.findall(r"nodule in the ([a-z ]+ lobe)\.", text)) == set(place.regions)
        elif place.lesion == "pericardial_effusion":
            assert re.search(r"(?<!no )pericardial effusion", text)
        else:
            name = {
                "consolidation": "consolidation",
                "ground_glass_opacity": "ground-glass opacity",
            }[place.lesion]
            assert re.search(rf"{name}[a-z ]* in (the )?{place.wording}\.", text)
    for finding, said in (
        ("Pleural effusion", "pleural effusion"),
        ("Consolidation", "consolidation"),
    ):
        if not draw_patient_plan(seed).present[finding]:
            assert not re.search(rf"(?<!no ){said}", text + " " + p.impression.lower())


@pytest.mark.parametrize("seed", SEEDS)
def test_hounsfield_units_of_tissues(seed: int) -> None:
    c = canonical(seed)
    median = {name: float(np.median(c.hu[c.regions == number])) for name, number in ID.items()}
    for lobe in ("right upper lobe", "left upper lobe"):
        assert -980 < median[lobe] < -700
    assert median["trachea"] < -900
    assert 30 < median["heart"] < 200 and 30 < median["aorta"] < 200
    assert 45 < median["liver"] < 130 and 35 < median["spleen"] < 120
    assert 15 < median["esophagus"] < 60
    assert median["spine"] > 90 and median["left ribs"] > 150 and median["sternum"] > 80
    assert np.median(c.hu[:, :3]) < -900


@pytest.mark.parametrize("seed", SEEDS)
def test_hounsfield_units_of_lesions(seed: int) -> None:
    c = canonical(seed)
    expected = {
        "pericardial_effusion": (0, 30),
        "pleural_effusion": (0, 25),
        "consolidation": (5, 55),
        "ground_glass_opacity": (-700, -400),
        "lung_nodule": (-350, 70),
    }
    for key, (low, high) in expected.items():
        mask = mask_of(seed, key)
        if mask.any():
            assert low < np.median(c.hu[mask]) < high, key
    fluid = mask_of(seed, "pleural_effusion") | mask_of(seed, "pericardial_effusion")
    assert not np.isin(c.regions[fluid], [lobe.id for lobe in LOBES]).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_findings_can_be_measured_in_the_image(seed: int) -> None:
    """Labels are true of the image: a threshold that does not know the plan finds each again."""
    c, present = canonical(seed), draw_patient_plan(seed).present
    lung = (c.regions > 0) & (c.regions <= len(LOBES))
    heart = c.regions == ID["heart"]
    width = max(np.ptp(np.flatnonzero(level.any(0))) for level in heart if level.any())
    assert (width / np.ptp(np.flatnonzero(lung.any((0, 1)))) > 0.52) == present["Cardiomegaly"]
    assert ((c.hu[lung] < -950).mean() > 0.02) == present["Emphysema"]
    assert (c.hu.max() > 1800) == present["Medical material"]
    aorta = ndimage.binary_dilation(c.regions == ID["aorta"]) & np.isin(c.regions, (0, ID["aorta"]))
    if not present["Medical material"]:
        assert ((c.hu[aorta] > 450).sum() >= 5) == present["Arterial wall calcification"]
        near = ndimage.binary_dilation(heart, iterations=2) & np.isin(c.regions, (0, ID["heart"]))
        level, row, _ = np.argwhere(heart).mean(0)
        near[int(level) + 6 :], near[:, int(row) :] = (
            False,
            False,
        )  # the front of the heart, below the aorta
        assert ((c.hu[near & ~aorta] > 450).sum() >= 3) == present[
            "Coronary artery wall calcification"
        ]
    bits = np.array([mask_of(seed, lesion.key).any() for lesion in LESIONS])
    for lesion, outlined in zip(LESIONS, bits, strict=True):
        assert not outlined or present[lesion.finding]


@pytest.mark.parametrize("seed", SEEDS)
def test_lesions_survive_the_demo_grid(seed: int) -> None:
    """A nodule still stands out when it is averaged over a demo voxel of 8 × 3.6 × 3.6 mm."""
    c, nodules = canonical(seed), mask_of(seed, "lung_nodule")
    if not nodules.any():
        return
    sigma = [0.29 * size / step for size, step in zip((8.0, 3.6, 3.6), c.spacing, strict=True)]
    assert ndimage.gaussian_filter(c.hu.astype(np.float32), sigma)[nodules].max() > -500


@pytest.mark.parametrize("seed", SEEDS)
def test_no_air_where_none_belongs(seed: int) -> None:
    """Airways, holes and hernias leave no gas in the liver, the heart, fluid or bone."""
    c = canonical(seed)
    for name in ("liver", "spleen", "heart", "aorta", "spine", "left ribs", "right ribs"):
        solid = ndimage.binary_erosion(c.regions == ID[name])
        assert (c.hu[solid] > -300).all(), name
    fluid = ndimage.binary_erosion(
        mask_of(seed, "pleural_effusion") | mask_of(seed, "pericardial_effusion")
    )
    assert (c.hu[fluid] > -500).all()  # its edge blends into lung


def test_not_annotated_is_not_negative() -> None:
    plans = {seed: draw_patient_plan(seed) for seed in range(60)}
    lesion_of = {lesion.key: lesion for lesion in LESIONS}
    seed = next(
        s
        for s, plan in plans.items()
        if plan.unannotated_lesion and plan.present[lesion_of[plan.unannotated_lesion].finding]
    )
    p, lesion = phantom(seed), lesion_of[str(plans[seed].unannotated_lesion)]
    assert p.lesions_annotated == {other.key: other is not lesion for other in LESIONS}
    assert not lesion_mask(p.lesions, lesion).any()
    assert p.labels[lesion.finding] in (1, None)
    assert any(place.lesion == lesion.key and place.volume_ml > 0 for place in p.true_places)
    assert lesion.name in p.findings.lower() or lesion.key == "lung_nodule"


def test_some_labels_are_unknown_and_the_rest_follow_the_plan() -> None:
    for seed in SEEDS:
        plan = draw_patient_plan(seed)
        expected = {finding: int(plan.present[finding]) for finding in FINDINGS} | (
            {plan.unknown_finding: None} if plan.unknown_finding else {}
        )
        assert phantom(seed).labels == expected
    assert any(draw_patient_plan(seed).unknown_finding for seed in SEEDS)


def test_both_classes_of_every_finding_in_48_seeds() -> None:
    plans = [draw_patient_plan(seed) for seed in range(48)]
    for finding in FINDINGS:
        positive = sum(plan.present[finding] for plan in plans if plan.unknown_finding != finding)
        assert 6 <= positive <= 36, finding
    for lesion in LESIONS:
        annotated = [plan for plan in plans if plan.unannotated_lesion != lesion.key]
        assert any(plan.present[lesion.finding] for plan in annotated)
