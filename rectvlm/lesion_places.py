"""Places of lesions in words: by lobes where a region map exists, by geometry where none does.

Arrays are canonical, (z, y, x) = (inferior → superior, anterior → posterior, patient right → left),
so the patient's left is at large x. Prompts, reports and pages take all wordings from this module.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from rectvlm.labels import LESION_BY_KEY, LESIONS, LOBES, REGION_BY_NAME, Lesion
from rectvlm.lesion_bits import lesion_mask
from rectvlm.types import Int16Volume, MaskVolume

PlaceSide = Literal["left", "right", "both"]

MIN_LESION_ML = 0.05
"""Volume of the smallest lesion with a place: an 8 mm nodule has 0.27 ml, and less is a speck."""
MIN_NAMED_SHARE = 0.15
"""Least share of a lesion in a lobe, side or zone that is named."""
MIN_LUNG_SHARE = 0.02
"""Least share of the lobes' voxels in a lung; a region map with less lacks this lung."""
MIN_BODY_HU = -300
MAX_LUNG_HU = -500
MIN_BONE_HU = 150
_SPINE_WIDTH_MM, _MIN_SPINE_AREA_MM2 = 50.0, 150.0
"""Width of a vertebra with its processes, and its least area of bone in a slice on average."""
_SPINE_REACH_MM = 40.0
"""Distance above and below a lesion in which the spine is searched."""
_MAX_MIDLINE_OFFSET_MM = 25.0
"""Largest distance from the spine to the middle of the body; beyond it, the body is cut off."""
_MAX_VOTING_VOXELS = 2000
"""Number of voxels that vote for their nearest lobe: enough for a share, and quick."""


@dataclass(frozen=True)
class LesionPlace:
    """Place of one kind of lesion in one case."""

    lesion: str
    """Key of the lesion."""
    volume_ml: float
    """Volume of the lesion."""
    side: PlaceSide | None
    """Side of the patient; None around the heart."""
    regions: tuple[str, ...]
    """Names of the lobes that hold the lesion, largest share first; empty by geometry."""
    basis: Literal["regions", "geometry"]
    """Source of the place: a region map, or the CT alone."""
    wording: str
    """Place in words, to follow "in" or "in the"."""


def describe_lobes(lobes: Sequence[str]) -> str:
    """Word a set of lobes: "both lower lobes", "right upper lobe and left lower lobe".

    All lobes of a side become "right lung" or "left lung", all five "both lungs".
    """
    is_left_lung = {"left upper lobe", "left lower lobe"} <= set(lobes)
    is_right_lung = {"right upper lobe", "right middle lobe", "right lower lobe"} <= set(lobes)
    if is_left_lung and is_right_lung:
        return "both lungs"

    remaining = set(lobes)
    parts = []
    if not (is_left_lung or is_right_lung):
        for name in ("upper lobe", "lower lobe"):
            pair = {f"left {name}", f"right {name}"}
            if pair <= remaining:
                parts.append(f"both {name}s")
                remaining -= pair
    for side, is_entire_lung in (("right", is_right_lung), ("left", is_left_lung)):
        if is_entire_lung:
            parts.append(f"{side} lung")
            continue
        for name in ("upper lobe", "middle lobe", "lower lobe"):
            if f"{side} {name}" in remaining:
                parts.append(f"{side} {name}")
    return join_words(parts)


def describe_lobes_with_article(lobes: Sequence[str]) -> str:
    """Word lobes as they follow "in": "the right upper lobe", "both lower lobes"."""
    return _add_article(describe_lobes(lobes))


