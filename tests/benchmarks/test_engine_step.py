"""The phase 3 step benchmark at a small size.

It times a whole step of the engine and puts two plans beside the memory it took.
"""

import json
from pathlib import Path

import pytest

from benchmarks import phase3_step
from rectvlm.config import load_config


@pytest.mark.slow
def test_a_step_is_measured_beside_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kinds = ["--ds-configs", "phase3", "phase3_zero2"]
    assert (
        phase3_step.main(["--config", "tiny", "--rounds", "2", *kinds, "--out", str(tmp_path)]) == 0
    )
    result = json.loads(next(tmp_path.glob("phase3-step-*.json")).read_text())
    assert [row["ds_config"] for row in result["rows"]] == ["phase3.json", "phase3_zero2.json"]
    for row in result["rows"]:
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
    page = next(tmp_path.glob("phase3-step-*.md")).read_text()
    cells = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert len(set(cells)) == 3 and "resident" in page


def test_an_unknown_configuration_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phase3_step.main(["--config", "nothing", "--out", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err and not list(tmp_path.iterdir())
