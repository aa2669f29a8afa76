"""Agreement of predicted and true lesions in mm. A lesion that was not annotated in a case counts nowhere."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse.csgraph import maximum_bipartite_matching

from rectvlm.labels import LESIONS, N_LESIONS
from rectvlm.metrics import bootstrap, surface_distances
from rectvlm.metrics.bootstrap import ResampleWeights, percentile_interval

BoolArray = NDArray[np.bool_]

HIT_DICE = 0.1
"""A case whose Dice reaches it counts as a hit: the Global HIT Rate of ReXGroundingCT's leaderboard."""
MATCH_DICE = 0.2
"""A predicted and a true part that reach it are one lesion: the instance metrics of ReXGroundingCT's leaderboard."""
LESION_SCORES = (
    "dice",
    "iou",
    "dice_where_present",
    "hd95_mm",
    "surface_dice",
    "sensitivity",
    "hit_rate",
    "lesion_hit_rate",
    "instance_precision",
    "instance_recall",
    "instance_f1",
)
_NEIGHBORS_26 = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class LesionComparison:
    """One lesion of one annotated case: all that its figures need. Voxels and parts are of the native grid."""

    both: int
    """Voxels in the intersection."""
    predicted: int
    truth: int
    hd95_mm: float | None
    """None where prediction or truth is empty."""
    surface_dice: float | None
    """None where both are empty."""
    parts_predicted: int
    """Connected parts (26 neighbours)."""
    parts_true: int
    parts_touched: int
    """True parts of which the prediction has a voxel."""
    parts_matched: int
    """Pairs of parts with a Dice of at least `MATCH_DICE`, each part in one pair at most."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_lesion_masks(
    predicted: BoolArray,
    truth: BoolArray,
    spacing_mm: Sequence[float],
    tolerance_mm: float = surface_distances.SURFACE_TOLERANCE_MM,
) -> LesionComparison:
    """Compare one lesion of one case.

    Work and memory follow the box around both masks, not the volume.

    Args:
        predicted: (I, J, K) bool.
        truth: (I, J, K) bool.
        spacing: mm along each axis.
        tolerance: of the surface Dice, mm.
    """
    assert predicted.shape == truth.shape and predicted.dtype == truth.dtype == np.bool_
    where = ndimage.find_objects((predicted | truth).view(np.uint8))
    if where:
        # One voxel of room: a surface at the edge of the box is one in the volume too.
        room = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in where[0])
        predicted, truth = predicted[room], truth[room]
    both, found, present = (
        int(np.count_nonzero(mask)) for mask in (predicted & truth, predicted, truth)
    )
    parts = _count_components(predicted, truth) if where else (0, 0, 0, 0)
    return LesionComparison(
        both,
        found,
        present,
        surface_distances.hd95(predicted, truth, spacing_mm) if where else None,
        surface_distances.surface_dice(predicted, truth, spacing_mm, tolerance_mm)
        if where
        else None,
        *parts,
    )


def _count_components(predicted: BoolArray, truth: BoolArray) -> tuple[int, int, int, int]:
    """Connected parts: predicted, true, true ones that are touched, and pairs that match.

    The largest number of pairs is taken (Hopcroft & Karp 1973). MONAI's `compute_panoptic_quality` counts the same and
    keeps a whole mask for each part, which a prediction of a thousand specks does not allow.
    """
    found, n_found = ndimage.label(predicted, structure=_NEIGHBORS_26)
    present, n_present = ndimage.label(truth, structure=_NEIGHBORS_26)
    overlap = predicted & truth
    shape = (n_present + 1, n_found + 1)
    # Adding up repeated entries counts the voxels that a pair of parts has in common.
    common = (
        sparse.coo_array((np.ones(int(overlap.sum())), (present[overlap], found[overlap])), shape)
        .tocsr()
        .tocoo()
    )
    touched = len(np.unique(common.row))
    sizes = np.bincount(present.ravel())[common.row] + np.bincount(found.ravel())[common.col]
    match = 2 * common.data >= MATCH_DICE * sizes
    graph = sparse.csr_array(
        (np.ones(int(match.sum())), (common.row[match], common.col[match])), shape
    )
    matched = (
        int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())
        if match.any()
        else 0
    )
    return n_found, n_present, touched, matched


def score_lesions(
    cases: Sequence[Sequence[LesionComparison | None]], weights: ResampleWeights | None = None
) -> dict[str, Any]:
    """Scores of each lesion over the cases in which it was annotated, and their macro means.

    Dice = 2|P ∩ T| / (|P| + |T|) and IoU = |P ∩ T| / |P ∪ T| on the native grid, averaged over cases. A case where
    truth and prediction are both empty has no Dice: it is counted in `n_empty_agreed` and not averaged. A prediction on
    an empty truth has Dice 0 and is counted in `n_false_positive`; a true lesion that the prediction does not touch has
    Dice 0 and is counted in `n_missed`. The other scores are defined in `docs/evaluation.md`.

    Args:
        cases: of each case, its five lesions; None where a lesion was not annotated.
        weights: (R, N) of `resampling.patient_weights`: adds 95% intervals, `ci95`.
    """
    assert all(len(row) == N_LESIONS for row in cases)
    per_lesion: dict[str, Any] = {}
    samples: dict[str, dict[str, NDArray[np.floating[Any]]]] = {}
    for lesion in LESIONS:
        numbers = [i for i, row in enumerate(cases) if row[lesion.bit] is not None]
        rows = [case for row in cases if (case := row[lesion.bit]) is not None]
        some = None if weights is None or not len(weights) else weights[:, numbers]
        per_lesion[lesion.key], samples[lesion.key] = _score_lesion(rows, some)
    macro: dict[str, Any] = {}
    for score in LESION_SCORES:
        keys = [key for key, row in per_lesion.items() if row[score] is not None]
        macro[score] = float(np.mean([per_lesion[key][score] for key in keys])) if keys else None
        macro[f"n_lesions_{score}"] = len(keys)
        if keys and weights is not None and len(weights):
            drawn = np.stack([samples[key][score] for key in keys])
            known = np.isfinite(drawn)
            total = np.where(known, drawn, 0).sum(axis=0)
            means = np.divide(
                total, known.sum(axis=0), out=np.full(len(total), np.nan), where=known.any(axis=0)
            )
            macro.setdefault("ci95", {})[score] = percentile_interval(means)
    return {"n_cases": len(cases), "macro": macro, "per_lesion": per_lesion}


def _score_lesion(
    cases: Sequence[LesionComparison], weights: ResampleWeights | None
) -> tuple[dict[str, Any], dict[str, NDArray[np.floating[Any]]]]:
    """The row of one lesion, and each score in each resample (R,)."""
    columns = (
        "both",
        "predicted",
        "truth",
        "parts_predicted",
        "parts_true",
        "parts_touched",
        "parts_matched",
    )
    table = np.array(
        [[getattr(case, name) for name in columns] for case in cases], np.float64
    ).reshape(-1, 7)
    both, found, present, parts_found, parts_true, touched, matched = table.T
    scored, has_truth = found + present > 0, present > 0
    size = np.maximum(found + present, 1)
    dice, iou = 2 * both / size, both / np.maximum(size - both, 1)
    distance, surface = (
        _known_values([getattr(case, name) for case in cases])
        for name in ("hd95_mm", "surface_dice")
    )
    ratios = {
        "dice": (dice * scored, scored),
        "iou": (iou * scored, scored),
        "dice_where_present": (dice * has_truth, has_truth),
        "hd95_mm": distance,
        "surface_dice": surface,
        "sensitivity": (has_truth * both / np.maximum(present, 1), has_truth),
        "hit_rate": (has_truth & (dice >= HIT_DICE), has_truth),
        "lesion_hit_rate": (touched, parts_true),
        "instance_precision": (matched, parts_found),
        "instance_recall": (matched, parts_true),
        "instance_f1": (2 * matched, parts_found + parts_true),
    }
    assert ratios.keys() == set(LESION_SCORES)
    tops = np.stack([np.asarray(top, np.float64) for top, _ in ratios.values()], axis=1)
    bottoms = np.stack([np.asarray(bottom, np.float64) for _, bottom in ratios.values()], axis=1)
    point = bootstrap.weighted_ratio(np.ones((1, len(cases))), tops, bottoms)[0]
    row: dict[str, Any] = {
        score: None if np.isnan(value) else float(value)
        for score, value in zip(ratios, point, strict=True)
    }
    drawn: dict[str, NDArray[np.floating[Any]]] = {}
    if weights is not None:
        values = np.concatenate(
            [
                bootstrap.weighted_ratio(some, tops, bottoms)
                for some in bootstrap.iterate_chunks(weights)
            ]
        )
        drawn = dict(zip(ratios, values.T, strict=True))
        row["ci95"] = {
            score: percentile_interval(drawn[score])
            for score in LESION_SCORES
            if row[score] is not None
        }
    row |= {
        "n_annotated": len(cases),
        "n_cases": int(scored.sum()),
        "n_present": int(has_truth.sum()),
        "n_missed": int((has_truth & (both == 0)).sum()),
        "n_false_positive": int((~has_truth & (found > 0)).sum()),
        "n_empty_agreed": int((~scored).sum()),
        "n_hd95": int(distance[1].sum()),
        "n_lesions": int(parts_true.sum()),
        "n_lesions_predicted": int(parts_found.sum()),
    }
    return row, drawn


def _known_values(found: Sequence[float | None]) -> tuple[NDArray[np.float64], BoolArray]:
    """Values and whether they are known, for a mean over those that are."""
    known = np.array([value is not None for value in found], bool)
    return np.array([value or 0.0 for value in found], np.float64), known
