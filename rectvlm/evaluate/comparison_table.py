"""The comparison of two models as a table for the terminal."""

from rich.table import Table

from rectvlm.evaluate.comparison import ComparedFigure, ModelComparison
from rectvlm.evaluate.report_tables import MAIN_REPORT_SCORES, name_score
from rectvlm.evaluate.score_format import FINDING_SCORE_NAMES, format_score
from rectvlm.evaluate.tables import (
    GROUNDING_SCORE_NAMES,
    LESION_SCORE_NAMES,
    MAIN_FINDING_SCORES,
)
from rectvlm.labels import LESION_BY_KEY
from rectvlm.terminal_tables import FoldingTable

_MAIN_SCORES_BY_PLACE = {
    "macro": MAIN_FINDING_SCORES,
    "weighted": MAIN_FINDING_SCORES,
    "per_finding": ("auroc", "f1"),
    "per_lesion": ("dice",),
    "rexgrounding": tuple(GROUNDING_SCORE_NAMES),
    "image": MAIN_REPORT_SCORES,
}
"""Scores that are shown by the second name of a figure's path."""
MAX_OTHER_FIGURES = 10
"""Largest number of other figures that are shown, those that differ most surely."""


def make_comparison_table(comparison: ModelComparison) -> Table:
    """Table of the main figures and of the others that differ most surely."""
    names = [f"{model['config']}, step {model['step']}" for model in (comparison.a, comparison.b)]
    title = (
        f"A ({names[0]}) and B ({names[1]}): {comparison.split} split, {comparison.n_scans} scans "
        f"of {comparison.n_patients} patients"
    )
    table = FoldingTable(title=title, title_justify="left")
    table.add_column("figure")
    for column in ("A", "B", "A − B", "95%", "p", "p corrected"):
        table.add_column(column, justify="right")
    table.add_column("better")
    for path in _list_shown(comparison):
        table.add_row(describe_figure(path), *_format_figure(comparison.figures[path]))
    return table


def _list_shown(comparison: ModelComparison) -> list[str]:
    """Paths of the figures that the table shows, in their order."""
    others = []
    for path, figure in comparison.figures.items():
        if figure.p is not None and figure.better is not None and not _is_main(path):
            others.append((figure.p_corrected, figure.p, path))
    shown = {path for *_, path in sorted(others)[:MAX_OTHER_FIGURES]}
    return [path for path in comparison.figures if path in shown or _is_main(path)]


def describe_comparison(comparison: ModelComparison) -> list[str]:
    """Lines below the table: the verdict, and what the table does not show."""
    lines = [comparison.verdict]
    hidden = comparison.figures.keys() - set(_list_shown(comparison))
    if hidden:
        n_different = sum(comparison.figures[path].better is not None for path in hidden)
        counts = {"differ": n_different, "show no difference": len(hidden) - n_different}
        words = [f"{count} more {verb}" for verb, count in counts.items() if count]
        lines.append(f"{', '.join(words)}: see --out.")
    for group, reason in comparison.left_out.items():
        lines.append(f"Not compared: {group}: {reason}.")
    lines.append("Patients are drawn: other seeds and other training data are not covered.")
    return lines


def describe_figure(path: str) -> str:
    """Name of a figure in words, such as `Dice, lung nodule`."""
    group, place, *rest = path.split(".")
    score = rest[-1]
    if group == "reports":
        return f"reports, {name_score(score)}"
    if place == "rexgrounding":
        return GROUNDING_SCORE_NAMES[score]
    score_names = FINDING_SCORE_NAMES if group == "classification" else LESION_SCORE_NAMES
    if place in ("macro", "weighted"):
        suffix = "" if group == "classification" else ", lesions"
        return f"{place} {score_names[score]}{suffix}"
    subject = rest[0] if group == "classification" else LESION_BY_KEY[rest[0]].name
    return f"{score_names[score]}, {subject}"


def _is_main(path: str) -> bool:
    """Whether a figure is one of the main ones."""
    group, place, *rest = path.split(".")
    scores = _MAIN_SCORES_BY_PLACE[place]
    if group == "localization" and place == "macro":
        scores = ("dice", "hit_rate")
    return rest[-1] in scores


def _format_figure(figure: ComparedFigure) -> list[str]:
    interval = ""
    if figure.ci95 is not None:
        interval = f"[{figure.ci95[0]:+.3f}, {figure.ci95[1]:+.3f}]"
    return [
        format_score(figure.a),
        format_score(figure.b),
        f"{figure.difference:+.3f}",
        interval,
        _format_p(figure.p),
        _format_p(figure.p_corrected),
        figure.better or "",
    ]


def _format_p(p: float | None) -> str:
    return "–" if p is None else f"{p:.4f}"
