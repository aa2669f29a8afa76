"""Plan of a phantom's patient: all findings and their places, drawn from the seed.

Image, masks, labels and report are all made from the plan, so they cannot disagree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rectvlm.labels import FINDINGS, LESIONS, LOBES, BodySide, LabelConvention
from rectvlm.phantom.canvas import PatientBuild
from rectvlm.phantom.incidental_findings import draw_incidental_sentences

FINDING_PREVALENCE: dict[str, float] = dict.fromkeys(FINDINGS, 0.35) | {
    "Pleural effusion": 0.4,
    "Lung nodule": 0.4,
    "Consolidation": 0.4,
    "Pericardial effusion": 0.3,
    "Mosaic attenuation pattern": 0.25,
    "Interlobular septal thickening": 0.25,
}
"""Chance of each finding, of ground glass in place of lung opacity; of `varied` and `plain`."""
CT_RATE_PREVALENCE: dict[str, float] = {
    "Medical material": 0.10,
    "Arterial wall calcification": 0.28,
    "Cardiomegaly": 0.11,
    "Pericardial effusion": 0.07,
    "Coronary artery wall calcification": 0.25,
    "Hiatal hernia": 0.14,
    "Lymphadenopathy": 0.25,
    "Emphysema": 0.20,
    "Atelectasis": 0.23,
    "Lung nodule": 0.45,
    "Lung opacity": 0.39,
    "Pulmonary fibrotic sequela": 0.27,
    "Pleural effusion": 0.12,
    "Mosaic attenuation pattern": 0.08,
    "Peribronchial thickening": 0.11,
    "Consolidation": 0.19,
    "Bronchiectasis": 0.11,
    "Interlobular septal thickening": 0.08,
}
"""Share of CT-RATE's 1,564 validation scans with each finding; of the style `ct-rate`."""
UNANNOTATED_CHANCE = 0.15
"""Chance that one kind of lesion was not annotated in a case."""
UNKNOWN_LABEL_CHANCE = 0.1
"""Chance that one finding's label is unknown in a case."""
PERICARDIAL_STEP_MM = 3.0
"""Step between the depths of pericardial fluid in a style with one patient."""
LARGE_HEART_SIZE = 1.24
"""Size of a heart with cardiomegaly."""
NODULE_SIZE_RANGE = (0.85, 1.0)
"""Diameter of a patient's nodule, as a share of that patient's largest possible one."""
DEVICES = ("pacemaker", "port", "sternal wires")
LYMPH_NODE_STATIONS = ("paratracheal", "subcarinal", "aortopulmonary")


@dataclass(frozen=True)
class PhantomStyle:
    """Variety of patients, of their findings and of their reports."""

    name: str
    """Name on the command line."""
    findings: tuple[str, ...]
    """Findings that can be present; all others are absent from every patient."""
    has_one_patient: bool
    """Whether all cases have one healthy chest, up to noise, kernel, axis order and position."""
    nodule_diameters_mm: tuple[float, float]
    """Smallest and largest diameter of a nodule, mm."""
    is_terse: bool
    """Whether a report has only the present findings, in the shortest phrasing and one order."""
    prevalence: Mapping[str, float]
    """Chance of each finding; that of lung opacity is the chance of ground glass."""
    convention: LabelConvention = "clinical"
    """Convention of the labels: in `clinical` a consolidation alone makes a lung opacity."""
    has_incidental_findings: bool = False
    """Whether a report mentions incidental findings that are none of the 18."""

    @property
    def median_nodule_diameter_mm(self) -> float:
        """Median diameter of a nodule, mm."""
        return float(np.mean(self.nodule_diameters_mm) * np.mean(NODULE_SIZE_RANGE))


