"""Cases of a validation to look at: a picture with what is true and what the model outlined, and a page of words."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from rectvlm.figures import (
    DARK_COLOUR,
    LIGHT_COLOUR,
    LineStyle,
    SliceView,
    StyledMasks,
    draw_slice,
    find_fullest_slice,
    make_axial_view,
    make_coronal_view,
    new_figure,
)
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.train.validation import ValidationExample

_PANEL_WIDTH_INCHES, _LEGEND_HEIGHT_INCHES = 3.6, 0.62
"""Inches: a panel's width, and the room below all for the legend."""
_DPI = 100
_DASHED_LINES: dict[str, LineStyle] = {lesion.key: "dashed" for lesion in LESIONS}


def write_validation_figures(
    examples: Sequence[ValidationExample], folder: Path
) -> dict[str, tuple[NDArray[np.uint8], str]]:
    """Write KEY.png and KEY.md of each case; the pictures (H, W, 3) and the words by key."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {}
    for sample in examples:
        figure, words = draw_example(sample), describe_example(sample)
        name = re.sub(r"[^\w.-]", "_", sample.key)
        figure.savefig(folder / f"{name}.png", dpi=_DPI, facecolor=DARK_COLOUR)
        (folder / f"{name}.md").write_text(words)
        canvas: Any = figure.canvas
        figure.set_dpi(_DPI)
        canvas.draw()
        shown[sample.key] = (np.asarray(canvas.buffer_rgba())[..., :3].copy(), words)
    return shown


def draw_example(example: ValidationExample) -> Figure:
    """Two axial slices and a coronal one, solid lines around what is true, dashed ones around what the model found.

    The first slice has most of the truth; the second most of what the model found, or most that only one of the two
    has. The patient's right is at the left.
    """
    views = _choose_slices(example)
    heights = [view.height_mm / view.width_mm * _PANEL_WIDTH_INCHES for view in views]
    tallest = max(heights)
    width, height = _PANEL_WIDTH_INCHES * len(views), tallest + _LEGEND_HEIGHT_INCHES + 0.5
    figure = new_figure(width, height, facecolor=DARK_COLOUR, layout=None)
    for number, (view, tall) in enumerate(zip(views, heights, strict=True)):
        bottom = _LEGEND_HEIGHT_INCHES + (tallest - tall) / 2
        draw_slice(
            figure.add_axes(
                ((number + 0.01) / len(views), bottom / height, 0.98 / len(views), tall / height)
            ),
            view,
        )
    lines = [
        Line2D([], [], color=lesion.colour, linewidth=2.5, label=lesion.name) for lesion in LESIONS
    ]
    lines.append(Line2D([], [], color=LIGHT_COLOUR, linewidth=1.5, label="solid: truth"))
    if example.predicted_lesions is not None:
        lines.append(
            Line2D([], [], color=LIGHT_COLOUR, linewidth=1.5, linestyle="--", label="dashed: model")
        )
    figure.legend(
        handles=lines,
        loc="lower center",
        ncols=4,
        frameon=False,
        labelcolor=LIGHT_COLOUR,
        fontsize=8,
    )
    figure.text(
        0.5, 1 - 0.05 / height, example.key, color=LIGHT_COLOUR, fontsize=10, ha="center", va="top"
    )
    return figure


def _choose_slices(sample: ValidationExample) -> list[SliceView]:
    true, found = sample.true_lesions, sample.predicted_lesions
    masks: StyledMasks = [(true, {})] if found is None else [(true, {}), (found, _DASHED_LINES)]
    slices = [find_fullest_slice(true, 0)]
    if found is not None:
        slices.append(find_fullest_slice(found, 0))
        if slices[1] == slices[0]:
            slices[1] = find_fullest_slice(true ^ found, 0)
    y = find_fullest_slice(true if found is None else true | found, 1)
    depth = len(sample.ct)
    views = [
        make_axial_view(sample.ct, masks, sample.spacing_mm, z, f"axial, slice {z + 1} of {depth}")
        for z in dict.fromkeys(slices)
    ]
    return [*views, make_coronal_view(sample.ct, masks, sample.spacing_mm, y, "coronal")]


def describe_example(example: ValidationExample) -> str:
    """Findings, lesions and reports of a case, as Markdown."""
    words = {0.0: "absent", 1.0: "present"}
    rows = [f"# {example.key}", "", "| finding | probability | truth |", "|---|---|---|"]
    for index in np.argsort(-example.finding_probabilities, kind="stable"):
        truth = words.get(float(example.labels[index]), "unknown")
        rows.append(f"| {FINDINGS[index]} | {example.finding_probabilities[index]:.3f} | {truth} |")
    if example.predicted_lesions is not None:
        rows += ["", "| lesion | truth, ml | model, ml | Dice |", "|---|---|---|---|"]
        rows += [
            _format_lesion_row(example, example.predicted_lesions, lesion.bit) for lesion in LESIONS
        ]
    for title, text in (
        ("Report", example.true_report),
        ("Report of the model", example.predicted_report),
    ):
        if text is not None:
            rows += ["", f"## {title}", "", text.strip() or "(empty)"]
    return "\n".join(rows) + "\n"


def _format_lesion_row(sample: ValidationExample, bits: NDArray[np.uint8], bit: int) -> str:
    found, true = (lesion_mask(volume, LESIONS[bit]) for volume in (bits, sample.true_lesions))
    voxel = float(np.prod(sample.spacing_mm)) / 1000
    both = int(found.sum() + true.sum())
    dice = f"{2 * int((found & true).sum()) / both:.3f}" if both else "–"
    known = sample.lesions_annotated[bit]
    truth = f"{true.sum() * voxel:.1f}" if known else "not annotated"
    return (
        f"| {LESIONS[bit].name} | {truth} | {found.sum() * voxel:.1f} | {dice if known else '–'} |"
    )
