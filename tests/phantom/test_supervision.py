"""What a data set like CT-RATE knows of a phantom, and what it gets wrong."""

from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.phantom.patient_plan import CT_RATE_STYLE, draw_patient_plan
from rectvlm.phantom.phantom import PhantomCase, make_phantom
from rectvlm.phantom.supervision import (
    LABEL_ERROR_RATES,
    MAX_PARTIAL_INSTANCES,
    PARTIAL_LESIONS,
    SEGMENTED_LESIONS,
    PhantomSupervision,
    draw_ct_rate_errors,
    keep_largest_instances,
)

SEEDS = range(16)
MANY_SEEDS = range(3000)


@cache
def phantom(seed: int, supervision: PhantomSupervision) -> PhantomCase:
    return make_phantom(seed, CT_RATE_STYLE, supervision)


def outline(seed: int, supervision: PhantomSupervision, key: str) -> np.ndarray:
    return lesion_mask(phantom(seed, supervision).lesions, LESION_BY_KEY[key])


def instances(mask: np.ndarray) -> int:
    return int(ndimage.label(mask, structure=np.ones((3, 3, 3)))[1])


def test_labels_are_wrong_at_the_rate_of_their_finding() -> None:
    errors = [draw_ct_rate_errors(seed) for seed in MANY_SEEDS]
    rates = {}
    for finding in FINDINGS:
        rates[finding] = np.mean([finding in case.wrong_labels for case in errors])
        assert rates[finding] == pytest.approx(LABEL_ERROR_RATES[finding], abs=0.013), finding
    assert max(rates, key=lambda finding: rates[finding]) == "Lymphadenopathy"
    assert rates["Lymphadenopathy"] == pytest.approx(0.10, abs=0.015)
    assert 0.03 <= np.mean(list(rates.values())) <= 0.04
    assert np.mean([case.has_partial_outlines for case in errors]) == pytest.approx(0.13, abs=0.015)
    assert draw_ct_rate_errors(5) == draw_ct_rate_errors(5)


def test_wrong_labels_are_the_opposite_of_the_truth_and_none_is_unknown() -> None:
    for seed in SEEDS:
        present = draw_patient_plan(seed, CT_RATE_STYLE).present
        wrong = draw_ct_rate_errors(seed).wrong_labels
        labels = phantom(seed, "ct-rate").labels
        assert {finding for finding in FINDINGS if labels[finding] != present[finding]} == wrong
        assert None not in labels.values()


def seeds_with(lesion_key: str, has_partial_outlines: bool, count: int) -> list[int]:
    """First seeds that show a lesion, in cases that people outlined or did not."""
    finding, seeds = LESION_BY_KEY[lesion_key].finding, []
    for seed in MANY_SEEDS:
        is_present = draw_patient_plan(seed, CT_RATE_STYLE).present[finding]
        if is_present and draw_ct_rate_errors(seed).has_partial_outlines == has_partial_outlines:
            seeds.append(seed)
        if len(seeds) == count:
            break
    return seeds


@pytest.mark.parametrize("key", PARTIAL_LESIONS)
def test_people_outline_consolidation_and_ground_glass_in_part(key: str) -> None:
    for seed in seeds_with(key, True, 3):
        made, drawn = phantom(seed, "ct-rate"), outline(seed, "ct-rate", key)
        true = outline(seed, "exhaustive", key)
        assert made.lesions_partial[key] and not made.lesions_annotated[key]
        assert drawn.any() and not (drawn & ~true).any()
        assert instances(drawn) == min(instances(true), MAX_PARTIAL_INSTANCES)
        assert made.lesions_source[key] == "simulated ReXGroundingCT (people)"


@pytest.mark.parametrize("key", PARTIAL_LESIONS)
def test_elsewhere_their_outlines_are_erased_and_nothing_is_known(key: str) -> None:
    for seed in seeds_with(key, False, 3):
        made = phantom(seed, "ct-rate")
        assert not outline(seed, "ct-rate", key).any()
        assert not made.lesions_partial[key] and not made.lesions_annotated[key]
        assert made.lesions_source[key] is None


def test_only_the_largest_instances_are_outlined() -> None:
    mask = np.zeros((3, 3, 20), bool)
    for start, length in ((0, 2), (4, 5), (11, 1), (13, 3), (18, 2)):
        mask[1, 1, start : start + length] = True
    kept = keep_largest_instances(mask, 3)
    assert instances(kept) == 3 and kept[1, 1, 4:9].all() and kept[1, 1, 13:16].all()
    assert kept.sum() == 10 and np.array_equal(keep_largest_instances(mask, 5), mask)


def test_a_segmenter_outlines_nodules_and_effusions_nearly_right() -> None:
    """Borders are off, some small nodules are missed, and few specks are nothing."""
    n_nodules = n_missed = n_specks = n_empty = 0
    for seed in SEEDS:
        made = phantom(seed, "ct-rate")
        for key in SEGMENTED_LESIONS:
            assert made.lesions_annotated[key] and not made.lesions_partial[key]
            assert made.lesions_source[key] == "simulated TotalSegmentator"
            drawn, true = outline(seed, "ct-rate", key), outline(seed, "exhaustive", key)
            if not true.any():
                n_empty += 1
                n_specks += drawn.any()
                continue
            numbers, count = ndimage.label(true, structure=np.ones((3, 3, 3)))
            touched = np.unique(numbers[drawn & true])
            if key == "lung_nodule":
                n_nodules += count
                n_missed += count - len(touched)
            else:
                assert len(touched) == count
            common = np.isin(numbers, touched)
            if len(touched):
                dice = 2 * (drawn & common).sum() / (drawn.sum() + common.sum())
                assert 0.55 < dice < 0.99, f"seed {seed}, {key}: {dice:.2f}"
                # No further than one voxel from the true border.
                assert not (common & ~drawn & ndimage.binary_erosion(true, iterations=2)).any()
    assert 1 <= n_missed <= 0.4 * n_nodules
    assert 1 <= n_specks <= 0.2 * n_empty


def test_held_out_truth_is_exhaustive() -> None:
    for seed in range(100_000, 100_008):
        plan, made = draw_patient_plan(seed, CT_RATE_STYLE), phantom(seed, "exhaustive")
        assert made.labels == {finding: int(plan.present[finding]) for finding in FINDINGS}
        assert all(made.lesions_annotated.values()) and not any(made.lesions_partial.values())
        for lesion in LESIONS:
            is_present = plan.present[lesion.finding]
            assert outline(seed, "exhaustive", lesion.key).any() == is_present, lesion.key


def test_supervision_changes_neither_image_nor_regions_nor_report() -> None:
    seed = next(s for s in SEEDS if draw_ct_rate_errors(s).wrong_labels)
    exhaustive, ct_rate = phantom(seed, "exhaustive"), phantom(seed, "ct-rate")
    assert np.array_equal(exhaustive.hu, ct_rate.hu)
    assert np.array_equal(exhaustive.regions, ct_rate.regions) and ct_rate.regions.any()
    assert (exhaustive.findings, exhaustive.impression) == (ct_rate.findings, ct_rate.impression)
    assert exhaustive.labels != ct_rate.labels


def test_same_seed_same_outlines() -> None:
    once, again = phantom(7, "ct-rate"), make_phantom(7, CT_RATE_STYLE, "ct-rate")
    assert np.array_equal(once.lesions, again.lesions) and once.labels == again.labels
    assert once.lesions_partial == again.lesions_partial
