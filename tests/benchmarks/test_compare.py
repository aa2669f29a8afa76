"""Comparing result folders: what counts as worse, and what cannot be compared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.measurements import Comparison, Measurement, SectionResult
from benchmarks.publishing import write_result_folder

MACHINE = {"cpu": "A CPU", "cores": 2, "memory_gb": 4.0, "gpus": []}
STEADY = (1.00, 1.01, 0.99, 1.00, 1.02)


def write_results(
    folder: Path, seconds: tuple[float, ...], machine: dict[str, object] | None = None
) -> Path:
    comparisons = (
        Comparison("Step", "s", (Measurement("ours", "2", seconds),)),
        Comparison("Speed", "1/s", (Measurement("ours", "", STEADY),), better="higher"),
        Comparison("Size", "GB", (Measurement("ours", "", seconds),), better="neither"),
    )
    section = SectionResult("loader", "Loader", "python", 1.0, {}, comparisons)
    results = {
        "name": "loader",
        "title": "Loader",
        "date": "2026-01-02",
        "machine": machine or MACHINE,
        "versions": {"torch": "2.13.0"},
        "git": {"commit": None, "reason": "no checkout"},
        "seconds": 1.0,
        "sections": [section.to_json()],
    }
    write_result_folder(folder, results)
    return folder


@pytest.mark.parametrize(
    ("factor", "code", "word"), [(1.0, 0, "2 of 2"), (1.5, 3, "worse"), (0.5, 0, "better")]
)
def test_what_got_worse_beyond_spread_and_tolerance_fails(
    factor: float, code: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_results(tmp_path / "old", STEADY)
    new = write_results(tmp_path / "new", tuple(factor * value for value in STEADY))
    assert compare.main([str(old), str(new)]) == code
    printed = capsys.readouterr().out
    assert word in printed
    if factor == 1.5:
        assert "loader: Step: ours: 2 | s | 1 | 1.5 | 1.50" in printed
        assert compare.main([str(old), str(new), "--tolerance", "0.6"]) == 0


def test_a_change_within_the_spread_is_none() -> None:
    old = Measurement("ours", "", (1.0, 1.2, 1.4, 1.6, 1.8))
    new = Measurement("ours", "", (1.3, 1.5, 1.7, 1.9, 2.1))
    assert compare.judge_change(old, new, lower_is_better=True, tolerance=0.1) == "same"
    slower = replace(new, values=tuple(value + 1 for value in new.values))
    assert compare.judge_change(old, slower, lower_is_better=True, tolerance=0.1) == "worse"
    assert compare.judge_change(old, slower, lower_is_better=False, tolerance=0.1) == "better"


def test_results_of_two_machines_are_compared_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_results(tmp_path / "old", STEADY)
    new = write_results(tmp_path / "new", STEADY, MACHINE | {"cores": 64})
    assert compare.main([str(old), str(new)]) == 1
    assert "different machines: expected the same cores, found 2" in capsys.readouterr().err
    assert compare.main([str(old), str(new), "--other-machine"]) == 0


def test_folders_with_other_measurements_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_results(tmp_path / "old", STEADY)
    new = write_results(tmp_path / "new", STEADY)
    results = json.loads((new / "results.json").read_text())
    results["sections"][0]["comparisons"][0]["measurements"][0]["at"] = "4"
    (new / "results.json").write_text(json.dumps(results))
    assert compare.main([str(old), str(new)]) == 1
    error = capsys.readouterr().err
    assert "'loader: Step: ours: 2' only in the first" in error
    assert "'loader: Step: ours: 4' only in the second" in error
    assert compare.main([str(old), str(tmp_path)]) == 1
    assert "is no result folder" in capsys.readouterr().err


def test_the_report_has_medians_spread_and_plots(tmp_path: Path) -> None:
    report = (write_results(tmp_path / "a", STEADY) / "report.md").read_text()
    assert "A CPU, 2 cores, 4.0 GB; no GPU. torch 2.13.0. Commit unknown (no checkout)" in report
    assert "| 2 | ours | 1 | 1 to 1.01 | 5 |" in report
    assert "![Step](loader-step.png)" in report
    assert (tmp_path / "a" / "loader-step.png").read_bytes().startswith(b"\x89PNG")
