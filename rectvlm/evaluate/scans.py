"""Results by scan. A scan may have several reconstructions, which share labels and report.

Probabilities of a scan are the mean over its reconstructions. Lesions and reports are those of one
of them: the first in which the lesion was annotated, the first that has a generated report.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rectvlm.evaluate.case_records import CaseRecord, LesionRecord
from rectvlm.labels import N_FINDINGS, N_LESIONS
from rectvlm.metrics.arrays import BoolArray


@dataclass(frozen=True)
class ScanResults:
    """S scans, in the order of their first volumes."""

    names: list[str]
    patients: list[str]
    volumes: list[list[CaseRecord]]
    """Records of each scan's volumes, in the order of the split."""
    probabilities: NDArray[np.float64]
    """Mean probabilities over the reconstructions, (S, 18)."""
    labels: NDArray[np.float64]
    """Labels, (S, 18), 0 or 1; 0 where unknown."""
    known: BoolArray
    """Whether each label is known, (S, 18)."""
    n_conflicting_labels: int
    """Number of labels in which reconstructions disagree; they count as unknown."""

    def select_report_cases(self) -> tuple[NDArray[np.int64], list[CaseRecord]]:
        """Numbers of the scans with a generated report, and for each the record that has it."""
        numbers, records = [], []
        for number, volumes in enumerate(self.volumes):
            with_report = [record for record in volumes if record.generated is not None]
            if with_report:
                numbers.append(number)
                records.append(with_report[0])
        return np.array(numbers, np.int64), records

    def select_lesions(self) -> list[list[LesionRecord | None]]:
        """Five lesions of each scan, each from the first volume in which it was annotated."""
        return [
            [_first_annotated(volumes, bit) for bit in range(N_LESIONS)] for volumes in self.volumes
        ]


def group_by_scan(records: Sequence[CaseRecord]) -> ScanResults:
    """Put the reconstructions of each scan together."""
    volumes_by_scan: dict[str, list[CaseRecord]] = {}
    for record in sorted(records, key=lambda record: record.position):
        volumes_by_scan.setdefault(record.scan or record.key, []).append(record)

    n_scans = len(volumes_by_scan)
    probabilities = np.zeros((n_scans, N_FINDINGS))
    labels = np.zeros((n_scans, N_FINDINGS))
    known = np.zeros((n_scans, N_FINDINGS), bool)
    n_conflicting_labels = 0
    for number, volumes in enumerate(volumes_by_scan.values()):
        probabilities[number] = np.mean([record.probabilities for record in volumes], axis=0)
        for i in range(N_FINDINGS):
            values = {record.labels[i] for record in volumes} - {None}
            known[number, i] = len(values) == 1
            labels[number, i] = values == {1}
            n_conflicting_labels += len(values) > 1
    return ScanResults(
        names=list(volumes_by_scan),
        patients=[volumes[0].patient for volumes in volumes_by_scan.values()],
        volumes=list(volumes_by_scan.values()),
        probabilities=probabilities,
        labels=labels,
        known=known,
        n_conflicting_labels=n_conflicting_labels,
    )


def _first_annotated(volumes: Sequence[CaseRecord], bit: int) -> LesionRecord | None:
    for record in volumes:
        if record.lesions and record.lesions[bit] is not None:
            return record.lesions[bit]
    return None
