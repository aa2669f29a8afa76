"""Where a lesion lies, in words: from lobes when a region map exists, from plain geometry when none does.

Arrays are canonical, (z, y, x) = (inferior → superior, anterior → posterior, patient right → left), so the patient's
left is at large x. Prompts, reports and pages all word a lesion's place through this module.
"""

from collections.abc import Sequence
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
"""Smaller lesions are specks (an 8 mm nodule has 0.27 ml) and get no place."""
MIN_NAMED_SHARE = 0.15
"""A lobe, side or zone is named when it holds at least this share of the lesion."""
MIN_LUNG_SHARE = 0.02
"""A lung with less of the lobes' voxels is missing from a region map."""
MIN_BODY_HU = -300
MAX_LUNG_HU = -500
MIN_BONE_HU = 150
_SPINE_WIDTH_MM, _MIN_SPINE_AREA_MM2 = 50.0, 150.0
"""Width of a vertebra with its processes, and the least bone of it in a slice on average."""
_SPINE_REACH_MM = 40.0
"""Slices above and below a lesion in which the spine is looked for."""
_MAX_MIDLINE_OFFSET_MM = 25.0
"""Farther than this from the spine the middle of what is seen of a body is not its midline."""
_MAX_VOTING_VOXELS = 2000
"""Voxels that a nearest-lobe vote looks at: enough for a share, few enough to be quick."""


@dataclass(frozen=True)
class LesionPlace:
    """Where one kind of lesion lies in one case."""

    lesion: str
    """Key in `labels.LESION_BY_KEY`."""
    volume_ml: float
    side: PlaceSide | None
    """None where side means nothing: around the heart."""
    regions: tuple[str, ...]
    """Names of the lobes that hold it, largest share first; empty when the basis is geometry."""
    basis: Literal["regions", "geometry"]
    wording: str


def describe_lobes(lobes: Sequence[str]) -> str:
    """A set of lobes in words, whatever their order: "both lower lobes", "right upper lobe and left lower lobe".

    All lobes of a side become "right lung" or "left lung", all five "both lungs".
    """
    left = {name.removeprefix("left ") for name in lobes if name.startswith("left ")}
    right = {name.removeprefix("right ") for name in lobes if name.startswith("right ")}
    whole_left, whole_right = len(left) == 2, len(right) == 3
    if whole_left and whole_right:
        return "both lungs"
    parts = []
    shared = set() if whole_left or whole_right else left & right
    for name, plural in (("upper lobe", "upper lobes"), ("lower lobe", "lower lobes")):
        if name in shared:
            parts.append(f"both {plural}")
    for side, names, whole in (("right", right, whole_right), ("left", left, whole_left)):
        if whole:
            parts.append(f"{side} lung")
        else:
            parts += [
                f"{side} {name}"
                for name in ("upper lobe", "middle lobe", "lower lobe")
                if name in names - shared
            ]
    return join_words(parts)


