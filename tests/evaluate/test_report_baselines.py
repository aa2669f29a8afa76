"""Baselines of reports: what each chooses, from hand-made cases and from real shards."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import phantom_sample

from rectvlm.checkpoint import run_folder
from rectvlm.config import Config
from rectvlm.data.shards import read_index, write_shards
from rectvlm.data.store import ShardStore
from rectvlm.evaluate.case_records import CaseRecord
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.evaluate.report_baselines import (
    UNKNOWN_LABEL,
    BaselineReports,
    TrainingReports,
    choose_baseline_reports,
    read_training_reports,
)
from rectvlm.evaluate.report_tables import describe_table_comparison, render_baselines
from rectvlm.evaluate.run import evaluate_checkpoint
from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics.arrays import BoolArray
from rectvlm.types import JsonObject


def case(features: list[float], report: str | None = "Findings: true.") -> CaseRecord:
    unknown: list[int | None] = [None] * N_FINDINGS
    probabilities = [0.5] * N_FINDINGS
    return CaseRecord(
        "neighbor", 0, "", "", "", probabilities, unknown, [], report, "", "", None, features
    )


def findings(*numbers: int) -> BoolArray:
    called = np.zeros(N_FINDINGS, bool)
    called[list(numbers)] = True
    return called


def training(*rows: BoolArray, unknown: int | None = None) -> TrainingReports:
    """Scans `0`, `1`, …; all labels of the scan `unknown` are unknown."""
    labels = np.stack(rows).astype(np.int8)
    if unknown is not None:
        labels[unknown] = UNKNOWN_LABEL
    return TrainingReports([str(number) for number in range(len(rows))], labels)


def choose(
    calls: list[BoolArray],
    table: TrainingReports,
    cases: list[CaseRecord] | None = None,
    neighbors: list[CaseRecord] | None = None,
) -> BaselineReports:
    cases = cases or [case([1, 0])] * len(calls)
    return choose_baseline_reports(np.stack(calls), cases, table, neighbors or [])


def test_the_table_has_the_report_of_the_same_findings_or_of_the_most_alike() -> None:
    table = training(findings(), findings(1, 2), findings(1, 2, 3), findings(1, 2))
    calls = [findings(1, 2), findings(1, 2, 3), findings(5), findings(1, 2, 3, 4, 5)]
    assert choose(calls, table).texts["table"] == ["1", "2", "0", "2"]
    # Equally far from both: the first in the shards.
    assert choose([findings(1)], training(findings(), findings(1, 2))).texts["table"] == ["0"]
    # What is unknown agrees with nothing.
    table = training(findings(), findings(*range(17)), unknown=0)
    assert choose([findings()], table).texts["table"] == ["1"]


def test_prevalence_gives_all_cases_the_report_of_the_usual_findings() -> None:
    table = training(findings(), findings(1, 2), findings(1, 2, 3), findings(1), unknown=0)
    reports = choose([findings(), findings(4)], table)
    assert reports.texts["prevalence"] == ["1", "1"]  # 1 in three of three, 2 in two, 3 in one
    assert reports.sources["prevalence"] == "4 training scans"


def test_the_nearest_report_is_that_of_the_largest_cosine_and_lengths_do_not_count() -> None:
    neighbors = [case([9, 9], "both"), case([0.1, 0], "first"), case([0, 1], None)]
    cases = [case([3, 0.1]), case([0, 5]), case([0, 0])]
    reports = choose([findings()] * 3, training(findings()), cases, neighbors)
    assert reports.texts["nearest"] == ["first", "both", "both"]
    assert reports.sources["nearest"] == "the first 2 training volumes"


def test_what_cannot_be_learned_is_left_out_with_its_reason() -> None:
    reports = choose([findings()], training(findings()), neighbors=[case([1, 0], None)])
    assert set(reports.texts) == {"table", "prevalence"}
    assert "has a report" in reports.left_out["nearest"]
    empty = TrainingReports([], np.zeros((0, N_FINDINGS), np.int8))
    assert set(choose([findings()], empty).left_out) == {"table", "prevalence", "nearest"}


def test_training_reports_are_those_of_the_scans(tiny: Config, tmp_path: Path) -> None:
    sample = phantom_sample(0, tiny, "train")
    first = replace(sample.meta, labels=sample.meta.labels | {"Cardiomegaly": None})
    metas = [
        first,
        replace(first, key="again", findings="Another kernel."),
        replace(first, key="silent", scan="silent", findings=None, impression=None),
        replace(first, key="other", scan="other", findings="None.", impression=None),
    ]
    write_shards([replace(sample, meta=meta) for meta in metas], tmp_path)
    locations = read_index(tmp_path).select_split("train")
    table = read_training_reports(ShardStore(tmp_path), locations)
    both = f"Findings: {first.findings}\nImpression: {first.impression}"
    assert table.texts == [both, "Findings: None."]
    expected = [first.labels[name] for name in FINDINGS]
    expected[FINDINGS.index("Cardiomegaly")] = UNKNOWN_LABEL
    assert table.labels.tolist() == [expected] * 2 and 1 in expected


def report_figures(intervals: dict[str, list[float] | None]) -> JsonObject:
    difference: JsonObject = {"bleu_4": 0.1, "laterality": 0.2, "clinical_labels_crg": -0.2}
    if intervals:
        difference["ci95"] = intervals
    return {"baselines": {"table": {"difference": difference}}}


def test_one_sentence_says_in_what_the_language_model_beats_the_table() -> None:
    mixed: dict[str, list[float] | None] = {
        "bleu_4": [0.01, 0.2],
        "laterality": [0.1, 0.3],
        "meteor": [-0.1, 0.1],
        "clinical_labels_crg": [-0.3, -0.1],
        "cider": None,
    }
    sentence = describe_table_comparison(report_figures(mixed))
    better = "BLEU-4 +0.100 [0.010, 0.200], laterality +0.200 [0.100, 0.300]"
    assert f"beats the classifier with a table of texts in {better};" in sentence
    assert "the table beats it in findings by labels, CRG -0.200 [-0.300, -0.100] (" in sentence
    none = describe_table_comparison(report_figures({"bleu_4": [0.0, 0.2]}))
    assert "in none of 1 scores (difference" in none
    assert "is unknown: there are no intervals" in describe_table_comparison(report_figures({}))
    without: JsonObject = {"baselines": {}, "left_out_baselines": {"table": "nothing is there"}}
    assert describe_table_comparison(without).endswith(
        "the table is left out, as nothing is there."
    )


def test_training_cases_are_embedded_where_thresholds_come_from_others(
    tiny_run: Callable[[int], Path], tiny: Config, tmp_path: Path
) -> None:
    splits = ["train", "train", "train", "dev", "valid"]
    samples = [phantom_sample(seed, tiny, split) for seed, split in enumerate(splits)]
    write_shards(samples, tmp_path / "shards")
    folder = tmp_path / "checkpoint"
    shutil.copytree(run_folder.find_checkpoint(tiny_run(3), ""), folder)

    def evaluate(**options: Any) -> JsonObject:
        settings = EvaluationOptions(plots=False, bootstrap=0, fit_limit=2, **options)
        out = tmp_path / "out" / "metrics.json"
        result = evaluate_checkpoint(
            folder, tmp_path / "shards", out, device="cpu", options=settings
        )
        assert result is not None and result.reports is not None
        return result.reports

    reports = evaluate()
    assert reports["baselines"]["nearest"]["source"] == "the first 2 training volumes"
    assert reports["baselines"]["table"]["source"] == "3 training scans"
    assert "is unknown: there are no intervals" in describe_table_comparison(reports)

    (tmp_path / "shards" / "train-000000.tar").unlink()
    reports = evaluate()  # the records are there
    assert reports["baselines"] == {}
    assert all("No such file" in reason for reason in reports["left_out_baselines"].values())
    assert "left out, as training cases cannot be read" in render_baselines(reports)
