"""Clinical efficacy of generated reports: precision, recall and F1 over the 18 findings, and the CRG score.

Everything is computed from the counts of true positives, false positives and false negatives of each finding, so that
cases can be resampled by adding rows.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import FINDINGS, N_FINDINGS

BoolArray = NDArray[np.bool_]
CountArray = NDArray[np.int64]

TP, FP, FN, KNOWN = range(4)


def count_confusions(called: BoolArray, truth: BoolArray, known: BoolArray) -> CountArray:
    """(N, 18, 4): true positives, false positives, false negatives and known labels of each case, 0 or 1.

    Args:
        called: (N, 18), what the generated report says is there.
        truth: (N, 18), read only where known.
        known: (N, 18).
    """
    assert called.shape == truth.shape == known.shape and called.shape[1:] == (N_FINDINGS,), (
        called.shape
    )
    assert called.dtype == truth.dtype == known.dtype == np.bool_
    return np.stack(
        [called & truth & known, called & ~truth & known, ~called & truth & known, known], axis=-1
    ).astype(np.int64)


def score_clinical_efficacy(counts: CountArray) -> dict[str, Any]:
    """Precision, recall and F1 of the findings in generated reports: micro, macro, weighted and of each finding; CRG.

    micro counts all pairs of case and finding together. macro is the plain mean, and weighted the mean by positives,
    over the findings with a known positive (`n_findings`); a finding without one has no F1. Precision is 0 where
    nothing was called.

    Args:
        counts: (N, 18, 4) from `finding_counts`.
    """
    totals = counts.sum(axis=0)
    scores = _precision_recall_f1(totals)
    positives = totals[:, TP] + totals[:, FN]
    per_finding = {
        finding: {
            name: float(scores[i, j]) if positives[i] else None
            for j, name in enumerate(SCORE_NAMES)
        }
        | {
            "n_known": int(totals[i, KNOWN]),
            "n_positive": int(positives[i]),
            "n_called": int(totals[i, :2].sum()),
        }
        for i, finding in enumerate(FINDINGS)
    }
    has = positives > 0
    whole = totals.sum(axis=0)
    return {
        "n_cases": int((counts[:, :, KNOWN].sum(axis=1) > 0).sum()),
        "n_labels": int(whole[KNOWN]),
        "n_positive": int(positives.sum()),
        "n_findings": int(has.sum()),
        "micro": _name_scores(_precision_recall_f1(whole[None])[0])
        if has.any()
        else _name_scores(None),
        "macro": _name_scores(scores[has].mean(axis=0)) if has.any() else _name_scores(None),
        "weighted": _name_scores(np.average(scores[has], axis=0, weights=positives[has]))
        if has.any()
        else _name_scores(None),
        "crg": crg_score(whole),
        "per_finding": per_finding,
    }


SCORE_NAMES = ("precision", "recall", "f1")


def _precision_recall_f1(totals: CountArray) -> NDArray[np.float64]:
    """(M, 4) counts as (M, 3) precision, recall, F1; 0 where undefined."""
    tp, fp, fn = totals[:, TP], totals[:, FP], totals[:, FN]
    return np.stack(
        [
            _ratio_or_zero(tp, tp + fp),
            _ratio_or_zero(tp, tp + fn),
            _ratio_or_zero(2 * tp, 2 * tp + fp + fn),
        ],
        axis=1,
    )


def _ratio_or_zero(part: CountArray, whole: CountArray) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _name_scores(row: NDArray[np.float64] | None) -> dict[str, float | None]:
    return {name: None if row is None else float(row[i]) for i, name in enumerate(SCORE_NAMES)}


def crg_score(totals: CountArray) -> float | None:
    """The CRG score (Hamamci et al., MIDL 2025, arXiv 2505.17167) from summed counts.

    Of X known labels A are positive. A hit is worth w = (X − A) / 2A, a miss costs w, a false alarm costs 1, so that
    s = w·TP − w·FN − FP is at most U = A·w, and CRG = U / (2U − s): 1 when all is right, 1/3 both when nothing and
    when everything is called, 0.2 when all is wrong. None where no label is positive, or all are.

    Args:
        totals: (4,) true positives, false positives, false negatives, known labels.
    """
    positives, known = int(totals[TP] + totals[FN]), int(totals[KNOWN])
    if positives in (0, known):
        return None
    weight = (known - positives) / (2 * positives)
    most = positives * weight
    score = weight * int(totals[TP]) - weight * int(totals[FN]) - int(totals[FP])
    return most / (2 * most - score)
