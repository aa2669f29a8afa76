"""Results of an evaluation as one self-contained HTML page, to read, print and copy from.

It has the main figures with intervals and baselines, each finding, the curves, and the cases in
which model and label disagree most.
"""

import base64
import io
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from rectvlm.evaluate.headline import (
    HEADLINE_FINDING_SCORES,
    HeadlineFigure,
    list_headline_columns,
    list_headline_rows,
)
from rectvlm.evaluate.radeval_tables import (
    describe_radeval,
    name_radeval_kinds,
    select_radeval_figures,
)
from rectvlm.evaluate.report_tables import (
    DIVERSITY_NAMES,
    MAIN_REPORT_SCORES,
    PROTOCOL_SCORE_NAMES,
    describe_baseline_sources,
    describe_table_comparison,
    list_report_kinds,
    name_score,
)
from rectvlm.evaluate.result import EvaluationResult
from rectvlm.evaluate.scans import ScanResults
from rectvlm.evaluate.score_format import FINDING_SCORE_NAMES, format_interval, format_score
from rectvlm.evaluate.tables import (
    GROUNDING_SCORE_NAMES,
    LESION_SCORE_NAMES,
    OTHER_LABEL_SCORES,
    OTHER_THRESHOLD_NAMES,
    describe_labels,
    describe_reports_by_other_labels,
    format_grounding_count,
)
from rectvlm.finding_thresholds import THRESHOLDS_FILE
from rectvlm.labels import FINDINGS, LESION_BY_KEY

PAGES_FOLDER = "pages"
"""Folder beside the metrics with the case pages of `rectvlm predict`, which the page links to."""
MAX_DISAGREEMENTS = 20
"""Largest number of disagreements on the page."""
MAX_DISAGREEMENTS_OF_FINDING = 3
"""Largest number of them of one finding, so that one poor finding does not fill the list."""
PER_FINDING_SCORES = ("auroc", "average_precision", "f1", "precision", "recall", "ece")
CRG_WITHOUT_CALLS = 1 / 3
"""CRG where no finding is called, and where all are."""
PAGE_LESION_SCORES = ("dice", "dice_where_present", "hd95_mm", "surface_dice", "hit_rate")


@dataclass(frozen=True)
class Cell:
    """A figure with its interval."""

    value: str
    interval: str = ""
    is_strong: bool = False
    """Whether it stands out: a difference whose interval does not hold 0."""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str
    cells: list[Cell]
    note: str = ""
    """Number of findings or scans."""


@dataclass(frozen=True)
class Disagreement:
    """A scan and a finding in which the probability is far from the label."""

    scan: str
    key: str
    """Key of the scan's first volume."""
    finding: str
    label: int
    probability: float
    page: str | None
    """Relative link to the case's page; None without one."""


