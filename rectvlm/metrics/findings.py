"""Metrics of the 18 findings. An unknown label counts nowhere: not as negative, not in any n.

Shapes: N cases, R resamples.
"""

from collections.abc import Mapping

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
)

from rectvlm.finding_thresholds import DEFAULT_THRESHOLD, FindingThresholds
from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics import bootstrap
from rectvlm.metrics.arrays import BoolArray, FloatArray, divide_or_nan
from rectvlm.metrics.bootstrap import ResampleWeights, percentile_interval
from rectvlm.metrics.calibration import compute_reliability
from rectvlm.types import JsonObject

FINDING_SCORES = (
    "auroc",
    "average_precision",
    "f1",
    "precision",
    "recall",
    "accuracy",
    "ece",
    "brier",
)
PREVALENCE_SCORES = ("auroc", "average_precision", "f1")
"""Scores of `score_prevalence`."""


def fit_thresholds(
    probabilities: FloatArray,
    labels: FloatArray,
    known: BoolArray,
    source: str,
    min_cases: int = 1,
) -> FindingThresholds:
    """Fit the threshold of each finding that maximizes F1 on cases that are not evaluated.

    All thresholds between two neighbouring probabilities have the same F1; the middle is taken.
    Where a finding has too few known positives or negatives, the threshold is 0.5 and marked as not
    fitted.

    Args:
        probabilities: predicted probabilities, (N, 18).
        labels: labels, (N, 18), 0 or 1; read only where known.
        known: whether each label is known, (N, 18).
        source: description of these cases.
        min_cases: smallest number of known positives, and of known negatives, that are enough.
    """
    _check_arrays(probabilities, labels, known)
    values = np.full(N_FINDINGS, DEFAULT_THRESHOLD)
    is_fitted = np.zeros(N_FINDINGS, dtype=bool)
    for i in range(N_FINDINGS):
        scores, truth = _select_known(probabilities, labels, known, i)
        positive_count = int(truth.sum())
        if min(positive_count, len(truth) - positive_count) < min_cases:
            continue
        precision, recall, cuts = precision_recall_curve(truth, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(np.argmax(f1[:-1]))  # the last point of the curve has no threshold
        below = scores[scores < cuts[best]]
        values[i] = (cuts[best] + below.max()) / 2 if below.size else cuts[best]
        is_fitted[i] = True
    return FindingThresholds(values, is_fitted, source, len(probabilities))


def score_findings(
    probabilities: FloatArray,
    labels: FloatArray,
    known: BoolArray,
    thresholds: FloatArray,
    weights: ResampleWeights | None = None,
) -> JsonObject:
    """Score each finding, with macro and weighted means.

    AUROC and average precision are None where the known labels hold one class only; F1, precision
    and recall are None where there is no known positive, and precision is 0 where nothing was
    predicted; accuracy, ECE and the Brier score need a known label. A mean runs over the findings
    that have the score, and says over how many; `weighted` weights each finding by its number of
    positives.

    Args:
        probabilities: predicted probabilities, (N, 18).
        labels: labels, (N, 18), 0 or 1; read only where known.
        known: whether each label is known, (N, 18).
        thresholds: thresholds, (18,); a finding is called where `probability >= threshold`.
        weights: resamples of `bootstrap.draw_patient_weights`, (R, N), which add 95% intervals,
            `ci95`, to each finding and each mean.

    Returns:
        `n_scans`, `macro`, `weighted` and `per_finding`, as in `metrics.json`.
    """
    _check_arrays(probabilities, labels, known)
    assert thresholds.shape == (N_FINDINGS,)
    per_finding = {}
    for i, name in enumerate(FINDINGS):
        scores, truth = _select_known(probabilities, labels, known, i)
        per_finding[name] = _score_finding(scores, truth, float(thresholds[i]))
    result = {
        "n_scans": len(probabilities),
        "macro": _mean_scores(per_finding, weighted=False),
        "weighted": _mean_scores(per_finding, weighted=True),
        "per_finding": per_finding,
    }
    if weights is not None and len(weights):
        called = probabilities >= thresholds
        samples = resample_finding_scores(probabilities, labels, known, called, weights)
        _add_intervals(result, samples)
    return result


def _select_known(
    probabilities: FloatArray, labels: FloatArray, known: BoolArray, i: int
) -> tuple[FloatArray, BoolArray]:
    """Probabilities and truth of finding `i` in the cases where its label is known."""
    rows = known[:, i]
    return probabilities[rows, i], labels[rows, i] > 0.5


def _score_finding(scores: FloatArray, truth: BoolArray, threshold: float) -> JsonObject:
    row: JsonObject = dict.fromkeys(FINDING_SCORES)
    called = scores >= threshold
    if truth.any():
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, called, average="binary", zero_division=0.0
        )
        row |= {"f1": float(f1), "precision": float(precision), "recall": float(recall)}
        if not truth.all():
            row["auroc"] = float(roc_auc_score(truth, scores))
            row["average_precision"] = float(average_precision_score(truth, scores))
    if truth.size:
        reliability = compute_reliability(np.ones((1, truth.size)), scores, truth)
        row["accuracy"] = float(accuracy_score(truth, called))
        row["brier"] = float(brier_score_loss(truth, scores, labels=[False, True]))
        row["ece"] = float(reliability.expected_calibration_error()[0])
    row |= {"threshold": threshold, "n_known": int(truth.size), "n_positive": int(truth.sum())}
    return row


