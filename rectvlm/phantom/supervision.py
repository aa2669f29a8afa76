"""Supervision of a phantom: the labels and outlines that a data set would hold of it.

The image and the report stay true. `complete` outlines everything, save for one kind of lesion in
some cases; `exhaustive` everything in all; `ct-rate` repeats what CT-RATE holds of a training case:

- labels read from reports by a classifier, some of them wrong
- nodules and effusions as an automatic segmenter outlines them
- consolidation and ground glass outlined in few cases, and there in part
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS, LOBES, Lesion
from rectvlm.lesion_bits import lesion_mask, pack_lesion
from rectvlm.phantom.canvas import REGION_IDS, PhantomCanvas, make_ellipsoid, smooth_noise
from rectvlm.phantom.patient_plan import PatientPlan
from rectvlm.types import (
    PHANTOM_OUTLINES,
    REXGROUNDING_OUTLINES,
    TOTALSEGMENTATOR_OUTLINES,
    MaskVolume,
    no_lesions_source,
)

PhantomSupervision = Literal["complete", "exhaustive", "ct-rate"]
"""Kind of supervision, as the module's docstring describes it."""
TrainingSupervision = Literal["complete", "ct-rate"]
"""Kind of supervision of training phantoms."""

LABEL_ERROR_RATES: dict[str, float] = {
    "Medical material": 0.02,
    "Arterial wall calcification": 0.02,
    "Cardiomegaly": 0.02,
    "Pericardial effusion": 0.01,
    "Coronary artery wall calcification": 0.02,
    "Hiatal hernia": 0.02,
    "Lymphadenopathy": 0.10,
    "Emphysema": 0.025,
    "Atelectasis": 0.06,
    "Lung nodule": 0.045,
    "Lung opacity": 0.06,
    "Pulmonary fibrotic sequela": 0.06,
    "Pleural effusion": 0.015,
    "Mosaic attenuation pattern": 0.03,
    "Peribronchial thickening": 0.045,
    "Consolidation": 0.04,
    "Bronchiectasis": 0.03,
    "Interlobular septal thickening": 0.03,
}
"""Share of wrong labels of each finding: 3.6% of all, as an audit found of CT-RATE's."""
SIMULATED_SEGMENTER = f"simulated {TOTALSEGMENTATOR_OUTLINES}"
"""`lesions_source` of outlines with the errors of an automatic segmenter."""
SIMULATED_PEOPLE = f"simulated {REXGROUNDING_OUTLINES}"
"""`lesions_source` of outlines that are right and not complete."""
SEGMENTED_LESIONS = ("pericardial_effusion", "pleural_effusion", "lung_nodule")
"""Lesions that an automatic segmenter outlines in every case."""
PARTIAL_LESIONS = ("consolidation", "ground_glass_opacity")
"""Lesions that people outline in some cases."""
PARTIAL_SHARE = 0.13
"""Share of the cases with outlines of people: ReXGroundingCT's part of CT-RATE's training scans."""
MAX_PARTIAL_INSTANCES = 3
"""Largest number of components of a lesion that people outline."""
MISSED_NODULE_CHANCE = 0.3
"""Chance that the segmenter misses a nodule that is smaller than the median."""
FALSE_SPECK_CHANCE = 0.03
"""Chance that the segmenter outlines a speck of a lesion where there is none."""
BORDER_NOISE_MM = 15.0
"""Distance over which the error of a border varies, mm."""

_NEIGHBORS_26 = np.ones((3, 3, 3), bool)

VoxelMask = NDArray[np.bool_]


@dataclass(frozen=True)
class PhantomAnnotations:
    """Labels and outlines that a data set holds of a phantom."""

    labels: dict[str, int | None]
    """All 18 findings: 1 present, 0 absent, None unknown."""
    lesions: MaskVolume
    """Lesion bits (Z, Y, X) of what was outlined."""
    lesions_annotated: dict[str, bool]
    """Whether every lesion of a kind was outlined, by lesion key."""
    lesions_partial: dict[str, bool]
    """Whether some lesions of a kind were outlined and others may be missing, by lesion key."""
    lesions_source: dict[str, str | None]
    """Who or what outlined each lesion, by lesion key; None where it was not outlined."""


@dataclass(frozen=True)
class CtRateErrors:
    """What CT-RATE's supervision of a case gets wrong or leaves out."""

    wrong_labels: frozenset[str]
    """Findings whose label is the opposite of the truth."""
    has_partial_outlines: bool
    """Whether people outlined consolidation and ground glass."""


def annotate_phantom(
    canvas: PhantomCanvas, plan: PatientPlan, supervision: PhantomSupervision, seed: int
) -> PhantomAnnotations:
    """Make the labels and outlines of a painted phantom.

    Args:
        canvas: canvas with all lesions of the plan.
        plan: plan of the patient.
        supervision: kind of supervision.
        seed: seed of the phantom.
    """
    if supervision == "ct-rate":
        return _annotate_like_ct_rate(canvas, plan, seed)
    unannotated = unknown = None
    if supervision == "complete":
        unannotated, unknown = plan.unannotated_lesion, plan.unknown_finding
    lesions = canvas.lesions
    if unannotated is not None:
        lesions = lesions & ~np.uint8(LESION_BY_KEY[unannotated].mask_value)
    labels: dict[str, int | None] = {finding: int(plan.present[finding]) for finding in FINDINGS}
    if unknown is not None:
        labels[unknown] = None
    return PhantomAnnotations(
        labels=labels,
        lesions=lesions,
        lesions_annotated={key: key != unannotated for key in LESION_BY_KEY},
        lesions_partial=dict.fromkeys(LESION_BY_KEY, False),
        lesions_source={
            key: PHANTOM_OUTLINES if key != unannotated else None for key in LESION_BY_KEY
        },
    )