def render_results_page(
    result: EvaluationResult, scans: ScanResults, plots: Mapping[str, Figure], folder: Path
) -> str:
    """Render the page.

    Args:
        result: metrics of `evaluate_checkpoint`.
        scans: results by scan.
        plots: figures by name; empty for none.
        folder: folder of the evaluation, in which case pages are looked for.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    reports = result.reports
    disagreements = find_disagreements(scans, folder)
    radeval = reports["radeval"] if reports else None
    return environment.get_template("results_page.html.j2").render(
        result=result,
        labels=describe_labels(result),
        headline_columns=list_headline_columns(result),
        headline_rows=_make_headline_rows(result),
        finding_rows=_make_finding_rows(result),
        lesion_names=_name_lesions(result),
        lesion_rows=_make_lesion_rows(result),
        grounding_rows=_make_grounding_rows(result),
        report_kinds=list(list_report_kinds(reports)) if reports else [],
        report_rows=_make_report_rows(reports) if reports else [],
        has_table=reports is not None and "table" in reports["baselines"],
        baseline_note=describe_baseline_sources(reports) if reports else None,
        protocol_rows=_make_protocol_rows(reports) if reports else [],
        protocol_left_out=reports["image"]["vlm3d"]["left_out"] if reports else {},
        protocol_names=PROTOCOL_SCORE_NAMES,
        radeval_kinds=name_radeval_kinds(radeval) if radeval else [],
        radeval_rows=_make_radeval_rows(radeval) if radeval else [],
        radeval_note=describe_radeval(radeval) if radeval else None,
        comparison=describe_table_comparison(reports) if reports else None,
        score_names=[FINDING_SCORE_NAMES[score] for score in PER_FINDING_SCORES],
        per_finding_rows=_make_per_finding_rows(result),
        other_label_names=[FINDING_SCORE_NAMES[score] for score in OTHER_LABEL_SCORES],
        other_report_note=describe_reports_by_other_labels(result),
        other_label_rows=_make_other_label_rows(result),
        plots={name: _encode_svg(figure) for name, figure in plots.items()},
        disagreements=disagreements,
        page_command=_write_page_command(result, disagreements, folder),
    )


def find_disagreements(scans: ScanResults, folder: Path) -> list[Disagreement]:
    """The known labels that the probabilities are farthest from, the farthest first.

    Args:
        scans: results by scan.
        folder: folder of the evaluation, in which case pages are looked for.
    """
    distances = np.where(scans.known, np.abs(scans.probabilities - scans.labels), -1.0)
    disagreements: list[Disagreement] = []
    n_by_finding: Counter[int] = Counter()
    for position in np.argsort(-distances, axis=None, kind="stable"):
        number, i = (int(index) for index in np.unravel_index(position, distances.shape))
        is_listed = len(disagreements) == MAX_DISAGREEMENTS
        if is_listed or distances[number, i] <= 0.5:
            break
        if n_by_finding[i] == MAX_DISAGREEMENTS_OF_FINDING:
            continue
        n_by_finding[i] += 1
        disagreements.append(
            Disagreement(
                scans.names[number],
                scans.volumes[number][0].key,
                FINDINGS[i],
                int(scans.labels[number, i]),
                float(scans.probabilities[number, i]),
                _find_page(folder, [record.key for record in scans.volumes[number]]),
            )
        )
    return disagreements


def _find_page(folder: Path, keys: Sequence[str]) -> str | None:
    for key in keys:
        page = Path(PAGES_FOLDER) / key / "index.html"
        if (folder / page).is_file():
            return page.as_posix()
    return None


def _write_page_command(
    result: EvaluationResult, disagreements: Sequence[Disagreement], folder: Path
) -> str | None:
    """Command that makes the case pages that are missing; None where none is."""
    keys = dict.fromkeys(row.key for row in disagreements if row.page is None)
    if not keys:
        return None
    words = ["rectvlm", "predict", result.shards, "--keys", *keys]
    words += ["--checkpoint", result.checkpoint, "--thresholds", str(folder / THRESHOLDS_FILE)]
    return shlex.join([*words, "--out", str(folder / PAGES_FOLDER)])


def _make_cell(row: Mapping[str, Any], score: str) -> Cell:
    return Cell(format_score(row[score]), format_interval(row, score))


def _make_headline_rows(result: EvaluationResult) -> list[Row]:
    """The main figures beside those of the baselines."""
    columns = list_headline_columns(result)
    rows = []
    for row in list_headline_rows(result):
        figures = [row.figures.get(column, HeadlineFigure()) for column in columns]
        rows.append(Row(row.name, [Cell(figure.value, figure.interval) for figure in figures]))
    return rows


def _make_finding_rows(result: EvaluationResult) -> list[Row]:
    """Weighted means, means at other thresholds, and those of the challenge's protocol.

    Beside each stands what prevalence alone scores, where that is known.
    """
    scores = result.classification
    no_value = Cell("")
    rows = []
    of_both = [scores["weighted"], scores["prevalence"]["weighted"]]
    for score in HEADLINE_FINDING_SCORES:
        count = f"{scores['weighted'][f'n_findings_{score}']} findings"
        cells = [_make_cell(mean, score) for mean in of_both]
        rows.append(Row(f"{FINDING_SCORE_NAMES[score]}, weighted mean", cells, count))
    for choice, values in result.other_thresholds.items():
        macro = values["macro"]
        name = f"F1, macro mean, at {OTHER_THRESHOLD_NAMES[choice]}"
        cells = [_make_cell(macro, "f1"), no_value]
        rows.append(Row(name, cells, f"{macro['n_findings_f1']} findings"))
    protocol = scores["vlm3d"]
    for score in ("auroc", "f1"):
        values = [row[score] for row in protocol["per_finding"].values()]
        count = f"{len(values) - values.count(None)} findings"
        name = f"{FINDING_SCORE_NAMES[score]} by VLM3D’s protocol"
        rows.append(Row(name, [_make_cell(protocol["macro"], score), no_value], count))
    crg = [Cell(format_score(protocol["crg"])), Cell(format_score(CRG_WITHOUT_CALLS))]
    rows.append(Row("CRG by VLM3D’s protocol", crg, count))
    return rows


def _name_lesions(result: EvaluationResult) -> list[str]:
    if result.localization is None:
        return []
    return [LESION_BY_KEY[key].name for key in result.localization["per_lesion"]]


def _make_lesion_rows(result: EvaluationResult) -> list[Row]:
    if result.localization is None:
        return []
    columns = [*result.localization["per_lesion"].values(), result.localization["macro"]]
    rows = []
    for score in PAGE_LESION_SCORES:
        rows.append(Row(LESION_SCORE_NAMES[score], [_make_cell(one, score) for one in columns]))
    return rows


def _make_grounding_rows(result: EvaluationResult) -> list[Row]:
    """Figures by the protocol of ReXGroundingCT, where its outlines were evaluated."""
    grounding = result.localization and result.localization["rexgrounding"]
    if not grounding:
        return []
    count = format_grounding_count(grounding)
    rows = []
    for score, name in GROUNDING_SCORE_NAMES.items():
        rows.append(Row(name, [_make_cell(grounding, score)], count))
    return rows


def _make_report_rows(reports: Mapping[str, Any]) -> list[Row]:
    """Scores of each set of reports, and the language model minus the table of texts."""
    kinds = list_report_kinds(reports).values()
    table = reports["baselines"].get("table")
    rows = []
    for score in MAIN_REPORT_SCORES:
        if score not in reports["image"]["scores"]:
            continue
        cells = []
        for kind in kinds:
            cells.append(Cell(format_score(kind["scores"][score]), format_interval(kind, score)))
        if table is not None:
            cells.append(_make_difference_cell(table["difference"], score))
        rows.append(Row(name_score(score), cells))
    for figure, name in DIVERSITY_NAMES.items():
        cells = [Cell(format_score(kind["diversity"][figure])) for kind in kinds]
        if table is not None:
            cells.append(Cell(""))
        rows.append(Row(name, cells))
    return rows


def _make_difference_cell(differences: Mapping[str, Any], score: str) -> Cell:
    if score not in differences:
        return Cell("–")
    bounds = differences.get("ci95", {}).get(score)
    is_strong = bounds is not None and (bounds[0] > 0 or bounds[1] < 0)
    return Cell(f"{differences[score]:+.3f}", format_interval(differences, score), is_strong)


def _make_protocol_rows(reports: Mapping[str, Any]) -> list[Row]:
    kinds = list_report_kinds(reports).values()
    rows = []
    for score, name in PROTOCOL_SCORE_NAMES.items():
        rows.append(Row(name, [Cell(format_score(kind["vlm3d"][score])) for kind in kinds]))
    findings = [kind["vlm3d"]["findings"] for kind in kinds]
    macro_f1 = [Cell(format_score(row["macro"]["f1"])) for row in findings]
    crg = [Cell(format_score(row["crg"])) for row in findings]
    return [*rows, Row("F1 of findings, macro", macro_f1), Row("CRG", crg)]


def _make_radeval_rows(radeval: Mapping[str, Any]) -> list[Row]:
    rows = []
    for figure, name in select_radeval_figures(radeval).items():
        cells = []
        for kind in radeval["reports"].values():
            value, interval = format_score(kind["scores"][figure]), format_interval(kind, figure)
            cells.append(Cell(value, interval))
        rows.append(Row(name, cells))
    return rows


def _make_per_finding_rows(result: EvaluationResult) -> list[Row]:
    """Scores of each finding, and F1 of the finding in the reports where there are any."""
    in_reports: Mapping[str, Any] | None = None
    if result.reports is not None:
        in_reports = result.reports["image"]["clinical"]["labels"]["per_finding"]
    rows = []
    for name, scores in result.classification["per_finding"].items():
        cells = [_make_cell(scores, score) for score in PER_FINDING_SCORES]
        if in_reports is not None:
            cells.append(Cell(format_score(in_reports[name]["f1"])))
        rows.append(Row(name, cells, f"{scores['n_positive']:,} of {scores['n_known']:,}"))
    return rows


def _make_other_label_rows(result: EvaluationResult) -> list[Row]:
    """Scores against the labels of the shards and against those of the other table."""
    other = result.other_labels
    if other is None:
        return []
    both = (result.classification, other["classification"])
    rows = []
    for kind in ("macro", "weighted"):
        cells = [Cell(""), Cell(""), *_make_cells_of_both([one[kind] for one in both])]
        rows.append(Row(f"{kind} mean", cells))
    for finding, counts in other["agreement"].items():
        of_both = [one["per_finding"][finding] for one in both]
        cells = [Cell(f"{row['n_positive']:,}") for row in of_both]
        alike = f"{counts['n_alike']:,} of {counts['n_known']:,}"
        rows.append(Row(finding, [*cells, *_make_cells_of_both(of_both)], alike))
    return rows


def _make_cells_of_both(of_both: Sequence[Mapping[str, Any]]) -> list[Cell]:
    return [_make_cell(row, score) for score in OTHER_LABEL_SCORES for row in of_both]


def _encode_svg(figure: Figure) -> str:
    """A figure as the address of an image, sharp at any size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
