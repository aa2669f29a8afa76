"""One self-contained HTML page of a case: slices with lesion outlines, findings, the report.

The page needs neither a server nor a network: NiiVue, the CT and the outlines are inside it. The
patient's right is on the left of the picture, as radiologists look at it. Where the truth is
known, its outlines, findings and report stand beside the predicted ones.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.data.voxel_size import voxel_volume_ml
from rectvlm.files import remove_control_characters
from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.labels import CT_WINDOWS, LESIONS, Lesion
from rectvlm.lesion_bits import lesion_mask
from rectvlm.lesion_places import LesionPlace, describe_lobes_with_article
from rectvlm.predict.contradictions import Contradiction
from rectvlm.predict.lesion_lobes import LOBES_NOTE
from rectvlm.predict.page_volume import PageVolume, encode_mask, reduce_for_page
from rectvlm.predict.report_sentences import LinkedSentence, link_sentences
from rectvlm.types import Affine, Int16Volume, JsonObject, MaskVolume

DISCLAIMER = "Research use only; not a medical device."

MAX_PARTS = 6
"""Largest number of connected parts of a lesion that are listed, largest first."""
_HERE = Path(__file__).parent
_NIIVUE_FILE = _HERE / "vendor" / "niivue-0.69.0.umd.js"
_NIIVUE_LICENCE = _HERE / "vendor" / "LICENSE-niivue.txt"
_PREDICTED, _TRUE = "predicted", "true"


@dataclass(frozen=True)
class CaseTruth:
    """What is known to be true of a case."""

    lesion_bits: MaskVolume
    """Lesion bits (Z, Y, X), on the grid of the case's CT."""
    lesions_annotated: Mapping[str, bool]
    """Whether every lesion of a kind was outlined, by lesion key."""
    labels: Mapping[str, int | None]
    """1 present, 0 absent, None unknown, by finding."""
    report_sections: Sequence[tuple[str, str]]
    """Title and text of each section; empty without a report."""


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
    lobes: Mapping[str, tuple[str, ...] | None]
    """Approximate lobes by lesion key; None where there is none to tell."""
    contradictions: Sequence[Contradiction]
    """Where calls, outlines and report disagree."""
    report_sections: Sequence[tuple[str, str]] | None
    """Title and text of each section; None when the model has no report generator."""
    facts: Sequence[tuple[str, str]]
    """Name and value of each fact about the file and the model."""
    truth: CaseTruth | None = None
    """Truth of the case; None where nobody knows it."""


@dataclass(frozen=True)
class LesionPart:
    """Connected part of a lesion."""

    volume: str
    """Volume with its unit, in words."""
    slice_number: int
    """Number, from 1 at the feet, of the CT's slice with the part's largest area."""
    voxel: tuple[int, int, int]
    """Voxel (i, j, k) of the page's grid, inside the part in that slice."""


@dataclass(frozen=True)
class LesionRow:
    """One kind of lesion in one layer of outlines."""

    lesion: Lesion
    layer: str
    """`predicted` or `true`."""
    volume: str
    """Volume with its unit, in words."""
    place: str
    """Place in words; empty for true outlines."""
    overlap: str
    """Dice of prediction and truth, in words; empty where either is missing."""
    parts: list[LesionPart]
    """Largest parts, largest first."""
    n_parts: int
    """Number of all parts."""


