"""Curves of runs as one figure: losses by task, learning rate, validation, throughput, memory."""

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
from rectvlm.runs.read_runs import MetricsLine, TrainingRun, read_number, task_loss
from rectvlm.runs.run_tables import list_tasks, list_validation_metrics, read_validation_curve
from rectvlm.types import UserError

RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of runs, apart for colour-blind readers too (Okabe and Ito, 2008). Runs beyond them have
dashed lines."""
CurveStyle = Literal["solid", "dashed", "dotted", "dashdot"]
LINE_STYLES: tuple[CurveStyle, ...] = ("solid", "dashed", "dotted", "dashdot")
_PANEL_COLUMNS, _PANEL_WIDTH_INCHES, _PANEL_HEIGHT_INCHES = 3, 4.6, 3.1
_LEGEND_HEIGHT_INCHES, _LEGEND_ROW_HEIGHT_INCHES = 0.3, 0.22
_SMOOTHING_DIVISOR, _MAX_SMOOTHING_STEPS = 10, 200
"""A smoothed curve shows means over windows of a tenth of its steps, at most 200 steps; the values
themselves stand faintly behind."""
_MAX_MARKERS = 40

Curve = list[tuple[int, float]]
"""Steps and values."""


@dataclass(frozen=True)
class CurvePanel:
    """One quantity over the steps."""

    title: str
    read_curves: Callable[[TrainingRun], dict[str, Curve]]
    """Reads the curves of a run by name; the name of a single curve is empty."""
    is_smoothed: bool = True
    has_markers: bool = False
    """Whether each value of a short curve has a dot."""


def plot_runs(runs: Sequence[TrainingRun], path: Path) -> None:
    """Draw all quantities that the runs have on record.

    Args:
        runs: the runs, each with a colour of its own.
        path: the PNG file to write.

    Raises:
        UserError: no run has a step on record.
    """
    panels = _make_panels(runs)
    if not panels:
        names = ", ".join(run.name for run in runs)
        raise UserError(f"There is nothing to draw: no complete line in the metrics of {names}.")
    rows = math.ceil(len(panels) / _PANEL_COLUMNS)
    columns = min(_PANEL_COLUMNS, len(panels))
    legend_rows = math.ceil(len(runs) / columns)
    panels_height = rows * _PANEL_HEIGHT_INCHES
    figure = new_figure(
        columns * _PANEL_WIDTH_INCHES,
        panels_height + _LEGEND_HEIGHT_INCHES + _LEGEND_ROW_HEIGHT_INCHES * legend_rows,
    )
    axes_grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(axes_grid, panels, strict=False):
        _draw_panel(axes, panel, runs)
    for axes in axes_grid[len(panels) :]:
        axes.set_visible(False)

    handles: list[Line2D] = []
    for index, run in enumerate(runs):
        label, colour = f"{run.name} ({run.state})", _run_colour(index)
        handles.append(Line2D([], [], color=colour, linestyle=_run_line_style(index), label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)


def _make_panels(runs: Sequence[TrainingRun]) -> list[CurvePanel]:
    """Make the panels that have a point in any run."""
    panels = [CurvePanel("loss", lambda run: {"": read_total_losses(run)})]
    tasks = list_tasks(runs)
    if len(tasks) > 1:
        for task in tasks:
            panels.append(CurvePanel(f"loss: {task}", _task_loss_reader(task)))
    for metric in list_validation_metrics(runs):
        reader = _validation_reader(metric)
        panels.append(
            CurvePanel(f"validation: {metric}", reader, is_smoothed=False, has_markers=True)
        )
    panels += [
        CurvePanel("learning rate", _read_learning_rates, is_smoothed=False),
        CurvePanel("gradient norm", _line_reader(lambda line: line.get("grad_norm"))),
        CurvePanel("samples/s, all ranks", lambda run: {"": _read_throughput(run)}),
        CurvePanel("data wait, % of the step", _line_reader(_data_wait_percent)),
        CurvePanel("peak memory, GB", _line_reader(_memory_gb), is_smoothed=False),
    ]
    return [panel for panel in panels if _has_points(panel, runs)]


def _has_points(panel: CurvePanel, runs: Sequence[TrainingRun]) -> bool:
    return any(any(panel.read_curves(run).values()) for run in runs)


def _line_reader(
    read_value: Callable[[MetricsLine], Any],
) -> Callable[[TrainingRun], dict[str, Curve]]:
    """Make a reader of one curve, whose values are read from the lines of a run."""
    return lambda run: {"": _read_curve(run, read_value)}


def _task_loss_reader(task: str) -> Callable[[TrainingRun], dict[str, Curve]]:
    return _line_reader(lambda line: task_loss(line, task))


def _validation_reader(metric: str) -> Callable[[TrainingRun], dict[str, Curve]]:
    return lambda run: {"": read_validation_curve(run, metric)}


def _read_curve(run: TrainingRun, read_value: Callable[[MetricsLine], Any]) -> Curve:
    curve: Curve = []
    for line in run.metrics_lines:
        value = read_number(read_value(line))
        if value is not None:
            curve.append((line["step"], value))
    return curve


def read_total_losses(run: TrainingRun) -> Curve:
    """Read the total loss of the steps that have targets.

    A task without targets in a step counts with what lies between its values before and after.
    """
    losses_by_task = [run.read_task_losses(line) for line in run.metrics_lines]
    fillings: dict[str, np.ndarray] = {}
    for task in run.tasks:
        values = np.array([losses.get(task) for losses in losses_by_task], dtype=float)
        known = np.flatnonzero(np.isfinite(values))
        if len(known):
            weight = run.loss_weights.get(task, 1.0)
            fillings[task] = weight * np.interp(np.arange(len(values)), known, values[known])
    curve: Curve = []
    for index, (line, losses) in enumerate(zip(run.metrics_lines, losses_by_task, strict=True)):
        missing = [task for task in fillings if losses.get(task) is None]
        total = read_number(line.get("loss"))
        if total is not None and (len(missing) < len(fillings) or not losses):
            curve.append((line["step"], total + sum(float(fillings[t][index]) for t in missing)))
    return curve


def _read_learning_rates(run: TrainingRun) -> dict[str, Curve]:
    """Read the learning rate of each part of the model."""
    curves: dict[str, Curve] = {}
    for line in run.metrics_lines:
        for part, rate in (line.get("lr") or {}).items():
            curve, value = curves.setdefault(part, []), read_number(rate)
            if value is not None:
                curve.append((line["step"], value))
    return curves


def _read_seconds(line: MetricsLine, section: str) -> float | None:
    seconds = line.get("seconds")
    return read_number(seconds.get(section)) if isinstance(seconds, dict) else None


def _data_wait_percent(line: MetricsLine) -> float | None:
    data, total = _read_seconds(line, "data"), _read_seconds(line, "total")
    return None if data is None or not total else 100 * data / total


def _memory_gb(line: MetricsLine) -> float | None:
    memory_bytes = read_number(line.get("memory_bytes"))
    return None if memory_bytes is None else memory_bytes / 1e9


def _read_throughput(run: TrainingRun) -> Curve:
    """Read samples a second, without the first step of each session, which builds and tunes."""
    curve: Curve = []
    seen_before = 0
    for line in run.metrics_lines:
        seen, seconds = line.get("samples_seen"), _read_seconds(line, "total")
        if not isinstance(seen, int):
            continue
        if seconds and seen > seen_before and not run.is_first_step(line["step"]):
            curve.append((line["step"], (seen - seen_before) / seconds))
        seen_before = seen
    return curve


def _draw_panel(axes: Axes, panel: CurvePanel, runs: Sequence[TrainingRun]) -> None:
    styles_by_name: dict[str, CurveStyle] = {}
    limits: list[float] = []
    for index, run in enumerate(runs):
        for position, (name, curve) in enumerate(panel.read_curves(run).items()):
            if not curve:
                continue
            style = _run_line_style(index)
            if name:
                style = styles_by_name[name] = LINE_STYLES[position % len(LINE_STYLES)]
            limits += _draw_curve(axes, panel, curve, _run_colour(index), style)

    low, high = min(limits), max(limits)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
    axes.set(title=panel.title, xlabel="step", ylim=(low - margin, high + margin))
    axes.title.set_fontsize(10)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    hide_top_and_right_spines(axes)
    if len(styles_by_name) > 1:
        handles: list[Line2D] = []
        for name, style in styles_by_name.items():
            handles.append(Line2D([], [], color="#555555", linestyle=style, label=name))
        axes.legend(handles=handles, fontsize=8, frameon=False)


def _draw_curve(
    axes: Axes, panel: CurvePanel, curve: Curve, colour: str, style: CurveStyle
) -> list[float]:
    """Draw one curve; return values that the vertical axis must reach."""
    steps, values = np.array(curve, dtype=float).T
    line_values = _smooth_values(values) if panel.is_smoothed else values
    has_markers = len(curve) == 1 or (panel.has_markers and len(curve) <= _MAX_MARKERS)
    axes.plot(
        steps,
        line_values,
        color=colour,
        linestyle=style,
        linewidth=1.4,
        marker="o" if has_markers else None,
        markersize=3,
    )
    limits = [line_values.min(), line_values.max()]
    if panel.is_smoothed:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25, zorder=1)
        # One wild step must not flatten all others.
        limits += [np.percentile(values, 2), np.percentile(values, 98)]
    return limits


def _smooth_values(values: np.ndarray) -> np.ndarray:
    """Return centred means; windows shrink towards both ends, so that no end is pulled."""
    half_window = min(len(values) // _SMOOTHING_DIVISOR, _MAX_SMOOTHING_STEPS) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half_window, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _run_colour(index: int) -> str:
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def _run_line_style(index: int) -> CurveStyle:
    return LINE_STYLES[index // len(RUN_COLOURS) % len(LINE_STYLES)]
