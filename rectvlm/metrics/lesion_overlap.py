"""Overlap of predicted and true lesions. A lesion that was not annotated in a case counts nowhere."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import LESIONS, N_LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.types import MaskVolume

BoolArray = NDArray[np.bool_]
CountArray = NDArray[np.int64]


def count_lesion_voxels(predicted: BoolArray, truth: MaskVolume) -> CountArray:
    """Voxels of each lesion in the intersection, the prediction and the truth: all that Dice and IoU need of a case.

    Args:
        predicted: (5, Z, Y, X) bool.
        truth: (Z, Y, X) lesion bits.

    Returns:
        (5, 3) int64: intersection, prediction, truth.
    """
    assert predicted.shape == (N_LESIONS, *truth.shape), (predicted.shape, truth.shape)
    assert predicted.dtype == np.bool_ and truth.dtype == np.uint8
    rows = []
    for lesion in LESIONS:
        present = lesion_mask(truth, lesion)
        found = predicted[lesion.bit]
        rows.append(
            [np.count_nonzero(found & present), np.count_nonzero(found), np.count_nonzero(present)]
        )
    return np.array(rows, dtype=np.int64)


def score_lesion_overlap(counts: CountArray, annotated: BoolArray) -> dict[str, Any]:
    """Dice and IoU of each lesion, averaged over cases, and their macro means.

    Dice = 2|P ∩ T| / (|P| + |T|), IoU = |P ∩ T| / |P ∪ T| on the model's grid, for the cases in which this lesion was
    annotated. A case where truth and prediction are both empty has no Dice: it is counted in `n_empty_agreed` and not
    averaged. A prediction on an empty truth has Dice 0 and is counted in `n_false_positive`; a true lesion that the
    prediction does not touch has Dice 0 and is counted in `n_missed`. `dice_where_present` averages over the cases
    with a true lesion only.

    Args:
        counts: (N, 5, 3) from `lesion_counts`.
        annotated: (N, 5).
    """
    assert counts.shape == (*annotated.shape, 3) and annotated.shape[1:] == (N_LESIONS,), (
        counts.shape,
        annotated.shape,
    )
    per_lesion = {
        lesion.key: _score_overlap(counts[annotated[:, lesion.bit], lesion.bit])
        for lesion in LESIONS
    }
    macro: dict[str, Any] = {}
    for score in ("dice", "iou", "dice_where_present"):
        values = [row[score] for row in per_lesion.values() if row[score] is not None]
        macro[score] = float(np.mean(values)) if values else None
        macro[f"n_lesions_{score}"] = len(values)
    return {"n_cases": len(counts), "macro": macro, "per_lesion": per_lesion}


def _score_overlap(counts: CountArray) -> dict[str, Any]:
    """`counts` (N, 3) of the annotated cases."""
    both, found, present = counts.T
    scored = (found + present) > 0
    total = (found + present)[scored]
    dice, iou = 2 * both[scored] / total, both[scored] / (total - both[scored])
    has_truth = present[scored] > 0
    return {
        "dice": float(dice.mean()) if dice.size else None,
        "iou": float(iou.mean()) if iou.size else None,
        "dice_where_present": float(dice[has_truth].mean()) if has_truth.any() else None,
        "n_annotated": len(counts),
        "n_cases": int(scored.sum()),
        "n_present": int((present > 0).sum()),
        "n_missed": int(((present > 0) & (both == 0)).sum()),
        "n_false_positive": int(((present == 0) & (found > 0)).sum()),
        "n_empty_agreed": int((~scored).sum()),
    }
