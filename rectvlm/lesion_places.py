"""Places of lesions in words: by lobes where a region map exists, by geometry where none does.

A lesion where its kind cannot lie (a nodule in the breast) has that place in words too.

Arrays are canonical, (z, y, x) = (inferior → superior, anterior → posterior, patient right → left),
so the patient's left is at large x. Prompts, reports and pages take all wordings from this module.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from rectvlm.chest_geometry import (
    CAVITY_MARGIN_MM,
    MAX_LUNG_HU,
    ChestGeometry,
    Compartment,
    find_midline,
)
from rectvlm.labels import LESION_BY_KEY, LESIONS, LOBES, REGION_BY_NAME, REGIONS, Lesion
from rectvlm.lesion_bits import lesion_mask
from rectvlm.types import Int16Volume, MaskVolume

PlaceSide = Literal["left", "right", "both"]

MIN_LESION_ML = 0.05
"""Volume of the smallest lesion with a place: an 8 mm nodule has 0.27 ml, and less is a speck."""
MIN_NAMED_SHARE = 0.15
"""Least share of a lesion in a lobe, side or zone that is named."""
MIN_LUNG_SHARE = 0.02
"""Least share of the lobes' voxels in a lung; a region map with less lacks this lung."""
MIN_MAIN_SHARE = 0.5
"""Least share of a lesion that is named where the border is vague: mediastinum, aerated lung."""
MAX_LOBE_DISTANCE_MM = 15.0
"""Distance from a lobe at which the place of a voxel is still a lobe's."""
_MAX_EFFUSION_BELOW_MM = 80.0
"""Depth below the aerated lungs to which a pleural effusion reaches; it fills the recesses."""
_PLEURA_MARGIN_MM = 16.0
"""Distance beyond lungs and ribs in which a pleural effusion lies: it pushes the lungs away."""
_HEART_REACH_MM = 25.0
"""Distance from the heart of a region map in which a pericardial effusion lies."""
_PLACE_WORDS = {
    Compartment.OUTSIDE: "space outside the body",
    Compartment.CHEST_WALL: "chest wall or breast",
    Compartment.NECK: "neck or shoulder above the lungs",
    Compartment.ABDOMEN: "abdomen below the lungs",
    Compartment.MEDIASTINUM: "mediastinum",
    Compartment.LOWER_MEDIASTINUM: "lower mediastinum or upper abdomen",
}
_LUNG, _LUNG_OR_PLEURA = "lung", "lung or pleural space"
_AIRLESS = "chest or upper abdomen, away from aerated lung"
"""Place of a lung lesion that may as well lie in the liver, for all that a CT alone tells."""
_MIN_AIR_SHARE = 0.05
"""Least share of a lung lesion beside aerated lung; the border of a consolidated lobe has more."""
_FAR_PLACES = [words for words in _PLACE_WORDS.values() if "mediastinum" not in words]
"""Places that none of the five lesions reaches: a small share there is named."""
_SIDED_PLACES = {_PLACE_WORDS[Compartment.CHEST_WALL], _LUNG, _LUNG_OR_PLEURA, _AIRLESS}
"""Places whose side is worded."""
_EXPECTED, _UNKNOWN = "", "?"
"""Stand for the places where a kind of lesion can lie, and for those not yet named."""
_PLACE_TYPE = np.dtype(
    f"U{max(map(len, (*_PLACE_WORDS.values(), *REGION_BY_NAME, _LUNG_OR_PLEURA, _AIRLESS)))}"
)
"""Type of an array of places; NumPy cuts words that are longer without a warning."""
MAX_VOTING_VOXELS = 2000
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
    is_plausible: bool | None = True
    """Whether a lesion of this kind can lie there; None where the CT alone does not tell."""


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
    return LesionLocator(ct, regions, spacing).locate_all(lesions)


