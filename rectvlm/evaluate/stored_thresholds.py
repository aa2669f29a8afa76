"""Thresholds that are stored with a checkpoint, as evaluation and prediction read them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rectvlm.checkpoint import THRESHOLDS_FILE
from rectvlm.evaluate.region_maps import RegionMapUsage
from rectvlm.labels import FINDINGS
from rectvlm.metrics.finding_thresholds import FindingThresholds
from rectvlm.types import JsonObject, UserError


@dataclass(frozen=True)
class FittedThresholds(FindingThresholds):
    """Thresholds with the region maps of the cases that they were fitted on."""

    region_maps: RegionMapUsage | None = None
    """Use of region maps in the fitted cases; None where it is not known."""

    def as_dict(self) -> JsonObject:
        """Tree for JSON."""
        region_maps = {} if self.region_maps is None else self.region_maps.as_dict()
        return super().as_dict() | region_maps

    @property
    def is_without_region_maps(self) -> bool:
        """Whether the model had no region map of any of these cases, as it has none of a new CT."""
        return self.region_maps is not None and self.region_maps.is_without_region_maps


def read_thresholds(folder: Path) -> dict[str, float] | None:
    """Read the fitted thresholds of a checkpoint by finding; None when none was fitted.

    Args:
        folder: folder of the checkpoint.

    Raises:
        UserError: The file is damaged.
    """
    stored = read_stored_thresholds(folder)
    if stored is None:
        return None
    thresholds = stored.by_finding()
    fitted_names = [
        name for name, is_fitted in zip(FINDINGS, stored.is_fitted, strict=True) if is_fitted
    ]
    return {name: thresholds[name] for name in fitted_names}


def read_stored_thresholds(folder: Path) -> FittedThresholds | None:
    """Read the thresholds of a checkpoint with their origin; None when none is fitted.

    Args:
        folder: folder of the checkpoint.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / THRESHOLDS_FILE
    if not path.is_file():
        return None
    try:
        stored = _parse_thresholds(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: run `rectvlm evaluate` again, or delete it.") from None
    return stored if stored.is_fitted.any() else None


def _parse_thresholds(tree: JsonObject) -> FittedThresholds:
    not_fitted = set(tree.get("not_fitted", ()))
    return FittedThresholds(
        values=np.array([float(tree["values"][name]) for name in FINDINGS]),
        is_fitted=np.array([name not in not_fitted for name in FINDINGS]),
        source=str(tree.get("source", "unknown")),
        n_cases=int(tree.get("n_cases", 0)),
        region_maps=RegionMapUsage.from_dict(tree),
    )
