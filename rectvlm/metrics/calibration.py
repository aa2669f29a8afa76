"""Calibration: whether a finding with a probability of 0.3 is there three times in ten."""

from dataclasses import dataclass

import numpy as np

from rectvlm.metrics.arrays import BoolArray, FloatArray, divide_or_nan

CALIBRATION_BINS = 15
"""Number of bins of equal width, as in Guo et al. 2017."""


@dataclass(frozen=True)
class ReliabilityBins:
    """Sums over the cases of each bin in each resample. R resamples, K bins."""

    case_counts: FloatArray
    """Number of cases, (R, K)."""
    probability_sums: FloatArray
    """Sum of the predicted probabilities, (R, K)."""
    positive_counts: FloatArray
    """Number of cases with the finding, (R, K)."""

    def expected_calibration_error(self) -> FloatArray:
        """Expected calibration error of each resample, (R,); NaN without cases.

        The mean over cases of |mean probability − share of positives| in their bin.
        """
        gaps = np.abs(self.probability_sums - self.positive_counts).sum(axis=1)
        return divide_or_nan(gaps, self.case_counts.sum(axis=1))


def compute_reliability(
    weights: FloatArray,
    probabilities: FloatArray,
    truth: BoolArray,
    n_bins: int = CALIBRATION_BINS,
) -> ReliabilityBins:
    """Sort the probabilities of one finding into bins and count how often it was there.

    The binary form of the expected calibration error: Guo et al. 2017, equation 5, on the
    probability of the finding instead of that of the likelier class, as in torchmetrics'
    `BinaryCalibrationError` (norm l1). Bin k holds the probabilities in [k/K, (k+1)/K), the last
    one 1 as well.

    Args:
        weights: how often each case counts in each resample, (R, N).
        probabilities: predicted probabilities, (N,).
        truth: whether each case has the finding, (N,).
        n_bins: number of bins, K.
    """
    edges = np.linspace(0, 1, n_bins + 1)
    bin_of_case = np.clip(np.searchsorted(edges, probabilities, side="right") - 1, 0, n_bins - 1)
    membership = np.zeros((len(probabilities), n_bins))
    membership[np.arange(len(probabilities)), bin_of_case] = 1
    return ReliabilityBins(
        case_counts=weights @ membership,
        probability_sums=weights @ (membership * probabilities[:, None]),
        positive_counts=weights @ (membership * truth[:, None]),
    )
