"""The masks of one case as they come from files."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rectvlm.labels import LESION_BY_KEY
from rectvlm.types import Volume, no_lesions_source


def _no_lesions() -> dict[str, bool]:
    return dict.fromkeys(LESION_BY_KEY, False)


@dataclass(frozen=True, kw_only=True)
class LoadedMasks:
    """Lesion and region masks of one case, each on its own grid, and what is known of them."""

    lesions: Sequence[Volume] = ()
    """Lesion bits, uint8; each volume has its own grid and affine, and their union counts."""
    lesions_annotated: dict[str, bool] = field(default_factory=_no_lesions)
    """By key of all 5 lesions: whether a source outlined all of the kind. A lesion that was not
    annotated is not absent."""
    lesions_partial: dict[str, bool] = field(default_factory=_no_lesions)
    """By key of all 5 lesions: whether some are outlined while others may not be. A lesion is never
    both partial and annotated."""
    lesions_source: dict[str, str | None] = field(default_factory=no_lesions_source)
    """By key of all 5 lesions: who or what outlined it, in the words of `rectvlm.types`; None where
    it was not annotated, or nobody knows."""
    regions: Volume | None = None
    """Region ids, uint8, on their own grid and affine."""
    regions_source: str | None = None
    """Source of the region map; None when there is none."""
