"""Decision thresholds of the 18 findings, and the file that carries them with a model."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rectvlm.files import write_json
from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.types import JsonObject, UserError

THRESHOLDS_FILE = "thresholds.json"
DEFAULT_THRESHOLD = 0.5
"""Threshold of a finding that no data decide."""
MIN_CASES_TO_FIT = 10
"""Smallest number of positive and of negative cases that a finding's threshold is fitted to; with
fewer, the best F1 is found by chance. One wrong label among 128 put a threshold at 0.02, which
called the finding in half of all cases."""


@dataclass(frozen=True)
class FindingThresholds:
    """Smallest probabilities at which findings are called present, and suggested in a prompt."""

    values: NDArray[np.float64]
    """Thresholds, (18,)."""
    is_fitted: NDArray[np.bool_]
    """Whether data decided the threshold, (18,); where False, they held too few cases."""
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

    def replace_fitted(self, fitted: "FindingThresholds") -> "FindingThresholds":
        """Take the newly fitted thresholds; a finding that was not fitted keeps the former one."""
        if not fitted.is_fitted.any():
            return self
        return FindingThresholds(
            np.where(fitted.is_fitted, fitted.values, self.values),
            fitted.is_fitted | self.is_fitted,
            fitted.source,
            fitted.n_cases,
        )

    def write(self, path: Path) -> None:
        """Write the file that `read` reads.

        Raises:
            OSError: it cannot be written.
        """
        write_json(path, self.as_dict())

    @classmethod
    def read(cls, path: Path) -> "FindingThresholds":
        """Read the thresholds of a file.

        Raises:
            UserError: the file is missing or damaged, or lacks a finding.
        """
        try:
            tree = json.loads(path.read_bytes())
            not_fitted = set(tree.get("not_fitted", ()))
            return cls(
                values=np.array([_read_probability(tree["values"][name]) for name in FINDINGS]),
                is_fitted=np.array([name not in not_fitted for name in FINDINGS]),
                source=str(tree.get("source", "unknown")),
                n_cases=int(tree.get("n_cases", 0)),
            )
        except OSError as error:
            raise UserError(
                f"The thresholds {path} cannot be read ({error.strerror}): give the "
                f"{THRESHOLDS_FILE} of an evaluation or of a model."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged: expected `values` with a probability for each of the "
                f"{N_FINDINGS} findings, found {type(error).__name__}: {error}; give the "
                f"{THRESHOLDS_FILE} of an evaluation or of a model, or delete it."
            ) from None

    @classmethod
    def all_default(cls, source: str) -> "FindingThresholds":
        """Thresholds of 0.5 for every finding, none of them fitted."""
        values = np.full(N_FINDINGS, DEFAULT_THRESHOLD)
        return cls(values, np.zeros(N_FINDINGS, dtype=bool), source, 0)


NOT_FITTED = FindingThresholds.all_default("0.5 for every finding: none was fitted in training")
"""Thresholds of a model that carries none."""


def _read_probability(value: object) -> float:
    probability = float(value)  # type: ignore[arg-type]
    if not 0 <= probability <= 1:
        raise ValueError(f"{probability} is no probability")
    return probability
