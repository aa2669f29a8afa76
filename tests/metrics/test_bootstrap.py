"""Bootstrap by patient and calibration: equal to scikit-learn, torchmetrics and scipy."""

import time

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics import bootstrap
from rectvlm.metrics.bootstrap import (
    auroc,
    average_precision,
    draw_patient_weights,
    percentile_interval,
)
from rectvlm.metrics.calibration import compute_reliability
from rectvlm.metrics.findings import FINDING_SCORES, score_findings

ONES = np.ones((1, 4))


def test_scores_of_the_libraries_own_examples() -> None:
    """scikit-learn's example of both areas; torchmetrics' of the calibration error."""
    truth, scores = np.array([False, False, True, True]), np.array([0.1, 0.4, 0.35, 0.8])
    assert auroc(ONES, scores, truth)[0] == 0.75
    assert average_precision(ONES, scores, truth)[0] == pytest.approx(0.8333333, abs=1e-6)
    probabilities, present = np.array([0.25, 0.25, 0.55, 0.75, 0.75]), np.array([0, 0, 1, 1, 1]) > 0
    assert compute_reliability(
        np.ones((1, 5)), probabilities, present, n_bins=2
    ).expected_calibration_error()[0] == pytest.approx(0.29)


@pytest.mark.parametrize("decimals", [1, 3])
def test_a_resample_scores_as_the_libraries_score_its_cases(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    patients = [f"p{i // 3}" for i in range(60)]
    scores, truth = (
        np.round(rng.random(60), decimals),
        rng.random(60) < 0.4,
    )  # with ties, and with few
    weights = draw_patient_weights(patients, 20, seed=1)
    bins = compute_reliability(weights.astype(float), scores, truth)
    areas, precisions = (
        score(weights.astype(float), scores, truth) for score in (auroc, average_precision)
    )
    for i, weight in enumerate(weights):
        drawn = np.repeat(np.arange(60), weight)
        assert areas[i] == pytest.approx(roc_auc_score(truth[drawn], scores[drawn]))
        assert precisions[i] == pytest.approx(average_precision_score(truth[drawn], scores[drawn]))
        # torchmetrics gives a probability of 1 a bin of its own.
        below = torch.from_numpy(np.minimum(scores[drawn], 1 - 1e-9))
        expected = binary_calibration_error(below, torch.from_numpy(truth[drawn]).int(), n_bins=15)
        assert bins.expected_calibration_error()[i] == pytest.approx(expected.item(), abs=1e-6)


def test_patients_are_drawn_with_all_their_scans() -> None:
    patients = ["a", "b", "a", "c", "b", "a"]
    weights = draw_patient_weights(patients, 500, seed=3)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 0] == weights[:, 5]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert np.array_equal(weights, draw_patient_weights(patients, 500, seed=3))
    assert not np.array_equal(weights, draw_patient_weights(patients, 500, seed=4))


def test_scans_of_one_patient_do_not_narrow_an_interval() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    alone = draw_patient_weights([f"p{i}" for i in range(40)], 1000)
    repeated = draw_patient_weights([f"p{i % 40}" for i in range(200)], 1000)

    def width(weights: np.ndarray, of: np.ndarray) -> float:
        low, high = percentile_interval(
            bootstrap.weighted_ratio(weights.astype(float), of, np.ones(len(of)))
        ) or (0, 0)
        return high - low

    assert width(repeated, np.tile(values, 5)) == pytest.approx(width(alone, values), rel=0.15)


def test_an_interval_is_scipys_where_each_patient_has_one_scan() -> None:
    values = np.random.default_rng(1).gamma(2, size=80)
    weights = draw_patient_weights([f"p{i}" for i in range(80)], 4000)
    found = percentile_interval(
        bootstrap.weighted_ratio(weights.astype(float), values, np.ones(80))
    )
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=0
    ).confidence_interval
    assert found == pytest.approx([theirs.low, theirs.high], abs=0.03)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(70):
        rng = np.random.default_rng(seed)
        truth = rng.random(150) < 0.4
        scores = rng.normal(size=150) + truth  # an AUROC of 0.760
        weights = draw_patient_weights([f"p{i}" for i in range(150)], 200, seed).astype(float)
        low, high = percentile_interval(auroc(weights, scores, truth)) or (0, 0)
        covered += low <= stats.norm.cdf(1 / np.sqrt(2)) <= high
    assert 0.87 <= covered / 70 <= 1


