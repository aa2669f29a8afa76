"""The benchmark reads a real run's record."""

import json
from pathlib import Path

import pytest

from benchmarks.common import machine_slug
from benchmarks.train_step import PARTS, measure, to_markdown


def test_figures_are_those_of_the_steps_after_warm_up(launched_phase1: Path) -> None:
    lines = [json.loads(line) for line in (launched_phase1 / "metrics.jsonl").read_text().splitlines()]
    row = measure(launched_phase1, warmup=2)
    seconds = sum(line["seconds"]["total"] for line in lines[2:])
    assert (row["steps"], row["warmup"]) == (4, 2)
    assert row["samples_per_second"] == pytest.approx(4 * 2 / seconds)  # micro-batches of 2, one process
    assert row["tokens_per_second"] == pytest.approx(sum(line["tokens"] for line in lines[2:]) / seconds)
    assert sum(row["seconds"].values()) == pytest.approx(row["seconds_per_step"])
    assert all(row["seconds"][part] > 0 for part in PARTS) and row["seconds"]["other"] >= 0
    assert row["peak_memory_bytes"] > 50e6


def test_a_run_shorter_than_its_warm_up_measures_nothing(launched_phase1: Path) -> None:
    with pytest.raises(AssertionError, match="6 steps"):
        measure(launched_phase1, warmup=6)


def test_the_page_names_machine_versions_and_warm_up(launched_phase1: Path) -> None:
    row = {"size": "tiny", "phase": 1, "processes": 1} | measure(launched_phase1, warmup=2)
    where = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 2, "memory_gb": 24.0, "gpus": []}
    result = {"date": "2026-01-02", "machine": where, "versions": {"torch": "2.13.0"}, "steps": 4, "warmup": 2}
    page = to_markdown(result | {"rows": [row], "seconds": 9.0})
    for wanted in (
        "Xeon",
        "2 cores",
        "no GPU",
        "torch 2.13.0",
        "2 steps of warm-up",
        f"{row['samples_per_second']:.2f}",
    ):
        assert wanted in page
    cells = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert len(cells) == 3 and len(set(cells)) == 1
    assert machine_slug(where) == "intel-xeon-cpu-2-20ghz-2-cores"
    assert machine_slug(where | {"gpus": ["NVIDIA H200"] * 2}) == "2x-nvidia-h200"
