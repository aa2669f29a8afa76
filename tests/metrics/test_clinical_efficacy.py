"""Recall of rare and of common findings."""

from dataclasses import replace

import numpy as np

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics.clinical_efficacy import group_by_prevalence
from rectvlm.metrics.reports import (
    compute_report_statistics,
    headline_scores,
    summarize_reports,
)


def test_findings_fall_into_thirds_by_prevalence_and_those_without_a_positive_into_none() -> None:
    counts = np.zeros((20, N_FINDINGS, 4), np.int64)
    counts[:, :, 3] = 1
    for i in range(6):
        counts[: 2 * i, i, 2] = 1  # 0, 2, 4, … of 20 scans
    counts[4:, 1, 3] = 0  # 2 of 4 known: 50%, the most common
    groups = group_by_prevalence(counts)
    assert groups["rare"] == [FINDINGS[2], FINDINGS[3]]
    assert groups["middle"] == [FINDINGS[4], FINDINGS[1]]
    assert groups["common"] == [FINDINGS[5]]


def test_a_report_that_names_only_common_findings_loses_the_rare_ones() -> None:
    labels = np.zeros((10, N_FINDINGS))
    emphysema, nodule, hernia = (
        FINDINGS.index(name) for name in ("Emphysema", "Lung nodule", "Hiatal hernia")
    )
    labels[:8, nodule] = labels[:5, emphysema] = labels[:2, hernia] = 1
    statistics = compute_report_statistics(["Nodule. Emphysema."] * 10, [None] * 10, labels=labels)
    groups = summarize_reports(statistics)["by_prevalence"]
    assert groups["rare"] == {"recall": 0.0, "n_positive": 2, "findings": ["Hiatal hernia"]}
    assert groups["common"]["recall"] == 1.0 and groups["common"]["n_positive"] == 8
    assert headline_scores(statistics)["rare_findings_recall"] == 0.0


def test_a_resample_keeps_the_groups_of_all_cases() -> None:
    labels = np.zeros((3, N_FINDINGS))
    labels[0, 0] = labels[1, 1] = labels[2, 1] = 1
    statistics = compute_report_statistics(["", "", ""], [None] * 3, labels=labels)
    assert statistics.label_counts is not None
    # A resample that drew the first case three times lacks the common finding.
    resample = replace(statistics, label_counts=3 * statistics.label_counts[:1])
    assert headline_scores(resample)["rare_findings_recall"] == 0.0
    assert resample.prevalence_groups["rare"] == [FINDINGS[0]]
