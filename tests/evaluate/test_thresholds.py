"""Stored thresholds: only fitted ones are written, and never over better founded ones."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from rectvlm.checkpoint import THRESHOLDS_FILE
from rectvlm.evaluate.case_records import CaseRecord
from rectvlm.evaluate.stored_thresholds import read_stored_thresholds, read_thresholds
from rectvlm.evaluate.thresholds import choose_thresholds
from rectvlm.labels import FINDINGS
from rectvlm.types import UserError

UNKNOWN = FINDINGS[3]


def cases(
    n: int, seed: int = 0, known: bool = True, regions: str | None = "drawn"
) -> list[CaseRecord]:
    """Cases of the train split: one finding is never known; with `known` False none is."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        labels: list[int | None] = [
            None if name == UNKNOWN or not known else i % 2 for name in FINDINGS
        ]
        probabilities = rng.random(len(FINDINGS)).tolist()
        name = f"case_{i}"
        found.append(
            CaseRecord(
                "fit", i, name, name, name, probabilities, labels, [], None, None, None, regions
            )
        )
    return found


def test_what_was_not_fitted_is_never_written(tmp_path: Path) -> None:
    for fitting in ([], cases(4, known=False)):
        thresholds = choose_thresholds(tmp_path, fitting, "shards")
        assert (
            set(thresholds.values) == {0.5}
            and not thresholds.is_fitted.any()
            and "0.5" in thresholds.source
        )
        assert not (tmp_path / THRESHOLDS_FILE).exists() and read_thresholds(tmp_path) is None
    with pytest.raises(UserError, match=r"No fitted thresholds in .*thresholds\.json"):
        choose_thresholds(tmp_path, [], "shards", stored_only=True)


def test_a_file_of_unfitted_halves_counts_as_none(tmp_path: Path) -> None:
    """As versions before wrote it where the shards held no train split."""
    halves = {
        "source": "0.5",
        "n_cases": 0,
        "not_fitted": list(FINDINGS),
        "values": dict.fromkeys(FINDINGS, 0.5),
    }
    (tmp_path / THRESHOLDS_FILE).write_text(json.dumps(halves))
    assert read_thresholds(tmp_path) is None and read_stored_thresholds(tmp_path) is None
    with pytest.raises(UserError, match="No fitted thresholds"):
        choose_thresholds(tmp_path, [], "shards", stored_only=True)
    choose_thresholds(tmp_path, cases(4), "shards")
    assert read_thresholds(tmp_path) is not None


def test_a_finding_that_was_not_fitted_has_no_threshold(tmp_path: Path) -> None:
    thresholds = choose_thresholds(tmp_path, cases(6), "shards")
    found = read_thresholds(tmp_path)
    assert found is not None and set(found) == set(FINDINGS) - {UNKNOWN}
    assert all(found[name] == thresholds.by_finding()[name] for name in found)


@pytest.mark.parametrize(
    ("n", "own_shards", "replaced"),
    [(4, True, False), (6, True, True), (6, False, False), (8, False, True)],
)
def test_better_founded_thresholds_stay(
    n: int, own_shards: bool, replaced: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choose_thresholds(tmp_path, cases(6), "those of the training")
    before = (tmp_path / THRESHOLDS_FILE).read_text()
    caplog.set_level(logging.INFO)
    fitted = choose_thresholds(tmp_path, cases(n, seed=1), "others", has_training_shards=own_shards)
    assert fitted.n_cases == n and "others" in fitted.source, (
        "the evaluation has those that were asked for"
    )
    after = json.loads((tmp_path / THRESHOLDS_FILE).read_text())
    assert after == (fitted.as_dict() if replaced else json.loads(before))
    assert (
        "Replaced" if replaced else "Kept"
    ) in caplog.text and "those of the training" in caplog.text


def test_the_same_fit_again_says_nothing_and_a_damaged_file_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        choose_thresholds(tmp_path, cases(6), "shards")
    (tmp_path / THRESHOLDS_FILE).write_text("[]")
    choose_thresholds(tmp_path, cases(2), "shards")
    assert json.loads((tmp_path / THRESHOLDS_FILE).read_text())["n_cases"] == 2 and not caplog.text


def test_fitted_cases_that_decide_nothing_give_way_to_stored_thresholds(tmp_path: Path) -> None:
    stored = choose_thresholds(tmp_path, cases(6), "shards")
    assert (
        choose_thresholds(tmp_path, cases(9, known=False), "shards").as_dict() == stored.as_dict()
    )


@pytest.mark.parametrize(
    ("n", "regions", "hidden", "replaced"),
    [
        (6, "drawn", False, False),
        (9, "coarse", False, False),
        (6, None, True, True),
        (4, None, True, False),
    ],
)
def test_thresholds_of_cases_without_region_maps_stay(
    n: int, regions: str | None, hidden: bool, replaced: bool, tmp_path: Path
) -> None:
    """A new CT has none. Earlier versions did not say, so theirs give way."""
    choose_thresholds(tmp_path, cases(6, regions=None), "shards", regions_hidden=True)
    fitted = choose_thresholds(
        tmp_path, cases(n, seed=1, regions=regions), "shards", regions_hidden=hidden
    )
    stored = read_stored_thresholds(tmp_path)
    assert stored is not None and (stored.as_dict() == fitted.as_dict()) == replaced
    assert (
        "hidden, as in prediction" in stored.source and stored.as_dict()["regions_hidden"] is True
    )
    old = {key: value for key, value in stored.as_dict().items() if "region" not in key}
    (tmp_path / THRESHOLDS_FILE).write_text(json.dumps(old))
    assert choose_thresholds(tmp_path, cases(6), "shards").as_dict() == json.loads(
        (tmp_path / THRESHOLDS_FILE).read_text()
    )


def test_thresholds_say_which_region_maps_their_cases_had(tmp_path: Path) -> None:
    fitting = [*cases(4)[:1], *cases(4, regions="coarse")[1:3], *cases(4, regions=None)[3:]]
    found = choose_thresholds(tmp_path, fitting, "shards").as_dict()
    assert (
        found["n_with_region_map"],
        found["n_with_coarse_region_map"],
        found["regions_hidden"],
    ) == (3, 2, False)
    assert found["source"].endswith("region maps: 3 volumes, 2 of them coarse")
    assert json.loads((tmp_path / THRESHOLDS_FILE).read_text()) == found
