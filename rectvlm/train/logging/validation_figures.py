"""Validation examples to look at: a picture with true and predicted lesions, and a page of text."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from rectvlm.labels import FINDINGS, LESIONS, Lesion
from rectvlm.lesion_bits import lesion_mask
from rectvlm.train.validation_cases import ValidationExample
from rectvlm.types import MaskVolume

_PANEL_WIDTH_INCHES = 3.6
_LEGEND_HEIGHT_INCHES = 0.62
_TITLE_HEIGHT_INCHES = 0.5
_DPI = 100
_DASHED_LINES: dict[str, LineStyle] = {lesion.key: "dashed" for lesion in LESIONS}


class WrittenExample(NamedTuple):
    """What was written of an example."""

    picture: NDArray[np.uint8]
    """(H, W, 3), the picture in KEY.png."""
    text: str
    """The Markdown in KEY.md."""


def write_validation_figures(
    examples: Sequence[ValidationExample], folder: Path
) -> dict[str, WrittenExample]:
    """Write KEY.png and KEY.md of each example, and return both by key."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for example in examples:
        figure, text = draw_example(example), describe_example(example)
        name = re.sub(r"[^\w.-]", "_", example.key)
        figure.savefig(folder / f"{name}.png", dpi=_DPI, facecolor=DARK_COLOUR)
        (folder / f"{name}.md").write_text(text)
        figure.set_dpi(_DPI)
        canvas: Any = figure.canvas
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        written[example.key] = WrittenExample(picture, text)
    return written


def draw_example(example: ValidationExample) -> Figure:
    """Draw two axial slices and a coronal one, true lesions in solid and predicted in dashed lines.

    The first slice shows most of the truth; the second most of the prediction, or most of what only
    one of the two has. The patient's right is at the left.
    """
    views = _choose_slices(example)
    heights = [view.height_mm / view.width_mm * _PANEL_WIDTH_INCHES for view in views]
    tallest = max(heights)
    width = _PANEL_WIDTH_INCHES * len(views)
    height = tallest + _LEGEND_HEIGHT_INCHES + _TITLE_HEIGHT_INCHES
    figure = new_figure(width, height, facecolor=DARK_COLOUR, layout=None)
    for number, (view, view_height) in enumerate(zip(views, heights, strict=True)):
        left = (number + 0.01) / len(views)
        bottom = _LEGEND_HEIGHT_INCHES + (tallest - view_height) / 2
        area = (left, bottom / height, 0.98 / len(views), view_height / height)
        draw_slice(figure.add_axes(area), view)
    figure.legend(
        handles=_make_legend_lines(example.predicted_lesions is not None),
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


def _make_legend_lines(has_prediction: bool) -> list[Line2D]:
    lines = []
    for lesion in LESIONS:
        lines.append(Line2D([], [], color=lesion.colour, linewidth=2.5, label=lesion.name))
    lines.append(Line2D([], [], color=LIGHT_COLOUR, linewidth=1.5, label="solid: truth"))
    if has_prediction:
        lines.append(
            Line2D([], [], color=LIGHT_COLOUR, linewidth=1.5, linestyle="--", label="dashed: model")
        )
    return lines


def _choose_slices(example: ValidationExample) -> list[SliceView]:
    true, predicted = example.true_lesions, example.predicted_lesions
    masks: StyledMasks = [(true, {})]
    either = true
    axial_slices = [find_fullest_slice(true, 0)]
    if predicted is not None:
        masks = [(true, {}), (predicted, _DASHED_LINES)]
        either = true | predicted
        predicted_slice = find_fullest_slice(predicted, 0)
        if predicted_slice == axial_slices[0]:
            predicted_slice = find_fullest_slice(true ^ predicted, 0)
        axial_slices.append(predicted_slice)
    ct, spacing_mm = example.ct, example.spacing_mm
    views = []
    for z in dict.fromkeys(axial_slices):
        caption = f"axial, slice {z + 1} of {len(ct)}"
        views.append(make_axial_view(ct, masks, spacing_mm, z, caption))
    y = find_fullest_slice(either, 1)
    return [*views, make_coronal_view(ct, masks, spacing_mm, y, "coronal")]


def describe_example(example: ValidationExample) -> str:
    """Findings, lesions and reports of an example, as Markdown."""
    words = {0.0: "absent", 1.0: "present"}
    rows = [f"# {example.key}", "", "| finding | probability | truth |", "|---|---|---|"]
    for index in np.argsort(-example.finding_probabilities, kind="stable"):
        truth = words.get(float(example.labels[index]), "unknown")
        rows.append(f"| {FINDINGS[index]} | {example.finding_probabilities[index]:.3f} | {truth} |")
    if example.predicted_lesions is not None:
        rows += ["", "| lesion | truth, ml | model, ml | Dice |", "|---|---|---|---|"]
        for lesion in LESIONS:
            rows.append(_format_lesion_row(example, example.predicted_lesions, lesion))
    reports = {"Report": example.true_report, "Report of the model": example.predicted_report}
    for title, text in reports.items():
        if text is not None:
            rows += ["", f"## {title}", "", text.strip() or "(empty)"]
    return "\n".join(rows) + "\n"


def _format_lesion_row(
    example: ValidationExample, predicted_lesions: MaskVolume, lesion: Lesion
) -> str:
    predicted = lesion_mask(predicted_lesions, lesion)
    true = lesion_mask(example.true_lesions, lesion)
    voxel_ml = float(np.prod(example.spacing_mm)) / 1000
    true_volume, dice = "not annotated", "–"
    if example.lesions_annotated[lesion.bit]:
        true_volume = f"{true.sum() * voxel_ml:.1f}"
        voxel_sum = int(predicted.sum() + true.sum())
        if voxel_sum:
            dice = f"{2 * int((predicted & true).sum()) / voxel_sum:.3f}"
    return f"| {lesion.name} | {true_volume} | {predicted.sum() * voxel_ml:.1f} | {dice} |"
