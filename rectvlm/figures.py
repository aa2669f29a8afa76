"""Figures and CT slices with outlines: one way to draw for data sets, validation and curves.

Volumes are canonical (z, y, x), so a slice is drawn as it lies in memory: column 0 is the patient's right and comes out
on the left, as radiologists look at it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from rectvlm.labels import CT_WINDOWS, LESION_BY_KEY, LESIONS, Lesion
from rectvlm.lesion_bits import lesion_mask
from rectvlm.types import Int16Volume, MaskVolume

DARK_COLOUR, LIGHT_COLOUR = "#111111", "#EEEEEE"
LineStyle = Literal["solid", "dashed"]


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """A figure of so many inches that no display and no global state knows of."""
    figure = Figure(figsize=(width, height), **{"layout": "constrained"} | options)
    FigureCanvasAgg(figure)
    return figure


def hide_top_and_right_spines(axes: Axes) -> None:
    """Without the lines above and at the right."""
    axes.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class LesionOutlines:
    """Lesion bits of a slice, (rows, columns), and the line around each lesion by key (solid where it is silent)."""

    bits: NDArray[np.uint8]
    line_styles: Mapping[str, LineStyle]


@dataclass(frozen=True)
class SliceView:
    """One slice as it is drawn: rows downwards, columns to the right."""

    hu: NDArray[np.int16]
    outlines: Sequence[LesionOutlines]
    pixel_size_mm: tuple[float, float]
    """Of a pixel, mm: down and across."""
    is_coronal: bool
    window: str
    caption: str = ""

    @property
    def height_mm(self) -> float:
        """Of the slice, mm."""
        return self.hu.shape[0] * self.pixel_size_mm[0]

    @property
    def width_mm(self) -> float:
        """Of the slice, mm."""
        return self.hu.shape[1] * self.pixel_size_mm[1]


StyledMasks = Sequence[tuple[MaskVolume, Mapping[str, LineStyle]]]
"""Lesion bits (Z, Y, X) with the style of each lesion's line; what comes later is drawn on top."""


def make_axial_view(
    ct: Int16Volume,
    masks: StyledMasks,
    spacing: tuple[float, float, float],
    z: int,
    caption: str = "",
) -> SliceView:
    """Slice z, seen from the feet: anterior on top."""
    outlines = [LesionOutlines(bits[z], styles) for bits, styles in masks]
    return SliceView(ct[z], outlines, spacing[1:], False, choose_window(outlines), caption)


def make_coronal_view(
    ct: Int16Volume,
    masks: StyledMasks,
    spacing: tuple[float, float, float],
    y: int,
    caption: str = "",
) -> SliceView:
    """Slice y, seen from the front. Index z grows towards the head, which is drawn at the top."""
    outlines = [LesionOutlines(bits[::-1, y], styles) for bits, styles in masks]
    return SliceView(
        ct[::-1, y], outlines, (spacing[0], spacing[2]), True, choose_window(outlines), caption
    )


def find_fullest_slice(mask: NDArray[Any], axis: int) -> int:
    """Index along an axis where most of a mask (Z, Y, X) lies; the middle where it is empty."""
    others = tuple(other for other in range(3) if other != axis)
    counts = np.count_nonzero(mask, axis=others)
    return int(counts.argmax()) if counts.any() else mask.shape[axis] // 2


def choose_window(outlines: Sequence[LesionOutlines]) -> str:
    """The window that shows the lesions of a slice best: lung where ground-glass is among them, as no other shows it,
    or where the largest lies in the lung; else mediastinal."""
    areas = {
        lesion: sum(np.count_nonzero(lesion_mask(one.bits, lesion)) for one in outlines)
        for lesion in LESIONS
    }
    largest: Lesion = max(areas, key=lambda lesion: areas[lesion])
    glass = areas[LESION_BY_KEY["ground_glass_opacity"]]
    return "lung" if glass or (areas[largest] and largest.site == "lung") else "mediastinal"


def draw_slice(axes: Axes, view: SliceView) -> None:
    """A slice with its outlines, the patient's sides and the window's name."""
    centre, width = CT_WINDOWS[view.window]
    axes.imshow(
        view.hu,
        cmap="gray",
        vmin=centre - width / 2,
        vmax=centre + width / 2,
        extent=(0, view.width_mm, view.height_mm, 0),
        interpolation="bilinear",
    )
    for outlines in view.outlines:
        _draw_outlines(axes, view, outlines)
    axes.set(xlim=(0, view.width_mm), ylim=(view.height_mm, 0))
    axes.set_axis_off()
    marks = [(0.02, 0.5, "R", "left", "center"), (0.98, 0.5, "L", "right", "center")]
    if view.is_coronal:
        marks.append((0.5, 0.98, "H", "center", "top"))
    marks.append((0.02, 0.02, view.window, "left", "bottom"))
    for across, up, word, ha, va in marks:
        box = {"facecolor": DARK_COLOUR, "alpha": 0.6, "edgecolor": "none", "pad": 1.5}
        size = 9 if len(word) == 1 else 7.5
        axes.text(
            across,
            up,
            word,
            transform=axes.transAxes,
            ha=ha,
            va=va,
            color=LIGHT_COLOUR,
            fontsize=size,
            bbox=box,
        )
    if view.caption:
        axes.set_title(view.caption, color=LIGHT_COLOUR, fontsize=8.5, pad=4)


def _draw_outlines(axes: Axes, view: SliceView, outlines: LesionOutlines) -> None:
    rows, columns = view.hu.shape
    # One pixel of nothing around, so that an outline at the edge closes.
    y = (np.arange(-1, rows + 1) + 0.5) * view.pixel_size_mm[0]
    x = (np.arange(-1, columns + 1) + 0.5) * view.pixel_size_mm[1]
    for lesion in LESIONS:
        mask = np.pad(lesion_mask(outlines.bits, lesion), 1)
        if mask.any():
            style = outlines.line_styles.get(lesion.key, "solid")
            line = axes.contour(
                x, y, mask, [0.5], colors=[lesion.colour], linewidths=1.4, linestyles=[style]
            )
            # A dark rim: yellow on white is not seen otherwise.
            line.set_path_effects([withStroke(linewidth=2.6, foreground=DARK_COLOUR, alpha=0.7)])
