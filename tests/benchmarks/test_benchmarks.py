"""The benchmarks: figures of a real run's record, and of real shards."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import loader
from benchmarks.loader_peers import INSTALL_BY_MODULE, start_peers
from benchmarks.publishing import find_missing_peers, machine_slug
from benchmarks.train_step import TIMED_SECTIONS, list_comparisons, read_run_speed, write_text
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


def test_the_page_names_launch_and_warm_up(launched_phase1: Path) -> None:
    launch = {"size": "tiny", "phase": 1, "processes": 1, "scaling": "weak"}
    row = launch | read_run_speed(launched_phase1, warmup=2)
    where = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 2, "memory_gb": 24.0, "gpus": []}
    result = {"machine": where, "steps": 4, "warmup": 2, "rows": [row]}
    page = write_text(result)
    assert "2 steps of warm-up" in page and f"{row['samples_per_second']:.2f}" in page
    cells = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert len(cells) == 3 and len(set(cells)) == 1
    speed, parts = list_comparisons(result)
    (measurement,) = speed.measurements
    assert (measurement.case, measurement.at) == ("tiny, phase 1, weak", "1")
    assert len(measurement.values) == 4
    assert {row.case for row in parts.measurements} == {*TIMED_SECTIONS, "other"}
    assert machine_slug(where) == "intel-xeon-cpu-2-20ghz-2-cores"
    assert machine_slug(where | {"gpus": ["NVIDIA H200"] * 2}) == "2x-nvidia-h200"


def test_the_loader_is_measured_against_bare_decoding_and_other_loaders(
    tiny: Config, phantom_shards: Path, tmp_path: Path
) -> None:
    cores = os.sched_getaffinity(0)
    data = tiny.data.model_copy(update={"shards": str(phantom_shards)})
    installed = {peer.name for peer in find_missing_peers(INSTALL_BY_MODULE)} ^ {*INSTALL_BY_MODULE}
    peers = start_peers(data, tmp_path, sorted(installed))
    assert {"webdataset", "MONAI PersistentDataset"} <= peers.keys()
    measured = loader.measure_loader(data, 1, peers)
    assert os.sched_getaffinity(0) == cores
    ways = {loader.BARE, loader.LOADER, *peers}
    assert {name: len(seconds) for name, seconds in measured["seconds"].items()} == (
        dict.fromkeys(ways, 6)
    )
    assert measured["voxel_bytes"] == 16 * 48 * 48 * 4
    assert 1000 < measured["packed_bytes"] < measured["voxel_bytes"]


def test_what_feeds_a_gpu_follows_from_the_samples_of_a_worker() -> None:
    seconds = {loader.BARE: [0.04, 0.06, 0.04, 0.06], loader.LOADER: [0.05, 0.08, 0.05, 0.08]}
    growth = [
        {"loader": loader.LOADER, "workers": 1, "turn": 0, "samples_per_second": 16.0},
        {"loader": loader.LOADER, "workers": 2, "turn": 0, "samples_per_second": 30.0},
        {"loader": "webdataset", "workers": 1, "turn": 0, "samples_per_second": 12.0},
    ]
    ratios = loader.summarize_speeds(seconds, growth)
    expected = {"loader_over_bare": (0.8 + 0.75) / 2, "workers_for_a_gpu": 0.625}
    assert ratios == pytest.approx(expected)
