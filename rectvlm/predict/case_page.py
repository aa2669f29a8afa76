"""One self-contained HTML page of a case: slices with lesion outlines, findings, the report.

The page opens without a server. Volumes are in canonical orientation: column 0 of a slice is the
patient's right and lies on the left of the picture, as radiologists look at it.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.labels import CT_WINDOWS, LESIONS, Lesion
from rectvlm.lesion_bits import lesion_mask
from rectvlm.lesion_places import LesionPlace
from rectvlm.predict.contradictions import Contradiction
from rectvlm.types import Affine, Int16Volume, MaskVolume

DISCLAIMER = "Research use only; not a medical device."

LONGEST_SIDE_PIXELS = 448
"""Longest side of a slice's picture, pixels; larger slices are scaled down."""
MAX_SLICES = 80
"""Largest number of slices on a page; more are thinned out, and the page says so."""
MAX_OUTLINES = 150
"""Largest number of outlines of a lesion in a slice; the page says where some are left out."""
JPEG_QUALITY = 85


@dataclass(frozen=True)
class CaseView:
    """Content of a page. Volumes are in the canonical frame (z, y, x), at native resolution."""

    name: str
    ct: Int16Volume
    """HU (Z, Y, X)."""
    lesion_bits: MaskVolume
    """Lesion bits (Z, Y, X)."""
    affine: Affine
    """4 × 4, canonical index (z, y, x, 1) to world, mm."""
    finding_probabilities: Mapping[str, float]
    """Probability by finding."""
    thresholds: FindingThresholds
    volumes_ml: Mapping[str, float] | None
    """Volume by lesion key, 0 for an absent lesion; None when the model has no localizer."""
    places: Mapping[str, LesionPlace]
    """Place by lesion key."""
    contradictions: Sequence[Contradiction]
    """Where calls, outlines and report disagree."""
    report_sections: Sequence[tuple[str, str]] | None
    """Title and text of each section; None when the model has no report generator."""
    facts: Sequence[tuple[str, str]]
    """Name and value of each fact about the file and the model."""


@dataclass(frozen=True)
class LegendRow:
    """One lesion in the legend."""

    lesion: Lesion
    volume: float
    """Volume, ml."""
    place: str
    """Place in words."""
    largest: int
    """Number of the shown slice with the largest area."""
    runs: list[tuple[int, int]]
    """First slice and number of slices of each run of slices with the lesion."""


def render_page(case: CaseView) -> str:
    """Render the page as HTML text."""
    assert case.ct.shape == case.lesion_bits.shape and case.ct.ndim == 3
    # From head to feet, as slices are read.
    shown = choose_slices(case.lesion_bits)[::-1]
    spacing = np.linalg.norm(case.affine[:3, :3], axis=0)
    volumes = case.volumes_ml or {}
    present_lesions = [lesion for lesion in LESIONS if volumes.get(lesion.key)]
    outlines, has_omitted_outlines = _outline_lesions(case.lesion_bits, shown, present_lesions)
    total_area = np.zeros(len(shown), dtype=np.int64)
    legend = []
    for lesion in present_lesions:
        area = _areas_by_slice(case.lesion_bits, lesion)[shown]
        total_area += area
        place = _word_place(case.places.get(lesion.key))
        legend.append(_legend_row(lesion, volumes[lesion.key], place, area))
    first = int(total_area.argmax()) if total_area.any() else len(shown) // 2
    images = {name: _encode_slices(case.ct, shown, name) for name in CT_WINDOWS}
    slices = []
    for z in shown:
        slices.append({"number": int(z) + 1, "mm": round(_slice_height_mm(case, z), 1)})
    depth, height, width = case.ct.shape
    return _load_template().render(
        case=case,
        sections=_printable_sections(case),
        data={"images": images, "outlines": outlines, "slices": slices, "first": first},
        first_image=images["lung"][first],
        total_slices=depth,
        size=(width, height),
        aspect=(width * spacing[2], height * spacing[1]),
        lesions=legend,
        absent=[lesion.name for lesion in LESIONS if lesion not in present_lesions],
        marked_findings={entry.finding for entry in case.contradictions},
        marked_lesions={entry.lesion for entry in case.contradictions},
        has_region_map=any(place.basis == "regions" for place in case.places.values()),
        cuts=case.thresholds.by_finding(),
        findings=sorted(case.finding_probabilities.items(), key=lambda item: -item[1]),
        scout=_render_scout(case.ct),
        scout_aspect=(width * spacing[2], depth * spacing[0]),
        scout_lines=[round(100 * (1 - (z + 0.5) / depth), 2) for z in shown],
        thinned=len(shown) < depth,
        outlines_left_out=has_omitted_outlines,
        windows=CT_WINDOWS,
        disclaimer=DISCLAIMER,
    )


