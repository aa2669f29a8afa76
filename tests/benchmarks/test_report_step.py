"""The report step benchmark at a small size.

Real layers in their real order, packed as they are made, timed and reported.
"""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from benchmarks import report_step
from rectvlm.config import load_config

SMALL = ["--rounds", "2", "--cue-words", "10"]


def test_a_step_is_measured_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        report_step.main(
            [*SMALL, "--config", "tiny", "--micro-batch", "1", "2", "--out", str(tmp_path)]
        )
        == 0
    )
    (folder,) = tmp_path.glob("report-step-*")
    (section,) = json.loads((folder / "results.json").read_text())["sections"]
    result = section["facts"]
    one, two = result["rows"]
    assert (one["micro_batch"], two["micro_batch"]) == (1, 2)
    assert two["positions"] == 2 * one["positions"]
    assert one["report_positions"] == load_config("tiny").generator.max_report_tokens
    assert one["positions"] > one["report_positions"] + load_config("tiny").generator.queries
    for row in result["rows"]:
        step = row["step_seconds"]
        counts = row["parameters"]
        assert counts["trained"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["positions"] / step)
        work = 4 * (counts["decoder"] * row["positions"] + counts["head"] * row["report_positions"])
        assert row["model_flops_per_second"] == pytest.approx(work / step)
        assert row["hardware_flops_per_second"] > row["model_flops_per_second"]
        assert row["losses"][-1] < row["losses"][0]  # it trains what it times
    speed = section["comparisons"][0]
    assert [row["at"] for row in speed["measurements"]] == ["1", "2"]
    assert f"{one['tokens_per_second']:.1f}" in (folder / "report.md").read_text()


def test_layers_and_widths_are_the_geometrys(models_folder: None) -> None:
    """What is built from a geometry is packed, in as many layers as asked."""
    config = load_config("tiny")
    generator, counts = report_step.build_generator(config, 1, torch.device("cpu"))
    packed = [m for m in generator.modules() if isinstance(m, Linear4bit)]
    assert len(packed) == 7
    assert (
        counts["decoder"] == sum(m.in_features * m.out_features for m in packed) + 3 * 64
    )  # and three norms
    assert counts["head"] == counts["words"]


def test_an_unknown_geometry_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        report_step.main(
            ["--config", "tiny", "--geometry", "/nowhere/at/all", "--out", str(tmp_path)]
        )
        == 1
    )
    assert "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