def join_words(parts: Sequence[str]) -> str:
    """Join words as "a", "a and b" or "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def describe_side(lesion: Lesion, side: PlaceSide | None) -> str:
    """Word the place of a lesion of which only the side is known."""
    if lesion.site == "pericardium":
        return "around the heart"
    if lesion.site == "pleura":
        return "both pleural spaces" if side == "both" else f"{side} pleural space"
    return "both lungs" if side == "both" else f"{side} lung"


def combine_sides(sides: Set[str | None]) -> PlaceSide:
    """One side for the sides of a lesion's parts."""
    if {"left", "right"} <= sides:
        return "both"
    return "left" if "left" in sides else "right"


def locate_lesions(
    lesions: MaskVolume,
    ct: Int16Volume,
    regions: MaskVolume | None,
    spacing: tuple[float, float, float],
) -> list[LesionPlace]:
    """Find the place of each lesion of at least `MIN_LESION_ML`, in the order of `LESIONS`.

    Args:
        lesions: lesion bits (Z, Y, X).
        ct: HU (Z, Y, X).
        regions: region ids (Z, Y, X), or None without a map. A map without the lobes of a side
            counts as none, since the lobe nearest to a lesion there lies in the other lung.
        spacing: voxel size (z, y, x), mm.
    """
    assert lesions.shape == ct.shape and (regions is None or regions.shape == ct.shape), (
        "one grid for all volumes"
    )
    lesion_voxels = np.flatnonzero(lesions)
    bits = lesions.reshape(-1)[lesion_voxels]
    voxel_ml = float(np.prod(spacing)) / 1000.0
    lobes = _LobeIndex(regions, spacing) if regions is not None and lesion_voxels.size else None
    if lobes is not None and not lobes.has_both_lungs:
        lobes = None
    basis: Literal["regions", "geometry"] = "geometry" if lobes is None else "regions"

    places = []
    for lesion in LESIONS:
        voxels = lesion_voxels[lesion_mask(bits, lesion)]
        volume_ml = voxels.size * voxel_ml
        if volume_ml < MIN_LESION_ML:
            continue
        side: PlaceSide | None = None
        names: tuple[str, ...] = ()
        wording = describe_side(lesion, None)
        if lesion.site != "pericardium":
            if lobes is not None:
                shares = lobes.lobe_shares(voxels, nearest_only=lesion.site == "pleura")
                side, names, wording = _place_by_lobes(lesion, shares)
            else:
                side, wording = _place_by_geometry(lesion, voxels, ct, spacing)
        places.append(LesionPlace(lesion.key, volume_ml, side, names, basis, wording))
    return places


def describe_places(places: Sequence[LesionPlace], min_ml: float = MIN_LESION_ML) -> str:
    """Word places as one sentence for a prompt, without lesions smaller than `min_ml`."""
    parts = []
    for place in places:
        if place.volume_ml < min_ml:
            continue
        amount = f"{place.volume_ml:.0f}" if place.volume_ml >= 10 else f"{place.volume_ml:.1f}"
        words = place.wording
        if not words.startswith("around"):
            words = f"in {_add_article(words)}"
        parts.append(f"{LESION_BY_KEY[place.lesion].name} ({amount} ml) {words}")
    return f"Lesions outlined: {'; '.join(parts)}." if parts else "No lesions outlined."


def _add_article(words: str) -> str:
    return words if words.startswith("both") else f"the {words}"