def choose_slices(lesions: MaskVolume, max_slices: int = MAX_SLICES) -> NDArray[np.int64]:
    """Choose the slices to show, ascending: all, or one of every k neighbours.

    Of neighbours the one with the largest lesion area is shown, and the middle one where there is
    none: thinning by a plain stride could step over a small nodule.
    """
    stride = -(-len(lesions) // max_slices)
    area = np.count_nonzero(lesions, axis=(1, 2))
    chosen = []
    for start in range(0, len(lesions), stride):
        group = area[start : start + stride]
        offset = int(group.argmax()) if group.any() else len(group) // 2
        chosen.append(start + offset)
    return np.array(chosen, dtype=np.int64)


def apply_window(hu: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Grey values of HU (Y, X) in a window, whose lower edge is 0 and whose upper edge is 255.

    The result has at most `LONGEST_SIDE_PIXELS` a side.
    """
    centre, width = CT_WINDOWS[name]
    picture = Image.fromarray(hu.astype(np.float32))
    scale = min(1.0, LONGEST_SIDE_PIXELS / max(picture.size))
    if scale < 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    grey = (np.asarray(picture) - (centre - width / 2)) / width * 255
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def outline_svg_path(mask: NDArray[np.bool_], max_outlines: int = MAX_OUTLINES) -> tuple[str, int]:
    """One SVG path around a mask (Y, X), and the number of outlines, the shortest, left out.

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
    lesion_bits: MaskVolume, shown: NDArray[np.int64], lesions: Sequence[Lesion]
) -> tuple[dict[str, list[str]], bool]:
    """One SVG path a slice, by lesion key, and whether short outlines were left out."""
    paths: dict[str, list[str]] = {}
    omitted_count = 0
    for lesion in lesions:
        paths[lesion.key] = []
        for z in shown:
            path, count = outline_svg_path(lesion_mask(lesion_bits[z], lesion))
            paths[lesion.key].append(path)
            omitted_count += count
    return paths, omitted_count > 0


def _areas_by_slice(lesion_bits: MaskVolume, lesion: Lesion) -> NDArray[np.int64]:
    return np.count_nonzero(lesion_mask(lesion_bits, lesion), axis=(1, 2))


def _legend_row(lesion: Lesion, volume_ml: float, place: str, area: NDArray[np.int64]) -> LegendRow:
    edges = np.flatnonzero(np.diff(np.r_[0, area > 0, 0]))
    runs = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        runs.append((int(start), int(stop - start)))
    return LegendRow(lesion, volume_ml, place, int(area.argmax()), runs)


def _word_place(place: LesionPlace | None) -> str:
    """Place in words, with a mark where it is wrong or uncertain."""
    if place is None:
        return "too small to place"
    if place.is_plausible is None:
        return f"{place.wording} (place uncertain)"
    return place.wording


def _encode_slices(ct: Int16Volume, shown: NDArray[np.int64], window: str) -> list[str]:
    return [_encode_jpeg(apply_window(ct[z], window)) for z in shown]


def _slice_height_mm(case: CaseView, z: int) -> float:
    """World z of a slice's centre, mm."""
    _, height, width = case.ct.shape
    return float((case.affine @ [z, (height - 1) / 2, (width - 1) / 2, 1])[2])


def _render_scout(ct: Int16Volume) -> str:
    """A frontal view: mean HU along y, head up, the patient's right on the left; a base64 JPEG."""
    mean = np.clip(ct, -1000, 1000).mean(axis=1)[::-1]
    low, high = np.percentile(mean, [1, 99.5])
    return _encode_jpeg(np.clip((mean - low) / max(high - low, 1) * 255, 0, 255).astype(np.uint8))


def _printable_sections(case: CaseView) -> list[tuple[str, str]] | None:
    if case.report_sections is None:
        return None
    return [(title, _remove_control_characters(text)) for title, text in case.report_sections]


def _remove_control_characters(text: str) -> str:
    """Remove characters that HTML does not allow and an untrained language model writes."""
    return "".join(letter for letter in text if letter.isprintable() or letter == "\n")


def _encode_jpeg(grey: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _load_template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("case_page.html.j2")
