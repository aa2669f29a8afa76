"""How fast shards become batches, against bare blosc2 decoding of the same bytes and other loaders.

    python -m benchmarks.loader [--samples 12] [--rounds 5] [--slices 300] [--workers 1 2]

Every sample has the full grid of 64 × 512 × 512 voxels: the demo's two real CTs as
benchmarks/preprocess.py prepares them, with coarse region maps and outlined tumours, under several
names. All ways take turns, so that a slow minute of the machine meets all of them: blosc2 alone,
from bytes in memory into arrays that are there already; the loader, from the shards in the page
cache to a batch; and the loaders of `loader_peers.py` that are installed. First without workers, on
one core, and then with worker processes.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import blosc2
import numpy as np
import torch

from benchmarks.loader_peers import INSTALL_BY_MODULE, PeerLoader, Volumes, start_peers
from benchmarks.measurements import Comparison, Repetitions
from benchmarks.preprocess import GRID, SPACING, make_volumes, name_case
from benchmarks.publishing import (
    CHECKOUT,
    Program,
    find_missing_peers,
    make_parser,
    positive_int,
    publish_result,
    quiet_main,
)
from data_pipeline.cases import CaseData, case_to_sample
from data_pipeline.sample_cts import OUTLINED_LESION, SAMPLE_CTS
from rectvlm.config import DataConfig, load_config
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.loader import BatchLoader
from rectvlm.data.sample import VOLUME_DTYPES, preprocessing_versions
from rectvlm.data.shards import write_shards
from rectvlm.data.store import ShardStore
from rectvlm.data.volume import read_volume
from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_bits import pack_lesion
from rectvlm.types import JsonObject, Sample

H200_VOLUMES_PER_SECOND = 10
"""Volumes that one H200 consumes in a second."""
_WARMUP_SAMPLES_OF_A_WORKER = 4
BARE, LOADER = "bare blosc2 decoding", "rectvlm"


def make_full_grid_shards(folder: Path, count: int, slices: int, work: Path) -> None:
    """Write `count` samples at the full grid in shards of four, from `make_volumes`' two CTs."""
    samples: list[Sample] = []
    volumes = make_volumes(work, min(count, len(SAMPLE_CTS)), slices)
    for number, path in enumerate(volumes):
        case = name_case(path, patient=f"{number}", load=partial(_load_case, path, number))
        samples.append(case_to_sample(case, GRID, SPACING, coarse_regions=True))

    def iterate_samples() -> Iterator[Sample]:
        for number in range(count):
            sample = samples[number % len(samples)]
            yield replace(sample, meta=replace(sample.meta, key=f"{sample.meta.key}_{number}"))

    write_shards(iterate_samples(), folder, samples_per_shard=4)


def _load_case(path: Path, number: int) -> CaseData:
    outline = read_volume(SAMPLE_CTS[number].mask_path(CHECKOUT / "data" / "samples"))
    bits = pack_lesion(outline.array > 0, LESION_BY_KEY[OUTLINED_LESION])
    is_annotated = {key: key == OUTLINED_LESION for key in LESION_BY_KEY}
    return CaseData(
        volume=read_volume(path),
        lesions=[replace(outline, array=bits)],
        lesions_annotated=is_annotated,
    )


def read_buffers(dataset: ShardDataset) -> list[dict[str, memoryview]]:
    """Read the blosc2 buffers into memory, by sample and volume."""
    store = ShardStore(dataset.store)
    buffers: list[dict[str, memoryview]] = []
    for location in dataset.locations:
        buffer_by_volume: dict[str, memoryview] = {}
        for name in VOLUME_DTYPES:
            data = store.read_range(location.shard, *location.members[name])
            buffer_by_volume[name] = memoryview(data)[data.index(b"\n") + 1 :]
        buffers.append(buffer_by_volume)
    return buffers


