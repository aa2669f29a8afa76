"""Contact sheet of a data set: an axial and a coronal slice of up to 24 samples, with their
outlines."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from data_pipeline.verify.statistics import SampleSummary, pick_evenly
from rectvlm.data.shards import read_index, read_sample
from rectvlm.data.store import ShardStore
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
from rectvlm.labels import LESIONS
from rectvlm.types import Sample, UserError

SHEET_SAMPLES, SHEET_COLUMNS = 24, 6
_SAMPLES_PER_LESION = 3
_MIN_COLUMNS = 3
"""Columns that the legend needs."""
_CELL_INCHES = 2.5
"""Side of a picture, inches."""
_CAPTION_INCHES = 0.42
"""Height of a picture's caption, inches."""
_GAP_INCHES = 0.06
"""Gap between pictures, inches."""
_MARGIN_INCHES = 0.5
"""Room above and below all pictures, inches."""
_MAX_CAPTION_LETTERS = 36


def read_sheet_samples(summaries: Sequence[SampleSummary], store: ShardStore) -> list[Sample]:
    """Read samples for the sheet: some with each lesion, the others spread over all; sorted by key.

    A sample that cannot be read is left out: `verify` names it as a fault.
    """
    keys: dict[str, None] = {}
    for lesion in LESIONS:
        with_lesion = [summary.key for summary in summaries if summary.lesion_ml[lesion.bit]]
        keys |= dict.fromkeys(pick_evenly(with_lesion, _SAMPLES_PER_LESION))
    other_keys = [summary.key for summary in summaries if summary.key not in keys]
    keys |= dict.fromkeys(pick_evenly(other_keys, SHEET_SAMPLES - len(keys)))

    locations = {location.key: location for location in read_index(store).select_split(None)}
    samples = []
    for key in sorted(keys):
        with suppress(UserError, KeyError):
            samples.append(read_sample(store, locations[key]))
    return samples


def draw_contact_sheet(samples: Sequence[Sample]) -> Figure:
    """Draw the axial slice of each sample with most lesion, and below it the coronal one.

    Where nothing is outlined it is the middle slice. The patient's right is at the left of each
    picture, as radiologists look at it.
    """
    rows = -(-len(samples) // SHEET_COLUMNS)
    # Rows of one length, so that little stays empty.
    columns = max(_MIN_COLUMNS, -(-len(samples) // rows))
    axial_views = [_axial_view(sample) for sample in samples]
    coronal_views = [_coronal_view(sample) for sample in samples]
    axial_height = _row_height_inches(axial_views)
    coronal_height = _row_height_inches(coronal_views)
    block_height = _CAPTION_INCHES + axial_height + coronal_height + 3 * _GAP_INCHES
    width = columns * (_CELL_INCHES + _GAP_INCHES) + _GAP_INCHES
    height = rows * block_height + 2 * _MARGIN_INCHES
    figure = new_figure(width, height, facecolor=DARK_COLOUR, layout=None)
    for number in range(len(samples)):
        row, column = divmod(number, columns)
        left = _GAP_INCHES + column * (_CELL_INCHES + _GAP_INCHES)
        top = height - _MARGIN_INCHES - row * block_height - _CAPTION_INCHES
        for views, view_height in ((axial_views, axial_height), (coronal_views, coronal_height)):
            box = (
                left / width,
                (top - view_height) / height,
                _CELL_INCHES / width,
                view_height / height,
            )
            draw_slice(figure.add_axes(box), views[number])
            top -= view_height + _GAP_INCHES

    _add_legend(figure, samples, 3 if columns < 5 else 6)
    title = (
        "Axial and coronal slice with most lesion,\n"
        "else the middle one (R, L, H: the patient's right, left, head)"
    )
    if columns > 4:
        title = title.replace("\n", " ")
    figure.text(
        0.5, 1 - 0.1 / height, title, color=LIGHT_COLOUR, fontsize=12, ha="center", va="top"
    )
    return figure


def _row_height_inches(views: Sequence[SliceView]) -> float:
    return _CELL_INCHES * max(view.height_mm / view.width_mm for view in views)


def _add_legend(figure: Figure, samples: Sequence[Sample], columns: int) -> None:
    lines: list[Any] = [
        Line2D([], [], color=lesion.colour, linewidth=2.5, label=lesion.name) for lesion in LESIONS
    ]
    if any(any(sample.meta.lesions_partial.values()) for sample in samples):
        dashed_line = Line2D(
            [],
            [],
            color=LIGHT_COLOUR,
            linewidth=1.5,
            linestyle="--",
            label="dashed: annotated in part",
        )
        lines.append(dashed_line)
    figure.legend(
        handles=lines,
        loc="lower center",
        ncols=columns,
        frameon=False,
        labelcolor=LIGHT_COLOUR,
        fontsize=10,
    )


def _styled_masks(sample: Sample) -> StyledMasks:
    """Outlines of a sample, dashed where a lesion was annotated in part."""
    styles: dict[str, LineStyle] = {}
    for key, is_partial in sample.meta.lesions_partial.items():
        if is_partial:
            styles[key] = "dashed"
    return [(sample.lesions, styles)]


def _axial_view(sample: Sample) -> SliceView:
    caption = f"{_shorten_key(sample.meta.key)}\n{sample.meta.split}"
    z = find_fullest_slice(sample.lesions, 0)
    return make_axial_view(sample.ct, _styled_masks(sample), sample.meta.spacing, z, caption)


def _coronal_view(sample: Sample) -> SliceView:
    y = find_fullest_slice(sample.lesions, 1)
    return make_coronal_view(sample.ct, _styled_masks(sample), sample.meta.spacing, y)


def _shorten_key(key: str) -> str:
    """Shorten a key to fit above a picture; its end tells more than its middle."""
    if len(key) <= _MAX_CAPTION_LETTERS:
        return key
    half = _MAX_CAPTION_LETTERS // 2
    return f"{key[:half]}…{key[-half:]}"
