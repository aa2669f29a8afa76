"""Figures of an evaluation as Markdown, for people, and as a table, for the terminal."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from rectvlm.evaluate.headline import (
    HeadlineFigure,
    list_headline_columns,
    list_headline_rows,
)
from rectvlm.evaluate.radeval_tables import render_radeval
from rectvlm.evaluate.report_tables import (
    add_report_rows,
    describe_table_comparison,
    render_baselines,
    render_other_findings,
    render_report_findings,
    render_report_protocol,
    render_reports,
)
from rectvlm.evaluate.result import EvaluationResult
from rectvlm.evaluate.score_format import (
    FINDING_SCORE_NAMES,
    format_interval,
    format_score,
    format_with_interval,
    render_table,
)
from rectvlm.labels import FINDINGS, LESION_BY_KEY
from rectvlm.terminal_tables import FoldingTable

LESION_SCORE_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "dice_where_present": "Dice where present",
    "hd95_mm": "HD95, mm",
    "surface_dice": "surface Dice",
    "sensitivity": "sensitivity",
    "hit_rate": "hit rate",
    "lesion_hit_rate": "lesions hit",
    "instance_precision": "instance precision",
    "instance_recall": "instance recall",
    "instance_f1": "instance F1",
    "false_positive_ml": "false positive, ml",
}
GROUNDING_SCORE_NAMES = {
    "dice": "ReXGroundingCT Dice",
    "hit_rate": "ReXGroundingCT hit rate",
    "instance_precision": "ReXGroundingCT instance precision",
    "instance_recall": "ReXGroundingCT instance recall",
    "instance_f1": "ReXGroundingCT instance F1",
}
LESION_COUNT_NAMES = {
    "n_annotated": "scans annotated",
    "n_present": "scans with it",
    "n_missed": "missed",
    "n_false_positive": "false positive scans",
    "n_empty_agreed": "both empty",
    "n_lesions": "lesions",
}
MAIN_FINDING_SCORES = ("auroc", "average_precision", "f1", "precision", "recall", "ece")
"""Scores of the findings in the terminal."""
OTHER_LABEL_SCORES = ("auroc", "f1")
"""Scores that are shown against both sets of labels."""
OTHER_THRESHOLD_NAMES = {"model": "the model's thresholds", "0.5": "0.5"}


def render_markdown(result: EvaluationResult) -> str:
    """Render all figures that a report on a model needs, as one page.

    Args:
        result: metrics of `evaluate_checkpoint`.
    """
    sections = [
        _render_title(result),
        _render_overview(result),
        "## In short",
        _render_headline(result),
        "## Findings",
        _render_findings(result),
    ]
    if result.other_labels is not None:
        sections += ["## Findings by both sets of labels", _render_other_labels(result)]
    if result.localization is not None:
        sections += ["## Lesions", _render_lesions(result.localization)]
    if result.reports is not None:
        sections += ["## Reports", render_reports(result.reports)]
        sections += ["### Baselines", render_baselines(result.reports)]
        sections += ["### Findings in the reports", render_report_findings(result.reports)]
        sections += ["### Sizes and other findings", render_other_findings(result.reports)]
        sections += ["### By VLM3D's protocol", render_report_protocol(result.reports)]
        if result.reports["radeval"] is not None:
            sections += ["### By RadEval", render_radeval(result.reports["radeval"])]
    return "\n\n".join(sections) + "\n"


def terminal_table(result: EvaluationResult) -> Table:
    """Table of the main figures; the column `air` is the control without the image.

    Args:
        result: metrics of `evaluate_checkpoint`.
    """
    title = f"{result.config}, {result.split} split, {result.n_scans} scans"
    table = FoldingTable(title=title, title_justify="left")
    table.add_column("metric", justify="left")
    for column in ("value", "95%", "air"):
        table.add_column(column, justify="right")
    table.add_column("n", justify="left")

    for kind in ("macro", "weighted"):
        mean = result.classification[kind]
        for score in MAIN_FINDING_SCORES:
            count = f"{mean[f'n_findings_{score}']} of {len(FINDINGS)}"
            name = f"{kind} {FINDING_SCORE_NAMES[score]}"
            interval = format_interval(mean, score)
            table.add_row(name, format_score(mean[score]), interval, "", count)
    if result.other_labels is not None:
        _add_other_label_rows(table, result.other_labels)
    for choice, values in result.other_thresholds.items():
        name = f"macro F1 at {OTHER_THRESHOLD_NAMES[choice]}"
        count = f"{values['macro']['n_findings_f1']} of {len(FINDINGS)}"
        table.add_row(name, format_score(values["macro"]["f1"]), "", "", count)
    if result.localization is not None:
        for key, row in result.localization["per_lesion"].items():
            _add_lesion_rows(table, LESION_BY_KEY[key].name, row)
        if result.localization["rexgrounding"] is not None:
            _add_grounding_rows(table, result.localization["rexgrounding"])
    if result.reports:
        add_report_rows(table, result.reports)
    return table


def _add_lesion_rows(table: Table, lesion: str, row: Mapping[str, Any]) -> None:
    """One row with the sources of the outlines, and one for each of several sources."""

    def add_row(name: str, scores: Mapping[str, Any], sources: Mapping[str, int]) -> None:
        words = [f"{scores['n_cases']}, {scores['n_present']} with it"]
        if sources:
            words.append(format_sources(sources))
        interval = format_interval(scores, "dice")
        table.add_row(name, format_score(scores["dice"]), interval, "", "; ".join(words))

    add_row(f"Dice, {lesion}", row, row["sources"])
    if len(row["sources"]) > 1:
        for source, scores in row["per_source"].items():
            add_row(f"  against {source}", scores, {})


def format_sources(sources: Mapping[str, int]) -> str:
    """Sources of outlines, with the number of scans where there are several."""
    if len(sources) == 1:
        return next(iter(sources))
    return ", ".join(f"{source} {count}" for source, count in sources.items())


def _add_grounding_rows(table: Table, grounding: Mapping[str, Any]) -> None:
    for score, name in GROUNDING_SCORE_NAMES.items():
        interval, count = format_interval(grounding, score), format_grounding_count(grounding)
        table.add_row(name, format_score(grounding[score]), interval, "", count)


def format_grounding_count(grounding: Mapping[str, Any]) -> str:
    """Number of findings that ReXGroundingCT's protocol scored."""
    return f"{grounding['n_findings']} findings, {grounding['n_scans']} scans"


