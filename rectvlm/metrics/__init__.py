"""Metrics on plain arrays and strings: findings, lesions, reports. Their definitions are in `docs/evaluation.md`."""

from rectvlm.metrics.classification import Thresholds, classification, fit_thresholds
from rectvlm.metrics.lesions import LesionCase, lesions, measure
from rectvlm.metrics.localization import lesion_counts, localization
from rectvlm.metrics.reports import reports
from rectvlm.metrics.resampling import patient_weights

__all__ = [
    "LesionCase",
    "Thresholds",
    "classification",
    "fit_thresholds",
    "lesion_counts",
    "lesions",
    "localization",
    "measure",
    "patient_weights",
    "reports",
]
