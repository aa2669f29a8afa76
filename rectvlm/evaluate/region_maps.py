"""How many cases had a region map: a new CT comes without one, so prediction never has any."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rectvlm.evaluate.case_records import CaseRecord
from rectvlm.types import COARSE_REGIONS_SOURCE


@dataclass(frozen=True)
class RegionMapUsage:
    """What region maps the model was given with some volumes."""

    n_with_region_map: int
    """Volumes; none where they were hidden."""
    n_with_coarse_region_map: int
    """Those among them whose map was estimated from the CT."""
    regions_hidden: bool
    """Whether the maps were kept from the model."""

    @classmethod
    def from_records(cls, records: Iterable[CaseRecord], hidden: bool) -> "RegionMapUsage":
        """Count what was recorded of each volume; `hidden` is what was asked for."""
        known = [record.regions for record in records if record.regions is not None]
        return cls(len(known), known.count(COARSE_REGIONS_SOURCE), hidden)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "RegionMapUsage | None":
        """From a tree that `as_dict` is part of; None where it is not, as in files of earlier versions.

        Raises:
            KeyError, TypeError, ValueError: a count is missing or is none.
        """
        if "regions_hidden" not in found:
            return None
        with_map, coarse = int(found["n_with_region_map"]), int(found["n_with_coarse_region_map"])
        return cls(with_map, coarse, bool(found["regions_hidden"]))

    @property
    def is_without_region_maps(self) -> bool:
        """Whether the model had no map of any volume."""
        return not self.n_with_region_map

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.regions_hidden:
            return "hidden, as in prediction"
        if not self.n_with_region_map:
            return "none"
        return (
            f"{self.n_with_region_map:,} volumes, {self.n_with_coarse_region_map:,} of them coarse"
        )
