"""Metrics of the 18 findings. A label that is not known counts nowhere: not as negative, not in any n."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
)

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics import bootstrap
from rectvlm.metrics.bootstrap import ResampleWeights, percentile_interval
from rectvlm.metrics.calibration import compute_reliability

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]

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
DEFAULT_THRESHOLD = 0.5
"""The threshold of a finding that no data decide."""


@dataclass(frozen=True)
class FindingThresholds:
    """At or above which probability a finding is called present."""

    values: FloatArray
    """(18,)."""
    is_fitted: BoolArray
    """(18,): False where the value is 0.5 because a class was missing in the data."""
    source: str
    """Which data they were fitted on."""
    n_cases: int

    def by_finding(self) -> dict[str, float]:
        """The thresholds by the name of the finding."""
        return {name: float(value) for name, value in zip(FINDINGS, self.values, strict=True)}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.source,
            "n_cases": self.n_cases,
            "not_fitted": [
                name for name, fitted in zip(FINDINGS, self.is_fitted, strict=True) if not fitted
            ],
            "values": self.by_finding(),
        }

    @classmethod
    def all_default(cls, source: str) -> "FindingThresholds":
        """0.5 for every finding."""
        return cls(
            np.full(N_FINDINGS, DEFAULT_THRESHOLD), np.zeros(N_FINDINGS, dtype=bool), source, 0
        )


def fit_thresholds(
    probabilities: FloatArray, labels: FloatArray, known: BoolArray, source: str
) -> FindingThresholds:
    """The threshold of each finding that maximises F1 on the given cases, which must not be the evaluated ones.

    All thresholds between two neighbouring probabilities give the same F1; the middle is taken. Where a finding has no
    known positive or no known negative, the threshold is 0.5 and marked as not fitted.

    Args:
        probabilities: (N, 18).
        labels: (N, 18), 0 or 1; read only where known.
        known: (N, 18).
        source: which data these are, in words.
    """
    _check_arrays(probabilities, labels, known)
    values, fitted = np.full(N_FINDINGS, DEFAULT_THRESHOLD), np.zeros(N_FINDINGS, dtype=bool)
    for i in range(N_FINDINGS):
        truth, scores = labels[known[:, i], i] > 0.5, probabilities[known[:, i], i]
        if truth.all() or not truth.any():
            continue
        precision, recall, cuts = precision_recall_curve(truth, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(np.argmax(f1[:-1]))  # the last point of the curve has no threshold
        below = scores[scores < cuts[best]]
        values[i] = (cuts[best] + below.max()) / 2 if below.size else cuts[best]
        fitted[i] = True
    return FindingThresholds(values, fitted, source, len(probabilities))


def score_findings(
    probabilities: FloatArray,
    labels: FloatArray,
    known: BoolArray,
    thresholds: FloatArray,
    weights: ResampleWeights | None = None,
) -> dict[str, Any]:
    """The scores of each finding, and their macro and weighted means.

    AUROC and average precision are None where the known labels hold one class only; F1, precision and recall are None
    where there is no known positive, and precision is 0 where nothing was predicted; accuracy, ECE and the Brier score
    need a known label. A mean runs over the findings that have the score, and says over how many; `weighted` weights
    each finding by its number of positives.

    Args:
        probabilities: (N, 18).
        labels: (N, 18), 0 or 1; read only where known.
        known: (N, 18).
        thresholds: (18,); present is `probability >= threshold`.
        weights: (R, N) of `resampling.patient_weights`: adds 95% intervals, `ci95`, to each row and each mean.
    """
    _check_arrays(probabilities, labels, known)
    assert thresholds.shape == (N_FINDINGS,)
    per_finding = {
        name: _score_finding(
            probabilities[known[:, i], i], labels[known[:, i], i] > 0.5, float(thresholds[i])
        )
        for i, name in enumerate(FINDINGS)
    }
    result = {
        "n_scans": len(probabilities),
        "macro": _mean_scores(per_finding, weighted=False),
        "weighted": _mean_scores(per_finding, weighted=True),
        "per_finding": per_finding,
    }
    if weights is not None and len(weights):
        _add_intervals(result, _resample_scores(probabilities, labels, known, thresholds, weights))
    return result


def _score_finding(scores: FloatArray, truth: BoolArray, threshold: float) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(FINDING_SCORES)
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
        row["accuracy"] = float(accuracy_score(truth, called))
        row["brier"] = float(brier_score_loss(truth, scores, labels=[False, True]))
        row["ece"] = float(
            compute_reliability(
                np.ones((1, truth.size)), scores, truth
            ).expected_calibration_error()[0]
        )
    return row | {
        "threshold": threshold,
        "n_known": int(truth.size),
        "n_positive": int(truth.sum()),
    }


def _mean_scores(per_finding: dict[str, dict[str, Any]], weighted: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for score in FINDING_SCORES:
        rows = [row for row in per_finding.values() if row[score] is not None]
        weights = np.array([row["n_positive"] if weighted else 1 for row in rows])
        result[score] = (
            float(np.average([row[score] for row in rows], weights=weights))
            if weights.any()
            else None
        )
        result[f"n_findings_{score}"] = len(rows)
    return result


def _resample_scores(
    probabilities: FloatArray,
    labels: FloatArray,
    known: BoolArray,
    thresholds: FloatArray,
    weights: ResampleWeights,
) -> dict[str, FloatArray]:
    """Each score of each finding in each resample, (R, 18), and `positives`; NaN where a resample has no value."""
    names = (*FINDING_SCORES, "positives")
    found = {name: np.full((len(weights), N_FINDINGS), np.nan) for name in names}
    for i in range(N_FINDINGS):
        here = known[:, i]
        scores, truth = probabilities[here, i], labels[here, i] > 0.5
        start = 0
        for some in bootstrap.iterate_chunks(weights[:, here]):
            rows = slice(start, start := start + len(some))
            for name, values in _weighted_scores(some, scores, truth, float(thresholds[i])).items():
                found[name][rows, i] = values
    return found


def _weighted_scores(
    weights: FloatArray, scores: FloatArray, truth: BoolArray, threshold: float
) -> dict[str, FloatArray]:
    """The scores of one finding in each resample (R,)."""
    called = scores >= threshold
    cells = np.stack(
        [called & truth, called, truth, called == truth, np.ones_like(truth)], axis=1
    ).astype(float)
    hits, calls, positives, right, total = (weights @ cells).T
    has_positive = positives > 0

    def over(numerator: FloatArray, denominator: FloatArray, where: BoolArray) -> FloatArray:
        return np.divide(
            numerator,
            denominator,
            out=np.where(where, 0.0, np.nan),
            where=where & (denominator > 0),
        )

    area = bootstrap.auroc(weights, scores, truth)
    return {
        "auroc": area,
        "average_precision": np.where(
            np.isnan(area), np.nan, bootstrap.average_precision(weights, scores, truth)
        ),
        "f1": over(2 * hits, calls + positives, has_positive),
        "precision": over(hits, calls, has_positive),
        "recall": over(hits, positives, has_positive),
        "accuracy": over(right, total, total > 0),
        "ece": compute_reliability(weights, scores, truth).expected_calibration_error(),
        "brier": over(weights @ (scores - truth) ** 2, total, total > 0),
        "positives": positives,
    }


def _add_intervals(result: dict[str, Any], found: dict[str, FloatArray]) -> None:
    """`ci95` in each row of findings and in both means, over the findings that have the score in all cases."""
    for i, row in enumerate(result["per_finding"].values()):
        row["ci95"] = {
            score: percentile_interval(found[score][:, i])
            for score in FINDING_SCORES
            if row[score] is not None
        }
    for kind in ("macro", "weighted"):
        mean = result[kind]
        mean["ci95"] = {}
        for score in FINDING_SCORES:
            used = [
                i for i, row in enumerate(result["per_finding"].values()) if row[score] is not None
            ]
            if mean[score] is not None:
                values = found[score][:, used]
                share = np.isfinite(values) * (
                    found["positives"][:, used] if kind == "weighted" else 1.0
                )
                total = share.sum(axis=1)
                sums = np.where(np.isfinite(values), values, 0) * share
                samples = np.divide(
                    sums.sum(axis=1), total, out=np.full(len(values), np.nan), where=total > 0
                )
                mean["ci95"][score] = percentile_interval(samples)


def _check_arrays(probabilities: FloatArray, labels: FloatArray, known: BoolArray) -> None:
    assert probabilities.ndim == 2 and probabilities.shape[1] == N_FINDINGS, probabilities.shape
    assert probabilities.shape == labels.shape == known.shape, (
        probabilities.shape,
        labels.shape,
        known.shape,
    )
    assert known.dtype == np.bool_ and np.isfinite(probabilities).all()
