"""Agreement of predicted and true lesions in mm.

A lesion that was not annotated in a case counts nowhere. A lesion's mask may have several
components: voxels that touch each other at a face, an edge or a corner (26 neighbours). In the
names of scores and fields, "lesion", "instance" and "part" stand for a component.

Shapes: N cases, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse.csgraph import maximum_bipartite_matching

from rectvlm.labels import LESIONS, N_LESIONS, Lesion
from rectvlm.metrics import bootstrap, surface_distances
from rectvlm.metrics.arrays import BoolArray, FloatArray, divide_or_nan
from rectvlm.metrics.bootstrap import ResampleWeights, percentile_interval
from rectvlm.types import JsonObject

HIT_DICE = 0.1
"""Smallest Dice of a case that is a hit: the Global HIT Rate of ReXGroundingCT's leaderboard."""
MATCH_DICE = 0.2
"""Smallest Dice of a predicted and a true component that are the same lesion.

The instance metrics of ReXGroundingCT's leaderboard use it.
"""
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
    "false_positive_ml",
)

GROUNDING_SCORES = {
    "dice": "dice_where_present",
    "hit_rate": "hit_rate",
    "instance_precision": "instance_precision",
    "instance_recall": "instance_recall",
    "instance_f1": "instance_f1",
}
"""Figures of `score_grounding`, and the scores of `LESION_SCORES` that they are."""

_NEIGHBORS_26 = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class LesionComparison:
    """All that the figures need of one annotated lesion of one case, on the native grid."""

    both: int
    """Voxels in the intersection."""
    predicted: int
    """Voxels in the prediction."""
    truth: int
    """Voxels in the truth."""
    hd95_mm: float | None
    """95th percentile of the Hausdorff distance, mm; None where prediction or truth is empty."""
    surface_dice: float | None
    """Surface Dice; None where both are empty."""
    parts_predicted: int
    """Components of the prediction."""
    parts_true: int
    """Components of the truth."""
    parts_touched: int
    """Components of the truth of which the prediction has a voxel."""
    parts_matched: int
    """Pairs of components with a Dice of at least `MATCH_DICE`, each in one pair at most."""
    predicted_ml: float
    """Volume of the prediction, ml."""


@dataclass(frozen=True)
class _LesionSamples:
    """Scores of one lesion, and each score in each resample."""

    scores: JsonObject
    by_resample: dict[str, FloatArray]
    """Values by score, (R,); empty without resamples."""


def compare_lesion_masks(
    predicted: BoolArray,
    truth: BoolArray,
    spacing_mm: Sequence[float],
    tolerance_mm: float = surface_distances.SURFACE_TOLERANCE_MM,
) -> LesionComparison:
    """Compare one lesion of one case.

    Work and memory follow the box around both masks, not the volume.

    Args:
        predicted: predicted mask, (I, J, K), bool.
        truth: true mask, (I, J, K), bool.
        spacing_mm: voxel spacing along each axis, mm.
        tolerance_mm: tolerance of the surface Dice, mm.
    """
    assert predicted.shape == truth.shape and predicted.dtype == truth.dtype == np.bool_
    boxes = ndimage.find_objects((predicted | truth).view(np.uint8))
    if not boxes:
        return LesionComparison(0, 0, 0, None, None, 0, 0, 0, 0, 0.0)

    # One voxel of margin: a surface at the edge of the box is one in the volume too.
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in boxes[0])
    predicted, truth = predicted[box], truth[box]
    n_predicted, n_true, n_touched, n_matched = _count_components(predicted, truth)
    return LesionComparison(
        both=int(np.count_nonzero(predicted & truth)),
        predicted=int(np.count_nonzero(predicted)),
        truth=int(np.count_nonzero(truth)),
        hd95_mm=surface_distances.hd95(predicted, truth, spacing_mm),
        surface_dice=surface_distances.surface_dice(predicted, truth, spacing_mm, tolerance_mm),
        parts_predicted=n_predicted,
        parts_true=n_true,
        parts_touched=n_touched,
        parts_matched=n_matched,
        predicted_ml=float(np.count_nonzero(predicted) * np.prod(spacing_mm) / 1000),
    )


