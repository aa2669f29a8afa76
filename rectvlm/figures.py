"""Figures and CT slices with lesion outlines, for data sets, validation and curves.

Volumes are canonical (z, y, x), so a slice is drawn as it lies in memory: column 0 is the patient's
right and appears on the left, as radiologists view it.
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

from rectvlm.labels import CT_WINDOWS, LESION_BY_KEY, LESIONS
from rectvlm.lesion_bits import lesion_mask, unpack_lesions
from rectvlm.types import Int16Volume, MaskVolume

DARK_COLOUR, LIGHT_COLOUR = "#111111", "#EEEEEE"
LineStyle = Literal["solid", "dashed"]


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """Make a figure (inches) without a display and without pyplot's global state."""
    figure = Figure(figsize=(width, height), **{"layout": "constrained"} | options)
    FigureCanvasAgg(figure)
    return figure


def hide_top_and_right_spines(axes: Axes) -> None:
    """Hide the frame lines above and at the right."""
    axes.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class LesionOutlines:
    """Lesions of one slice and the lines around them."""

    bits: NDArray[np.uint8]
    """Lesion bits (rows, columns)."""
    line_styles: Mapping[str, LineStyle]
    """Line style by lesion key; solid for a lesion without an entry."""


@dataclass(frozen=True)
class SliceView:
    """One slice to draw: rows run downwards, columns to the right."""

    hu: NDArray[np.int16]
    """HU (rows, columns)."""
    outlines: Sequence[LesionOutlines]
    """Outlines to draw, the last on top."""
    pixel_size_mm: tuple[float, float]
    """Pixel size down and across, mm."""
    is_coronal: bool
    """Whether the slice is coronal; axial otherwise."""
    window: str
    """Name of the window in `labels.CT_WINDOWS`."""
    caption: str = ""
    """Title above the slice."""

    @property
    def height_mm(self) -> float:
        """Height of the slice, mm."""
        return self.hu.shape[0] * self.pixel_size_mm[0]

    @property
    def width_mm(self) -> float:
        """Width of the slice, mm."""
        return self.hu.shape[1] * self.pixel_size_mm[1]


StyledMasks = Sequence[tuple[MaskVolume, Mapping[str, LineStyle]]]
"""Pairs of lesion bits (Z, Y, X) and line style by lesion key, the last drawn on top."""


def make_axial_view(
    ct: Int16Volume,
    masks: StyledMasks,
    spacing: tuple[float, float, float],
    z: int,
    caption: str = "",
) -> SliceView:
    """Make the view of slice z, seen from the feet: anterior is on top."""
    outlines = [LesionOutlines(bits[z], styles) for bits, styles in masks]
    return SliceView(ct[z], outlines, spacing[1:], False, choose_window(outlines), caption)


def make_coronal_view(
    ct: Int16Volume,
    masks: StyledMasks,
    spacing: tuple[float, float, float],
    y: int,
    caption: str = "",
) -> SliceView:
    """Make the view of slice y, seen from the front: the head is on top."""
    outlines = [LesionOutlines(bits[::-1, y], styles) for bits, styles in masks]
    return SliceView(
        ct[::-1, y], outlines, (spacing[0], spacing[2]), True, choose_window(outlines), caption
    )


def find_fullest_slice(mask: NDArray[Any], axis: int) -> int:
    """Index along an axis where a mask (Z, Y, X) has most voxels; the middle of an empty mask."""
    in_slice = tuple({0, 1, 2} - {axis})
    counts = np.count_nonzero(mask, axis=in_slice)
    return int(counts.argmax()) if counts.any() else mask.shape[axis] // 2


def choose_window(outlines: Sequence[LesionOutlines]) -> str:
    """Name of the window that shows the lesions of a slice best.

    It is the lung window where there is ground glass, which no other window shows, or where the
    largest lesion lies in the lung; the mediastinal window otherwise.
    """
    areas = np.zeros(len(LESIONS), np.int64)
    for overlay in outlines:
        areas += np.count_nonzero(unpack_lesions(overlay.bits), axis=(1, 2))
    has_ground_glass = areas[LESION_BY_KEY["ground_glass_opacity"].bit] > 0
    largest = LESIONS[int(areas.argmax())]
    has_lung_lesion = areas.any() and largest.site == "lung"
    return "lung" if has_ground_glass or has_lung_lesion else "mediastinal"


def draw_slice(axes: Axes, view: SliceView) -> None:
    """Draw a slice with its outlines, the patient's sides and the window's name."""
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
        style: dict[str, Any] = {"color": LIGHT_COLOUR, "fontsize": size, "bbox": box}
        axes.text(across, up, word, transform=axes.transAxes, ha=ha, va=va, **style)
    if view.caption:
        axes.set_title(view.caption, color=LIGHT_COLOUR, fontsize=8.5, pad=4)


def _draw_outlines(axes: Axes, view: SliceView, outlines: LesionOutlines) -> None:
    rows, columns = view.hu.shape
    # One empty pixel around the slice closes outlines at its edge.
    y = (np.arange(-1, rows + 1) + 0.5) * view.pixel_size_mm[0]
    x = (np.arange(-1, columns + 1) + 0.5) * view.pixel_size_mm[1]
    for lesion in LESIONS:
        mask = np.pad(lesion_mask(outlines.bits, lesion), 1)
        if mask.any():
            style = outlines.line_styles.get(lesion.key, "solid")
            line = axes.contour(
                x, y, mask, [0.5], colors=[lesion.colour], linewidths=1.4, linestyles=[style]
            )
            # A dark rim makes yellow visible on white.
            line.set_path_effects([withStroke(linewidth=2.6, foreground=DARK_COLOUR, alpha=0.7)])
