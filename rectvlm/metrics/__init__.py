"""Metrics on plain arrays and strings: findings, lesions, reports.

Their definitions are in `docs/evaluation.md` and `docs/report-metrics.md`.
"""

from rectvlm.metrics.bootstrap import draw_patient_weights
from rectvlm.metrics.findings import FindingThresholds, fit_thresholds, score_findings
from rectvlm.metrics.lesion_overlap import count_lesion_voxels, score_lesion_overlap
from rectvlm.metrics.lesions import LesionComparison, compare_lesion_masks, score_lesions
from rectvlm.metrics.reports import (
    ReportStatistics,
    compute_report_statistics,
    headline_scores,
    score_reports,
    summarize_reports,
)

__all__ = [
    "FindingThresholds",
    "LesionComparison",
    "ReportStatistics",
    "compare_lesion_masks",
    "compute_report_statistics",
    "count_lesion_voxels",
    "draw_patient_weights",
    "fit_thresholds",
    "headline_scores",
    "score_findings",
    "score_lesion_overlap",
    "score_lesions",
    "score_reports",
    "summarize_reports",
]
