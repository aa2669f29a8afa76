"""Tests between two models on the same cases: paired, by patient, corrected for many figures.

Approximate randomization (Noreen 1989; Yeh 2000) exchanges the results of A and B for a random half
of the patients and computes every figure again: where the models are alike, the exchange changes
nothing but chance. Figures are corrected together by the step-down maxT procedure (Westfall and
Young 1993; Ge, Dudoit and Speed 2003, box 2), which uses the same exchanges, so that figures that
say the same count once.

The cases of A and of B stand in one row of 2N columns. A model is then a row of weights: every
metric that takes resamples takes exchanges, too.

Shapes: N cases, R exchanges, F figures.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from rectvlm.metrics.arrays import BoolArray, FloatArray
from rectvlm.metrics.bootstrap import ResampleWeights

SIGNIFICANCE_LEVEL = 0.05
"""Largest chance of one false difference or more among all figures of a comparison."""
_ROUNDING = 1e-9
"""Relative error of a figure below which two values count as equal."""


def draw_patient_swaps(patients: Sequence[str], n: int, seed: int = 0) -> BoolArray:
    """Draw for each exchange the cases whose results A and B swap: all of a patient's, or none.

    Args:
        patients: patient of each case, (N,).
        n: number of exchanges.
        seed: seed of the draw.

    Returns:
        Whether each case is swapped, (n, N).
    """
    _, patient_index = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    n_patients = int(patient_index.max()) + 1
    is_swapped = np.random.default_rng(seed).integers(0, 2, (n, n_patients), dtype=np.uint8)
    return is_swapped.astype(bool)[:, patient_index]


def stack_pair_weights(resamples: ResampleWeights, swaps: BoolArray) -> ResampleWeights:
    """Weights of model A over the cases of A, then those of B.

    The first row has each case of A once, the next ones are the resamples, the last ones the
    exchanges. Those of model B are the same with both halves of the columns exchanged.

    Args:
        resamples: how often each case counts in each resample, (B, N).
        swaps: whether each case is swapped in each exchange, (R, N).

    Returns:
        Weights, (1 + B + R, 2N).
    """
    n_cases = swaps.shape[1]
    of_a = np.concatenate([np.ones((1, n_cases)), resamples, ~swaps])
    of_b = np.concatenate([np.zeros((1 + len(resamples), n_cases)), swaps])
    return np.concatenate([of_a, of_b], axis=1, dtype=np.uint16, casting="unsafe")


def rank_scores(probabilities: FloatArray, known: BoolArray) -> FloatArray:
    """Replace the probabilities of each finding by their ranks among the known cases, 0 to 1.

    AUROC and average precision are the same of ranks. Only ranks may be exchanged between two
    models: probabilities of another calibration would be mixed (Bandos, Rockette and Gur 2005).

    Args:
        probabilities: predicted probabilities of one model, (N, 18).
        known: whether each label is known, (N, 18).
    """
    ranks = np.zeros(probabilities.shape)
    for i in range(probabilities.shape[1]):
        cases = known[:, i]
        ranks[cases, i] = rankdata(probabilities[cases, i]) / max(1, cases.sum())
    return ranks


def randomization_p_values(differences: FloatArray, exchanged: FloatArray) -> FloatArray:
    """Two-sided p-value of each figure alone: (1 + exchanges at least as far from 0) / (1 + R).

    Args:
        differences: A minus B, (F,).
        exchanged: A minus B in each exchange, (R, F).

    Returns:
        p-values, (F,).
    """
    statistics, null_statistics = _standardize(differences, exchanged)
    return _p_values(statistics, null_statistics)


def max_t_p_values(differences: FloatArray, exchanged: FloatArray) -> FloatArray:
    """p-value of each figure, corrected for all: step-down maxT (Ge, Dudoit and Speed 2003, box 2).

    A figure is compared with the largest of all figures that are not more significant, in each
    exchange. The chance of one false difference or more is then at most the level, whatever the
    figures have in common. Arguments as for `randomization_p_values`.

    Returns:
        Corrected p-values, (F,).
    """
    statistics, null_statistics = _standardize(differences, exchanged)
    order = np.argsort(-statistics, kind="stable")
    from_the_least = null_statistics[:, order[::-1]]
    largest = np.maximum.accumulate(from_the_least, axis=1)[:, ::-1]
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(_p_values(statistics[order], largest))
    return corrected


def _standardize(differences: FloatArray, exchanged: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Absolute differences over their standard deviation; 0 where it is 0.

    The deviation is over the exchanges and the pair as it is: where the models are alike these are
    interchangeable, so the level is exact.
    """
    scale = np.sqrt((exchanged**2).sum(axis=0) + differences**2) / np.sqrt(1 + len(exchanged))
    is_constant = scale <= _ROUNDING
    scale = np.where(is_constant, 1.0, scale)
    statistics = np.where(is_constant, 0.0, np.abs(differences) / scale)
    null_statistics = np.where(is_constant, 0.0, np.abs(exchanged) / scale)
    return statistics, null_statistics


def _p_values(statistics: FloatArray, null_statistics: FloatArray) -> FloatArray:
    at_least = null_statistics >= statistics * (1 - _ROUNDING)
    return (1 + at_least.sum(axis=0)) / (1 + len(null_statistics))
