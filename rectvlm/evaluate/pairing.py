"""Two stored evaluations, checked to be comparable: same cases, labels, outlines and labeler."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.evaluate.scans import ScanResults
from rectvlm.evaluate.stored_evaluation import StoredEvaluation, StoredReports
from rectvlm.evaluate.summary import LesionRow, SourceRow, select_native_lesions
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.metrics.reports import ReportStatistics
from rectvlm.types import UserError

_LESION_SETTINGS = ("threshold", "surface_tolerance_mm", "hit_dice", "match_dice", "truth")
"""Keys of `localization` that must agree."""


@dataclass(frozen=True)
class EvaluationPair:
    """Evaluations A and B of the same S scans, in the same order."""

    a: StoredEvaluation
    b: StoredEvaluation
    scans_a: ScanResults
    scans_b: ScanResults
    """Results of B in the order of A's."""
    lesions_a: list[LesionRow] | None
    """Five lesions of each scan; None where A or B did not localize."""
    lesions_b: list[LesionRow] | None
    lesion_sources: list[SourceRow]
    """Sources of the outlines of these lesions; empty without them."""
    report_scans: NDArray[np.int64]
    """Numbers of the N scans with a report; empty where A or B wrote none."""
    reports: ReportStatistics | None
    """Statistics of A's N reports, then of B's, (2N,); None without reports."""
    left_out: dict[str, str]
    """Reasons by group of figures that is not compared."""


def pair_evaluations(a: StoredEvaluation, b: StoredEvaluation) -> EvaluationPair:
    """Check that two evaluations measured the same, and bring their scans into one order.

    Raises:
        UserError: they have other cases, labels, outlines, splits or readers of reports.
    """
    _require_same(a, b, "the split", a.metrics["split"], b.metrics["split"], "evaluate both on one")
    _require_same_scans(a, b)
    order = [b.scans.names.index(name) for name in a.scans.names]
    scans_b = _reorder_scans(b.scans, order)
    _require_same_labels(a, b, scans_b)

    left_out: dict[str, str] = {}
    lesions_a, lesions_b = None, None
    sources: list[SourceRow] = []
    if a.has_lesions and b.has_lesions:
        lesions_a, sources = select_native_lesions(a.scans)
        lesions_b, _ = select_native_lesions(scans_b)
        _require_same_outlines(a, b, lesions_a, lesions_b)
    elif a.has_lesions or b.has_lesions:
        left_out["localization"] = f"{(b if a.has_lesions else a).path} localized nothing"

    reports, report_scans = None, np.zeros(0, np.int64)
    if a.reports and b.reports:
        reports = _stack_reports(a, b, a.reports, b.reports, left_out)
        report_scans = np.array([a.scans.names.index(scan) for scan in a.reports.scans], np.int64)
    elif a.reports or b.reports:
        left_out["reports"] = f"{(b if a.reports else a).path} has no reports"
    return EvaluationPair(
        a, b, a.scans, scans_b, lesions_a, lesions_b, sources, report_scans, reports, left_out
    )


def _require_same(
    a: StoredEvaluation, b: StoredEvaluation, subject: str, of_a: object, of_b: object, remedy: str
) -> None:
    """Refuse two evaluations that differ in a setting.

    Raises:
        UserError: they differ.
    """
    if of_a != of_b:
        raise UserError(
            f"{a.path} and {b.path} cannot be compared: expected {subject} to be the same, found "
            f"{of_a} and {of_b}; {remedy}."
        )


def _require_same_scans(a: StoredEvaluation, b: StoredEvaluation) -> None:
    only_a = sorted(set(a.scans.names) - set(b.scans.names))
    only_b = sorted(set(b.scans.names) - set(a.scans.names))
    if only_a or only_b:
        example = only_a[0] if only_a else only_b[0]
        raise UserError(
            f"{a.path} and {b.path} cannot be compared: expected the same scans, found "
            f"{len(only_a)} in the first alone and {len(only_b)} in the second alone, such as "
            f"{example}; evaluate both on the same shards with the same --limit."
        )
    keys_a, keys_b = _volume_keys(a.scans), _volume_keys(b.scans)
    patients_a = dict(zip(a.scans.names, a.scans.patients, strict=True))
    patients_b = dict(zip(b.scans.names, b.scans.patients, strict=True))
    for scan in a.scans.names:
        remedy = "evaluate both on the same shards"
        _require_same(a, b, f"the volumes of scan {scan}", keys_a[scan], keys_b[scan], remedy)
        of_a, of_b = patients_a[scan], patients_b[scan]
        _require_same(a, b, f"the patient of scan {scan}", of_a, of_b, remedy)


