"""From cases to the figures of an evaluation."""

from collections import Counter
from typing import Any

import numpy as np

from rectvlm import metrics
from rectvlm.evaluate.cases import LesionRecord
from rectvlm.evaluate.options import LESION_THRESHOLD, Options
from rectvlm.evaluate.scans import Scans
from rectvlm.labels import LESIONS, N_LESIONS
from rectvlm.metrics import LesionCase, Thresholds
from rectvlm.metrics.lesions import HIT_DICE, MATCH_DICE
from rectvlm.metrics.resampling import LEVEL, Weights


def draw(patients: list[str], options: Options) -> Weights | None:
    """Resamples of the patients; None where there are fewer than two, or none are wanted."""
    if not options.bootstrap or len(set(patients)) < 2:
        return None
    return metrics.patient_weights(patients, options.bootstrap, options.seed)


def bootstrap_facts(options: Options) -> dict[str, Any]:
    """What the intervals are."""
    return {
        "resamples": options.bootstrap,
        "unit": "patient",
        "interval": "percentile",
        "level": LEVEL,
        "seed": options.seed,
    }


def findings(scans: Scans, thresholds: Thresholds, drawn: Weights | None) -> dict[str, Any]:
    """Classification by scan."""
    found = metrics.classification(scans.probabilities, scans.labels, scans.known, thresholds.values, drawn)
    return found | {"n_conflicting_labels": scans.conflicting}


def lesions(scans: Scans, drawn: Weights | None, options: Options) -> dict[str, Any]:
    """Localization by scan, on the native grid; Dice and IoU on the model's grid beside it."""
    rows = scans.lesions()
    lost: Counter[str] = Counter()
    native: list[list[LesionCase | None]] = []
    for row in rows:
        native.append([None if one is None or _is_lost(one) else one.native for one in row])
        lost.update(lesion.key for lesion in LESIONS if (one := row[lesion.bit]) is not None and _is_lost(one))
    found = metrics.lesions(native, drawn)
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
        "model_grid": metrics.localization(counts, annotated),
    }


def _is_lost(one: LesionRecord) -> bool:
    """Whether a true lesion fell between the voxels of a native grid that is coarser than the model's."""
    return one.truth == "shard" and one.native.truth == 0 and one.grid[2] > 0
