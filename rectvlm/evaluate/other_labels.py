"""The same predictions against the labels of another table (`--labels`)."""

from dataclasses import replace

import numpy as np

from rectvlm.evaluate.scans import ScanResults
from rectvlm.evaluate.summary import summarize_findings
from rectvlm.files import file_sha256
from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.label_table import LabelTable
from rectvlm.labels import FINDINGS
from rectvlm.metrics.bootstrap import ResampleWeights
from rectvlm.metrics.clinical_efficacy import count_confusions, score_clinical_efficacy
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.report_labeler.labeler import ReportLabeler
from rectvlm.types import JsonObject


def summarize_other_labels(
    scans: ScanResults,
    table: LabelTable,
    thresholds: FindingThresholds,
    weights: ResampleWeights | None,
    labeler: ReportLabeler | None,
) -> JsonObject:
    """Figures against the labels of a table, at the thresholds of the evaluation.

    `agreement` counts for each finding the scans that both sets label, and those that they label
    alike.

    Args:
        scans: results of the evaluation, with the labels of the shards.
        table: other labels, from one file.
        thresholds: thresholds of the findings.
        weights: resamples of the scans; None for no intervals.
        labeler: labeler that reads findings in the generated reports; None without reports.

    Raises:
        InputError: the table lacks a scan.
    """
    (path,) = table.paths
    relabelled = relabel_scans(scans, table)
    both_known = scans.known & relabelled.known
    alike = both_known & (scans.labels == relabelled.labels)
    agreement = {}
    for i, finding in enumerate(FINDINGS):
        counts = {"n_known": both_known[:, i].sum(), "n_alike": alike[:, i].sum()}
        agreement[finding] = {name: int(count) for name, count in counts.items()}
    return {
        "file": path.name,
        "sha256": file_sha256(path),
        "classification": summarize_findings(relabelled, thresholds, weights),
        "agreement": agreement,
        "report_findings": labeler and _score_reports(relabelled, labeler),
    }


def relabel_scans(scans: ScanResults, table: LabelTable) -> ScanResults:
    """The same results with the labels of a table.

    Raises:
        InputError: the table lacks a scan.
    """
    keys = [[record.key for record in volumes] for volumes in scans.volumes]
    scan_labels = table.labels_of(keys)
    values = np.array(scan_labels.rows, dtype=np.float64)  # None becomes NaN
    return replace(
        scans,
        labels=np.nan_to_num(values),
        known=~np.isnan(values),
        n_conflicting_labels=scan_labels.n_conflicting,
    )


def _score_reports(scans: ScanResults, labeler: ReportLabeler) -> JsonObject:
    """Findings of the generated reports against the labels; uncertain ones count as present."""
    numbers, records = scans.select_report_cases()
    texts = [record.generated or "" for record in records]
    called = labeler.label_reports(texts) >= FindingState.UNCERTAIN
    counts = count_confusions(called, scans.labels[numbers] > 0.5, scans.known[numbers])
    return score_clinical_efficacy(counts)
