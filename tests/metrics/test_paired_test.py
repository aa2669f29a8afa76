"""Tests between two models: patients are swapped whole, corrected p-values hold the level."""

import numpy as np
import pytest

from rectvlm.labels import N_FINDINGS
from rectvlm.metrics.bootstrap import auroc
from rectvlm.metrics.paired_test import (
    draw_patient_swaps,
    max_t_p_values,
    randomization_p_values,
    rank_scores,
    stack_pair_weights,
)


def test_all_scans_of_a_patient_are_swapped_or_none() -> None:
    swaps = draw_patient_swaps(["a", "b", "a", "c"], 400)
    assert (swaps[:, 0] == swaps[:, 2]).all() and (swaps[:, 0] != swaps[:, 1]).any()
    assert swaps.mean() == pytest.approx(0.5, abs=0.05)


def test_a_swapped_case_counts_by_the_result_of_the_other_model() -> None:
    resamples = np.array([[2, 0]], np.uint16)
    swaps = np.array([[True, False], [False, False]])
    assert stack_pair_weights(resamples, swaps).tolist() == [
        [1, 1, 0, 0],
        [2, 0, 0, 0],
        [0, 1, 1, 0],
        [1, 1, 0, 0],
    ]


def test_ties_have_equal_ranks_and_unknown_cases_none() -> None:
    probabilities = np.tile([[0.2], [0.5], [0.5], [0.9], [0.7]], N_FINDINGS)
    known = np.ones(probabilities.shape, bool)
    known[4] = False
    ranks = rank_scores(probabilities, known)
    assert ranks[:4, 3] == pytest.approx([0.25, 0.625, 0.625, 1.0])
    # Of the four pairs of a present and an absent finding three are in order, one is a tie.
    truth = np.array([False, True, False, True])
    assert auroc(np.ones((1, 4)), ranks[:4, 3], truth).tolist() == [3.5 / 4]


def test_one_figure_has_the_p_value_that_counting_gives() -> None:
    exchanged = np.array([[1.0], [-2.0], [3.0], [-1.0]])
    for p_values in (randomization_p_values, max_t_p_values):
        assert p_values(np.array([2.0]), exchanged).tolist() == [3 / 5]
        assert p_values(np.array([-9.0]), exchanged).tolist() == [1 / 5]
    assert max_t_p_values(np.zeros(1), np.zeros((4, 1))).tolist() == [1.0]


def test_a_less_significant_figure_has_no_smaller_corrected_p_value() -> None:
    differences = np.array([2.0, 3.0])
    exchanged = np.array([[1.9, 3.0], [1.9, 3.0], [1.9, 0.0], [1.9, 0.0]])
    # In units of their deviations: 1.04 and 1.29.
    assert randomization_p_values(differences, exchanged).tolist() == [1 / 5, 3 / 5]
    assert max_t_p_values(differences, exchanged).tolist() == [3 / 5, 3 / 5]


def test_figures_that_say_the_same_count_once_and_others_count_all() -> None:
    rng = np.random.default_rng(0)
    exchanged = rng.normal(size=(2000, 1))
    observed = np.array([2.5])
    alone = max_t_p_values(observed, exchanged)[0]
    copies = max_t_p_values(observed.repeat(50), exchanged.repeat(50, axis=1))
    assert copies == pytest.approx(alone)
    others = np.concatenate([exchanged, rng.normal(size=(2000, 49))], axis=1)
    corrected = max_t_p_values(np.r_[observed, np.zeros(49)], others)
    assert corrected[0] > 10 * alone


def test_the_corrected_level_holds_over_many_figures() -> None:
    rng = np.random.default_rng(0)
    rejections, uncorrected = 0, 0
    for _ in range(300):
        signs = rng.choice([-1, 1], (200, 40))
        cases = rng.normal(size=(40, 30)) + rng.normal(size=(40, 1))
        differences, exchanged = cases.mean(axis=0), signs @ cases / 40
        rejections += (max_t_p_values(differences, exchanged) <= 0.05).any()
        uncorrected += (randomization_p_values(differences, exchanged) <= 0.05).any()
    assert rejections <= 0.05 * 300 + 3 * np.sqrt(300 * 0.05 * 0.95)
    assert uncorrected > 60, "without correction, one figure in 30 is found by chance"
