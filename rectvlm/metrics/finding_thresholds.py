"""Decision thresholds of the 18 findings."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.types import JsonObject

DEFAULT_THRESHOLD = 0.5
"""Threshold of a finding that no data decide."""


@dataclass(frozen=True)
class FindingThresholds:
    """Smallest probabilities at which findings are called present."""

    values: NDArray[np.floating[Any]]
    """Thresholds, (18,)."""
    is_fitted: NDArray[np.bool_]
    """Whether data decided the threshold, (18,); where False, a class was missing in the data."""
    source: str
    """Description of the data that the thresholds were fitted on."""
    n_cases: int
    """Number of cases that the thresholds were fitted on."""

    def by_finding(self) -> dict[str, float]:
        """Thresholds by the name of the finding."""
        return {name: float(value) for name, value in zip(FINDINGS, self.values, strict=True)}

    @property
    def not_fitted(self) -> list[str]:
        """Names of the findings whose threshold no data decided."""
        is_fitted = zip(FINDINGS, self.is_fitted, strict=True)
        return [name for name, fitted in is_fitted if not fitted]

    def as_dict(self) -> JsonObject:
        """Tree for JSON."""
        return {
            "source": self.source,
            "n_cases": self.n_cases,
            "not_fitted": self.not_fitted,
            "values": self.by_finding(),
        }

    @classmethod
    def all_default(cls, source: str) -> "FindingThresholds":
        """Thresholds of 0.5 for every finding, none of them fitted."""
        values = np.full(N_FINDINGS, DEFAULT_THRESHOLD)
        return cls(values, np.zeros(N_FINDINGS, dtype=bool), source, 0)