def test_resamples_without_a_value_are_left_out() -> None:
    assert percentile_interval(np.array([np.nan, np.nan, np.nan, 1.0])) is None
    assert percentile_interval(np.array([0.5, np.nan, 0.5])) == [0.5, 0.5]
    one_positive = np.array([True, *[False] * 9])
    areas = auroc(
        draw_patient_weights([f"p{i}" for i in range(10)], 300).astype(float),
        np.linspace(1, 0, 10),
        one_positive,
    )
    assert 0.2 < np.isnan(areas).mean() < 0.5 and np.nanmin(areas) == 1


def _cases(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, N_FINDINGS)) < 0.3).astype(float)
    probabilities = np.clip(0.3 * labels + rng.random((n, N_FINDINGS)) * 0.7, 0, 1)
    return probabilities, labels, rng.random((n, N_FINDINGS)) < 0.8


def test_intervals_of_findings_and_their_means() -> None:
    probabilities, labels, known = _cases(150)
    labels[:, 5], known[:, 6] = 1, False
    weights = draw_patient_weights([f"p{i // 2}" for i in range(150)], 300)
    thresholds = np.full(N_FINDINGS, 0.5)
    plain = score_findings(probabilities, labels, known, thresholds)
    result = score_findings(probabilities, labels, known, thresholds, weights)
    for name, row in result["per_finding"].items():
        assert row["ci95"].keys() == {score for score in FINDING_SCORES if row[score] is not None}
        assert {key: value for key, value in row.items() if key != "ci95"} == plain["per_finding"][
            name
        ]
        if name not in (FINDINGS[5], FINDINGS[6]):
            assert all(
                row["ci95"][score][0] <= row[score] <= row["ci95"][score][1]
                for score in ("auroc", "f1", "accuracy")
            )
    for kind in ("macro", "weighted"):
        low, high = result[kind]["ci95"]["auroc"]
        assert low < result[kind]["auroc"] < high and high - low < 0.1
    here = known[:, 0]
    assert plain["per_finding"][FINDINGS[0]]["brier"] == pytest.approx(
        brier_score_loss(labels[here, 0], probabilities[here, 0])
    )


def test_the_interval_of_a_weighted_mean_is_weighted() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((100, N_FINDINGS)) < np.linspace(0.05, 0.9, N_FINDINGS)).astype(float)
    probabilities, known = rng.random(labels.shape), np.ones(labels.shape, bool)
    weights = draw_patient_weights([f"p{i}" for i in range(100)], 100)
    result = score_findings(probabilities, labels, known, np.full(N_FINDINGS, 0.5), weights)
    weighted, plain = result["weighted"], result["macro"]
    for score in ("average_precision", "f1", "precision"):  # all higher where more have the finding
        low, high = weighted["ci95"][score]
        assert plain["ci95"][score][1] < low <= weighted[score] <= high


def test_average_precision_counts_resamples_of_both_classes_alone() -> None:
    """Without a negative it is 1, whatever the model says."""
    rng = np.random.default_rng(0)
    probabilities, known = rng.random((60, N_FINDINGS)), np.zeros((60, N_FINDINGS), bool)
    labels = np.ones(probabilities.shape)
    known[:, 0], labels[7], probabilities[7] = True, 0, 1.0
    weights = draw_patient_weights([f"p{i}" for i in range(60)], 300)
    result = score_findings(probabilities, labels, known, np.full(N_FINDINGS, 0.5), weights)
    with_both = weights[weights[:, 7] > 0].astype(float)
    assert 0.2 < 1 - len(with_both) / 300 < 0.5
    found = average_precision(with_both, probabilities[:, 0], labels[:, 0] > 0)
    interval = result["per_finding"][FINDINGS[0]]["ci95"]["average_precision"]
    assert interval == pytest.approx(percentile_interval(found))
    assert interval[1] < 1


def test_resamples_of_a_validation_split_take_milliseconds_each() -> None:
    probabilities, labels, known = _cases(1564)
    weights = draw_patient_weights([f"p{int(i / 1.2)}" for i in range(1564)], 200)
    start = time.process_time()
    score_findings(probabilities, labels, known, np.full(N_FINDINGS, 0.5), weights)
    assert time.process_time() - start < 5
