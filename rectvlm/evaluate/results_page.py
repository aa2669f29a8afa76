"""Results of an evaluation as one self-contained HTML page, to read, print and copy from.

It has the main figures with intervals and baselines, each finding, the curves, and the cases in
which model and label disagree most.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from rectvlm.evaluate.radeval_tables import (
    describe_radeval,
    name_radeval_kinds,
    select_radeval_figures,
)
from rectvlm.evaluate.report_tables import (
    MAIN_REPORT_SCORES,
    PROTOCOL_SCORE_NAMES,
    describe_table_comparison,
    list_report_kinds,
    name_score,
)
from rectvlm.evaluate.result import EvaluationResult
from rectvlm.evaluate.scans import ScanResults
from rectvlm.evaluate.score_format import FINDING_SCORE_NAMES, format_interval, format_score
from rectvlm.evaluate.tables import LESION_SCORE_NAMES, OTHER_THRESHOLD_NAMES
from rectvlm.labels import FINDINGS, LESION_BY_KEY

PAGES_FOLDER = "pages"
"""Folder beside the metrics with the case pages of `rectvlm predict`, which the page links to."""
MAX_DISAGREEMENTS = 20
"""Largest number of disagreements on the page."""
MAX_DISAGREEMENTS_OF_FINDING = 3
"""Largest number of them of one finding, so that one poor finding does not fill the list."""
HEADLINE_FINDING_SCORES = ("auroc", "average_precision", "f1")
PER_FINDING_SCORES = ("auroc", "average_precision", "f1", "precision", "recall", "ece")
HEADLINE_LESION_SCORES = ("dice", "dice_where_present", "hd95_mm", "surface_dice", "hit_rate")


@dataclass(frozen=True)
class Cell:
    """A figure with its interval."""

    value: str
    interval: str = ""


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
    radeval = reports["radeval"] if reports else None
    return environment.get_template("results_page.html.j2").render(
        result=result,
        finding_rows=_make_headline_rows(result),
        lesion_names=_name_lesions(result),
        lesion_rows=_make_lesion_rows(result),
        report_kinds=list(list_report_kinds(reports)) if reports else [],
        report_rows=_make_report_rows(reports) if reports else [],
        protocol_rows=_make_protocol_rows(reports) if reports else [],
        protocol_left_out=reports["image"]["vlm3d"]["left_out"] if reports else {},
        protocol_names=PROTOCOL_SCORE_NAMES,
        radeval_kinds=name_radeval_kinds(radeval) if radeval else [],
        radeval_rows=_make_radeval_rows(radeval) if radeval else [],
        radeval_note=describe_radeval(radeval) if radeval else None,
        comparison=describe_table_comparison(reports) if reports else None,
        score_names=[FINDING_SCORE_NAMES[score] for score in PER_FINDING_SCORES],
        per_finding_rows=_make_per_finding_rows(result),
        plots={name: _encode_svg(figure) for name, figure in plots.items()},
        disagreements=find_disagreements(scans, folder),
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


def _make_cell(row: Mapping[str, Any], score: str) -> Cell:
    return Cell(format_score(row[score]), format_interval(row, score))


def _make_headline_rows(result: EvaluationResult) -> list[Row]:
    """Means over the findings at fitted thresholds, at others, and by the challenge's protocol."""
    scores = result.classification
    rows = []
    for kind in ("macro", "weighted"):
        for score in HEADLINE_FINDING_SCORES:
            count = f"{scores[kind][f'n_findings_{score}']} findings"
            name = f"{FINDING_SCORE_NAMES[score]}, {kind} mean"
            rows.append(Row(name, [_make_cell(scores[kind], score)], count))
    for choice, values in result.other_thresholds.items():
        macro = values["macro"]
        name = f"F1, macro mean, at {OTHER_THRESHOLD_NAMES[choice]}"
        rows.append(Row(name, [_make_cell(macro, "f1")], f"{macro['n_findings_f1']} findings"))
    protocol = scores["vlm3d"]
    count = f"{protocol['n_findings']} findings"
    rows.append(Row("F1 by VLM3D’s protocol", [_make_cell(protocol["macro"], "f1")], count))
    rows.append(Row("CRG by VLM3D’s protocol", [Cell(format_score(protocol["crg"]))], count))
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
    for score in HEADLINE_LESION_SCORES:
        rows.append(Row(LESION_SCORE_NAMES[score], [_make_cell(one, score) for one in columns]))
    return rows


def _make_report_rows(reports: Mapping[str, Any]) -> list[Row]:
    rows = []
    for score in MAIN_REPORT_SCORES:
        if score not in reports["image"]["scores"]:
            continue
        cells = []
        for kind in list_report_kinds(reports).values():
            cells.append(Cell(format_score(kind["scores"][score]), format_interval(kind, score)))
        rows.append(Row(name_score(score), cells))
    return rows


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


def _encode_svg(figure: Figure) -> str:
    """A figure as the address of an image, sharp at any size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
