"""Metrics on plain arrays and strings: findings, lesions, reports.

Their definitions are in `docs/evaluation.md` and `docs/report-metrics.md`.
"""