VARIED_STYLE = PhantomStyle(
    "varied",
    FINDINGS,
    has_one_patient=False,
    nodule_diameters_mm=(10.5, 24.0),
    is_terse=False,
    prevalence=FINDING_PREVALENCE,
)
PLAIN_STYLE = PhantomStyle(
    "plain",
    findings=(
        "Medical material",
        "Cardiomegaly",
        "Pericardial effusion",
        "Hiatal hernia",
        "Lung nodule",
        "Lung opacity",
        "Pulmonary fibrotic sequela",
        "Pleural effusion",
        "Consolidation",
    ),
    has_one_patient=True,
    nodule_diameters_mm=(18.0, 28.0),
    is_terse=True,
    prevalence=FINDING_PREVALENCE,
)
CT_RATE_STYLE = replace(
    PLAIN_STYLE,
    name="ct-rate",
    is_terse=False,
    prevalence=CT_RATE_PREVALENCE,
    convention="ct-rate",
    has_incidental_findings=True,
)
PHANTOM_STYLES = {style.name: style for style in (VARIED_STYLE, PLAIN_STYLE, CT_RATE_STYLE)}
"""Styles by name. `varied` is the default; a model learns `plain` within minutes; `ct-rate` looks
like `plain`, with the prevalences and the long-tailed reports of CT-RATE."""


@dataclass(frozen=True)
class PhantomNodule:
    """One lung nodule."""

    lobe: str
    """Name of the lobe that holds it."""
    diameter_mm: float
    """Diameter before stretching."""


@dataclass
class PatientPlan:
    """Everything that is painted and reported of one phantom patient."""

    present: dict[str, bool]
    """Whether a finding is present, for all 18."""
    build: PatientBuild
    """Body of the patient and grid of the scan."""
    noise_hu: float
    """Standard deviation of the noise."""
    blur_voxels: float
    """Standard deviation of the reconstruction kernel's blur."""
    pleural_effusions_mm: dict[BodySide, float]
    """Greatest depth of pleural fluid, by side with some."""
    consolidations: list[str]
    """Lobes with a consolidation."""
    ground_glass: list[str]
    """Lobes with ground glass."""
    nodules: list[PhantomNodule]
    """Lung nodules."""
    lobe_by_finding: dict[str, str]
    """Lobe of atelectasis, bronchiectasis, peribronchial thickening and fibrotic sequela."""
    device: str
    """One of `DEVICES`, for the case that medical material is present."""
    enlarged_stations: tuple[str, ...]
    """Some of `LYMPH_NODE_STATIONS`, for the case that lymphadenopathy is present."""
    unannotated_lesion: str | None
    """Key of the lesion that is not annotated; None when all are."""
    unknown_finding: str | None
    """Finding whose label is unknown; None when all are known."""
    phrase_numbers: list[int] = field(default_factory=list)
    """Random numbers that choose the phrasings of the report."""
    incidental_sentences: list[str] = field(default_factory=list)
    """Sentences of the report on findings that are not painted and none of the 18."""
    style: PhantomStyle = VARIED_STYLE
    """Style of the phantom."""


