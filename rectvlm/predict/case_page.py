"""One self-contained HTML page of a case: slices with lesion outlines, findings, report. Opens without a server.

The page shows what it is given and decides nothing: orientation is already canonical, so a slice's column 0 is the
patient's right and lies on the left of the picture, as radiologists look at it.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from rectvlm.labels import CT_WINDOWS, LESIONS, Lesion
from rectvlm.lesion_bits import lesion_mask
from rectvlm.types import Affine, Int16Volume, MaskVolume

DISCLAIMER = "Research use only; not a medical device."

LONGEST_SIDE_PIXELS = 448
"""Pixels; larger slices are scaled down."""
MAX_SLICES = 80
"""More slices than this are thinned out; the page says so."""
MAX_OUTLINES = 150
"""Outlines of one lesion in one slice; the smallest ones beyond it are not drawn, and the page says so."""
JPEG_QUALITY = 85


@dataclass(frozen=True)
class CaseView:
    """What a page shows. Volumes are in the canonical frame (z, y, x), at native resolution."""

    name: str
    ct: Int16Volume
    """HU (Z, Y, X)."""
    lesion_bits: MaskVolume
    """Lesion bits (Z, Y, X)."""
    affine: Affine
    """Canonical index (z, y, x, 1) to world, mm."""
    finding_probabilities: Mapping[str, float]
    """Probability by finding."""
    thresholds: Mapping[str, float] | None
    """Of the findings that were fitted, None when none were."""
    volumes_ml: Mapping[str, float] | None
    """By lesion key, 0 where the lesion was not found; None when the model does not outline lesions."""
    places: Mapping[str, str]
    """Where a lesion lies, in words, by lesion key."""
    report_sections: Sequence[tuple[str, str]] | None
    """The report: title and text of each section; None when the model does not write reports."""
    facts: Sequence[tuple[str, str]]
    """Name and value of what else the reader must know."""


def render_page(case: CaseView) -> str:
    """The page as HTML text."""
    assert case.ct.shape == case.lesion_bits.shape and case.ct.ndim == 3
    # From head to feet, as slices are read.
    shown = choose_slices(case.lesion_bits)[::-1]
    spacing = np.linalg.norm(case.affine[:3, :3], axis=0)
    volumes = case.volumes_ml or {}
    found = [lesion for lesion in LESIONS if volumes.get(lesion.key)]
    outlines, left_out = _outline_lesions(case.lesion_bits, shown, found)
    areas = {lesion.key: _areas_by_slice(case.lesion_bits, lesion)[shown] for lesion in found}
    total = sum(areas.values(), start=np.zeros(len(shown), dtype=np.int64))
    first = int(total.argmax()) if total.any() else len(shown) // 2
    images = {
        name: [_encode_jpeg(apply_window(case.ct[z], name)) for z in shown] for name in CT_WINDOWS
    }
    data = {
        "images": images,
        "outlines": outlines,
        "slices": [
            {"number": int(z) + 1, "mm": round(_slice_height_mm(case, z), 1)} for z in shown
        ],
        "first": first,
    }
    depth, height, width = case.ct.shape
    return _load_template().render(
        case=case,
        sections=None
        if case.report_sections is None
        else [(title, _remove_control_characters(text)) for title, text in case.report_sections],
        data=data,
        first_image=images["lung"][first],
        total_slices=depth,
        size=(width, height),
        aspect=(width * spacing[2], height * spacing[1]),
        lesions=[_lesion_row(lesion, volumes, case.places, areas[lesion.key]) for lesion in found],
        absent=[lesion.name for lesion in LESIONS if lesion not in found],
        findings=sorted(case.finding_probabilities.items(), key=lambda item: -item[1]),
        scout=_render_scout(case.ct),
        scout_aspect=(width * spacing[2], depth * spacing[0]),
        scout_lines=[round(100 * (1 - (z + 0.5) / depth), 2) for z in shown],
        thinned=len(shown) < depth,
        outlines_left_out=left_out,
        windows=CT_WINDOWS,
        disclaimer=DISCLAIMER,
    )


def choose_slices(lesions: MaskVolume, max_slices: int = MAX_SLICES) -> NDArray[np.int64]:
    """Slices to show, ascending: all, or of every k neighbours the one with most lesion (else the middle one).

    Thinning by a plain stride could step over a small nodule.
    """
    stride = -(-len(lesions) // max_slices)
    area = np.count_nonzero(lesions, axis=(1, 2))
    groups = [
        np.arange(start, min(start + stride, len(lesions)))
        for start in range(0, len(lesions), stride)
    ]
    return np.array(
        [g[area[g].argmax()] if area[g].any() else g[len(g) // 2] for g in groups], dtype=np.int64
    )


def apply_window(hu: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Grey values of HU (Y, X) in a window: its lower edge is 0, its upper edge 255; at most 448 pixels a side."""
    centre, width = CT_WINDOWS[name]
    picture = Image.fromarray(hu.astype(np.float32))
    scale = min(1.0, LONGEST_SIDE_PIXELS / max(picture.size))
    if scale < 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    grey = (np.asarray(picture) - (centre - width / 2)) / width * 255
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def outline_svg_path(mask: NDArray[np.bool_], max_outlines: int = MAX_OUTLINES) -> tuple[str, int]:
    """One SVG path around a mask (Y, X), and how many of its outlines, the shortest, are left out.

    A pixel (y, x) covers the square from (x, y) to (x + 1, y + 1).
    """
    contours = find_contours(np.pad(mask, 1).astype(np.float32), 0.5)
    contours.sort(key=len, reverse=True)
    path = []
    for contour in contours[:max_outlines]:
        # Padding moved the mask by one pixel; a pixel's centre lies half a pixel inside its square.
        points = approximate_polygon(contour - 1 + 0.5, tolerance=0.2)
        path.append("M" + "L".join(f"{x:.4g} {y:.4g}" for y, x in points[:-1]) + "Z")
    return "".join(path), max(0, len(contours) - max_outlines)


