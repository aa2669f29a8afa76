"""Intervals by the bootstrap, with patients as the unit that is drawn.

Scans of one patient are alike, so drawing scans would make intervals too narrow. A resample is a weight for each case:
how often its patient was drawn. Every metric here takes a matrix of such weights, one row a resample, and gives one
value a row, so a thousand resamples are a few matrix products, and two models on the same weights are a paired
comparison.

`scipy.stats.bootstrap` draws observations and hands a statistic the drawn values. Here a draw is a patient with any
number of scans, a label may be unknown, a resample may lack one class (it is left out, where scipy would give NaN for
the whole interval), and one draw must serve all figures.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
ResampleWeights = NDArray[np.uint16]

CONFIDENCE_LEVEL = 0.95
CHUNK_ELEMENTS = 4_000_000
"""Weights that are turned into float64 at a time: 32 MB."""


def draw_patient_weights(patients: Sequence[str], n: int, seed: int = 0) -> ResampleWeights:
    """How often each case counts in each of n resamples of the patients.

    Args:
        patients: of each case (N,).

    Returns:
        (n, N) uint16; the same for the same patients, n and seed.
    """
    assert n >= 0
    _, index = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    if not count:
        return np.zeros((n, 0), np.uint16)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=n)
    return drawn.astype(np.uint16)[:, index]


def iterate_chunks(weights: ResampleWeights) -> Iterator[FloatArray]:
    """The rows of a matrix of weights as float64, some at a time."""
    rows = max(1, CHUNK_ELEMENTS // max(1, weights.shape[1]))
    for start in range(0, len(weights), rows):
        yield weights[start : start + rows].astype(np.float64)


def percentile_interval(samples: FloatArray, level: float = CONFIDENCE_LEVEL) -> list[float] | None:
    """The middle `level` of the values of resamples: the percentile interval (Efron & Tibshirani 1993, ch. 13).

    None where fewer than half of the resamples have a value, as for a finding with one positive patient.
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

    A mean over the cases that have a value is the ratio of (value or 0) to (1 or 0); precision is that of true
    positives to calls.

    Args:
        weights: (R, N).
        numerator: (N,) or (N, K).
        denominator: the same shape.
    """
    top, bottom = weights @ numerator, weights @ denominator
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def auroc(weights: FloatArray, scores: FloatArray, truth: BoolArray) -> FloatArray:
    """Area under the ROC curve of each resample (R,): the share of positive-negative pairs in order, ties one half.

    NaN where a resample holds one class only. Equal to scikit-learn's with `sample_weight`.

    Args:
        weights: (R, N).
        scores: (N,).
        truth: (N,).
    """
    positive, negative = _weights_by_score(weights, scores, truth)
    # From the highest score down: a negative is in order with the positives above it, and half with those beside it.
    above = np.cumsum(positive, axis=1) - positive
    ordered = (negative * (above + positive / 2)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    return np.divide(ordered, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def average_precision(weights: FloatArray, scores: FloatArray, truth: BoolArray) -> FloatArray:
    """Average precision of each resample (R,): precision at each threshold, weighted by the recall that it adds.

    NaN where a resample has no positive. Equal to scikit-learn's with `sample_weight`. Arguments as for `auroc`.
    """
    positive, negative = _weights_by_score(weights, scores, truth)
    true, called = np.cumsum(positive, axis=1), np.cumsum(positive + negative, axis=1)
    precision = np.divide(true, called, out=np.zeros_like(true), where=called > 0)
    total = positive.sum(axis=1)
    return np.divide(
        (precision * positive).sum(axis=1),
        total,
        out=np.full(len(weights), np.nan),
        where=total > 0,
    )


def _weights_by_score(
    weights: FloatArray, scores: FloatArray, truth: BoolArray
) -> tuple[FloatArray, FloatArray]:
    """Weight of the positives and of the negatives at each distinct score, the highest first: (R, distinct)."""
    order = np.argsort(-scores, kind="stable")
    if not len(order):
        empty = np.zeros((len(weights), 0))
        return empty, empty
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    ordered, true = weights[:, order], truth[order]
    return np.add.reduceat(ordered * true, starts, axis=1), np.add.reduceat(
        ordered * ~true, starts, axis=1
    )
