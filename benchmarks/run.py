"""All benchmarks in one run and one result folder: what `make bench` runs.

    python -m benchmarks.run [--scale smallest|default|full] [--sections loader attention]
        [--minutes 10]

Each section is a benchmark of its own, `python -m benchmarks.NAME`, in a process of its own, with
sizes that fit the machine. A section that fails or does not end within the time that is left is
named in the report, and the others go on. Without `--minutes`, the scales `smallest` and `default`
end after 10 minutes at most, and `full` takes as long as it takes.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch
from rich.console import Console

from benchmarks.measurements import SectionResult
from benchmarks.publishing import (
    CHECKOUT,
    RESULTS_FILE,
    make_parser,
    publish_sections,
    quiet_main,
    read_sections,
)
from rectvlm.files import require_writable_folder
from rectvlm.machine import count_cores, package_versions
from rectvlm.types import UserError

Scale = Literal["smallest", "default", "full"]
SCALES: tuple[Scale, ...] = ("smallest", "default", "full")
DEFAULT_MINUTES = 10
FAILURE_LINES = 5
_LARGE_GPU_BYTES = 70e9
_BYTES_OF_A_THIN_CT = 2e9
"""Main memory that preprocessing a CT of 300 slices takes, with the peers' copies in float64."""


@dataclass(frozen=True)
class Hardware:
    """What sizes are chosen by."""

    cores: int
    memory_bytes: float
    gpus: int
    gpu_bytes: float
    """Memory of a GPU; 0 without one."""

    @classmethod
    def detect(cls) -> "Hardware":
        """Look at this machine."""
        gpus = torch.cuda.device_count()
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory if gpus else 0
        memory_bytes = psutil.virtual_memory().available
        return cls(count_cores(), memory_bytes, gpus, gpu_bytes)

    @property
    def config(self) -> str:
        """Name of the largest configuration that is worth measuring."""
        if self.gpu_bytes >= _LARGE_GPU_BYTES:
            return "large"
        return "medium" if self.gpus else "demo"

    @property
    def process_counts(self) -> list[str]:
        """Numbers of processes: 1, 2 and 4, as far as GPUs or cores go."""
        devices = self.gpus or self.cores
        return [str(count) for count in (1, 2, 4) if count <= devices]

    @property
    def worker_counts(self) -> list[str]:
        """Numbers of the loader's workers: powers of 2, as far as cores go."""
        return [str(count) for count in (1, 2, 4, 8) if count <= self.cores]

    @property
    def slices(self) -> str:
        """Slices of a CT that is preprocessed."""
        return "300" if self.memory_bytes > 2 * _BYTES_OF_A_THIN_CT else "100"


@dataclass(frozen=True)
class BenchSection:
    """One benchmark of the run."""

    program: str
    """Module in benchmarks/."""
    choose_arguments: Callable[[Hardware, Scale], list[str]]


def _machine_limits(hardware: Hardware, scale: Scale) -> list[str]:
    if scale == "smallest":
        return ["--rounds", "2", "--megabytes", "4", "--dtypes", "bfloat16"]
    # A processor multiplies float16 without its matrix units: minutes.
    dtypes = ["float32", "bfloat16", *(["float16"] if hardware.gpus else [])]
    size = "256" if hardware.gpus or scale == "full" else "64"
    return ["--megabytes", size, "--dtypes", *dtypes]


def _preprocess(hardware: Hardware, scale: Scale) -> list[str]:
    if scale == "smallest":
        return [
            "--volumes",
            "1",
            "--slices",
            "61",
            "--rounds",
            "1",
            "--cases",
            "3",
            "--workers",
            "1",
        ]
    workers = hardware.worker_counts
    if scale == "full":
        return ["--slices", hardware.slices, "--rounds", "5", "--workers", *workers]
    sizes = ["--slices", "150", "--volumes", "1", "--rounds", "3", "--cases", "5"]
    return [*sizes, "--workers", *workers[:2]]


def _loader(hardware: Hardware, scale: Scale) -> list[str]:
    if scale == "smallest":
        return ["--samples", "2", "--rounds", "1", "--slices", "61", "--workers", "1"]
    workers = ["--workers", *hardware.worker_counts]
    if scale == "full":
        return [*workers, "--samples", "12", "--rounds", "5", "--slices", hardware.slices]
    return [*workers, "--samples", "4", "--rounds", "2", "--slices", "100"]


