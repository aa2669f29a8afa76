"""Lesions in mm: values of MONAI's and DeepMind's tests; hits, matches and empty cases."""

import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import (
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
)
from monai.metrics.panoptic_quality import compute_panoptic_quality
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.labels import LESIONS, N_LESIONS
from rectvlm.metrics.bootstrap import draw_patient_weights
from rectvlm.metrics.lesions import (
    LESION_SCORES,
    LesionComparison,
    compare_lesion_masks,
    score_grounding,
    score_lesions,
)
from rectvlm.metrics.surface_distances import hd95, surface_dice

Mask = NDArray[np.bool_]
ONE = (1.0, 1.0, 1.0)


def sphere(
    radius: float, centre: tuple[int, int, int], spacing: tuple[float, float, float] = ONE
) -> Mask:
    """The mask of MONAI's tests: 99 voxels a side."""
    axes = np.ogrid[:99, :99, :99]
    squares = (
        (axis * step - middle) ** 2
        for axis, step, middle in zip(axes, spacing, centre, strict=True)
    )
    return sum(squares) <= radius**2


def blank(*shape: int) -> Mask:
    return np.zeros(shape, bool)


def boxed(shape: tuple[int, int, int], *boxes: tuple[slice, slice, slice]) -> Mask:
    mask = blank(*shape)
    for box in boxes:
        mask[box] = True
    return mask


def test_hd95_is_that_of_monais_tests() -> None:
    small, large = sphere(20, (20, 33, 22)), sphere(40, (20, 33, 22))
    assert hd95(small, large, ONE) == pytest.approx(20.09975124224178, rel=1e-6)
    assert hd95(large, small, ONE) == pytest.approx(20.09975124224178, rel=1e-6)
    assert hd95(blank(9, 9, 9), sphere(3, (4, 4, 4))[:9, :9, :9], ONE) is None