def measure_loader(data: DataConfig, rounds: int, peers: Mapping[str, PeerLoader]) -> JsonObject:
    """Measure the CPU seconds of every way without workers, and the size of a sample.

    Args:
        data: the shards.
        rounds: measurements of each way and sample.
        peers: other loaders.

    Returns:
        `seconds` by way, one number for each sample and round; `packed_bytes` and `voxel_bytes` of
        a sample, on average.
    """
    dataset = ShardDataset(data, "train")
    torch.set_num_threads(1)
    buffers = read_buffers(dataset)
    arrays = {name: np.zeros(data.grid, dtype) for name, dtype in VOLUME_DTYPES.items()}
    turns = rounds + 1
    order = list(range(len(dataset))) * turns
    batches = iter(BatchLoader(dataset, [[number] for number in order]))
    peer_samples = {name: iterate(order, 0) for name, iterate in peers.items()}

    def decode_bare(number: int) -> torch.Tensor:
        for name, buffer in buffers[number].items():
            blosc2.decompress2(buffer, dst=arrays[name], nthreads=1)
        return torch.from_numpy(arrays["ct"])

    ways: dict[str, Callable[[int], torch.Tensor]] = {
        BARE: decode_bare,
        LOADER: lambda _: next(batches).ct[0],
    }
    for name in peers:
        ways[name] = partial(_take_ct, peer_samples[name])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cores = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, {cores[0]})
        for turn in range(turns):
            for number in range(len(dataset)):
                for name, read_ct in ways.items():
                    start_seconds = time.process_time()
                    ct = read_ct(number)
                    if turn:  # the first turn warms up
                        seconds[name].append(time.process_time() - start_seconds)
                    assert ct.shape == data.grid, f"{name} reads {ct.shape}"
                    # webdataset goes by shard, which is the order of the samples here.
                    is_same = torch.equal(ct, torch.from_numpy(arrays["ct"]))
                    assert is_same, f"{name} decodes other voxels"
    finally:
        os.sched_setaffinity(0, cores)
    packed_bytes = 0
    for buffer_by_volume in buffers:
        packed_bytes += sum(map(len, buffer_by_volume.values()))
    return {
        "seconds": seconds,
        "packed_bytes": packed_bytes / len(buffers),
        "voxel_bytes": sum(array.nbytes for array in arrays.values()),
    }


def _take_ct(samples: Iterator[Volumes], _number: int) -> torch.Tensor:
    return next(samples)["ct"]


def measure_growth(
    data: DataConfig, rounds: int, peers: Mapping[str, PeerLoader], worker_counts: Sequence[int]
) -> list[JsonObject]:
    """Measure the samples a second of every loader with workers, in turns.

    Samples that start the processes and fill memory for the first time come before and do not
    count.
    """
    dataset = ShardDataset(data, "train")
    loaders: dict[str, PeerLoader] = {LOADER: partial(_iterate_batches, dataset), **peers}
    rows: list[JsonObject] = []
    for turn, (count, name) in itertools.product(
        range(rounds), itertools.product(worker_counts, loaders)
    ):
        warmup, samples = _WARMUP_SAMPLES_OF_A_WORKER * count, len(dataset) * count
        order = [number % len(dataset) for number in range(warmup + samples)]
        iterator = loaders[name](order, count)
        for _ in range(warmup):
            next(iterator)
        start_seconds = time.perf_counter()
        for _ in range(samples):
            next(iterator)
        rate = samples / (time.perf_counter() - start_seconds)
        for _ in iterator:
            pass  # workers that are ended while they send abort
        rows.append({"loader": name, "workers": count, "turn": turn, "samples_per_second": rate})
    return rows


def _iterate_batches(
    dataset: ShardDataset, order: Sequence[int], workers: int
) -> Iterator[Volumes]:
    batches = iter(BatchLoader(dataset, [[number] for number in order], workers=workers))
    for batch in batches:
        yield {"ct": batch.ct[0]}


