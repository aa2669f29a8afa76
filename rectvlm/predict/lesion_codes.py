"""Codes of the five lesions, their sites and lobes in SNOMED CT, for DICOM objects and FHIR.

Sources: DICOM PS3.16 where it has the concept (CID 6104 and 6107 for effusions, sites and sides),
else SNOMED CT, International edition: 786838002, 95436008, 1217294009; the lobes of the lung are
those of pydicom's `codes.SCT`.
"""

from typing import Literal, NamedTuple

from rectvlm.labels import REGION_BY_NAME, Lesion
from rectvlm.lesion_places import PlaceSide


class SnomedCode(NamedTuple):
    """One concept of SNOMED CT."""

    value: str
    meaning: str


LESION_CODES = {
    "pericardial_effusion": SnomedCode("373945007", "Pericardial effusion"),
    "pleural_effusion": SnomedCode("60046008", "Pleural effusion"),
    "consolidation": SnomedCode("95436008", "Lung consolidation"),
    "ground_glass_opacity": SnomedCode("1217294009", "Ground glass opacity"),
    "lung_nodule": SnomedCode("786838002", "Nodule of lung"),
}
"""Codes by key of the lesion."""
_SITE_CODES: dict[Literal["lung", "pleura", "pericardium"], SnomedCode] = {
    "lung": SnomedCode("39607008", "Lung"),
    "pleura": SnomedCode("3120008", "Pleura"),
    "pericardium": SnomedCode("76848001", "Pericardium"),
}
SIDE_CODES: dict[PlaceSide, SnomedCode] = {
    "left": SnomedCode("7771000", "Left"),
    "right": SnomedCode("24028007", "Right"),
    "both": SnomedCode("51440002", "Right and left"),
}
"""Codes by side of the patient."""
_UPPER_LOBE = SnomedCode("45653009", "Upper lobe of lung")
_LOWER_LOBE = SnomedCode("90572001", "Lower lobe of lung")
_LOBE_CODES = {
    "right upper lobe": _UPPER_LOBE,
    "right middle lobe": SnomedCode("72481006", "Middle lobe of right lung"),
    "right lower lobe": _LOWER_LOBE,
    "left upper lobe": _UPPER_LOBE,
    "left lower lobe": _LOWER_LOBE,
}


def lobe_codes(lobe: str) -> tuple[SnomedCode, SnomedCode]:
    """Codes of a lobe and of its side."""
    side = REGION_BY_NAME[lobe].side
    assert side is not None
    return _LOBE_CODES[lobe], SIDE_CODES[side]


def site_code(lesion: Lesion) -> SnomedCode:
    """Code of the organ in which a lesion of a kind lies."""
    return _SITE_CODES[lesion.site]
