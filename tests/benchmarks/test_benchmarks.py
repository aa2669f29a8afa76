"""The benchmarks: figures of a real run's record, and of real shards."""

import json
import os
import statistics
from pathlib import Path

import pytest

from benchmarks import loader
from benchmarks.publishing import machine_slug
from benchmarks.train_step import TIMED_SECTIONS, read_run_speed, to_markdown
from rectvlm.config import Config


def test_figures_are_those_of_the_steps_after_warm_up(launched_phase1: Path) -> None:
    lines = [
        json.loads(line) for line in (launched_phase1 / "metrics.jsonl").read_text().splitlines()
    ]
    row = read_run_speed(launched_phase1, warmup=2)
    seconds = sum(line["seconds"]["total"] for line in lines[2:])
    assert (row["steps"], row["warmup"]) == (4, 2)
    assert row["samples_per_second"] == pytest.approx(
        4 * 2 / seconds
    )  # micro-batches of 2, one process
    assert row["tokens_per_second"] == pytest.approx(
        sum(line["tokens"] for line in lines[2:]) / seconds
    )
    assert sum(row["seconds"].values()) == pytest.approx(row["seconds_per_step"])
    assert all(row["seconds"][part] > 0 for part in TIMED_SECTIONS) and row["seconds"]["other"] >= 0
    assert row["peak_memory_bytes"] > 50e6


def test_a_run_shorter_than_its_warm_up_measures_nothing(launched_phase1: Path) -> None:
    with pytest.raises(AssertionError, match="6 steps"):
        read_run_speed(launched_phase1, warmup=6)


def test_the_page_names_machine_versions_and_warm_up(launched_phase1: Path) -> None:
    row = {"size": "tiny", "phase": 1, "processes": 1} | read_run_speed(launched_phase1, warmup=2)
    where = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 2, "memory_gb": 24.0, "gpus": []}
    result = {
        "date": "2026-01-02",
        "machine": where,
        "versions": {"torch": "2.13.0"},
        "steps": 4,
        "warmup": 2,
    }
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


def test_the_loader_is_measured_against_bare_decoding(tiny: Config, phantom_shards: Path) -> None:
    cores = os.sched_getaffinity(0)
    measured = loader.measure_loader(
        tiny.data.model_copy(update={"shards": str(phantom_shards)}), rounds=1
    )
    assert os.sched_getaffinity(0) == cores
    assert [len(measured[name]) for name in ("bare", "loader", "worker", "main")] == [6, 6, 1, 1]
    assert measured["voxel_bytes"] == 16 * 48 * 48 * 4
    assert 1000 < measured["packed_bytes"] < measured["voxel_bytes"]
    ratios = loader.summarize_speeds(measured)
    assert 0 < ratios["loader_over_bare"] < 1  # a sample this small is mostly its JSON
    where = {"cpu": "Some CPU", "cores": 2, "memory_gb": 24.0, "gpus": []}
    result = {
        "date": "2026-01-02",
        "machine": where,
        "versions": {"torch": "2.13.0"},
        "seconds": 9.0,
    }
    result |= {
        "samples": 6,
        "rounds": 1,
        "grid": (16, 48, 48),
        "measured": measured,
        "ratios": ratios,
    }
    page = loader.to_markdown(json.loads(json.dumps(result)))
    for wanted in (
        "Some CPU",
        "16 × 48 × 48",
        f"{statistics.median(measured['bare']):.4f}",
        "one H200 with 10 volumes",
    ):
        assert wanted in page
    cells = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert len(cells) == 5 and len(set(cells)) == 1


def test_what_feeds_a_gpu_follows_from_the_seconds_of_a_sample() -> None:
    measured = {
        "bare": [0.04, 0.06, 0.04, 0.06],
        "loader": [0.05, 0.08, 0.05, 0.08],
        "worker": [0.0625, 0.0625],
    }
    ratios = loader.summarize_speeds(measured | {"main": [0.01, 0.01]})
    assert ratios == pytest.approx(
        {
            "loader_over_bare": (0.8 + 0.75) / 2,
            "worker_over_bare": 0.8,
            "bare_per_second": 20,
            "loader_per_second": 1 / 0.065,
            "worker_per_second": 16,
            "workers_for_a_gpu": 0.625,
            "cores_for_a_gpu": 0.725,
        }
    )