def _count_components(predicted: BoolArray, truth: BoolArray) -> tuple[int, int, int, int]:
    """Count components: predicted, true, true ones that are touched, and pairs that match.

    The largest number of pairs is taken (Hopcroft & Karp 1973). MONAI's `compute_panoptic_quality`
    counts the same and keeps a whole mask for each component, which a prediction of a thousand
    specks does not allow.
    """
    predicted_labels, n_predicted = ndimage.label(predicted, structure=_NEIGHBORS_26)
    true_labels, n_true = ndimage.label(truth, structure=_NEIGHBORS_26)
    overlap = predicted & truth
    shape = (n_true + 1, n_predicted + 1)
    pairs = (true_labels[overlap], predicted_labels[overlap])
    # Adding up repeated entries counts the voxels that a pair of components has in common.
    common = sparse.coo_array((np.ones(int(overlap.sum())), pairs), shape).tocsr().tocoo()
    n_touched = len(np.unique(common.row))

    true_sizes = np.bincount(true_labels.ravel())[common.row]
    predicted_sizes = np.bincount(predicted_labels.ravel())[common.col]
    is_match = 2 * common.data >= MATCH_DICE * (true_sizes + predicted_sizes)
    if not is_match.any():
        return n_predicted, n_true, n_touched, 0
    edges = (common.row[is_match], common.col[is_match])
    graph = sparse.csr_array((np.ones(int(is_match.sum())), edges), shape)
    partners = maximum_bipartite_matching(graph, perm_type="column")
    return n_predicted, n_true, n_touched, int((partners >= 0).sum())


def score_lesions(
    cases: Sequence[Sequence[LesionComparison | None]], weights: ResampleWeights | None = None
) -> JsonObject:
    """Score each lesion over the cases in which it was annotated, with macro means.

    Dice = 2|P ∩ T| / (|P| + |T|) and IoU = |P ∩ T| / |P ∪ T| on the native grid, averaged over
    cases. A case where truth and prediction are both empty has no Dice: it is counted in
    `n_empty_agreed` and not averaged. A prediction on an empty truth has Dice 0 and is counted in
    `n_false_positive`; a true lesion that the prediction does not touch has Dice 0 and is counted
    in `n_missed`. `false_positive_ml` is the mean volume predicted in the cases with an empty
    truth, `max_false_positive_ml` the largest. The other scores are defined in
    `docs/concepts/evaluation.md`.

    Args:
        cases: five lesions of each case, None where a lesion was not annotated.
        weights: resamples of `bootstrap.draw_patient_weights`, (R, N), which add 95% intervals,
            `ci95`.

    Returns:
        `n_cases`, `macro` and `per_lesion`, as in `metrics.json`.
    """
    assert all(len(row) == N_LESIONS for row in cases)
    if weights is not None and not len(weights):
        weights = None
    samples: dict[str, _LesionSamples] = {}
    for lesion in LESIONS:
        numbers, comparisons = _select_annotated(cases, lesion)
        case_weights = None if weights is None else weights[:, numbers]
        samples[lesion.key] = _score_lesion(comparisons, case_weights)

    macro: JsonObject = {}
    for score in LESION_SCORES:
        scored = [lesion for lesion in samples.values() if lesion.scores[score] is not None]
        values = [lesion.scores[score] for lesion in scored]
        macro[score] = float(np.mean(values)) if values else None
        macro[f"n_lesions_{score}"] = len(values)
        if values and weights is not None:
            means = _mean_over_lesions([lesion.by_resample[score] for lesion in scored])
            macro.setdefault("ci95", {})[score] = percentile_interval(means)
    per_lesion = {key: lesion.scores for key, lesion in samples.items()}
    return {"n_cases": len(cases), "macro": macro, "per_lesion": per_lesion}


def resample_lesion_scores(
    cases: Sequence[Sequence[LesionComparison | None]], weights: ResampleWeights
) -> dict[str, dict[str, FloatArray]]:
    """Each score of each lesion in each resample, and of the mean over lesions, `macro`.

    Args:
        cases: five lesions of each case, None where a lesion was not annotated.
        weights: how often each case counts in each resample, (R, N).

    Returns:
        Arrays (R,) by lesion key or `macro`, and score; NaN where a resample has no value.
    """
    samples: dict[str, dict[str, FloatArray]] = {}
    for lesion in LESIONS:
        numbers, comparisons = _select_annotated(cases, lesion)
        samples[lesion.key] = _resample_ratios(comparisons, weights[:, numbers])
    macro = {}
    for score in LESION_SCORES:
        macro[score] = _mean_over_lesions([samples[lesion.key][score] for lesion in LESIONS])
    return samples | {"macro": macro}


