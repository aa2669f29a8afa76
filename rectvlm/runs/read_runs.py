"""A phase's run, read from its folder.

A run can be read while it goes on, after a kill, and where files are damaged or missing.
"""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from rectvlm.finite import mean_total_loss
from rectvlm.folder_lock import is_process_running
from rectvlm.runs.run_files import (
    BEST_FILE,
    ENDING_FILE,
    METRICS_FILE,
    RUN_CONFIG_FILE,
    SESSIONS_FILE,
    VALIDATION_FILE,
)
from rectvlm.types import JsonObject, UserError

FINAL_STEPS = 10
"""Number of last steps that a final figure is averaged over."""
CUT_OFF_AFTER_SECONDS = 1800.0
"""Seconds without a line after which a run on another machine counts as cut off."""

MetricsLine = JsonObject
"""One line of `metrics.jsonl` or `validation.jsonl`."""


@dataclass(frozen=True)
class BestValidation:
    """The best validation of a run."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class TrainingRun:
    """One phase's run."""

    folder: Path
    name: str
    """Last two folders of the path, such as `demo/phase3`; the path where names repeat."""
    metrics_lines: list[MetricsLine]
    """Lines of `metrics.jsonl`, in the order of their steps."""
    validation_lines: list[MetricsLine]
    """Lines of `validation.jsonl`, in the order of their steps."""
    sessions: list[JsonObject]
    """Sessions of `run.json`, in the order of their start."""
    config: JsonObject
    """Resolved configuration; empty if it cannot be read."""
    state: str = ""
    """`finished`, `running`, `stopped`, `failed` or `cut off`."""
    reason: str | None = None
    """Why the run ended as it did, if it had time to say."""
    best: BestValidation | None = None
    faults: list[str] = field(default_factory=list)
    """Files that could not be read, with what was wrong."""

    @property
    def phase_name(self) -> str:
        """Number and stage of the phase, such as `3` or `3-align`."""
        return self.folder.name.partition(".")[0].removeprefix("phase")

    @property
    def last_line(self) -> MetricsLine:
        """Line of the last step on record; empty where there is none."""
        return self.metrics_lines[-1] if self.metrics_lines else {}

    @property
    def last_session(self) -> JsonObject:
        """Session that was started last; empty where none is on record."""
        return self.sessions[-1] if self.sessions else {}

    @property
    def last_step(self) -> int:
        """Last step on record."""
        return int(self.last_line.get("step", 0))

    @property
    def planned_steps(self) -> int | None:
        """Number of steps after which the run is finished."""
        return self.last_session.get("steps")

    @property
    def world_size(self) -> int | None:
        """Number of ranks of the last session."""
        return self.last_session.get("world_size")

    @property
    def start_time(self) -> str | None:
        """Time of the first start, UTC."""
        return self.sessions[0].get("start") if self.sessions else None

    @property
    def training_seconds(self) -> float:
        """Seconds of all steps, without the time between sessions."""
        return sum(_step_seconds(line) for line in self.metrics_lines)

    @property
    def tasks(self) -> list[str]:
        """Tasks that have a loss on record, in their order."""
        tasks: dict[str, None] = {}
        for line in self.metrics_lines:
            tasks.update(dict.fromkeys(line.get("losses") or {}))
        return list(tasks)

    @property
    def peak_memory_bytes(self) -> float | None:
        """Largest memory of a rank in any step."""
        sizes = [line.get("memory_bytes") or 0 for line in self.metrics_lines]
        return max(sizes, default=0) or None

    def final_loss(self, task: str | None = None) -> float | None:
        """Average the loss of the last steps: the total loss, or that of a task."""
        return self.mean_loss(self.metrics_lines[-FINAL_STEPS:], task)

    def mean_loss(self, lines: Sequence[MetricsLine], task: str | None = None) -> float | None:
        """Average the total loss or that of a task over the steps that have targets for it."""
        if task is not None:
            return mean_finite([task_loss(line, task) for line in lines])
        return mean_total_loss(
            [read_number(line.get("loss")) for line in lines],
            [self.read_task_losses(line) for line in lines],
            self.loss_weights,
        )

    def read_task_losses(self, line: MetricsLine) -> dict[str, float | None]:
        """Read the loss of each task in one step; None where it has no targets."""
        return {task: read_number(loss) for task, loss in (line.get("losses") or {}).items()}

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each task's loss in the total."""
        section = (self.config.get("train") or {}).get("loss_weights")
        weights: dict[str, float] = {}
        for task, value in (section if isinstance(section, dict) else {}).items():
            weight = read_number(value)
            if weight is not None:
                weights[task] = weight
        return weights

    def is_first_step(self, step: int) -> bool:
        """Tell whether a step is the first of a session, which builds and tunes."""
        first_steps = [session.get("from_step", 0) + 1 for session in self.sessions]
        return step in (first_steps or [1])


