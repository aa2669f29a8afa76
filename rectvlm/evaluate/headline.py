"""Headline of an evaluation: the main figures of the model beside those of its baselines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rectvlm.evaluate.report_tables import list_report_kinds, name_score
from rectvlm.evaluate.result import EvaluationResult
from rectvlm.evaluate.score_format import (
    BASELINE_NAMES,
    FINDING_SCORE_NAMES,
    format_interval,
    format_score,
)

MODEL = "model"
"""Column of the evaluated model."""
HEADLINE_FINDING_SCORES = ("auroc", "average_precision", "f1")
HEADLINE_LESION_SCORES = {"dice_where_present": "Dice where present", "hit_rate": "hit rate"}
HEADLINE_REPORT_SCORES = (
    "clinical_labels_micro_f1",
    "clinical_labels_macro_f1",
    "clinical_labels_crg",
    "laterality",
    "rare_findings_recall",
    "bleu_4",
)


@dataclass(frozen=True)
class HeadlineFigure:
    """One figure of the model or of a baseline; both fields are empty where there is none."""

    value: str = ""
    interval: str = ""


@dataclass(frozen=True)
class HeadlineRow:
    """A score of the model and of its baselines."""

    name: str
    figures: dict[str, HeadlineFigure]
    """Figures by column."""


def list_headline_columns(result: EvaluationResult) -> list[str]:
    """Columns of the headline: the model, then its baselines."""
    columns = [MODEL, BASELINE_NAMES["prevalence"]]
    if result.reports is None:
        return columns
    names = list(list_report_kinds(result.reports))[1:]
    return columns + [name for name in names if name not in columns]


def list_headline_rows(result: EvaluationResult) -> list[HeadlineRow]:
    """Rows of findings, lesions and reports; a column has no figure where it has no meaning."""
    rows = []
    scores = result.classification
    for score in HEADLINE_FINDING_SCORES:
        figures = {
            MODEL: _make_figure(scores["macro"], score),
            BASELINE_NAMES["prevalence"]: _make_figure(scores["prevalence"]["macro"], score),
        }
        rows.append(HeadlineRow(f"findings: macro {FINDING_SCORE_NAMES[score]}", figures))
    if result.localization is not None:
        macro = result.localization["macro"]
        for score, name in HEADLINE_LESION_SCORES.items():
            rows.append(HeadlineRow(f"lesions: {name}", {MODEL: _make_figure(macro, score)}))
    return rows + (_list_report_rows(result.reports) if result.reports else [])


def _list_report_rows(reports: Mapping[str, Any]) -> list[HeadlineRow]:
    _, *names = list_report_kinds(reports)
    sets = dict(zip([MODEL, *names], list_report_kinds(reports).values(), strict=True))
    rows = []
    for score in HEADLINE_REPORT_SCORES:
        if score not in reports["image"]["scores"]:
            continue
        figures = {}
        for column, kind in sets.items():
            value = format_score(kind["scores"][score])
            figures[column] = HeadlineFigure(value, format_interval(kind, score))
        rows.append(HeadlineRow(f"reports: {name_score(score)}", figures))
    return rows


def _make_figure(row: Mapping[str, Any], score: str) -> HeadlineFigure:
    return HeadlineFigure(format_score(row[score]), format_interval(row, score))
