"""What a phantom's patient has, and where: decided by the seed before anything is painted.

The painter and the report both read the plan, so that image, masks, labels and words cannot disagree.
"""

from dataclasses import dataclass, field

import numpy as np

from rectvlm.data.phantom_canvas import Build
from rectvlm.labels import FINDINGS, LESIONS, LOBES, Side

PREVALENCE: dict[str, float] = dict.fromkeys(FINDINGS, 0.35) | {
    "Pleural effusion": 0.4,
    "Lung nodule": 0.4,
    "Consolidation": 0.4,
    "Pericardial effusion": 0.3,
    "Mosaic attenuation pattern": 0.25,
    "Interlobular septal thickening": 0.25,
}
"""Chance of each finding in a phantom. "Lung opacity" is the chance of ground glass; consolidation implies it too."""
GROUND_GLASS = 0.35
UNANNOTATED = 0.15
"""Chance that one kind of lesion was not annotated in a case."""
UNKNOWN = 0.1
"""Chance that one finding's label is unknown in a case."""
PERICARDIAL_STEP = 3.0
"""Depths of pericardial fluid in a style with one patient are multiples of this, mm."""
LARGE_HEART = 1.24
"""Size of a heart with cardiomegaly."""
DEVICES = ("pacemaker", "port", "sternal wires")
STATIONS = ("paratracheal", "subcarinal", "aortopulmonary")


@dataclass(frozen=True)
class PhantomStyle:
    """How much patients differ from each other, and how plain their findings are."""

    name: str
    findings: tuple[str, ...]
    """Findings that are drawn; the others are absent from every patient."""
    one_patient: bool
    """The same healthy chest in every case, up to noise, kernel, axis order and position; findings differ."""
    nodules: tuple[float, float]
    """Smallest and largest diameter, mm."""
    terse: bool
    """Reports in the shortest phrasing of each finding that is present, in one order, and nothing else."""


VARIED = PhantomStyle("varied", FINDINGS, one_patient=False, nodules=(10.5, 24.0), terse=False)
PLAIN = PhantomStyle(
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
    one_patient=True,
    nodules=(18.0, 28.0),
    terse=True,
)
STYLES = {style.name: style for style in (VARIED, PLAIN)}
"""By name. `varied` is the default; `plain` is for learning within minutes (see `docs/phantom.md`)."""


@dataclass(frozen=True)
class Nodule:
    """One lung nodule."""

    lobe: str
    diameter: float
    """mm."""


@dataclass
class Plan:
    """One phantom patient."""

    present: dict[str, bool]
    """All 18 findings."""
    build: Build
    noise: float
    """Standard deviation of the noise, HU."""
    sharpness: float
    """Standard deviation of the reconstruction kernel's blur, in voxels."""
    effusions: dict[Side, float]
    """Greatest depth of pleural fluid on each side that has some, mm."""
    consolidations: list[str]
    """Lobes with a consolidation."""
    ground_glass: list[str]
    """Lobes with ground glass."""
    nodules: list[Nodule]
    lobe_of: dict[str, str]
    """The lobe of findings that have one: atelectasis, bronchiectasis, peribronchial thickening, fibrotic sequela."""
    device: str
    """Which of `DEVICES`, when medical material is present."""
    stations: tuple[str, ...]
    """Which of `STATIONS` have enlarged nodes, when lymphadenopathy is present."""
    unannotated: str | None
    """Key of the lesion that was not annotated."""
    unknown: str | None
    """Finding whose label is unknown."""
    order: list[int] = field(default_factory=list)
    """Random numbers that choose the report's phrasing."""
    style: PhantomStyle = VARIED


