"""Metrics on plain arrays and strings: findings, lesions, reports.

Their definitions are in `docs/evaluation.md` and `docs/report-metrics.md`.
"""

from rectvlm.metrics.classification import Thresholds, classification, fit_thresholds
from rectvlm.metrics.lesions import LesionCase, lesions, measure
from rectvlm.metrics.localization import lesion_counts, localization
from rectvlm.metrics.reports import ReportRows, report_rows, report_scores, reports, summarise
from rectvlm.metrics.resampling import patient_weights

__all__ = [
    "LesionCase",
    "ReportRows",
    "Thresholds",
    "classification",
    "fit_thresholds",
    "lesion_counts",
    "lesions",
    "localization",
    "measure",
    "patient_weights",
    "report_rows",
    "report_scores",
    "reports",
    "summarise",
]
