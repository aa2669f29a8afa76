"""Loaders of several processes: each sample once an epoch, equal counts, resuming on others."""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest

from rectvlm.config import Config, load_config
from rectvlm.data.dataset import ShardDataset, collate_samples
from rectvlm.data.loader import build_train_loader
from rectvlm.data.shards import write_shards
from rectvlm.types import Batch, Sample

SAMPLES, MICRO_BATCH, SEED = 7, 2, 11


@dataclass(frozen=True)
class Seen:
    """What a rank reports of one sample in a batch."""

    key: str
    voxels: str
    """SHA-256 of its three volumes."""
    regions_known: bool
    annotated: tuple[bool, ...]
    report: str | None


def seen_of(batch: Batch) -> list[Seen]:
    """By sample, in order."""
    volumes = (batch.ct.numpy(), batch.lesions.numpy(), batch.regions.numpy())
    return [
        Seen(
            key,
            hashlib.sha256(b"".join(volume[i].tobytes() for volume in volumes)).hexdigest(),
            bool(batch.regions_known[i]),
            tuple(batch.lesions_annotated[i].tolist()),
            batch.reports[i],
        )
        for i, key in enumerate(batch.keys)
    ]


def rank_process(
    shards: str, rank: int, world: int, workers: int, seen: int, steps: int
) -> tuple[int, list[list[Seen]]]:
    """In a process of its own: its id, and its batches."""
    data = load_config("tiny", [f"data.shards={shards}", f"data.workers={workers}"]).data
    batches = islice(build_train_loader(data, MICRO_BATCH, rank, world, SEED, seen), steps)  # type: ignore[arg-type]
    return os.getpid(), [seen_of(batch) for batch in batches]


@pytest.fixture(scope="module")
def samples(phantom_shards: Path, tiny: Config) -> list[Sample]:
    """Seven, a prime number, of one split; two lack region maps, outlines or reports."""
    data = tiny.data.model_copy(update={"shards": str(phantom_shards)})
    found = [*ShardDataset(data, "train"), *ShardDataset(data, "valid")][:SAMPLES]
    found = [replace(one, meta=replace(one.meta, split="train")) for one in found]
    one, other = found[2], found[5]
    none = dict.fromkeys(one.meta.lesions_annotated, False)
    found[2] = replace(
        one,
        regions=one.regions * 0,
        lesions=one.lesions * 0,
        meta=replace(one.meta, regions_source=None, lesions_annotated=none),
    )
    found[5] = replace(other, meta=replace(other.meta, findings=None, impression=None))
    return found


@pytest.fixture(scope="module")
def shards(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("seven")
    write_shards(samples, folder, samples_per_shard=3)
    assert len(list(folder.glob("*.tar"))) == 3
    return str(folder)


@pytest.fixture(scope="module")
def truth(samples: list[Sample]) -> dict[str, Seen]:
    return {one.key: one for one in seen_of(collate_samples(samples))}


@pytest.fixture(scope="module")
def row(shards: str, tiny: Config) -> list[Seen]:
    """The first samples of training, as one rank that takes one at a time meets them."""
    data = tiny.data.model_copy(update={"shards": shards})
    alone = islice(build_train_loader(data, 1, 0, 1, SEED), 9 * SAMPLES)  # type: ignore[arg-type]
    return [one for batch in alone for one in seen_of(batch)]


@pytest.fixture(scope="module")
def processes() -> Iterator[list[ProcessPoolExecutor]]:
    """Four processes, each for one rank at a time, forked from a server that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rectvlm.data.loader"])
    pools = [ProcessPoolExecutor(1, context) for _ in range(4)]
    yield pools
    for pool in pools:
        pool.shutdown()


def run(
    processes: list[ProcessPoolExecutor],
    shards: str,
    workers: Sequence[int],
    steps: int,
    seen: int = 0,
) -> list[list[list[Seen]]]:
    """Batches by rank, of as many ranks as `workers` has numbers, all at the same time."""
    world = len(workers)
    waiting = [
        process.submit(rank_process, shards, rank, world, count, seen, steps)
        for rank, (process, count) in enumerate(zip(processes, workers, strict=False))
    ]
    found = [one.result(timeout=120) for one in waiting]
    assert len({pid for pid, _ in found} - {os.getpid()}) == world
    return [batches for _, batches in found]


def together(ranks: list[list[list[Seen]]]) -> list[Seen]:
    """All samples of all ranks in the order of training: step by step, rank by rank."""
    return [one for step in zip(*ranks, strict=True) for batch in step for one in batch]


@pytest.mark.parametrize("workers", [(1, 0), (0, 0, 0), (0, 0, 0, 0)], ids=["2", "3", "4"])
def test_ranks_share_each_epoch_without_rest(
    processes: list[ProcessPoolExecutor],
    shards: str,
    truth: dict[str, Seen],
    row: list[Seen],
    workers: tuple[int, ...],
) -> None:
    """As many steps as samples make one epoch for each place in a batch of all ranks."""
    ranks = run(processes, shards, workers, steps=SAMPLES)
    assert [len(batches) for batches in ranks] == [SAMPLES] * len(workers)
    assert all(len(batch) == MICRO_BATCH for batches in ranks for batch in batches)
    everything = together(ranks)
    assert len(everything) == SAMPLES * MICRO_BATCH * len(workers)
    for start in range(0, len(everything), SAMPLES):
        epoch = everything[start : start + SAMPLES]
        assert {one.key: one for one in epoch} == truth
    assert everything == row[: len(everything)]


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [((0, 1), (0, 0, 0), 1), ((0, 0, 0, 0), (2, 0), 2), ((0, 0, 0), (0, 0, 0, 0), 3)],
    ids=["2 to 3", "4 to 2", "3 to 4"],
)
def test_a_run_goes_on_in_mid_epoch_on_another_number_of_ranks_and_workers(
    processes: list[ProcessPoolExecutor],
    shards: str,
    row: list[Seen],
    before: tuple[int, ...],
    after: tuple[int, ...],
    steps: int,
) -> None:
    done = together(run(processes, shards, before, steps))
    seen = len(done)
    assert seen % SAMPLES, "the run must end within an epoch"
    rest = together(run(processes, shards, after, steps=3, seen=seen))
    assert done + rest == row[: seen + len(rest)]
    here, missing = done[seen // SAMPLES * SAMPLES :], SAMPLES - seen % SAMPLES
    assert sorted(one.key for one in here + rest[:missing]) == sorted(
        one.key for one in row[:SAMPLES]
    )


def test_samples_without_masks_or_reports_stand_in_full_batches_with_their_flags(
    processes: list[ProcessPoolExecutor], shards: str, samples: list[Sample]
) -> None:
    (found,) = run(processes, shards, (0,), steps=SAMPLES)
    assert all(len(batch) == MICRO_BATCH for batch in found)
    by_key = {one.key: one for batch in found for one in batch}
    assert len(by_key) == SAMPLES
    bare, silent = samples[2].meta.key, samples[5].meta.key
    assert [key for key, one in by_key.items() if not one.regions_known] == [bare]
    assert not any(by_key[bare].annotated) and by_key[bare].report is not None
    assert [key for key, one in by_key.items() if one.report is None] == [silent]
    assert any(by_key[silent].annotated)