def render_page(case: CaseView) -> str:
    """Render the page as HTML text."""
    assert case.ct.shape == case.lesion_bits.shape and case.ct.ndim == 3
    layers = {_PREDICTED: case.lesion_bits}
    if case.truth is not None:
        assert case.truth.lesion_bits.shape == case.ct.shape
        layers[_TRUE] = case.truth.lesion_bits
    volume = reduce_for_page(case.ct, list(layers.values()), case.affine)
    rows = []
    for layer, bits in layers.items():
        rows += _list_lesions(case, layer, bits, volume)
    style, script = _read("case_page.css"), _read("case_page.js")
    niivue = _NIIVUE_FILE.read_text(encoding="utf-8")
    outlined = {row.lesion.key for row in rows if row.layer == _PREDICTED}
    return _load_template().render(
        case=case,
        data=_script_json(_page_data(case, volume, rows)),
        ct=base64.b64encode(volume.ct_nifti_gz).decode("ascii"),
        masks={
            layer: base64.b64encode(encode_mask(bits)).decode("ascii")
            for layer, bits in zip(layers, volume.lesions, strict=True)
        },
        policy=_content_security_policy(style, (niivue, script)),
        style=Markup(style),
        script=Markup(script),
        niivue=Markup(niivue),
        niivue_licence=Markup(_NIIVUE_LICENCE.read_text(encoding="utf-8")),
        sections=_link_sections(case.report_sections),
        true_sections=_link_sections(case.truth.report_sections) if case.truth else None,
        rows=rows,
        absent=[lesion.name for lesion in LESIONS if lesion.key not in outlined],
        unknown_lesions=_unknown_lesions(case.truth),
        marked_findings={entry.finding for entry in case.contradictions},
        marked_lesions={entry.lesion for entry in case.contradictions},
        lobes_note=LOBES_NOTE if any(case.lobes.values()) else "",
        cuts=case.thresholds.by_finding(),
        findings=sorted(case.finding_probabilities.items(), key=lambda item: -item[1]),
        images=_describe_images(case, volume),
        windows=CT_WINDOWS,
        disclaimer=DISCLAIMER,
    )


