"""Overlap of predicted and true lesions in voxels.

A lesion that was not annotated in a case counts nowhere. Shapes: N cases, 5 lesions.
"""

from typing import Any

import numpy as np

from rectvlm.labels import LESIONS, N_LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.metrics.arrays import BoolArray, CountArray
from rectvlm.types import JsonObject, MaskVolume


def count_lesion_voxels(predicted: BoolArray, truth: MaskVolume) -> CountArray:
    """Count the voxels of each lesion, which are all that Dice and IoU need of a case.

    Args:
        predicted: predicted masks, (5, Z, Y, X), bool.
        truth: true lesion bits, (Z, Y, X).

    Returns:
        Voxels in the intersection, the prediction and the truth, (5, 3).
    """
    assert predicted.shape == (N_LESIONS, *truth.shape), (predicted.shape, truth.shape)
    assert predicted.dtype == np.bool_ and truth.dtype == np.uint8
    counts = np.zeros((N_LESIONS, 3), np.int64)
    for lesion in LESIONS:
        predicted_mask, true_mask = predicted[lesion.bit], lesion_mask(truth, lesion)
        masks = predicted_mask & true_mask, predicted_mask, true_mask
        counts[lesion.bit] = [np.count_nonzero(mask) for mask in masks]
    return counts


def score_lesion_overlap(counts: CountArray, annotated: BoolArray) -> JsonObject:
    """Dice and IoU of each lesion, averaged over cases, and their macro means.

    Dice = 2|P ∩ T| / (|P| + |T|), IoU = |P ∩ T| / |P ∪ T| on the model's grid, for the cases in
    which this lesion was annotated. A case where truth and prediction are both empty has no Dice:
    it is counted in `n_empty_agreed` and not averaged. A prediction on an empty truth has Dice 0
    and is counted in `n_false_positive`; a true lesion that the prediction does not touch has Dice
    0 and is counted in `n_missed`. `dice_where_present` averages over the cases with a true lesion
    only.

    Args:
        counts: voxel counts of `count_lesion_voxels`, (N, 5, 3).
        annotated: whether each lesion was annotated, (N, 5).
    """
    assert counts.shape == (*annotated.shape, 3), (counts.shape, annotated.shape)
    assert annotated.shape[1:] == (N_LESIONS,), annotated.shape
    per_lesion = {}
    for lesion in LESIONS:
        annotated_counts = counts[annotated[:, lesion.bit], lesion.bit]
        per_lesion[lesion.key] = _score_overlap(annotated_counts)

    macro: JsonObject = {}
    for score in ("dice", "iou", "dice_where_present"):
        values = [scores[score] for scores in per_lesion.values() if scores[score] is not None]
        macro[score] = _mean_or_none(values)
        macro[f"n_lesions_{score}"] = len(values)
    return {"n_cases": len(counts), "macro": macro, "per_lesion": per_lesion}


def _score_overlap(counts: CountArray) -> JsonObject:
    """Scores of one lesion from the voxel counts of its annotated cases, (N, 3)."""
    both, predicted, true = counts.T
    is_scored = (predicted + true) > 0
    both_scored, total = both[is_scored], (predicted + true)[is_scored]
    dice = 2 * both_scored / total
    iou = both_scored / (total - both_scored)
    return {
        "dice": _mean_or_none(dice),
        "iou": _mean_or_none(iou),
        "dice_where_present": _mean_or_none(dice[true[is_scored] > 0]),
        "n_annotated": len(counts),
        "n_cases": int(is_scored.sum()),
        "n_present": int((true > 0).sum()),
        "n_missed": int(((true > 0) & (both == 0)).sum()),
        "n_false_positive": int(((true == 0) & (predicted > 0)).sum()),
        "n_empty_agreed": int((~is_scored).sum()),
    }


def _mean_or_none(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None
