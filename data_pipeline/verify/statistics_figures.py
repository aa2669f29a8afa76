"""Figures of a data set's statistics, and `stats.json` beside them.

Colours differ for colour-blind readers and in grey (Okabe and Ito, 2008).
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from data_pipeline.verify.contact_sheet import draw_contact_sheet, read_sheet_samples
from data_pipeline.verify.statistics import (
    DatasetStatistics,
    SampleSummary,
    count_labels,
    outlined_volumes_ml,
)
from rectvlm.data.hounsfield import MAX_HU, MIN_HU
from rectvlm.data.store import ShardStore
from rectvlm.figures import hide_top_and_right_spines, new_figure
from rectvlm.files import atomic_file
from rectvlm.labels import FINDINGS, LESIONS

_LABEL_COLOURS = {"present": "#0072B2", "absent": "#9CCBE8", "unknown": "#E3E3E3"}
_SPLIT_COLOURS: dict[str, str] = {
    "train": "#0072B2",
    "dev": "#009E73",
    "valid": "#D55E00",
    "grounding": "#CC79A7",
}
_MAX_DOTS = 300
"""Number of lesions of one kind up to which each is drawn as a dot."""
_HISTOGRAM_STEPS = 30
_HU_PER_STEP = 16


def write_statistics(
    statistics: DatasetStatistics, folder: str | Path | ShardStore, out: Path
) -> list[Path]:
    """Write `stats.json` and the figures; return their paths.

    Args:
        statistics: of at least one sample.
        folder: path or URL of the shards, for the slices of the contact sheet.
        out: folder that is written to.
    """
    figures = {
        "labels.png": draw_labels_figure(statistics),
        "sampling.png": draw_sampling_figure(statistics),
        "hu.png": draw_hu_figure(statistics),
        "lesions.png": draw_lesions_figure(statistics),
    }
    samples = read_sheet_samples(statistics.sample_summaries, ShardStore(folder))
    if samples:
        figures["contact_sheet.png"] = draw_contact_sheet(samples)
    with atomic_file(out / "stats.json") as file:
        file.write(statistics.to_json())
    for name, figure in figures.items():
        with atomic_file(out / name) as file:
            figure.savefig(file, format="png", dpi=120)
    return [out / name for name in ("stats.json", *figures)]


def draw_labels_figure(statistics: DatasetStatistics) -> Figure:
    """Draw how many samples have each finding present, absent and unknown, by split."""
    by_split = statistics.by_split()
    figure = new_figure(4.5 + 4.5 * len(by_split), 7.5)
    columns = figure.subplots(1, len(by_split), sharey=True, squeeze=False)[0]
    for axes, (split, summaries) in zip(columns, by_split.items(), strict=True):
        _draw_labels(axes, split, summaries)
    columns[0].set_ylim(len(FINDINGS) - 0.4, -0.6)
    patches = [Patch(color=colour, label=word) for word, colour in _LABEL_COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Findings (at the right: present)")
    return figure


def _draw_labels(axes: Axes, split: str, summaries: list[SampleSummary]) -> None:
    """Draw one stacked bar a finding, with the share of present samples among the known ones."""
    total = len(summaries)
    counts = count_labels(summaries)
    rows = np.arange(len(FINDINGS))
    left = np.zeros(len(FINDINGS))
    for word, colour in _LABEL_COLOURS.items():
        widths = np.array([counts[finding][word] for finding in FINDINGS])
        axes.barh(rows, widths, left=left, color=colour, edgecolor="white", linewidth=0.5)
        left += widths
    for row, finding in enumerate(FINDINGS):
        present = counts[finding]["present"]
        known = present + counts[finding]["absent"]
        share = f"({present / known:.0%} of known)" if known else "(none known)"
        axes.text(total * 1.02, row, f"{present:,} {share}", va="center", fontsize=9)
    axes.set(title=f"{split}: {total:,} samples", xlabel="samples", xlim=(0, total * 1.45))
    ticks = MaxNLocator(4, integer=True).tick_values(0, total)
    axes.set_xticks([tick for tick in ticks if tick <= total])
    axes.set_yticks(rows, FINDINGS)
    axes.tick_params(axis="y", length=0)
    hide_top_and_right_spines(axes)
    axes.spines["bottom"].set_bounds(0, total)


def draw_sampling_figure(statistics: DatasetStatistics) -> Figure:
    """Draw native spacing in-plane and between slices, and the number of slices, by split."""
    figure = new_figure(13, 4.2)
    samplings = [summary.native_sampling for summary in statistics.sample_summaries]
    splits = np.array([summary.split for summary in statistics.sample_summaries])
    panels = (
        ("in-plane spacing, mm", [sampling.in_plane_mm for sampling in samplings], False),
        ("slice spacing, mm", [sampling.slice_spacing_mm for sampling in samplings], False),
        ("slices", [sampling.slice_count for sampling in samplings], True),
    )
    for axes, (name, numbers, are_integers) in zip(figure.subplots(1, 3), panels, strict=True):
        values = np.array(numbers, dtype=float)
        edges = _histogram_edges(values, are_integers)
        for split, colour in _SPLIT_COLOURS.items():
            split_values = values[splits == split]
            if not split_values.size:
                continue
            percent = np.full(split_values.size, 100 / split_values.size)
            axes.hist(split_values, edges, weights=percent, color=colour, alpha=0.25)
            axes.hist(
                split_values,
                edges,
                weights=percent,
                color=colour,
                histtype="step",
                linewidth=1.5,
            )
        axes.set(xlabel=name, ylabel="% of the split's samples")
        hide_top_and_right_spines(axes)
    _add_split_legend(figure, statistics)
    figure.suptitle("Native sampling of the files")
    return figure


def _histogram_edges(values: NDArray[np.float64], are_integers: bool) -> NDArray[np.float64]:
    """Edges of about 30 steps that hold all values; each step holds equally many integers."""
    low, high = values.min(), values.max()
    if are_integers:
        width = max(1, -(-int(high - low + 1) // _HISTOGRAM_STEPS))
        return np.arange(low - 0.5 - width, high + 0.5 + 2 * width, width)
    margin = max((high - low) * 0.02, abs(high) * 0.02)
    return np.linspace(low - margin, high + margin, _HISTOGRAM_STEPS + 1)


def draw_hu_figure(statistics: DatasetStatistics) -> Figure:
    """Draw the shares of the shards' voxels by HU, on a logarithmic scale."""
    figure = new_figure(10, 4.8)
    axes = figure.subplots()
    step_count = (MAX_HU - MIN_HU + 1) // _HU_PER_STEP
    centres = MIN_HU + _HU_PER_STEP * (np.arange(step_count) + 0.5)
    lowest = 1.0
    for split, counts in statistics.hu_histograms.items():
        percent = 100 * counts.reshape(-1, _HU_PER_STEP).sum(axis=1) / max(1, counts.sum())
        lowest = min(lowest, percent[percent > 0].min(initial=1.0))
        colour = _SPLIT_COLOURS[split]
        axes.step(centres, np.maximum(percent, 1e-12), where="mid", color=colour, linewidth=1.3)
    for low, high, name in ((-1024, -700, "air, lung"), (-150, 150, "soft tissue")):
        axes.axvspan(low, high, color="#000000", alpha=0.07, linewidth=0)
        axes.text(
            (low + high) / 2,
            0.97,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=8.5,
        )
    axes.set(
        yscale="log",
        xlim=(MIN_HU - 50, MAX_HU + 50),
        xlabel="HU",
        ylabel=f"% of voxels, in steps of {_HU_PER_STEP} HU",
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(lowest / 2, 300)
    hide_top_and_right_spines(axes)
    _add_split_legend(figure, statistics)
    figure.suptitle(f"HU on the grid (−{-MIN_HU}: air, and what lies outside the files)")
    return figure


def draw_lesions_figure(statistics: DatasetStatistics) -> Figure:
    """Draw the distribution of each lesion's outlined volume by split.

    A row shows 5 to 95 %, quartiles and median, and a dot for each sample where they are few.
    """
    figure = new_figure(10, 5)
    axes = figure.subplots()
    by_split = statistics.by_split()
    rng = np.random.default_rng(0)
    for lesion in LESIONS:
        for number, (split, summaries) in enumerate(by_split.items()):
            row = lesion.bit + (number - (len(by_split) - 1) / 2) * 0.76 / max(2, len(by_split))
            volumes = np.array(outlined_volumes_ml(summaries, lesion))
            _write_beside(axes, row, f"{volumes.size:,}")
            if volumes.size:
                _draw_volumes(axes, row, volumes, _SPLIT_COLOURS[split], rng)
    _write_beside(axes, -0.62, "outlined")
    axes.set_yticks(range(len(LESIONS)), [lesion.name for lesion in LESIONS])
    axes.set(
        xscale="log", xlabel="outlined volume on the grid, ml", ylim=(len(LESIONS) - 0.4, -0.75)
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    hide_top_and_right_spines(axes)
    _add_split_legend(figure, statistics)
    figure.suptitle("Lesions: median, quartiles, 5 to 95 %")
    return figure


def _write_beside(axes: Axes, row: float, text: str) -> None:
    """Write a text at the right of a row."""
    axes.text(1.01, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)


def _draw_volumes(
    axes: Axes, row: float, volumes: NDArray[np.float64], colour: str, rng: np.random.Generator
) -> None:
    p5, p25, p50, p75, p95 = np.percentile(volumes, [5, 25, 50, 75, 95])
    axes.plot([p5, p95], [row, row], color=colour, linewidth=1.2, solid_capstyle="butt")
    axes.plot([p25, p75], [row, row], color=colour, linewidth=9, alpha=0.35, solid_capstyle="butt")
    axes.plot([p50, p50], [row - 0.13, row + 0.13], color=colour, linewidth=2.5)
    if volumes.size <= _MAX_DOTS:
        jittered_rows = row + rng.uniform(-0.1, 0.1, volumes.size)
        (dots,) = axes.plot(volumes, jittered_rows, "o", color=colour)
        dots.set(markersize=3.5, alpha=0.7, markeredgewidth=0)


def _add_split_legend(figure: Figure, statistics: DatasetStatistics) -> None:
    lines = []
    for split, summaries in statistics.by_split().items():
        label = f"{split} ({len(summaries):,} samples)"
        lines.append(Line2D([], [], color=_SPLIT_COLOURS[split], linewidth=3, label=label))
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
