"""Launches as users give them, at the tiny size.

They are real processes on real shards; here is also how to read what they leave on the disk.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from rectvlm.checkpoint import Checkpoint

CHECKOUT = Path(__file__).parents[1]
STEPS, SAVE_EVERY, WORLD, MICRO_BATCH = 12, 4, 2, 2
GLOBAL_BATCH = WORLD * MICRO_BATCH
"""Samples of a step at the tiny size, on any number of ranks."""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = [*LAUNCH, "--config_file", "launch/accelerate/cpu2.yaml"]
TIMEOUT = 600.0
HEAVY_LIBRARIES = {"torch", "transformers", "accelerate", "deepspeed", "sklearn", "matplotlib"}
"""Libraries that a command imports only once its arguments are known to be right."""
VOLATILE = ("seconds", "memory_bytes")
"""Fields of `metrics.jsonl` that no two runs share."""


def environment(folder: Path) -> dict[str, str]:
    """Of a user without a GPU, a W&B account or an Accelerate configuration of their own."""
    found = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "WANDB_", "RECTVLM_PEAK", "MAKE", "MFLAGS"))
        and name != "ARGS"  # of the `make` that runs the tests
    }
    return found | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RECTVLM_TRACKERS": "none",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def settings(phase: int, shards: Path, runs: Path, steps: int = STEPS) -> list[str]:
    """Arguments of a phase at the tiny size."""
    return [
        *("--config", "tiny", f"data.shards={shards}", f"train.runs={runs}"),
        *length(f"phase{phase}", steps),
    ]


def length(phase_key: str, steps: int, save_every: int = SAVE_EVERY) -> list[str]:
    """Length of a phase and time between its checkpoints, in steps of the tiny size."""
    section = f"train.phases.{phase_key}"
    share = min(1.0, save_every / steps)
    return [f"{section}.samples={steps * GLOBAL_BATCH}", f"{section}.save_every={share}"]


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def imported_libraries(command: Sequence[str], folder: Path) -> tuple[int, str, set[str]]:
    """Exit code, output, and names of the libraries that `python -X importtime …` imported."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    output, libraries = [done.stdout], set()
    for line in done.stderr.splitlines():
        if line.startswith("import time:"):
            libraries.add(line.rpartition("|")[2].strip().partition(".")[0])
        else:
            output.append(line)
    assert "argparse" in libraries
    return done.returncode, "\n".join(output), libraries


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    try:
        _, stderr = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, stderr


def kill(process: subprocess.Popen[str]) -> None:
    """End the launcher and every process below it at once, as a power cut does."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=20)
    process.communicate()


def run(command: Sequence[str], folder: Path) -> None:
    code, stderr = finish(start(command, folder))
    assert code == 0, f"{' '.join(command)} gave {code}:\n{stderr[-4000:]}"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(phase_folder: Path) -> list[dict[str, Any]]:
    return lines(phase_folder / "metrics.jsonl")


def traces(phase_folder: Path) -> list[list[dict[str, Any]]]:
    return [lines(path) for path in sorted((phase_folder / "ranks").glob("rank-*.jsonl"))]


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        words = child.cmdline()
        if any(
            word.startswith("launch/") or word.endswith("_launch.py") for word in words
        ) and "accelerate" not in "".join(words[:4]):
            found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Until something is true, of a run that goes on."""
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert process.poll() is None, f"ended before: {process.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps_done(phase_folder: Path) -> int:
    """Whole lines of `metrics.jsonl`."""
    path = phase_folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def comparable(phase_folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what no two runs share."""
    return [
        {key: value for key, value in line.items() if key not in VOLATILE}
        for line in metrics(phase_folder)
    ]


def ending(phase_folder: Path) -> dict[str, Any]:
    """`ending.json`."""
    found: dict[str, Any] = json.loads((phase_folder / "ending.json").read_text())
    return found


def weights_of(phase_folder: Path) -> dict[str, Any]:
    """Of the newest checkpoint."""
    return Checkpoint.open(phase_folder).read_tensors()
