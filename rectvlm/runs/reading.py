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

METRICS, VALIDATION, SESSIONS, ENDING, BEST, CONFIG = (
    "metrics.jsonl",
    "validation.jsonl",
    "run.json",
    "ending.json",
    "best.json",
    "config.yaml",
)
LAST = 10
"""Steps that a final figure is taken over."""
SILENT = 1800.0
"""Seconds without a line after which a run on another machine counts as cut off."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One phase's run."""

    folder: Path
    name: str
    """Such as `demo/phase3`."""
    lines: list[Line]
    """Of `metrics.jsonl`, in the order of their steps."""
    validations: list[Line]
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
    def phase(self) -> str:
        """Such as `3` or `3-align`."""
        return self.folder.name.partition(".")[0].removeprefix("phase")

    @property
    def section(self) -> dict[str, Any]:
        """The configuration's section of this phase."""
        number, _, stage = self.phase.partition("-")
        phases = (self.config.get("train") or {}).get("phases") or {}
        found = phases.get(stage) if stage else phases.get(int(number)) if number.isdigit() else None
        return found if isinstance(found, dict) else {}

    @property
    def step(self) -> int:
        """The last step that is on record."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def steps(self) -> int | None:
        """Planned."""
        planned = self.sessions[-1].get("steps") if self.sessions else None
        return planned or self.section.get("steps")

    @property
    def world(self) -> int | None:
        """Ranks, the last time."""
        return self.sessions[-1].get("world_size") if self.sessions else None

    @property
    def started(self) -> str | None:
        """When it first started, UTC."""
        return self.sessions[0].get("start") if self.sessions else None

    @property
    def seconds(self) -> float:
        """That its steps took, without what lay between them."""
        return sum(line["seconds"]["total"] for line in self.lines if _timed(line))

    @property
    def recent(self) -> list[Line]:
        """The last steps."""
        return self.lines[-LAST:]

    def final(self, task: str | None = None) -> float | None:
        """Mean loss of the last steps: all of it, or a task's."""
        values = [line.get("loss") if task is None else (line.get("losses") or {}).get(task) for line in self.recent]
        return mean(values)

    @property
    def tasks(self) -> list[str]:
        """That a loss is on record of, in their order."""
        return list(dict.fromkeys(task for line in self.lines for task in line.get("losses") or {}))


def mean(values: Sequence[Any]) -> float | None:
    """Of the finite numbers among some values."""
    known = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _timed(line: Line) -> bool:
    seconds = line.get("seconds")
    return isinstance(seconds, dict) and isinstance(seconds.get("total"), int | float) and seconds["total"] > 0


def rates(run: Run, lines: Sequence[Line] | None = None) -> dict[str, float | None]:
    """Throughput of some steps, by default of all but the first of each session, which builds and tunes.

    Samples and tokens are those of all ranks. `mfu` is None where the run's hardware was not known.
    """
    begins = {session.get("from_step", 0) + 1 for session in run.sessions} or {1}
    counted = [line for line in (run.lines if lines is None else lines) if _timed(line)]
    counted = [line for line in counted if line["step"] not in begins] or counted
    seconds = sum(line["seconds"]["total"] for line in counted)
    if not counted or not seconds:
        return dict.fromkeys(("samples_per_second", "tokens_per_second", "data_wait", "mfu"))
    before = {line["step"]: line.get("samples_seen", 0) for line in run.lines}
    samples = sum(line.get("samples_seen", 0) - before.get(line["step"] - 1, 0) for line in counted)
    tokens = sum(line.get("tokens", 0) for line in counted)
    work = run.sessions[-1].get("work") if run.sessions else None
    return {
        "samples_per_second": samples / seconds,
        "tokens_per_second": tokens / seconds,
        "data_wait": sum(line["seconds"].get("data", 0.0) for line in counted) / seconds,
        "mfu": _utilization(work, tokens, len(counted), seconds) if work else None,
    }


