"""What a phantom's patient has, and where: decided by the seed before anything is painted.

The painter and the report both read the plan, so that image, masks, labels and words cannot disagree.
"""

from dataclasses import dataclass, field

import numpy as np

from rectvlm.labels import FINDINGS, LESIONS, LOBES, BodySide
from rectvlm.phantom.canvas import PatientBuild

FINDING_PREVALENCE: dict[str, float] = dict.fromkeys(FINDINGS, 0.35) | {
    "Pleural effusion": 0.4,
    "Lung nodule": 0.4,
    "Consolidation": 0.4,
    "Pericardial effusion": 0.3,
    "Mosaic attenuation pattern": 0.25,
    "Interlobular septal thickening": 0.25,
}
"""Chance of each finding in a phantom. "Lung opacity" is the chance of ground glass; consolidation implies it too."""
GROUND_GLASS_PREVALENCE = 0.35
UNANNOTATED_CHANCE = 0.15
"""Chance that one kind of lesion was not annotated in a case."""
UNKNOWN_LABEL_CHANCE = 0.1
"""Chance that one finding's label is unknown in a case."""
PERICARDIAL_STEP_MM = 3.0
"""Depths of pericardial fluid in a style with one patient are multiples of this, mm."""
LARGE_HEART_SIZE = 1.24
"""Size of a heart with cardiomegaly."""
DEVICES = ("pacemaker", "port", "sternal wires")
LYMPH_NODE_STATIONS = ("paratracheal", "subcarinal", "aortopulmonary")


@dataclass(frozen=True)
class PhantomStyle:
    """How much patients differ from each other, and how plain their findings are."""

    name: str
    findings: tuple[str, ...]
    """Findings that are drawn; the others are absent from every patient."""
    has_one_patient: bool
    """The same healthy chest in every case, up to noise, kernel, axis order and position; findings differ."""
    nodule_diameters_mm: tuple[float, float]
    """Smallest and largest diameter, mm."""
    is_terse: bool
    """Reports in the shortest phrasing of each finding that is present, in one order, and nothing else."""


VARIED_STYLE = PhantomStyle(
    "varied", FINDINGS, has_one_patient=False, nodule_diameters_mm=(10.5, 24.0), is_terse=False
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
)
PHANTOM_STYLES = {style.name: style for style in (VARIED_STYLE, PLAIN_STYLE)}
"""By name. `varied` is the default; `plain` is for learning within minutes (see `docs/phantom.md`)."""


@dataclass(frozen=True)
class PhantomNodule:
    """One lung nodule."""

    lobe: str
    diameter_mm: float
    """mm."""


@dataclass
class PatientPlan:
    """One phantom patient."""

    present: dict[str, bool]
    """All 18 findings."""
    build: PatientBuild
    noise_hu: float
    """Standard deviation of the noise, HU."""
    blur_voxels: float
    """Standard deviation of the reconstruction kernel's blur, in voxels."""
    pleural_effusions_mm: dict[BodySide, float]
    """Greatest depth of pleural fluid on each side that has some, mm."""
    consolidations: list[str]
    """Lobes with a consolidation."""
    ground_glass: list[str]
    """Lobes with ground glass."""
    nodules: list[PhantomNodule]
    lobe_by_finding: dict[str, str]
    """The lobe of findings that have one: atelectasis, bronchiectasis, peribronchial thickening, fibrotic sequela."""
    device: str
    """Which of `DEVICES`, when medical material is present."""
    enlarged_stations: tuple[str, ...]
    """Which of `STATIONS` have enlarged nodes, when lymphadenopathy is present."""
    unannotated_lesion: str | None
    """Key of the lesion that was not annotated."""
    unknown_finding: str | None
    """Finding whose label is unknown."""
    phrase_numbers: list[int] = field(default_factory=list)
    """Random numbers that choose the report's phrasing."""
    style: PhantomStyle = VARIED_STYLE


def draw_patient_plan(seed: int, style: PhantomStyle = VARIED_STYLE) -> PatientPlan:
    """The patient of a seed. The same on every machine."""
    rng = np.random.default_rng([seed, 1])
    present = {
        finding: bool(rng.random() < FINDING_PREVALENCE[finding] and finding in style.findings)
        for finding in FINDINGS
    }
    ground_glass = rng.random() < GROUND_GLASS_PREVALENCE
    present["Lung opacity"] = bool(ground_glass or present["Consolidation"])
    effusions: dict[BodySide, float] = {}
    if present["Pleural effusion"]:
        sides: tuple[BodySide, ...] = (("left",), ("right",), ("left", "right"))[
            int(rng.integers(3))
        ]
        depth = float(rng.uniform(20, 42))
        effusions = {side: depth * float(rng.uniform(0.9, 1.1)) for side in sides}
    pericardial = float(rng.uniform(8, 14)) if present["Pericardial effusion"] else 0.0
    lobes = [lobe.name for lobe in LOBES]

    def some_lobes(most: int) -> list[str]:
        return [
            lobes[n] for n in sorted(rng.choice(5, int(rng.integers(1, most + 1)), replace=False))
        ]

    diameter = float(rng.uniform(*style.nodule_diameters_mm))
    nodules = [
        PhantomNodule(lobe, diameter * float(rng.uniform(0.85, 1.0))) for lobe in some_lobes(2)
    ]
    stations = tuple(
        LYMPH_NODE_STATIONS[n]
        for n in sorted(rng.choice(3, int(rng.integers(1, 4)), replace=False))
    )
    lobe_of = {
        "Atelectasis": lobes[int(rng.choice([1, 2, 4]))],
        "Bronchiectasis": lobes[int(rng.choice([2, 4]))],
        "Peribronchial thickening": lobes[int(rng.choice([0, 3]))],
        "Pulmonary fibrotic sequela": lobes[int(rng.choice([0, 3]))],
    }
    unannotated = (
        LESIONS[int(rng.integers(len(LESIONS)))].key if rng.random() < UNANNOTATED_CHANCE else None
    )
    unknown = (
        FINDINGS[int(rng.integers(len(FINDINGS)))] if rng.random() < UNKNOWN_LABEL_CHANCE else None
    )
    consolidations, glass = some_lobes(2), some_lobes(3)
    device = DEVICES[int(rng.integers(len(DEVICES)))]
    heart = LARGE_HEART_SIZE if present["Cardiomegaly"] else 1.0
    build = (
        _fixed_patient_build(heart, pericardial)
        if style.has_one_patient
        else _draw_patient_build(rng, heart, pericardial)
    )
    return PatientPlan(
        present=present,
        build=build,
        noise_hu=float(rng.uniform(7, 20)),
        blur_voxels=float(rng.uniform(0.25, 0.7)),
        pleural_effusions_mm=effusions,
        consolidations=consolidations if present["Consolidation"] else [],
        ground_glass=glass if ground_glass else [],
        nodules=nodules if present["Lung nodule"] else [],
        lobe_by_finding=lobe_of,
        device=device,
        enlarged_stations=stations,
        unannotated_lesion=unannotated,
        unknown_finding=unknown,
        phrase_numbers=[int(n) for n in rng.integers(0, 2**31, 64)],
        style=style,
    )


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
    """The one patient of a style, lean and straight; pericardial fluid comes in few depths, so that chests repeat."""
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
