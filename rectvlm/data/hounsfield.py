"""Conversion of a file's numbers to Hounsfield units.

The numbers themselves show whether they are HU, so that a scaling is never applied twice.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import AIR_HU
from rectvlm.types import HuConversion, InputError, Int16Volume, Volume

MIN_HU, MAX_HU = AIR_HU, 3071
_MAX_GREY_LEVELS = 256
"""Largest number of grey levels of an 8-bit picture."""


def to_hu(
    volume: Volume, slope: float | None = None, intercept: float | None = None
) -> tuple[Int16Volume, HuConversion]:
    """Convert a volume to HU, int16 (i, j, k) in [−1024, 3071], and say how.

    Numbers are HU when air (or lung) lies near −1000 and soft tissue near 0 to 80. `slope` and
    `intercept` are applied only to numbers that are not HU and become HU by them. Numbers below
    −1024 are padding outside the field of view and become air.

    Args:
        volume: numbers with the scaling of the file's header applied.
        slope: RescaleSlope of the series' DICOM metadata, when known.
        intercept: RescaleIntercept of the series' DICOM metadata, when known.

    Raises:
        UserError: the volume is a windowed picture, or its numbers are not HU, or are HU both
            with and without slope and intercept.
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
    scaling = (
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )
    has_scaling = scaling != (1.0, 0.0)
    with_scaling = f"slope {scaling[0]:g} and intercept {scaling[1]:g}"
    as_stored = rescaled = HuEvidence.from_values(sample)
    if has_scaling:
        rescaled = HuEvidence.from_values(sample * np.float32(scaling[0]) + np.float32(scaling[1]))

    if has_scaling and as_stored.is_hu and rescaled.is_hu:
        raise InputError(
            volume.where,
            "may be in HU or not",
            expected="numbers that are HU either as stored or with slope and intercept",
            found=f"{as_stored} as stored; with {with_scaling} {rescaled}",
            remedy="convert the series again, to HU",
        )
    if as_stored.is_hu:
        _refuse_clipped(sample, volume.where)
        unused = f"; {with_scaling} not applied again" if has_scaling else ""
        return _convert_to_int16(volume.array, 1.0, 0.0, f"already HU: {as_stored}{unused}")
    if rescaled.is_hu:
        reason = f"stored numbers were not HU ({as_stored}); with slope and intercept {rescaled}"
        return _convert_to_int16(volume.array, *scaling, reason)

    tried = f"; {with_scaling} do not mend it" if has_scaling else ""
    raise InputError(
        volume.where,
        "is not in HU",
        expected="air or lung near −1000 and soft tissue near 0 to 80",
        found=f"{as_stored}, in numbers from {sample.min():g} to {sample.max():g}{tried}",
        remedy="give the series' RescaleSlope and RescaleIntercept, or export it without rescaling "
        "twice",
    )


@dataclass(frozen=True)
class HuEvidence:
    """Shares of voxels inside the field of view that show whether numbers are HU."""

    air_share: float
    """Share of air and lung, −1050 to −700 HU."""
    soft_tissue_share: float
    """Share of soft tissue, −150 to 150 HU."""

    @classmethod
    def from_values(cls, values: NDArray[Any]) -> "HuEvidence":
        """Measure the shares of numbers that are taken to be HU.

        The lowest number does not count, since it may be padding. Otherwise stored numbers with
        padding at −1024 (−2048 HU with their intercept of −1024) and air at 0 would pass for HU:
        the padding for air, and the air for tissue.
        """
        inside = values[values >= AIR_HU - 26]
        inside = inside[inside > inside.min()] if inside.size else inside
        count = max(1, inside.size)
        air = np.count_nonzero(inside <= -700) / count
        soft = np.count_nonzero((inside >= -150) & (inside <= 150)) / count
        return cls(air, soft)

    @property
    def is_hu(self) -> bool:
        """Whether there are air and soft tissue: an offset of ±1000 or a scale loses one."""
        return self.air_share >= 0.05 and self.soft_tissue_share >= 0.05

    def __str__(self) -> str:
        return (
            f"{self.air_share:.0%} of voxels are air or lung (−1050 to −700), "
            f"{self.soft_tissue_share:.0%} soft tissue (−150 to 150)"
        )


def _sample_voxels(array: NDArray[Any], about: int = 300_000) -> NDArray[np.float32]:
    """Sample about so many voxels from the entire volume, in memory order."""
    step = max(1, int(np.ceil((array.size / about) ** (1 / 3))))
    return array[::step, ::step, ::step].astype(np.float32).ravel(order="K")


def _count_grey_levels(sample: NDArray[np.float32]) -> int:
    """Number of different values, up to that of a picture: sorting a million numbers takes time."""
    few = len(np.unique(sample[:: max(1, sample.size // 10_000)]))
    return few if few > _MAX_GREY_LEVELS else len(np.unique(sample))


def _refuse_clipped(sample: NDArray[np.float32], where: str) -> None:
    """Refuse numbers whose top was cut off by a display window, which then is a frequent value."""
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