def _attention(hardware: Hardware, scale: Scale) -> list[str]:
    if scale == "smallest":
        return ["--sides", "2", "4", "--heads", "2", "--rounds", "2"]
    if hardware.gpus or scale == "full":
        return []
    return ["--sides", "4", "7", "10", "--rounds", "3"]


def _encoder(hardware: Hardware, scale: Scale) -> list[str]:
    if scale == "smallest":
        return ["--config", "tiny", "--rounds", "1", "--grids", "16x48x48"]
    if hardware.gpus:
        return ["--config", hardware.config, "--grids", "32x256x256", "64x512x512"]
    grids = ["16x48x48", "24x96x112", *(["32x128x128"] if scale == "full" else [])]
    return ["--config", "demo", "--grids", *grids]


def _engine_step(hardware: Hardware, scale: Scale) -> list[str]:
    variants = ["--variants", "zero3", "zero3-no-leaf", "zero2"]
    if scale == "smallest":
        return ["--config", "tiny", "--phases", "1", "--rounds", "1"]
    if scale == "full":
        sizes = ["--micro-batch", "1", "4", "--processes", *hardware.process_counts[:2]]
        checkpointing = ["--checkpointing", "on", "off"]
        options = [*sizes, *checkpointing, *variants, "bf16-zero3"]
        return ["--config", hardware.config, "--phases", "1", "2", "3-align", "3", *options]
    if hardware.gpus:
        return ["--config", hardware.config, "--phases", "1", "2", "3", *variants]
    return ["--config", "demo", "--phases", "1", "2", "3", *variants[:2], "--rounds", "3"]


def _report_step(hardware: Hardware, scale: Scale) -> list[str]:
    if scale == "smallest":
        return ["--config", "tiny", "--rounds", "1", "--cue-words", "10"]
    is_long = hardware.gpus or scale == "full"
    sizes = ["--micro-batch", "1", *(["4"] if is_long else []), "--rounds", "7" if is_long else "3"]
    return ["--config", hardware.config, *sizes]


def _report_step_bf16(hardware: Hardware, scale: Scale) -> list[str]:
    # 70 G parameters in bfloat16 fit on no GPU: a few layers tell what packing costs.
    layers = ["--layers", "8"] if hardware.config == "large" and scale != "smallest" else []
    return [*_report_step(hardware, scale), *layers, "generator.quantization=none"]


def _generation(hardware: Hardware, scale: Scale) -> list[str]:
    if scale == "smallest":
        return ["--config", "tiny", "--batch", "1", "2", "--tokens", "4", "--rounds", "1"]
    if scale == "full":
        return ["--config", hardware.config, "--batch", "1", "4", "16", "64", "--tokens", "128"]
    return ["--config", hardware.config, "--batch", "1", "4", "--tokens", "8", "--rounds", "2"]


def _overhead(hardware: Hardware, scale: Scale) -> list[str]:
    if scale == "smallest":
        return [
            "--size",
            "tiny",
            "--phases",
            "1",
            "--micro-batch",
            "1",
            "--steps",
            "2",
            "--warmup",
            "1",
        ]
    if scale == "full":
        return []
    return ["--phases", "1", "--micro-batch", "8", "--steps", "8", "--warmup", "2"]


def _train_step(hardware: Hardware, scale: Scale) -> list[str]:
    if scale == "smallest":
        sizes = "--sizes tiny --phases 1 --processes 1 --scaling weak --steps 2 --warmup 1"
        return sizes.split()
    processes = ["--processes", *hardware.process_counts]
    if scale == "full":
        return ["--sizes", "demo", *processes]
    return ["--sizes", "tiny", *processes, "--phases", "1", "--steps", "6"]


def _checkpoint_times(hardware: Hardware, scale: Scale) -> list[str]:
    if scale == "smallest":
        return ["--config", "tiny", "--phases", "1", "--rounds", "1"]
    if scale == "full":
        return ["--config", hardware.config, "--phases", "1", "2", "3"]
    return ["--config", hardware.config, "--phases", "2", "--rounds", "2"]


