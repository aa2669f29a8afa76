"""Speed and memory of a training step: real launches of every phase for a few steps.

    python -m benchmarks.train_step [--sizes demo tiny] [--phases 1 2 3] [--processes 1 2]
        [--steps 4] [--warmup 2]

The figures are read from metrics.jsonl. Each size and number of processes trains the phases in
order on synthetic shards in a temporary folder, so no run and no data of the checkout is touched.
The first `--warmup` steps are left out: they compile, allocate and fill caches. On a GPU machine
the processes take one GPU each; elsewhere they share the cores. Results go to
benchmarks/results/train-step-MACHINE-DATE.json and .md.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.publishing import (
    CHECKOUT,
    LaunchFailed,
    make_page_header,
    make_parser,
    make_table,
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

TIMED_SECTIONS = ("data", "forward", "backward", "optimizer")
PHANTOM_COUNT = 8
FAILURE_LOG_LINES = 20


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
        "tokens_per_second": sum(line["tokens"] for line in counted) / seconds,
        "seconds_per_step": seconds / steps,
        "seconds": section_seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "loss_last": lines[-1]["loss"],
    }


def launch_phase(
    size: str, phase: int, processes: int, steps: int, shards: Path, runs: Path
) -> Path:
    """Train a phase for some steps; return the folder of its run.

    Raises:
        LaunchFailed: the launch ended with an error.
    """
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
    step_batch = split_step(PHASES[phase].get_settings(load_config(size)), processes)
    settings = {"samples": steps * step_batch.global_batch, "warmup": 0, "save_every": 1}
    overrides = [f"train.phases.phase{phase}.{key}={value}" for key, value in settings.items()]
    folders = [f"data.shards={shards}", f"train.runs={runs}"]
    accelerate = [str(tools / "accelerate"), "launch", "--config_file", launcher]
    script = ["--num_processes", str(processes), f"launch/phase{phase}.py"]
    options = ["--config", size, "--restart", *folders, *overrides]
    _run_command([*accelerate, *script, *options], environment)
    return runs / load_config(size).name / f"phase{phase}"


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


def to_markdown(result: JsonObject) -> str:
    """Write the result as a page."""
    sections = (*TIMED_SECTIONS, "other")
    columns = ["size", "phase", "processes", "samples/s", "tokens/s", "s/step"]
    rows: list[list[str]] = []
    for row in result["rows"]:
        cells = [row["size"], str(row["phase"]), str(row["processes"])]
        cells += [f"{row['samples_per_second']:.2f}", f"{row['tokens_per_second']:.0f}"]
        cells.append(f"{row['seconds_per_step']:.3f}")
        cells += [f"{row['seconds'][section]:.3f}" for section in sections]
        rows.append([*cells, f"{row['peak_memory_bytes'] / 1e9:.2f}"])
    kind = "of the GPU" if result["machine"]["gpus"] else "resident"
    return (
        make_page_header("Training step", "python -m benchmarks.train_step", result)
        + f"Each row is a launch of {result['warmup']} steps of warm-up, which do not count, and "
        f"{result['steps']} that do. Samples and tokens are those of all processes together; "
        "seconds of a step's parts are rank 0's; memory is the peak of the rank that held most "
        f"({kind}).\n\n" + make_table([*columns, *sections, "peak GB"], rows)
    )


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    start_seconds = time.monotonic()
    rows: list[JsonObject] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as work:
        for size, processes in options.launches:
            shards, runs = Path(work) / "shards" / size, Path(work) / f"runs-{processes}"
            if not shards.is_dir():
                make_phantom_shards(size, shards)
            for phase in range(1, max(options.phases) + 1):
                steps = options.warmup + options.steps
                folder = launch_phase(size, phase, processes, steps, shards, runs)
                if phase not in options.phases:
                    continue  # it was needed for its checkpoint
                row = {"size": size, "phase": phase, "processes": processes}
                rows.append(row | read_run_speed(folder, options.warmup))
                versions = Checkpoint.open(folder).versions
                _print_row(rows[-1])
    facts = {
        "versions": versions,
        "steps": options.steps,
        "warmup": options.warmup,
        "rows": rows,
    }
    publish_result(options.out, "train-step", start_seconds, facts, to_markdown)
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
    parser.add_argument("--sizes", nargs="+", metavar="NAME", help="default: demo, and tiny")
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
    options.launches = list(itertools.product(options.sizes or ["demo"], process_counts))
    # Tiny shows the cost of the machinery; with one number of processes that is enough.
    if not options.sizes:
        options.launches.append(("tiny", process_counts[-1]))
    return options


if __name__ == "__main__":
    sys.exit(main())
