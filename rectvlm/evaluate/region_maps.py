"""Use of region maps: how many cases had one. A new CT has none, so prediction never does."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rectvlm.types import COARSE_REGIONS_SOURCE, JsonObject

if TYPE_CHECKING:
    from rectvlm.evaluate.case_records import CaseRecord


@dataclass(frozen=True)
class RegionMapUsage:
    """Region maps that the model was given with a set of volumes."""

    n_with_region_map: int
    """Number of volumes with a map; 0 where the maps were hidden."""
    n_with_coarse_region_map: int
    """Number of volumes whose map was estimated from the CT."""
    regions_hidden: bool
    """Whether the maps were kept from the model."""

    @classmethod
    def from_records(cls, records: "Iterable[CaseRecord]", hidden: bool) -> "RegionMapUsage":
        """Count the maps of case records.

        Args:
            records: one record for each volume.
            hidden: whether the maps were kept from the model.
        """
        sources = [record.regions for record in records if record.regions is not None]
        return cls(len(sources), sources.count(COARSE_REGIONS_SOURCE), hidden)

    def as_dict(self) -> JsonObject:
        """Tree for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.regions_hidden:
            return "hidden, as in prediction"
        if not self.n_with_region_map:
            return "none"
        n_coarse = self.n_with_coarse_region_map
        return f"{self.n_with_region_map:,} volumes, {n_coarse:,} of them coarse"
