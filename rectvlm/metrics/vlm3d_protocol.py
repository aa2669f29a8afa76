"""The evaluation protocol of the VLM3D challenge, so that figures compare with its leaderboard.

Source: `calc_scores.py` and `crg_score.py` of github.com/forithmus/VLM3D-Dockers. Shape: N cases.
"""

import numpy as np
from sklearn.metrics import roc_auc_score

from rectvlm.finding_thresholds import DEFAULT_THRESHOLD
from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics.arrays import BoolArray, CountArray, FloatArray
from rectvlm.metrics.clinical_efficacy import (
    FN,
    FP,
    KNOWN,
    count_confusions,
    crg_score,
    precision_recall_f1,
)
from rectvlm.types import JsonObject

CALL_SCORES = ("f1", "precision", "recall", "accuracy")
PROTOCOL_SCORES = ("auroc", *CALL_SCORES)


def score_by_protocol(
    probabilities: FloatArray, labels: FloatArray, known: BoolArray
) -> JsonObject:
    """Score the findings as the challenge does: calls from a probability of 0.5, plain means.

    Other than in `score_findings`, F1, precision and recall are 0 where there is nothing to divide
    by (`zero_division=0`), and those of a finding without a positive are part of the mean. AUROC is
    None where one class is missing, and left out of its mean. CRG adds the counts of all findings.

    The challenge knows every label. Here a finding counts over its known labels, and one without
    any takes no part.

    Args:
        probabilities: predicted probabilities, (N, 18).
        labels: labels, (N, 18), 0 or 1; read only where known.
        known: whether each label is known, (N, 18).

    Returns:
        `threshold`, `n_findings` of the mean, `macro`, `crg` and `per_finding`.
    """
    assert probabilities.shape == labels.shape == known.shape == (len(labels), N_FINDINGS)
    truth = labels > 0.5
    counts = count_confusions(probabilities >= DEFAULT_THRESHOLD, truth, known).sum(axis=0)
    scores = score_protocol_calls(counts)
    for i, finding in enumerate(FINDINGS):
        rows = known[:, i]
        if rows.any():
            auroc = _auroc(truth[rows, i], probabilities[rows, i])
            scores["per_finding"][finding]["auroc"] = auroc
    scores["macro"]["auroc"] = _mean_score(scores["per_finding"], "auroc")
    return {"threshold": DEFAULT_THRESHOLD} | scores


def score_protocol_calls(counts: CountArray) -> JsonObject:
    """The challenge's figures of called findings: all of `score_by_protocol` but AUROC.

    Args:
        counts: true positives, false positives, false negatives and known labels, (18, 4).
    """
    per_finding: dict[str, JsonObject] = {}
    for finding, row in zip(FINDINGS, counts, strict=True):
        if row[KNOWN]:
            per_finding[finding] = _score_calls(row)
    return {
        "n_findings": len(per_finding),
        "macro": {score: _mean_score(per_finding, score) for score in CALL_SCORES},
        "crg": crg_score(counts.sum(axis=0)),
        "per_finding": per_finding,
    }


def _auroc(truth: BoolArray, probabilities: FloatArray) -> float | None:
    if truth.all() or not truth.any():
        return None
    return float(roc_auc_score(truth, probabilities))


def _score_calls(counts: CountArray) -> JsonObject:
    """Figures from true positives, false positives, false negatives and known labels, (4,)."""
    (precision, recall, f1), n_known = precision_recall_f1(counts[None])[0], counts[KNOWN]
    n_right = n_known - counts[FP] - counts[FN]
    return {
        "f1": float(f1),
        "precision": float(precision),
        "recall": float(recall),
        "accuracy": float(n_right / n_known),
    }


def _mean_score(per_finding: dict[str, JsonObject], score: str) -> float | None:
    values = [row[score] for row in per_finding.values() if row[score] is not None]
    return float(np.mean(values)) if values else None
