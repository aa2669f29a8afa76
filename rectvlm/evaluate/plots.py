"""The pictures of an evaluation: ROC and precision-recall curves, calibration, Dice by lesion.

One panel a finding, since eighteen curves in one say nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from rectvlm.evaluate.scans import ScanResults
from rectvlm.figures import hide_top_and_right_spines, new_figure
from rectvlm.files import atomic_file
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.metrics.calibration import CALIBRATION_BINS, compute_reliability

LINE_COLOR, FILL_COLOR, REFERENCE_COLOR = "#0072B2", "#9CCBE8", "#BBBBBB"
PANEL_COLUMNS, PANEL_ROWS = 6, 3
DPI = 110
_MAX_DOTS = 300
"""Scans of one lesion up to which each is drawn as a dot."""

DrawPanel = Callable[[Axes, NDArray[np.float64], NDArray[np.bool_], float], None]
"""Axes, probabilities (n,), truth (n,) and threshold of one finding."""


def write_plots(folder: Path, result: dict[str, Any], scans: ScanResults) -> list[Path]:
    """Write the pictures to a folder; what was written."""
    figures = {
        "roc.png": plot_roc(result, scans),
        "precision_recall.png": plot_precision_recall(result, scans),
        "calibration.png": plot_calibration(result, scans),
    }
    if result["localization"] is not None:
        figures["dice.png"] = plot_dice(result, scans)
    for name, figure in figures.items():
        with atomic_file(folder / name) as file:
            figure.savefig(file, format="png", dpi=DPI)
    return [folder / name for name in figures]


def plot_roc(result: dict[str, Any], scans: ScanResults) -> Figure:
    """ROC curve of each finding, with the point of its threshold."""

    def one(
        axes: Axes, scores: NDArray[np.float64], truth: NDArray[np.bool_], threshold: float
    ) -> None:
        false, true, _ = roc_curve(truth, scores)
        axes.plot([0, 1], [0, 1], color=REFERENCE_COLOR, linewidth=0.8)
        axes.plot(
            false, true, color=LINE_COLOR, linewidth=1.6, solid_joinstyle="miter", clip_on=False
        )
        called = scores >= threshold
        axes.plot(
            called[~truth].mean(),
            called[truth].mean(),
            "o",
            color=LINE_COLOR,
            markersize=4.5,
            clip_on=False,
        )

    title = "ROC curves: AUROC and its 95% interval; the dot is the threshold"
    return _plot_finding_panels(
        result, scans, "auroc", title, "false positive rate", "true positive rate", one
    )


def plot_precision_recall(result: dict[str, Any], scans: ScanResults) -> Figure:
    """Precision-recall curve of each finding, with the share of positives and the point of its threshold."""

    def one(
        axes: Axes, scores: NDArray[np.float64], truth: NDArray[np.bool_], threshold: float
    ) -> None:
        precision, recall, _ = precision_recall_curve(truth, scores)
        axes.axhline(truth.mean(), color=REFERENCE_COLOR, linewidth=0.8)
        axes.step(recall, precision, where="post", color=LINE_COLOR, linewidth=1.6, clip_on=False)
        called = scores >= threshold
        if called.any():
            axes.plot(
                called[truth].mean(),
                truth[called].mean(),
                "o",
                color=LINE_COLOR,
                markersize=4.5,
                clip_on=False,
            )

    title = "Precision-recall curves: average precision and its 95% interval; the line is the share of positives"
    return _plot_finding_panels(
        result, scans, "average_precision", title, "recall", "precision", one
    )


def plot_calibration(result: dict[str, Any], scans: ScanResults) -> Figure:
    """Reliability diagram of each finding: share of positives by probability, and how many scans are in each bin."""

    def one(
        axes: Axes, scores: NDArray[np.float64], truth: NDArray[np.bool_], threshold: float
    ) -> None:
        bins = compute_reliability(np.ones((1, len(scores))), scores, truth)
        weight, predicted, positive = (
            bins.case_counts[0],
            bins.probability_sums[0],
            bins.positive_counts[0],
        )
        left = np.arange(CALIBRATION_BINS) / CALIBRATION_BINS
        axes.bar(
            left,
            weight / weight.sum(),
            1 / CALIBRATION_BINS,
            align="edge",
            color=FILL_COLOR,
            linewidth=0,
            alpha=0.45,
        )
        axes.plot([0, 1], [0, 1], color=REFERENCE_COLOR, linewidth=0.8)
        filled = weight > 0
        means = predicted[filled] / weight[filled], positive[filled] / weight[filled]
        axes.plot(*means, color=LINE_COLOR, linewidth=0.9, clip_on=False)
        # The area of a dot is the share of its bin: a point of two scans must not look like one of two hundred.
        axes.scatter(
            *means,
            s=4 + 70 * weight[filled] / weight.sum(),
            color=LINE_COLOR,
            linewidths=0,
            zorder=3,
            clip_on=False,
        )

    title = f"Calibration: expected calibration error of {CALIBRATION_BINS} bins; the bars are the shares of scans"
    return _plot_finding_panels(
        result, scans, "ece", title, "mean probability", "share of positives", one
    )


def plot_dice(result: dict[str, Any], scans: ScanResults) -> Figure:
    """Dice of the scans with a true lesion, by lesion: median, quartiles, 5 to 95%, and a dot a scan where few."""
    figure = new_figure(9, 4.2)
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    rows = scans.select_lesions()
    for lesion in LESIONS:
        found = [
            one.native
            for row in rows
            if (one := row[lesion.bit]) is not None and one.native.truth > 0
        ]
        values = np.array([2 * one.both / (one.predicted + one.truth) for one in found])
        place = lesion.bit
        axes.text(
            1.02,
            place,
            f"{values.size:,}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
        )
        if not values.size:
            continue
        box = {"color": LINE_COLOR, "linewidth": 1.2}
        axes.boxplot(
            values, positions=[place], orientation="horizontal", widths=0.45, whis=(5, 95), showfliers=False,
            patch_artist=True, boxprops={"facecolor": FILL_COLOR, "edgecolor": LINE_COLOR, "alpha": 0.6}, whiskerprops=box,
            capprops=box, medianprops={"color": LINE_COLOR, "linewidth": 2.4}, manage_ticks=False,
        )  # fmt: skip
        if values.size <= _MAX_DOTS:
            axes.plot(
                values, place + rng.uniform(-0.14, 0.14, values.size), "o", color=LINE_COLOR, markersize=3.2, alpha=0.55,
                markeredgewidth=0, clip_on=False,
            )  # fmt: skip
    axes.text(1.02, -0.62, "scans", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set_yticks(range(len(LESIONS)), [lesion.name for lesion in LESIONS])
    axes.set(xlim=(0, 1), ylim=(len(LESIONS) - 0.4, -0.75), xlabel="Dice on the native grid")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    hide_top_and_right_spines(axes)
    figure.suptitle(
        f"{_describe_evaluation(result)}. Dice where the lesion is: median, quartiles, 5 to 95%",
        fontsize=11,
    )
    return figure


def _plot_finding_panels(
    result: dict[str, Any],
    scans: ScanResults,
    score: str,
    title: str,
    across: str,
    up: str,
    draw: DrawPanel,
) -> Figure:
    """A panel a finding with one of its scores; an empty one where the finding has no such score."""
    # Fixed margins: a layout that is solved for 18 panels costs more than all that is drawn in them.
    figure = new_figure(PANEL_COLUMNS * 2.25, PANEL_ROWS * 2.55, layout="none")
    figure.subplots_adjust(left=0.045, right=0.99, bottom=0.075, top=0.895, wspace=0.12, hspace=0.3)
    panels = figure.subplots(PANEL_ROWS, PANEL_COLUMNS, sharex=True, sharey=True).ravel()
    for number, (name, axes) in enumerate(zip(FINDINGS, panels, strict=True)):
        row = result["classification"]["per_finding"][name]
        known = scans.known[:, number]
        scores, truth = scans.probabilities[known, number], scans.labels[known, number] > 0.5
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
        axes.set_title(name.replace("Interlobular", "Interlob."), fontsize=8.5, pad=15)
        axes.tick_params(labelsize=8, length=2.5)
        hide_top_and_right_spines(axes)
        if row[score] is None:
            words = "no known label" if not known.any() else "one class only"
        else:
            draw(axes, scores, truth, row["threshold"])
            interval = row.get("ci95", {}).get(score)
            words = f"{row[score]:.2f}" + (
                f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
            )
            words += f", {row['n_positive']:,} of {row['n_known']:,}"
        axes.text(
            0.5, 1.035, words, transform=axes.transAxes, ha="center", fontsize=7.5, color="#555555"
        )
    figure.supxlabel(across, fontsize=9.5)
    figure.supylabel(up, fontsize=9.5)
    figure.suptitle(f"{_describe_evaluation(result)}. {title}", fontsize=11)
    return figure


def _describe_evaluation(result: dict[str, Any]) -> str:
    return f"{result['config']}, {result['split']} split, {result['n_scans']:,} scans"
