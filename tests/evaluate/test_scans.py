"""Results count scans: reconstructions are averaged, and a scan is there once."""

from dataclasses import replace

import numpy as np

from rectvlm.evaluate.case_records import CASE_RECORD_ADAPTER, CaseRecord, LesionRecord
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.evaluate.scans import group_by_scan
from rectvlm.evaluate.summary import summarize_lesions
from rectvlm.labels import LESIONS, N_FINDINGS
from rectvlm.metrics.lesions import LesionComparison
from rectvlm.types import (
    PHANTOM_OUTLINES,
    REXGROUNDING_OUTLINES,
    TOTALSEGMENTATOR_OUTLINES,
)


def lesion(
    both: int,
    predicted: int,
    truth: int,
    grid: tuple[int, int, int] = (1, 1, 1),
    source: str = PHANTOM_OUTLINES,
) -> LesionRecord:
    comparison = LesionComparison(both, predicted, truth, None, 0.0, 1, 1, 0, 0, 0.0)
    return LesionRecord(comparison, grid, "shard", source)


def volume(
    position: int, key: str, probability: float, label: int | None, text: str | None = None
) -> CaseRecord:
    scan = key.rpartition("_")[0]
    return CaseRecord(
        purpose="evaluate",
        position=position,
        key=key,
        scan=scan,
        patient=scan.rpartition("_")[0],
        probabilities=[probability] * N_FINDINGS,
        labels=[label] * N_FINDINGS,
        lesions=[None] * len(LESIONS),
        reference="Findings: none." if text else None,
        generated=text,
        without_image=text,
        regions=None,
    )


def test_reconstructions_of_a_scan_are_averaged() -> None:
    records = [
        volume(2, "train_2_a_1", 0.3, 0),
        volume(0, "train_1_a_1", 0.2, 1),
        volume(1, "train_1_a_2", 0.6, None),
        volume(3, "train_1_b_1", 0.9, None),
    ]
    scans = group_by_scan(records)
    assert scans.names == ["train_1_a", "train_2_a", "train_1_b"]
    assert scans.patients == ["train_1", "train_2", "train_1"]
    assert np.allclose(scans.probabilities[:, 0], [0.4, 0.3, 0.9])
    # One reconstruction knows; another scan of the patient does not.
    assert scans.known[:, 0].tolist() == [True, True, False] and scans.labels[:, 0].tolist() == [
        1,
        0,
        0,
    ]
    assert scans.n_conflicting_labels == 0


def test_reconstructions_that_contradict_each_other_are_unknown() -> None:
    scans = group_by_scan([volume(0, "train_1_a_1", 0.2, 1), volume(1, "train_1_a_2", 0.6, 0)])
    assert (
        not scans.known.any()
        and not scans.labels.any()
        and scans.n_conflicting_labels == N_FINDINGS
    )


def test_lesions_and_reports_of_a_scan_count_once() -> None:
    first, second = (
        volume(0, "train_1_a_1", 0.2, 1),
        volume(1, "train_1_a_2", 0.6, 1, "Clear lungs."),
    )
    second = replace(second, lesions=[lesion(3, 6, 4), *[None] * 4])
    third = replace(
        second,
        position=2,
        key="train_1_a_3",
        lesions=[lesion(0, 6, 4), lesion(1, 1, 1), *[None] * 3],
    )
    scans = group_by_scan([first, second, third])
    numbers, texts = scans.select_report_cases()
    assert numbers.tolist() == [0] and [one.key for one in texts] == ["train_1_a_2"]
    result = summarize_lesions(scans, None, EvaluationOptions())
    rows = [result["per_lesion"][one.key] for one in LESIONS]
    assert [row["n_annotated"] for row in rows] == [1, 1, 0, 0, 0]
    assert rows[0]["dice"] == 0.6 and rows[1]["dice"] == 1


def test_a_lesion_that_a_coarser_native_grid_loses_is_said_and_not_scored() -> None:
    one = replace(
        volume(0, "train_1_a_1", 0.2, 1), lesions=[lesion(0, 0, 0, grid=(0, 0, 1)), *[None] * 4]
    )
    result = summarize_lesions(group_by_scan([one]), None, EvaluationOptions())
    row = result["per_lesion"][LESIONS[0].key]
    assert (row["n_lost_on_native_grid"], row["n_annotated"], row["n_empty_agreed"]) == (1, 0, 0)
    assert result["model_grid"]["per_lesion"][LESIONS[0].key]["n_missed"] == 1


def test_figures_against_a_network_and_against_people_stand_apart() -> None:
    network = [lesion(2, 2, 2, source=TOTALSEGMENTATOR_OUTLINES), *[None] * 4]
    people = [lesion(0, 2, 2, source=REXGROUNDING_OUTLINES), lesion(1, 1, 1), *[None] * 3]
    records = []
    for number, lesions in enumerate((network, network, people)):
        record = volume(number, f"train_{number}_a_1", 0.2, 1)
        records.append(replace(record, lesions=lesions))
    weights = np.ones((4, 3))
    result = summarize_lesions(group_by_scan(records), weights, EvaluationOptions())

    mixed, single = (result["per_lesion"][LESIONS[bit].key] for bit in (0, 1))
    assert mixed["sources"] == {REXGROUNDING_OUTLINES: 1, TOTALSEGMENTATOR_OUTLINES: 2}
    assert mixed["dice"] == 2 / 3
    against = mixed["per_source"]
    assert against[TOTALSEGMENTATOR_OUTLINES]["dice"] == 1
    assert against[TOTALSEGMENTATOR_OUTLINES]["n_cases"] == 2
    assert against[REXGROUNDING_OUTLINES]["dice"] == 0
    assert against[REXGROUNDING_OUTLINES]["ci95"]["dice"] == [0, 0]
    assert single["sources"] == {PHANTOM_OUTLINES: 1}
    assert single["per_source"][PHANTOM_OUTLINES]["dice"] == single["dice"] == 1
    assert result["per_lesion"][LESIONS[2].key]["sources"] == {}
    assert (result["rexgrounding"]["n_findings"], result["rexgrounding"]["dice"]) == (1, 0)


def test_a_record_is_the_same_after_its_file() -> None:
    record = replace(
        volume(7, "train_1_a_1", float(np.float32(0.1)), None, "Ä “text”\nin lines"),
        lesions=[lesion(3, 6, 4), *[None] * 4],
    )
    assert CASE_RECORD_ADAPTER.validate_json(CASE_RECORD_ADAPTER.dump_json(record)) == record
