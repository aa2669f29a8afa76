"""Metrics on plain arrays and strings: findings, lesions, reports. Their definitions are in `docs/evaluation.md`."""

from rectvlm.metrics.classification import Thresholds, classification, fit_thresholds
from rectvlm.metrics.localization import lesion_counts, localization
from rectvlm.metrics.reports import reports

__all__ = ["Thresholds", "classification", "fit_thresholds", "lesion_counts", "localization", "reports"]