def _render_title(result: EvaluationResult) -> str:
    cases = f"{result.n_scans:,} scans of {result.n_patients:,} patients"
    return f"# {result.config}: {cases}, {result.split} split"


def _render_overview(result: EvaluationResult) -> str:
    bootstrap = result.bootstrap
    intervals = "No intervals were asked for."
    if bootstrap.resamples:
        intervals = (
            f"In brackets: 95% intervals of {bootstrap.resamples:,} resamples of the patients "
            f"(percentiles, seed {bootstrap.seed})."
        )
    return (
        f"Checkpoint `{result.checkpoint}`, step {result.step}; shards `{result.shards}`; "
        f"{result.n_cases:,} volumes. {intervals}{_render_selection_warning(result)}\n\n"
        f"Labels: {describe_labels(result)}. Region maps: {result.region_maps}."
    )


def describe_labels(result: EvaluationResult) -> str:
    """Origin of the labels, and of those beside them."""
    labels = result.labels or "those of the shards, whose manifest does not say where they are from"
    if result.other_labels is None:
        return labels
    return f"{labels}; beside them those of {result.other_labels['file']}"


def _render_selection_warning(result: EvaluationResult) -> str:
    """Warning about the choice of the checkpoint on the evaluated cases."""
    is_selected = result.selected_on_this_split
    if is_selected:
        return (
            " **Validation during training chose this checkpoint on cases of this split, so these "
            "figures are optimistic.**"
        )
    if is_selected is None:
        return " Whether the checkpoint was chosen on this split is not known."
    return ""


