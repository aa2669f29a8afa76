"""Sizes that a report states: which finding they measure, and whether they agree."""

import numpy as np
import pytest

from rectvlm.metrics.report_labeler.stated_sizes import (
    SIZE_OUTCOMES,
    count_size_outcomes,
    read_sizes,
    score_sizes,
    size_accuracy,
)


@pytest.mark.parametrize(
    ("report", "sizes"),
    [
        ("A 12 mm nodule in the left lung.", {"Lung nodule": 12}),
        ("Nodule measuring 1.2 cm in the left lung.", {"Lung nodule": 12}),
        ("Nodule, 1,2 cm.", {"Lung nodule": 12}),
        ("A 12-mm nodule.", {"Lung nodule": 12}),
        ("Nodule of 9x12 mm.", {"Lung nodule": 12}),
        ("Nodule of 9 × 7 × 1.5 cm.", {"Lung nodule": 90}),
        ("Nodules of 4 mm and 7 mm.", {"Lung nodule": 7}),
        ("Nodules of 5 to 8 mm.", {"Lung nodule": 8}),
        (
            "12 mm solid nodule; pleural effusion up to 3 cm thick.",
            {"Lung nodule": 12, "Pleural effusion": 30},
        ),
        ("In the right lung, a 12 mm in diameter nodule.", {"Lung nodule": 12}),
        ("Nodule. A 15 mm cyst in the liver.", {"Lung nodule": None, "Liver cyst": 15}),
        ("Ascending aorta is 45 mm in diameter and is aneurysmatic.", {"Aortic dilatation": 45}),
        ("Possible 6 mm nodule.", {"Lung nodule": 6}),
        ("No nodule larger than 3 mm.", {}),
        ("Nodules less than 3 mm.", {"Lung nodule": None}),
        ("The nodule decreased from 12 mm to 8 mm.", {"Lung nodule": 8}),
        ("Nodule (previously 6 mm) measures 8 mm.", {"Lung nodule": 8}),
        ("A nodule 5 mm from the pleura.", {"Lung nodule": None}),
        ("Nodule in the lung.\nSize 8 mm.", {"Lung nodule": None}),
    ],
)
def test_a_size_belongs_to_the_finding_that_it_measures(
    report: str, sizes: dict[str, float | None]
) -> None:
    assert read_sizes(report) == pytest.approx(sizes)


@pytest.mark.parametrize(
    ("generated", "reference", "outcome"),
    [
        ("Nodule of 10 mm.", "Nodule of 1.2 cm.", "within"),  # 2 mm
        ("Nodule of 9 mm.", "Nodule of 1.2 cm.", "outside"),
        ("Nodule of 24 mm.", "Nodule of 30 mm.", "within"),  # 20%
        ("Nodule of 23 mm.", "Nodule of 30 mm.", "outside"),
        ("Nodule in the lung.", "Nodule of 30 mm.", "unstated"),
        ("No nodule.", "Nodule of 30 mm.", "not_mentioned"),
    ],
)
def test_sizes_agree_within_two_mm_or_a_fifth(generated: str, reference: str, outcome: str) -> None:
    counts = count_size_outcomes([generated], [reference])
    totals = dict(zip(SIZE_OUTCOMES, counts.sum(axis=(0, 1)), strict=True))
    assert totals == {name: int(name == outcome) for name in SIZE_OUTCOMES}


def test_what_the_reference_does_not_measure_counts_nowhere() -> None:
    counts = count_size_outcomes(["Nodule of 5 mm."] * 2, ["Nodule.", None])
    assert not counts.any() and size_accuracy(counts) is None


def test_a_missed_finding_is_counted_apart_from_a_wrong_size() -> None:
    generated = ["Nodule of 12 mm.", "Nodule of 30 mm.", "Lungs are clear.", "Nodule."]
    counts = count_size_outcomes(generated, ["Nodule of 12 mm."] * 4)
    scores = score_sizes(counts)
    assert scores["accuracy"] == pytest.approx(1 / 3) == size_accuracy(counts)
    assert scores["n"] == 3 and scores["n_not_mentioned"] == 1
    assert list(scores["per_finding"]) == ["Lung nodule"]
    # Resamples add rows up.
    twice = size_accuracy(np.tensordot(np.array([2, 0, 1, 1]), counts, axes=1)[None])
    assert twice == pytest.approx(2 / 3)
