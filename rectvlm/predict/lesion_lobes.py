"""Lobes of lesions by the coarse region map, which is estimated from the CT on the model's grid.

The map cuts each lung by planes where its fissures usually run (`rectvlm.data.coarse_regions`), so
a lobe is approximate. Sides come from affines: from that of the grid for a lobe, and from that of
the CT for the lesion. A lobe of the other side than the lesion's does not count.
"""

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
    PlaceSide,
)
from rectvlm.types import Affine, MaskVolume

LOBES_NOTE = (
    "Lobes are approximate: a coarse region map, estimated from the CT alone, divides each lung "
    "where its fissures usually run; no fissure was segmented."
)
"""How far to trust a lobe, for everything that names one."""


class LobeFinder:
    """Finds the lobes of lesions in one case."""

    def __init__(self, regions: MaskVolume, grid_affine: Affine) -> None:
        """Take a coarse region map (Z, Y, X) and its 4 × 4 affine, index (z, y, x, 1) to world, mm.

        A map of zeros, as of a CT without lungs, has no lobe for any lesion.
        """
        self._to_grid = np.linalg.inv(grid_affine)
        z_mm, y_mm, x_mm = np.linalg.norm(grid_affine[:3, :3], axis=0).tolist()
        self._index = LobeIndex(regions, (z_mm, y_mm, x_mm))

    def find_lobes(
        self,
        lesion: Lesion,
        place: LesionPlace | None,
        indexes: NDArray[np.intp],
        affine: Affine,
    ) -> tuple[str, ...] | None:
        """Names of the lobes that hold a lesion, the largest share first.

        A voxel outside every lobe counts for the nearest one within 15 mm, as a consolidation at
        the edge of the aerated lung is in no lobe of the map.

        Args:
            lesion: kind of lesion.
            place: its place; None where it is too small to have one.
            indexes: its voxels (N, 3), (z, y, x) in the CT.
            affine: 4 × 4, index (z, y, x, 1) of the CT to world, mm.

        Returns:
            None for a lesion outside the lungs, without a certain place, or of which less than half
            lies in or near a lobe of its side.
        """
        if lesion.site != "lung" or place is None or not place.is_plausible:
            return None
        if not self._index.points.size:
            return None
        step = max(1, len(indexes) // MAX_VOTING_VOXELS)
        sample = indexes[step // 2 :: step]
        lobe_ids = self._find_lobe_ids(sample @ affine[:3, :3].T + affine[:3, 3], place.side)
        votes = np.bincount(lobe_ids, minlength=len(LOBES) + 1)[1:]
        n_votes = int(votes.sum())
        if n_votes < MIN_MAIN_SHARE * len(sample):
            return None
        order = np.argsort(-votes, kind="stable")
        return tuple(LOBES[i].name for i in order if votes[i] >= MIN_NAMED_SHARE * n_votes)

    def _find_lobe_ids(
        self, points_mm: NDArray[np.floating], side: PlaceSide | None
    ) -> NDArray[np.intp]:
        """Id of the lobe of each point (N, 3) in the world, 0 where none is near, (N,)."""
        on_grid = np.rint(points_mm @ self._to_grid[:3, :3].T + self._to_grid[:3, 3]).astype(int)
        shape = np.array(self._index.shape)
        is_inside = ((on_grid >= 0) & (on_grid < shape)).all(axis=1)
        lobe_ids = np.zeros(len(on_grid), np.intp)
        voxels = np.ravel_multi_index(tuple(on_grid[is_inside].T), self._index.shape)
        region_ids = self._index.flat[voxels].astype(np.intp)
        is_free = region_ids == 0
        if is_free.any():
            distances_mm, nearest = self._index.nearest_lobes(voxels[is_free])
            region_ids[is_free] = np.where(distances_mm <= MAX_LOBE_DISTANCE_MM, nearest, 0)
        allowed = [lobe.id for lobe in LOBES if side in (lobe.side, "both")]
        lobe_ids[is_inside] = np.where(np.isin(region_ids, allowed), region_ids, 0)
        return lobe_ids
