"""Thresholds of the findings and their file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rectvlm.finding_thresholds import NOT_FITTED, THRESHOLDS_FILE, FindingThresholds
from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.types import UserError


def make_thresholds(fitted: list[int]) -> FindingThresholds:
    """Thresholds of which some are fitted, with values that no decimal writes exactly."""
    is_fitted = np.isin(np.arange(N_FINDINGS), fitted)
    values = np.where(is_fitted, np.linspace(0.1, 0.9, N_FINDINGS) / 3, 0.5)
    return FindingThresholds(values, is_fitted, "some cases", 40)


def test_a_file_gives_back_every_digit(tmp_path: Path) -> None:
    thresholds = make_thresholds([0, 3, 17])
    thresholds.write(tmp_path / THRESHOLDS_FILE)
    read = FindingThresholds.read(tmp_path / THRESHOLDS_FILE)
    assert read.values.tolist() == thresholds.values.tolist()
    assert read.is_fitted.tolist() == thresholds.is_fitted.tolist()
    assert (read.source, read.n_cases) == ("some cases", 40)


@pytest.mark.parametrize(
    "damage",
    [
        "[]",
        "{",
        {"values": {}},
        {"values": dict.fromkeys(FINDINGS, 1.5)},
        {"values": dict.fromkeys(FINDINGS, "high")},
        {"values": dict.fromkeys(FINDINGS[1:], 0.5)},
    ],
)
def test_a_file_that_is_none_is_one_sentence(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / THRESHOLDS_FILE
    path.write_text(damage if isinstance(damage, str) else json.dumps(damage))
    with pytest.raises(UserError, match=r"thresholds\.json is damaged: expected `values`") as error:
        FindingThresholds.read(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        FindingThresholds.read(tmp_path / "none.json")


def test_a_finding_that_was_not_fitted_keeps_its_former_threshold() -> None:
    former, fitted = make_thresholds([0, 1]), replace(make_thresholds([1, 2]), source="later")
    both = former.replace_fitted(replace(fitted, values=fitted.values / 2))
    assert both.values[:4].tolist() == [
        former.values[0],
        fitted.values[1] / 2,
        fitted.values[2] / 2,
        0.5,
    ]
    assert both.is_fitted[:4].tolist() == [True, True, True, False] and both.source == "later"
    assert former.replace_fitted(make_thresholds([])) is former
    assert set(NOT_FITTED.values) == {0.5} and len(NOT_FITTED.not_fitted) == N_FINDINGS