SECTIONS = (
    BenchSection("machine_limits", _machine_limits),
    BenchSection("preprocess", _preprocess),
    BenchSection("loader", _loader),
    BenchSection("attention", _attention),
    BenchSection("encoder", _encoder),
    BenchSection("engine_step", _engine_step),
    BenchSection("report_step", _report_step),
    BenchSection("report_step", _report_step_bf16),
    BenchSection("generation", _generation),
    BenchSection("overhead", _overhead),
    BenchSection("checkpoint_times", _checkpoint_times),
    BenchSection("train_step", _train_step),
)
PROGRAMS = tuple(dict.fromkeys(section.program for section in SECTIONS))


def run_section(
    program: str, arguments: Sequence[str], seconds_left: float
) -> tuple[SectionResult, dict[str, str]]:
    """Run one benchmark in a process of its own.

    Returns:
        Its result, which holds the reason where there are no figures, and versions of packages.
    """
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as out:
        command = [sys.executable, "-m", f"benchmarks.{program}", *arguments]
        start_seconds = time.monotonic()
        failure = _run_within([*command, "--out", out], seconds_left)
        folder = next((path.parent for path in Path(out).glob(f"*/{RESULTS_FILE}")), None)
        if folder is not None:
            results, (section,) = read_sections(folder)
            return section, results["versions"]
    seconds = time.monotonic() - start_seconds
    title, shown_command = (
        program.replace("_", " ").capitalize(),
        " ".join(["python", *command[1:]]),
    )
    failed = SectionResult(program, title, shown_command, round(seconds, 1), {}, failure=failure)
    return failed, {}


def _run_within(command: Sequence[str], seconds: float) -> str:
    """Run a command with all its processes; the reason why it ended, where it made no result."""
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"it had not ended after {seconds:.0f} s; run its command alone."
    last_lines = [line for line in output.splitlines() if line.strip()][-FAILURE_LINES:]
    return f"exit code {process.returncode}: {' / '.join(last_lines)}"


def run_sections(
    sections: Sequence[BenchSection], scale: Scale, seconds: float
) -> tuple[list[SectionResult], dict[str, str]]:
    """Run benchmarks one after the other, for so many seconds at most."""
    console, hardware = Console(stderr=True), Hardware.detect()
    end_seconds = time.monotonic() + seconds
    results: list[SectionResult] = []
    versions = package_versions()
    for section in sections:
        arguments = section.choose_arguments(hardware, scale)
        console.print(f"{section.program} {' '.join(arguments)}", highlight=False, soft_wrap=True)
        result, found_versions = run_section(
            section.program, arguments, max(1.0, end_seconds - time.monotonic())
        )
        if any(result.name == other.name for other in results):
            # `compare` needs a name for each: this one differs in its arguments.
            result = replace(result, name=f"{result.name} {arguments[-1]}")
        results.append(result)
        versions = versions | found_versions
    return results, versions


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 1 where a section has no figures."""
    options = _parse_arguments(arguments)
    require_writable_folder(options.out)
    start_seconds = time.monotonic()
    chosen = [section for section in SECTIONS if section.program in options.sections]
    seconds = float("inf") if options.minutes is None else 60 * options.minutes
    results, versions = run_sections(chosen, options.scale, min(seconds, 86_400.0))
    if all(result.failure is not None for result in results):
        raise UserError(f"No section has figures: {results[0].failure}")
    title = "Benchmarks" if options.scale == "default" else f"Benchmarks, {options.scale}"
    total_seconds = time.monotonic() - start_seconds
    publish_sections(options.out, "bench", title, results, versions, total_seconds)
    return int(any(result.failure is not None for result in results))


def _positive_minutes(text: str) -> float:
    """Read an option's number of minutes above 0."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, not {text!r}")
    return minutes


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("run", "All benchmarks in one run and one result folder.")
    parser.add_argument("--scale", choices=SCALES, default="default")
    parser.add_argument("--sections", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument(
        "--minutes",
        type=_positive_minutes,
        help=f"time for all of them (default {DEFAULT_MINUTES}, with --scale full no limit)",
    )
    options = parser.parse_args(arguments)
    if options.minutes is None and options.scale != "full":
        options.minutes = DEFAULT_MINUTES
    return options


if __name__ == "__main__":
    sys.exit(main())
