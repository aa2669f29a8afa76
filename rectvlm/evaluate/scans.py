"""Volumes to scans. A scan may have several reconstructions, which share labels and report: results count scans.

Probabilities of a scan are the mean over its reconstructions. Lesions and reports are those of one of them: the first
in which the lesion was annotated, the first that has a generated report.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rectvlm.evaluate.case_records import CaseRecord, LesionRecord
from rectvlm.labels import N_FINDINGS, N_LESIONS

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class ScanResults:
    """S scans, in the order of their first volumes."""

    names: list[str]
    patients: list[str]
    volumes: list[list[CaseRecord]]
    """Of each scan, in the order of the split."""
    probabilities: NDArray[np.float64]
    """(S, 18), mean over the reconstructions."""
    labels: NDArray[np.float64]
    """(S, 18), 0 or 1; 0 where unknown."""
    known: BoolArray
    """(S, 18)."""
    n_conflicting_labels: int
    """Labels in which reconstructions of one scan disagree; they count as unknown."""

    def select_report_cases(self) -> tuple[NDArray[np.int64], list[CaseRecord]]:
        """Numbers of the scans with a generated report, and the volume of each that has it."""
        first = [
            next((one for one in volumes if one.generated is not None), None)
            for volumes in self.volumes
        ]
        return (
            np.array([i for i, one in enumerate(first) if one is not None], np.int64),
            [one for one in first if one is not None],
        )

    def select_lesions(self) -> list[list[LesionRecord | None]]:
        """Of each scan its five lesions, each from the first volume in which it was annotated."""
        return [
            [_first_annotated(volumes, bit) for bit in range(N_LESIONS)] for volumes in self.volumes
        ]


def group_by_scan(records: Sequence[CaseRecord]) -> ScanResults:
    """Put the reconstructions of a scan together."""
    volumes: dict[str, list[CaseRecord]] = {}
    for record in sorted(records, key=lambda one: one.position):
        volumes.setdefault(record.scan or record.key, []).append(record)
    grouped = list(volumes.values())
    probabilities = np.array(
        [np.mean([one.probabilities for one in some], axis=0) for some in grouped]
    )
    said = [
        [{one.labels[i] for one in some} - {None} for i in range(N_FINDINGS)] for some in grouped
    ]
    known = np.array([[len(values) == 1 for values in row] for row in said], bool)
    labels = np.array([[float(1 in values and len(values) == 1) for values in row] for row in said])
    return ScanResults(
        list(volumes),
        [some[0].patient for some in grouped],
        grouped,
        probabilities.reshape(-1, N_FINDINGS),
        labels.reshape(-1, N_FINDINGS),
        known.reshape(-1, N_FINDINGS),
        sum(len(values) > 1 for row in said for values in row),
    )


def _first_annotated(volumes: Sequence[CaseRecord], bit: int) -> LesionRecord | None:
    return next(
        (one.lesions[bit] for one in volumes if one.lesions and one.lesions[bit] is not None), None
    )
