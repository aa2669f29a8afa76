"""Whether a probability of 0.3 is right three times in ten: expected calibration error, Brier score and their bins."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]

CALIBRATION_BINS = 15
"""Bins of equal width, as in Guo et al. 2017."""


@dataclass(frozen=True)
class ReliabilityBins:
    """Sums over the cases of each bin, for each resample. R resamples, K bins."""

    case_counts: FloatArray
    """(R, K) cases."""
    probability_sums: FloatArray
    """(R, K) sum of probabilities."""
    positive_counts: FloatArray
    """(R, K) cases with the finding."""

    def expected_calibration_error(self) -> FloatArray:
        """Expected calibration error (R,): mean over cases of |mean probability − share of positives| in their bin.

        NaN without cases.
        """
        total = self.case_counts.sum(axis=1)
        gaps = np.abs(self.probability_sums - self.positive_counts).sum(axis=1)
        return np.divide(gaps, total, out=np.full(len(total), np.nan), where=total > 0)


def compute_reliability(
    weights: FloatArray, probabilities: FloatArray, truth: BoolArray, n_bins: int = CALIBRATION_BINS
) -> ReliabilityBins:
    """Probabilities of one finding against how often it was there.

    The binary form of the expected calibration error: Guo et al. 2017, equation 5, on the probability of the finding
    instead of that of the likelier class, as in torchmetrics' `BinaryCalibrationError` (norm l1). Bin k holds the
    probabilities in [k/bins, (k+1)/bins), the last one 1 as well.

    Args:
        weights: (R, N), how often each case counts in each resample.
        probabilities: (N,).
        truth: (N,).
    """
    place = np.clip(
        np.searchsorted(np.linspace(0, 1, n_bins + 1), probabilities, side="right") - 1,
        0,
        n_bins - 1,
    )
    member = np.zeros((len(probabilities), n_bins))
    member[np.arange(len(probabilities)), place] = 1
    return ReliabilityBins(
        weights @ member,
        weights @ (member * probabilities[:, None]),
        weights @ (member * truth[:, None]),
    )