def score_grounding(
    cases: Sequence[Sequence[LesionComparison | None]], weights: ResampleWeights | None = None
) -> JsonObject | None:
    """Score true lesions of all kinds together, as ReXGroundingCT's leaderboard scores findings.

    There (https://rexrank.ai/ReXGroundingCT) Global Dice is the mean Dice of all findings of all
    cases; Global HIT Rate the share of findings with a Dice of at least 0.1; and with instances of
    a Dice of at least 0.2 as true positives, instance precision is TP / (TP + FP), recall
    TP / (TP + FN), F1 their harmonic mean. Here instances are pooled over findings, which that page
    leaves open. A finding there is a sentence of the report; here it is a kind of lesion in a scan,
    the union of its sentences, because the model outlines kinds. The two are the same only where a
    report has one sentence of a kind.

    Args:
        cases: five lesions of each case, None where one is not compared; one without a true voxel
            is no finding.
        weights: resamples of the cases, (R, N), which add 95% intervals, `ci95`.

    Returns:
        Figures, `n_findings` and `n_scans`; None without a true lesion.
    """
    numbers, comparisons = _select_true_lesions(cases)
    if not comparisons:
        return None
    if weights is not None and not len(weights):
        weights = None
    finding_weights = None if weights is None else weights[:, numbers]
    samples = _score_lesion(comparisons, finding_weights)
    scores: JsonObject = {name: samples.scores[score] for name, score in GROUNDING_SCORES.items()}
    if finding_weights is not None:
        intervals = samples.scores["ci95"]
        known = [name for name in GROUNDING_SCORES if scores[name] is not None]
        scores["ci95"] = {name: intervals[GROUNDING_SCORES[name]] for name in known}
    return scores | {"n_findings": len(comparisons), "n_scans": len(set(numbers))}


def resample_grounding_scores(
    cases: Sequence[Sequence[LesionComparison | None]], weights: ResampleWeights
) -> dict[str, FloatArray]:
    """Each score of `score_grounding` in each resample, (R,); NaN where one has no value.

    Args:
        cases: as for `score_grounding`.
        weights: how often each case counts in each resample, (R, N).
    """
    numbers, comparisons = _select_true_lesions(cases)
    samples = _resample_ratios(comparisons, weights[:, numbers])
    return {name: samples[score] for name, score in GROUNDING_SCORES.items()}


def _select_true_lesions(
    cases: Sequence[Sequence[LesionComparison | None]],
) -> tuple[list[int], list[LesionComparison]]:
    """Comparisons of all kinds that have a true voxel, with the number of the case of each."""
    numbers, comparisons = [], []
    for number, row in enumerate(cases):
        for comparison in row:
            if comparison is not None and comparison.truth:
                numbers.append(number)
                comparisons.append(comparison)
    return numbers, comparisons


def _select_annotated(
    cases: Sequence[Sequence[LesionComparison | None]], lesion: Lesion
) -> tuple[list[int], list[LesionComparison]]:
    """Numbers of the cases in which a lesion was annotated, and its comparisons there."""
    numbers, comparisons = [], []
    for number, row in enumerate(cases):
        comparison = row[lesion.bit]
        if comparison is not None:
            numbers.append(number)
            comparisons.append(comparison)
    return numbers, comparisons


def _mean_over_lesions(values_by_lesion: Sequence[FloatArray]) -> FloatArray:
    """Mean of the finite values of each resample, (R,); NaN where there is none."""
    values = np.stack(values_by_lesion)
    is_known = np.isfinite(values)
    return divide_or_nan(np.where(is_known, values, 0).sum(axis=0), is_known.sum(axis=0))


