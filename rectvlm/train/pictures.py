"""Cases of a validation to look at: a picture with what is true and what the model outlined, and a page of words."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from rectvlm.drawing import DARK, LIGHT, LineStyle, Masks, View, axial, coronal, draw, fullest, new_figure
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.train.validation import ValidationSample

_PANEL, _LEGEND = 3.6, 0.62
"""Inches: a panel's width, and the room below all for the legend."""
_DPI = 100
_DASHED: dict[str, LineStyle] = {lesion.key: "dashed" for lesion in LESIONS}


def write_samples(samples: Sequence[ValidationSample], folder: Path) -> dict[str, tuple[NDArray[np.uint8], str]]:
    """Write KEY.png and KEY.md of each case; the pictures (H, W, 3) and the words by key."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {}
    for sample in samples:
        figure, words = picture(sample), describe(sample)
        name = re.sub(r"[^\w.-]", "_", sample.key)
        figure.savefig(folder / f"{name}.png", dpi=_DPI, facecolor=DARK)
        (folder / f"{name}.md").write_text(words)
        canvas: Any = figure.canvas
        figure.set_dpi(_DPI)
        canvas.draw()
        shown[sample.key] = (np.asarray(canvas.buffer_rgba())[..., :3].copy(), words)
    return shown


def picture(sample: ValidationSample) -> Figure:
    """Two axial slices and a coronal one, solid lines around what is true, dashed ones around what the model found.

    The first slice has most of the truth; the second most of what the model found, or most that only one of the two
    has. The patient's right is at the left.
    """
    views = _views(sample)
    heights = [view.height / view.width * _PANEL for view in views]
    tallest = max(heights)
    width, height = _PANEL * len(views), tallest + _LEGEND + 0.5
    figure = new_figure(width, height, facecolor=DARK, layout=None)
    for number, (view, tall) in enumerate(zip(views, heights, strict=True)):
        bottom = _LEGEND + (tallest - tall) / 2
        draw(figure.add_axes(((number + 0.01) / len(views), bottom / height, 0.98 / len(views), tall / height)), view)
    lines = [Line2D([], [], color=lesion.colour, linewidth=2.5, label=lesion.name) for lesion in LESIONS]
    lines.append(Line2D([], [], color=LIGHT, linewidth=1.5, label="solid: truth"))
    if sample.lesions_found is not None:
        lines.append(Line2D([], [], color=LIGHT, linewidth=1.5, linestyle="--", label="dashed: model"))
    figure.legend(handles=lines, loc="lower center", ncols=4, frameon=False, labelcolor=LIGHT, fontsize=8)
    figure.text(0.5, 1 - 0.05 / height, sample.key, color=LIGHT, fontsize=10, ha="center", va="top")
    return figure


def _views(sample: ValidationSample) -> list[View]:
    true, found = sample.lesions_true, sample.lesions_found
    masks: Masks = [(true, {})] if found is None else [(true, {}), (found, _DASHED)]
    slices = [fullest(true, 0)]
    if found is not None:
        slices.append(fullest(found, 0))
        if slices[1] == slices[0]:
            slices[1] = fullest(true ^ found, 0)
    y = fullest(true if found is None else true | found, 1)
    depth = len(sample.ct)
    views = [
        axial(sample.ct, masks, sample.spacing, z, f"axial, slice {z + 1} of {depth}") for z in dict.fromkeys(slices)
    ]
    return [*views, coronal(sample.ct, masks, sample.spacing, y, "coronal")]


def describe(sample: ValidationSample) -> str:
    """Findings, lesions and reports of a case, as Markdown."""
    words = {0.0: "absent", 1.0: "present"}
    rows = [f"# {sample.key}", "", "| finding | probability | truth |", "|---|---|---|"]
    for index in np.argsort(-sample.findings, kind="stable"):
        truth = words.get(float(sample.labels[index]), "unknown")
        rows.append(f"| {FINDINGS[index]} | {sample.findings[index]:.3f} | {truth} |")
    if sample.lesions_found is not None:
        rows += ["", "| lesion | truth, ml | model, ml | Dice |", "|---|---|---|---|"]
        rows += [_lesion_row(sample, sample.lesions_found, lesion.bit) for lesion in LESIONS]
    for title, text in (("Report", sample.report_true), ("Report of the model", sample.report_found)):
        if text is not None:
            rows += ["", f"## {title}", "", text.strip() or "(empty)"]
    return "\n".join(rows) + "\n"


def _lesion_row(sample: ValidationSample, bits: NDArray[np.uint8], bit: int) -> str:
    found, true = (volume >> bit & 1 for volume in (bits, sample.lesions_true))
    voxel = float(np.prod(sample.spacing)) / 1000
    both = int(found.sum() + true.sum())
    dice = f"{2 * int((found & true).sum()) / both:.3f}" if both else "–"
    known = sample.annotated[bit]
    truth = f"{true.sum() * voxel:.1f}" if known else "not annotated"
    return f"| {LESIONS[bit].name} | {truth} | {found.sum() * voxel:.1f} | {dice if known else '–'} |"
