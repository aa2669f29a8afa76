"""Baselines of generated reports: what a language model must beat on the same cases.

Each baseline gives every case the report of a training scan, so it needs no language model:

- `table`: the classifier and a table of texts. The report is that of the training scan whose known
  labels agree most often with the findings that the classifier calls at the fitted thresholds.
- `prevalence`: the same table, asked for the findings that most training scans have. It reads no
  image, and every case gets the same report.
- `nearest`: the report of the training volume whose image features have the largest cosine with
  those of the case.

An unknown label agrees with nothing, and of equally good scans the first in the shards counts, so
the same shards give the same reports. Clinical figures against the labels mostly measure the
classifier; what a language model adds is its distance to the table.

Shapes: S cases with a report, N training scans with a report, C channels.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rectvlm.data.report_text import join_report_sections
from rectvlm.data.shards import SampleLocation, read_sample_meta
from rectvlm.data.store import ShardStore
from rectvlm.evaluate.case_records import CaseRecord
from rectvlm.evaluate.score_format import BASELINE_NAMES
from rectvlm.labels import FINDINGS
from rectvlm.metrics.arrays import BoolArray
from rectvlm.types import SampleMeta

UNKNOWN_LABEL = -1
_N_READERS = 16
"""Samples that are read at the same time; each read is a request where the shards are remote."""


@dataclass(frozen=True)
class TrainingReports:
    """Table of texts: the reports of N training scans with their labels."""

    texts: list[str]
    """Report of each scan, sections joined."""
    labels: NDArray[np.int8]
    """Labels of the findings, (N, 18), 0 or 1; `UNKNOWN_LABEL` where unknown."""

    def find_best_match(self, calls: BoolArray) -> int:
        """Number of the first scan with the most known labels equal to `calls`, (18,)."""
        n_agreeing = (self.labels == calls).sum(axis=1)
        return int(n_agreeing.argmax())

    def majority_labels(self) -> BoolArray:
        """Whether more than half of the known labels of each finding are positive, (18,)."""
        n_positive = (self.labels == 1).sum(axis=0)
        n_known = (self.labels != UNKNOWN_LABEL).sum(axis=0)
        return np.asarray(2 * n_positive > n_known)


@dataclass(frozen=True)
class BaselineReports:
    """Reports of the baselines for the S cases."""

    texts: dict[str, list[str]]
    """Report of each case, by baseline."""
    sources: dict[str, str]
    """Training cases that each baseline chose from, in words."""
    left_out: dict[str, str]
    """Reasons by baseline that is left out."""

    @classmethod
    def left_out_for(cls, reason: str) -> "BaselineReports":
        """No baseline, all for one reason."""
        return cls({}, {}, dict.fromkeys(BASELINE_NAMES, reason))


def read_training_reports(
    store: ShardStore, locations: Sequence[SampleLocation]
) -> TrainingReports:
    """Read reports and labels of training samples, without their volumes.

    Samples without a report are left out; of several reconstructions of a scan the first counts.

    Raises:
        UserError: A shard is missing, cut short or damaged.
    """
    with ThreadPoolExecutor(_N_READERS) as readers:
        metas = list(readers.map(partial(read_sample_meta, store), locations))
    texts_by_scan: dict[str, str] = {}
    labels: list[list[int]] = []
    for meta in metas:
        text = join_report_sections(meta.findings, meta.impression)
        scan = meta.scan or meta.key
        if text is not None and scan not in texts_by_scan:
            texts_by_scan[scan] = text
            labels.append(_encode_labels(meta))
    return TrainingReports(
        list(texts_by_scan.values()), np.array(labels, np.int8).reshape(-1, len(FINDINGS))
    )


def _encode_labels(meta: SampleMeta) -> list[int]:
    values = [meta.labels[name] for name in FINDINGS]
    return [UNKNOWN_LABEL if value is None else value for value in values]


def choose_baseline_reports(
    calls: BoolArray,
    cases: Sequence[CaseRecord],
    training: TrainingReports,
    neighbors: Sequence[CaseRecord],
) -> BaselineReports:
    """Choose the report of each baseline for each case.

    Args:
        calls: findings that the classifier calls in each case, (S, 18).
        cases: record of each case.
        training: table of texts.
        neighbors: records of training volumes, for the nearest report.
    """
    if not training.texts:
        return BaselineReports.left_out_for("no training case has a report")
    scans = f"{len(training.texts):,} training scans"
    table = [training.texts[training.find_best_match(row)] for row in calls]
    typical = training.texts[training.find_best_match(training.majority_labels())]
    texts = {"table": table, "prevalence": [typical] * len(cases)}
    sources = {"table": scans, "prevalence": scans}

    neighbors = [record for record in neighbors if record.reference is not None]
    if not neighbors:
        left_out = {"nearest": "none of the first training cases has a report"}
        return BaselineReports(texts, sources, left_out)
    texts["nearest"] = _choose_nearest_reports(cases, neighbors)
    sources["nearest"] = f"the first {len(neighbors):,} training volumes"
    return BaselineReports(texts, sources, {})


def _choose_nearest_reports(
    cases: Sequence[CaseRecord], neighbors: Sequence[CaseRecord]
) -> list[str]:
    """Report of the training volume with the largest cosine of features, for each case."""
    cosines = _unit_features(cases) @ _unit_features(neighbors).T
    return [neighbors[number].reference or "" for number in cosines.argmax(axis=1)]


def _unit_features(records: Sequence[CaseRecord]) -> NDArray[np.float64]:
    """Features of length 1, (len(records), C)."""
    features = np.array([record.features for record in records], np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(lengths, np.finfo(np.float64).tiny)