def _score_lesion(
    comparisons: Sequence[LesionComparison], weights: ResampleWeights | None
) -> _LesionSamples:
    """Score one lesion over its annotated cases."""
    both = _column(comparisons, "both")
    predicted, true = _column(comparisons, "predicted"), _column(comparisons, "truth")
    is_scored, is_present = predicted + true > 0, true > 0
    numerators, denominators = _score_ratios(comparisons)

    point = bootstrap.weighted_ratio(np.ones((1, len(comparisons))), numerators, denominators)[0]
    scores: JsonObject = {}
    for score, value in zip(LESION_SCORES, point, strict=True):
        scores[score] = None if np.isnan(value) else float(value)

    by_resample: dict[str, FloatArray] = {}
    if weights is not None:
        by_resample = _resample_ratios(comparisons, weights)
        scored = [score for score in LESION_SCORES if scores[score] is not None]
        scores["ci95"] = {score: percentile_interval(by_resample[score]) for score in scored}
    false_positives_ml = _column(comparisons, "predicted_ml")[~is_present]
    scores |= {
        "max_false_positive_ml": float(false_positives_ml.max())
        if false_positives_ml.size
        else None,
        "n_annotated": len(comparisons),
        "n_cases": int(is_scored.sum()),
        "n_present": int(is_present.sum()),
        "n_missed": int((is_present & (both == 0)).sum()),
        "n_false_positive": int((~is_present & (predicted > 0)).sum()),
        "n_empty_agreed": int((~is_scored).sum()),
        "n_hd95": sum(comparison.hd95_mm is not None for comparison in comparisons),
        "n_lesions": int(_column(comparisons, "parts_true").sum()),
        "n_lesions_predicted": int(_column(comparisons, "parts_predicted").sum()),
    }
    return _LesionSamples(scores, by_resample)


def _resample_ratios(
    comparisons: Sequence[LesionComparison], weights: ResampleWeights
) -> dict[str, FloatArray]:
    """Scores of one lesion in each resample of its annotated cases, (R,)."""
    numerators, denominators = _score_ratios(comparisons)
    chunks = bootstrap.iterate_chunks(weights)
    ratios = [bootstrap.weighted_ratio(chunk, numerators, denominators) for chunk in chunks]
    return dict(zip(LESION_SCORES, np.concatenate(ratios).T, strict=True))


def _score_ratios(comparisons: Sequence[LesionComparison]) -> tuple[FloatArray, FloatArray]:
    """Numerators and denominators of all scores, which are ratios of sums over cases.

    Returns:
        Two arrays (N, number of `LESION_SCORES`).
    """
    both, predicted, true, components_predicted, components_true, touched, matched = (
        _column(comparisons, name)
        for name in (
            "both",
            "predicted",
            "truth",
            "parts_predicted",
            "parts_true",
            "parts_touched",
            "parts_matched",
        )
    )
    is_scored, is_present = predicted + true > 0, true > 0
    size = np.maximum(predicted + true, 1)
    dice, iou = 2 * both / size, both / np.maximum(size - both, 1)
    ratios = {
        "dice": (dice * is_scored, is_scored),
        "iou": (iou * is_scored, is_scored),
        "dice_where_present": (dice * is_present, is_present),
        "hd95_mm": _known_values([comparison.hd95_mm for comparison in comparisons]),
        "surface_dice": _known_values([comparison.surface_dice for comparison in comparisons]),
        "sensitivity": (is_present * both / np.maximum(true, 1), is_present),
        "hit_rate": (is_present & (dice >= HIT_DICE), is_present),
        "lesion_hit_rate": (touched, components_true),
        "instance_precision": (matched, components_predicted),
        "instance_recall": (matched, components_true),
        "instance_f1": (2 * matched, components_predicted + components_true),
        "false_positive_ml": (_column(comparisons, "predicted_ml") * ~is_present, ~is_present),
    }
    ordered = [ratios[score] for score in LESION_SCORES]
    numerators = np.stack([numerator for numerator, _ in ordered], axis=1, dtype=np.float64)
    denominators = np.stack([denominator for _, denominator in ordered], axis=1, dtype=np.float64)
    return numerators, denominators


def _column(comparisons: Sequence[LesionComparison], name: str) -> NDArray[np.float64]:
    """One count of all cases, (N,)."""
    return np.array([getattr(comparison, name) for comparison in comparisons], np.float64)


def _known_values(values: Sequence[float | None]) -> tuple[NDArray[np.float64], BoolArray]:
    """Values and whether they are known, for a mean over the known ones."""
    is_known = np.array([value is not None for value in values], bool)
    return np.array([value or 0.0 for value in values], np.float64), is_known
