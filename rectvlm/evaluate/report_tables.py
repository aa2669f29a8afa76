"""Figures of the reports and their baselines as Markdown and for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from rectvlm.evaluate.report_baselines import BASELINE_NAMES
from rectvlm.evaluate.score_format import (
    FINDING_SCORE_NAMES,
    format_interval,
    format_score,
    format_with_interval,
    render_table,
)
from rectvlm.terminal_tables import FoldingTable

MAIN_REPORT_SCORES = (
    "bleu_1",
    "bleu_4",
    "rouge_l",
    "meteor",
    "cider",
    "bertscore_f1",
    "clinical_labels_micro_f1",
    "clinical_labels_macro_f1",
    "clinical_labels_crg",
    "laterality",
)
"""Scores of the reports in the terminal, and those in which the table is to be beaten."""
DIVERSITY_NAMES = {"distinct_share": "distinct reports, share", "self_bleu_4": "self-BLEU-4"}
"""Names of the figures that compare the reports with each other; they have no intervals."""
REPORT_FINDING_SCORES = ("precision", "recall", "f1")
"""Scores of the findings in the reports."""


def add_report_rows(table: Table, reports: Mapping[str, Any]) -> None:
    """Add the main scores of the reports to the table of the main figures."""
    image, control = reports["image"], reports["image_ablated"]
    for score in MAIN_REPORT_SCORES:
        if score in image["scores"]:
            table.add_row(
                name_score(score),
                format_score(image["scores"][score]),
                format_interval(image, score),
                format_score(control["scores"][score]),
                str(image["n"]),
            )


def render_reports(reports: Mapping[str, Any]) -> str:
    """Render all scores with the image, without it, and their difference."""
    image, control = reports["image"], reports["image_ablated"]
    differences = reports["difference"]
    rows = []
    for score in image["scores"]:
        values = [_format_kind(kind, score) for kind in (image, control)]
        rows.append([name_score(score), *values, _format_difference(differences, score)])
    header = ["", "with the image", "without (air)", "difference"]
    note = (
        f"{image['n']:,} reports. What the control scores was not read from the image. Sides are "
        f"read by the rules in the {image['convention']} convention."
    )
    return f"{render_table(header, rows)}\n\n{note}"


def render_baselines(reports: Mapping[str, Any]) -> str:
    """Render all scores of the baselines, and those of the language model minus each of them."""
    sources = _describe_sources(reports)
    if not reports["baselines"]:
        return sources
    header = ["", *_name_baseline_columns(reports)]
    rows = [_baseline_row(reports, score) for score in reports["image"]["scores"]]
    rows += _diversity_rows(reports)
    return "\n\n".join([describe_table_comparison(reports), render_table(header, rows), sources])


def make_baseline_table(reports: Mapping[str, Any]) -> Table:
    """Make a table of the main scores of the baselines, for the terminal."""
    table = FoldingTable(title="Reports and their baselines", title_justify="left")
    table.add_column("metric", justify="left")
    for column in _name_baseline_columns(reports):
        table.add_column(column, justify="right")
    for score in MAIN_REPORT_SCORES:
        if score in reports["image"]["scores"]:
            table.add_row(*_baseline_row(reports, score))
    for row in _diversity_rows(reports):
        table.add_row(*row)
    return table


def describe_table_comparison(reports: Mapping[str, Any]) -> str:
    """Say in one sentence whether the language model beats the classifier with a table of texts.

    It does in a score whose difference, paired by patient, has a 95% interval above 0.

    Args:
        reports: figures of `evaluate_reports`, with the baseline `table`.
    """
    intervals = reports["baselines"]["table"]["difference"].get("ci95", {})
    bounds_by_score = {}
    for score in MAIN_REPORT_SCORES:
        if intervals.get(score) is not None:
            bounds_by_score[score] = intervals[score]
    if not bounds_by_score:
        return (
            "Whether the language model beats the classifier with a table of texts is unknown: "
            "there are no intervals, which need two patients and resamples (`--bootstrap`)."
        )
    better = [score for score, (low, _) in bounds_by_score.items() if low > 0]
    worse = [score for score, (_, high) in bounds_by_score.items() if high < 0]
    sentence = "The language model beats the classifier with a table of texts in "
    sentence += _join_names(better) or f"none of {len(bounds_by_score)} scores"
    if worse:
        sentence += f"; the table beats it in {_join_names(worse)}"
    return f"{sentence} (95% interval of the difference, paired by patient)."


def name_score(score: str) -> str:
    """Name of a headline score in tables."""
    return score.replace("_", " ")


def _name_baseline_columns(reports: Mapping[str, Any]) -> list[str]:
    columns = ["language model"]
    for name in reports["baselines"]:
        columns += [BASELINE_NAMES[name], "difference"]
    return columns


def _baseline_row(reports: Mapping[str, Any], score: str) -> list[str]:
    """A score of the language model, of each baseline, and their differences."""
    cells = [name_score(score), _format_kind(reports["image"], score)]
    for baseline in reports["baselines"].values():
        cells.append(_format_kind(baseline, score))
        cells.append(_format_difference(baseline["difference"], score))
    return cells


def _diversity_rows(reports: Mapping[str, Any]) -> list[list[str]]:
    """Diversity of the language model's reports, then of each baseline's."""
    rows = []
    for figure, name in DIVERSITY_NAMES.items():
        row = [name, format_score(reports["image"]["diversity"][figure])]
        for baseline in reports["baselines"].values():
            row += [format_score(baseline["diversity"][figure]), ""]
        rows.append(row)
    return rows


def _join_names(scores: Sequence[str]) -> str:
    return ", ".join(map(name_score, scores))


def _format_kind(kind: Mapping[str, Any], score: str) -> str:
    """Headline score of one set of reports, with its interval."""
    return f"{format_score(kind['scores'][score])} {format_interval(kind, score)}".strip()


def _format_difference(differences: Mapping[str, Any], score: str) -> str:
    return format_with_interval(differences, score) if score in differences else "–"


def _describe_sources(reports: Mapping[str, Any]) -> str:
    """Where each baseline takes its reports from, and why one is left out."""
    words = []
    for name, baseline in reports["baselines"].items():
        words.append(f"{BASELINE_NAMES[name]}: {baseline['source']}")
    for name, reason in reports["left_out_baselines"].items():
        words.append(f"{BASELINE_NAMES[name]}: left out, as {reason}")
    diversity = reports["reference_diversity"]
    references = [
        f"{DIVERSITY_NAMES[name]} {format_score(diversity[name])}" for name in DIVERSITY_NAMES
    ]
    return (
        f"Reports of the baselines: {'; '.join(words)}. Of the reference reports: "
        f"{', '.join(references)}."
    )


def render_report_findings(reports: Mapping[str, Any]) -> str:
    """Findings that are read in the reports against the labels, with the image and without."""
    image, control = (reports[kind]["clinical"]["labels"] for kind in ("image", "image_ablated"))
    header = ["finding", "n", "positive", "called", "called, air"]
    for score in REPORT_FINDING_SCORES:
        header += [FINDING_SCORE_NAMES[score], f"{FINDING_SCORE_NAMES[score]}, air"]
    rows = []
    for kind in ("micro", "macro", "weighted"):
        values = _format_score_pairs(image[kind], control[kind])
        rows.append([f"**{kind}**", "", "", "", "", *values])
    for name, row in image["per_finding"].items():
        control_row = control["per_finding"][name]
        counts = [row["n_known"], row["n_positive"], row["n_called"], control_row["n_called"]]
        rows.append([name, *map(str, counts), *_format_score_pairs(row, control_row)])
    note = (
        f"Against the labels of {image['n_cases']:,} scans; read by "
        f"{reports['image']['signatures']['clinical']}. n: scans with a known label; called: "
        "reports that say it is there; air: without the image."
    )
    return f"{render_table(header, rows)}\n\n{note}"


def _format_score_pairs(image: Mapping[str, Any], control: Mapping[str, Any]) -> list[str]:
    """Each score with the image and without it."""
    values = []
    for score in REPORT_FINDING_SCORES:
        values += [format_score(image[score]), format_score(control[score])]
    return values
