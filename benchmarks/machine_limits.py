"""Limits of the machine: matrix product, memory, disk, decompression, host to device.

    python -m benchmarks.machine_limits [--rounds 7] [--megabytes 256]

What every other figure is to be held against. The disk is that of the temporary folder: written
with fsync; read after the system was asked to drop the file from its cache, which it may not do
in a container. Decompression is that of a CT as `.nii.gz` holds it (libdeflate, one core) and as
the shards hold it (blosc2 with zstd, one thread).
"""

import argparse
import gzip
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import blosc2
import deflate
import numpy as np
import torch

from benchmarks.measurements import Comparison, Repetitions
from benchmarks.publishing import (
    Program,
    make_parser,
    positive_int,
    publish_result,
    quiet_main,
)
from benchmarks.timing import default_device, synchronize, synchronized_time
from rectvlm.types import JsonObject

_MATRIX_SIZE = {"cuda": 8192, "cpu": 2048}
_DTYPES = ("float32", "bfloat16", "float16")


def measure_matrix_rate(dtype: torch.dtype, device: torch.device, rounds: int = 10) -> list[float]:
    """Measure the FLOP/s of a square matrix product, by round after one that warms up."""
    n = _MATRIX_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    torch.matmul(a, b)
    rates: list[float] = []
    for _ in range(rounds):
        start_seconds = synchronized_time(device)
        torch.matmul(a, b)
        rates.append(2 * n**3 / (synchronized_time(device) - start_seconds))
    return rates


def measure_copy_rates(
    source: torch.Tensor, target: torch.Tensor, rounds: int, passes: int = 1
) -> list[float]:
    """Measure the bytes a second of a copy; `passes` counts how often the memory is touched."""
    device = default_device()
    target.copy_(source)
    rates: list[float] = []
    for _ in range(rounds):
        start_seconds = synchronized_time(device)
        target.copy_(source, non_blocking=True)
        synchronize(device)
        rates.append(passes * source.nbytes / (time.perf_counter() - start_seconds))
    return rates


def measure_disk(folder: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Measure the bytes a second of writing a file of random bytes, and of reading it."""
    data, path = os.urandom(size), folder / "data"
    rates: dict[str, list[float]] = {"disk, write": [], "disk, read": []}
    for _ in range(rounds):
        start_seconds = time.perf_counter()
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rates["disk, write"].append(size / (time.perf_counter() - start_seconds))
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start_seconds = time.perf_counter()
            assert len(file.read()) == size
            rates["disk, read"].append(size / (time.perf_counter() - start_seconds))
        path.unlink()
    return rates


def measure_decompression(size: int, rounds: int) -> dict[str, list[float]]:
    """Measure the decompressed bytes a second, of a smooth volume with a scanner's noise."""
    noise = np.random.default_rng(0).normal(0, 12, size // 2)
    volume = (400 * np.sin(np.arange(size // 2) / 997) + noise).astype(np.int16)
    packed_file = gzip.compress(volume.tobytes(), compresslevel=1)
    packed_shard = blosc2.compress2(
        volume, codec=blosc2.Codec.ZSTD, clevel=1, typesize=2, filters=[blosc2.Filter.BITSHUFFLE]
    )
    target = np.empty_like(volume)

    def decode_shard() -> None:
        blosc2.decompress2(packed_shard, dst=target, nthreads=1)

    decoders: dict[str, Callable[[], object]] = {
        "decompression, .nii.gz": lambda: deflate.gzip_decompress(packed_file),
        "decompression, shard": decode_shard,
    }
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(rounds + 1):
        for name, decode in decoders.items():
            start_seconds = time.perf_counter()
            decode()
            if turn:  # the first turn warms up
                rates[name].append(volume.nbytes / (time.perf_counter() - start_seconds))
    return rates


def measure_bandwidths(size: int, rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Measure the bytes a second of memory, and between host and device."""
    host = torch.zeros(size, dtype=torch.uint8)
    yield "main memory, copy", measure_copy_rates(host, torch.empty_like(host), rounds, passes=2)
    if not torch.cuda.is_available():
        return
    device_bytes = torch.zeros(size, dtype=torch.uint8, device="cuda")
    twin = torch.empty_like(device_bytes)
    yield "GPU memory, copy", measure_copy_rates(device_bytes, twin, rounds, passes=2)
    yield "host to device", measure_copy_rates(host, device_bytes, rounds)
    yield "host to device, pinned", measure_copy_rates(host.pin_memory(), device_bytes, rounds)
    yield "device to host, pinned", measure_copy_rates(device_bytes, host.pin_memory(), rounds)


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List matrix rates by dtype, and bandwidths."""
    products, bandwidths = Repetitions(), Repetitions()
    for dtype, rates in result["matrix_flops_per_second"].items():
        products.add(dtype, [rate / 1e12 for rate in rates])
    for name, rates in result["bytes_per_second"].items():
        bandwidths.add(name, [rate / 1e9 for rate in rates])
    return [
        Comparison("Matrix product", "TFLOP/s", products.to_measurements(), better="higher"),
        Comparison("Bandwidths", "GB/s", bandwidths.to_measurements(), better="higher"),
    ]


def write_text(result: JsonObject) -> str:
    """Write the circumstances."""
    return (
        f"Square matrices of {result['matrix_size']} rows; {result['megabytes']} MB at once for "
        "bandwidths (a copy of memory counts twice: read and written). Decompression counts what "
        f"comes out. {result['threads']} threads for matrix product and copy of main memory.\n"
    )


PROGRAM = Program("machine_limits", "Limits of the machine", write_text, list_comparisons)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    start_seconds, size = time.monotonic(), options.megabytes * 1_000_000
    device, rounds = default_device(), options.rounds
    products: dict[str, list[float]] = {}
    for name in options.dtypes:
        products[name] = measure_matrix_rate(getattr(torch, name), device, rounds)
    bandwidths = dict(measure_bandwidths(size, rounds))
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as folder:
        bandwidths |= measure_disk(Path(folder), size, math.ceil(rounds / 2))
    bandwidths |= measure_decompression(size, rounds)
    facts = {
        "versions": {"torch": torch.__version__},
        "matrix_size": _MATRIX_SIZE[device.type],
        "megabytes": options.megabytes,
        "threads": torch.get_num_threads(),
        "matrix_flops_per_second": products,
        "bytes_per_second": bandwidths,
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("machine_limits", "Limits of the machine.")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=list(_DTYPES))
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument(
        "--megabytes", type=positive_int, default=256, help="size of what is copied (default 256)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
