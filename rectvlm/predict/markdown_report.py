"""The report of a case as Markdown: report text, table of findings, table of lesions."""

import html
from collections.abc import Sequence

from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_places import describe_lobes
from rectvlm.predict.case_summary import CaseSummary
from rectvlm.predict.lesion_table import LesionComponent


def render_markdown(name: str, summary: CaseSummary) -> str:
    """Render the report of a case.

    Texts of files and models are escaped: many programs show HTML in Markdown as what it says.

    Args:
        name: of the case.
        summary: of the case.
    """
    lines = [f"# {_escape(name)}", "", f"**{summary.disclaimer}**", ""]
    if summary.report is not None:
        for title, text in summary.report.items():
            if text:
                lines += [f"## {title.capitalize()}", "", _escape(text), ""]
    lines += ["## Findings called", "", *_tabulate_findings(summary), ""]
    if summary.components is not None:
        lines += ["## Lesions outlined", "", *_tabulate_lesions(summary.components), ""]
        if summary.components_left_out:
            lines += [_describe_left_out(summary), ""]
        if any(row.approximate_lobes for row in summary.components):
            lines += [summary.lobes_note, ""]
    if summary.contradictions:
        lines += ["## Contradictions", ""]
        lines += [f"- {_escape(entry.message)}" for entry in summary.contradictions]
        lines += [""]
    model = f"{summary.config} at step {summary.step}, rectvlm {summary.version}"
    return "\n".join([*lines, f"Made by the model {_escape(model)}.", ""])


def _tabulate_findings(summary: CaseSummary) -> list[str]:
    """All findings, the most probable ones first."""
    rows = []
    for name, finding in sorted(summary.findings.items(), key=lambda row: -row[1].probability):
        call = "present" if finding.present else "absent"
        rows.append([name, f"{finding.probability:.3f}", f"{finding.threshold:.3f}", call])
    return _table(["Finding", "Probability", "Threshold", "Call"], rows)


def _tabulate_lesions(components: Sequence[LesionComponent]) -> list[str]:
    if not components:
        return ["None."]
    rows = []
    for row in components:
        lesion = f"{LESION_BY_KEY[row.lesion].name} {row.number}"
        volume, diameter = f"{row.volume_ml:.2f}", f"{row.longest_axial_diameter_mm:.1f}"
        place = row.place or "too small to place"
        lobes = describe_lobes(row.approximate_lobes) if row.approximate_lobes else "–"
        mean_hu = f"{row.mean_hu:.0f}"
        rows.append([lesion, volume, diameter, str(row.slice), place, lobes, mean_hu])
    columns = ["Lesion", "Volume (ml)", "Longest axial diameter (mm)", "Slice", "Place"]
    return _table([*columns, "Lobe (approximate)", "Mean HU"], rows)


def _describe_left_out(summary: CaseSummary) -> str:
    count, volume_ml = summary.components_left_out, summary.components_left_out_ml
    return f"{count} smaller lesions of together {volume_ml:.2f} ml are left out."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(map(_escape, cells))} |" for cells in lines]


def _escape(text: str) -> str:
    """Text without HTML, table borders and the marks of Markdown."""
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return html.escape(text, quote=False)
