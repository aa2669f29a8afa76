"""Metrics on plain arrays and strings: findings, lesions, reports.

Their definitions are in `docs/concepts/evaluation.md` and `docs/concepts/report-metrics.md`.
"""
