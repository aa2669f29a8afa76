"""Synthetic chest CTs whose truth is known: HU, region ids, lesion masks, labels and a report, from a seed.

For tests and for the demo, where no patient's data may be shipped. A phantom teaches software, not medicine: see
`docs/phantom.md`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS, LOBES
from rectvlm.lesion_bits import lesion_mask
from rectvlm.lesion_places import LesionPlace, PlaceSide, describe_lobes, describe_side
from rectvlm.phantom.anatomy import paint_chest
from rectvlm.phantom.canvas import PatientBuild, PhantomCanvas, make_canvas
from rectvlm.phantom.disease import paint_findings
from rectvlm.phantom.patient_plan import VARIED_STYLE, PatientPlan, PhantomStyle, draw_patient_plan
from rectvlm.phantom.report import write_report
from rectvlm.types import Affine, Int16Volume, MaskVolume


@dataclass(frozen=True)
class PhantomCase:
    """One synthetic case, as a file would bring it: arrays in some native order, with the affine that says which."""

    hu: Int16Volume
    """(i, j, k) HU."""
    affine: Affine
    """4 × 4, index (i, j, k, 1) to RAS+ world, mm."""
    lesions: MaskVolume
    """(i, j, k) lesion bits; a lesion that was not annotated has none, though the image may show it."""
    regions: MaskVolume
    """(i, j, k) region ids. Pleural and pericardial fluid and hilar structures have 0."""
    labels: dict[str, int | None]
    """All 18 findings: 1 in the image, 0 not, None unknown."""
    findings: str
    impression: str
    lesions_annotated: dict[str, bool]
    true_places: list[LesionPlace]
    """Where each lesion was painted, in the order of their bits, whether annotated or not."""


def make_phantom(seed: int, style: PhantomStyle = VARIED_STYLE) -> PhantomCase:
    """The phantom of a seed.

    Labels, report and places are the same on every machine; voxels too, but for the last digit of a machine's
    mathematical functions.

    About 60 × 144 × 144 voxels of about 4.5 × 2.5 × 2.5 mm, with axis order and directions that vary with the seed.
    """
    plan = draw_patient_plan(seed, style)
    canvas = (
        _copy_canvas(_shared_healthy_chest(plan.build))
        if style.has_one_patient
        else _paint_healthy_chest(plan.build, seed)
    )
    paint_findings(canvas, plan, np.random.default_rng([seed, 3]))
    truth = _collect_true_places(canvas, plan)
    hu = _simulate_scan(canvas, plan, np.random.default_rng([seed, 4]))
    lesions = canvas.lesions
    if plan.unannotated_lesion is not None:
        lesions = lesions & ~np.uint8(LESION_BY_KEY[plan.unannotated_lesion].mask_value)
    order, affine = _draw_native_order(plan, np.random.default_rng([seed, 5]))
    labels: dict[str, int | None] = {finding: int(plan.present[finding]) for finding in FINDINGS}
    if plan.unknown_finding is not None:
        labels[plan.unknown_finding] = None
    findings, impression = write_report(plan)
    return PhantomCase(
        hu=order(hu),
        affine=affine,
        lesions=order(lesions),
        regions=order(canvas.regions),
        labels=labels,
        findings=findings,
        impression=impression,
        lesions_annotated={lesion.key: lesion.key != plan.unannotated_lesion for lesion in LESIONS},
        true_places=truth,
    )


def _paint_healthy_chest(build: PatientBuild, seed: int) -> PhantomCanvas:
    canvas = make_canvas(build)
    paint_chest(canvas, np.random.default_rng([seed, 2]))
    return canvas


@lru_cache(maxsize=16)
def _shared_healthy_chest(build: PatientBuild) -> PhantomCanvas:
    """The healthy chest of a style with one patient: most of a phantom's cost, and the same each time."""
    return _paint_healthy_chest(build, 0)


def _copy_canvas(canvas: PhantomCanvas) -> PhantomCanvas:
    """A canvas to paint on; what findings only read is shared."""
    painted = {name: getattr(canvas, name).copy() for name in ("hu", "regions", "lesions")}
    return replace(canvas, **painted, distances_mm=dict(canvas.distances_mm))


