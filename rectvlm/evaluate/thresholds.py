"""Thresholds of an evaluation: fitted on other cases, stored with the checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path

from rectvlm.checkpoint import THRESHOLDS_FILE
from rectvlm.evaluate.case_records import CaseRecord
from rectvlm.evaluate.region_maps import RegionMapUsage
from rectvlm.evaluate.scans import group_by_scan
from rectvlm.evaluate.stored_thresholds import FittedThresholds, read_stored_thresholds
from rectvlm.files import write_json
from rectvlm.metrics.finding_thresholds import FindingThresholds
from rectvlm.metrics.findings import fit_thresholds
from rectvlm.types import UserError

log = logging.getLogger(__name__)


def choose_thresholds(
    folder: Path,
    fit_records: Sequence[CaseRecord],
    cases: str,
    stored_only: bool = False,
    has_training_shards: bool = True,
    regions_hidden: bool = False,
) -> FindingThresholds:
    """Choose fitted thresholds, else the stored ones, else 0.5.

    Thresholds are fitted for findings with a known positive and a known negative case. They are
    written into the checkpoint's folder, if it can be written to and holds none that were fitted on
    more cases.

    Args:
        folder: folder of the checkpoint.
        fit_records: records of the cases to fit on.
        cases: split and shards that these cases come from, in words.
        stored_only: whether stored thresholds are required.
        has_training_shards: whether the shards are those that the checkpoint was trained with.
        regions_hidden: whether region maps were kept from the model.

    Raises:
        UserError: Stored thresholds are needed and are damaged, or are required and missing.
    """
    reason = f"there is no {cases}"
    if fit_records:
        fitted = _fit_to_records(fit_records, cases, regions_hidden)
        if fitted.is_fitted.any():
            _write_unless_better_stored(folder, fitted, has_training_shards)
            return fitted
        reason = f"{fitted.n_cases} scans of the {cases} decide none"

    stored = read_stored_thresholds(folder)
    if stored is not None:
        return stored
    if stored_only:
        path = folder / THRESHOLDS_FILE
        raise UserError(f"No fitted thresholds in {path}: evaluate with --thresholds fit first.")
    return FindingThresholds.all_default(f"0.5 for every finding: {reason}")


def _fit_to_records(
    records: Sequence[CaseRecord], cases: str, regions_hidden: bool
) -> FittedThresholds:
    scans = group_by_scan(records)
    region_maps = RegionMapUsage.from_records(records, regions_hidden)
    first_scans = f"the first {len(scans.patients)} scans of the {cases}"
    source = f"maximum F1 on {first_scans}; region maps: {region_maps}"
    fitted = fit_thresholds(scans.probabilities, scans.labels, scans.known, source)
    return FittedThresholds(fitted.values, fitted.is_fitted, source, fitted.n_cases, region_maps)


def _write_unless_better_stored(
    folder: Path, fitted: FittedThresholds, has_training_shards: bool
) -> None:
    """Write fitted thresholds into a checkpoint's folder, unless better ones are stored there.

    Stored thresholds are better if more cases decided them, or as many cases of the training
    shards, or if they alone come from cases without region maps. Prediction uses the stored
    thresholds and has no region maps, so a quick evaluation, one on other shards, or one with
    the maps must not make it worse.
    """
    path = folder / THRESHOLDS_FILE
    try:
        stored = read_stored_thresholds(folder)
    except UserError:
        stored = None  # a damaged file is replaced

    if stored is not None and _is_better(stored, fitted, has_training_shards):
        log.warning(
            "Kept the thresholds in %s (%s; n = %d), which `rectvlm predict` uses. Those of this "
            "evaluation (%s; n = %d) are in its metrics only; delete the file to replace them.",
            path,
            stored.source,
            stored.n_cases,
            fitted.source,
            fitted.n_cases,
        )
        return

    try:
        write_json(path, fitted.as_dict())
    except OSError as error:
        log.warning(
            "Thresholds are in the metrics only, %s cannot be written (%s).", path, error.strerror
        )
        return
    if stored is not None and fitted.as_dict() != stored.as_dict():
        log.info("Replaced the thresholds in %s (%s; n = %d).", path, stored.source, stored.n_cases)


def _is_better(
    stored: FittedThresholds, fitted: FittedThresholds, has_training_shards: bool
) -> bool:
    """Whether stored thresholds must not be replaced by newly fitted ones."""
    cases_needed = stored.n_cases + (0 if has_training_shards else 1)
    would_need_region_maps = stored.is_without_region_maps and not fitted.is_without_region_maps
    return fitted.n_cases < cases_needed or would_need_region_maps