def find_voxels_outside_chest(
    lesions: MaskVolume, ct: Int16Volume, spacing: tuple[float, float, float]
) -> dict[str, NDArray[np.intp]]:
    """Find voxels of outlines that lie where none of the lesions can, by the CT alone.

    They lie in the chest wall, beyond a margin around lungs and ribs, in the neck, in the abdomen
    or outside the body. A pleural effusion also fills the recesses beside the upper abdomen. In a
    CT without lungs nothing is found.

    Args:
        lesions: lesion bits (Z, Y, X).
        ct: HU (Z, Y, X).
        spacing: voxel size (z, y, x), mm.

    Returns:
        Flat indexes by lesion key; a lesion without voxels is left out.
    """
    lesion_voxels = np.flatnonzero(lesions)
    if not lesion_voxels.size:
        return {}
    bits = lesions.reshape(-1)[lesion_voxels]
    locator = LesionLocator(ct, None, spacing)
    outside = {}
    for lesion in LESIONS:
        voxels = lesion_voxels[lesion_mask(bits, lesion)]
        if voxels.size:
            outside[lesion.key] = voxels[locator.lies_outside_chest(lesion, voxels)]
    return outside


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


class LobeIndex:
    """Points in the lobes of a region map, sparse enough for quick nearest-lobe queries."""

    def __init__(self, regions: MaskVolume, spacing: tuple[float, float, float]) -> None:
        self.flat = regions.reshape(-1)
        self.shape = regions.shape
        self.spacing = np.asarray(spacing)
        # Some 50,000 voxels keep the tree quick; they are a few mm apart, far below a lobe's size.
        step = max(1, round((regions.size / 300_000) ** (1 / 3)))
        steps = (1 if spacing[0] > 2 * spacing[1] else step, step, step)
        coarse = regions[:: steps[0], :: steps[1], :: steps[2]]
        indexes = np.argwhere(coarse > 0)
        self.region_ids = coarse[tuple(indexes.T)]
        self.region_points = indexes * np.asarray(steps) * self.spacing
        is_lobe = self.region_ids <= len(LOBES)
        self.ids, self.points = self.region_ids[is_lobe], self.region_points[is_lobe]
        is_left = np.isin(self.ids, [lobe.id for lobe in LOBES if lobe.side == "left"])
        self.has_both_lungs = (
            self.ids.size > 0 and MIN_LUNG_SHARE <= is_left.mean() <= 1 - MIN_LUNG_SHARE
        )
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
            sample = outside[:: max(1, outside.size // MAX_VOTING_VOXELS)]
            nearest = self.nearest_lobes(sample)[1]
            votes += np.bincount(nearest, minlength=len(LOBES) + 1) * (outside.size / sample.size)
        total = votes.sum()
        order = sorted(LOBES, key=lambda lobe: -votes[lobe.id])
        return {lobe.name: votes[lobe.id] / total for lobe in order if votes[lobe.id] > 0}

    def nearest_lobes(
        self, voxels: NDArray[np.intp]
    ) -> tuple[NDArray[np.floating], NDArray[np.uint8]]:
        """Distance (mm) and id of the lobe nearest to each voxel (flat indexes)."""
        if self._tree is None:
            self._tree = cKDTree(self.points, balanced_tree=False, compact_nodes=False)
        distance_mm, index = self._tree.query(self._to_mm(voxels))
        return distance_mm, self.ids[index]

    def heart_distances_mm(self, voxels: NDArray[np.intp]) -> NDArray[np.floating] | None:
        """Distance of each voxel (flat indexes) from the heart; None where the map has none."""
        heart = self.region_points[self.region_ids == REGION_BY_NAME["heart"].id]
        if not len(heart):
            return None
        tree = cKDTree(heart, balanced_tree=False, compact_nodes=False)
        return np.asarray(tree.query(self._to_mm(voxels))[0])

    def _to_mm(self, voxels: NDArray[np.intp]) -> NDArray[np.floating]:
        return np.stack(np.unravel_index(voxels, self.shape), axis=1) * self.spacing


class LesionLocator:
    """Finds the places of lesions in one case."""

    def __init__(
        self, ct: Int16Volume, regions: MaskVolume | None, spacing: tuple[float, float, float]
    ) -> None:
        """Take HU (Z, Y, X), region ids (Z, Y, X) or None, and the voxel size (z, y, x) in mm."""
        assert regions is None or regions.shape == ct.shape, "one grid for all volumes"
        self.ct, self.spacing = ct, spacing
        lobes = None if regions is None else LobeIndex(regions, spacing)
        self.lobes = lobes if lobes is not None and lobes.has_both_lungs else None

    @cached_property
    def geometry(self) -> ChestGeometry:
        """Compartments of the CT, which a complete region map spares."""
        return ChestGeometry(self.ct, self.spacing)

    def locate_all(self, lesions: MaskVolume) -> list[LesionPlace]:
        """Places of the kinds of lesions of at least `MIN_LESION_ML`, by lesion bits (Z, Y, X)."""
        assert lesions.shape == self.ct.shape, "one grid for all volumes"
        lesion_voxels = np.flatnonzero(lesions)
        if not lesion_voxels.size:
            return []
        bits = lesions.reshape(-1)[lesion_voxels]
        voxel_ml = float(np.prod(self.spacing)) / 1000.0
        places = []
        for lesion in LESIONS:
            voxels = lesion_voxels[lesion_mask(bits, lesion)]
            volume_ml = voxels.size * voxel_ml
            if volume_ml >= MIN_LESION_ML:
                places.append(self.locate(lesion, voxels, volume_ml))
        return places

    def locate(self, lesion: Lesion, voxels: NDArray[np.intp], volume_ml: float) -> LesionPlace:
        """Place of one kind of lesion, or one lesion, whose voxels are flat indexes of the CT."""
        basis: Literal["regions", "geometry"] = "geometry" if self.lobes is None else "regions"
        step = max(1, voxels.size // MAX_VOTING_VOXELS)
        sample = voxels[step // 2 :: step]
        if self.lobes is None and self.geometry.lung_slices is None:
            side = self._find_side(sample)
            wording = "both sides of the body" if side == "both" else f"{side} side of the body"
            return LesionPlace(lesion.key, volume_ml, side, (), basis, wording, None)

        elsewhere = self._name_elsewhere(lesion, sample)
        names: tuple[str, ...] = ()
        place_side: PlaceSide | None = None
        parts = []
        if (elsewhere == _EXPECTED).any():
            # Lobes are counted in all voxels, as a sample may miss a small share.
            expected = sample[elsewhere == _EXPECTED]
            is_all = expected.size == sample.size
            place_side, names, wording = self._word_expected(lesion, voxels if is_all else expected)
            parts.append(wording)
        kinds, counts = np.unique(elsewhere[elsewhere != _EXPECTED], return_counts=True)
        for kind in kinds[np.argsort(-counts)]:
            part_side = self._find_side(sample[elsewhere == kind])
            parts.append(_word_elsewhere(str(kind), part_side))
        if kinds.size:
            place_side = self._find_side(sample)
        is_plausible = None if _AIRLESS in kinds else not kinds.size
        return LesionPlace(
            lesion.key, volume_ml, place_side, names, basis, join_words(parts), is_plausible
        )

    def _name_elsewhere(self, lesion: Lesion, sample: NDArray[np.intp]) -> NDArray[np.str_]:
        """Name of the place of each voxel where this kind of lesion cannot lie, (N,).

        `_EXPECTED` stands for the others, and for places that hold only a small share.
        """
        names = np.full(sample.size, _UNKNOWN, _PLACE_TYPE)
        if self.lobes is not None:
            self._name_by_regions(lesion, sample, names)
        is_unknown = names == _UNKNOWN
        if is_unknown.any():
            names[is_unknown] = self._name_by_geometry(lesion, sample[is_unknown])
        is_vague = ~np.isin(names, [_EXPECTED, *_FAR_PLACES])
        if is_vague.mean() < MIN_MAIN_SHARE:
            names[is_vague] = _EXPECTED
        for name, count in zip(*np.unique(names, return_counts=True), strict=True):
            if count < MIN_NAMED_SHARE * names.size:
                main, counts = np.unique(names, return_counts=True)
                names[names == name] = main[counts.argmax()]
        return names

    def lies_outside_chest(self, lesion: Lesion, voxels: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Whether each voxel (flat indexes) lies beyond the reach of a kind of lesion."""
        return np.isin(self._name_by_geometry(lesion, voxels), _FAR_PLACES)

    def _name_by_geometry(self, lesion: Lesion, sample: NDArray[np.intp]) -> NDArray[np.str_]:
        names = np.full(sample.size, _EXPECTED, _PLACE_TYPE)
        if self.geometry.lung_slices is None:
            return names
        margin_mm = _PLEURA_MARGIN_MM if lesion.site == "pleura" else CAVITY_MARGIN_MM
        votes = self.geometry.classify(sample, margin_mm)
        for compartment, words in _PLACE_WORDS.items():
            names[votes.compartments == compartment] = words
        has_air = votes.compartments == Compartment.AERATED_LUNG
        is_middle = (votes.compartments == Compartment.MEDIASTINUM) | (
            votes.compartments == Compartment.LOWER_MEDIASTINUM
        )
        if lesion.site == "lung" and votes.touches_air.mean() < _MIN_AIR_SHARE:
            names[names == _EXPECTED] = _AIRLESS
        if lesion.site == "pleura":
            names[has_air] = _LUNG
            names[is_middle] = _EXPECTED
            is_recess = votes.mm_below_lungs <= _MAX_EFFUSION_BELOW_MM
            names[(votes.compartments == Compartment.ABDOMEN) & is_recess] = _EXPECTED
        elif lesion.site == "pericardium":
            names[has_air] = _LUNG
            names[votes.compartments == Compartment.CHEST_CAVITY] = _LUNG_OR_PLEURA
            names[votes.is_near_heart] = _EXPECTED
        return names

    def _name_by_regions(
        self, lesion: Lesion, sample: NDArray[np.intp], names: NDArray[np.str_]
    ) -> None:
        """Set the names that a region map gives; voxels in no region stay unknown."""
        assert self.lobes is not None
        ids = self.lobes.flat[sample]
        is_lobe = (ids > 0) & (ids <= len(LOBES))
        has_air = self.ct.reshape(-1)[sample] < MAX_LUNG_HU
        for region in REGIONS[len(LOBES) :]:
            names[ids == region.id] = region.name
        if lesion.site == "pericardium":
            names[is_lobe] = _LUNG
            distance_mm = self.lobes.heart_distances_mm(sample)
            if distance_mm is not None:
                is_near = (distance_mm <= _HEART_REACH_MM) & ~(is_lobe & has_air)
                names[is_near] = _EXPECTED
            return
        names[is_lobe] = _EXPECTED
        if lesion.site == "pleura":
            names[is_lobe & has_air] = _LUNG
            return
        outside = np.flatnonzero(ids == 0)
        distance_mm = self.lobes.nearest_lobes(sample[outside])[0]
        names[outside[distance_mm <= MAX_LOBE_DISTANCE_MM]] = _EXPECTED

    def _word_expected(
        self, lesion: Lesion, voxels: NDArray[np.intp]
    ) -> tuple[PlaceSide | None, tuple[str, ...], str]:
        """Side, lobes and wording of voxels that lie where this kind of lesion can."""
        if lesion.site == "pericardium":
            return None, (), describe_side(lesion, None)
        if self.lobes is not None:
            shares = self.lobes.lobe_shares(voxels, nearest_only=lesion.site == "pleura")
            return _place_by_lobes(lesion, shares)
        side = self._find_side(voxels)
        return side, (), self._word_zones(lesion, voxels, side)

    def _find_side(self, voxels: NDArray[np.intp]) -> PlaceSide:
        z, _, x = np.unravel_index(voxels, self.ct.shape)
        midline = find_midline(self.ct, np.unique(z), self.spacing)
        return _side_of_share(float(np.mean(x > midline)))

    def _word_zones(self, lesion: Lesion, voxels: NDArray[np.intp], side: PlaceSide) -> str:
        """Side and thirds of the lungs."""
        words = describe_side(lesion, side)
        if lesion.site != "lung" or self.geometry.lung_slices is None:
            return words
        low, high = self.geometry.lung_slices
        z = np.unravel_index(voxels, self.ct.shape)[0]
        third = np.clip(((z - low) * 3) // max(high - low + 1, 1), 0, 2)
        shares = np.bincount(third, minlength=3) / third.size
        zones = []
        for name, share in (("upper", shares[2]), ("middle", shares[1]), ("lower", shares[0])):
            if share >= MIN_NAMED_SHARE:
                zones.append(name)
        if len(zones) == 3:
            return words
        plural = "s" if len(zones) == 2 or side == "both" else ""
        return f"{words}, {join_words(zones)} zone{plural}"


def _word_elsewhere(name: str, side: PlaceSide) -> str:
    """Word a place where a lesion of its kind cannot lie."""
    if name not in _SIDED_PLACES:
        return name
    if side != "both":
        return f"{side} {name}"
    return "both lungs" if name == _LUNG else f"{name} on both sides"


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
