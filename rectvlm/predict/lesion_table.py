"""Table of the single lesions of a case: volume, longest axial diameter, side and lobe of each.

A lesion here is a component: voxels of one kind that touch each other at a face, an edge or a
corner (26 neighbours). Arrays are canonical, (z, y, x), at the resolution of the CT.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from rectvlm.data.voxel_size import voxel_volume_ml
from rectvlm.labels import Lesion
from rectvlm.lesion_bits import lesion_mask, present_lesions
from rectvlm.lesion_places import MIN_LESION_ML, LesionLocator, PlaceSide
from rectvlm.predict.lesion_lobes import LobeFinder
from rectvlm.types import Affine, Int16Volume, MaskVolume

MAX_COMPONENTS = 50
"""Largest number of single lesions in a table; the smaller ones are counted, not measured."""
_NEIGHBORS_26 = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class LesionComponent:
    """One single lesion: a row of `lesions.csv`, an entry of `components` in `findings.json`."""

    lesion: str
    """Key of the kind of lesion."""
    number: int
    """Number of the lesion among those of its kind, the largest one first, counted from 1."""
    voxels: int
    """Number of voxels."""
    volume_ml: float
    """Volume, ml."""
    longest_axial_diameter_mm: float
    """Longest distance between two points of the lesion's edge in one axial slice, mm."""
    slice: int
    """Number of the axial slice with the longest diameter, counted from 1 at the feet."""
    centre_mm: tuple[float, float, float]
    """Centre of gravity in the world of the CT, RAS+ mm."""
    mean_hu: float
    """Mean of the CT in the lesion, HU."""
    side: PlaceSide | None
    """Side of the patient; null around the heart, or for a lesion too small to place."""
    place: str | None
    """Place in words; null for a lesion too small to place."""
    plausible: bool | None
    """Whether a lesion of this kind can lie there; null where that is unknown."""
    approximate_lobes: tuple[str, ...] | None
    """Lobes that hold the lesion by the coarse region map, largest share first; null outside the
    lungs, and where the map does not tell."""


@dataclass(frozen=True)
class LesionTable:
    """The largest lesions of a case, and how many smaller ones it leaves out."""

    components: list[LesionComponent]
    """Lesions by kind, the largest ones of a kind first."""
    n_left_out: int
    """Number of lesions that are not in the table, each smaller than all that are."""
    left_out_ml: float
    """Volume of the lesions that are not in the table, ml."""


@dataclass(frozen=True)
class _Component:
    """A component before it is measured."""

    lesion: Lesion
    number: int
    voxels: int
    box: tuple[slice, slice, slice]
    """Slices (z, y, x) of the volume around the component."""
    mask: NDArray[np.bool_]
    """The component in its box."""


def measure_lesions(
    lesion_bits: MaskVolume,
    ct: Int16Volume,
    affine: Affine,
    locator: LesionLocator,
    lobe_finder: LobeFinder,
) -> LesionTable:
    """Measure the `MAX_COMPONENTS` largest single lesions.

    Args:
        lesion_bits: lesion bits (Z, Y, X).
        ct: HU (Z, Y, X).
        affine: 4 × 4, index (z, y, x, 1) to world, mm.
        locator: of places in this CT.
        lobe_finder: of lobes in this CT.
    """
    assert lesion_bits.shape == ct.shape
    voxel_ml = voxel_volume_ml(affine)
    candidates: list[_Component] = []
    n_total = voxels_total = 0
    for lesion in present_lesions(lesion_bits):
        largest, n_components, n_voxels = _find_largest(lesion_mask(lesion_bits, lesion), lesion)
        candidates += largest
        n_total += n_components
        voxels_total += n_voxels
    kept = sorted(candidates, key=lambda component: -component.voxels)[:MAX_COMPONENTS]
    kept.sort(key=lambda component: (component.lesion.bit, component.number))
    rows = [_measure(component, ct, affine, locator, lobe_finder) for component in kept]
    voxels_left_out = voxels_total - sum(component.voxels for component in kept)
    return LesionTable(rows, n_total - len(kept), round(voxels_left_out * voxel_ml, 4))


