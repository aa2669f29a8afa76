"""Lobes of lesions by the coarse region map, which is estimated from the entire CT.

The map cuts each lung by planes where its fissures usually run (`rectvlm.data.coarse_regions`), so
a lobe is approximate. It is made on the voxels of the CT that is predicted, not on the model's
grid, which may cut the chest; of a case in shards there is no other. A lobe of the other side than
the lesion's place does not count.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import LOBES, Lesion
from rectvlm.lesion_places import (
    MAX_LOBE_DISTANCE_MM,
    MAX_VOTING_VOXELS,
    MIN_MAIN_SHARE,
    MIN_NAMED_SHARE,
    LesionPlace,
    LobeIndex,
)
from rectvlm.types import MaskVolume

LOBES_NOTE = (
    "Lobes are approximate: a coarse region map, estimated from the CT alone, divides each lung "
    "where its fissures usually run; no fissure was segmented."
)
"""How far to trust a lobe, for everything that names one."""


class LobeFinder:
    """Finds the lobes of lesions in one case."""

    def __init__(
        self, estimate_regions: Callable[[], MaskVolume], spacing: tuple[float, float, float]
    ) -> None:
        """Wait for the first lesion in a lung, since most kinds of lesions need no map.

        Args:
            estimate_regions: makes the coarse region map (Z, Y, X) of a canonical CT. A map of
                zeros, as of a CT without lungs, has no lobe for any lesion.
            spacing: voxel size (z, y, x), mm.
        """
        self._estimate_regions, self._spacing = estimate_regions, spacing

    @cached_property
    def _index(self) -> LobeIndex:
        return LobeIndex(self._estimate_regions(), self._spacing)

    def find_lobes(
        self, lesion: Lesion, place: LesionPlace | None, voxels: NDArray[np.intp]
    ) -> tuple[str, ...] | None:
        """Names of the lobes that hold a lesion, the largest share first.

        A voxel outside every lobe counts for the nearest one within 15 mm, as a consolidation at
        the edge of the aerated lung is in no lobe of the map.

        Args:
            lesion: kind of lesion.
            place: its place; None where it is too small to have one.
            voxels: its voxels, flat indexes of the CT.

        Returns:
            None for a lesion outside the lungs, without a certain place, or of which less than half
            lies in or near a lobe of its side.
        """
        if lesion.site != "lung" or place is None or not place.is_plausible:
            return None
        if not self._index.points.size:
            return None
        step = max(1, voxels.size // MAX_VOTING_VOXELS)
        sample = voxels[step // 2 :: step]
        votes = np.bincount(self._find_lobe_ids(sample), minlength=len(LOBES) + 1)
        for lobe in LOBES:
            if place.side not in (lobe.side, "both"):
                votes[lobe.id] = 0
        votes = votes[1:]
        n_votes = int(votes.sum())
        if n_votes < MIN_MAIN_SHARE * sample.size:
            return None
        order = np.argsort(-votes, kind="stable")
        return tuple(LOBES[i].name for i in order if votes[i] >= MIN_NAMED_SHARE * n_votes)

    def _find_lobe_ids(self, voxels: NDArray[np.intp]) -> NDArray[np.intp]:
        """Id of the lobe of each voxel, 0 where none is near, (N,)."""
        region_ids = self._index.flat[voxels].astype(np.intp)
        is_free = region_ids == 0
        if is_free.any():
            distances_mm, nearest = self._index.nearest_lobes(voxels[is_free])
            region_ids[is_free] = np.where(distances_mm <= MAX_LOBE_DISTANCE_MM, nearest, 0)
        return np.where(region_ids <= len(LOBES), region_ids, 0)
