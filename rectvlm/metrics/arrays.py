"""Array types of the metrics, and a division that knows missing values."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
CountArray = NDArray[np.int64]


def divide_or_nan(numerator: NDArray[Any], denominator: NDArray[Any]) -> FloatArray:
    """Quotient by element; NaN where the denominator is not positive."""
    quotients = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=quotients, where=denominator > 0)
