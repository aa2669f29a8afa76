"""Synthetic chest CTs with known truth: HU, region ids, lesion masks, labels and a report.

Tests and the demo use them, since no patient's data may be shipped. A phantom teaches software, not
medicine.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from rectvlm.data.hounsfield import MAX_HU, MIN_HU
from rectvlm.labels import LESIONS, LOBES, REGION_BY_NAME
from rectvlm.lesion_bits import lesion_mask
from rectvlm.lesion_places import (
    LesionPlace,
    PlaceSide,
    combine_sides,
    describe_lobes,
    describe_side,
)
from rectvlm.phantom.anatomy import paint_chest
from rectvlm.phantom.canvas import PatientBuild, PhantomCanvas, make_canvas
from rectvlm.phantom.disease import paint_findings
from rectvlm.phantom.patient_plan import VARIED_STYLE, PatientPlan, PhantomStyle, draw_patient_plan
from rectvlm.phantom.report import write_report
from rectvlm.phantom.supervision import PhantomSupervision, annotate_phantom
from rectvlm.types import Affine, Int16Volume, MaskVolume


@dataclass(frozen=True)
class PhantomCase:
    """One synthetic case as a file would bring it, in some native axis order."""

    hu: Int16Volume
    """HU (i, j, k)."""
    affine: Affine
    """Index (i, j, k, 1) to world."""
    lesions: MaskVolume
    """Lesion bits (i, j, k). A lesion that is neither annotated nor partial has none, though the
    image shows it."""
    regions: MaskVolume
    """Region ids (i, j, k); 0 in pleural and pericardial fluid and hilar structures."""
    labels: dict[str, int | None]
    """All 18 findings: 1 in the image, 0 not, None unknown; some are wrong with supervision
    `ct-rate`."""
    findings: str
    """Findings section of the report."""
    impression: str
    """Impression section of the report."""
    lesions_annotated: dict[str, bool]
    """Whether a kind of lesion is annotated, by lesion key."""
    lesions_partial: dict[str, bool]
    """Whether some lesions of a kind are outlined while others may not be, by lesion key."""
    lesions_source: dict[str, str | None]
    """Who or what outlined each lesion, by lesion key; None where it was not outlined."""
    true_places: list[LesionPlace]
    """Place of each painted lesion, annotated or not, in the order of `labels.LESIONS`."""


def make_phantom(
    seed: int,
    style: PhantomStyle = VARIED_STYLE,
    supervision: PhantomSupervision = "complete",
) -> PhantomCase:
    """Make the phantom of a seed.

    It has about 60 × 144 × 144 voxels of about 4.5 × 2.5 × 2.5 mm; axis order and directions vary
    with the seed. Labels, report and places are the same on every machine. Voxels are too, except
    for the last digit of a machine's mathematical functions.
    """
    plan = draw_patient_plan(seed, style)
    if style.has_one_patient:
        canvas = _copy_canvas(_shared_healthy_chest(plan.build))
    else:
        canvas = _paint_healthy_chest(plan.build, seed)
    paint_findings(canvas, plan, np.random.default_rng([seed, 3]))
    hu = _simulate_scan(canvas, plan, np.random.default_rng([seed, 4]))

    annotations = annotate_phantom(canvas, plan, supervision, seed)
    order, affine = _draw_native_order(plan, np.random.default_rng([seed, 5]))
    findings, impression = write_report(plan)
    return PhantomCase(
        hu=order(hu),
        affine=affine,
        lesions=order(annotations.lesions),
        regions=order(canvas.regions),
        labels=annotations.labels,
        findings=findings,
        impression=impression,
        lesions_annotated=annotations.lesions_annotated,
        lesions_partial=annotations.lesions_partial,
        lesions_source=annotations.lesions_source,
        true_places=_collect_true_places(canvas, plan),
    )


def _paint_healthy_chest(build: PatientBuild, seed: int) -> PhantomCanvas:
    canvas = make_canvas(build)
    paint_chest(canvas, np.random.default_rng([seed, 2]))
    return canvas


@lru_cache(maxsize=16)
def _shared_healthy_chest(build: PatientBuild) -> PhantomCanvas:
    """Paint the healthy chest of a style with one patient, most of a phantom's cost, only once."""
    return _paint_healthy_chest(build, 0)