def _render_headline(result: EvaluationResult) -> str:
    """The main figures beside those of the baselines, and whether the table of texts is beaten."""
    columns = list_headline_columns(result)
    rows = []
    for row in list_headline_rows(result):
        figures = [row.figures.get(column, HeadlineFigure()) for column in columns]
        cells = [f"{figure.value} {figure.interval}".strip() for figure in figures]
        rows.append([row.name, *cells])
    parts = [render_table(["", *columns], rows)]
    if result.reports is not None:
        parts.append(describe_table_comparison(result.reports))
    return "\n\n".join(parts)


def _render_findings(result: EvaluationResult) -> str:
    scores, thresholds = result.classification, result.thresholds
    header = ["finding", "n", "positive", *FINDING_SCORE_NAMES.values()]
    rows = []
    for kind in ("macro", "weighted"):
        values = _format_scores(scores[kind], FINDING_SCORE_NAMES)
        rows.append([f"**{kind} mean**", "", "", *values])
    for name, row in scores["per_finding"].items():
        values = _format_scores(row, FINDING_SCORE_NAMES)
        rows.append([name, str(row["n_known"]), str(row["n_positive"]), *values])

    for choice, values in result.other_thresholds.items():
        macro = _format_scores(values["macro"], FINDING_SCORE_NAMES)
        rows.append([f"**macro mean** at {OTHER_THRESHOLD_NAMES[choice]}", "", "", *macro])
    prevalence = dict.fromkeys(FINDING_SCORE_NAMES) | scores["prevalence"]["macro"]
    values = _format_scores(prevalence, FINDING_SCORE_NAMES)
    rows.append(["**macro mean** of prevalence alone", "", "", *values])
    protocol = scores["vlm3d"]
    by_protocol = _format_scores(
        dict.fromkeys(FINDING_SCORE_NAMES) | protocol["macro"], FINDING_SCORE_NAMES
    )
    rows.append(["**macro mean** by VLM3D's protocol", "", "", *by_protocol])
    note = f"CRG by VLM3D's protocol: {format_score(protocol['crg'])}. "
    note += "Prevalence alone: each finding is called in every scan. "
    note += f"Thresholds: {thresholds.source}."
    if thresholds.not_fitted:
        note += f" Not fitted, 0.5: {', '.join(thresholds.not_fitted)}."
    if result.is_fitted_on_split:
        note += " **They were fitted on the evaluated split.**"
    return f"{render_table(header, rows)}\n\n{note}"


def _render_other_labels(result: EvaluationResult) -> str:
    """AUROC and F1 against the labels of the shards and against those of the other table."""
    other = result.other_labels
    assert other is not None
    header = ["finding", "positive", "positive, file", "alike"]
    for score in OTHER_LABEL_SCORES:
        name = FINDING_SCORE_NAMES[score]
        header += [name, f"{name}, file"]
    both = (result.classification, other["classification"])
    rows = []
    for kind in ("macro", "weighted"):
        rows.append([f"**{kind} mean**", "", "", "", *_format_both(*(one[kind] for one in both))])
    for finding, counts in other["agreement"].items():
        of_shards, of_file = (one["per_finding"][finding] for one in both)
        positives = [str(row["n_positive"]) for row in (of_shards, of_file)]
        alike = f"{counts['n_alike']} of {counts['n_known']}"
        rows.append([finding, *positives, alike, *_format_both(of_shards, of_file)])
    note = (
        f"Labels of the shards beside those of `{other['file']}` (SHA-256 {other['sha256']}), at "
        "the same thresholds. alike: scans that both label alike, of those that both label."
    )
    note += describe_reports_by_other_labels(result)
    return f"{render_table(header, rows)}\n\n{note}"


