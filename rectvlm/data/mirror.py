"""Mirror images of samples, left for right, with their text and their region ids; or none where that would not be true.

The mirrored sample stands for a mirrored patient, in the same canonical frame: index x still grows towards the
patient's left, and what lay on the right lies on the left. So text and ids change sides, the grid's affine stays as it
is, and the affine of the file is reflected about the middle of the grid: a mask of the mirrored sample goes back to the
voxels of the file that show the same tissue.

Such a patient has the heart and the liver on the wrong side (situs inversus, about one in 10,000 people), and the
report does not say so. Mirroring teaches that sides of paired structures are exchangeable, and takes from the model
what the unpaired ones tell; whether that helps is to be measured, so its share is 0 unless it is asked for. What must
never happen is a sentence or a region id that is false of the picture. A sample is left as it is when its report

- names what exists on one side only (middle lobe, lingula, minor fissure, azygos, liver, spleen, stomach, …),
- names what carries a side in its name wherever it lies (ventricles, atria, branches of the coronary arteries),
- gives a side in a sentence about the heart, the aorta or another great vessel,
- speaks of situs, or words a side in a way that is not surely understood ("4R", "Rt", "left in place", o'clock),

or when its region map, unless it is hidden, holds a region on one side that has no counterpart there.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from rectvlm.data.report_text import join_report_sections
from rectvlm.labels import REGION_BY_NAME, REGIONS
from rectvlm.types import Batch, GridGeometry, SampleMeta

_OPPOSITE_WORD = {
    "left": "right",
    "right": "left",
    "rul": "lul",
    "lul": "rul",
    "rll": "lll",
    "lll": "rll",
}
_SIDE_WORD = re.compile(
    r"\b(?:left|right)(?=(?:wards?|most|sided)?\b)|\b(?:RUL|RLL|LUL|LLL)\b", re.IGNORECASE
)

_ONE_SIDED_TERM = re.compile(
    r"""\b(?:
      middle[\s-]+lob\w* | lingul\w* | (?:minor|horizontal)\s+fissures? | intermedi(?:us|ate|ary)
      | apico-?posterior | antero-?medial | (?:hemi-?)?azyg\w* | brachiocephalic\s+(?:trunk|artery) | innominate
      | thoracic\s+duct | (?:ligamentum|ductus)\s+arterios\w+ | laryngeal | \w*ventric\w* | \w*atri(?:um|a|al)
      | auric\w+ | anterior\s+descending | circumflex | left\s+main(?!\s+(?:\w+\s+)?bronch)
      | \w*hepat\w* | livers? | \w*spleen\w* | \w*splen\w* | stomachs? | \w*gastr\w* | gall-?bladder | bile | biliary
      | chole\w* | pancrea\w* | \w*duoden\w* | \w*col(?:on|ic|onic) | c(?:a)?ecum | appendi\w+
      | situs | inversus | dextr[oae]\w* | dexter | l(?:a)?evo\w* | sinist\w* | \w*isomer\w* | heterotax\w*
      | kartagener\w* | mirror\w* | \w*transpos\w* | o\s?['’`]?\s?clock | stations?\s+(?:no\.?\s*)?[56]
      | (?:is|are|was|were|be|been|being|has|have|had|having)\s+left
      | left\s+(?:in|at|as|behind|alone|out|over|with|without|untreated|the)
      | right\s+(?:angled?|angles|away|after|before|now|at) | all\s+right
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""What stands on one side, or carries a side that a mirror does not change; and words that are no sides at all."""
_MIDLINE_ORGAN = re.compile(
    r"heart|\bcardi|coronar|\baort|\barch\b|\bcava|pulmonary\s+trunk", re.IGNORECASE
)
"""What lies off the middle without a side in its name: fine alone, not together with a side."""
_ABBREVIATION = re.compile(r"\b(?:[RL]|\d+\s?[RL]|[Rr][Tt]|[Ll][Tt]|[RL][A-Z]{1,4}s?)\b")
_KNOWN_ABBREVIATIONS = {"RUL", "RLL", "LUL", "LLL", "LN", "LNs", "LAP", "RIGHT", "LEFT"}
_KNOWN_ABBREVIATIONS |= {
    "LUNG",
    "LUNGS",
    "LOBE",
    "LOBES",
    "LOWER",
    "LYMPH",
    "RIB",
    "RIBS",
    "LARGE",
    "LEVEL",
}
"""Capitals that begin with R or L and are understood, or have no side."""
_SIDE_IN_LONGER_WORD = re.compile(
    r"\b(?:[Ll]eft|[Rr]ight|LEFT|RIGHT)(?!(?:wards?|most|sided)?\b)|[a-z](?:Left|Right)"
)
"""A side that is part of a longer word."""
_SENTENCE_BREAK = re.compile(r"(?<=[.!?;])\s+|\n")

_OPPOSITE_SIDE = {"left": "right", "right": "left"}
_COUNTERPART_BY_ID = {
    region.id: REGION_BY_NAME.get(
        f"{_OPPOSITE_SIDE[region.side]}{region.name.removeprefix(region.side)}"
    )
    for region in REGIONS
    if region.side is not None
}
_MIRRORED_IDS = [
    0,
    *(twin.id if (twin := _COUNTERPART_BY_ID.get(region.id)) else region.id for region in REGIONS),
]
_UNPAIRED_IDS = [id for id, twin in _COUNTERPART_BY_ID.items() if twin is None] + [
    REGION_BY_NAME[name].id
    for name in ("liver", "spleen", "stomach", "other upper abdominal organs")
]
"""Regions on one side without a counterpart. The heart and the vessels of the middle stay what they are."""


def mirror_text(text: str) -> str | None:
    """A text with its sides exchanged, or None where that might be false of the mirror image (see the module)."""
    plain = all(found[0] in _KNOWN_ABBREVIATIONS for found in _ABBREVIATION.finditer(text))
    if not plain or _ONE_SIDED_TERM.search(text) or _SIDE_IN_LONGER_WORD.search(text):
        return None
    if any(
        _SIDE_WORD.search(sentence) and _MIDLINE_ORGAN.search(sentence)
        for sentence in _SENTENCE_BREAK.split(text)
    ):
        return None
    if any(
        word != word.lower() and word not in (word.upper(), word.capitalize())
        for word in _SIDE_WORD.findall(text)
    ):
        return None
    return _SIDE_WORD.sub(_swap_side, text)


def _swap_side(found: re.Match[str]) -> str:
    word, other = found[0], _OPPOSITE_WORD[found[0].lower()]
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def mirror_samples(batch: Batch, indexes: Sequence[int]) -> Batch:
    """A copy of a batch in which the wanted samples are mirrored, as far as that is safe.

    A hidden region map (`regions_known` False) keeps none from being mirrored; it is emptied then.
    """
    metas = {i: _mirror_meta(batch.metas[i], batch.ct.shape[-1]) for i in indexes}
    safe = {i: meta for i, meta in metas.items() if meta is not None and _can_mirror_map(batch, i)}
    if not safe:
        return batch
    ct, lesions, regions = batch.ct.clone(), batch.lesions.clone(), batch.regions.clone()
    new_id = torch.tensor(_MIRRORED_IDS, dtype=regions.dtype, device=regions.device)
    reports, every_meta = list(batch.reports), list(batch.metas)
    for i, meta in safe.items():
        ct[i], lesions[i] = batch.ct[i].flip(-1), batch.lesions[i].flip(-1)
        regions[i] = new_id[batch.regions[i].flip(-1).long()] if batch.regions_known[i] else 0
        reports[i], every_meta[i] = join_report_sections(meta.findings, meta.impression), meta
    return replace(
        batch, ct=ct, lesions=lesions, regions=regions, reports=reports, metas=every_meta
    )


def _can_mirror_map(batch: Batch, i: int) -> bool:
    lonely = torch.tensor(_UNPAIRED_IDS, dtype=batch.regions.dtype, device=batch.regions.device)
    return not (bool(batch.regions_known[i]) and bool(torch.isin(batch.regions[i], lonely).any()))


def _mirror_meta(meta: SampleMeta, width: int) -> SampleMeta | None:
    """What is true of the mirror image on a grid of `width` voxels along x; None where the text forbids it."""
    findings, impression = (
        meta.findings and mirror_text(meta.findings),
        meta.impression and mirror_text(meta.impression),
    )
    if (findings is None) != (meta.findings is None) or (impression is None) != (
        meta.impression is None
    ):
        return None
    grid, flip = np.array(meta.geometry.grid_affine), np.eye(4)
    flip[2, 2], flip[2, 3] = -1, width - 1
    reflection = grid @ flip @ np.linalg.inv(grid)
    native = (reflection @ np.array(meta.geometry.native_affine)).tolist()
    geometry = GridGeometry(meta.geometry.grid_affine, meta.geometry.native_shape, native)
    return replace(
        meta,
        findings=findings,
        impression=impression,
        geometry=geometry,
        source=f"{meta.source}, mirrored",
    )