def _mean_scores(per_finding: dict[str, JsonObject], weighted: bool) -> JsonObject:
    means: JsonObject = {}
    for score in FINDING_SCORES:
        rows = [row for row in per_finding.values() if row[score] is not None]
        weights = np.array([row["n_positive"] if weighted else 1 for row in rows])
        means[score] = None
        if weights.any():
            means[score] = float(np.average([row[score] for row in rows], weights=weights))
        means[f"n_findings_{score}"] = len(rows)
    return means


def score_prevalence(per_finding: Mapping[str, JsonObject]) -> JsonObject:
    """Scores that need no image: every scan has the same probability, and every finding is called.

    With a share p of positives AUROC is 0.5, average precision p, and F1 2p / (1 + p), the largest
    F1 of calls that are all the same. The means are over the findings that have the score in
    `score_findings`.

    Args:
        per_finding: counts and scores of each finding, as `score_findings` returns them.

    Returns:
        `macro` and `weighted` means of the scores.
    """
    rows: dict[str, JsonObject] = {}
    for name, scores in per_finding.items():
        share = scores["n_positive"] / max(scores["n_known"], 1)
        row: JsonObject = dict.fromkeys(FINDING_SCORES)
        row["n_positive"] = scores["n_positive"]
        floors = {"auroc": 0.5, "average_precision": share, "f1": 2 * share / (1 + share)}
        row |= {score: floor for score, floor in floors.items() if scores[score] is not None}
        rows[name] = row
    means: JsonObject = {}
    for kind in ("macro", "weighted"):
        mean = _mean_scores(rows, weighted=kind == "weighted")
        means[kind] = {score: mean[score] for score in PREVALENCE_SCORES}
    return means


def resample_finding_scores(
    probabilities: FloatArray,
    labels: FloatArray,
    known: BoolArray,
    called: BoolArray,
    weights: ResampleWeights,
    ranks: FloatArray | None = None,
) -> dict[str, FloatArray]:
    """Each score of each finding in each resample, and `positives`, the number of positives.

    Args:
        probabilities: predicted probabilities, (N, 18).
        labels: labels, (N, 18), 0 or 1; read only where known.
        known: whether each label is known, (N, 18).
        called: whether each finding is called present, (N, 18).
        weights: how often each case counts in each resample, (R, N).
        ranks: values that order the cases for AUROC and average precision, (N, 18); by default the
            probabilities.

    Returns:
        Arrays (R, 18) by score; NaN where a resample has no value.
    """
    ranks = probabilities if ranks is None else ranks
    samples = {}
    for score in (*FINDING_SCORES, "positives"):
        samples[score] = np.full((len(weights), N_FINDINGS), np.nan)

    for i in range(N_FINDINGS):
        cases = known[:, i]
        columns = ranks[cases, i], probabilities[cases, i], labels[cases, i] > 0.5, called[cases, i]
        start = 0
        for chunk in bootstrap.iterate_chunks(weights[:, cases]):
            rows = slice(start, start + len(chunk))
            start = rows.stop
            for score, values in _weighted_scores(chunk, *columns).items():
                samples[score][rows, i] = values
    return samples