def _copy_canvas(canvas: PhantomCanvas) -> PhantomCanvas:
    """Copy the painted volumes of a canvas; the coordinates and distances are shared."""
    return replace(
        canvas,
        hu=canvas.hu.copy(),
        regions=canvas.regions.copy(),
        lesions=canvas.lesions.copy(),
        distances_mm=dict(canvas.distances_mm),
    )


def _simulate_scan(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> Int16Volume:
    """Blur the patient and add noise with the grain of the reconstruction kernel."""
    volume = canvas.hu
    grain = rng.standard_normal(volume.shape, dtype=np.float32)
    for axis in (1, 2):
        volume = gaussian_filter1d(volume, plan.blur_voxels * 0.8, axis=axis, truncate=3)
        grain = gaussian_filter1d(grain, plan.blur_voxels, axis=axis, truncate=3)
    grain *= np.float32(plan.noise_hu / grain.std())
    return np.asarray(np.clip(np.rint(volume + grain), MIN_HU, MAX_HU), dtype=np.int16)


class _NativeOrder:
    """Axis order and directions of a file; calling it brings a canonical array to them."""

    def __init__(self, axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
        self.axes, self.flips = axes, flips

    def __call__(self, array: NDArray) -> NDArray:
        return np.ascontiguousarray(np.flip(array.transpose(self.axes), self.flips))


def _draw_native_order(plan: PatientPlan, rng: np.random.Generator) -> tuple[_NativeOrder, Affine]:
    """Draw a file's axis order and position, and make the affine of both."""
    axes = tuple(int(a) for a in rng.permutation(3))
    flips = tuple(n for n in range(3) if rng.random() < 0.5)
    spacing, shape = plan.build.spacing_mm, plan.build.shape
    # Canonical (z, y, x) grows to superior, posterior, left; RAS+ (x, y, z) to right, anterior,
    # superior.
    canonical = np.zeros((4, 4))
    canonical[2, 0], canonical[1, 1], canonical[0, 2] = spacing[0], -spacing[1], -spacing[2]
    canonical[3, 3] = 1
    middle = np.array([(size - 1) / 2 for size in shape] + [0])
    canonical[:3, 3] = rng.uniform((-15, -20, -300), (15, 20, 300)) - (canonical @ middle)[:3]
    native_to_canonical = np.eye(4)
    for n, axis in enumerate(axes):
        native_to_canonical[:3, n] = 0
        native_to_canonical[axis, n] = -1 if n in flips else 1
        native_to_canonical[axis, 3] = shape[axis] - 1 if n in flips else 0
    return _NativeOrder(axes, flips), canonical @ native_to_canonical


def _collect_true_places(canvas: PhantomCanvas, plan: PatientPlan) -> list[LesionPlace]:
    """Places of the plan's lesions, with the volumes that were painted."""
    voxel_ml = float(np.prod(plan.build.spacing_mm)) / 1000
    lobes_by_lesion = {
        "consolidation": plan.consolidations,
        "ground_glass_opacity": plan.ground_glass,
        "lung_nodule": list(dict.fromkeys(nodule.lobe for nodule in plan.nodules)),
    }
    places = []
    for lesion in LESIONS:
        mask = lesion_mask(canvas.lesions, lesion)
        lobes: tuple[str, ...] = ()
        side: PlaceSide | None = None
        if lesion.site == "lung":
            lobes = _sort_by_volume(lobes_by_lesion[lesion.key], canvas.regions[mask])
            side = combine_sides({REGION_BY_NAME[lobe].side for lobe in lobes})
            is_drawn = bool(lobes)
        elif lesion.site == "pleura":
            side = combine_sides(set(plan.pleural_effusions_mm))
            is_drawn = bool(plan.pleural_effusions_mm)
        else:
            is_drawn = plan.present["Pericardial effusion"]
        if is_drawn:
            wording = describe_lobes(lobes) if lobes else describe_side(lesion, side)
            volume_ml = float(mask.sum()) * voxel_ml
            places.append(LesionPlace(lesion.key, volume_ml, side, lobes, "regions", wording))
    return places


def _sort_by_volume(lobes: list[str], region_ids: NDArray[np.uint8]) -> tuple[str, ...]:
    """Lobes by the number of their voxels in `region_ids`, largest first."""
    voxels = np.bincount(region_ids, minlength=len(LOBES) + 1)
    return tuple(sorted(lobes, key=lambda lobe: -voxels[REGION_BY_NAME[lobe].id]))
