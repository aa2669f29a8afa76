"""Confidence intervals by the bootstrap, with patients as the unit that is drawn.

Scans of one patient are alike, so drawing scans would make intervals too narrow. A resample is a
weight for each case: how often its patient was drawn. Every metric here takes a matrix of such
weights, one row a resample, and returns one value a row, so a thousand resamples are a few matrix
products, and two models on the same weights are a paired comparison.

`scipy.stats.bootstrap` draws observations and hands a statistic the drawn values. Here a draw is a
patient with any number of scans, a label may be unknown, a resample may lack one class (it is left
out, where scipy would return NaN for the whole interval), and one draw must serve all figures.

Shapes: R resamples, N cases.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rectvlm.metrics.arrays import BoolArray, FloatArray, divide_or_nan

ResampleWeights = NDArray[np.uint16]
"""How often each case counts in each resample, (R, N)."""

CONFIDENCE_LEVEL = 0.95
CHUNK_ELEMENTS = 4_000_000
"""Number of weights that are converted to float64 at a time: 32 MB."""


def draw_patient_weights(patients: Sequence[str], n: int, seed: int = 0) -> ResampleWeights:
    """Draw n resamples of the patients.

    Args:
        patients: patient of each case, (N,).
        n: number of resamples.
        seed: seed of the draw.

    Returns:
        How often each case counts, (n, N); the same for the same patients, n and seed.
    """
    assert n >= 0
    _, patient_index = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    n_patients = int(patient_index.max()) + 1 if len(patient_index) else 0
    if not n_patients:
        return np.zeros((n, 0), np.uint16)
    shares = np.full(n_patients, 1 / n_patients)
    draws = np.random.default_rng(seed).multinomial(n_patients, shares, size=n)
    return draws.astype(np.uint16)[:, patient_index]


def iterate_chunks(weights: ResampleWeights) -> Iterator[FloatArray]:
    """Yield the resamples as float64, so many at a time that memory stays bounded."""
    rows = max(1, CHUNK_ELEMENTS // max(1, weights.shape[1]))
    for start in range(0, len(weights), rows):
        yield weights[start : start + rows].astype(np.float64)


def percentile_interval(samples: FloatArray, level: float = CONFIDENCE_LEVEL) -> list[float] | None:
    """Percentile interval of the values of resamples (Efron & Tibshirani 1993, ch. 13).

    None where fewer than half of the resamples have a value, as for a finding with one positive
    patient.

    Args:
        samples: value of each resample, (R,); NaN where it has none.
        level: share of the values between the bounds.
    """
    known = samples[np.isfinite(samples)]
    if len(known) < max(1, (len(samples) + 1) // 2):
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return [float(low), float(high)]


def weighted_ratio(
    weights: FloatArray, numerator: FloatArray, denominator: FloatArray
) -> FloatArray:
    """Weighted sum over weighted sum, for each resample; NaN where the denominator is 0.

    A mean over the cases that have a value is the ratio of (value or 0) to (1 or 0); precision is
    the ratio of true positives to calls.

    Args:
        weights: how often each case counts, (R, N).
        numerator: summand of each case, (N,) or (N, K).
        denominator: summand of each case, of the same shape.
    """
    return divide_or_nan(weights @ numerator, weights @ denominator)


def auroc(weights: FloatArray, scores: FloatArray, truth: BoolArray) -> FloatArray:
    """Area under the ROC curve of each resample, (R,).

    The share of positive-negative pairs in order, ties one half; NaN where a resample holds one
    class only. Equal to scikit-learn's with `sample_weight`.

    Args:
        weights: how often each case counts, (R, N).
        scores: predicted scores, (N,).
        truth: whether each case is positive, (N,).
    """
    positives, negatives = _weights_by_score(weights, scores, truth)
    # From the highest score down: a negative is in order with the positives above it, and half
    # with those beside it.
    positives_above = np.cumsum(positives, axis=1) - positives
    ordered_pairs = (negatives * (positives_above + positives / 2)).sum(axis=1)
    return divide_or_nan(ordered_pairs, positives.sum(axis=1) * negatives.sum(axis=1))


def average_precision(weights: FloatArray, scores: FloatArray, truth: BoolArray) -> FloatArray:
    """Average precision of each resample, (R,).

    Precision at each threshold, weighted by the recall that it adds; NaN where a resample has no
    positive. Equal to scikit-learn's with `sample_weight`. Arguments as for `auroc`.
    """
    positives, negatives = _weights_by_score(weights, scores, truth)
    true_positives = np.cumsum(positives, axis=1)
    calls = np.cumsum(positives + negatives, axis=1)
    precision = np.divide(true_positives, calls, out=np.zeros_like(calls), where=calls > 0)
    return divide_or_nan((precision * positives).sum(axis=1), positives.sum(axis=1))


def _weights_by_score(
    weights: FloatArray, scores: FloatArray, truth: BoolArray
) -> tuple[FloatArray, FloatArray]:
    """Weights of the positives and the negatives at each distinct score, the highest first.

    Returns:
        Two arrays (R, number of distinct scores).
    """
    order = np.argsort(-scores, kind="stable")
    if not len(order):
        empty = np.zeros((len(weights), 0))
        return empty, empty
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    weights, truth = weights[:, order], truth[order]
    positives = np.add.reduceat(weights * truth, starts, axis=1)
    negatives = np.add.reduceat(weights * ~truth, starts, axis=1)
    return positives, negatives
