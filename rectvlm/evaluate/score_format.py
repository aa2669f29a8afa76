"""Scores as text, with their intervals, and tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BASELINE_NAMES = {
    "table": "classifier and table",
    "prevalence": "prevalence",
    "nearest": "nearest report",
}
"""Names of the reports' baselines in tables, by key in `metrics.json`."""
FINDING_SCORE_NAMES = {
    "auroc": "AUROC",
    "average_precision": "AP",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "ece": "ECE",
    "brier": "Brier",
}


def format_score(value: float | None) -> str:
    """Three decimals; a dash where there is no value."""
    return "–" if value is None else f"{value:.3f}"


def format_interval(row: Mapping[str, Any], score: str) -> str:
    """The 95% interval of a score in brackets; empty where there is none."""
    bounds = row.get("ci95", {}).get(score)
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""


def format_with_interval(row: Mapping[str, Any], score: str) -> str:
    """A score with its 95% interval, where there is one."""
    return f"{format_score(row[score])} {format_interval(row, score)}".strip()


def render_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a table in Markdown; all columns but the first are aligned to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" + "---:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *lines])
