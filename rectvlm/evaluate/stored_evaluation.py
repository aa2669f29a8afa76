"""An evaluation as `rectvlm evaluate` stored it: the metrics, and the cases behind them."""

import json
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from rectvlm.evaluate.case_records import CASE_RECORD_ADAPTER, CaseRecord
from rectvlm.evaluate.scans import ScanResults, group_by_scan
from rectvlm.files import atomic_file, read_json_object
from rectvlm.metrics.reports import ReportStatistics
from rectvlm.types import InputError, JsonObject

METRICS_FILE = "metrics.json"
CASES_FILE = "cases.jsonl"
"""One line a volume, without texts and features."""
REPORTS_FILE = "reports.jsonl"
"""Texts of each scan with a generated report."""
STATISTICS_FILE = "report_statistics.npz"
"""Arrays of `ReportStatistics` of the generated reports, in the order of `REPORTS_FILE`."""
OMITTED_FIELDS = ("reference", "generated", "without_image", "features")
"""Fields of a case record that `CASES_FILE` lacks."""
_REMEDY = "evaluate again, or give the folder or metrics.json that `rectvlm evaluate` wrote"


@dataclass(frozen=True)
class StoredReports:
    """Generated reports of an evaluation."""

    scans: list[str]
    """Scan of each report, (N,)."""
    statistics: ReportStatistics
    """Statistics of each report, in the same order."""


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation that was read back."""

    path: Path
    """File of the metrics."""
    metrics: JsonObject
    """Tree of `EvaluationResult`."""
    scans: ScanResults
    """Results by scan, without texts."""
    reports: StoredReports | None
    """Generated reports; None where none were generated."""

    @property
    def has_lesions(self) -> bool:
        """Whether lesions were localized."""
        return self.metrics["localization"] is not None


def write_report_statistics(path: Path, statistics: ReportStatistics) -> None:
    """Write the arrays of report statistics.

    Raises:
        OSError: there is no room, or the disk failed.
    """
    arrays = {}
    for field in fields(statistics):
        value = getattr(statistics, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = value
    with atomic_file(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_stored_evaluation(place: Path) -> StoredEvaluation:
    """Read an evaluation back.

    Args:
        place: folder that `rectvlm evaluate` wrote, its `metrics.json`, or a folder with one
            evaluation below it, such as that of a run.

    Raises:
        UserError: a file is missing, damaged, or of another evaluation; or there are several
            evaluations.
    """
    path = _find_metrics_file(place)
    metrics = read_json_object(path, _REMEDY)
    missing = {"classification", "localization", "reports", "n_cases"} - metrics.keys()
    if missing:
        raise InputError(
            path,
            "is no result of an evaluation",
            expected="the keys classification, localization, reports and n_cases",
            found=f"none of the name {min(missing)}",
            remedy=_REMEDY,
        )
    records = _read_case_records(path.with_name(CASES_FILE))
    if len(records) != metrics["n_cases"]:
        raise InputError(
            path.with_name(CASES_FILE),
            "is of another evaluation than the metrics beside it",
            expected=f"{metrics['n_cases']} lines",
            found=str(len(records)),
            remedy="evaluate again",
        )
    reports = None
    if metrics["reports"] is not None:
        scans_by_key = {record.key: record.scan or record.key for record in records}
        reports = _read_reports(path, metrics["reports"]["image"], scans_by_key)
    return StoredEvaluation(path, metrics, group_by_scan(records), reports)


def _find_metrics_file(place: Path) -> Path:
    """Metrics of the evaluation in a folder, or of the only one below it."""
    if not place.is_dir() or (place / METRICS_FILE).is_file():
        return place / METRICS_FILE if place.is_dir() else place
    below = sorted(place.rglob(METRICS_FILE))
    if len(below) > 1:
        raise InputError(
            place,
            "holds several evaluations",
            expected="one",
            found=", ".join(str(path.relative_to(place).parent) for path in below),
            remedy="name one of these folders",
        )
    return below[0] if below else place / METRICS_FILE


def _read_lines(path: Path) -> list[JsonObject]:
    """Read the objects of a JSON-lines file of records by case."""
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise _missing_records(path, error) from None


def _read_case_records(path: Path) -> list[CaseRecord]:
    omitted = dict.fromkeys(OMITTED_FIELDS)
    try:
        return [CASE_RECORD_ADAPTER.validate_python(row | omitted) for row in _read_lines(path)]
    except (ValidationError, TypeError) as error:
        raise _missing_records(path, error) from None


def _read_reports(
    path: Path, image_figures: JsonObject, scans_by_key: dict[str, str]
) -> StoredReports:
    statistics_path = path.with_name(STATISTICS_FILE)
    keys = [row["key"] for row in _read_lines(path.with_name(REPORTS_FILE))]
    columns: dict[str, Any] = {"bertscore_f1": None, "label_counts": None}
    try:
        with np.load(statistics_path, allow_pickle=False) as arrays:
            columns |= {name: arrays[name] for name in arrays.files}
        statistics = ReportStatistics(
            **columns,
            prevalence_groups={
                name: row["findings"] for name, row in image_figures["by_prevalence"].items()
            },
            diversity=image_figures["diversity"],
            convention=image_figures["convention"],
            signatures=image_figures["signatures"],
            left_out=image_figures["left_out"],
        )
        scans = [scans_by_key[key] for key in keys]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise _missing_records(statistics_path, error) from None
    if len(statistics) != len(scans):
        raise _missing_records(statistics_path, f"{len(statistics)} rows, {len(scans)} reports")
    return StoredReports(scans, statistics)


def _missing_records(path: Path, fault: object) -> InputError:
    reason = fault.strerror if isinstance(fault, OSError) else None
    fault_text = str(fault).splitlines()[0] if str(fault) else ""
    return InputError(
        path,
        "holds no records by case that can be compared",
        expected=f"the {path.name} that `rectvlm evaluate` wrote beside {METRICS_FILE}",
        found=reason or f"{type(fault).__name__} {fault_text}".removeprefix("str "),
        remedy="copy it there, or evaluate again",
    )
