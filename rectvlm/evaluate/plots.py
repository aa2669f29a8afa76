"""Plots of an evaluation: ROC and precision-recall curves, calibration, Dice by lesion.

Each finding has a panel of its own, since eighteen curves in one panel cannot be read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from rectvlm.evaluate.result import EvaluationResult
from rectvlm.evaluate.scans import ScanResults
from rectvlm.figures import hide_top_and_right_spines, new_figure
from rectvlm.files import atomic_file
from rectvlm.labels import FINDINGS, LESIONS, Lesion
from rectvlm.metrics.arrays import BoolArray, FloatArray
from rectvlm.metrics.calibration import CALIBRATION_BINS, compute_reliability

LINE_COLOR, FILL_COLOR, REFERENCE_COLOR = "#0072B2", "#9CCBE8", "#BBBBBB"
LINE: dict[str, Any] = {"color": LINE_COLOR, "linewidth": 1.6, "clip_on": False}
DOT: dict[str, Any] = {"color": LINE_COLOR, "markersize": 4.5, "clip_on": False}
REFERENCE_LINE: dict[str, Any] = {"color": REFERENCE_COLOR, "linewidth": 0.8}
PANEL_COLUMNS, PANEL_ROWS = 6, 3
DPI = 110
MAX_DOTS = 300
"""Largest number of scans of one lesion that are drawn as dots."""

DrawPanel = Callable[[Axes, FloatArray, BoolArray, float], None]
"""Draws one finding: axes, probabilities (n,), truth (n,), threshold."""


@dataclass(frozen=True)
class _PanelFigure:
    """A figure with a panel for each finding."""

    score: str
    """Score of the finding that is written above its panel."""
    title: str
    x_label: str
    y_label: str
    draw: DrawPanel


def draw_plots(result: EvaluationResult, scans: ScanResults) -> dict[str, Figure]:
    """Draw all plots: figures by the stem of their file.

    Args:
        result: metrics of `evaluate_checkpoint`.
        scans: results by scan.
    """
    figures = {
        "roc": plot_roc(result, scans),
        "precision_recall": plot_precision_recall(result, scans),
        "calibration": plot_calibration(result, scans),
    }
    if result.localization is not None:
        figures["dice"] = plot_dice(result, scans)
    return figures


def write_plots(folder: Path, figures: Mapping[str, Figure]) -> None:
    """Write the figures of `draw_plots` to a folder, as PNG."""
    for name, figure in figures.items():
        with atomic_file(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=DPI)


def plot_roc(result: EvaluationResult, scans: ScanResults) -> Figure:
    """ROC curve of each finding, with the point of its threshold."""
    title = "ROC curves: AUROC and its 95% interval; the dot is the threshold"
    figure = _PanelFigure("auroc", title, "false positive rate", "true positive rate", _draw_roc)
    return _plot_finding_panels(result, scans, figure)


def plot_precision_recall(result: EvaluationResult, scans: ScanResults) -> Figure:
    """Precision-recall curve of each finding, with its share of positives and its threshold."""
    title = (
        "Precision-recall curves: average precision and its 95% interval; "
        "the line is the share of positives"
    )
    figure = _PanelFigure("average_precision", title, "recall", "precision", _draw_precision_recall)
    return _plot_finding_panels(result, scans, figure)


def plot_calibration(result: EvaluationResult, scans: ScanResults) -> Figure:
    """Reliability diagram of each finding: share of positives and of scans by probability."""
    title = (
        f"Calibration: expected calibration error of {CALIBRATION_BINS} bins; "
        "the bars are the shares of scans"
    )
    figure = _PanelFigure("ece", title, "mean probability", "share of positives", _draw_calibration)
    return _plot_finding_panels(result, scans, figure)


def plot_dice(result: EvaluationResult, scans: ScanResults) -> Figure:
    """Dice of the scans with a true lesion, by lesion: median, quartiles, 5 to 95%.

    Each scan is a dot where there are few.
    """
    figure = new_figure(9, 4.2)
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for lesion in LESIONS:
        values = _select_dice(scans, lesion)
        _write_beside(axes, lesion.bit, f"{values.size:,}")
        if not values.size:
            continue
        _draw_box(axes, values, lesion.bit)
        if values.size <= MAX_DOTS:
            heights = lesion.bit + rng.uniform(-0.14, 0.14, values.size)
            dots: dict[str, Any] = {
                "markersize": 3.2,
                "alpha": 0.55,
                "markeredgewidth": 0,
                "clip_on": False,
            }
            axes.plot(values, heights, "o", color=LINE_COLOR, **dots)
    _write_beside(axes, -0.62, "scans")
    axes.set_yticks(range(len(LESIONS)), [lesion.name for lesion in LESIONS])
    axes.set(xlim=(0, 1), ylim=(len(LESIONS) - 0.4, -0.75), xlabel="Dice on the native grid")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    hide_top_and_right_spines(axes)
    title = "Dice where the lesion is: median, quartiles, 5 to 95%"
    figure.suptitle(f"{_describe_evaluation(result)}. {title}", fontsize=11)
    return figure


def _draw_roc(axes: Axes, scores: FloatArray, truth: BoolArray, threshold: float) -> None:
    false_positive_rate, true_positive_rate, _ = roc_curve(truth, scores)
    axes.plot([0, 1], [0, 1], **REFERENCE_LINE)
    axes.plot(false_positive_rate, true_positive_rate, solid_joinstyle="miter", **LINE)
    called = scores >= threshold
    axes.plot(called[~truth].mean(), called[truth].mean(), "o", **DOT)


def _draw_precision_recall(
    axes: Axes, scores: FloatArray, truth: BoolArray, threshold: float
) -> None:
    precision, recall, _ = precision_recall_curve(truth, scores)
    axes.axhline(truth.mean(), **REFERENCE_LINE)
    axes.step(recall, precision, where="post", **LINE)
    called = scores >= threshold
    if called.any():
        axes.plot(called[truth].mean(), truth[called].mean(), "o", **DOT)


def _draw_calibration(axes: Axes, scores: FloatArray, truth: BoolArray, threshold: float) -> None:
    bins = compute_reliability(np.ones((1, len(scores))), scores, truth)
    counts = bins.case_counts[0]
    shares = counts / counts.sum()
    width = 1 / CALIBRATION_BINS
    left = np.arange(CALIBRATION_BINS) / CALIBRATION_BINS
    bars: dict[str, Any] = {"color": FILL_COLOR, "linewidth": 0, "alpha": 0.45}
    axes.bar(left, shares, width, align="edge", **bars)
    axes.plot([0, 1], [0, 1], **REFERENCE_LINE)

    filled = counts > 0
    means = bins.probability_sums[0][filled] / counts[filled]
    positive_shares = bins.positive_counts[0][filled] / counts[filled]
    axes.plot(means, positive_shares, color=LINE_COLOR, linewidth=0.9, clip_on=False)
    # The area of a dot is the share of its bin: a point of two scans must not look like one of two
    # hundred.
    areas = 4 + 70 * counts[filled] / counts.sum()
    dots: dict[str, Any] = {"color": LINE_COLOR, "linewidths": 0, "zorder": 3, "clip_on": False}
    axes.scatter(means, positive_shares, s=areas, **dots)


def _select_dice(scans: ScanResults, lesion: Lesion) -> NDArray[np.float64]:
    """Dice of the scans in which a lesion is there."""
    values = []
    for row in scans.select_lesions():
        record = row[lesion.bit]
        if record is not None and record.native.truth > 0:
            native = record.native
            values.append(2 * native.both / (native.predicted + native.truth))
    return np.array(values)


def _draw_box(axes: Axes, values: FloatArray, height: float) -> None:
    line: dict[str, Any] = {"color": LINE_COLOR, "linewidth": 1.2}
    axes.boxplot(
        values,
        positions=[height],
        orientation="horizontal",
        widths=0.45,
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": FILL_COLOR, "edgecolor": LINE_COLOR, "alpha": 0.6},
        whiskerprops=line,
        capprops=line,
        medianprops={"color": LINE_COLOR, "linewidth": 2.4},
        manage_ticks=False,
    )


def _write_beside(axes: Axes, height: float, text: str) -> None:
    """Write a text to the right of the axes."""
    transform = axes.get_yaxis_transform()
    axes.text(1.02, height, text, transform=transform, va="center", fontsize=9)


def _plot_finding_panels(
    result: EvaluationResult, scans: ScanResults, panel_figure: _PanelFigure
) -> Figure:
    """A panel for each finding; it is empty where the finding does not have the score."""
    # Fixed margins: a layout that is solved for 18 panels takes longer than all drawing in them.
    figure = new_figure(PANEL_COLUMNS * 2.25, PANEL_ROWS * 2.55, layout="none")
    figure.subplots_adjust(left=0.045, right=0.99, bottom=0.075, top=0.895, wspace=0.12, hspace=0.3)
    panels = figure.subplots(PANEL_ROWS, PANEL_COLUMNS, sharex=True, sharey=True).ravel()
    for number, (name, axes) in enumerate(zip(FINDINGS, panels, strict=True)):
        row = result.classification["per_finding"][name]
        known = scans.known[:, number]
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
        axes.set_title(name.replace("Interlobular", "Interlob."), fontsize=8.5, pad=15)
        axes.tick_params(labelsize=8, length=2.5)
        hide_top_and_right_spines(axes)
        if row[panel_figure.score] is not None:
            scores, truth = scans.probabilities[known, number], scans.labels[known, number] > 0.5
            panel_figure.draw(axes, scores, truth, row["threshold"])
        caption = _describe_score(row, panel_figure.score)
        style: dict[str, Any] = {"ha": "center", "fontsize": 7.5, "color": "#555555"}
        axes.text(0.5, 1.035, caption, transform=axes.transAxes, **style)
    figure.supxlabel(panel_figure.x_label, fontsize=9.5)
    figure.supylabel(panel_figure.y_label, fontsize=9.5)
    figure.suptitle(f"{_describe_evaluation(result)}. {panel_figure.title}", fontsize=11)
    return figure


def _describe_score(row: Mapping[str, Any], score: str) -> str:
    """A finding's score with its interval and counts, or the reason why it has none."""
    if row[score] is None:
        return "one class only" if row["n_known"] else "no known label"
    interval = row.get("ci95", {}).get(score)
    bounds = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return f"{row[score]:.2f}{bounds}, {row['n_positive']:,} of {row['n_known']:,}"


def _describe_evaluation(result: EvaluationResult) -> str:
    return f"{result.config}, {result.split} split, {result.n_scans:,} scans"