def _utilization(work: dict[str, Any], tokens: int, steps: int, seconds: float) -> float | None:
    """As `rectvlm.train.utilization` defines it, from the figures that the run has written down."""
    try:
        towers = steps * work["micro_batches"]
        flops = towers * work["flops"] + (tokens - towers * work["patches"]) * work["flops_per_position"]
        return float(flops / (seconds * work["world"] * work["peak"]["tflops"] * 1e12))
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def find_runs(places: Sequence[Path]) -> list[Run]:
    """All runs in some folders: of one phase, of one name, or of many.

    Raises:
        UserError: a folder does not exist, or holds no run.
    """
    found: dict[Path, Run] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"There is no folder {place}: give a folder of runs, such as runs or runs/demo/phase1.")
        folders = list(_folders(place))
        if not folders:
            raise UserError(f"{place} holds no run: expected a folder with {METRICS} or {SESSIONS} in it or below it.")
        for folder in folders:
            found[folder.resolve()] = read_run(folder)
    runs = list(found.values())
    names = [run.name for run in runs]
    # Runs of the same name in different places are told apart by where they lie.
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs]


def _folders(place: Path) -> Iterator[Path]:
    """Folders of runs, in the order of their names; nothing below a run is searched."""
    for folder, below, files in os.walk(place):
        if METRICS in files or SESSIONS in files:
            below.clear()
            yield Path(folder)
        below.sort()


def read_run(folder: Path) -> Run:
    """A run from its folder; what cannot be read is named in `faults` and left out."""
    faults: list[str] = []
    name = "/".join(folder.resolve().parts[-2:])
    lines = sorted(_lines(folder / METRICS, faults), key=lambda line: line["step"])
    validations = sorted(_lines(folder / VALIDATION, faults), key=lambda line: line["step"])
    sessions = _json(folder / SESSIONS, faults).get("sessions") or []
    sessions = [one for one in sessions if isinstance(one, dict)]
    config = _yaml(folder / CONFIG, faults)
    run = Run(folder, name, lines, validations, sessions, config, "", None, None, faults)
    state, reason = _state(run, _json(folder / ENDING, faults))
    best = _best(_json(folder / BEST, faults))
    return replace(run, state=state, reason=reason, best=best)


def _lines(path: Path, faults: list[str]) -> list[Line]:
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


def _json(path: Path, faults: list[str]) -> dict[str, Any]:
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


def _yaml(path: Path, faults: list[str]) -> dict[str, Any]:
    found = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.safe_load(path.read_text())
    if not isinstance(found, dict):
        faults.append(f"{path.name} is missing or cannot be read")
        return {}
    return found


def _best(found: dict[str, Any]) -> tuple[int, str, float] | None:
    step, metric, value = found.get("step"), found.get("metric"), found.get("value")
    if isinstance(step, int) and isinstance(metric, str) and isinstance(value, int | float):
        return step, metric, float(value)
    return None


def _state(run: Run, ending: dict[str, Any]) -> tuple[str, str | None]:
    """What became of a run, and why if it says so."""
    last = run.sessions[-1] if run.sessions else {}
    reason = last.get("error") or (ending.get("reason") if ending.get("code") else None)
    if last.get("state") == "running":
        if _alive(run, last):
            return "running", None
        # A rank that hangs is ended from outside, with a reason and without the time to tidy up.
        return ("stopped", reason) if ending.get("code") else ("cut off", None)
    if last.get("state"):
        return str(last["state"]), reason
    # A run of before `run.json`, or one whose file is damaged.
    done = run.steps is not None and run.step >= run.steps
    return ("finished" if done else "cut off"), reason


def _alive(run: Run, session: dict[str, Any]) -> bool:
    """Whether a session that never ended still runs: by its process on this machine, by its lines elsewhere."""
    if (session.get("machine") or {}).get("host") == socket.gethostname():
        try:
            process = psutil.Process(session["pid"])
            # A pid is given out again; its start is not.
            return (
                abs(process.create_time() - session["process_start"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
            )
        except (psutil.Error, KeyError, TypeError, ValueError):
            return False
    touched = [datetime.fromisoformat(session["start"]).timestamp()] if session.get("start") else []
    with contextlib.suppress(OSError):
        touched.append((run.folder / METRICS).stat().st_mtime)
    return bool(touched) and time.time() - max(touched) < SILENT