def task_loss(line: MetricsLine, task: str) -> Any:
    """Return the loss of a task in one step."""
    return (line.get("losses") or {}).get(task)


def read_number(value: Any) -> float | None:
    """Return a finite number as a float, and None for whatever else a damaged line holds."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def mean_finite(values: Sequence[Any]) -> float | None:
    """Return the mean of the finite numbers among some values; None where there is none."""
    numbers = [number for number in map(read_number, values) if number is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _step_seconds(line: MetricsLine) -> float:
    """Return the seconds of a step; 0 where the line does not say."""
    seconds = line.get("seconds")
    total = seconds.get("total") if isinstance(seconds, dict) else None
    return total if isinstance(total, int | float) and total > 0 else 0


@dataclass(frozen=True)
class RunThroughput:
    """Throughput of a run; None where its folder does not say."""

    samples_per_second: float | None = None
    """Samples of all ranks in a second."""
    tokens_per_second: float | None = None
    """Image patches and language-model positions of all ranks in a second."""
    data_wait: float | None = None
    """Share of the time that steps waited for data."""
    mfu: float | None = None
    """Model FLOPs utilization; None where the rate of the run's hardware was not known."""


def compute_throughput(run: TrainingRun) -> RunThroughput:
    """Compute the throughput of all steps but the first of each session, if there are others."""
    samples_seen = {line["step"]: line.get("samples_seen", 0) for line in run.metrics_lines}
    samples_seen[0] = 0
    # What a step saw is known only beside the line of the step before.
    timed_lines = [
        line
        for line in run.metrics_lines
        if _step_seconds(line) and line["step"] - 1 in samples_seen
    ]
    later_lines = [line for line in timed_lines if not run.is_first_step(line["step"])]
    lines = later_lines or timed_lines
    seconds = sum(line["seconds"]["total"] for line in lines)
    if not seconds:
        return RunThroughput()

    samples = tokens = 0
    for line in lines:
        samples += line.get("samples_seen", 0) - samples_seen[line["step"] - 1]
        tokens += line.get("tokens", 0)
    step_flops = run.last_session.get("work")
    return RunThroughput(
        samples_per_second=samples / seconds,
        tokens_per_second=tokens / seconds,
        data_wait=sum(line["seconds"].get("data", 0.0) for line in lines) / seconds,
        mfu=_compute_mfu(step_flops, tokens, len(lines), seconds) if step_flops else None,
    )


def _compute_mfu(step_flops: JsonObject, tokens: int, steps: int, seconds: float) -> float | None:
    """Compute the MFU as `rectvlm.train.logging.mfu` does, from figures on record."""
    try:
        micro_batches = steps * step_flops["micro_batches"]
        positions = tokens - micro_batches * step_flops["patches"]
        flops = micro_batches * step_flops["flops"] + positions * step_flops["flops_per_position"]
        peak_tflops = step_flops["peak"]["tflops"]
        return float(flops / (seconds * step_flops["world"] * peak_tflops * 1e12))
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def find_runs(roots: Sequence[Path]) -> list[TrainingRun]:
    """Read all runs in some folders: a phase's folder, a run's, or a folder of runs.

    Raises:
        UserError: a folder does not exist, or holds no run.
    """
    runs_by_folder: dict[Path, TrainingRun] = {}
    for root in roots:
        if not root.is_dir():
            raise UserError(
                f"There is no folder {root}: give a folder of runs, such as runs or "
                "runs/demo/phase1."
            )
        folders = list(_iterate_run_folders(root))
        if not folders:
            raise UserError(
                f"{root} holds no run: expected a folder with {METRICS_FILE} or {SESSIONS_FILE} in "
                "it or below it."
            )
        for folder in folders:
            runs_by_folder[folder.resolve()] = read_run(folder)
    runs = list(runs_by_folder.values())
    names = [run.name for run in runs]
    # The folder tells runs of the same name apart.
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs
    ]


