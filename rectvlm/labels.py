"""The vocabulary of the project: 18 findings, 5 lesions, 20 anatomical regions, 3 CT windows.

Shards, models, metrics and pages all take these names from here. The order of `FINDINGS` is the
column order of CT-RATE's label files and must never change.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

BodySide = Literal["left", "right"]
LabelConvention = Literal["ct-rate", "clinical"]
"""What counts as a finding.

In `ct-rate`, as in CT-RATE's label table, every lymph node that is described is lymphadenopathy, a
consolidation alone is no lung opacity, and fibroatelectatic changes are sequelae but no
atelectasis. In `clinical` a lymph node counts from a short axis of 10 mm, a consolidation is a lung
opacity, and fibroatelectatic changes are both."""
DEFAULT_CONVENTION: LabelConvention = "ct-rate"
"""Convention of the labels that models are trained with and evaluated against."""

FINDINGS: tuple[str, ...] = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
"""The 18 findings, in CT-RATE's file order."""


@dataclass(frozen=True)
class Lesion:
    """One of the five lesions that are outlined."""

    bit: int
    """Position in `LESIONS`, and number of the lesion's bit in a `lesions` volume."""
    key: str
    """Name in files: lower case, no spaces."""
    name: str
    """Name in text."""
    finding: str
    """Finding that the lesion implies: where the finding is absent, so is the lesion."""
    is_implied_by_finding: bool
    """Whether the finding implies the lesion too. A lung opacity need not be ground glass."""
    site: Literal["lung", "pleura", "pericardium"]
    """Site in the body, which decides how the lesion's place is worded."""
    colour: str
    """Outline colour in figures (colour-blind-safe palette of Okabe and Ito, 2008)."""

    @property
    def mask_value(self) -> int:
        """Value of a voxel of a `lesions` volume that carries this lesion alone."""
        return 1 << self.bit


LESIONS: tuple[Lesion, ...] = (
    Lesion(
        0,
        "pericardial_effusion",
        "pericardial effusion",
        "Pericardial effusion",
        True,
        "pericardium",
        "#CC79A7",
    ),
    Lesion(
        1, "pleural_effusion", "pleural effusion", "Pleural effusion", True, "pleura", "#56B4E9"
    ),
    Lesion(2, "consolidation", "consolidation", "Consolidation", True, "lung", "#E69F00"),
    Lesion(
        3, "ground_glass_opacity", "ground-glass opacity", "Lung opacity", False, "lung", "#009E73"
    ),
    Lesion(4, "lung_nodule", "lung nodule", "Lung nodule", True, "lung", "#F0E442"),
)
"""The five lesions, in the order of their bits."""


@dataclass(frozen=True)
class Region:
    """One of the 20 anatomical regions of the `regions` volume."""

    id: int
    """Value in the `regions` volume, 1 to 20; 0 is none."""
    name: str
    """Name in text."""
    side: BodySide | None
    """Side of the patient, None for a region in the middle or on both sides."""
    totalsegmentator_classes: tuple[str, ...]
    """Classes of TotalSegmentator 2 (task `total`); a trailing `*` matches any ending."""


REGIONS: tuple[Region, ...] = (
    Region(1, "right upper lobe", "right", ("lung_upper_lobe_right",)),
    Region(2, "right middle lobe", "right", ("lung_middle_lobe_right",)),
    Region(3, "right lower lobe", "right", ("lung_lower_lobe_right",)),
    Region(4, "left upper lobe", "left", ("lung_upper_lobe_left",)),
    Region(5, "left lower lobe", "left", ("lung_lower_lobe_left",)),
    Region(6, "trachea", None, ("trachea",)),
    Region(7, "heart", None, ("heart", "heart_*", "atrial_appendage_left")),
    Region(8, "aorta", None, ("aorta",)),
    Region(9, "pulmonary veins", None, ("pulmonary_vein",)),
    Region(
        10,
        "great vessels",
        None,
        (
            "superior_vena_cava",
            "brachiocephalic_*",
            "subclavian_artery_*",
            "common_carotid_artery_*",
        ),
    ),
    Region(11, "esophagus", None, ("esophagus",)),
    Region(12, "thyroid", None, ("thyroid_gland",)),
    Region(13, "spine", None, ("vertebrae_*", "spinal_cord", "sacrum")),
    Region(14, "right ribs", "right", ("rib_right_*",)),
    Region(15, "left ribs", "left", ("rib_left_*",)),
    Region(16, "sternum", None, ("sternum", "costal_cartilages")),
    Region(17, "liver", None, ("liver",)),
    Region(18, "spleen", None, ("spleen",)),
    Region(19, "stomach", None, ("stomach",)),
    Region(
        20,
        "other upper abdominal organs",
        None,
        (
            "kidney_*",
            "adrenal_gland_*",
            "pancreas",
            "gallbladder",
            "duodenum",
            "inferior_vena_cava",
        ),
    ),
)
"""The 20 regions, in the order of their ids."""

LOBES: tuple[Region, ...] = REGIONS[:5]
"""The five lobes of the lungs, in which the place of a lung lesion is worded."""

N_FINDINGS, N_LESIONS, N_REGIONS = len(FINDINGS), len(LESIONS), len(REGIONS)

LESION_FINDING_INDEXES = tuple(FINDINGS.index(lesion.finding) for lesion in LESIONS)
"""Index in `FINDINGS` of the finding that each lesion implies."""
LESION_IS_IMPLIED_BY_FINDING = tuple(lesion.is_implied_by_finding for lesion in LESIONS)

LESION_BY_KEY = {lesion.key: lesion for lesion in LESIONS}
REGION_BY_NAME = {region.name: region for region in REGIONS}


def finding_prompts(finding: str) -> tuple[str, str]:
    """Sentences for the text encoder: the finding is present, the finding is absent."""
    phrase = finding.lower()
    return f"The chest CT shows {phrase}.", f"The chest CT shows no {phrase}."


def lesion_prompt(lesion: Lesion) -> str:
    """Sentence for the text encoder that stands for a lesion."""
    return f"{lesion.name.capitalize()} on chest CT."


class CtWindow(NamedTuple):
    """Range of HU that is displayed from black to white."""

    centre_hu: int
    width_hu: int


CT_WINDOWS = {
    "lung": CtWindow(-600, 1500),
    "mediastinal": CtWindow(40, 400),
    "bone": CtWindow(400, 1800),
}
"""Display windows by name."""

AIR_HU = -1024
"""HU outside the scanner's field of view."""
