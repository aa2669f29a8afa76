"""A chest of ellipsoids with three lesions, given by world coordinates."""

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import LESION_BY_KEY

SHAPE, SPACING = (44, 40, 16), (8.0, 8.0, 16.0)
RAS = np.array([[8.0, 0, 0, -170], [0, 8.0, 0, -160], [0, 0, 16.0, 900], [0, 0, 0, 1]])
EFFUSION, CONSOLIDATION, NODULE = (
    LESION_BY_KEY[key].mask_value for key in ("pleural_effusion", "consolidation", "lung_nodule")
)


def world_coordinates(affine: NDArray, shape: tuple[int, ...]) -> NDArray:
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def paint_chest(affine: NDArray, shape: tuple[int, ...]) -> tuple[NDArray, NDArray]:
    """A chest and its lesions as functions of world coordinates, without any axis convention.

    The heart lies to the patient's left (negative x in RAS). Consolidation is a slanted ellipsoid
    in the left lung with a nodule in it; an effusion lies behind the right lung.
    """
    x, y, z = np.moveaxis(world_coordinates(affine, shape), -1, 0)
    z = z - 1020
    hu = np.full(shape, -1000.0)
    hu[(x / 150) ** 2 + (y / 110) ** 2 < 1] = 40
    for side in (-1, 1):
        hu[((x - side * 70) / 52) ** 2 + (y / 80) ** 2 + (z / 130) ** 2 < 1] = -850
    hu[((x + 25) / 40) ** 2 + ((y - 25) / 40) ** 2 + (z / 50) ** 2 < 1] = 45
    hu[(x / 15) ** 2 + ((y + 85) / 15) ** 2 < 1] = 500
    lesions = np.zeros(shape, np.uint8)
    lesions[
        ((x + 80 + z / 4) / 34) ** 2 + ((y - y / 9 + 20) / 45) ** 2 + ((z - 20) / 60) ** 2 < 1
    ] |= CONSOLIDATION
    lesions[((x + 80) / 14) ** 2 + ((y + 20) / 14) ** 2 + ((z - 30) / 24) ** 2 < 1] |= NODULE
    lesions[((x - 75) / 42) ** 2 + ((y + 60) / 26) ** 2 + ((z + 40) / 70) ** 2 < 1] |= EFFUSION
    hu[lesions > 0] = 20
    # A gentle ramp instead of noise has enough grey levels and does not depend on the sampling.
    return hu + 0.05 * x + 0.03 * y + 0.02 * z, lesions


def chest() -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    hu, lesions = paint_chest(RAS, SHAPE)
    return np.rint(hu).astype(np.int16), lesions
