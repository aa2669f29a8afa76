"""Thresholds of the findings: fitted on cases that are not evaluated, kept with the checkpoint."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rectvlm import metrics
from rectvlm.checkpoint import THRESHOLDS
from rectvlm.data.store import atomic_file
from rectvlm.evaluate.cases import CaseRecord
from rectvlm.evaluate.regions import RegionMaps
from rectvlm.evaluate.scans import by_scan
from rectvlm.labels import FINDINGS
from rectvlm.metrics import Thresholds
from rectvlm.types import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted(Thresholds):
    """Thresholds with the region maps of the cases that they were fitted on."""

    regions: RegionMaps | None = None
    """None where that was not written down, as by earlier versions."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return super().as_dict() | (self.regions.as_dict() if self.regions is not None else {})

    @property
    def as_in_prediction(self) -> bool:
        """Whether the model had no region map of any of these cases, as it has none of a new CT."""
        return self.regions is not None and self.regions.as_in_prediction


def read_thresholds(folder: Path) -> dict[str, float] | None:
    """Fitted thresholds of a checkpoint by finding, without those that were not fitted; None when none was.

    Raises:
        UserError: the file is damaged.
    """
    stored = stored_thresholds(folder)
    if stored is None:
        return None
    fitted = zip(stored.by_finding().items(), stored.fitted, strict=True)
    return {name: value for (name, value), is_fitted in fitted if is_fitted}


def stored_thresholds(folder: Path) -> Fitted | None:
    """Thresholds that lie with a checkpoint, and where they came from; None when there are none.

    A file in which no finding was fitted, as earlier versions wrote, is none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / THRESHOLDS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        values = np.array([float(found["values"][name]) for name in FINDINGS])
        unfitted = set(found.get("not_fitted", ()))
        fitted = np.array([name not in unfitted for name in FINDINGS])
        source, n_cases = str(found.get("source", "unknown")), int(found.get("n_cases", 0))
        stored = Fitted(values, fitted, source, n_cases, RegionMaps.read(found))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: run `rectvlm evaluate` again, or delete it.") from None
    return stored if stored.fitted.any() else None


def decide(
    folder: Path,
    fitting: Sequence[CaseRecord],
    shards: str,
    stored_alone: bool = False,
    own_shards: bool = True,
    regions_hidden: bool = False,
) -> Thresholds:
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
    if fitting:
        scans = by_scan(fitting)
        regions = RegionMaps.of(fitting, regions_hidden)
        cases = f"the first {len(scans.patients)} scans of the train split of {shards}"
        source = f"maximum F1 on {cases}; region maps: {regions}"
        found = metrics.fit_thresholds(scans.probabilities, scans.labels, scans.known, source)
        thresholds = Fitted(found.values, found.fitted, found.source, found.n_cases, regions)
        if thresholds.fitted.any():
            _keep(folder, thresholds, own_shards)
            return thresholds
        reason = f"{len(scans.patients)} scans of the train split of {shards} decide none"
    stored = stored_thresholds(folder)
    if stored is not None:
        return stored
    if stored_alone:
        raise UserError(f"No fitted thresholds in {folder / THRESHOLDS}: evaluate with --thresholds fit first.")
    return Thresholds.unfitted(f"0.5 for every finding: {reason}")


def _keep(folder: Path, fitted: Fitted, own_shards: bool) -> None:
    """Write fitted thresholds, unless more cases, or as many of the training shards, decided those that are there, or
    those alone come from cases without region maps.

    Prediction uses what lies there and has no region maps, so a quick evaluation, one on other shards, or one with the
    maps must not make it worse.
    """
    path = folder / THRESHOLDS
    try:
        stored = stored_thresholds(folder)
    except UserError:
        stored = None  # damaged: it is made anew
    if stored is not None and (
        fitted.n_cases < stored.n_cases + (0 if own_shards else 1)
        or (stored.as_in_prediction and not fitted.as_in_prediction)
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
        log.warning("Thresholds are in the metrics only, %s cannot be written (%s).", path, error.strerror)
        return
    if stored is not None and fitted.as_dict() != stored.as_dict():
        log.info("Replaced the thresholds in %s (%s; n = %d).", path, stored.source, stored.n_cases)
