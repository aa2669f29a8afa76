"""Numbers that may be missing: None and NaN are left out of means and written to JSON as null."""

import math
from collections.abc import Iterable

import numpy as np


def finite_or_none(value: float | None) -> float | None:
    """The value, or None where it is missing, NaN or infinite, for which JSON has no number."""
    return value if value is not None and math.isfinite(value) else None


def mean_of_finite(values: Iterable[float | None]) -> float | None:
    """Mean of the finite values; None where there are none."""
    finite_values = [value for value in map(finite_or_none, values) if value is not None]
    return float(np.mean(finite_values)) if finite_values else None