class _LobeIndex:
    """Points in the lobes of a region map, sparse enough for quick nearest-lobe queries."""

    def __init__(self, regions: MaskVolume, spacing: tuple[float, float, float]) -> None:
        self.flat = regions.reshape(-1)
        self.shape = regions.shape
        self.spacing = np.asarray(spacing)
        # Some 50,000 voxels keep the tree quick; they are a few mm apart, far below a lobe's size.
        step = max(1, round((regions.size / 300_000) ** (1 / 3)))
        steps = (1 if spacing[0] > 2 * spacing[1] else step, step, step)
        coarse = regions[:: steps[0], :: steps[1], :: steps[2]]
        points = np.argwhere((coarse > 0) & (coarse <= len(LOBES)))
        self.ids = coarse[tuple(points.T)]
        is_left = np.isin(self.ids, [lobe.id for lobe in LOBES if lobe.side == "left"])
        self.has_both_lungs = (
            len(points) > 0 and MIN_LUNG_SHARE <= is_left.mean() <= 1 - MIN_LUNG_SHARE
        )
        self.points = points * np.asarray(steps) * self.spacing
        self._tree: cKDTree | None = None

    def lobe_shares(self, voxels: NDArray[np.intp], nearest_only: bool) -> dict[str, float]:
        """Share of a lesion's voxels (flat indexes) in each lobe, by name, largest first.

        Voxels outside every lobe count for the nearest one when most lie outside, or with
        `nearest_only` (a pleural effusion is never in a lobe). They do not count otherwise.
        """
        ids = self.flat[voxels]
        inside = (ids > 0) & (ids <= len(LOBES))
        votes = np.bincount(ids[inside], minlength=len(LOBES) + 1)[: len(LOBES) + 1].astype(float)
        outside = voxels[~inside]
        if outside.size and (nearest_only or outside.size > inside.sum()):
            sample = outside[:: max(1, outside.size // _MAX_VOTING_VOXELS)]
            if self._tree is None:
                self._tree = cKDTree(self.points, balanced_tree=False, compact_nodes=False)
            points = np.stack(np.unravel_index(sample, self.shape), axis=1) * self.spacing
            nearest = self.ids[self._tree.query(points)[1]]
            votes += np.bincount(nearest, minlength=len(LOBES) + 1) * (outside.size / sample.size)
        total = votes.sum()
        order = sorted(LOBES, key=lambda lobe: -votes[lobe.id])
        return {lobe.name: votes[lobe.id] / total for lobe in order if votes[lobe.id] > 0}


def _place_by_lobes(
    lesion: Lesion, shares: dict[str, float]
) -> tuple[PlaceSide, tuple[str, ...], str]:
    """Side, lobes and wording from the share of the lesion in each lobe."""
    if lesion.site == "pleura":
        left = sum(share for name, share in shares.items() if REGION_BY_NAME[name].side == "left")
        side = _side_of_share(left)
        return side, (), describe_side(lesion, side)
    names = tuple(name for name, share in shares.items() if share >= MIN_NAMED_SHARE)
    side = combine_sides({REGION_BY_NAME[name].side for name in names})
    return side, names, describe_lobes(names)


def _side_of_share(left_share: float) -> PlaceSide:
    if min(left_share, 1 - left_share) >= MIN_NAMED_SHARE:
        return "both"
    return "left" if left_share > 0.5 else "right"


def _place_by_geometry(
    lesion: Lesion, voxels: NDArray[np.intp], ct: Int16Volume, spacing: tuple[float, float, float]
) -> tuple[PlaceSide, str]:
    """Side and wording from the body's midline and the thirds of the lungs."""
    z, _, x = np.unravel_index(voxels, ct.shape)
    side = _side_of_share(float(np.mean(x > _find_midline(ct, np.unique(z), spacing))))
    if lesion.site == "pleura":
        return side, describe_side(lesion, side)
    extent = _find_lung_slices(ct)
    if extent is None:
        return side, describe_side(lesion, side)
    low, high = extent
    third = np.clip(((z - low) * 3) // max(high - low + 1, 1), 0, 2)
    shares = np.bincount(third, minlength=3) / third.size
    zones = []
    for name, share in (("upper", shares[2]), ("middle", shares[1]), ("lower", shares[0])):
        if share >= MIN_NAMED_SHARE:
            zones.append(name)
    lungs = describe_side(lesion, side)
    if len(zones) == 3:
        return side, lungs
    plural = "s" if len(zones) == 2 or side == "both" else ""
    return side, f"{lungs}, {join_words(zones)} zone{plural}"


def _subsample_in_plane(ct: Int16Volume) -> tuple[Int16Volume, int]:
    """Leave out rows and columns until a slice has about 128 × 128; return the step too."""
    step = max(1, max(ct.shape[1:]) // 128)
    return ct[:, ::step, ::step], step


def _find_midline(
    ct: Int16Volume, slices: NDArray[np.intp], spacing: tuple[float, float, float]
) -> float:
    """Column of the body's midline in the given slices: the median middle of its outermost columns.

    Columns with little tissue (table, lines, sheets) do not count. Where the spine lies elsewhere,
    the body is cut off at a side, and the spine decides.
    """
    thin, step = _subsample_in_plane(ct)
    chosen = slices[:: max(1, slices.size // 16)]
    body = _find_body_middle(thin[chosen])
    middle = body * step if body is not None else (ct.shape[2] - 1) / 2
    reach = round(_SPINE_REACH_MM / spacing[0])
    around = slice(max(0, int(slices[0]) - reach), int(slices[-1]) + reach + 1)
    column_mm = spacing[2] * step
    spine = _find_spine_column(thin[around], column_mm, spacing[1] * step)
    if spine is not None and abs(spine * step - middle) * spacing[2] > _MAX_MIDLINE_OFFSET_MM:
        return spine * step
    return middle


def _find_body_middle(slices: Int16Volume) -> float | None:
    columns = (slices > MIN_BODY_HU).sum(axis=1)
    middles = []
    for column in columns:
        wide = np.flatnonzero(column > max(2, 0.15 * column.max()))
        if wide.size:
            middles.append((wide[0] + wide[-1]) / 2)
    return float(np.median(middles)) if middles else None


def _find_spine_column(slices: Int16Volume, column_mm: float, row_mm: float) -> float | None:
    """Column with most bone of the back: ribs are thin and spread, the spine is in every slice."""
    body: NDArray[np.bool_] = np.asarray((slices > MIN_BODY_HU).any(axis=2))
    rows = np.arange(slices.shape[1])
    first = body.argmax(axis=1)[:, None]
    last = slices.shape[1] - 1 - body[:, ::-1].argmax(axis=1)[:, None]
    back = rows >= first + 0.5 * (last - first)
    bone = ((slices > MIN_BONE_HU) & back[:, :, None]).sum(axis=(0, 1)).astype(float)
    width = max(1, round(_SPINE_WIDTH_MM / column_mm))
    bone_in_width = np.convolve(bone, np.ones(width), mode="same")
    best = int(bone_in_width.argmax())
    if bone_in_width[best] * column_mm * row_mm / len(slices) < _MIN_SPINE_AREA_MM2:
        return None
    columns = np.arange(bone.size)
    near = np.abs(columns - best) <= width / 2
    return float(np.average(columns[near], weights=bone[near]))


def _find_lung_slices(ct: Int16Volume) -> tuple[int, int] | None:
    """First and last slice with at least 5% of the lung area of the widest slice."""
    thin, _ = _subsample_in_plane(ct)
    body = thin > MIN_BODY_HU
    # Air between the first and the last tissue of its row and of its column lies inside the chest
    # (or between body and table, which is little).
    inside_body = _fill_between(body, 2) & _fill_between(body, 1)
    area = (inside_body & (thin < MAX_LUNG_HU)).sum(axis=(1, 2))
    if area.max() < 20:
        return None
    inside = np.flatnonzero(area > 0.05 * area.max())
    return int(inside[0]), int(inside[-1])


def _fill_between(body: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """True from the first to the last true voxel along an axis."""
    size = body.shape[axis]
    first = np.expand_dims(np.where(body.any(axis), body.argmax(axis), size), axis)
    last = size - 1 - np.expand_dims(np.flip(body, axis).argmax(axis), axis)
    along = np.arange(size, dtype=np.int32).reshape(
        [-1 if n == axis else 1 for n in range(body.ndim)]
    )
    return np.asarray((along >= first) & (along <= last))
