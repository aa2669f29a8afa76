"""The side of each finding as reports word it, and what becomes of a wrong one."""

import pytest

from rectvlm.metrics.report_labeler.laterality import (
    LOBE_OUTCOMES,
    SIDE_OUTCOMES,
    SIDED_FINDINGS,
    count_lobe_outcomes,
    count_side_outcomes,
    read_lobes,
    read_sides,
    score_laterality,
    score_lobes,
)
from rectvlm.metrics.reports import compute_report_statistics, headline_scores, score_reports

LEFT, RIGHT, BOTH = {"left"}, {"right"}, {"left", "right"}
REFERENCE = (
    "Findings: There is a small left pleural effusion. "
    "A 6 mm nodule is observed in the right upper lobe. "
    "Consolidation and ground-glass opacity in the left lower lobe."
)
SWAPPED = REFERENCE.replace("left", "RIGHT").replace("right", "left").replace("RIGHT", "right")


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("Left-sided pleural effusion.", {"Pleural effusion": LEFT}),
        ("Pleural effusion (right).", {"Pleural effusion": RIGHT}),
        ("Effusion in the right pleural space.", {"Pleural effusion": RIGHT}),
        ("Bilateral pleural effusions, larger on the right.", {"Pleural effusion": BOTH}),
        ("Pleural effusion is observed bilaterally.", {"Pleural effusion": BOTH}),
        ("Nodules are observed in both lungs.", {"Lung nodule": BOTH}),
        ("Bibasilar atelectasis.", {"Atelectasis": BOTH}),
        ("A nodule in the lingula.", {"Lung nodule": LEFT}),
        (
            "Middle lobe atelectasis and an opacity in the RLL.",
            {"Atelectasis": RIGHT, "Lung opacity": RIGHT},
        ),
        ("Nodules in the right upper lobe, right middle lobe and lingula.", {"Lung nodule": BOTH}),
        ("Nodule in the left lung. Another nodule in the right lung.", {"Lung nodule": BOTH}),
        (
            "Left lower lobe nodule and right pleural effusion.",
            {"Lung nodule": LEFT, "Pleural effusion": RIGHT},
        ),
        (
            "Nodule in the right lung, effusion on the left.",
            {"Lung nodule": RIGHT, "Pleural effusion": LEFT},
        ),
        (
            "There is no pericardial effusion and the left lung has a 12 x 9 mm nodule.",
            {"Lung nodule": LEFT},
        ),
        (
            "Left effusion with adjacent atelectasis.",
            {"Pleural effusion": LEFT, "Atelectasis": LEFT},
        ),
        (
            "In the left lung, a nodule and bronchiectasis are seen.",
            {"Lung nodule": LEFT, "Bronchiectasis": LEFT},
        ),
        (
            "On the right, effusion; on the left, atelectasis.",
            {"Pleural effusion": RIGHT, "Atelectasis": LEFT},
        ),
        ("No effusion on the right, but a small effusion on the left.", {"Pleural effusion": LEFT}),
        ("Nodule in the left lung; the right lung is free of nodules.", {"Lung nodule": LEFT}),
        ("Possible nodule in the left upper lobe.", {"Lung nodule": LEFT}),
        # Where something is moved to.
        (
            "Left pleural effusion displacing the mediastinum to the right.",
            {"Pleural effusion": LEFT},
        ),
        (
            "The mediastinum is shifted to the right by a left pleural effusion.",
            {"Pleural effusion": LEFT},
        ),
        ("Mediastinum deviates right due to left pleural effusion.", {"Pleural effusion": LEFT}),
        ("Trachea deviated to the left and right pleural effusion.", {"Pleural effusion": RIGHT}),
        ("Effusion extending to the right.", {"Pleural effusion": RIGHT}),
        # Words for a side that are not the lungs'.
        ("Pacemaker leads in the right ventricle. Emphysema.", {"Emphysema": set()}),
        ("A nodule is seen. The left lobe of the thyroid is enlarged.", {"Lung nodule": set()}),
        ("Pericardial effusion on the left.", {}),
        ("No nodule in the left lung.", {}),
        ("", {}),
    ],
)
def test_sides_are_those_that_the_report_states(report: str, expected: dict[str, set[str]]) -> None:
    assert read_sides(report) == expected


