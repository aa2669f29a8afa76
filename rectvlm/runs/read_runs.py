"""A phase's run as its folder tells it: while it runs, after a kill, and where files are damaged or missing."""

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

import psutil
import yaml

from rectvlm.types import UserError

METRICS_FILE, VALIDATION_FILE, SESSIONS_FILE, ENDING_FILE, BEST_FILE, CONFIG_FILE = (
    "metrics.jsonl",
    "validation.jsonl",
    "run.json",
    "ending.json",
    "best.json",
    "config.yaml",
)
FINAL_STEPS = 10
"""Steps that a final figure is taken over."""
CUT_OFF_AFTER_SECONDS = 1800.0
"""Seconds without a line after which a run on another machine counts as cut off."""

MetricsLine = dict[str, Any]


@dataclass(frozen=True)
class TrainingRun:
    """One phase's run."""

    folder: Path
    name: str
    """Such as `demo/phase3`."""
    metrics_lines: list[MetricsLine]
    """Of `metrics.jsonl`, in the order of their steps."""
    validation_lines: list[MetricsLine]
    sessions: list[dict[str, Any]]
    config: dict[str, Any]
    """The resolved configuration; empty if it cannot be read."""
    state: str
    """`finished`, `running`, `stopped`, `failed` or `cut off`."""
    reason: str | None
    """Why it ended so, if it had time to say."""
    best: tuple[int, str, float] | None
    """Step, metric and value of the best validation."""
    faults: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def phase_name(self) -> str:
        """Such as `3` or `3-align`."""
        return self.folder.name.partition(".")[0].removeprefix("phase")

    @property
    def phase_settings(self) -> dict[str, Any]:
        """The configuration's section of this phase."""
        phases = (self.config.get("train") or {}).get("phases") or {}
        found = phases.get(f"phase{self.phase_name}")
        return found if isinstance(found, dict) else {}

    @property
    def last_step(self) -> int:
        """The last step that is on record."""
        return int(self.metrics_lines[-1]["step"]) if self.metrics_lines else 0

    @property
    def planned_steps(self) -> int | None:
        """Planned."""
        planned = self.sessions[-1].get("steps") if self.sessions else None
        return planned or self.phase_settings.get("steps")

    @property
    def world_size(self) -> int | None:
        """Ranks, the last time."""
        return self.sessions[-1].get("world_size") if self.sessions else None

    @property
    def start_time(self) -> str | None:
        """When it first started, UTC."""
        return self.sessions[0].get("start") if self.sessions else None

    @property
    def training_seconds(self) -> float:
        """That its steps took, without what lay between them."""
        return sum(
            line["seconds"]["total"] for line in self.metrics_lines if _has_step_seconds(line)
        )

    @property
    def recent_lines(self) -> list[MetricsLine]:
        """The last steps."""
        return self.metrics_lines[-FINAL_STEPS:]

    def final_loss(self, task: str | None = None) -> float | None:
        """Mean loss of the last steps: all of it, or a task's."""
        values = [
            line.get("loss") if task is None else (line.get("losses") or {}).get(task)
            for line in self.recent_lines
        ]
        return mean_finite(values)

    @property
    def tasks(self) -> list[str]:
        """That a loss is on record of, in their order."""
        return list(
            dict.fromkeys(task for line in self.metrics_lines for task in line.get("losses") or {})
        )


def mean_finite(values: Sequence[Any]) -> float | None:
    """Of the finite numbers among some values."""
    known = [
        float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)
    ]
    return sum(known) / len(known) if known else None


def _has_step_seconds(line: MetricsLine) -> bool:
    seconds = line.get("seconds")
    return (
        isinstance(seconds, dict)
        and isinstance(seconds.get("total"), int | float)
        and seconds["total"] > 0
    )


def compute_throughput(
    run: TrainingRun, lines: Sequence[MetricsLine] | None = None
) -> dict[str, float | None]:
    """Throughput of some steps, by default of all but the first of each session, which builds and tunes.

    Samples and tokens are those of all ranks. `mfu` is None where the run's hardware was not known.
    """
    begins = {session.get("from_step", 0) + 1 for session in run.sessions} or {1}
    counted = [
        line for line in (run.metrics_lines if lines is None else lines) if _has_step_seconds(line)
    ]
    counted = [line for line in counted if line["step"] not in begins] or counted
    seconds = sum(line["seconds"]["total"] for line in counted)
    if not counted or not seconds:
        return dict.fromkeys(("samples_per_second", "tokens_per_second", "data_wait", "mfu"))
    before = {line["step"]: line.get("samples_seen", 0) for line in run.metrics_lines}
    samples = sum(line.get("samples_seen", 0) - before.get(line["step"] - 1, 0) for line in counted)
    tokens = sum(line.get("tokens", 0) for line in counted)
    work = run.sessions[-1].get("work") if run.sessions else None
    return {
        "samples_per_second": samples / seconds,
        "tokens_per_second": tokens / seconds,
        "data_wait": sum(line["seconds"].get("data", 0.0) for line in counted) / seconds,
        "mfu": _compute_mfu(work, tokens, len(counted), seconds) if work else None,
    }


