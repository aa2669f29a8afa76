"""Curves of runs as one picture: losses by task, learning rate, validation, throughput."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rectvlm.figures import hide_top_and_right_spines, new_figure
from rectvlm.runs.read_runs import MetricsLine, TrainingRun, mean_finite
from rectvlm.runs.run_tables import list_validation_metrics, read_validation_curve
from rectvlm.types import UserError

RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of runs; they keep apart for colour-blind readers (Okabe and Ito, 2008). Beyond these, lines are dashed."""
CurveStyle = Literal["solid", "dashed", "dotted", "dashdot"]
LINE_STYLES: tuple[CurveStyle, ...] = ("solid", "dashed", "dotted", "dashdot")
_PANEL_COLUMNS, _PANEL_WIDTH_INCHES, _PANEL_HEIGHT_INCHES = 3, 4.6, 3.1
"""Panels side by side; inches of each."""
_SMOOTHING_DIVISOR, _MAX_SMOOTHING_STEPS = 10, 200
"""A curve is drawn as means over windows of a tenth of it, at most so many steps, and the steps faintly behind."""


@dataclass(frozen=True)
class CurvePanel:
    """One quantity over the steps."""

    title: str
    read_curves: Callable[[TrainingRun], dict[str, list[tuple[int, float]]]]
    """By name (empty where there is one alone): steps and values."""
    is_smoothed: bool = True
    has_markers: bool = False
    """Whether each value has a dot, where there are few."""


