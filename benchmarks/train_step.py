"""Speed and memory of a training step: real launches of every phase for a few steps.

    python -m benchmarks.train_step [--sizes demo tiny] [--phases 1 2 3] [--processes 1 2]
        [--scaling strong weak] [--steps 4] [--warmup 2]

The figures are read from metrics.jsonl. Each size and number of processes trains the phases in
order on synthetic shards in a temporary folder, so no run and no data of the checkout is touched.
The first `--warmup` steps are left out: they compile, allocate and fill caches. On a GPU machine
the processes take one GPU each; elsewhere they share the cores.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.measurements import Comparison, Repetitions, make_table
from benchmarks.publishing import (
    CHECKOUT,
    LaunchFailed,
    Program,
    make_parser,
    positive_int,
    publish_result,
    quiet_main,
)
from rectvlm.checkpoint import Checkpoint
from rectvlm.config import load_config
from rectvlm.machine import count_cores
from rectvlm.runs.read_runs import read_run
from rectvlm.train.budget import split_step
from rectvlm.train.phases import PHASES
from rectvlm.types import JsonObject

TIMED_SECTIONS = ("data", "augment", "forward", "backward", "optimizer")
PHANTOM_COUNT = 8
FAILURE_LOG_LINES = 20


@dataclass(frozen=True)
class TrainLaunch:
    """How the phases are launched."""

    size: str
    """Name of the configuration."""
    processes: int
    scaling: str
    """`strong`: a step has the configured samples, which the processes share; `weak`: each process
    takes one micro-batch a step."""


def read_run_speed(folder: Path, warmup: int) -> JsonObject:
    """Read the figures of one phase's run.

    Args:
        folder: the phase's run folder.
        warmup: number of steps at the start that do not count.

    Returns:
        Samples and tokens a second of all processes together; mean seconds of a step and of its
        sections, as rank 0 saw them; peak memory of the rank that held most, of the GPU or resident
        in main memory; and the loss of the last step, which tells whether two runs of the same code
        did the same work.
    """
    run = read_run(folder)
    lines = run.metrics_lines
    assert 0 < warmup < len(lines), f"{len(lines)} steps cannot hold {warmup} of warm-up"
    counted = lines[warmup:]
    steps = len(counted)
    seconds = sum(line["seconds"]["total"] for line in counted)
    samples = counted[-1]["samples_seen"] - lines[warmup - 1]["samples_seen"]
    section_seconds: dict[str, float] = {}
    for section in TIMED_SECTIONS:
        section_seconds[section] = sum(line["seconds"][section] for line in counted) / steps
    section_seconds["other"] = seconds / steps - sum(section_seconds.values())
    return {
        "steps": steps,
        "warmup": warmup,
        "samples_per_second": samples / seconds,
        "step_seconds": [line["seconds"]["total"] for line in counted],
        "samples_per_step": samples / steps,
        "tokens_per_second": sum(line["tokens"] for line in counted) / seconds,
        "seconds_per_step": seconds / steps,
        "seconds": section_seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "loss_last": lines[-1]["loss"],
    }


def launch_phase(launch: TrainLaunch, phase: int, steps: int, shards: Path, runs: Path) -> Path:
    """Train a phase for some steps; return the folder of its run.

    Raises:
        LaunchFailed: the launch ended with an error.
    """
    config = load_config(launch.size)
    step_batch = split_step(PHASES[phase].get_settings(config), launch.processes)
    global_batch = step_batch.global_batch
    if launch.scaling == "weak":
        global_batch = step_batch.micro_batch * launch.processes
    settings = {"global_batch": global_batch, "samples": steps * global_batch}
    settings |= {"warmup": 0, "save_every": 1}
    overrides = [f"train.phases.phase{phase}.{key}={value}" for key, value in settings.items()]
    folders = [f"data.shards={shards}", f"train.runs={runs}"]
    options = ["--config", launch.size, "--restart", *folders, *overrides]
    launch_processes(launch.processes, [f"launch/phase{phase}.py", *options])
    return runs / config.name / f"phase{phase}"


def launch_processes(processes: int, program: Sequence[str]) -> None:
    """Run a program on some processes by `accelerate launch`.

    Raises:
        LaunchFailed: it ended with an error.
    """
    _run_command(*make_launch_command(processes, program))


def make_launch_command(processes: int, program: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Make command and environment of `accelerate launch` for a program."""
    has_gpu = torch.cuda.is_available()
    tools = Path(sys.executable).parent
    environment = os.environ | {
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": str(max(1, count_cores() // processes)),
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if not has_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    launcher = f"launch/accelerate/{'h200x2' if has_gpu else 'cpu2'}.yaml"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launcher]
    return [*accelerate, "--num_processes", str(processes), *program], environment


def make_phantom_shards(size: str, folder: Path) -> None:
    """Write shards of a few synthetic cases on the grid of a configuration.

    Raises:
        LaunchFailed: the pipeline ended with an error.
    """
    module = [sys.executable, "-m", "data_pipeline.preprocess"]
    paths = ["--config", size, "--out", str(folder), "--no-samples"]
    counts = ["--phantoms", str(PHANTOM_COUNT), "--valid-phantoms", "1"]
    _run_command([*module, *paths, *counts, "--samples-per-shard", "4"], {**os.environ})