def _weighted_scores(
    weights: FloatArray,
    ranks: FloatArray,
    probabilities: FloatArray,
    truth: BoolArray,
    called: BoolArray,
) -> dict[str, FloatArray]:
    """The scores of one finding in each resample, (R,)."""
    cells = [called & truth, called, truth, called == truth, np.ones_like(truth)]
    hits, calls, positives, correct, total = (weights @ np.stack(cells, axis=1).astype(float)).T
    has_positive, has_case = positives > 0, total > 0

    auroc = bootstrap.auroc(weights, ranks, truth)
    average_precision = bootstrap.average_precision(weights, ranks, truth)
    squared_errors = weights @ (probabilities - truth) ** 2
    reliability = compute_reliability(weights, probabilities, truth)
    return {
        "auroc": auroc,
        "average_precision": np.where(np.isnan(auroc), np.nan, average_precision),
        "f1": _divide_where(2 * hits, calls + positives, has_positive),
        "precision": _divide_where(hits, calls, has_positive),
        "recall": _divide_where(hits, positives, has_positive),
        "accuracy": _divide_where(correct, total, has_case),
        "ece": reliability.expected_calibration_error(),
        "brier": _divide_where(squared_errors, total, has_case),
        "positives": positives,
    }


def _divide_where(
    numerator: FloatArray, denominator: FloatArray, is_defined: BoolArray
) -> FloatArray:
    """Quotient where the score is defined, 0 there if the denominator is 0; else NaN."""
    quotients = np.where(is_defined, 0.0, np.nan)
    where = is_defined & (denominator > 0)
    return np.divide(numerator, denominator, out=quotients, where=where)


def _add_intervals(result: JsonObject, samples: dict[str, FloatArray]) -> None:
    """Add `ci95` to each finding and to both means, over the findings that have the score."""
    rows = list(result["per_finding"].values())
    for i, row in enumerate(rows):
        scores = [score for score in FINDING_SCORES if row[score] is not None]
        row["ci95"] = {score: percentile_interval(samples[score][:, i]) for score in scores}

    for kind in ("macro", "weighted"):
        mean = result[kind]
        mean["ci95"] = {}
        for score in FINDING_SCORES:
            if mean[score] is None:
                continue
            scored = [i for i, row in enumerate(rows) if row[score] is not None]
            positives = samples["positives"][:, scored] if kind == "weighted" else 1.0
            means = mean_over_findings(samples[score][:, scored], positives)
            mean["ci95"][score] = percentile_interval(means)


def mean_over_findings(values: FloatArray, weights: FloatArray | float) -> FloatArray:
    """Weighted mean of the finite values of each resample, (R,); NaN where there is none.

    Args:
        values: value of each finding, (R, K); NaN where it has none.
        weights: weight of each finding, (R, K), or 1 for the plain mean.
    """
    is_known = np.isfinite(values)
    shares = is_known * weights
    sums = (np.where(is_known, values, 0) * shares).sum(axis=1)
    return divide_or_nan(sums, shares.sum(axis=1))


def _check_arrays(probabilities: FloatArray, labels: FloatArray, known: BoolArray) -> None:
    shapes = probabilities.shape, labels.shape, known.shape
    assert probabilities.shape == labels.shape == known.shape, shapes
    assert probabilities.ndim == 2 and probabilities.shape[1] == N_FINDINGS, shapes
    assert known.dtype == np.bool_ and np.isfinite(probabilities).all()
