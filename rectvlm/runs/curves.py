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

from rectvlm.drawing import bare, new_figure
from rectvlm.runs.reading import Line, Run, mean
from rectvlm.runs.show import validation_curve, validation_names
from rectvlm.types import UserError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of runs; they keep apart for colour-blind readers (Okabe and Ito, 2008). Beyond these, lines are dashed."""
Style = Literal["solid", "dashed", "dotted", "dashdot"]
STYLES: tuple[Style, ...] = ("solid", "dashed", "dotted", "dashdot")
_COLUMNS, _WIDTH, _HEIGHT = 3, 4.6, 3.1
"""Panels side by side; inches of each."""
_SMOOTH, _WIDEST = 10, 200
"""A curve is drawn as means over windows of a tenth of it, at most so many steps, and the steps faintly behind."""


@dataclass(frozen=True)
class Panel:
    """One quantity over the steps."""

    title: str
    curves: Callable[[Run], dict[str, list[tuple[int, float]]]]
    """By name (empty where there is one alone): steps and values."""
    smooth: bool = True
    marks: bool = False
    """Whether each value has a dot, where there are few."""


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw all that the runs have on record.

    Args:
        runs: each has a colour.
        path: of the PNG.

    Raises:
        UserError: no run has a step on record.
    """
    panels = _panels(runs)
    if not panels:
        names = ", ".join(run.name for run in runs)
        raise UserError(f"There is nothing to draw: no whole line in the metrics of {names}.")
    rows = math.ceil(len(panels) / _COLUMNS)
    columns = min(_COLUMNS, len(panels))
    # Below: a line for each run's name.
    figure = new_figure(columns * _WIDTH, rows * _HEIGHT + 0.3 + 0.22 * math.ceil(len(runs) / columns))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, runs)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = [
        Line2D([], [], color=_colour(index), linestyle=_style(index), label=f"{run.name} ({run.state})")
        for index, run in enumerate(runs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)


def _panels(runs: Sequence[Run]) -> list[Panel]:
    tasks = dict.fromkeys(task for run in runs for task in run.tasks)
    validations = dict.fromkeys(name for run in runs for name in validation_names(run))
    panels = [Panel("loss", lambda run: {"": _series(run, lambda line: line.get("loss"))})]
    if len(tasks) > 1:
        panels += [Panel(f"loss: {task}", _task(task)) for task in tasks]
    panels += [Panel(f"validation: {name}", _validation(name), smooth=False, marks=True) for name in validations]
    panels += [
        Panel("learning rate", _rates, smooth=False),
        Panel("gradient norm", lambda run: {"": _series(run, lambda line: line.get("grad_norm"))}),
        Panel("samples/s, all ranks", lambda run: {"": _throughput(run)}),
        Panel("data wait, % of the step", lambda run: {"": _series(run, _wait)}),
        Panel("peak memory, GB", lambda run: {"": _series(run, _memory)}, smooth=False),
    ]
    return [panel for panel in panels if any(points for run in runs for points in panel.curves(run).values())]


def _task(task: str) -> Callable[[Run], dict[str, list[tuple[int, float]]]]:
    return lambda run: {"": _series(run, lambda line: (line.get("losses") or {}).get(task))}


def _validation(name: str) -> Callable[[Run], dict[str, list[tuple[int, float]]]]:
    return lambda run: {"": validation_curve(run, name)}


def _series(run: Run, value: Callable[[Line], Any]) -> list[tuple[int, float]]:
    pairs = [(line["step"], mean([value(line)])) for line in run.lines]
    return [(step, found) for step, found in pairs if found is not None]


def _rates(run: Run) -> dict[str, list[tuple[int, float]]]:
    parts = dict.fromkeys(part for line in run.lines for part in line.get("lr") or {})
    return {part: _series(run, lambda line, part=part: (line.get("lr") or {}).get(part)) for part in parts}  # type: ignore[misc]


def _seconds(line: Line, part: str) -> float | None:
    seconds = line.get("seconds")
    return mean([seconds.get(part)]) if isinstance(seconds, dict) else None


def _wait(line: Line) -> float | None:
    data, total = _seconds(line, "data"), _seconds(line, "total")
    return None if data is None or not total else 100 * data / total


def _memory(line: Line) -> float | None:
    size = mean([line.get("memory_bytes")])
    return None if size is None else size / 1e9


def _throughput(run: Run) -> list[tuple[int, float]]:
    """Without the first step of each session, which builds and tunes."""
    begins = {session.get("from_step", 0) + 1 for session in run.sessions} or {1}
    before, points = 0, []
    for line in run.lines:
        seen, total = line.get("samples_seen"), _seconds(line, "total")
        if isinstance(seen, int):
            if total and seen > before and line["step"] not in begins:
                points.append((line["step"], (seen - before) / total))
            before = seen
    return points


def _draw(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    names: dict[str, Style] = {}
    lows, highs = [], []
    for index, run in enumerate(runs):
        for place, (name, points) in enumerate(panel.curves(run).items()):
            if not points:
                continue
            steps, values = np.array(points, dtype=float).T
            style = STYLES[place % len(STYLES)] if name else _style(index)
            names |= {name: style} if name else {}
            smooth = _smooth(values) if panel.smooth else values
            marker = "o" if len(points) == 1 or (panel.marks and len(points) <= 40) else None
            axes.plot(steps, smooth, color=_colour(index), linestyle=style, linewidth=1.4, marker=marker, markersize=3)
            lows.append(smooth.min())
            highs.append(smooth.max())
            if panel.smooth:
                axes.plot(steps, values, color=_colour(index), linewidth=0.7, alpha=0.25, zorder=1)
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
    bare(axes)
    if len(names) > 1:
        lines = [Line2D([], [], color="#555555", linestyle=style, label=name) for name, style in names.items()]
        axes.legend(handles=lines, fontsize=8, frameon=False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred means; windows shrink towards both ends, so that no end is pulled."""
    half = min(len(values) // _SMOOTH, _WIDEST) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _style(index: int) -> Style:
    return STYLES[index // len(COLOURS) % len(STYLES)]