def join_words(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def describe_side(lesion: Lesion, side: PlaceSide | None) -> str:
    """The place of a lesion of which only the side is known."""
    if lesion.site == "pericardium":
        return "around the heart"
    if lesion.site == "pleura":
        return "both pleural spaces" if side == "both" else f"{side} pleural space"
    return "both lungs" if side == "both" else f"{side} lung"


def locate_lesions(
    lesions: MaskVolume,
    ct: Int16Volume,
    regions: MaskVolume | None,
    spacing: tuple[float, float, float],
) -> list[LesionPlace]:
    """One place for each lesion that is outlined, in the order of their bits.

    lesions: (Z, Y, X) lesion bits; ct: (Z, Y, X) HU; regions: (Z, Y, X) region ids, or None where no map exists (a map
    that lacks the lobes of a side counts as none: the lobe nearest to a lesion there lies in the other lung);
    spacing: (z, y, x) in mm. Lesions below `MIN_ML` are left out.
    """
    assert lesions.shape == ct.shape and (regions is None or regions.shape == ct.shape), (
        "one grid for all volumes"
    )
    flat = np.flatnonzero(lesions)
    bits = lesions.reshape(-1)[flat]
    ml = float(np.prod(spacing)) / 1000.0
    lobes = _LobeIndex(regions, spacing) if regions is not None and flat.size else None
    if lobes is not None and not lobes.has_both_lungs:
        lobes = None
    places = []
    for lesion in LESIONS:
        own = flat[lesion_mask(bits, lesion)]
        volume = own.size * ml
        if not own.size or volume < MIN_LESION_ML:
            continue
        side: PlaceSide | None = None
        names: tuple[str, ...] = ()
        words = describe_side(lesion, None)
        if lesion.site != "pericardium":
            if lobes is not None:
                shares = lobes.lobe_shares(own, nearest_only=lesion.site == "pleura")
                side, names, words = _place_by_lobes(lesion, shares)
            else:
                side, words = _place_by_geometry(lesion, own, ct, spacing)
        basis: Literal["regions", "geometry"] = "geometry" if lobes is None else "regions"
        places.append(LesionPlace(lesion.key, volume, side, names, basis, words))
    return places


def describe_places(places: Sequence[LesionPlace], min_ml: float = MIN_LESION_ML) -> str:
    """The places as one sentence for a prompt; lesions smaller than `min_ml` are left out."""
    parts = []
    for place in places:
        if place.volume_ml < min_ml:
            continue
        amount = f"{place.volume_ml:.0f}" if place.volume_ml >= 10 else f"{place.volume_ml:.1f}"
        words = (
            place.wording
            if place.wording.startswith("around")
            else f"in {_add_article(place.wording)}"
        )
        parts.append(f"{LESION_BY_KEY[place.lesion].name} ({amount} ml) {words}")
    return f"Lesions outlined: {'; '.join(parts)}." if parts else "No lesions outlined."


def _add_article(words: str) -> str:
    return words if words.startswith("both") else f"the {words}"


class _LobeIndex:
    """The lobes of a region map as points, sparse enough for quick nearest-lobe look-ups."""

    def __init__(self, regions: MaskVolume, spacing: tuple[float, float, float]) -> None:
        self.flat = regions.reshape(-1)
        self.shape = regions.shape
        self.spacing = np.asarray(spacing)
        # Some 50,000 voxels keep the tree quick; its grid is then a few mm, far below the size of a lobe.
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

    def lobe_shares(self, own: NDArray[np.intp], nearest_only: bool) -> dict[str, float]:
        """Share of the lesion voxels `own` (flat indexes) in each lobe, largest first.

        Voxels outside every lobe are given to the nearest one when most lie outside (or `nearest_only`: a pleural
        effusion is never in a lobe), and are left out otherwise.
        """
        ids = self.flat[own]
        inside = (ids > 0) & (ids <= len(LOBES))
        votes = np.bincount(ids[inside], minlength=len(LOBES) + 1)[: len(LOBES) + 1].astype(float)
        outside = own[~inside]
        if outside.size and (nearest_only or outside.size > inside.sum()):
            sample = outside[:: max(1, outside.size // _MAX_VOTING_VOXELS)]
            if self._tree is None:
                self._tree = cKDTree(self.points, balanced_tree=False, compact_nodes=False)
            where = np.stack(np.unravel_index(sample, self.shape), axis=1) * self.spacing
            near = self.ids[self._tree.query(where)[1]]
            votes += np.bincount(near, minlength=len(LOBES) + 1) * (outside.size / sample.size)
        total = votes.sum()
        order = sorted(LOBES, key=lambda lobe: -votes[lobe.id])
        return {lobe.name: votes[lobe.id] / total for lobe in order if votes[lobe.id] > 0}


def _place_by_lobes(
    lesion: Lesion, shares: dict[str, float]
) -> tuple[PlaceSide, tuple[str, ...], str]:
    left = sum(share for name, share in shares.items() if REGION_BY_NAME[name].side == "left")
    side = _side_of_share(left)
    if lesion.site == "pleura":
        return side, (), describe_side(lesion, side)
    names = tuple(name for name, share in shares.items() if share >= MIN_NAMED_SHARE)
    sides = {REGION_BY_NAME[name].side for name in names}
    side = "both" if len(sides) == 2 else ("left" if "left" in sides else "right")
    return side, names, describe_lobes(names)


def _side_of_share(left_share: float) -> PlaceSide:
    if min(left_share, 1 - left_share) >= MIN_NAMED_SHARE:
        return "both"
    return "left" if left_share > 0.5 else "right"


def _place_by_geometry(
    lesion: Lesion, own: NDArray[np.intp], ct: Int16Volume, spacing: tuple[float, float, float]
) -> tuple[PlaceSide, str]:
    z, _, x = np.unravel_index(own, ct.shape)
    side = _side_of_share(float(np.mean(x > _find_midline(ct, np.unique(z), spacing))))
    if lesion.site == "pleura":
        return side, describe_side(lesion, side)
    extent = _find_lung_slices(ct)
    if extent is None:
        return side, describe_side(lesion, side)
    low, high = extent
    third = np.clip(((z - low) * 3) // max(high - low + 1, 1), 0, 2)
    held = np.bincount(third, minlength=3) / third.size
    zones = [
        name
        for name, share in zip(("lower", "middle", "upper"), held, strict=True)
        if share >= MIN_NAMED_SHARE
    ]
    lungs = describe_side(lesion, side)
    if len(zones) == 3:
        return side, lungs
    plural = "s" if len(zones) == 2 or side == "both" else ""
    return side, f"{lungs}, {join_words(zones[::-1])} zone{plural}"


def _subsample_in_plane(ct: Int16Volume) -> tuple[Int16Volume, int]:
    """The volume with rows and columns left out until a slice has at most about 128 × 128 of them, and the step."""
    step = max(1, max(ct.shape[1:]) // 128)
    return ct[:, ::step, ::step], step


def _find_midline(
    ct: Int16Volume, slices: NDArray[np.intp], spacing: tuple[float, float, float]
) -> float:
    """The column of the body's midline: the middle between its outermost columns, in the given slices.

    Columns that hold little tissue (table, lines, sheets) do not count; the slices vote by their median. Where the
    spine lies elsewhere, the body is cut off at a side, and the spine decides.
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
    """The column where most bone of the back stands: ribs are thin and spread, the spine is in every slice."""
    body: NDArray[np.bool_] = np.asarray((slices > MIN_BODY_HU).any(axis=2))
    rows = np.arange(slices.shape[1])
    first = body.argmax(axis=1)[:, None]
    last = slices.shape[1] - 1 - body[:, ::-1].argmax(axis=1)[:, None]
    back = rows >= first + 0.5 * (last - first)
    bone = ((slices > MIN_BONE_HU) & back[:, :, None]).sum(axis=(0, 1)).astype(float)
    width = max(1, round(_SPINE_WIDTH_MM / column_mm))
    held = np.convolve(bone, np.ones(width), mode="same")
    best = int(held.argmax())
    if held[best] * column_mm * row_mm / len(slices) < _MIN_SPINE_AREA_MM2:
        return None
    columns = np.arange(bone.size)
    near = np.abs(columns - best) <= width / 2
    return float(np.average(columns[near], weights=bone[near]))


def _find_lung_slices(ct: Int16Volume) -> tuple[int, int] | None:
    """First and last slice of the lung field: air between the body's walls, on at least 5% of its widest slice."""
    thin, _ = _subsample_in_plane(ct)
    body = thin > MIN_BODY_HU
    # Air between the first and the last tissue of its row lies inside the chest (or between body and table, which is
    # little), and so does air between the first and the last tissue of its column.
    area = (_fill_between(body, 2) & _fill_between(body, 1) & (thin < MAX_LUNG_HU)).sum(axis=(1, 2))
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
