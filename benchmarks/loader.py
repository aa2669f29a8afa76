"""How fast shards become batches, against bare blosc2 decoding of the same bytes.

    python -m benchmarks.loader [--samples 12] [--rounds 5] [--slices 300]

Every sample has the full grid of 64 × 512 × 512 voxels: the demo's two real CTs as
benchmarks/preprocess.py prepares them, with coarse region maps and outlined tumours, under several
names. Three ways take turns, so that a slow minute of the machine meets all of them: blosc2 alone,
from bytes in memory into arrays that are there already; the loader without workers, from the shards
in the page cache to a batch; and the loader with one worker process, which has a core of its own.
Results go to benchmarks/results/loader-MACHINE-DATE.json and .md.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import blosc2
import numpy as np
import torch

from benchmarks.preprocess import GRID, SPACING, make_volumes, name_case
from benchmarks.publishing import (
    CHECKOUT,
    make_page_header,
    make_parser,
    make_table,
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
_WARMUP_BATCHES = 6


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


def measure_loader(data: DataConfig, rounds: int) -> JsonObject:
    """Measure the seconds of every way, and the size of a sample.

    Returns:
        `bare` and `loader`: CPU seconds, one number for each sample and round; `worker`: seconds
        between two batches, one number for each round; `main`: CPU seconds of the main process for
        each of these batches; `packed_bytes` and `voxel_bytes` of a sample, on average.
    """
    dataset = ShardDataset(data, "train")
    torch.set_num_threads(1)
    buffers = read_buffers(dataset)
    arrays = {name: np.zeros(data.grid, dtype) for name, dtype in VOLUME_DTYPES.items()}
    seconds: dict[str, list[float]] = {"bare": [], "loader": [], "worker": [], "main": []}
    cores = sorted(os.sched_getaffinity(0))
    order = [[number] for number in range(len(dataset))]
    batches = iter(BatchLoader(dataset, order * (rounds + 1)))
    try:
        for turn in range(rounds + 1):
            os.sched_setaffinity(0, {cores[0]})
            bare_seconds: list[float] = []
            loader_seconds: list[float] = []
            for buffer_by_volume in buffers:
                start_seconds = time.process_time()
                for name, buffer in buffer_by_volume.items():
                    blosc2.decompress2(buffer, dst=arrays[name], nthreads=1)
                bare_seconds.append(time.process_time() - start_seconds)
                start_seconds = time.process_time()
                batch = next(batches)
                loader_seconds.append(time.process_time() - start_seconds)
                is_same = torch.equal(batch.ct[0], torch.from_numpy(arrays["ct"]))
                assert is_same, "both ways decode the same bytes"
            if turn == 0:
                continue  # it warms up
            worker_seconds, main_seconds = measure_with_worker(dataset, cores)
            seconds["bare"] += bare_seconds
            seconds["loader"] += loader_seconds
            seconds["worker"].append(worker_seconds)
            seconds["main"].append(main_seconds)
    finally:
        os.sched_setaffinity(0, cores)
    packed_bytes = 0
    for buffer_by_volume in buffers:
        packed_bytes += sum(map(len, buffer_by_volume.values()))
    return {
        **seconds,
        "packed_bytes": packed_bytes / len(buffers),
        "voxel_bytes": sum(array.nbytes for array in arrays.values()),
    }


def measure_with_worker(dataset: ShardDataset, cores: Sequence[int]) -> tuple[float, float]:
    """Measure a loader whose worker has the last core.

    Batches that start the process and fill memory for the first time come before and do not count.

    Returns:
        Seconds between two batches, and CPU seconds of this process for each.
    """
    os.sched_setaffinity(0, {cores[-1]})  # the worker inherits it
    samples = len(dataset)
    order = [[number % samples] for number in range(_WARMUP_BATCHES + samples)]
    batches = iter(BatchLoader(dataset, order, workers=1))
    os.sched_setaffinity(0, {cores[0]})
    for _ in range(_WARMUP_BATCHES):
        next(batches)
    start_seconds, cpu_start_seconds = time.perf_counter(), time.process_time()
    for _ in range(samples):
        next(batches)
    seconds = time.perf_counter() - start_seconds
    cpu_seconds = time.process_time() - cpu_start_seconds
    batches.close()
    return seconds / samples, cpu_seconds / samples


def summarize_speeds(measured: JsonObject) -> dict[str, float]:
    """Compute speeds and ratios.

    A ratio is the median over pairs of measurements of one sample in one round, or of a round.
    """
    bare, loader, worker = measured["bare"], measured["loader"], measured["worker"]
    samples = len(bare) // len(worker)
    bare_means: list[float] = []
    for start in range(0, samples * len(worker), samples):
        bare_means.append(statistics.mean(bare[start : start + samples]))
    main_median = statistics.median(measured["main"])
    worker_median = statistics.median(worker)
    loader_ratios = [a / b for a, b in zip(bare, loader, strict=True)]
    worker_ratios = [a / b for a, b in zip(bare_means, worker, strict=True)]
    return {
        "loader_over_bare": statistics.median(loader_ratios),
        "worker_over_bare": statistics.median(worker_ratios),
        "bare_per_second": 1 / statistics.median(bare),
        "loader_per_second": 1 / statistics.median(loader),
        "worker_per_second": 1 / worker_median,
        "workers_for_a_gpu": H200_VOLUMES_PER_SECOND * worker_median,
        "cores_for_a_gpu": H200_VOLUMES_PER_SECOND * (worker_median + main_median),
    }


def to_markdown(result: JsonObject) -> str:
    """Write the result as a page."""
    measured, ratios = result["measured"], result["ratios"]
    ways = {
        "bare blosc2 decoding": ("bare", 1.0),
        "loader without workers": ("loader", ratios["loader_over_bare"]),
        "loader with one worker": ("worker", ratios["worker_over_bare"]),
    }
    columns = ["way", "minimum", "median", "maximum", "samples/s of a core", "of bare decoding"]
    rows: list[list[str]] = []
    for name, (key, share) in ways.items():
        seconds, speed = measured[key], ratios[f"{key}_per_second"]
        figures = [min(seconds), statistics.median(seconds), max(seconds)]
        cells = [f"{figure:.4f}" for figure in figures]
        rows.append([name, *cells, f"{speed:.1f}", f"{share:.2f}"])
    return (
        make_page_header("Loader", "python -m benchmarks.loader", result)
        + f"{result['samples']} samples of {' × '.join(map(str, result['grid']))} voxels with "
        f"lesions and regions ({measured['packed_bytes'] / 1e6:.1f} MB in the shards, "
        f"{measured['voxel_bytes'] / 1e6:.0f} MB decoded), over {result['rounds']} rounds. Seconds "
        "of a sample: CPU seconds on one core in the first two rows, and in the third the time "
        "between two batches, of one sample each, while the worker has a core of its own. The "
        "shards are in the page cache: reading from a disk or a server comes on top.\n\n"
        + make_table(columns, rows)
        + f"\nThe loader does {ratios['loader_over_bare']:.2f} of the samples that bare decoding "
        f"does on a core, and {ratios['worker_over_bare']:.2f} in a worker process (aim: at least "
        f"0.8). To feed one H200 with {H200_VOLUMES_PER_SECOND} volumes a second takes, computed "
        f"from this, {ratios['workers_for_a_gpu']:.1f} workers on cores of this kind, and "
        f"{ratios['cores_for_a_gpu']:.1f} cores with the main process's share.\n"
    )


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
        measured = measure_loader(data, options.rounds)
    facts = {
        "versions": preprocessing_versions() | {"torch": torch.__version__},
        "samples": options.samples,
        "grid": GRID,
        "rounds": options.rounds,
        "measured": measured,
        "ratios": summarize_speeds(measured),
    }
    publish_result(options.out, "loader", start_seconds, facts, to_markdown)
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
        "--slices",
        type=positive_int,
        default=300,
        help="slices of the volumes they come from (default 300)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
