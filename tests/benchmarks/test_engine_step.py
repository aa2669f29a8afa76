"""The benchmark of a step through the engine, at a small size.

It times a whole step of the engine and puts two plans beside the memory it took.
"""

import json
from pathlib import Path

import pytest

from benchmarks import engine_step
from benchmarks.phase_step import SECTIONS
from rectvlm.config import load_config


@pytest.mark.slow
def test_a_step_is_measured_beside_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kinds = ["--variants", "zero3", "zero2"]
    arguments = ["--config", "tiny", "--rounds", "2", *kinds, "--out", str(tmp_path)]
    assert engine_step.main(arguments) == 0
    (folder,) = tmp_path.glob("engine-step-*")
    (section,) = json.loads((folder / "results.json").read_text())["sections"]
    rows = section["facts"]["rows"]
    assert [row["ds_config"] for row in rows] == ["phase3.json", "phase3_zero2.json"]
    for row in rows:
        step = row["step_seconds"]
        assert row["language_positions"] > load_config("tiny").generator.max_report_tokens
        assert row["language_positions_per_second"] == pytest.approx(
            row["language_positions"] / step
        )
        assert row["tokens_per_second"] > row["language_positions_per_second"]
        assert all(len(seconds) == 2 for seconds in row["seconds"].values())
        assert row["losses"][-1]["report"] < row["losses"][0]["report"]  # it trains what it times
        for name, size in row["bytes"].items():  # of one process: what it holds is what was planned
            planned = row["plan"]["gpu_memory_gb"].get(name, 0.0) * 1e9
            assert planned == pytest.approx(size, rel=0.01, abs=64), f"{row['ds_config']}: {name}"
        assert row["hardware_tflop"] > row["model_tflop"] > 0
        parts = [sum(times) for times in zip(*row["seconds"].values(), strict=True)]
        assert row["samples_per_second"] == pytest.approx(1 / row["step_seconds"])
        assert len(parts) == 2 and set(row["seconds"]) == set(SECTIONS)
    page = (folder / "report.md").read_text()
    assert "resident" in page and "phase 3, zero2, micro-batch 1" in page
    assert (folder / "engine-step-parts-of-a-step.png").is_file()


@pytest.mark.slow
def test_two_processes_are_launched_and_their_communication_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = ["--config", "tiny", "--phases", "1", "--rounds", "2", "--processes", "2"]
    assert engine_step.main([*sizes, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("engine-step-*/results.json")
    (section,) = json.loads(path.read_text())["sections"]
    (row,) = section["facts"]["rows"]
    assert row["label"] == "phase 1, micro-batch 1, 2 processes"
    assert row["samples_per_second"] == pytest.approx(2 / row["step_seconds"])
    assert sum(row["communication"].values()) > 0
    assert "communication" in {
        measurement["case"] for measurement in section["comparisons"][0]["measurements"]
    }


def test_an_unknown_configuration_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engine_step.main(["--config", "nothing", "--out", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err and not list(tmp_path.iterdir())
