"""Prediction on CT files: findings, lesion masks, the report, and a page to look at."""