def _outline_lesions(
    lesions: MaskVolume, shown: NDArray[np.int64], found: list[Lesion]
) -> tuple[dict[str, list[str]], bool]:
    """By lesion key: one SVG path a slice; and whether small outlines were left out."""
    result, left_out = {}, 0
    for lesion in found:
        drawn = [outline_svg_path(lesion_mask(lesions[z], lesion)) for z in shown]
        result[lesion.key] = [path for path, _ in drawn]
        left_out += sum(count for _, count in drawn)
    return result, left_out > 0


def _areas_by_slice(lesions: MaskVolume, lesion: Lesion) -> NDArray[np.int64]:
    return np.count_nonzero(lesion_mask(lesions, lesion), axis=(1, 2))


def _lesion_row(
    lesion: Lesion, volumes: Mapping[str, float], places: Mapping[str, str], area: NDArray[np.int64]
) -> dict[str, Any]:
    """What the legend shows of one lesion; `runs` are (first slice, number of slices) that carry it."""
    edges = np.flatnonzero(np.diff(np.r_[0, area > 0, 0]))
    runs = [
        (int(start), int(stop - start)) for start, stop in zip(edges[::2], edges[1::2], strict=True)
    ]
    return {
        "lesion": lesion,
        "volume": volumes[lesion.key],
        "place": places.get(lesion.key, ""),
        "largest": int(area.argmax()),
        "runs": runs,
    }


def _slice_height_mm(case: CaseView, z: int) -> float:
    """World z of a slice's centre, mm."""
    _, height, width = case.ct.shape
    return float((case.affine @ [z, (height - 1) / 2, (width - 1) / 2, 1])[2])


def _render_scout(ct: Int16Volume) -> str:
    """A frontal view of the whole volume: mean HU along y, head up, the patient's right on the left."""
    mean = np.clip(ct, -1000, 1000).mean(axis=1)[::-1]
    low, high = np.percentile(mean, [1, 99.5])
    return _encode_jpeg(np.clip((mean - low) / max(high - low, 1) * 255, 0, 255).astype(np.uint8))


def _remove_control_characters(text: str) -> str:
    """Without control characters, which an untrained language model writes and HTML does not allow."""
    return "".join(letter for letter in text if letter.isprintable() or letter == "\n")


def _encode_jpeg(grey: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _load_template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("case_page.html.j2")