def _compute_mfu(work: dict[str, Any], tokens: int, steps: int, seconds: float) -> float | None:
    """As `rectvlm.train.logging.mfu` defines it, from the figures that the run has written down."""
    try:
        towers = steps * work["micro_batches"]
        flops = (
            towers * work["flops"]
            + (tokens - towers * work["patches"]) * work["flops_per_position"]
        )
        return float(flops / (seconds * work["world"] * work["peak"]["tflops"] * 1e12))
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def find_runs(roots: Sequence[Path]) -> list[TrainingRun]:
    """All runs in some folders: of one phase, of one name, or of many.

    Raises:
        UserError: a folder does not exist, or holds no run.
    """
    found: dict[Path, TrainingRun] = {}
    for place in roots:
        if not place.is_dir():
            raise UserError(
                f"There is no folder {place}: give a folder of runs, such as runs or runs/demo/phase1."
            )
        folders = list(_iterate_run_folders(place))
        if not folders:
            raise UserError(
                f"{place} holds no run: expected a folder with {METRICS_FILE} or {SESSIONS_FILE} in it or below it."
            )
        for folder in folders:
            found[folder.resolve()] = read_run(folder)
    runs = list(found.values())
    names = [run.name for run in runs]
    # Runs of the same name in different places are told apart by where they lie.
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs
    ]


def _iterate_run_folders(place: Path) -> Iterator[Path]:
    """Folders of runs, in the order of their names; nothing below a run is searched."""
    for folder, below, files in os.walk(place):
        if METRICS_FILE in files or SESSIONS_FILE in files:
            below.clear()
            yield Path(folder)
        below.sort()


def read_run(folder: Path) -> TrainingRun:
    """A run from its folder; what cannot be read is named in `faults` and left out."""
    faults: list[str] = []
    name = "/".join(folder.resolve().parts[-2:])
    lines = sorted(_read_lines(folder / METRICS_FILE, faults), key=lambda line: line["step"])
    validations = sorted(
        _read_lines(folder / VALIDATION_FILE, faults), key=lambda line: line["step"]
    )
    sessions = _read_json(folder / SESSIONS_FILE, faults).get("sessions") or []
    sessions = [one for one in sessions if isinstance(one, dict)]
    config = _read_yaml(folder / CONFIG_FILE, faults)
    run = TrainingRun(folder, name, lines, validations, sessions, config, "", None, None, faults)
    state, reason = _infer_state(run, _read_json(folder / ENDING_FILE, faults))
    best = _parse_best(_read_json(folder / BEST_FILE, faults))
    return replace(run, state=state, reason=reason, best=best)


def _read_lines(path: Path, faults: list[str]) -> list[MetricsLine]:
    """Whole lines with a step; the last one may be in the making or cut off by a kill, which is no fault."""
    try:
        texts = path.read_bytes().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        faults.append(f"{path.name}: {error.strerror}")
        return []
    found, broken = [], 0
    for number, text in enumerate(texts):
        line = None
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
        elif number < len(texts) - 1:
            broken += 1
    if broken:
        faults.append(f"{path.name}: {broken} of {len(texts)} lines cannot be read")
    return found


def _read_json(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        faults.append(f"{path.name} cannot be read")
        return {}
    return found


def _read_yaml(path: Path, faults: list[str]) -> dict[str, Any]:
    found = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.safe_load(path.read_text())
    if not isinstance(found, dict):
        faults.append(f"{path.name} is missing or cannot be read")
        return {}
    return found


def _parse_best(found: dict[str, Any]) -> tuple[int, str, float] | None:
    step, metric, value = found.get("step"), found.get("metric"), found.get("value")
    if isinstance(step, int) and isinstance(metric, str) and isinstance(value, int | float):
        return step, metric, float(value)
    return None


def _infer_state(run: TrainingRun, ending: dict[str, Any]) -> tuple[str, str | None]:
    """What became of a run, and why if it says so."""
    last = run.sessions[-1] if run.sessions else {}
    reason = last.get("error") or (ending.get("reason") if ending.get("code") else None)
    if last.get("state") == "running":
        if _is_running(run, last):
            return "running", None
        # A rank that hangs is ended from outside, with a reason and without the time to tidy up.
        return ("stopped", reason) if ending.get("code") else ("cut off", None)
    if last.get("state"):
        return str(last["state"]), reason
    # A run of before `run.json`, or one whose file is damaged.
    done = run.planned_steps is not None and run.last_step >= run.planned_steps
    return ("finished" if done else "cut off"), reason


def _is_running(run: TrainingRun, session: dict[str, Any]) -> bool:
    """Whether a session that never ended still runs: by its process on this machine, by its lines elsewhere."""
    if (session.get("machine") or {}).get("host") == socket.gethostname():
        try:
            process = psutil.Process(session["pid"])
            # A pid is given out again; its start is not.
            return (
                abs(process.create_time() - session["process_start"]) < 1
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except (psutil.Error, KeyError, TypeError, ValueError):
            return False
    touched = [datetime.fromisoformat(session["start"]).timestamp()] if session.get("start") else []
    with contextlib.suppress(OSError):
        touched.append((run.folder / METRICS_FILE).stat().st_mtime)
    return bool(touched) and time.time() - max(touched) < CUT_OFF_AFTER_SECONDS
