"""Thresholds of an evaluation: fitted, or those of the model."""

import numpy as np

from rectvlm.evaluate.case_records import CaseRecord
from rectvlm.evaluate.thresholds import choose_thresholds
from rectvlm.finding_thresholds import NOT_FITTED, FindingThresholds
from rectvlm.labels import FINDINGS, N_FINDINGS

UNKNOWN = FINDINGS[3]


def cases(
    n: int, seed: int = 0, known: bool = True, regions: str | None = "drawn"
) -> list[CaseRecord]:
    """Cases of the train split: one finding is never known; with `known` False none is."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        labels: list[int | None] = [
            None if name == UNKNOWN or not known else i % 2 for name in FINDINGS
        ]
        probabilities = rng.random(len(FINDINGS)).tolist()
        name = f"case_{i}"
        found.append(
            CaseRecord(
                "fit", i, name, name, name, probabilities, labels, [], None, None, None, regions
            )
        )
    return found


MODEL = FindingThresholds(
    np.full(N_FINDINGS, 0.31), np.ones(N_FINDINGS, dtype=bool), "the model's own", 9
)


def test_without_cases_that_decide_the_thresholds_are_the_models() -> None:
    for fitting in ([], cases(9, known=False)):
        assert choose_thresholds(MODEL, fitting, "train split of shards") is MODEL


def test_a_finding_that_was_not_fitted_keeps_the_models_threshold() -> None:
    thresholds = choose_thresholds(MODEL, cases(24), "train split of shards")
    assert thresholds.by_finding()[UNKNOWN] == 0.31
    assert thresholds.n_cases == 24 and "train split of shards" in thresholds.source
    assert f"; the model's for {UNKNOWN};" in thresholds.source
    assert len(set(thresholds.values)) > 9


def test_thresholds_that_know_the_evaluated_cases_are_not_kept() -> None:
    thresholds = choose_thresholds(MODEL, cases(24), "train split of shards", fallback=NOT_FITTED)
    assert thresholds.by_finding()[UNKNOWN] == 0.5 and thresholds.not_fitted == [UNKNOWN]
    assert f"; 0.5 for {UNKNOWN};" in thresholds.source
    for fitting in ([], cases(9)):
        assert choose_thresholds(MODEL, fitting, "train split", fallback=NOT_FITTED) is NOT_FITTED


def test_a_threshold_that_no_data_decided_is_one_half() -> None:
    thresholds = choose_thresholds(NOT_FITTED, cases(24), "train split of shards")
    assert thresholds.not_fitted == [UNKNOWN] and thresholds.by_finding()[UNKNOWN] == 0.5


def test_a_finding_of_few_positives_keeps_the_models_threshold() -> None:
    """A wrong label among many would put the threshold at the probability of that case."""
    fitting = cases(40)
    rare = FINDINGS[5]
    for number, record in enumerate(fitting):
        record.labels[5] = int(number < 9)
        record.probabilities[5] = 0.01 + number / 10_000
    thresholds = choose_thresholds(MODEL, fitting, "train split of shards")
    assert thresholds.by_finding()[rare] == 0.31 and rare in thresholds.source
    fitting[9].labels[5] = 1
    thresholds = choose_thresholds(MODEL, fitting, "train split of shards")
    assert rare not in thresholds.source and thresholds.by_finding()[rare] < 0.02


def test_thresholds_say_which_region_maps_their_cases_had() -> None:
    drawn, without = cases(20)[:1], cases(20, regions=None)[3:]
    fitting = [*drawn, *cases(20, regions="coarse")[1:3], *without]
    source = choose_thresholds(MODEL, fitting, "train split of shards").source
    assert source.endswith("region maps: 3 volumes, 2 of them coarse")
    source = choose_thresholds(
        MODEL, cases(20, regions=None), "train split of shards", regions_hidden=True
    ).source
    assert source.endswith("region maps: hidden, as in prediction")
