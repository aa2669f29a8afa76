"""Pictures of what a data set of shards holds, and `stats.json` beside them.

Colours keep apart for colour-blind readers and in grey (Okabe and Ito, 2008).
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from data_pipeline.verify.statistics import (
    DatasetStatistics,
    SampleSummary,
    count_labels,
    pick_evenly,
)
from rectvlm.data.hounsfield import MAX_HU, MIN_HU
from rectvlm.data.shards import read_index, read_sample
from rectvlm.data.store import ShardStore
from rectvlm.figures import (
    DARK_COLOUR,
    LIGHT_COLOUR,
    SliceView,
    StyledMasks,
    draw_slice,
    find_fullest_slice,
    hide_top_and_right_spines,
    make_axial_view,
    make_coronal_view,
    new_figure,
)
from rectvlm.files import atomic_file
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.types import Sample, UserError

log = logging.getLogger(__name__)

SHEET_SAMPLES, SHEET_COLUMNS = 24, 6
_LABEL_COLOURS = {"present": "#0072B2", "absent": "#9CCBE8", "unknown": "#E3E3E3"}
_SPLIT_COLOURS = {"train": "#0072B2", "valid": "#D55E00"}
_MAX_DOTS = 300
"""Lesions of one kind up to which each is drawn as a dot."""
_CELL_INCHES, _CAPTION_INCHES, _GAP_INCHES, _MARGIN_INCHES = 2.5, 0.42, 0.06, 0.5
"""Of the contact sheet, inches: side of a picture, height of its caption, gaps, and room above and below all."""
_MAX_CAPTION_LETTERS = 36
"""Of a caption."""


def write_statistics(
    statistics: DatasetStatistics, place: str | Path | ShardStore, out: Path
) -> list[Path]:
    """Write `stats.json` and the pictures to a folder; what was written.

    Args:
        statistics: of at least one sample.
        place: the shards, for the slices of the contact sheet.

    A sample that cannot be read is left out of the contact sheet.
    """
    figures = {
        "labels.png": draw_labels_figure(statistics),
        "sampling.png": draw_sampling_figure(statistics),
        "hu.png": draw_hu_figure(statistics),
        "lesions.png": draw_lesions_figure(statistics),
    }
    if samples := _read_sheet_samples(statistics.sample_summaries, ShardStore(place)):
        figures["contact_sheet.png"] = draw_contact_sheet(samples)
    with atomic_file(out / "stats.json") as file:
        file.write(statistics.to_json())
    for name, figure in figures.items():
        with atomic_file(out / name) as file:
            figure.savefig(file, format="png", dpi=120)
    return [out / name for name in ("stats.json", *figures)]


def _summaries_by_split(statistics: DatasetStatistics) -> dict[str, list[SampleSummary]]:
    return {split: part for split in ("train", "valid") if (part := statistics.of_split(split))}


# Figures


def draw_labels_figure(statistics: DatasetStatistics) -> Figure:
    """Findings by split: how many samples have each present, absent and unknown."""
    parts = _summaries_by_split(statistics)
    figure = new_figure(4.5 + 4.5 * len(parts), 7.5)
    columns = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    rows = np.arange(len(FINDINGS))
    for axes, (split, facts) in zip(columns, parts.items(), strict=True):
        counts, left = count_labels(facts), np.zeros(len(FINDINGS))
        for word, colour in _LABEL_COLOURS.items():
            numbers = np.array([counts[finding][word] for finding in FINDINGS])
            axes.barh(rows, numbers, left=left, color=colour, edgecolor="white", linewidth=0.5)
            left += numbers
        for row, finding in enumerate(FINDINGS):
            known = counts[finding]["present"] + counts[finding]["absent"]
            share = (
                f" ({counts[finding]['present'] / known:.0%} of known)"
                if known
                else " (none known)"
            )
            axes.text(
                len(facts) * 1.02,
                row,
                f"{counts[finding]['present']:,}{share}",
                va="center",
                fontsize=9,
            )
        axes.set(
            title=f"{split}: {len(facts):,} samples", xlabel="samples", xlim=(0, len(facts) * 1.45)
        )
        axes.set_xticks(
            [
                tick
                for tick in MaxNLocator(4, integer=True).tick_values(0, len(facts))
                if tick <= len(facts)
            ]
        )
        axes.set_yticks(rows, FINDINGS)
        axes.tick_params(axis="y", length=0)
        hide_top_and_right_spines(axes)
        axes.spines["bottom"].set_bounds(0, len(facts))
    columns[0].set_ylim(len(FINDINGS) - 0.4, -0.6)
    shades = [Patch(color=colour, label=word) for word, colour in _LABEL_COLOURS.items()]
    figure.legend(handles=shades, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Findings (at the right: present)")
    return figure


def draw_sampling_figure(statistics: DatasetStatistics) -> Figure:
    """Native spacing in-plane and between slices, and the number of slices; shares of each split."""
    figure = new_figure(13, 4.2)
    columns = figure.subplots(1, 3)
    views = (
        ("in-plane spacing, mm", [one.native_spacing_mm[0] for one in statistics.sample_summaries]),
        ("slice spacing, mm", [one.native_spacing_mm[1] for one in statistics.sample_summaries]),
        ("slices", [one.slice_count for one in statistics.sample_summaries]),
    )
    splits = np.array([one.split for one in statistics.sample_summaries])
    for axes, (name, listed) in zip(columns, views, strict=True):
        values = np.array(listed, dtype=float)
        edges = _histogram_edges(values, whole=name == "slices")
        for split, colour in _SPLIT_COLOURS.items():
            of_split = values[splits == split]
            if of_split.size:
                weights = np.full(of_split.size, 100 / of_split.size)
                axes.hist(of_split, edges, weights=weights, color=colour, alpha=0.25)
                axes.hist(
                    of_split, edges, weights=weights, color=colour, histtype="step", linewidth=1.5
                )
        axes.set(xlabel=name, ylabel="% of the split's samples")
        hide_top_and_right_spines(axes)
    _add_split_legend(figure, statistics)
    figure.suptitle("Native sampling of the files")
    return figure


def _histogram_edges(values: NDArray[np.float64], whole: bool) -> NDArray[np.float64]:
    """Edges of about 30 steps that hold all values; of whole numbers, equally many in each step."""
    low, high = values.min(), values.max()
    if whole:
        width = max(1, -(-int(high - low + 1) // 30))
        return np.arange(low - 0.5 - width, high + 0.5 + 2 * width, width)
    margin = max((high - low) * 0.02, abs(high) * 0.02)
    return np.linspace(low - margin, high + margin, 31)


def draw_hu_figure(statistics: DatasetStatistics) -> Figure:
    """Shares of the shards' voxels by HU, on a logarithmic scale."""
    figure = new_figure(10, 4.8)
    axes = figure.subplots()
    width = 16
    centres = MIN_HU + width * (np.arange((MAX_HU - MIN_HU + 1) // width) + 0.5)
    lowest = 1.0
    for split, counts in statistics.hu_histograms.items():
        shares = 100 * counts.reshape(-1, width).sum(axis=1) / max(1, counts.sum())
        lowest = min(lowest, shares[shares > 0].min(initial=1.0))
        axes.step(
            centres,
            np.maximum(shares, 1e-12),
            where="mid",
            color=_SPLIT_COLOURS[split],
            linewidth=1.3,
        )
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
        ylabel=f"% of voxels, in steps of {width} HU",
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(lowest / 2, 300)
    hide_top_and_right_spines(axes)
    _add_split_legend(figure, statistics)
    figure.suptitle(f"HU on the grid (−{-MIN_HU}: air, and what lies outside the files)")
    return figure


def draw_lesions_figure(statistics: DatasetStatistics) -> Figure:
    """Outlined volume of each lesion by split: 5 to 95 %, quartiles and median, with a dot a sample where few."""
    figure = new_figure(10, 5)
    axes = figure.subplots()
    parts = _summaries_by_split(statistics)
    rng = np.random.default_rng(0)
    for lesion in LESIONS:
        for number, (split, facts) in enumerate(parts.items()):
            row = lesion.bit + (number - (len(parts) - 1) / 2) * 0.38
            volumes = np.array([ml for one in facts if (ml := one.lesion_ml[lesion.bit])])
            axes.text(
                1.01,
                row,
                f"{volumes.size:,}",
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=9,
            )
            if not volumes.size:
                continue
            p5, p25, p50, p75, p95 = np.percentile(volumes, [5, 25, 50, 75, 95])
            colour = _SPLIT_COLOURS[split]
            axes.plot([p5, p95], [row, row], color=colour, linewidth=1.2, solid_capstyle="butt")
            axes.plot(
                [p25, p75], [row, row], color=colour, linewidth=9, alpha=0.35, solid_capstyle="butt"
            )
            axes.plot([p50, p50], [row - 0.13, row + 0.13], color=colour, linewidth=2.5)
            if volumes.size <= _MAX_DOTS:
                jitter = rng.uniform(-0.1, 0.1, volumes.size)
                axes.plot(
                    volumes,
                    row + jitter,
                    "o",
                    color=colour,
                    markersize=3.5,
                    alpha=0.7,
                    markeredgewidth=0,
                )
    axes.text(
        1.01, -0.62, "outlined", transform=axes.get_yaxis_transform(), va="center", fontsize=9
    )
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


def _add_split_legend(figure: Figure, statistics: DatasetStatistics) -> None:
    lines = [
        Line2D(
            [],
            [],
            color=_SPLIT_COLOURS[split],
            linewidth=3,
            label=f"{split} ({len(facts):,} samples)",
        )
        for split, facts in _summaries_by_split(statistics).items()
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False)


# Contact sheet


def _read_sheet_samples(facts: Sequence[SampleSummary], store: ShardStore) -> list[Sample]:
    """Samples to look at: some with each lesion, the rest spread over all; in the order of their keys."""
    chosen: dict[str, SampleSummary] = {}
    for lesion in LESIONS:
        chosen |= {
            one.key: one for one in pick_evenly([f for f in facts if f.lesion_ml[lesion.bit]], 3)
        }
    others = [one for one in facts if one.key not in chosen]
    chosen |= {one.key: one for one in pick_evenly(others, SHEET_SAMPLES - len(chosen))}
    entries = {entry.key: entry for entry in read_index(store).select_split(None)}
    samples = []
    for key in sorted(chosen):
        # What cannot be read is a fault that `verify` names.
        with suppress(UserError, KeyError):
            samples.append(read_sample(store, entries[key]))
    return samples


def draw_contact_sheet(samples: Sequence[Sample]) -> Figure:
    """Of each sample the axial slice with most lesion (else the middle one), and below it the coronal one likewise.

    The patient's right is at the left of each picture, as radiologists look at it.
    """
    rows = -(-len(samples) // SHEET_COLUMNS)
    # Rows of one length, so that little stays empty; at least three wide, for the legend.
    columns = max(3, -(-len(samples) // rows))
    views = [
        [_axial_view(sample) for sample in samples],
        [_coronal_view(sample) for sample in samples],
    ]
    heights = [_CELL_INCHES * max(one.height_mm / one.width_mm for one in view) for view in views]
    block = _CAPTION_INCHES + sum(heights) + 3 * _GAP_INCHES
    width, height = (
        columns * (_CELL_INCHES + _GAP_INCHES) + _GAP_INCHES,
        rows * block + 2 * _MARGIN_INCHES,
    )
    figure = new_figure(width, height, facecolor=DARK_COLOUR, layout=None)
    for number in range(len(samples)):
        row, column = divmod(number, columns)
        left, top = (
            _GAP_INCHES + column * (_CELL_INCHES + _GAP_INCHES),
            height - _MARGIN_INCHES - row * block - _CAPTION_INCHES,
        )
        for view, tall in zip(views, heights, strict=True):
            place = (left / width, (top - tall) / height, _CELL_INCHES / width, tall / height)
            draw_slice(figure.add_axes(place), view[number])
            top -= tall + _GAP_INCHES
    lines: list[Any] = [
        Line2D([], [], color=lesion.colour, linewidth=2.5, label=lesion.name) for lesion in LESIONS
    ]
    if any(any(sample.meta.lesions_partial.values()) for sample in samples):
        lines.append(
            Line2D(
                [],
                [],
                color=LIGHT_COLOUR,
                linewidth=1.5,
                linestyle="--",
                label="dashed: annotated in part",
            )
        )
    figure.legend(
        handles=lines,
        loc="lower center",
        ncols=3 if columns < 5 else 6,
        frameon=False,
        labelcolor=LIGHT_COLOUR,
        fontsize=10,
    )
    title = "Axial and coronal slice with most lesion,\nelse the middle one (R, L, H: the patient's right, left, head)"
    if columns > 4:
        title = title.replace("\n", " ")
    figure.text(
        0.5, 1 - 0.1 / height, title, color=LIGHT_COLOUR, fontsize=12, ha="center", va="top"
    )
    return figure


def _sample_masks(sample: Sample) -> StyledMasks:
    """Outlines of a sample, dashed where a lesion was annotated in part."""
    return [
        (
            sample.lesions,
            {key: "dashed" for key, partial in sample.meta.lesions_partial.items() if partial},
        )
    ]


def _axial_view(sample: Sample) -> SliceView:
    caption = f"{_shorten_key(sample.meta.key)}\n{sample.meta.split}"
    return make_axial_view(
        sample.ct,
        _sample_masks(sample),
        sample.meta.spacing,
        find_fullest_slice(sample.lesions, 0),
        caption,
    )


def _coronal_view(sample: Sample) -> SliceView:
    return make_coronal_view(
        sample.ct, _sample_masks(sample), sample.meta.spacing, find_fullest_slice(sample.lesions, 1)
    )


def _shorten_key(key: str) -> str:
    """A key that fits above a picture; its end tells more than its middle."""
    return (
        key
        if len(key) <= _MAX_CAPTION_LETTERS
        else f"{key[: _MAX_CAPTION_LETTERS // 2]}…{key[-_MAX_CAPTION_LETTERS // 2 :]}"
    )
