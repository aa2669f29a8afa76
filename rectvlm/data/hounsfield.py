"""Stored numbers to Hounsfield units: what a file's numbers mean is read from the numbers, and never applied twice."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import AIR_HU
from rectvlm.types import HuDecision, InputError, Int16Volume, Volume

HU_LOW, HU_HIGH = AIR_HU, 3071
_LEVELS = 256
"""A picture of 8 bits has no more grey levels."""


def to_hu(volume: Volume, slope: float | None = None, intercept: float | None = None) -> tuple[Int16Volume, HuDecision]:
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
    sample = _sample(volume.array)
    levels = _grey_levels(sample)
    if volume.array.dtype == np.uint8 or levels <= _LEVELS:
        raise InputError(
            volume.where,
            "is a windowed picture, not CT numbers",
            expected="HU from about −1000 to above 1000",
            found=f"{levels} grey levels from {sample.min():g} to {sample.max():g}",
            remedy="export the original series",
        )
    as_stored = Evidence.of(sample)
    given = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    rescaled = as_stored if given == (1.0, 0.0) else Evidence.of(sample * np.float32(given[0]) + np.float32(given[1]))
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
        unused = "" if given == (1.0, 0.0) else f"; slope {given[0]:g} and intercept {given[1]:g} not applied again"
        return _finish(volume.array, 1.0, 0.0, f"already HU: {as_stored}{unused}")
    if rescaled.is_hu:
        reason = f"stored numbers were not HU ({as_stored}); with slope and intercept {rescaled}"
        return _finish(volume.array, *given, reason)
    tried = f"; slope {given[0]:g} and intercept {given[1]:g} do not mend it" if given != (1.0, 0.0) else ""
    raise InputError(
        volume.where,
        "is not in HU",
        expected="air or lung near −1000 and soft tissue near 0 to 80",
        found=f"{as_stored}, in numbers from {sample.min():g} to {sample.max():g}{tried}",
        remedy="give the series' RescaleSlope and RescaleIntercept, or export it without rescaling twice",
    )


@dataclass(frozen=True)
class Evidence:
    """Shares of the voxels inside the field of view, by which HU are known."""

    air: float
    soft: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> "Evidence":
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
        return self.air >= 0.05 and self.soft >= 0.05

    def __str__(self) -> str:
        return f"{self.air:.0%} of voxels are air or lung (−1050 to −700), {self.soft:.0%} soft tissue (−150 to 150)"


def _sample(array: NDArray[Any], about: int = 300_000) -> NDArray[np.float32]:
    """About so many voxels from all over the volume, in memory order."""
    step = max(1, int(np.ceil((array.size / about) ** (1 / 3))))
    return array[::step, ::step, ::step].astype(np.float32).ravel(order="K")


def _grey_levels(sample: NDArray[np.float32]) -> int:
    """How many values occur; counting stops beyond those of a picture, since sorting a million numbers takes time."""
    few = len(np.unique(sample[:: max(1, sample.size // 10_000)]))
    return few if few > _LEVELS else len(np.unique(sample))


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


def _finish(array: NDArray[Any], slope: float, intercept: float, reason: str) -> tuple[Int16Volume, HuDecision]:
    values = array
    if (slope, intercept) != (1.0, 0.0):
        values = array.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if values.dtype.kind == "f":
        values = np.rint(values)
    padding = 0
    if values.min() < HU_LOW or values.max() > HU_HIGH:
        padding = int(np.count_nonzero(values < HU_LOW))
        values = np.clip(values, HU_LOW, HU_HIGH)
    if padding:
        reason += f"; {padding} voxels below {HU_LOW} set to air"
    return values.astype(np.int16, copy=False), HuDecision(slope, intercept, reason, padding)