def longest_axial_diameter(mask: NDArray[np.bool_], affine: Affine) -> tuple[float, int]:
    """Longest distance between two edges of a mask in one slice, mm, and the index of the slice.

    The edge of a voxel is half a voxel from its centre along either axis of the slice, so a disc
    has its own diameter, and a single voxel the longer one of its sides.

    Args:
        mask: mask (Z, Y, X) with at least one voxel.
        affine: 4 × 4, index (z, y, x, 1) to world, mm; its axes need not be at right angles.
    """
    _, plane_axes = np.linalg.qr(affine[:3, 1:3])
    """2 × 2: index (y, x) to mm in the plane of a slice, with distances as in the world."""
    outlines: dict[int, NDArray[np.float64]] = {}
    bounds: dict[int, float] = {}
    for z in map(int, np.flatnonzero(mask.any(axis=(1, 2)))):
        outlines[z] = _edge_points(mask[z]) @ plane_axes.T
        bounds[z] = float(np.linalg.norm(np.ptp(outlines[z], axis=0)))
    longest, longest_z = 0.0, 0
    for z in sorted(bounds, key=lambda index: -bounds[index]):
        if bounds[z] <= longest:
            break
        points = outlines[z]
        diameter = float(pdist(points[ConvexHull(points).vertices]).max())
        if diameter > longest:
            longest, longest_z = diameter, z
    return longest, longest_z


def write_lesion_csv(components: Sequence[LesionComponent], path: Path) -> None:
    """Write a table with a header, a row for each lesion."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [
                *("lesion", "number", "volume_ml", "longest_axial_diameter_mm", "slice", "side"),
                *("place", "plausible", "approximate_lobes", "mean_hu"),
                *("centre_x_mm", "centre_y_mm", "centre_z_mm"),
            ]
        )
        for row in components:
            measures = (row.volume_ml, row.longest_axial_diameter_mm, row.slice)
            lobes = "; ".join(row.approximate_lobes or ())
            place = (row.side, row.place, row.plausible, lobes)
            writer.writerow(
                [row.lesion, row.number, *measures, *place, row.mean_hu, *row.centre_mm]
            )


def _find_largest(mask: NDArray[np.bool_], lesion: Lesion) -> tuple[list[_Component], int, int]:
    """The largest components of a kind, and the number of all of them and of their voxels."""
    (outer,) = ndimage.find_objects(mask.view(np.uint8))
    labels, n_components = ndimage.label(mask[outer], structure=_NEIGHBORS_26)
    sizes = np.bincount(labels.ravel())[1:]
    boxes = ndimage.find_objects(labels)
    largest = []
    for number, index in enumerate(np.argsort(-sizes, kind="stable")[:MAX_COMPONENTS], start=1):
        inner = boxes[index]
        pairs = zip(outer, inner, strict=True)
        z, y, x = (slice(o.start + i.start, o.start + i.stop) for o, i in pairs)
        component_mask = labels[inner] == index + 1
        largest.append(_Component(lesion, number, int(sizes[index]), (z, y, x), component_mask))
    return largest, n_components, int(sizes.sum())


def _measure(
    component: _Component,
    ct: Int16Volume,
    affine: Affine,
    locator: LesionLocator,
    lobe_finder: LobeFinder,
) -> LesionComponent:
    voxel_ml = voxel_volume_ml(affine)
    diameter_mm, z = longest_axial_diameter(component.mask, affine)
    indexes = np.argwhere(component.mask) + [side.start for side in component.box]
    centre = (affine @ [*indexes.mean(axis=0), 1])[:3]
    volume_ml = component.voxels * voxel_ml
    voxels = np.ravel_multi_index(tuple(indexes.T), ct.shape)
    place = None
    if volume_ml >= MIN_LESION_ML:
        place = locator.locate(component.lesion, voxels, volume_ml)
    return LesionComponent(
        lesion=component.lesion.key,
        number=component.number,
        voxels=component.voxels,
        volume_ml=round(volume_ml, 4),
        longest_axial_diameter_mm=round(diameter_mm, 1),
        slice=component.box[0].start + z + 1,
        centre_mm=(round(centre[0], 1), round(centre[1], 1), round(centre[2], 1)),
        mean_hu=round(float(ct[component.box][component.mask].mean()), 1),
        side=place.side if place else None,
        place=place.wording if place else None,
        plausible=place.is_plausible if place else None,
        approximate_lobes=lobe_finder.find_lobes(component.lesion, place, voxels),
    )


def _edge_points(plane: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Points (y, x) among which the two farthest ones of the edge of a mask (Y, X) are."""
    rows = np.flatnonzero(plane.any(axis=1))
    first = plane[rows].argmax(axis=1)
    last = plane.shape[1] - 1 - plane[rows, ::-1].argmax(axis=1)
    points = []
    for y_step, x_step in ((0, 0.5), (0.5, 0), (-0.5, 0)):
        points.append(np.stack([rows + y_step, first - x_step], axis=1))
        points.append(np.stack([rows + y_step, last + x_step], axis=1))
    return np.concatenate(points)