def draw_plan(seed: int, style: PhantomStyle = VARIED) -> Plan:
    """The patient of a seed. The same on every machine."""
    rng = np.random.default_rng([seed, 1])
    present = {finding: bool(rng.random() < PREVALENCE[finding] and finding in style.findings) for finding in FINDINGS}
    ground_glass = rng.random() < GROUND_GLASS
    present["Lung opacity"] = bool(ground_glass or present["Consolidation"])
    effusions: dict[Side, float] = {}
    if present["Pleural effusion"]:
        sides: tuple[Side, ...] = (("left",), ("right",), ("left", "right"))[int(rng.integers(3))]
        depth = float(rng.uniform(20, 42))
        effusions = {side: depth * float(rng.uniform(0.9, 1.1)) for side in sides}
    pericardial = float(rng.uniform(8, 14)) if present["Pericardial effusion"] else 0.0
    lobes = [lobe.name for lobe in LOBES]

    def some_lobes(most: int) -> list[str]:
        return [lobes[n] for n in sorted(rng.choice(5, int(rng.integers(1, most + 1)), replace=False))]

    diameter = float(rng.uniform(*style.nodules))
    nodules = [Nodule(lobe, diameter * float(rng.uniform(0.85, 1.0))) for lobe in some_lobes(2)]
    stations = tuple(STATIONS[n] for n in sorted(rng.choice(3, int(rng.integers(1, 4)), replace=False)))
    lobe_of = {
        "Atelectasis": lobes[int(rng.choice([1, 2, 4]))],
        "Bronchiectasis": lobes[int(rng.choice([2, 4]))],
        "Peribronchial thickening": lobes[int(rng.choice([0, 3]))],
        "Pulmonary fibrotic sequela": lobes[int(rng.choice([0, 3]))],
    }
    unannotated = LESIONS[int(rng.integers(len(LESIONS)))].key if rng.random() < UNANNOTATED else None
    unknown = FINDINGS[int(rng.integers(len(FINDINGS)))] if rng.random() < UNKNOWN else None
    consolidations, glass = some_lobes(2), some_lobes(3)
    device = DEVICES[int(rng.integers(len(DEVICES)))]
    heart = LARGE_HEART if present["Cardiomegaly"] else 1.0
    build = _one_build(heart, pericardial) if style.one_patient else _draw_build(rng, heart, pericardial)
    return Plan(
        present=present,
        build=build,
        noise=float(rng.uniform(7, 20)),
        sharpness=float(rng.uniform(0.25, 0.7)),
        effusions=effusions,
        consolidations=consolidations if present["Consolidation"] else [],
        ground_glass=glass if ground_glass else [],
        nodules=nodules if present["Lung nodule"] else [],
        lobe_of=lobe_of,
        device=device,
        stations=stations,
        unannotated=unannotated,
        unknown=unknown,
        order=[int(n) for n in rng.integers(0, 2**31, 64)],
        style=style,
    )


def _draw_build(rng: np.random.Generator, heart: float, pericardial: float) -> Build:
    spacing_z, spacing = float(rng.uniform(4.1, 5.0)), float(rng.uniform(2.4, 2.6))
    fat = float(rng.uniform(9, 20))
    scale = tuple(float(s) for s in rng.uniform((0.93, 0.93, 0.95), (1.04, 1.06, 1.04)))
    width = 2 * (155 + 0.8 * fat) * scale[0] + 18
    columns = max(144, 2 * int(np.ceil(width / spacing / 2)))
    return Build(
        shape=(round(292 * scale[2] / spacing_z), columns, columns),
        spacing=(spacing_z, spacing, spacing),
        scale=(scale[0], scale[1], scale[2]),
        roll=float(np.radians(rng.uniform(-4, 4))),
        lean=float(rng.uniform(-0.03, 0.03)),
        fat=fat,
        heart=heart * float(rng.uniform(0.96, 1.03)),
        blood=float(rng.uniform(36, 48)) if rng.random() < 0.7 else float(rng.uniform(120, 180)),
        pericardial=pericardial,
        dome=float(rng.uniform(-8, 8)),
    )


def _one_build(heart: float, pericardial: float) -> Build:
    """The one patient of a style, lean and straight; pericardial fluid comes in few depths, so that chests repeat."""
    return Build(
        shape=(54, 132, 132),
        spacing=(5.0, 2.6, 2.6),
        scale=(0.94, 0.94, 0.94),
        roll=0.0,
        lean=0.0,
        fat=9.0,
        heart=heart,
        blood=42.0,
        pericardial=PERICARDIAL_STEP * round(pericardial / PERICARDIAL_STEP),
        dome=0.0,
    )