def test_surface_dice_is_that_of_deepminds_tests() -> None:
    one, other = blank(128, 128, 128), blank(128, 128, 128)
    one[50, 60, 70] = other[50, 60, 72] = True
    spacing = (3.0, 2.0, 1.0)
    assert surface_dice(other, one, spacing, tolerance_mm=1) == pytest.approx(0.5)
    assert hd95(other, one, spacing) == pytest.approx(2.0)
    half, more = (
        boxed((100, 100, 100), np.s_[0:50, :, :]),
        boxed((100, 100, 100), np.s_[0:51, :, :]),
    )
    assert surface_dice(more, half, (2.0, 1.0, 1.0), tolerance_mm=1) == pytest.approx(
        0.836, abs=5e-4
    )
    assert surface_dice(blank(4, 4, 4), one[48:52, 58:62, 68:72], spacing) == 0
    assert surface_dice(blank(4, 4, 4), blank(4, 4, 4), spacing) is None


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_case_is_measured_as_monai_measures_the_whole_volume(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spacing = tuple(rng.uniform(0.5, 5, 3))
    # Blobs anywhere in the volume, at its edge too.
    predicted, truth = (
        ndimage.gaussian_filter(rng.random((14, 17, 20)), 1.2) > 0.52 for _ in range(2)
    )
    one = compare_lesion_masks(predicted, truth, spacing, tolerance_mm=1.5)
    tensors = [torch.from_numpy(mask)[None, None] for mask in (predicted, truth)]
    both = 2 * one.both / (one.predicted + one.truth)
    assert both == pytest.approx(compute_dice(*tensors).item(), abs=1e-6)
    assert one.both / (one.predicted + one.truth - one.both) == pytest.approx(
        compute_iou(*tensors).item(), abs=1e-6
    )
    options = {"include_background": True, "spacing": list(spacing)}
    assert one.hd95_mm == pytest.approx(
        compute_hausdorff_distance(*tensors, percentile=95, **options).item(), rel=1e-5
    )
    area = compute_surface_dice(*tensors, class_thresholds=[1.5], use_subvoxels=True, **options)
    assert one.surface_dice == pytest.approx(area.item(), abs=1e-6)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_parts_match_as_monai_counts_them(seed: int) -> None:
    """Above an IoU of one half a component has one partner, so all matchings agree."""
    rng = np.random.default_rng(seed)
    truth = ndimage.gaussian_filter(rng.random((12, 12, 12)), 1.1) > 0.55
    predicted = truth ^ (rng.random(truth.shape) < 0.01)
    labelled = [ndimage.label(mask, structure=np.ones((3, 3, 3))) for mask in (predicted, truth)]
    (found, n_found), (present, n_present) = labelled
    counts = compute_panoptic_quality(
        torch.from_numpy(found),
        torch.from_numpy(present),
        match_iou_threshold=0.5,
        output_confusion_matrix=True,
    )
    # Just above: MONAI asks for more than the threshold. A Dice of 2/3 is an IoU of one half.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[LesionComparison.__module__], "MATCH_DICE", 2 / 3 + 1e-9)
        one = compare_lesion_masks(predicted, truth, ONE)
    assert (one.parts_matched, one.parts_predicted, one.parts_true) == (
        int(counts[0]),
        n_found,
        n_present,
    )


def test_parts_are_hit_by_a_voxel_and_matched_by_a_dice_of_a_fifth() -> None:
    shape = (6, 12, 40)
    truth = boxed(
        shape,
        np.s_[1:4, 1:4, 1:4],
        np.s_[1:4, 1:4, 11:14],
        np.s_[1:4, 1:4, 21:24],
        np.s_[1:4, 1:4, 31:34],
    )
    predicted = boxed(
        shape,
        np.s_[1:4, 1:4, 1:4],  # the first, whole
        np.s_[3:6, 3:12, 13:20],  # a corner of the second: hit, Dice 2/(27 + 189)
        np.s_[1:4, 1:4, 21:22],  # a slab of the third: Dice 18/36
        np.s_[5:6, 10:12, 35:40],  # nothing
    )
    one = compare_lesion_masks(predicted, truth, ONE)
    assert (one.parts_true, one.parts_predicted, one.parts_touched, one.parts_matched) == (
        4,
        4,
        3,
        2,
    )
    result = score_lesions([[one, *[None] * 4]])["per_lesion"][LESIONS[0].key]
    assert result["lesion_hit_rate"] == 3 / 4
    assert (
        result["instance_recall"] == result["instance_precision"] == result["instance_f1"] == 1 / 2
    )


def test_a_part_has_one_partner_at_most() -> None:
    truth = boxed((5, 5, 20), np.s_[1:4, 1:4, 1:19])
    # Three pieces of one lesion, each with a Dice above a fifth: one match, two too many.
    predicted = boxed(
        (5, 5, 20), np.s_[1:4, 1:4, 1:6], np.s_[1:4, 1:4, 7:12], np.s_[1:4, 1:4, 13:19]
    )
    one = compare_lesion_masks(predicted, truth, ONE)
    assert (one.parts_true, one.parts_predicted, one.parts_touched, one.parts_matched) == (
        1,
        3,
        1,
        1,
    )
    # The greatest number of pairs: the second piece could take either lesion.
    pieces = boxed((3, 3, 30), np.s_[1, 1, 1:10], np.s_[1, 1, 12:20])
    joined = boxed((3, 3, 30), np.s_[1, 1, 1:5], np.s_[1, 1, 6:16])
    assert compare_lesion_masks(joined, pieces, ONE).parts_matched == 2


def test_parts_touch_by_their_corners() -> None:
    mask = boxed((6, 6, 6), np.s_[0:2, 0:2, 0:2], np.s_[2:4, 2:4, 2:4])
    assert compare_lesion_masks(mask, mask, ONE).parts_true == 1


def test_memory_is_bounded_by_the_voxels_around_the_masks() -> None:
    """A whole CT has 80 million voxels or more; several float32 masks of it take gigabytes."""
    rng = np.random.default_rng(0)
    truth = np.zeros((128, 128, 128), bool)
    truth[4:-4, 4:-4, 4:-4] = True
    predicted = np.roll(truth, 2, 1)
    predicted[rng.integers(0, 128, 50), rng.integers(0, 128, 50), rng.integers(0, 128, 50)] = True
    compare_lesion_masks(predicted[:20], truth[:20], ONE)  # what is imported does not count
    tracemalloc.start()
    compare_lesion_masks(predicted, truth, ONE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 36 * truth.size


def test_the_volume_of_a_prediction_is_in_ml_whatever_its_box() -> None:
    mask = boxed((9, 9, 9), np.s_[2:4, 1:6, 2:7])  # 50 voxels of 3.5 mm³
    healthy = compare_lesion_masks(mask, blank(9, 9, 9), (5.0, 0.7, 1.0))
    assert healthy.predicted_ml == pytest.approx(0.175)
    row = score_lesions([[healthy, *[None] * 4]])["per_lesion"][LESIONS[0].key]
    assert row["false_positive_ml"] == row["max_false_positive_ml"] == pytest.approx(0.175)
    ill = compare_lesion_masks(mask, mask, (5.0, 0.7, 1.0))
    row = score_lesions([[ill, *[None] * 4]])["per_lesion"][LESIONS[0].key]
    assert row["false_positive_ml"] is None and row["max_false_positive_ml"] is None


def test_a_perfect_case_and_empty_ones() -> None:
    mask = boxed((5, 5, 5), np.s_[0:2, 1:3, 2:5])
    same = compare_lesion_masks(mask, mask, (0.7, 0.7, 5.0))
    assert (same.both, same.hd95_mm, same.surface_dice, same.parts_matched) == (12, 0.0, 1.0, 1)
    empty = blank(5, 5, 5)
    assert compare_lesion_masks(empty, empty, ONE) == LesionComparison(
        0, 0, 0, None, None, 0, 0, 0, 0, 0.0
    )
    missed = compare_lesion_masks(empty, mask, ONE)
    assert (missed.truth, missed.hd95_mm, missed.surface_dice, missed.parts_true) == (
        12,
        None,
        0.0,
        1,
    )


def case(both: int, predicted: int, truth: int, distance: float | None = None) -> LesionComparison:
    surface = None if not predicted and not truth else float(both > 0)
    pieces = (predicted > 0, truth > 0, both > 0, both > 0)
    return LesionComparison(both, predicted, truth, distance, surface, *pieces, 0.5 * predicted)


def test_empty_missed_and_false_positive_cases_are_counted_apart() -> None:
    cases = [
        case(0, 0, 0),
        case(0, 4, 0),
        case(0, 0, 7),
        case(2, 3, 3, 6.0),
        case(1, 30, 10, 2.0),
        case(9, 9, 9),
    ]
    rows: list[list[LesionComparison | None]] = [[one, *[None] * 4] for one in cases]
    rows[5][0] = None  # perfect, and not annotated
    result = score_lesions(rows)
    row = result["per_lesion"][LESIONS[0].key]
    assert row["dice"] == pytest.approx((0 + 0 + 2 / 3 + 2 / 40) / 4)
    assert row["iou"] == pytest.approx((0 + 0 + 2 / 4 + 1 / 39) / 4)
    assert row["dice_where_present"] == pytest.approx((0 + 2 / 3 + 2 / 40) / 3)
    assert row["sensitivity"] == pytest.approx((0 + 2 / 3 + 1 / 10) / 3)
    assert row["hit_rate"] == pytest.approx(1 / 3)  # a Dice of 0.05 is no hit
    assert row["hd95_mm"] == pytest.approx((6.0 + 2.0) / 2) and row["n_hd95"] == 2
    assert row["surface_dice"] == pytest.approx((0 + 0 + 1 + 1) / 4)
    assert row["instance_precision"] == pytest.approx(2 / 3) and row[
        "instance_recall"
    ] == pytest.approx(2 / 3)
    # Two cases lack the lesion; in one of them 4 voxels of half a ml are drawn.
    assert row["false_positive_ml"] == 1 and row["max_false_positive_ml"] == 2
    assert {name: row[name] for name in row if name.startswith("n_")} == {
        "n_annotated": 5,
        "n_cases": 4,
        "n_present": 3,
        "n_missed": 1,
        "n_false_positive": 1,
        "n_empty_agreed": 1,
        "n_hd95": 2,
        "n_lesions": 3,
        "n_lesions_predicted": 3,
    }
    assert all(result["per_lesion"][LESIONS[1].key][score] is None for score in LESION_SCORES)
    assert result["macro"]["n_lesions_dice"] == 1 and result["macro"]["dice"] == row["dice"]


@pytest.mark.parametrize(("both", "is_hit"), [(15, 1), (10, 1), (9, 0)])
def test_a_case_is_hit_from_a_dice_of_a_tenth_on(both: int, is_hit: int) -> None:
    result = score_lesions([[case(both, 100, 100), *[None] * 4]])
    assert result["per_lesion"][LESIONS[0].key]["hit_rate"] == is_hit


def test_intervals_of_lesions_hold_what_was_measured() -> None:
    rng = np.random.default_rng(0)
    rows: list[list[LesionComparison | None]] = []
    for _ in range(60):
        masks = [ndimage.gaussian_filter(rng.random((6, 6, 6)), 1) > 0.5 for _ in range(2)]
        truth = masks[1] & (rng.random() < 0.7)
        one = compare_lesion_masks(masks[0] | truth, truth, ONE)
        rows.append([one if rng.random() < 0.7 else None for _ in range(N_LESIONS)])
    weights = draw_patient_weights([f"p{i}" for i in range(60)], 200)
    plain, result = score_lesions(rows), score_lesions(rows, weights)
    for key, row in result["per_lesion"].items():
        assert {name: value for name, value in row.items() if name != "ci95"} == plain[
            "per_lesion"
        ][key]
        for score in LESION_SCORES:
            low, high = row["ci95"][score]
            assert low <= row[score] <= high
            assert low < high or row[score] == 1
    for score in LESION_SCORES:
        low, high = result["macro"]["ci95"][score]
        assert low <= result["macro"][score] <= high
        # The mean of five lesions is surer than one of them.
        assert high - low <= np.mean(
            [row["ci95"][score][1] - row["ci95"][score][0] for row in result["per_lesion"].values()]
        )


def test_grounding_figures_follow_the_definitions_of_the_leaderboard() -> None:
    """Three findings of two scans, one hit, one touched and one missed; a fourth is not there."""

    def finding(
        both: int, predicted: int, truth: int, parts_predicted: int, parts_true: int, matched: int
    ) -> LesionComparison:
        counts = (parts_predicted, parts_true, 0, matched)
        return LesionComparison(both, predicted, truth, None, None, *counts, 0.0)

    hit, touched = finding(40, 50, 50, 2, 1, 1), finding(1, 30, 20, 1, 1, 0)
    missed, absent = finding(0, 0, 10, 0, 2, 0), finding(0, 99, 0, 5, 0, 0)
    cases = [[hit, touched, absent, None, None], [missed, None, None, None, None]]
    scores = score_grounding(cases, np.array([[2.0, 0.0], [0.0, 2.0]]))
    assert scores is not None
    assert scores["dice"] == pytest.approx((0.8 + 0.04) / 3)
    assert scores["hit_rate"] == pytest.approx(1 / 3)
    precision, recall = scores["instance_precision"], scores["instance_recall"]
    assert (precision, recall) == (pytest.approx(1 / 3), pytest.approx(1 / 4))
    assert scores["instance_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert (scores["n_findings"], scores["n_scans"]) == (3, 2)
    assert scores["ci95"]["dice"] == pytest.approx(np.percentile([0.42, 0.0], [2.5, 97.5]))
    assert score_grounding([[absent, None, None, None, None]]) is None
