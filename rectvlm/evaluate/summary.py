"""From cases to the figures of an evaluation."""

from collections import Counter
from typing import Any

import numpy as np

from rectvlm import metrics
from rectvlm.evaluate.case_records import LesionRecord
from rectvlm.evaluate.options import LESION_THRESHOLD, EvaluationOptions
from rectvlm.evaluate.scans import ScanResults
from rectvlm.labels import LESIONS, N_LESIONS
from rectvlm.metrics import FindingThresholds, LesionComparison
from rectvlm.metrics.bootstrap import CONFIDENCE_LEVEL, ResampleWeights
from rectvlm.metrics.lesions import HIT_DICE, MATCH_DICE


def draw_resamples(patients: list[str], options: EvaluationOptions) -> ResampleWeights | None:
    """Resamples of the patients; None where there are fewer than two, or none are wanted."""
    if not options.bootstrap or len(set(patients)) < 2:
        return None
    return metrics.draw_patient_weights(patients, options.bootstrap, options.seed)


def describe_bootstrap(options: EvaluationOptions) -> dict[str, Any]:
    """What the intervals are."""
    return {
        "resamples": options.bootstrap,
        "unit": "patient",
        "interval": "percentile",
        "level": CONFIDENCE_LEVEL,
        "seed": options.seed,
    }


def summarize_findings(
    scans: ScanResults, thresholds: FindingThresholds, drawn: ResampleWeights | None
) -> dict[str, Any]:
    """Classification by scan."""
    found = metrics.score_findings(
        scans.probabilities, scans.labels, scans.known, thresholds.values, drawn
    )
    return found | {"n_conflicting_labels": scans.n_conflicting_labels}


def summarize_lesions(
    scans: ScanResults, drawn: ResampleWeights | None, options: EvaluationOptions
) -> dict[str, Any]:
    """Localization by scan, on the native grid; Dice and IoU on the model's grid beside it."""
    rows = scans.select_lesions()
    lost: Counter[str] = Counter()
    native: list[list[LesionComparison | None]] = []
    for row in rows:
        native.append(
            [None if one is None or _is_lost_on_native_grid(one) else one.native for one in row]
        )
        lost.update(
            lesion.key
            for lesion in LESIONS
            if (one := row[lesion.bit]) is not None and _is_lost_on_native_grid(one)
        )
    found = metrics.score_lesions(native, drawn)
    for key, row in found["per_lesion"].items():
        row["n_lost_on_native_grid"] = lost[key]
    counts = np.zeros((len(rows), N_LESIONS, 3), np.int64)
    annotated = np.zeros((len(rows), N_LESIONS), bool)
    for i, some in enumerate(rows):
        for bit, one in enumerate(some):
            if one is not None:
                counts[i, bit], annotated[i, bit] = one.grid, True
    return found | {
        "grid": "native",
        "threshold": LESION_THRESHOLD,
        "surface_tolerance_mm": options.surface_tolerance,
        "hit_dice": HIT_DICE,
        "match_dice": MATCH_DICE,
        "truth": dict(Counter(one.truth for row in rows for one in row if one is not None)),
        "model_grid": metrics.score_lesion_overlap(counts, annotated),
    }


def _is_lost_on_native_grid(one: LesionRecord) -> bool:
    """Whether a true lesion fell between the voxels of a native grid that is coarser than the model's."""
    return one.truth == "shard" and one.native.truth == 0 and one.grid[2] > 0