def plot_runs(runs: Sequence[TrainingRun], path: Path) -> None:
    """Draw all that the runs have on record.

    Args:
        runs: each has a colour.
        path: of the PNG.

    Raises:
        UserError: no run has a step on record.
    """
    panels = _make_panels(runs)
    if not panels:
        names = ", ".join(run.name for run in runs)
        raise UserError(f"There is nothing to draw: no whole line in the metrics of {names}.")
    rows = math.ceil(len(panels) / _PANEL_COLUMNS)
    columns = min(_PANEL_COLUMNS, len(panels))
    # Below: a line for each run's name.
    figure = new_figure(
        columns * _PANEL_WIDTH_INCHES,
        rows * _PANEL_HEIGHT_INCHES + 0.3 + 0.22 * math.ceil(len(runs) / columns),
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, runs)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = [
        Line2D(
            [],
            [],
            color=_run_colour(index),
            linestyle=_run_line_style(index),
            label=f"{run.name} ({run.state})",
        )
        for index, run in enumerate(runs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)


def _make_panels(runs: Sequence[TrainingRun]) -> list[CurvePanel]:
    tasks = dict.fromkeys(task for run in runs for task in run.tasks)
    validations = dict.fromkeys(name for run in runs for name in list_validation_metrics(run))
    panels = [
        CurvePanel("loss", lambda run: {"": _extract_points(run, lambda line: line.get("loss"))})
    ]
    if len(tasks) > 1:
        panels += [CurvePanel(f"loss: {task}", _task_loss_reader(task)) for task in tasks]
    panels += [
        CurvePanel(
            f"validation: {name}", _validation_reader(name), is_smoothed=False, has_markers=True
        )
        for name in validations
    ]
    panels += [
        CurvePanel("learning rate", _extract_learning_rates, is_smoothed=False),
        CurvePanel(
            "gradient norm",
            lambda run: {"": _extract_points(run, lambda line: line.get("grad_norm"))},
        ),
        CurvePanel("samples/s, all ranks", lambda run: {"": _extract_throughput(run)}),
        CurvePanel(
            "data wait, % of the step", lambda run: {"": _extract_points(run, _data_wait_percent)}
        ),
        CurvePanel(
            "peak memory, GB", lambda run: {"": _extract_points(run, _memory_gb)}, is_smoothed=False
        ),
    ]
    return [
        panel
        for panel in panels
        if any(points for run in runs for points in panel.read_curves(run).values())
    ]


def _task_loss_reader(task: str) -> Callable[[TrainingRun], dict[str, list[tuple[int, float]]]]:
    return lambda run: {"": _extract_points(run, lambda line: (line.get("losses") or {}).get(task))}


def _validation_reader(name: str) -> Callable[[TrainingRun], dict[str, list[tuple[int, float]]]]:
    return lambda run: {"": read_validation_curve(run, name)}


def _extract_points(
    run: TrainingRun, read_value: Callable[[MetricsLine], Any]
) -> list[tuple[int, float]]:
    pairs = [(line["step"], mean_finite([read_value(line)])) for line in run.metrics_lines]
    return [(step, found) for step, found in pairs if found is not None]


def _extract_learning_rates(run: TrainingRun) -> dict[str, list[tuple[int, float]]]:
    parts = dict.fromkeys(part for line in run.metrics_lines for part in line.get("lr") or {})
    rates = {}
    for part in parts:

        def read_rate(line: MetricsLine, part: str = part) -> Any:
            return (line.get("lr") or {}).get(part)

        rates[part] = _extract_points(run, read_rate)
    return rates


def _read_seconds(line: MetricsLine, part: str) -> float | None:
    seconds = line.get("seconds")
    return mean_finite([seconds.get(part)]) if isinstance(seconds, dict) else None


def _data_wait_percent(line: MetricsLine) -> float | None:
    data, total = _read_seconds(line, "data"), _read_seconds(line, "total")
    return None if data is None or not total else 100 * data / total


def _memory_gb(line: MetricsLine) -> float | None:
    size = mean_finite([line.get("memory_bytes")])
    return None if size is None else size / 1e9


def _extract_throughput(run: TrainingRun) -> list[tuple[int, float]]:
    """Without the first step of each session, which builds and tunes."""
    begins = {session.get("from_step", 0) + 1 for session in run.sessions} or {1}
    before, points = 0, []
    for line in run.metrics_lines:
        seen, total = line.get("samples_seen"), _read_seconds(line, "total")
        if isinstance(seen, int):
            if total and seen > before and line["step"] not in begins:
                points.append((line["step"], (seen - before) / total))
            before = seen
    return points


def _draw_panel(axes: Axes, panel: CurvePanel, runs: Sequence[TrainingRun]) -> None:
    names: dict[str, CurveStyle] = {}
    lows, highs = [], []
    for index, run in enumerate(runs):
        for place, (name, points) in enumerate(panel.read_curves(run).items()):
            if not points:
                continue
            steps, values = np.array(points, dtype=float).T
            style = LINE_STYLES[place % len(LINE_STYLES)] if name else _run_line_style(index)
            names |= {name: style} if name else {}
            smooth = _smooth_values(values) if panel.is_smoothed else values
            marker = "o" if len(points) == 1 or (panel.has_markers and len(points) <= 40) else None
            axes.plot(
                steps,
                smooth,
                color=_run_colour(index),
                linestyle=style,
                linewidth=1.4,
                marker=marker,
                markersize=3,
            )
            lows.append(smooth.min())
            highs.append(smooth.max())
            if panel.is_smoothed:
                axes.plot(
                    steps, values, color=_run_colour(index), linewidth=0.7, alpha=0.25, zorder=1
                )
                # One wild step must not flatten all others.
                lows.append(np.percentile(values, 2))
                highs.append(np.percentile(values, 98))
    low, high = min(lows), max(highs)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
    axes.set(title=panel.title, xlabel="step", ylim=(low - margin, high + margin))
    axes.title.set_fontsize(10)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    hide_top_and_right_spines(axes)
    if len(names) > 1:
        lines = [
            Line2D([], [], color="#555555", linestyle=style, label=name)
            for name, style in names.items()
        ]
        axes.legend(handles=lines, fontsize=8, frameon=False)


def _smooth_values(values: np.ndarray) -> np.ndarray:
    """Centred means; windows shrink towards both ends, so that no end is pulled."""
    half = min(len(values) // _SMOOTHING_DIVISOR, _MAX_SMOOTHING_STEPS) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _run_colour(index: int) -> str:
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def _run_line_style(index: int) -> CurveStyle:
    return LINE_STYLES[index // len(RUN_COLOURS) % len(LINE_STYLES)]