def _simulate_scan(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> Int16Volume:
    """What the scanner makes of the patient: blur, and noise with the grain of its kernel."""
    volume = canvas.hu
    grain = rng.standard_normal(volume.shape, dtype=np.float32)
    for axis in (1, 2):
        volume = gaussian_filter1d(volume, plan.blur_voxels * 0.8, axis=axis, truncate=3)
        grain = gaussian_filter1d(grain, plan.blur_voxels, axis=axis, truncate=3)
    grain *= np.float32(plan.noise_hu / grain.std())
    # Beyond the patient there is air, and scanners clip at −1024.
    return np.asarray(np.clip(np.rint(volume + grain), -1024, 3071), dtype=np.int16)


class _NativeOrder:
    """Re-orders canonical arrays into a file's order."""

    def __init__(self, axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
        self.axes, self.flips = axes, flips

    def __call__(self, array: NDArray) -> NDArray:
        return np.ascontiguousarray(np.flip(array.transpose(self.axes), self.flips))


def _draw_native_order(plan: PatientPlan, rng: np.random.Generator) -> tuple[_NativeOrder, Affine]:
    """A random file order, and the affine that belongs to it."""
    axes = tuple(int(a) for a in rng.permutation(3))
    flips = tuple(n for n in range(3) if rng.random() < 0.5)
    spacing, shape = plan.build.spacing_mm, plan.build.shape
    # Canonical (z, y, x) grows to superior, posterior and left; RAS+ world (x, y, z) to right, anterior, superior.
    canonical = np.zeros((4, 4))
    canonical[2, 0], canonical[1, 1], canonical[0, 2], canonical[3, 3] = (
        spacing[0],
        -spacing[1],
        -spacing[2],
        1,
    )
    middle = np.array([(size - 1) / 2 for size in shape] + [0])
    canonical[:3, 3] = rng.uniform((-15, -20, -300), (15, 20, 300)) - (canonical @ middle)[:3]
    # Native index → canonical index.
    back = np.eye(4)
    for n, axis in enumerate(axes):
        back[:3, n] = 0
        back[axis, n] = -1 if n in flips else 1
        back[axis, 3] = shape[axis] - 1 if n in flips else 0
    return _NativeOrder(axes, flips), canonical @ back


def _collect_true_places(canvas: PhantomCanvas, plan: PatientPlan) -> list[LesionPlace]:
    """The plan's lesions as places, with the volumes that were painted."""
    voxel = float(np.prod(plan.build.spacing_mm)) / 1000
    lobes: dict[str, list[str]] = {
        "consolidation": plan.consolidations,
        "ground_glass_opacity": plan.ground_glass,
        "lung_nodule": list(dict.fromkeys(nodule.lobe for nodule in plan.nodules)),
    }
    drawn = {
        **lobes,
        "pericardial_effusion": [""] * plan.present["Pericardial effusion"],
        "pleural_effusion": plan.pleural_effusions_mm,
    }
    places = []
    for lesion in LESIONS:
        if not drawn[lesion.key]:
            continue
        mask = lesion_mask(canvas.lesions, lesion)
        volume = float(mask.sum()) * voxel
        side: PlaceSide | None = None
        names: tuple[str, ...] = ()
        if lesion.site == "lung":
            held = np.bincount(canvas.regions[mask], minlength=len(LOBES) + 1)
            ids = {lobe.name: lobe.id for lobe in LOBES}
            names = tuple(sorted(lobes[lesion.key], key=lambda name: -held[ids[name]]))
            sides = {name.split()[0] for name in names}
        elif lesion.site == "pleura":
            sides = set(plan.pleural_effusions_mm)
        if lesion.site != "pericardium":
            side = "both" if len(sides) == 2 else ("left" if "left" in sides else "right")
        words = describe_lobes(names) if names else describe_side(lesion, side)
        places.append(LesionPlace(lesion.key, volume, side, names, "regions", words))
    return places
