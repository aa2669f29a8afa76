"""Clinical efficacy of generated reports: precision, recall, F1 over the 18 findings; CRG.

All scores are computed from counts of true positives, false positives, false negatives and known
labels of each finding, so that cases can be resampled by adding rows. Shapes: N cases, F findings:
the 18, or those beyond them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import FINDINGS
from rectvlm.metrics.arrays import BoolArray, CountArray
from rectvlm.types import JsonObject

TP, FP, FN, KNOWN = range(4)
"""Columns of the counts."""
PREVALENCE_GROUPS = ("rare", "middle", "common")
"""Thirds of the findings by prevalence."""
SCORE_NAMES = ("precision", "recall", "f1")


def count_confusions(called: BoolArray, truth: BoolArray, known: BoolArray) -> CountArray:
    """Count the outcomes of each case.

    Args:
        called: findings that the generated report states, (N, F).
        truth: true findings, (N, F), read only where known.
        known: whether each true finding is known, (N, F).

    Returns:
        True positives, false positives, false negatives and known labels, (N, F, 4), 0 or 1.
    """
    assert called.shape == truth.shape == known.shape, (called.shape, truth.shape, known.shape)
    assert called.dtype == truth.dtype == known.dtype == np.bool_
    outcomes = [called & truth & known, called & ~truth & known, ~called & truth & known, known]
    return np.stack(outcomes, axis=-1).astype(np.int64)


def score_clinical_efficacy(counts: CountArray, names: Sequence[str] = FINDINGS) -> JsonObject:
    """Precision, recall and F1: micro, macro, weighted and of each finding; CRG.

    micro counts all pairs of case and finding together. macro is the plain mean, and weighted the
    mean by positives, over the findings with a known positive (`n_findings`); a finding without one
    has no F1. Precision is 0 where nothing was called.

    Args:
        counts: counts of `count_confusions`, (N, F, 4).
        names: names of the findings, F.
    """
    totals = counts.sum(axis=0)
    scores = precision_recall_f1(totals)
    positives = totals[:, TP] + totals[:, FN]
    per_finding: dict[str, JsonObject] = {}
    for i, finding in enumerate(names):
        per_finding[finding] = _name_scores(scores[i] if positives[i] else None) | {
            "n_known": int(totals[i, KNOWN]),
            "n_positive": int(positives[i]),
            "n_called": int(totals[i, TP] + totals[i, FP]),
        }

    has_positive = positives > 0
    all_findings = totals.sum(axis=0)
    micro = macro = weighted = None
    if has_positive.any():
        defined, weights = scores[has_positive], positives[has_positive]
        micro = precision_recall_f1(all_findings[None])[0]
        macro = defined.mean(axis=0)
        weighted = np.average(defined, axis=0, weights=weights)
    return {
        "n_cases": int((counts[:, :, KNOWN].sum(axis=1) > 0).sum()),
        "n_labels": int(all_findings[KNOWN]),
        "n_positive": int(positives.sum()),
        "n_findings": int(has_positive.sum()),
        "micro": _name_scores(micro),
        "macro": _name_scores(macro),
        "weighted": _name_scores(weighted),
        "crg": crg_score(all_findings),
        "per_finding": per_finding,
    }


def group_by_prevalence(counts: CountArray) -> dict[str, list[str]]:
    """The findings with a known positive in thirds by their share of positives, rarest first.

    Args:
        counts: counts of `count_confusions`, (N, 18, 4).
    """
    totals = counts.sum(axis=0)
    positives = totals[:, TP] + totals[:, FN]
    shares = positives / np.maximum(totals[:, KNOWN], 1)
    ordered = [int(i) for i in np.argsort(shares, kind="stable") if positives[i]]
    thirds = np.array_split(np.array(ordered, dtype=np.int64), len(PREVALENCE_GROUPS))
    groups = {}
    for name, numbers in zip(PREVALENCE_GROUPS, thirds, strict=True):
        groups[name] = [FINDINGS[i] for i in numbers]
    return groups


def recall_of(counts: CountArray, findings: Sequence[str]) -> float | None:
    """Share of the true occurrences of some findings that the reports name; None without one.

    Args:
        counts: counts of `count_confusions`, (N, 18, 4).
        findings: names of the findings.
    """
    rows = counts[:, [FINDINGS.index(finding) for finding in findings]]
    n_hit, n_missed = int(rows[..., TP].sum()), int(rows[..., FN].sum())
    return n_hit / (n_hit + n_missed) if n_hit + n_missed else None


def score_prevalence_groups(counts: CountArray, groups: Mapping[str, list[str]]) -> JsonObject:
    """Recall of each group of `group_by_prevalence`, with its findings and their positives.

    Args:
        counts: counts of `count_confusions`, (N, 18, 4).
        groups: findings by group.
    """
    scores: JsonObject = {}
    for name, findings in groups.items():
        rows = counts[:, [FINDINGS.index(finding) for finding in findings]]
        scores[name] = {
            "recall": recall_of(counts, findings),
            "n_positive": int(rows[..., [TP, FN]].sum()),
            "findings": findings,
        }
    return scores


def crg_score(totals: CountArray) -> float | None:
    """The CRG score (Hamamci et al., MIDL 2025, arXiv 2505.17167) from summed counts.

    Of X known labels A are positive. A hit is worth w = (X − A) / 2A, a miss costs w, a false alarm
    costs 1, so that s = w·TP − w·FN − FP is at most U = A·w, and CRG = U / (2U − s): 1 when all is
    right, 1/3 both when nothing and when everything is called, 0.2 when all is wrong. None where no
    label is positive, or all are.

    Args:
        totals: true positives, false positives, false negatives, known labels, (4,).
    """
    positives, known = int(totals[TP] + totals[FN]), int(totals[KNOWN])
    if positives in (0, known):
        return None
    weight = (known - positives) / (2 * positives)
    upper_bound = positives * weight
    score = weight * int(totals[TP]) - weight * int(totals[FN]) - int(totals[FP])
    return upper_bound / (2 * upper_bound - score)


def precision_recall_f1(totals: CountArray) -> NDArray[np.float64]:
    """Precision, recall and F1, (M, 3), of counts (M, 4); 0 where undefined."""
    tp, fp, fn = totals[:, TP], totals[:, FP], totals[:, FN]
    precision = _ratio_or_zero(tp, tp + fp)
    recall = _ratio_or_zero(tp, tp + fn)
    f1 = _ratio_or_zero(2 * tp, 2 * tp + fp + fn)
    return np.stack([precision, recall, f1], axis=1)


def _ratio_or_zero(numerator: CountArray, denominator: CountArray) -> NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)


def _name_scores(scores: NDArray[np.float64] | None) -> dict[str, float | None]:
    if scores is None:
        return dict.fromkeys(SCORE_NAMES)
    return dict(zip(SCORE_NAMES, map(float, scores), strict=True))