def draw_patient_plan(seed: int, style: PhantomStyle = VARIED_STYLE) -> PatientPlan:
    """Draw the patient of a seed, the same on every machine."""
    # The order of the draws decides every phantom: append to it only.
    rng = np.random.default_rng([seed, 1])
    lobes = [lobe.name for lobe in LOBES]
    present: dict[str, bool] = {}
    for finding in FINDINGS:
        is_drawn = rng.random() < style.prevalence[finding]
        present[finding] = bool(is_drawn and finding in style.findings)
    has_ground_glass = bool(rng.random() < style.prevalence["Lung opacity"])
    has_other_opacity = style.convention == "clinical" and present["Consolidation"]
    present["Lung opacity"] = has_ground_glass or has_other_opacity

    effusions: dict[BodySide, float] = {}
    if present["Pleural effusion"]:
        choices: list[tuple[BodySide, ...]] = [("left",), ("right",), ("left", "right")]
        sides = choices[int(rng.integers(3))]
        depth = float(rng.uniform(20, 42))
        effusions = {side: depth * float(rng.uniform(0.9, 1.1)) for side in sides}
    pericardial = float(rng.uniform(8, 14)) if present["Pericardial effusion"] else 0.0

    diameter = float(rng.uniform(*style.nodule_diameters_mm))
    nodules = []
    for lobe in _draw_some(rng, lobes, 2):
        nodules.append(PhantomNodule(lobe, diameter * float(rng.uniform(*NODULE_SIZE_RANGE))))
    stations = _draw_some(rng, LYMPH_NODE_STATIONS, 3)
    lobe_by_finding = {
        "Atelectasis": lobes[int(rng.choice([1, 2, 4]))],
        "Bronchiectasis": lobes[int(rng.choice([2, 4]))],
        "Peribronchial thickening": lobes[int(rng.choice([0, 3]))],
        "Pulmonary fibrotic sequela": lobes[int(rng.choice([0, 3]))],
    }

    unannotated = unknown = None
    if rng.random() < UNANNOTATED_CHANCE:
        unannotated = LESIONS[int(rng.integers(len(LESIONS)))].key
    if rng.random() < UNKNOWN_LABEL_CHANCE:
        unknown = FINDINGS[int(rng.integers(len(FINDINGS)))]
    consolidations, ground_glass = _draw_some(rng, lobes, 2), _draw_some(rng, lobes, 3)
    device = DEVICES[int(rng.integers(len(DEVICES)))]
    heart = LARGE_HEART_SIZE if present["Cardiomegaly"] else 1.0
    if style.has_one_patient:
        build = _fixed_patient_build(heart, pericardial)
    else:
        build = _draw_patient_build(rng, heart, pericardial)
    return PatientPlan(
        present=present,
        build=build,
        noise_hu=float(rng.uniform(7, 20)),
        blur_voxels=float(rng.uniform(0.25, 0.7)),
        pleural_effusions_mm=effusions,
        consolidations=consolidations if present["Consolidation"] else [],
        ground_glass=ground_glass if has_ground_glass else [],
        nodules=nodules if present["Lung nodule"] else [],
        lobe_by_finding=lobe_by_finding,
        device=device,
        enlarged_stations=tuple(stations),
        unannotated_lesion=unannotated,
        unknown_finding=unknown,
        phrase_numbers=[int(n) for n in rng.integers(0, 2**31, 64)],
        incidental_sentences=_draw_incidental_sentences(seed, style),
        style=style,
    )


def _draw_incidental_sentences(seed: int, style: PhantomStyle) -> list[str]:
    if not style.has_incidental_findings:
        return []
    return draw_incidental_sentences(np.random.default_rng([seed, 6]))


def _draw_some(rng: np.random.Generator, names: Sequence[str], most: int) -> list[str]:
    """Draw one to `most` names, in their own order."""
    count = int(rng.integers(1, most + 1))
    return [names[n] for n in sorted(rng.choice(len(names), count, replace=False))]


def _draw_patient_build(rng: np.random.Generator, heart: float, pericardial: float) -> PatientBuild:
    spacing_z, spacing = float(rng.uniform(4.1, 5.0)), float(rng.uniform(2.4, 2.6))
    fat = float(rng.uniform(9, 20))
    scale = tuple(float(s) for s in rng.uniform((0.93, 0.93, 0.95), (1.04, 1.06, 1.04)))
    width = 2 * (155 + 0.8 * fat) * scale[0] + 18
    columns = max(144, 2 * int(np.ceil(width / spacing / 2)))
    return PatientBuild(
        shape=(round(292 * scale[2] / spacing_z), columns, columns),
        spacing_mm=(spacing_z, spacing, spacing),
        scale=(scale[0], scale[1], scale[2]),
        roll_radians=float(np.radians(rng.uniform(-4, 4))),
        lean_per_mm=float(rng.uniform(-0.03, 0.03)),
        fat_mm=fat,
        heart_size=heart * float(rng.uniform(0.96, 1.03)),
        blood_hu=float(rng.uniform(36, 48)) if rng.random() < 0.7 else float(rng.uniform(120, 180)),
        pericardial_effusion_mm=pericardial,
        dome_height_mm=float(rng.uniform(-8, 8)),
    )


def _fixed_patient_build(heart: float, pericardial: float) -> PatientBuild:
    """Build of the one patient of a style, lean and straight.

    Pericardial fluid has few depths, so that chests repeat.
    """
    return PatientBuild(
        shape=(54, 132, 132),
        spacing_mm=(5.0, 2.6, 2.6),
        scale=(0.94, 0.94, 0.94),
        roll_radians=0.0,
        lean_per_mm=0.0,
        fat_mm=9.0,
        heart_size=heart,
        blood_hu=42.0,
        pericardial_effusion_mm=PERICARDIAL_STEP_MM * round(pericardial / PERICARDIAL_STEP_MM),
        dome_height_mm=0.0,
    )