def describe_reports_by_other_labels(result: EvaluationResult) -> str:
    """F1 of the findings in the reports against the other table; empty where there is none."""
    if result.other_labels is None or result.other_labels["report_findings"] is None:
        return ""
    f1 = format_score(result.other_labels["report_findings"]["macro"]["f1"])
    return f" Findings of the reports against the file: macro F1 {f1}."


def _format_both(of_shards: Mapping[str, Any], of_file: Mapping[str, Any]) -> list[str]:
    values = []
    for score in OTHER_LABEL_SCORES:
        values += [format_with_interval(row, score) for row in (of_shards, of_file)]
    return values


def _add_other_label_rows(table: Table, other: Mapping[str, Any]) -> None:
    mean = other["classification"]["macro"]
    for score in OTHER_LABEL_SCORES:
        name = f"macro {FINDING_SCORE_NAMES[score]}, labels of {other['file']}"
        count = f"{mean[f'n_findings_{score}']} of {len(FINDINGS)}"
        table.add_row(name, format_score(mean[score]), format_interval(mean, score), "", count)


def _render_lesions(scores: Mapping[str, Any]) -> str:
    lesions, grid = scores["per_lesion"], scores["model_grid"]
    header = ["", *(LESION_BY_KEY[key].name for key in lesions), "mean"]
    columns = [*lesions.values(), scores["macro"]]
    rows = []
    for score, name in LESION_SCORE_NAMES.items():
        rows.append([name, *(format_with_interval(column, score) for column in columns)])
    largest_ml = [format_score(lesion["max_false_positive_ml"]) for lesion in lesions.values()]
    rows.append(["largest false positive, ml", *largest_ml, ""])
    rows += _render_source_rows(lesions)
    grid_dice = [format_score(grid["per_lesion"][key]["dice"]) for key in lesions]
    rows.append(["Dice, model's grid", *grid_dice, format_score(grid["macro"]["dice"])])
    for count, name in LESION_COUNT_NAMES.items():
        rows.append([name, *(str(lesion[count]) for lesion in lesions.values()), ""])

    outlined_by = [format_sources(lesion["sources"]) or "–" for lesion in lesions.values()]
    rows.append(["outlined by", *outlined_by, ""])

    truth_counts = sorted(scores["truth"].items())
    truth = ", ".join(f"{count} from the {place}s" for place, count in truth_counts)
    note = (
        f"On the native grid, voxels at or above {scores['threshold']}; surface Dice at "
        f"{scores['surface_tolerance_mm']:g} mm; a hit is a Dice of {scores['hit_dice']}, a lesion "
        f"matches at {scores['match_dice']}. Outlines: {truth or 'none'}."
    )
    tables = [render_table(header, rows), note]
    if scores["rexgrounding"] is not None:
        tables.append(_render_grounding(scores["rexgrounding"]))
    return "\n\n".join(tables)


def _render_grounding(grounding: Mapping[str, Any]) -> str:
    rows = []
    for score, name in GROUNDING_SCORE_NAMES.items():
        rows.append([name, format_with_interval(grounding, score)])
    note = (
        "By the protocol of ReXGroundingCT's leaderboard, but for its unit: a finding is a kind of "
        "lesion in a scan here, a sentence of the report there."
    )
    table = render_table([format_grounding_count(grounding), "against people"], rows)
    return f"{table}\n\n{note}"


def _render_source_rows(lesions: Mapping[str, Any]) -> list[list[str]]:
    """Dice against each source, where a lesion's outlines have more than one."""
    is_mixed = any(len(lesion["sources"]) > 1 for lesion in lesions.values())
    if not is_mixed:
        return []
    rows = []
    for source in sorted({source for lesion in lesions.values() for source in lesion["sources"]}):
        row = [f"Dice, against {source}"]
        for lesion in lesions.values():
            scores = lesion["per_source"].get(source)
            row.append("–" if scores is None else format_with_interval(scores, "dice"))
        rows.append([*row, ""])
    return rows


def _format_scores(row: Mapping[str, Any], scores: Iterable[str]) -> list[str]:
    return [format_with_interval(row, score) for score in scores]