def test_kept_sides_score_one_and_swapped_ones_nothing() -> None:
    kept, swapped = (
        score_reports([text], [REFERENCE])["laterality"] for text in (REFERENCE, SWAPPED)
    )
    assert (kept["accuracy"], kept["n"], kept["n_correct"]) == (1, 4, 4)
    assert (swapped["accuracy"], swapped["n"], swapped["n_opposite"]) == (0, 4, 4)
    assert swapped["all_findings"]["accuracy"] == 0
    rows = compute_report_statistics([REFERENCE, SWAPPED], [REFERENCE, REFERENCE])
    assert (
        headline_scores(rows)["laterality"] == score_laterality(rows.side_counts)["accuracy"] == 0.5
    )


def test_reports_without_sides_have_no_value() -> None:
    for reference in ("There is a nodule.", "No pleural effusion on the left.", "", None):
        found = score_reports(["Left pleural effusion. Nodule in the right lung."], [reference])[
            "laterality"
        ]
        assert found["accuracy"] is None and found["n"] == 0
        assert found["per_finding"]["Lung nodule"]["accuracy"] is None


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("Nodules in both lungs.", "partial"),
        ("Nodule in the left lung.", "opposite"),
        ("There is a nodule.", "unstated"),
        ("No nodule. Left effusion.", "not_mentioned"),
        ("Right upper lobe nodule.", "correct"),
    ],
)
def test_what_becomes_of_a_side(said: str, outcome: str) -> None:
    counts = count_side_outcomes([said], ["Nodule in the right lung."])
    nodule = counts[0, SIDED_FINDINGS.index("Lung nodule")]
    assert nodule.tolist() == [int(name == outcome) for name in SIDE_OUTCOMES]
    assert counts.sum() == 1
    found = score_laterality(counts)
    # What is not mentioned is a missed finding, not a wrong side.
    assert found["n"] == (outcome != "not_mentioned")
    assert found["accuracy"] == (
        None if outcome == "not_mentioned" else float(outcome == "correct")
    )


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("A 6 mm nodule in the right upper lobe.", {"Lung nodule": {"right_upper"}}),
        ("Middle lobe atelectasis.", {"Atelectasis": {"middle"}}),
        (
            "Consolidation in the left lung lower lobe and a nodule in the lingula.",
            {"Consolidation": {"left_lower"}, "Lung nodule": {"left_upper"}},
        ),
        (
            "Nodule in the lower lobe superior segment of the right lung.",
            {"Lung nodule": {"right_lower"}},
        ),
        ("Bronchiectasis in both lower lobes.", {"Bronchiectasis": {"right_lower", "left_lower"}}),
        ("Nodule in the right lung.", {"Lung nodule": set()}),
        ("No nodule in the right upper lobe.", {}),
    ],
)
def test_lobes_are_those_that_the_report_states(report: str, expected: dict[str, set[str]]) -> None:
    assert read_lobes(report) == expected


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("RUL nodule.", "correct"),
        ("Nodules in the right upper lobe and the middle lobe.", "partial"),
        ("Nodule in the right lower lobe.", "other"),
        ("Nodule in the right lung.", "unstated"),
        ("No nodule.", "not_mentioned"),
    ],
)
def test_the_lobe_is_compared_where_the_reference_states_one(said: str, outcome: str) -> None:
    counts = count_lobe_outcomes([said], ["Nodule in the right upper lobe."])
    nodule = counts[0, SIDED_FINDINGS.index("Lung nodule")]
    assert nodule.tolist() == [int(name == outcome) for name in LOBE_OUTCOMES]
    scores = score_lobes(counts)
    assert scores["n"] == (outcome != "not_mentioned") and scores[f"n_{outcome}"] == 1
    assert scores["per_finding"]["Lung nodule"]["n"] == scores["n"]
    assert not count_lobe_outcomes([said], ["Nodule in the right lung."]).any()