def summarize_speeds(
    seconds: Mapping[str, Sequence[float]], growth: Sequence[JsonObject]
) -> dict[str, float]:
    """Compute what the loader does of bare decoding, and what feeds a GPU.

    A ratio is the median over pairs of measurements of one sample in one round.
    """
    pairs = zip(seconds[BARE], seconds[LOADER], strict=True)
    one_worker: list[float] = []
    for row in growth:
        if row["loader"] == LOADER and row["workers"] == 1:
            one_worker.append(row["samples_per_second"])
    return {
        "loader_over_bare": statistics.median([bare / loader for bare, loader in pairs]),
        "workers_for_a_gpu": H200_VOLUMES_PER_SECOND / statistics.median(one_worker),
    }


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List the CPU seconds of every way, and samples a second over workers."""
    seconds, growth = Repetitions(), Repetitions()
    for name, values in result["measured"]["seconds"].items():
        seconds.add(name, values)
    for row in result["growth"]:
        growth.add(row["loader"], row["samples_per_second"], row["workers"])
    return [
        Comparison("A sample without workers", "CPU s", seconds.to_measurements(), baseline=BARE),
        Comparison(
            "Samples a second with workers",
            "samples/s",
            growth.to_measurements(),
            better="higher",
            plot="lines",
            at_label="workers",
        ),
    ]


def write_text(result: JsonObject) -> str:
    """Write the circumstances and what feeds a GPU."""
    measured, ratios = result["measured"], result["ratios"]
    return (
        f"{result['samples']} samples of {' × '.join(map(str, result['grid']))} voxels with "
        f"lesions and regions ({measured['packed_bytes'] / 1e6:.1f} MB in the shards, "
        f"{measured['voxel_bytes'] / 1e6:.0f} MB decoded), over {result['rounds']} rounds; CPU "
        "seconds on one core without workers. Files are in the page cache: reading from a disk or "
        "a server comes on top, and MONAI and LitData read copies that are not compressed, "
        f"{measured['voxel_bytes'] / measured['packed_bytes']:.1f} times as large as the shards.\n"
        f"\nThe loader does {ratios['loader_over_bare']:.2f} of the samples that bare decoding "
        "does on a core (aim: at least 0.8). To feed one H200 with "
        f"{H200_VOLUMES_PER_SECOND} volumes a second takes, computed from this, "
        f"{ratios['workers_for_a_gpu']:.1f} workers on cores of this kind.\n"
    )


PROGRAM = Program("loader", "Loader", write_text, list_comparisons)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    start_seconds = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as temporary:
        shards, volumes = Path(temporary) / "shards", Path(temporary) / "volumes"
        make_full_grid_shards(shards, options.samples, options.slices, volumes)
        changes = {"grid": GRID, "spacing": SPACING, "shards": str(shards)}
        data = load_config("demo").data.model_copy(update=changes)
        missing = find_missing_peers(INSTALL_BY_MODULE)
        installed = INSTALL_BY_MODULE.keys() - {peer.name for peer in missing}
        peers = start_peers(data, Path(temporary), sorted(installed))
        measured = measure_loader(data, options.rounds, peers)
        growth_rounds = math.ceil(options.rounds / 2)
        growth = measure_growth(data, growth_rounds, peers, options.workers)
    facts = {
        "versions": preprocessing_versions() | {"torch": torch.__version__},
        "samples": options.samples,
        "grid": GRID,
        "rounds": options.rounds,
        "measured": measured,
        "growth": growth,
        "ratios": summarize_speeds(measured["seconds"], growth),
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts, missing)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("loader", "How fast shards become batches.")
    parser.add_argument(
        "--samples", type=positive_int, default=12, help="samples in the shards (default 12)"
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=5,
        help="measurements of each way and sample (default 5)",
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        nargs="+",
        default=[1, 2],
        help="numbers of worker processes, 1 among them (default 1 and 2)",
    )
    parser.add_argument(
        "--slices",
        type=positive_int,
        default=300,
        help="slices of the volumes they come from (default 300)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
