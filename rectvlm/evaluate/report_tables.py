"""Figures of the reports and their baselines as Markdown and for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from rectvlm.evaluate.score_format import (
    BASELINE_NAMES,
    FINDING_SCORE_NAMES,
    format_interval,
    format_score,
    format_with_interval,
    render_table,
)
from rectvlm.metrics.vlm3d_protocol import CALL_SCORES
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
    "lobe_accuracy",
    "size_accuracy",
    "other_findings_f1",
    "rare_findings_recall",
)
"""Scores of the reports in the terminal, and those in which the table is to be beaten."""
DIVERSITY_NAMES = {"distinct_share": "distinct reports, share", "self_bleu_4": "self-BLEU-4"}
"""Names of the figures that compare the reports with each other; they have no intervals."""
_WORD_SCORE_NAMES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "cider": "CIDEr",
}
SCORE_NAMES = _WORD_SCORE_NAMES | {
    "bertscore_f1": "BERTScore F1",
    "lobe_accuracy": "lobes",
    "size_accuracy": "sizes within tolerance",
    "other_findings_f1": "findings beyond the 18, F1",
    "rare_findings_recall": "rare findings, recall",
}
"""Names of headline scores that are not findings'."""
_CLINICAL_TRUTHS = {"clinical_labels_": "labels", "clinical_reference_": "references"}
PROTOCOL_SCORE_NAMES = _WORD_SCORE_NAMES | {"bleu_mean": "BLEU, mean"}
"""Names of the figures of the VLM3D challenge's protocol."""
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
    sources = describe_baseline_sources(reports)
    if not reports["baselines"]:
        return sources
    header = ["", *_name_baseline_columns(reports)]
    rows = [_baseline_row(reports, score) for score in reports["image"]["scores"]]
    rows += _diversity_rows(reports)
    return f"{render_table(header, rows)}\n\n{sources}"


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
        reports: figures of `evaluate_reports`.
    """
    unknown = "Whether the language model beats the classifier with a table of texts is unknown"
    if "table" not in reports["baselines"]:
        return f"{unknown}: the table is left out, as {reports['left_out_baselines']['table']}."
    differences = reports["baselines"]["table"]["difference"]
    intervals = differences.get("ci95", {})
    compared = [score for score in MAIN_REPORT_SCORES if intervals.get(score) is not None]
    if not compared:
        return (
            f"{unknown}: there are no intervals, which need two patients and resamples "
            "(`--bootstrap`)."
        )
    better = [score for score in compared if intervals[score][0] > 0]
    worse = [score for score in compared if intervals[score][1] < 0]
    sentence = "The language model beats the classifier with a table of texts in "
    sentence += _join_differences(better, differences) or f"none of {len(compared)} scores"
    if worse:
        sentence += f"; the table beats it in {_join_differences(worse, differences)}"
    return f"{sentence} (difference with its 95% interval, paired by patient)."


def name_score(score: str) -> str:
    """Name of a headline score in tables."""
    if score in SCORE_NAMES:
        return SCORE_NAMES[score]
    for prefix, truth in _CLINICAL_TRUTHS.items():
        if score.startswith(prefix):
            name = score.removeprefix(prefix).replace("_", " ")
            return f"findings by {truth}, {name.replace('f1', 'F1').replace('crg', 'CRG')}"
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


def _join_differences(scores: Sequence[str], differences: Mapping[str, Any]) -> str:
    """Names of scores with their differences and intervals."""
    words = []
    for score in scores:
        interval = format_interval(differences, score)
        words.append(f"{name_score(score)} {differences[score]:+.3f} {interval}")
    return ", ".join(words)


def _format_kind(kind: Mapping[str, Any], score: str) -> str:
    """Headline score of one set of reports, with its interval."""
    return f"{format_score(kind['scores'][score])} {format_interval(kind, score)}".strip()


def _format_difference(differences: Mapping[str, Any], score: str) -> str:
    return format_with_interval(differences, score) if score in differences else "–"


def describe_baseline_sources(reports: Mapping[str, Any]) -> str:
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


def render_report_protocol(reports: Mapping[str, Any]) -> str:
    """Render the figures of the VLM3D challenge's protocol for all sets of reports."""
    kinds = list_report_kinds(reports)
    rows = []
    for score, name in PROTOCOL_SCORE_NAMES.items():
        values = [format_score(kind["vlm3d"][score]) for kind in kinds.values()]
        rows.append([name, *values])
    for score in CALL_SCORES:
        macros = [kind["vlm3d"]["findings"]["macro"] for kind in kinds.values()]
        name = f"macro {FINDING_SCORE_NAMES[score]}"
        rows.append([name, *(format_score(macro[score]) for macro in macros)])
    crg = [format_score(kind["vlm3d"]["findings"]["crg"]) for kind in kinds.values()]
    rows.append(["CRG", *crg])
    note = (
        "As the challenge's evaluation computes them (pycocoevalcap 1.2, words at white space, "
        "calls of the labeler, means over all 18 findings)."
    )
    left_out = reports["image"]["vlm3d"]["left_out"]
    for score, reason in left_out.items():
        note += f" {PROTOCOL_SCORE_NAMES[score]} is left out: it {reason}."
    return f"{render_table(['', *kinds], rows)}\n\n{note}"


def list_report_kinds(reports: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the language model, of its control and of each baseline, by name in tables."""
    kinds = {"language model": reports["image"]}
    for name, baseline in reports["baselines"].items():
        kinds[BASELINE_NAMES[name]] = baseline
    return kinds | {"without the image": reports["image_ablated"]}


def format_main_scores(reports: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Main scores with their intervals as text, by score and set of reports."""
    kinds = list_report_kinds(reports)
    rows = {}
    for score in MAIN_REPORT_SCORES:
        if score in reports["image"]["scores"]:
            rows[name_score(score)] = {
                name: _format_kind(kind, score) for name, kind in kinds.items()
            }
    return rows


def render_other_findings(reports: Mapping[str, Any]) -> str:
    """Render sizes, findings beyond the 18, and the recall of rare and of common findings."""
    image = reports["image"]
    sizes = image["sizes"]
    parts = [
        f"Sizes within {sizes['tolerance_mm']:g} mm or {sizes['tolerance_share']:.0%}: "
        f"{sizes['n_within']} of {sizes['n']} ({sizes['n_unstated']} without a size); "
        f"{sizes['n_not_mentioned']} findings with a size are not mentioned."
    ]
    for name, row in image["by_prevalence"].items():
        findings = ", ".join(row["findings"]) or "none"
        recall = f"{format_score(row['recall'])} of {row['n_positive']}"
        parts.append(f"Recall of the {name} findings ({findings}): {recall}.")
    rows = []
    for name, row in image["other_findings"]["per_finding"].items():
        counts = [str(row["n_positive"]), str(row["n_called"])]
        rows.append([name, *counts, *(format_score(row[one]) for one in REPORT_FINDING_SCORES)])
    paragraph = " ".join(parts)
    if not rows:
        return f"{paragraph} No report names a finding beyond the 18."
    header = ["beyond the 18", "in the references", "in the reports"]
    header += [FINDING_SCORE_NAMES[score] for score in REPORT_FINDING_SCORES]
    return f"{paragraph}\n\n{render_table(header, rows)}"


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
