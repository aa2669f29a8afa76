"""Mirror images: sides change everywhere at once, or nowhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import phantom_sample

from rectvlm.config import Config
from rectvlm.data.canonical_grid import mask_to_native
from rectvlm.data.dataset import collate_samples
from rectvlm.data.mirror import mirror_samples, mirror_text
from rectvlm.labels import REGION_BY_NAME
from rectvlm.lesion_places import locate_lesions
from rectvlm.phantom.phantom import make_phantom
from rectvlm.types import Batch, Sample

PAIRS = [
    ("Nodule in the left upper lobe.", "Nodule in the right upper lobe."),
    ("Left-sided effusion, RIGHT lung clear.", "Right-sided effusion, LEFT lung clear."),
    (
        "Bilateral pleural effusion, larger on the right.",
        "Bilateral pleural effusion, larger on the left.",
    ),
    ("RUL nodule, LLL consolidation.", "LUL nodule, RLL consolidation."),
    (
        "Mediastinum shifted rightward, rightmost rib.",
        "Mediastinum shifted leftward, leftmost rib.",
    ),
    ("Both lower lobes; ipsilateral hilum.", "Both lower lobes; ipsilateral hilum."),
    (
        "Patient scanned upright; a cleft sternum at this level.",
        "Patient scanned upright; a cleft sternum at this level.",
    ),
    ("Heart size is normal. Nodule on the left.", "Heart size is normal. Nodule on the right."),
    ("Left main bronchus is open.", "Right main bronchus is open."),
    ("Left atelectasis, right inferior vein.", "Right atelectasis, left inferior vein."),
    ("Left/right asymmetry.", "Right/left asymmetry."),
    ("Fracture of L1 and T12, LN enlarged.", "Fracture of L1 and T12, LN enlarged."),
]
UNSAFE = [
    "Nodule in the right middle lobe.",
    "Middle-lobe atelectasis.",
    "RML nodule.",
    "Scar in the lingula.",
    "Lingular atelectasis.",
    "The minor fissure is thickened.",
    "The left ventricle is dilated.",
    "Biatrial enlargement; right atrium.",
    "Stent in the left anterior descending artery.",
    "Calcified LAD and RCA.",
    "Calcification of the left main coronary artery.",
    "Calcification of left main.",
    "Right coronary artery calcification.",
    "Right-sided aortic arch.",
    "Left-sided SVC is seen.",
    "An azygos lobe on the right.",
    "The aorta passes to the left of the spine.",
    "Dextrocardia.",
    "Dextroscoliosis.",
    "Situs solitus.",
    "Left lobe of the liver is large.",
    "Hepatosteatosis.",
    "Spleen is normal.",
    "The stomach is distended.",
    "Nasogastric tube.",
    "Status post cholecystectomy.",
    "Azygos lobe.",
    "Enlarged nodes 4R and 7.",
    "Node at station 5.",
    "Rt. effusion.",
    "Effusion (L).",
    "A drain was left in place.",
    "The mass was left untreated.",
    "The vessel turns at a right angle.",
    "Nodule at 3 o'clock.",
    "LeFt nodule.",
    "Nodule in the lowerRight lobe.",
    "A leftover of contrast.",
]


@pytest.mark.parametrize(("text", "mirrored"), PAIRS)
def test_sides_change_and_everything_else_stays(text: str, mirrored: str) -> None:
    assert mirror_text(text) == mirrored
    assert mirror_text(mirrored) == text


@pytest.mark.parametrize("text", UNSAFE)
def test_what_might_become_false_is_refused(text: str) -> None:
    assert mirror_text(text) is None
    assert mirror_text(f"The lungs are clear.\n{text} No effusion.") is None


def test_reports_of_phantoms_are_mirrored_or_refused() -> None:
    mirrored = 0
    for seed in range(6):
        phantom = make_phantom(seed)
        for text in (phantom.findings, phantom.impression):
            changed = mirror_text(text)
            if changed is None:
                continue
            mirrored += changed != text
            assert changed.lower().count("left") == text.lower().count("right")
            assert mirror_text(changed) == text
    assert mirrored


def sided(sample: Sample) -> Sample:
    """Sample with a consolidation in the right lower lobe and a nodule in the right upper lobe."""
    ct = np.full_like(sample.ct, -1000)
    lesions, regions = np.zeros_like(sample.lesions), np.zeros_like(sample.regions)
    ids = {name: region.id for name, region in REGION_BY_NAME.items()}
    right, left = slice(5, 20), slice(28, 43)
    ct[:, 6:42, 2:46] = 40  # a chest wall of three voxels, as coarse grids show it
    ct[1:-1, 10:38, right] = ct[1:-1, 10:38, left] = -900
    for side, columns in (("right", right), ("left", left)):
        regions[:8, 10:38, columns], regions[8:, 10:38, columns] = (
            ids[f"{side} lower lobe"],
            ids[f"{side} upper lobe"],
        )
    regions[:, 7, 5], regions[:, 7, -9] = ids["right ribs"], ids["left ribs"]
    regions[:, 20:24, 22:28] = ids["heart"]
    lesions[2:6, 20:30, 6:14] = 1 << 2
    lesions[10:13, 30:33, 10:13] = 1 << 4
    ct[lesions > 0] = 40
    meta = replace(
        sample.meta,
        findings="Consolidation in the right lower lobe. Left lung is clear. "
        "9 mm nodule in the RUL.",
        impression="Right-sided pneumonia.",
    )
    return Sample(ct, lesions, regions, meta)


@pytest.fixture
def batch(tiny: Config) -> Batch:
    return collate_samples([sided(phantom_sample(1, tiny)), phantom_sample(0, tiny)])


def words(batch: Batch, i: int, with_map: bool) -> dict[str, str]:
    regions = batch.regions[i].numpy() if with_map else None
    found = locate_lesions(batch.lesions[i].numpy(), batch.ct[i].numpy(), regions, batch.spacing)
    return {place.lesion: place.wording for place in found}


def test_a_marker_on_the_right_ends_on_the_left_with_its_words_and_regions(batch: Batch) -> None:
    assert words(batch, 0, True) == {
        "consolidation": "right lower lobe",
        "lung_nodule": "right upper lobe",
    }
    changed = mirror_samples(batch, [0])
    assert words(changed, 0, True) == {
        "consolidation": "left lower lobe",
        "lung_nodule": "left upper lobe",
    }
    assert words(changed, 0, False).keys() == words(batch, 0, False).keys()
    for before, after in zip(
        words(batch, 0, False).values(), words(changed, 0, False).values(), strict=True
    ):
        assert "right" in before and after == before.replace("right", "left")
    assert torch.equal(changed.ct[0], batch.ct[0].flip(-1))
    assert changed.reports[0] == (
        "Findings: Consolidation in the left lower lobe. Right lung is clear. "
        "9 mm nodule in the LUL.\n"
        "Impression: Left-sided pneumonia."
    )
    left, right, heart = (REGION_BY_NAME[name].id for name in ("left ribs", "right ribs", "heart"))
    assert torch.equal(changed.regions[0] == left, (batch.regions[0] == right).flip(-1))
    assert torch.equal(changed.regions[0] == heart, (batch.regions[0] == heart).flip(-1))
    assert torch.equal(changed.ct[1], batch.ct[1]) and changed.metas[1] is batch.metas[1]
    assert torch.equal(changed.regions[1], batch.regions[1])


def test_what_was_known_before_the_ct_changes_sides_too(batch: Batch) -> None:
    pairs = {"Pain on the left.": "Pain on the right.", "RML nodule?": None}
    for indication, mirrored in pairs.items():
        batch.metas[0] = replace(batch.metas[0], indication=indication, technique="Low dose.")
        changed = mirror_samples(batch, [0]).metas[0]
        if mirrored is None:
            assert changed is batch.metas[0]
        else:
            assert (changed.indication, changed.technique) == (mirrored, "Low dose.")


def test_twice_is_the_same_again(batch: Batch) -> None:
    twice = mirror_samples(mirror_samples(batch, [0]), [0])
    assert all(
        torch.equal(getattr(twice, n), getattr(batch, n)) for n in ("ct", "lesions", "regions")
    )
    assert twice.reports == batch.reports
    before, after = batch.metas[0].geometry, twice.metas[0].geometry
    np.testing.assert_allclose(after.native_affine, before.native_affine, atol=1e-9)


def test_a_mask_of_the_mirror_image_goes_back_to_the_same_voxels_of_the_file(batch: Batch) -> None:
    changed = mirror_samples(batch, [0])
    assert changed.metas[0].geometry.grid_affine == batch.metas[0].geometry.grid_affine
    natives = []
    for one in (batch, changed):
        geometry = one.metas[0].geometry
        grid, native = np.array(geometry.grid_affine), np.array(geometry.native_affine)
        natives.append(mask_to_native(one.lesions[0].numpy(), grid, geometry.native_shape, native))
    assert natives[0].any()
    np.testing.assert_array_equal(*natives)
    handed = [
        np.linalg.det(np.array(one.metas[0].geometry.native_affine)[:3, :3])
        for one in (batch, changed)
    ]
    assert handed[0] == pytest.approx(-handed[1])


def test_unsafe_samples_stay_as_they_are(batch: Batch) -> None:
    """The phantom's map holds the right middle lobe, which no left lung has."""
    phantom = replace(batch.metas[1], findings="Nodule in the left upper lobe.", impression=None)
    batch = replace(batch, metas=[batch.metas[0], phantom])
    assert (batch.regions[1] == REGION_BY_NAME["right middle lobe"].id).any()
    assert mirror_samples(batch, [1]) is batch
    both = mirror_samples(batch, [0, 1])
    assert not torch.equal(both.ct[0], batch.ct[0]) and torch.equal(both.ct[1], batch.ct[1])
    hidden = replace(batch, regions_known=torch.tensor([True, False]))
    changed = mirror_samples(hidden, [1])
    assert torch.equal(changed.ct[1], batch.ct[1].flip(-1))
    assert changed.reports[1] == "Findings: Nodule in the right upper lobe."
    assert not changed.regions[1].any()
    unsafe = replace(phantom, impression="Nodule in the middle lobe.")
    assert mirror_samples(replace(hidden, metas=[batch.metas[0], unsafe]), [1]).metas[1] is unsafe


def test_a_sample_without_report_can_be_mirrored(batch: Batch) -> None:
    bare = replace(batch.metas[0], findings=None, impression=None)
    changed = mirror_samples(
        replace(batch, metas=[bare, batch.metas[1]], reports=[None, batch.reports[1]]), [0]
    )
    assert torch.equal(changed.ct[0], batch.ct[0].flip(-1))
    assert changed.reports[0] is None