def _run_command(command: list[str], environment: dict[str, str]) -> None:
    process = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if process.returncode:
        tail = "\n".join(process.stdout.splitlines()[-FAILURE_LOG_LINES:])
        raise LaunchFailed(f"{tail}\n{' '.join(command)} ended with exit code {process.returncode}")


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List samples a second over the processes, weak and strong, and the parts of a step."""
    speed, sections = Repetitions(), Repetitions()
    for row in result["rows"]:
        phase = f"{row['size']}, phase {row['phase']}, {row['scaling']}"
        rates = [row["samples_per_step"] / seconds for seconds in row["step_seconds"]]
        speed.add(phase, rates, row["processes"])
        for section, seconds in row["seconds"].items():
            sections.add(section, max(0.0, seconds), f"{phase}, {row['processes']} processes")
    return [
        Comparison(
            "Samples a second of all processes",
            "samples/s",
            speed.to_measurements(),
            better="higher",
            plot="lines",
            at_label="processes",
            note="strong: the processes share the configured samples of a step; weak: each takes "
            "one micro-batch a step.",
        ),
        Comparison(
            "Parts of a launched step",
            "s",
            sections.to_measurements(),
            plot="stack",
            at_label="launch",
            note="`other` is what the host does between them, and waiting for other processes.",
        ),
    ]


def write_text(result: JsonObject) -> str:
    """Write circumstances and a table by launch."""
    sections = (*TIMED_SECTIONS, "other")
    columns = ["size", "phase", "scaling", "processes", "samples/s", "tokens/s", "s/step"]
    rows: list[list[str]] = []
    for row in result["rows"]:
        cells = [row["size"], str(row["phase"]), row["scaling"], str(row["processes"])]
        cells += [f"{row['samples_per_second']:.2f}", f"{row['tokens_per_second']:.0f}"]
        cells.append(f"{row['seconds_per_step']:.3f}")
        cells += [f"{row['seconds'][section]:.3f}" for section in sections]
        rows.append([*cells, f"{row['peak_memory_bytes'] / 1e9:.2f}"])
    kind = "of the GPU" if result["machine"]["gpus"] else "resident"
    return (
        f"Each row is a launch of {result['warmup']} steps of warm-up, which do not count, and "
        f"{result['steps']} that do. Samples and tokens are those of all processes together; "
        "seconds of a step's parts are rank 0's; memory is the peak of the rank that held most "
        f"({kind}).\n\n" + make_table([*columns, *sections, "peak GB"], rows)
    )


PROGRAM = Program("train_step", "Launched training steps", write_text, list_comparisons)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    start_seconds = time.monotonic()
    rows: list[JsonObject] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as work:
        for launch in options.launches:
            shards = Path(work) / "shards" / launch.size
            runs = Path(work) / f"runs-{launch.processes}-{launch.scaling}"
            if not shards.is_dir():
                make_phantom_shards(launch.size, shards)
            for phase in range(1, max(options.phases) + 1):
                steps = options.warmup + options.steps
                folder = launch_phase(launch, phase, steps, shards, runs)
                if phase not in options.phases:
                    continue  # it was needed for its checkpoint
                row = asdict(launch) | {"phase": phase} | read_run_speed(folder, options.warmup)
                rows.append(row)
                versions = Checkpoint.open(folder).versions
                _print_row(row)
    facts = {
        "versions": versions,
        "steps": options.steps,
        "warmup": options.warmup,
        "rows": rows,
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts)
    return 0


def _print_row(row: JsonObject) -> None:
    processes = f"{row['processes']} process{'es' if row['processes'] > 1 else ''}"
    speed, memory_gb = row["samples_per_second"], row["peak_memory_bytes"] / 1e9
    Console(stderr=True).print(
        f"{row['size']}, phase {row['phase']}, {processes}: {speed:.2f} samples/s, "
        f"{memory_gb:.2f} GB",
        highlight=False,
    )


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("train_step", "Speed and memory of a training step.")
    parser.add_argument(
        "--sizes", nargs="+", default=["demo"], metavar="NAME", help="configurations (default demo)"
    )
    parser.add_argument(
        "--scaling", nargs="+", choices=("strong", "weak"), default=["strong", "weak"]
    )
    parser.add_argument(
        "--phases", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], metavar="N"
    )
    parser.add_argument(
        "--processes",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="default: 1 and the GPUs, or 1 and 2",
    )
    parser.add_argument(
        "--steps", type=positive_int, default=4, help="steps that count (default 4)"
    )
    parser.add_argument(
        "--warmup", type=positive_int, default=2, help="steps before them (default 2)"
    )
    options = parser.parse_args(arguments)
    process_counts = options.processes or sorted({1, torch.cuda.device_count() or 2})
    options.launches = []
    for size, processes, scaling in itertools.product(
        options.sizes, process_counts, options.scaling
    ):
        options.launches.append(TrainLaunch(size, processes, scaling))
    return options


if __name__ == "__main__":
    sys.exit(main())
