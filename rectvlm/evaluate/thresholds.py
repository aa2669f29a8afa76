"""Thresholds of the findings: fitted on cases that are not evaluated, kept with the checkpoint."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rectvlm import metrics
from rectvlm.checkpoint import THRESHOLDS_FILE
from rectvlm.data.store import atomic_file
from rectvlm.evaluate.case_records import CaseRecord
from rectvlm.evaluate.region_maps import RegionMapUsage
from rectvlm.evaluate.scans import group_by_scan
from rectvlm.labels import FINDINGS
from rectvlm.metrics import FindingThresholds
from rectvlm.types import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedThresholds(FindingThresholds):
    """Thresholds with the region maps of the cases that they were fitted on."""

    region_maps: RegionMapUsage | None = None
    """None where that was not written down, as by earlier versions."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return super().as_dict() | (
            self.region_maps.as_dict() if self.region_maps is not None else {}
        )

    @property
    def is_without_region_maps(self) -> bool:
        """Whether the model had no region map of any of these cases, as it has none of a new CT."""
        return self.region_maps is not None and self.region_maps.is_without_region_maps


def read_thresholds(folder: Path) -> dict[str, float] | None:
    """Fitted thresholds of a checkpoint by finding, without those that were not fitted; None when none was.

    Raises:
        UserError: the file is damaged.
    """
    stored = read_stored_thresholds(folder)
    if stored is None:
        return None
    fitted = zip(stored.by_finding().items(), stored.is_fitted, strict=True)
    return {name: value for (name, value), is_fitted in fitted if is_fitted}


def read_stored_thresholds(folder: Path) -> FittedThresholds | None:
    """Thresholds that lie with a checkpoint, and where they came from; None when there are none.

    A file in which no finding was fitted, as earlier versions wrote, is none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / THRESHOLDS_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        values = np.array([float(found["values"][name]) for name in FINDINGS])
        unfitted = set(found.get("not_fitted", ()))
        fitted = np.array([name not in unfitted for name in FINDINGS])
        source, n_cases = str(found.get("source", "unknown")), int(found.get("n_cases", 0))
        stored = FittedThresholds(values, fitted, source, n_cases, RegionMapUsage.from_dict(found))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: run `rectvlm evaluate` again, or delete it.") from None
    return stored if stored.is_fitted.any() else None


def choose_thresholds(
    folder: Path,
    fit_records: Sequence[CaseRecord],
    shards: str,
    stored_only: bool = False,
    has_training_shards: bool = True,
    regions_hidden: bool = False,
) -> FindingThresholds:
    """Thresholds of an evaluation: fitted on some cases; where these decide nothing, or there are none, those that lie
    with the checkpoint; else one half.

    Fitted ones go into the checkpoint's folder, if it can be written to and holds none that are better founded.

    Args:
        folder: of the checkpoint.
        fitting: cases to fit on.
        shards: where they came from, in words.
        stored_alone: whether only stored ones will do.
        own_shards: whether the shards are those that the checkpoint was trained with.
        regions_hidden: whether region maps were kept from the model.

    Raises:
        UserError: stored thresholds are needed and damaged, or with `stored_alone` not there.
    """
    reason = "the shards hold no train split"
    if fit_records:
        scans = group_by_scan(fit_records)
        regions = RegionMapUsage.from_records(fit_records, regions_hidden)
        cases = f"the first {len(scans.patients)} scans of the train split of {shards}"
        source = f"maximum F1 on {cases}; region maps: {regions}"
        found = metrics.fit_thresholds(scans.probabilities, scans.labels, scans.known, source)
        thresholds = FittedThresholds(
            found.values, found.is_fitted, found.source, found.n_cases, regions
        )
        if thresholds.is_fitted.any():
            _write_unless_better_stored(folder, thresholds, has_training_shards)
            return thresholds
        reason = f"{len(scans.patients)} scans of the train split of {shards} decide none"
    stored = read_stored_thresholds(folder)
    if stored is not None:
        return stored
    if stored_only:
        raise UserError(
            f"No fitted thresholds in {folder / THRESHOLDS_FILE}: evaluate with --thresholds fit first."
        )
    return FindingThresholds.all_default(f"0.5 for every finding: {reason}")


def _write_unless_better_stored(
    folder: Path, fitted: FittedThresholds, has_training_shards: bool
) -> None:
    """Write fitted thresholds, unless more cases, or as many of the training shards, decided those that are there, or
    those alone come from cases without region maps.

    Prediction uses what lies there and has no region maps, so a quick evaluation, one on other shards, or one with the
    maps must not make it worse.
    """
    path = folder / THRESHOLDS_FILE
    try:
        stored = read_stored_thresholds(folder)
    except UserError:
        stored = None  # damaged: it is made anew
    if stored is not None and (
        fitted.n_cases < stored.n_cases + (0 if has_training_shards else 1)
        or (stored.is_without_region_maps and not fitted.is_without_region_maps)
    ):
        log.warning(
            "Kept the thresholds in %s (%s; n = %d), which `rectvlm predict` uses. Those of this evaluation (%s; n = "
            "%d) are in its metrics only; delete the file to replace them.",
            path,
            stored.source,
            stored.n_cases,
            fitted.source,
            fitted.n_cases,
        )
        return
    try:
        with atomic_file(path) as file:
            file.write((json.dumps(fitted.as_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        log.warning(
            "Thresholds are in the metrics only, %s cannot be written (%s).", path, error.strerror
        )
        return
    if stored is not None and fitted.as_dict() != stored.as_dict():
        log.info("Replaced the thresholds in %s (%s; n = %d).", path, stored.source, stored.n_cases)