def _page_data(case: CaseView, volume: PageVolume, rows: Sequence[LesionRow]) -> JsonObject:
    """What the page's script reads."""
    to_canonical = np.linalg.inv(volume.from_canonical)
    depth, height, width = case.ct.shape
    parts = [part.voxel for row in rows for part in row.parts]
    return {
        "shape": list(volume.ct.shape),
        "spacing": list(volume.spacing_mm),
        "affine": volume.affine.tolist(),
        "toCanonical": to_canonical.tolist(),
        "canonicalShape": [depth, height, width],
        "huStep": volume.hu_step,
        "windows": {name: list(window) for name, window in CT_WINDOWS.items()},
        "lesions": [
            {"key": lesion.key, "bit": lesion.mask_value, "colour": lesion.colour}
            for lesion in LESIONS
        ],
        "start": list(parts[0]) if parts else [size // 2 for size in volume.ct.shape],
    }


def _script_json(value: JsonObject) -> Markup:
    """JSON inside a script element: no character of it ends the element or opens a comment."""
    text = json.dumps(value, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _content_security_policy(style: str, scripts: Sequence[str]) -> str:
    """Allow the page's own style and scripts, by hash, and nothing from elsewhere."""
    allowed_scripts = " ".join(_hash_source(script) for script in scripts)
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {allowed_scripts}",
            f"style-src {_hash_source(style)}",
            # NiiVue's letters are a picture inside its script.
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash_source(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _list_lesions(
    case: CaseView, layer: str, bits: MaskVolume, volume: PageVolume
) -> list[LesionRow]:
    voxel_ml = voxel_volume_ml(case.affine)
    rows = []
    for lesion in LESIONS:
        mask = lesion_mask(bits, lesion)
        if not mask.any():
            continue
        parts, n_parts = _list_parts(mask, voxel_ml, volume)
        volume_ml = float(np.count_nonzero(mask)) * voxel_ml
        if layer == _PREDICTED and case.volumes_ml is not None:
            volume_ml = case.volumes_ml[lesion.key]
        place = _word_place(case, lesion) if layer == _PREDICTED else ""
        overlap = _word_overlap(case, lesion) if layer == _PREDICTED else ""
        words = _word_volume(volume_ml)
        rows.append(LesionRow(lesion, layer, words, place, overlap, parts, n_parts))
    return rows


def _list_parts(
    mask: NDArray[np.bool_], voxel_ml: float, volume: PageVolume
) -> tuple[list[LesionPart], int]:
    """The largest connected parts of a mask (Z, Y, X), largest first, and the number of all."""
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    labels, n_parts = ndimage.label(mask[box], np.ones((3, 3, 3)))
    sizes = np.bincount(labels.reshape(-1))[1:]
    part_boxes = ndimage.find_objects(labels)
    parts = []
    for index in np.argsort(-sizes, kind="stable")[:MAX_PARTS]:
        part_box = part_boxes[index]
        inside = _centre_voxel(labels[part_box] == index + 1)
        start = [outer.start + inner.start for outer, inner in zip(box, part_box, strict=True)]
        z, y, x = np.array(start) + inside
        on_page = np.rint(volume.from_canonical @ [z, y, x, 1])[:3].astype(int)
        i, j, k = np.clip(on_page, 0, np.array(volume.ct.shape) - 1)
        words = _word_volume(float(sizes[index]) * voxel_ml)
        parts.append(LesionPart(words, int(z) + 1, (int(i), int(j), int(k))))
    return parts, int(n_parts)


def _centre_voxel(part: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Voxel (z, y, x) of a part, in its slice of largest area, nearest to that slice's centre."""
    z = int(part.sum(axis=(1, 2)).argmax())
    pixels = np.argwhere(part[z])
    y, x = pixels[((pixels - pixels.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return np.array([z, y, x])


def _word_overlap(case: CaseView, lesion: Lesion) -> str:
    """Dice of the predicted and the true outline, 2 |A ∩ B| / (|A| + |B|), in words."""
    if case.truth is None or not case.truth.lesions_annotated.get(lesion.key):
        return ""
    predicted = lesion_mask(case.lesion_bits, lesion)
    true = lesion_mask(case.truth.lesion_bits, lesion)
    both = np.count_nonzero(predicted & true)
    dice = 2 * both / (np.count_nonzero(predicted) + np.count_nonzero(true))
    return f"Dice {dice:.2f}"


def _word_volume(volume_ml: float) -> str:
    return f"{volume_ml:.1f} ml" if volume_ml >= 0.1 else "< 0.1 ml"


def _word_place(case: CaseView, lesion: Lesion) -> str:
    """Place and approximate lobes in words, with a mark where the place is uncertain."""
    place = case.places.get(lesion.key)
    if place is None:
        return "too small to place"
    if place.is_plausible is None:
        return f"{place.wording} (place uncertain)"
    lobes = case.lobes.get(lesion.key)
    if not lobes:
        return place.wording
    return f"{place.wording}; approximately {describe_lobes_with_article(lobes)}"


def _unknown_lesions(truth: CaseTruth | None) -> list[str]:
    """Names of the lesions whose true outlines nobody drew."""
    if truth is None:
        return []
    return [lesion.name for lesion in LESIONS if not truth.lesions_annotated.get(lesion.key)]


def _describe_images(case: CaseView, volume: PageVolume) -> str:
    """How the pictures of the page differ from the file, in words."""
    i, j, k = volume.ct.shape
    x, y, z = volume.spacing_mm
    size = f"{i} × {j} × {k} voxels of {x:.2f} × {y:.2f} × {z:.2f} mm (x, y, z)"
    kind = "means of the CT's voxels" if volume.is_resampled else "the CT's own voxels"
    hu = "exact" if volume.hu_step == 1 else f"exact to {volume.hu_step / 2:g}"
    cut = "" if volume.ct.size == case.ct.size else ", cut to the body"
    return f"{size}, {kind}{cut}; HU {hu}"


def _link_sections(
    sections: Sequence[tuple[str, str]] | None,
) -> list[tuple[str, list[LinkedSentence]]] | None:
    if sections is None:
        return None
    return [(title, link_sentences(remove_control_characters(text))) for title, text in sections]


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@cache
def _load_template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("case_page.html.j2")