def _iterate_run_folders(root: Path) -> Iterator[Path]:
    """Yield folders of runs, in the order of their names; nothing below a run is searched.

    Links are followed, and a folder that several lead to is read once.
    """
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real_folder = os.path.realpath(folder)
        if real_folder in visited:
            subfolders.clear()
            continue
        visited.add(real_folder)
        if METRICS_FILE in files or SESSIONS_FILE in files:
            subfolders.clear()
            yield Path(folder)
        subfolders.sort()


def read_run(folder: Path) -> TrainingRun:
    """Read a run from its folder; what cannot be read is named in `faults` and left out."""
    faults: list[str] = []
    metrics_lines = _read_lines(folder / METRICS_FILE, faults)
    validation_lines = _read_lines(folder / VALIDATION_FILE, faults)
    sessions = _read_json(folder / SESSIONS_FILE, faults).get("sessions") or []
    run = TrainingRun(
        folder=folder,
        name="/".join(folder.resolve().parts[-2:]),
        metrics_lines=metrics_lines,
        validation_lines=validation_lines,
        sessions=[session for session in sessions if isinstance(session, dict)],
        config=_read_yaml(folder / RUN_CONFIG_FILE, faults),
        faults=faults,
    )
    state, reason = _infer_state(run, _read_json(folder / ENDING_FILE, faults))
    best = _parse_best(_read_json(folder / BEST_FILE, faults))
    return replace(run, state=state, reason=reason, best=best)


def _read_lines(path: Path, faults: list[str]) -> list[MetricsLine]:
    """Read the complete lines that have a step, in the order of their steps.

    The last line may be in the making or cut off by a kill, which is no fault.
    """
    try:
        texts = path.read_bytes().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        faults.append(f"{path.name}: {error.strerror}")
        return []
    lines: list[MetricsLine] = []
    broken = 0
    for number, text in enumerate(texts):
        line = None
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts) - 1:
            broken += 1
    if broken:
        faults.append(f"{path.name}: {broken} of {len(texts)} lines cannot be read")
    return sorted(lines, key=lambda line: line["step"])


def _read_json(path: Path, faults: list[str]) -> JsonObject:
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        faults.append(f"{path.name} cannot be read")
        return {}
    return tree


def _read_yaml(path: Path, faults: list[str]) -> JsonObject:
    tree = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        tree = yaml.safe_load(path.read_text())
    if not isinstance(tree, dict):
        faults.append(f"{path.name} is missing or cannot be read")
        return {}
    return tree


def _parse_best(tree: JsonObject) -> BestValidation | None:
    step, metric, value = tree.get("step"), tree.get("metric"), tree.get("value")
    if isinstance(step, int) and isinstance(metric, str) and isinstance(value, int | float):
        return BestValidation(step, metric, float(value))
    return None


def _infer_state(run: TrainingRun, ending: JsonObject) -> tuple[str, str | None]:
    """Tell the state of a run, and the reason if it is on record."""
    session = run.last_session
    reason = session.get("error") or (ending.get("reason") if ending.get("code") else None)
    if session.get("state") == "running":
        if _is_running(run, session):
            return "running", None
        # A rank that hangs is ended from outside, with a reason and without the time to tidy up.
        return ("stopped", reason) if ending.get("code") else ("cut off", None)
    if session.get("state"):
        return str(session["state"]), reason
    # `run.json` is missing or damaged.
    is_finished = run.planned_steps is not None and run.last_step >= run.planned_steps
    return ("finished" if is_finished else "cut off"), reason


def _is_running(run: TrainingRun, session: JsonObject) -> bool:
    """Tell whether a session without an end still runs.

    On this machine its process tells, on another one the age of its last line.
    """
    if (session.get("machine") or {}).get("host") == socket.gethostname():
        try:
            return is_process_running(session["pid"], session["process_start"])
        except (KeyError, TypeError):
            return False
    times: list[float] = []
    if session.get("start"):
        times.append(datetime.fromisoformat(session["start"]).timestamp())
    with contextlib.suppress(OSError):
        times.append((run.folder / METRICS_FILE).stat().st_mtime)
    return bool(times) and time.time() - max(times) < CUT_OFF_AFTER_SECONDS
