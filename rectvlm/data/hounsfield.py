"""Stored numbers to Hounsfield units: what a file's numbers mean is read from the numbers, and never applied twice."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import AIR_HU
from rectvlm.types import HuConversion, InputError, Int16Volume, Volume

MIN_HU, MAX_HU = AIR_HU, 3071
_MAX_GREY_LEVELS = 256
"""A picture of 8 bits has no more grey levels."""


def to_hu(
    volume: Volume, slope: float | None = None, intercept: float | None = None
) -> tuple[Int16Volume, HuConversion]:
    """Hounsfield units (i, j, k), int16 in [−1024, 3071], and how they came about.

    Whether the numbers are HU already is read from the numbers: air (and lung) must lie near −1000 and soft tissue
    near 0 to 80. `slope` and `intercept` of the series are applied only when that is not so and then makes it so,
    hence never twice. What lies below −1024 is padding outside the field of view and becomes air.

    Args:
        volume: numbers as the file means them.
        slope: of the series' metadata (DICOM RescaleSlope), when known.
        intercept: as above (RescaleIntercept).

    Raises:
        UserError: a windowed picture, or numbers that are not HU with or without slope and intercept, or both ways.
    """
    sample = _sample_voxels(volume.array)
    levels = _count_grey_levels(sample)
    if volume.array.dtype == np.uint8 or levels <= _MAX_GREY_LEVELS:
        raise InputError(
            volume.where,
            "is a windowed picture, not CT numbers",
            expected="HU from about −1000 to above 1000",
            found=f"{levels} grey levels from {sample.min():g} to {sample.max():g}",
            remedy="export the original series",
        )
    as_stored = HuEvidence.from_values(sample)
    given = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    rescaled = (
        as_stored
        if given == (1.0, 0.0)
        else HuEvidence.from_values(sample * np.float32(given[0]) + np.float32(given[1]))
    )
    if as_stored.is_hu and rescaled.is_hu and given != (1.0, 0.0):
        raise InputError(
            volume.where,
            "may be in HU or not",
            expected="numbers that are HU either as stored or with slope and intercept",
            found=f"{as_stored} as stored; with slope {given[0]:g} and intercept {given[1]:g} {rescaled}",
            remedy="convert the series again, to HU",
        )
    if as_stored.is_hu:
        _refuse_clipped(sample, volume.where)
        unused = (
            ""
            if given == (1.0, 0.0)
            else f"; slope {given[0]:g} and intercept {given[1]:g} not applied again"
        )
        return _convert_to_int16(volume.array, 1.0, 0.0, f"already HU: {as_stored}{unused}")
    if rescaled.is_hu:
        reason = f"stored numbers were not HU ({as_stored}); with slope and intercept {rescaled}"
        return _convert_to_int16(volume.array, *given, reason)
    tried = (
        f"; slope {given[0]:g} and intercept {given[1]:g} do not mend it"
        if given != (1.0, 0.0)
        else ""
    )
    raise InputError(
        volume.where,
        "is not in HU",
        expected="air or lung near −1000 and soft tissue near 0 to 80",
        found=f"{as_stored}, in numbers from {sample.min():g} to {sample.max():g}{tried}",
        remedy="give the series' RescaleSlope and RescaleIntercept, or export it without rescaling twice",
    )


@dataclass(frozen=True)
class HuEvidence:
    """Shares of the voxels inside the field of view, by which HU are known."""

    air_share: float
    soft_tissue_share: float

    @classmethod
    def from_values(cls, values: NDArray[Any]) -> "HuEvidence":
        """Of numbers taken to be HU.

        The lowest number does not count: it may be padding. Stored numbers with padding at −1024 (−2048 HU, once their
        intercept of −1024 is applied) and air at 0 would else pass for HU, the padding for air and the air for tissue.
        """
        inside = values[values >= AIR_HU - 26]
        inside = inside[inside > inside.min()] if inside.size else inside
        count = max(1, inside.size)
        air = np.count_nonzero(inside <= -700) / count
        soft = np.count_nonzero((inside >= -150) & (inside <= 150)) / count
        return cls(air, soft)

    @property
    def is_hu(self) -> bool:
        """Both are there: an offset of ±1000 or a scale loses one of them."""
        return self.air_share >= 0.05 and self.soft_tissue_share >= 0.05

    def __str__(self) -> str:
        return f"{self.air_share:.0%} of voxels are air or lung (−1050 to −700), {self.soft_tissue_share:.0%} soft tissue (−150 to 150)"


def _sample_voxels(array: NDArray[Any], about: int = 300_000) -> NDArray[np.float32]:
    """About so many voxels from all over the volume, in memory order."""
    step = max(1, int(np.ceil((array.size / about) ** (1 / 3))))
    return array[::step, ::step, ::step].astype(np.float32).ravel(order="K")


def _count_grey_levels(sample: NDArray[np.float32]) -> int:
    """How many values occur; counting stops beyond those of a picture, since sorting a million numbers takes time."""
    few = len(np.unique(sample[:: max(1, sample.size // 10_000)]))
    return few if few > _MAX_GREY_LEVELS else len(np.unique(sample))


def _refuse_clipped(sample: NDArray[np.float32], where: str) -> None:
    """A display window cuts the top off: much of the body then sits at one highest value."""
    top = sample.max()
    share = np.count_nonzero(sample == top) / sample.size
    if top < 1000 and share > 0.02:
        raise InputError(
            where,
            "is a windowed picture, not CT numbers",
            expected="HU up to bone and metal, above 1000",
            found=f"{share:.0%} of its voxels at {top:g}, the highest",
            remedy="export the original series",
        )


def _convert_to_int16(
    array: NDArray[Any], slope: float, intercept: float, reason: str
) -> tuple[Int16Volume, HuConversion]:
    values = array
    if (slope, intercept) != (1.0, 0.0):
        values = array.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if values.dtype.kind == "f":
        values = np.rint(values)
    padding = 0
    if values.min() < MIN_HU or values.max() > MAX_HU:
        padding = int(np.count_nonzero(values < MIN_HU))
        values = np.clip(values, MIN_HU, MAX_HU)
    if padding:
        reason += f"; {padding} voxels below {MIN_HU} set to air"
    return values.astype(np.int16, copy=False), HuConversion(slope, intercept, reason, padding)
