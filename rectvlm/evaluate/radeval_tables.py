"""Figures of RadEval as Markdown and for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from rectvlm.evaluate.score_format import (
    BASELINE_NAMES,
    format_interval,
    format_score,
    render_table,
)
from rectvlm.metrics.radeval_scores import RADEVAL_METRICS, RadEvalMetric
from rectvlm.terminal_tables import FoldingTable

_KIND_NAMES = {"image": "language model", "image_ablated": "without the image"} | BASELINE_NAMES


def name_radeval_kinds(radeval: Mapping[str, Any]) -> list[str]:
    """Names of the sets of reports, in their order."""
    return [_KIND_NAMES[kind] for kind in radeval["reports"]]


def select_radeval_figures(radeval: Mapping[str, Any]) -> dict[str, str]:
    """Names of the figures that there are, by key; those of chest X-ray metrics are marked."""
    names = {}
    for metric in RADEVAL_METRICS.values():
        for figure, name in metric.figures.items():
            if figure in radeval["reports"]["image"]["scores"]:
                names[figure] = name + _mark_origin(metric)
    return names


def _mark_origin(metric: RadEvalMetric) -> str:
    return "" if metric.trained_on == "CT" else f" ({metric.trained_on})"


def describe_radeval(radeval: Mapping[str, Any]) -> str:
    """Say what was computed by which version, and what is left out and why."""
    words = [
        f"{radeval['n']:,} reports, by RadEval {radeval['version']}, 0 to 1; metrics marked "
        "(chest X-rays) were trained on those, and say less of a CT."
    ]
    for key, reason in radeval["left_out"].items():
        words.append(f"{RADEVAL_METRICS[key].name} is left out: it {reason}.")
    return " ".join(words)


def render_radeval(radeval: Mapping[str, Any]) -> str:
    """Render the figures of all sets of reports with their intervals."""
    names = select_radeval_figures(radeval)
    if not names:
        return describe_radeval(radeval)
    rows = [[name, *_format_sets(radeval, figure)] for figure, name in names.items()]
    table = render_table(["", *name_radeval_kinds(radeval)], rows)
    return f"{table}\n\n{describe_radeval(radeval)}"


def make_radeval_table(radeval: Mapping[str, Any]) -> Table:
    """Make a table of the figures, for the terminal."""
    table = FoldingTable(title="Reports by RadEval", title_justify="left")
    table.add_column("metric", justify="left")
    for name in name_radeval_kinds(radeval):
        table.add_column(name, justify="right")
    for figure, name in select_radeval_figures(radeval).items():
        table.add_row(name, *_format_sets(radeval, figure))
    return table


def _format_sets(radeval: Mapping[str, Any], figure: str) -> list[str]:
    cells = []
    for kind in radeval["reports"].values():
        value = format_score(kind["scores"][figure])
        cells.append(f"{value} {format_interval(kind, figure)}".strip())
    return cells
