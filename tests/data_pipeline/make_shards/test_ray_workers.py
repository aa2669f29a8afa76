"""Preprocessing on a real Ray cluster of two nodes on this machine: the same bytes, and no sample
lost with a node."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from data_pipeline.cases import Case
from data_pipeline.ct_rate.cases import list_ct_rate_cases
from data_pipeline.ct_rate.options import CtRateOptions
from data_pipeline.make_shards.ray_workers import RayRunner
from data_pipeline.make_shards.shard_folder import preprocess
from data_pipeline.masks.mask_folders import MaskFolders
from rectvlm.data.shards import read_index
from rectvlm.types import UserError
from tests.small_cases import (
    GRID,
    SPACING,
    contents,
    die_once,
    load_on_ray,
    small_cases,
    small_tree,
)

CHECKOUT = Path(__file__).resolve().parents[3]


def telling(cases: list[Case], folder: Path, seconds: list[float]) -> list[Case]:
    folder.mkdir()
    return [
        replace(case, load=partial(load_on_ray, folder, int(case.identity[0]), pause))
        for case, pause in zip(cases, seconds, strict=True)
    ]


def nodes_of(folder: Path) -> set[str]:
    return {json.loads(text)[1] for path in folder.iterdir() if (text := path.read_text())}


def tars(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".tar")}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each; the first is the head."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_two_nodes_make_the_same_bytes_as_this_process(cluster: Any, tmp_path: Path) -> None:
    """The nodes get our code from the job: they were started where it cannot be found."""
    tree = small_tree(tmp_path / "ct", 6, 2)
    os.truncate(tree.path("train_2_a_1"), 3000)
    cases = list_ct_rate_cases(
        tree.root, CtRateOptions(masks=MaskFolders(lesions=tree.root / "lesions"))
    ).cases
    here = preprocess(cases, tmp_path / "here", GRID, SPACING, samples_per_shard=2)
    there = preprocess(
        cases,
        tmp_path / "ray",
        GRID,
        SPACING,
        samples_per_shard=2,
        runner=RayRunner(cluster.address),
    )
    assert (len(there.rejected), there.shards_made) == (1, here.shards_made) == (1, 4)
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


@pytest.mark.slow
def test_both_nodes_work_and_one_that_goes_takes_nothing_with_it(
    cluster: Any, tmp_path: Path
) -> None:
    import ray

    ray.init(cluster.address, runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT)}})
    notes, gone = tmp_path / "notes", []
    cases = telling(small_cases(16, 2), notes, [5.0] * 4 + [0.1] * 14)
    (second,) = cluster.worker_nodes
    head_id = ray.get_runtime_context().get_node_id()

    def remove() -> None:
        while not nodes_of(notes) - {head_id}:
            time.sleep(0.02)
        gone.append(len(list((tmp_path / "out").glob("*.tar"))))
        cluster.remove_node(second, allow_graceful=False)

    remover = Thread(target=remove)
    remover.start()
    outcome = preprocess(
        cases,
        tmp_path / "out",
        GRID,
        SPACING,
        samples_per_shard=1,
        runner=RayRunner(cluster.address),
    )
    remover.join()
    assert gone[0] < len(cases) - 2, "the node went in the middle of the run"
    assert len(nodes_of(notes)) == 2 and outcome.rejected == []
    assert [entry.key for entry in read_index(tmp_path / "out").select_split(None)] == [
        case.key for case in cases
    ]
    assert len(list(notes.iterdir())) > len(cases), "what the node was at was done again"
    preprocess(small_cases(16, 2), tmp_path / "here", GRID, SPACING, samples_per_shard=1)
    assert tars(tmp_path / "out") == tars(tmp_path / "here")


@pytest.mark.slow
def test_a_worker_that_is_killed_on_ray_is_tried_again(cluster: Any, tmp_path: Path) -> None:
    import ray

    ray.init(cluster.address, runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT)}})
    cases = small_cases(4, 1)
    cases[1] = replace(cases[1], load=partial(die_once, tmp_path / "flag", 1))
    outcome = preprocess(
        cases,
        tmp_path / "out",
        GRID,
        SPACING,
        samples_per_shard=2,
        runner=RayRunner(cluster.address),
    )
    assert (tmp_path / "flag").exists() and outcome.rejected == []
    assert len(outcome.index.select_split(None)) == 5


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_a_cluster_that_is_not_there_is_named_at_once(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(
        UserError, match=rf"No Ray cluster at {address} .*refused.*ray start --head"
    ):
        RayRunner(address)