def _volume_keys(scans: ScanResults) -> dict[str, str]:
    """Sorted keys of each scan's volumes, as text."""
    keys = {}
    for name, volumes in zip(scans.names, scans.volumes, strict=True):
        keys[name] = ", ".join(sorted(record.key for record in volumes))
    return keys


def _reorder_scans(scans: ScanResults, order: Sequence[int]) -> ScanResults:
    return replace(
        scans,
        names=[scans.names[number] for number in order],
        patients=[scans.patients[number] for number in order],
        volumes=[scans.volumes[number] for number in order],
        probabilities=scans.probabilities[order],
        labels=scans.labels[order],
        known=scans.known[order],
    )


def _require_same_labels(a: StoredEvaluation, b: StoredEvaluation, scans_b: ScanResults) -> None:
    scans_a = a.scans
    is_other = (scans_a.labels != scans_b.labels) | (scans_a.known != scans_b.known)
    if is_other.any():
        scan, finding = (int(number) for number in np.argwhere(is_other)[0])
        raise UserError(
            f"{a.path} and {b.path} cannot be compared: expected the same labels, found "
            f"{int(is_other.sum())} that differ, the first one {FINDINGS[finding]!r} of scan "
            f"{scans_a.names[scan]}; evaluate both on shards with the same labels."
        )


def _require_same_outlines(
    a: StoredEvaluation,
    b: StoredEvaluation,
    lesions_a: Sequence[LesionRow],
    lesions_b: Sequence[LesionRow],
) -> None:
    for setting in _LESION_SETTINGS:
        of_a, of_b = (one.metrics["localization"][setting] for one in (a, b))
        remedy = "evaluate both with the same --truth and --surface-tolerance"
        _require_same(a, b, f"`{setting}` of the localization", of_a, of_b, remedy)
    for name, row_a, row_b in zip(a.scans.names, lesions_a, lesions_b, strict=True):
        for lesion in LESIONS:
            comparisons = row_a[lesion.bit], row_b[lesion.bit]
            true_a, true_b = (row and row.truth for row in comparisons)
            subject = f"the voxels of the true {lesion.name} of scan {name}"
            _require_same(a, b, subject, true_a, true_b, "evaluate both on the same outlines")


def _stack_reports(
    a: StoredEvaluation,
    b: StoredEvaluation,
    reports_a: StoredReports,
    reports_b: StoredReports,
    left_out: dict[str, str],
) -> ReportStatistics:
    """Statistics of A's reports, then of B's; scores that were computed differently go out."""
    statistics_a, statistics_b = reports_a.statistics, reports_b.statistics
    _require_same(
        a,
        b,
        "the convention of the labeler",
        statistics_a.convention,
        statistics_b.convention,
        "evaluate one of them again with the other's --convention; predictions are kept",
    )
    _require_same(
        a,
        b,
        "the labeler",
        statistics_a.signatures["clinical"],
        statistics_b.signatures["clinical"],
        "evaluate one of them again with the other's --labeler; predictions are kept",
    )
    if sorted(reports_a.scans) != sorted(reports_b.scans):
        raise UserError(
            f"{a.path} and {b.path} cannot be compared: expected reports of the same scans, found "
            f"{len(reports_a.scans)} and {len(reports_b.scans)} reports of other scans; evaluate "
            "both with the same --report-limit."
        )
    order = [reports_b.scans.index(scan) for scan in reports_a.scans]
    for score, signature in statistics_a.signatures.items():
        other = statistics_b.signatures.get(score)
        if other != signature:
            left_out[f"reports.image.scores.{score}"] = f"computed by {signature}, and by {other}"
    columns: dict[str, Any] = {"bertscore_f1": None, "label_counts": None}
    for field in fields(ReportStatistics):
        of_a, of_b = getattr(statistics_a, field.name), getattr(statistics_b, field.name)
        if isinstance(of_a, np.ndarray) and isinstance(of_b, np.ndarray):
            columns[field.name] = np.concatenate([of_a, of_b[order]])
    return replace(statistics_a, **columns)