def draw_ct_rate_errors(seed: int) -> CtRateErrors:
    """Draw the errors of a case's supervision, the same on every machine."""
    rng = np.random.default_rng([seed, 7])
    chances = rng.random(len(FINDINGS))
    wrong_labels = []
    for finding, chance in zip(FINDINGS, chances, strict=True):
        if chance < LABEL_ERROR_RATES[finding]:
            wrong_labels.append(finding)
    return CtRateErrors(frozenset(wrong_labels), bool(rng.random() < PARTIAL_SHARE))


def _annotate_like_ct_rate(
    canvas: PhantomCanvas, plan: PatientPlan, seed: int
) -> PhantomAnnotations:
    errors = draw_ct_rate_errors(seed)
    labels: dict[str, int | None] = {}
    for finding in FINDINGS:
        labels[finding] = int(plan.present[finding] != (finding in errors.wrong_labels))
    lesions = np.zeros_like(canvas.lesions)
    partial, sources = dict.fromkeys(LESION_BY_KEY, False), no_lesions_source()
    for lesion in LESIONS:
        mask = lesion_mask(canvas.lesions, lesion)
        if lesion.key in SEGMENTED_LESIONS:
            rng = np.random.default_rng([seed, 8, lesion.bit])
            lesions |= pack_lesion(_segment_lesion(mask, lesion, canvas, plan, rng), lesion)
            sources[lesion.key] = SIMULATED_SEGMENTER
        elif errors.has_partial_outlines and mask.any():
            lesions |= pack_lesion(keep_largest_instances(mask, MAX_PARTIAL_INSTANCES), lesion)
            partial[lesion.key], sources[lesion.key] = True, SIMULATED_PEOPLE
    return PhantomAnnotations(
        labels=labels,
        lesions=lesions,
        lesions_annotated={key: key in SEGMENTED_LESIONS for key in LESION_BY_KEY},
        lesions_partial=partial,
        lesions_source=sources,
    )


def keep_largest_instances(mask: VoxelMask, count: int) -> VoxelMask:
    """Keep the `count` largest components of a mask (Z, Y, X)."""
    numbers, _ = ndimage.label(mask, structure=_NEIGHBORS_26)
    sizes = np.bincount(numbers.ravel())
    sizes[0] = 0
    largest = np.argsort(-sizes, kind="stable")[:count]
    return mask & np.isin(numbers, largest)


def _segment_lesion(
    mask: VoxelMask,
    lesion: Lesion,
    canvas: PhantomCanvas,
    plan: PatientPlan,
    rng: np.random.Generator,
) -> VoxelMask:
    """Outline a lesion with the errors of an automatic segmenter."""
    if lesion.key == "lung_nodule":
        mask = _miss_small_nodules(mask, plan, rng)
    if mask.any():
        mask = _shift_borders(mask, canvas, rng)
    if rng.random() < FALSE_SPECK_CHANCE:
        mask = mask | _draw_speck(lesion, canvas, rng)
    return mask


def _miss_small_nodules(mask: VoxelMask, plan: PatientPlan, rng: np.random.Generator) -> VoxelMask:
    """Remove some of the nodules whose diameter, that of a ball, is below the style's median."""
    numbers, count = ndimage.label(mask, structure=_NEIGHBORS_26)
    volumes_mm3 = np.bincount(numbers.ravel(), minlength=count + 1) * np.prod(plan.build.spacing_mm)
    diameters_mm = np.cbrt(6 / np.pi * volumes_mm3)
    is_missed = diameters_mm < plan.style.median_nodule_diameter_mm
    is_missed &= rng.random(count + 1) < MISSED_NODULE_CHANCE
    return mask & ~is_missed[numbers]


def _shift_borders(mask: VoxelMask, canvas: PhantomCanvas, rng: np.random.Generator) -> VoxelMask:
    """Move a mask's border in and out by up to one voxel."""
    sides = ndimage.find_objects(mask.view(np.uint8))[0]
    box = tuple(slice(max(0, side.start - 2), side.stop + 2) for side in sides)
    inside = mask[box]
    # Half a voxel from the border: 0.5 in the first layer inside, -0.5 in the first one outside.
    depth_voxels = np.where(
        inside,
        ndimage.distance_transform_edt(inside) - 0.5,
        0.5 - ndimage.distance_transform_edt(~inside),
    )
    noise = smooth_noise(rng, canvas, BORDER_NOISE_MM)[box]
    shifted = np.zeros_like(mask)
    shifted[box] = depth_voxels + np.clip(0.6 * noise, -1, 1) > 0
    return shifted


def _draw_speck(lesion: Lesion, canvas: PhantomCanvas, rng: np.random.Generator) -> VoxelMask:
    """Draw a ball in the lungs, or in the heart for the pericardium."""
    region_ids = [lobe.id for lobe in LOBES]
    if lesion.site == "pericardium":
        region_ids = [REGION_IDS["heart"]]
    flat = np.flatnonzero(np.isin(canvas.regions, region_ids))
    spot = np.unravel_index(int(flat[int(rng.integers(flat.size))]), canvas.regions.shape)
    centre = (float(canvas.x[spot]), float(canvas.y[spot]), float(canvas.z[spot[0], 0, 0]))
    radius_mm = float(rng.uniform(4, 8))
    ball = make_ellipsoid(canvas, centre, (radius_mm, radius_mm, radius_mm))
    speck = np.zeros(canvas.regions.shape, bool)
    speck[ball.box] = ball.occupancy > 0.5
    return speck
