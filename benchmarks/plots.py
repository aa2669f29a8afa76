"""Plots of comparisons: bars, growth and stacked bars, as PNG."""

import re
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.measurements import Comparison, Measurement
from rectvlm.figures import hide_top_and_right_spines, new_figure

_WIDTH, _BAR_HEIGHT = 8.0, 0.3
_DPI = 110
_LOG_RATIO = 30
"""Ratio of the largest to the smallest median above which growth is drawn on a log scale."""
_MAX_BARS = 60
"""Bars of a plot; a comparison of more is shown as a table alone."""


def write_plot(comparison: Comparison, folder: Path, stem: str) -> Path | None:
    """Draw a comparison into a folder.

    Returns:
        The file; None where the comparison has no plot.
    """
    if comparison.plot == "none" or not comparison.measurements:
        return None
    if comparison.plot == "bars" and len(comparison.measurements) > _MAX_BARS:
        return None
    points = list(dict.fromkeys(measurement.at for measurement in comparison.measurements))
    bar_count = len(points) if comparison.plot == "stack" else len(comparison.measurements)
    height = 4.0 if comparison.plot == "lines" else 1.6 + _BAR_HEIGHT * bar_count
    figure = new_figure(_WIDTH, height)
    axes = figure.add_subplot()
    draw = {"bars": _draw_bars, "lines": _draw_lines, "stack": _draw_stack}[comparison.plot]
    draw(axes, comparison, points)
    axes.set_title(comparison.title, loc="left", fontsize=11)
    hide_top_and_right_spines(axes)
    path = folder / f"{_slug(stem)}-{_slug(comparison.title)}.png"
    figure.savefig(path, dpi=_DPI)
    return path


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-")


def _spread(measurement: Measurement) -> tuple[float, float]:
    low, high = measurement.quartiles
    return measurement.median - low, high - measurement.median


def _direction(comparison: Comparison) -> str:
    suffix = {"lower": ", less is better", "higher": ", more is better", "neither": ""}
    return f"{comparison.unit}{suffix[comparison.better]} (median, quartiles)"


def _draw_bars(axes: Axes, comparison: Comparison, points: list[str]) -> None:
    measurements = comparison.measurements[::-1]  # the first is on top
    names = [f"{row.case}, {row.at}" if row.at else row.case for row in measurements]
    below, above = zip(*map(_spread, measurements), strict=True)
    medians = [row.median for row in measurements]
    colours = ["C1" if row.case == comparison.baseline else "C0" for row in measurements]
    axes.barh(names, medians, color=colours, xerr=(below, above), ecolor="0.3", capsize=2)
    axes.set_xlabel(_direction(comparison))


def _draw_lines(axes: Axes, comparison: Comparison, points: list[str]) -> None:
    position_by_point = {point: position for position, point in enumerate(points)}
    are_numbers = all(re.fullmatch(r"\d+(\.\d+)?", point) for point in points)
    for case in dict.fromkeys(row.case for row in comparison.measurements):
        rows = [row for row in comparison.measurements if row.case == case]
        places = [float(row.at) if are_numbers else position_by_point[row.at] for row in rows]
        spread = tuple(zip(*map(_spread, rows), strict=True))
        medians = [row.median for row in rows]
        axes.errorbar(places, medians, yerr=spread, marker="o", capsize=2, label=case)
    ticks = [float(point) for point in points] if are_numbers else list(range(len(points)))
    axes.set_xticks(ticks, points)
    medians = [row.median for row in comparison.measurements]
    if min(medians) > 0 and max(medians) > _LOG_RATIO * min(medians):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(comparison.at_label)
    axes.set_ylabel(_direction(comparison), fontsize=8)
    axes.legend(fontsize=8)


def _draw_stack(axes: Axes, comparison: Comparison, points: list[str]) -> None:
    left = dict.fromkeys(points, 0.0)
    cases = dict.fromkeys(measurement.case for measurement in comparison.measurements)
    for number, case in enumerate(cases):
        rows = [row for row in comparison.measurements if row.case == case]
        places = [row.at for row in rows]
        medians = [row.median for row in rows]
        starts = [left[place] for place in places]
        axes.barh(places, medians, left=starts, color=f"C{number}", label=case)
        for row in rows:
            left[row.at] += row.median
    axes.invert_yaxis()
    axes.set_xlabel(f"{comparison.unit} (sum of medians)")
    axes.figure.legend(fontsize=8, ncols=len(cases), loc="outside lower center")
