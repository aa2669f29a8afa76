"""Speed and memory of a training step: real launches of every phase for a few steps, read from their metrics.jsonl.

    python -m benchmarks.train_step [--sizes demo tiny] [--phases 1 2 3] [--processes 1 2] [--steps 4] [--warmup 2]

Each size and number of processes trains the phases in order on synthetic shards in a temporary folder, so no run and no
data of the checkout is touched. The first `--warmup` steps are left out: they compile, allocate and fill caches. On a
GPU machine the processes take one GPU each; elsewhere they share the cores. Results go to
benchmarks/results/train-step-MACHINE-DATE.json and .md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.publishing import (
    CHECKOUT,
    RESULTS_FOLDER,
    LaunchFailed,
    make_page_header,
    positive_int,
    publish_result,
    quiet_main,
)
from rectvlm.checkpoint import Checkpoint
from rectvlm.config import load_config

TIMED_SECTIONS = ("data", "forward", "backward", "optimizer")
PHANTOM_COUNT = 8
FAILURE_LOG_LINES = 20


def read_run_speed(folder: Path, warmup: int) -> dict[str, Any]:
    """Figures of one phase's run, from its metrics.jsonl.

    Args:
        folder: of the phase's run.
        warmup: steps at the start that do not count.

    Returns:
        samples and tokens a second of all processes together, mean seconds of a step and of its parts (as rank 0 saw
        them), peak memory of the rank that held most (of the GPU, or resident in main memory), and the loss of the
        last step, by which two runs of the same code can be told to have done the same work.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < warmup < len(lines), f"{len(lines)} steps cannot hold {warmup} of warm-up"
    counted = lines[warmup:]
    seconds = sum(line["seconds"]["total"] for line in counted)
    samples = counted[-1]["samples_seen"] - lines[warmup - 1]["samples_seen"]
    parts = {
        part: sum(line["seconds"][part] for line in counted) / len(counted)
        for part in TIMED_SECTIONS
    }
    return {
        "steps": len(counted),
        "warmup": warmup,
        "samples_per_second": samples / seconds,
        "tokens_per_second": sum(line["tokens"] for line in counted) / seconds,
        "seconds_per_step": seconds / len(counted),
        "seconds": parts | {"other": seconds / len(counted) - sum(parts.values())},
        "peak_memory_bytes": max(line["memory_bytes"] for line in lines),
        "loss_last": lines[-1]["loss"],
    }


def launch_phase(
    size: str, phase: int, processes: int, steps: int, shards: Path, runs: Path
) -> Path:
    """Train a phase for some steps; the folder of its run.

    Raises:
        LaunchFailed: it ended with an error.
    """
    gpus = torch.cuda.device_count()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    tools = Path(sys.executable).parent
    environment = os.environ | {
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    launcher = f"launch/accelerate/{'h200x2' if gpus else 'cpu2'}.yaml"
    short = {"steps": steps, "warmup": 1, "save_every": steps}
    overrides = [f"train.phases.phase{phase}.{key}={value}" for key, value in short.items()]
    start = [
        str(tools / "accelerate"),
        "launch",
        "--config_file",
        launcher,
        "--num_processes",
        str(processes),
    ]
    chosen = [
        "--config",
        size,
        "--restart",
        f"data.shards={shards}",
        f"train.runs={runs}",
        *overrides,
    ]
    _run_command([*start, f"launch/phase{phase}.py", *chosen], environment)
    return runs / load_config(size).name / f"phase{phase}"


def make_phantom_shards(size: str, folder: Path) -> None:
    """A few synthetic cases on the grid of a configuration.

    Raises:
        LaunchFailed: it ended with an error.
    """
    few = [
        "--no-samples",
        "--phantoms",
        str(PHANTOM_COUNT),
        "--valid-phantoms",
        "1",
        "--samples-per-shard",
        "4",
    ]
    _run_command(
        [
            sys.executable,
            "-m",
            "data_pipeline.preprocess",
            "--config",
            size,
            "--out",
            str(folder),
            *few,
        ],
        {**os.environ},
    )


def _run_command(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-FAILURE_LOG_LINES:])
        raise LaunchFailed(f"{tail}\n{' '.join(command)} ended with exit code {done.returncode}")


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    where = result["machine"]
    head = (
        make_page_header("Training step", "python -m benchmarks.train_step", result)
        + f"Each row is a launch of {result['warmup']} steps of warm-up, which do not count, and {result['steps']} "
        "that do. Samples and tokens are those of all processes together; seconds of a step's parts are rank 0's; "
        f"memory is the peak of the rank that held most ({'of the GPU' if where['gpus'] else 'resident'}).\n\n"
    )
    columns = [
        "size",
        "phase",
        "processes",
        "samples/s",
        "tokens/s",
        "s/step",
        *TIMED_SECTIONS,
        "other",
        "peak GB",
    ]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in result["rows"]:
        cells = [row["size"], str(row["phase"]), str(row["processes"])]
        cells += [f"{row['samples_per_second']:.2f}", f"{row['tokens_per_second']:.0f}"]
        cells += [
            f"{row['seconds_per_step']:.3f}",
            *(f"{row['seconds'][part]:.3f}" for part in (*TIMED_SECTIONS, "other")),
        ]
        lines.append(f"| {' | '.join(cells)} | {row['peak_memory_bytes'] / 1e9:.2f} |")
    return head + "\n".join(lines) + "\n"


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parse_arguments(arguments)
    console = Console(stderr=True)
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as work:
        for size, processes in options.launches:
            shards, runs = Path(work) / "shards" / size, Path(work) / f"runs-{processes}"
            if not shards.is_dir():
                make_phantom_shards(size, shards)
            for phase in range(1, max(options.phases) + 1):
                folder = launch_phase(
                    size, phase, processes, options.warmup + options.steps, shards, runs
                )
                if phase not in options.phases:
                    continue  # it was needed for its checkpoint
                row = {"size": size, "phase": phase, "processes": processes} | read_run_speed(
                    folder, options.warmup
                )
                rows.append(row)
                versions = Checkpoint.open(folder).versions
                console.print(
                    f"{size}, phase {phase}, {processes} process{'es' if processes > 1 else ''}: "
                    f"{row['samples_per_second']:.2f} samples/s, {row['peak_memory_bytes'] / 1e9:.2f} GB",
                    highlight=False,
                )
    facts = {
        "versions": versions,
        "steps": options.steps,
        "warmup": options.warmup,
        "rows": rows,
    }
    publish_result(options.out, "train-step", begin, facts, to_markdown)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description="Speed and memory of a training step."
    )
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
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER, metavar="DIR")
    options = parser.parse_args(arguments)
    numbers = options.processes or sorted({1, torch.cuda.device_count() or 2})
    # Tiny shows the cost of the machinery; with one number of processes that is enough.
    options.launches = [(size, n) for size in options.sizes or ["demo"] for n in numbers]
    if not options.sizes:
        options.launches.append(("tiny", numbers[-1]))
    return options


if __name__ == "__main__":
    sys.exit(main())
