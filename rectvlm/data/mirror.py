"""Left-right mirror images of samples, with their report and their region ids.

A mirrored sample stands for a mirrored patient in the same canonical frame: index x still grows
towards the patient's left, and the right side is now on the left. So text and ids change sides.
The affine of the grid stays; the affine of the file is reflected about the middle of the grid, so
that a mask of the mirrored sample goes back to the voxels of the file that show the same tissue.

Such a patient has the heart and the liver on the wrong side (situs inversus, about one in 10,000
people), and the report does not say so. Mirroring teaches that sides of paired structures are
exchangeable, and hides from the model the sides of unpaired ones. Its share is 0 by default, until
a measurement shows that it helps. A sentence or a region id must never be false of the image, so a
sample is not mirrored when its report

- names a structure of one side (middle lobe, lingula, minor fissure, azygos, liver, spleen, …),
- names a structure with a side in its name (ventricles, atria, branches of the coronary arteries),
- gives a side in a sentence about the heart, the aorta or another great vessel,
- mentions situs, or words a side ambiguously ("4R", "Rt", "left in place", o'clock),

or when its region map, unless it is hidden, holds a region of one side without a counterpart.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rectvlm.data.report_text import join_report_sections
from rectvlm.labels import REGION_BY_NAME, REGIONS, Region
from rectvlm.types import Batch, GridGeometry, SampleMeta

_OPPOSITE_WORD = {"left": "right", "right": "left"}
_OPPOSITE_WORD |= {"rul": "lul", "lul": "rul", "rll": "lll", "lll": "rll"}
_SIDE_WORD = re.compile(
    r"\b(?:left|right)(?=(?:wards?|most|sided)?\b)|\b(?:RUL|RLL|LUL|LLL)\b", re.IGNORECASE
)

_ONE_SIDED_TERM = re.compile(
    r"""\b(?:
      middle[\s-]+lob\w* | lingul\w* | (?:minor|horizontal)\s+fissures? | intermedi(?:us|ate|ary)
      | apico-?posterior | antero-?medial | (?:hemi-?)?azyg\w* | brachiocephalic\s+(?:trunk|artery)
      | innominate
      | thoracic\s+duct | (?:ligamentum|ductus)\s+arterios\w+ | laryngeal | \w*ventric\w*
      | \w*atri(?:um|a|al)
      | auric\w+ | anterior\s+descending | circumflex | left\s+main(?!\s+(?:\w+\s+)?bronch)
      | \w*hepat\w* | livers? | \w*spleen\w* | \w*splen\w* | stomachs? | \w*gastr\w*
      | gall-?bladder | bile | biliary
      | chole\w* | pancrea\w* | \w*duoden\w* | \w*col(?:on|ic|onic) | c(?:a)?ecum | appendi\w+
      | situs | inversus | dextr[oae]\w* | dexter | l(?:a)?evo\w* | sinist\w*
      | \w*isomer\w* | heterotax\w*
      | kartagener\w* | mirror\w* | \w*transpos\w* | o\s?['’`]?\s?clock
      | stations?\s+(?:no\.?\s*)?[56]
      | (?:is|are|was|were|be|been|being|has|have|had|having)\s+left
      | left\s+(?:in|at|as|behind|alone|out|over|with|without|untreated|the)
      | right\s+(?:angled?|angles|away|after|before|now|at) | all\s+right
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""Structures of one side or with a side in their name, and side words of another meaning."""
_MIDLINE_ORGAN = re.compile(
    r"heart|\bcardi|coronar|\baort|\barch\b|\bcava|\b[SI]VC\b|azygos|pulmonary\s+trunk",
    re.IGNORECASE,
)
"""Structures off the middle without a side in their name: allowed, except together with a side."""
_ABBREVIATION = re.compile(r"\b(?:[RL]|\d+\s?[RL]|[Rr][Tt]|[Ll][Tt]|[RL][A-Z]{1,4}s?)\b")
_KNOWN_ABBREVIATIONS = {"RUL", "RLL", "LUL", "LLL", "LN", "LNs", "LAP", "RIGHT", "LEFT"}
_KNOWN_ABBREVIATIONS |= {"LUNG", "LUNGS", "LOBE", "LOBES", "LOWER", "LYMPH", "LARGE", "LEVEL"}
_KNOWN_ABBREVIATIONS |= {"RIB", "RIBS"}
"""Words in capitals with R or L in front that are understood or have no side."""
_SIDE_IN_LONGER_WORD = re.compile(
    r"\b(?:[Ll]eft|[Rr]ight|LEFT|RIGHT)(?!(?:wards?|most|sided)?\b)|[a-z](?:Left|Right)"
)
"""A side that is part of a longer word."""
_SENTENCE_BREAK = re.compile(r"(?<=[.!?;])\s+|\n")


def _mirrored_region_id(region: Region) -> int | None:
    """Id of a region in the mirror image; None for a region of one side without a counterpart."""
    if region.name in ("liver", "spleen", "stomach", "other upper abdominal organs"):
        return None
    if region.side is None:
        return region.id
    name = _OPPOSITE_WORD[region.side] + region.name.removeprefix(region.side)
    counterpart = REGION_BY_NAME.get(name)
    return None if counterpart is None else counterpart.id


_MIRRORED_IDS = [0, *(_mirrored_region_id(region) or region.id for region in REGIONS)]
"""Id in the mirror image by id. The heart and the vessels of the middle keep theirs."""
_UNPAIRED_IDS = [region.id for region in REGIONS if _mirrored_region_id(region) is None]
"""Ids that forbid a mirror image."""


def mirror_text(text: str) -> str | None:
    """Exchange the sides in a text; None where that might be false of the mirror image."""
    abbreviations = {match[0] for match in _ABBREVIATION.finditer(text)}
    if not abbreviations <= _KNOWN_ABBREVIATIONS:
        return None
    if _ONE_SIDED_TERM.search(text) or _SIDE_IN_LONGER_WORD.search(text):
        return None
    for sentence in _SENTENCE_BREAK.split(text):
        if _SIDE_WORD.search(sentence) and _MIDLINE_ORGAN.search(sentence):
            return None
    for word in _SIDE_WORD.findall(text):
        if word not in (word.lower(), word.upper(), word.capitalize()):
            return None
    return _SIDE_WORD.sub(_swap_side, text)


def _swap_side(match: re.Match[str]) -> str:
    word = match[0]
    opposite = _OPPOSITE_WORD[word.lower()]
    if word.isupper():
        return opposite.upper()
    return opposite.capitalize() if word[0].isupper() else opposite


def mirror_samples(batch: Batch, indexes: Sequence[int]) -> Batch:
    """Make a copy of a batch in which some samples are mirrored, as far as that is safe.

    A hidden region map (`regions_known` False) does not keep a sample from being mirrored, but is
    emptied then.
    """
    mirrored: dict[int, SampleMeta] = {}
    for i in indexes:
        meta = _mirror_meta(batch.metas[i], batch.ct.shape[-1])
        if meta is not None and _can_mirror_map(batch, i):
            mirrored[i] = meta
    if not mirrored:
        return batch

    ct, lesions, regions = batch.ct.clone(), batch.lesions.clone(), batch.regions.clone()
    new_ids = torch.tensor(_MIRRORED_IDS, dtype=regions.dtype, device=regions.device)
    reports, metas = list(batch.reports), list(batch.metas)
    for i, meta in mirrored.items():
        ct[i], lesions[i] = batch.ct[i].flip(-1), batch.lesions[i].flip(-1)
        regions[i] = new_ids[batch.regions[i].flip(-1).long()] if batch.regions_known[i] else 0
        reports[i], metas[i] = join_report_sections(meta.findings, meta.impression), meta
    return replace(batch, ct=ct, lesions=lesions, regions=regions, reports=reports, metas=metas)


def _can_mirror_map(batch: Batch, i: int) -> bool:
    if not batch.regions_known[i]:
        return True
    unpaired = torch.tensor(_UNPAIRED_IDS, dtype=batch.regions.dtype, device=batch.regions.device)
    return not torch.isin(batch.regions[i], unpaired).any()


def _mirror_meta(meta: SampleMeta, width: int) -> SampleMeta | None:
    """Metadata of the mirror image on a grid of `width` columns; None if the text forbids it."""
    texts: dict[str, Any] = {}
    for name in ("findings", "impression", "indication", "technique"):
        text = getattr(meta, name)
        texts[name] = mirror_text(text) if text else text
        if text and texts[name] is None:
            return None

    grid, flip = np.array(meta.geometry.grid_affine), np.eye(4)
    flip[2, 2], flip[2, 3] = -1, width - 1
    reflection = grid @ flip @ np.linalg.inv(grid)
    native = (reflection @ np.array(meta.geometry.native_affine)).tolist()
    return replace(
        meta,
        **texts,
        geometry=GridGeometry(meta.geometry.grid_affine, meta.geometry.native_shape, native),
        source=f"{meta.source}, mirrored",
    )
