"""How fast shards become batches, against bare blosc2 decoding of the same bytes.

    python -m benchmarks.loader [--samples 12] [--rounds 5] [--slices 300]

Every sample has the full grid of 64 × 512 × 512 voxels: the demo's two real CTs as benchmarks/preprocess.py prepares
them, with coarse region maps and outlined tumours, under several names. Three ways take turns, so that a slow minute of
the machine meets all of them: blosc2 alone, from bytes in memory into arrays that are there already; the loader without
workers, from the shards in the page cache to a batch; and the loader with one worker process, which has a core of its
own. Results go to benchmarks/results/loader-MACHINE-DATE.json and .md.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch

from benchmarks.preprocess import GRID, SPACING, make_volumes
from benchmarks.publishing import (
    CHECKOUT,
    RESULTS_FOLDER,
    make_page_header,
    positive_int,
    publish_result,
    quiet_main,
)
from data_pipeline.cases import Case, CaseData, case_to_sample, file_identity
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

H200_VOLUMES_PER_SECOND = 10
"""What one H200 takes."""
_WARMUP_BATCHES = 6


def make_full_grid_shards(folder: Path, count: int, slices: int, work: Path) -> None:
    """`count` samples at the full grid in shards of four, from the two volumes of `make_volumes`."""
    samples = [
        case_to_sample(
            Case(
                f"ct_{number}",
                "train",
                f"{number}",
                path.name,
                partial(_load_case, path, number),
                file_identity(path),
            ),
            GRID,
            SPACING,
            coarse_regions=True,
        )
        for number, path in enumerate(make_volumes(work, min(count, len(SAMPLE_CTS)), slices))
    ]
    chosen = (samples[number % len(samples)] for number in range(count))
    write_shards(
        (
            replace(one, meta=replace(one.meta, key=f"{one.meta.key}_{number}"))
            for number, one in enumerate(chosen)
        ),
        folder,
        samples_per_shard=4,
    )


def _load_case(path: Path, number: int) -> CaseData:
    outline = read_volume(SAMPLE_CTS[number].mask_path(CHECKOUT / "data" / "samples"))
    bits = pack_lesion(outline.array > 0, LESION_BY_KEY[OUTLINED_LESION])
    looked_for = {key: key == OUTLINED_LESION for key in LESION_BY_KEY}
    return CaseData(
        volume=read_volume(path),
        lesions=[replace(outline, array=bits)],
        lesions_annotated=looked_for,
    )


def read_buffers(dataset: ShardDataset) -> list[dict[str, memoryview]]:
    """By sample and volume: the blosc2 buffer, in memory."""
    buffers = []
    for entry in dataset.locations:
        found = {}
        for name in VOLUME_DTYPES:
            data = ShardStore(dataset.store).read_range(entry.shard, *entry.members[name])
            found[name] = memoryview(data)[data.index(b"\n") + 1 :]
        buffers.append(found)
    return buffers


def measure_loader(data: DataConfig, rounds: int) -> dict[str, Any]:
    """Seconds of every way, and what a sample weighs.

    Returns:
        `bare` and `loader`: CPU seconds, one number for each sample and round; `worker`: seconds between two batches,
        one number for each round; `main`: CPU seconds of the main process for each of these batches;
        `packed_bytes` and `voxel_bytes` of a sample, on average.
    """
    dataset = ShardDataset(data, "train")
    torch.set_num_threads(1)
    buffers = read_buffers(dataset)
    arrays = {name: np.zeros(data.grid, dtype) for name, dtype in VOLUME_DTYPES.items()}
    seconds: dict[str, list[float]] = {"bare": [], "loader": [], "worker": [], "main": []}
    cores = sorted(os.sched_getaffinity(0))
    batches = iter(
        BatchLoader(dataset, [[number] for number in range(len(dataset))] * (rounds + 1))
    )
    try:
        for turn in range(rounds + 1):
            os.sched_setaffinity(0, {cores[0]})
            taken: dict[str, list[float]] = {"bare": [], "loader": []}
            for found in buffers:
                begin = time.process_time()
                for name, buffer in found.items():
                    blosc2.decompress2(buffer, dst=arrays[name], nthreads=1)
                taken["bare"].append(time.process_time() - begin)
                begin = time.process_time()
                batch = next(batches)
                taken["loader"].append(time.process_time() - begin)
                assert torch.equal(batch.ct[0], torch.from_numpy(arrays["ct"])), (
                    "both ways decode the same bytes"
                )
            if turn == 0:
                continue  # it warms up
            between, main = measure_with_worker(dataset, cores)
            for name, values in (taken | {"worker": [between], "main": [main]}).items():
                seconds[name] += values
    finally:
        os.sched_setaffinity(0, cores)
    packed = sum(len(buffer) for found in buffers for buffer in found.values()) / len(buffers)
    return seconds | {
        "packed_bytes": packed,
        "voxel_bytes": sum(array.nbytes for array in arrays.values()),
    }


def measure_with_worker(dataset: ShardDataset, cores: Sequence[int]) -> tuple[float, float]:
    """Seconds between two batches of a loader whose worker has the last core; CPU seconds of this process for each.

    Batches that start the process and fill memory for the first time come before and do not count.
    """
    os.sched_setaffinity(0, {cores[-1]})  # the worker inherits it
    order = [[number % len(dataset)] for number in range(_WARMUP_BATCHES + len(dataset))]
    batches = iter(BatchLoader(dataset, order, workers=1))
    os.sched_setaffinity(0, {cores[0]})
    for _ in range(_WARMUP_BATCHES):
        next(batches)
    begin, own = time.perf_counter(), time.process_time()
    for _ in range(len(dataset)):
        next(batches)
    between, main = time.perf_counter() - begin, time.process_time() - own
    batches.close()
    return between / len(dataset), main / len(dataset)


def summarize_speeds(measured: dict[str, Any]) -> dict[str, float]:
    """Speeds and ratios: of paired measurements of one sample in one round, or of a round, by their median."""
    bare, loader = measured["bare"], measured["loader"]
    rounds = len(measured["worker"])
    each = len(bare) // rounds
    means = [statistics.mean(bare[k * each : (k + 1) * each]) for k in range(rounds)]
    main, worker = (statistics.median(measured[name]) for name in ("main", "worker"))
    return {
        "loader_over_bare": statistics.median(a / b for a, b in zip(bare, loader, strict=True)),
        "worker_over_bare": statistics.median(
            a / c for a, c in zip(means, measured["worker"], strict=True)
        ),
        "bare_per_second": 1 / statistics.median(bare),
        "loader_per_second": 1 / statistics.median(loader),
        "worker_per_second": 1 / worker,
        "workers_for_a_gpu": H200_VOLUMES_PER_SECOND * worker,
        "cores_for_a_gpu": H200_VOLUMES_PER_SECOND * (worker + main),
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    measured, ratios = result["measured"], result["ratios"]
    rows = {
        "bare blosc2 decoding": ("bare", "bare_per_second", "1.00"),
        "loader without workers": (
            "loader",
            "loader_per_second",
            f"{ratios['loader_over_bare']:.2f}",
        ),
        "loader with one worker": (
            "worker",
            "worker_per_second",
            f"{ratios['worker_over_bare']:.2f}",
        ),
    }
    lines = [
        make_page_header("Loader", "python -m benchmarks.loader", result),
        f"{result['samples']} samples of {' × '.join(map(str, result['grid']))} voxels with lesions and regions "
        f"({measured['packed_bytes'] / 1e6:.1f} MB in the shards, {measured['voxel_bytes'] / 1e6:.0f} MB decoded), "
        f"over {result['rounds']} rounds. Seconds of a sample: CPU seconds on one core in the first two rows, and in "
        "the third the time between two batches, of one sample each, while the worker has a core of its own. The "
        "shards are in the page cache: reading from a disk or a server comes on top.\n\n",
        "| way | minimum | median | maximum | samples/s of a core | of bare decoding |\n|---|---|---|---|---|---|\n",
    ]
    for name, (key, speed, share) in rows.items():
        taken = measured[key]
        lines.append(
            f"| {name} | {min(taken):.4f} | {statistics.median(taken):.4f} | {max(taken):.4f} "
            f"| {ratios[speed]:.1f} | {share} |\n"
        )
    lines.append(
        f"\nThe loader does {ratios['loader_over_bare']:.2f} of the samples that bare decoding does on a core, and "
        f"{ratios['worker_over_bare']:.2f} in a worker process (aim: at least 0.8). To feed one H200 with "
        f"{H200_VOLUMES_PER_SECOND} volumes a second takes, computed from this, {ratios['workers_for_a_gpu']:.1f} workers "
        f"on cores of this kind, and {ratios['cores_for_a_gpu']:.1f} cores with the main process's share.\n"
    )
    return "".join(lines)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parse_arguments(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as temporary:
        shards = Path(temporary) / "shards"
        make_full_grid_shards(shards, options.samples, options.slices, Path(temporary) / "volumes")
        place = {"grid": GRID, "spacing": SPACING, "shards": str(shards)}
        measured = measure_loader(load_config("demo").data.model_copy(update=place), options.rounds)
    facts = {
        "versions": preprocessing_versions() | {"torch": torch.__version__},
        "samples": options.samples,
        "grid": GRID,
        "rounds": options.rounds,
        "measured": measured,
        "ratios": summarize_speeds(measured),
    }
    publish_result(options.out, "loader", begin, facts, to_markdown)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=(__doc__ or "").split("\n")[0]
    )
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
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER, metavar="DIR")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
