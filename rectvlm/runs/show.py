"""Runs as tables for people and as trees for programs."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rectvlm.runs.reading import Run, mean, rates
from rectvlm.types import UserError

_COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red", "cut off": "red"}
_LARGER_IS_WORSE = "loss"
"""What a validation metric's name begins with when a smaller value is better."""


def summary(run: Run) -> dict[str, Any]:
    """One run in figures; None where its folder does not say."""
    last = run.lines[-1] if run.lines else {}
    git = (run.sessions[-1].get("git") if run.sessions else None) or {}
    return {
        "name": run.name,
        "folder": str(run.folder),
        "phase": run.phase,
        "state": run.state,
        "reason": run.reason,
        "step": run.step,
        "steps": run.steps,
        "samples_seen": last.get("samples_seen"),
        "skipped_steps": sum(1 for line in run.lines if line.get("skipped")),
        "loss": run.final(),
        "losses": {task: run.final(task) for task in run.tasks},
        "best": None if run.best is None else dict(zip(("step", "metric", "value"), run.best, strict=True)),
        "validation": run.validations[-1].get("metrics") if run.validations else None,
        **rates(run),
        "memory_bytes": max((line.get("memory_bytes") or 0 for line in run.lines), default=0) or None,
        "seconds": run.seconds,
        "world_size": run.world,
        "nodes": run.sessions[-1].get("nodes") if run.sessions else None,
        "sessions": len(run.sessions),
        "started": run.started,
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "faults": run.faults,
    }


def listing(runs: Sequence[Run]) -> Table:
    """A row a run."""
    table = Table("run", "state")
    for column in ("step", "loss", "best validation", "samples/s", "time", "ranks", "started (UTC)"):
        table.add_column(column, justify="left" if column == "best validation" else "right")
    for run in runs:
        state = Text(run.state, style=_COLOURS.get(run.state, ""))
        if run.reason:
            state.append(f"\n{run.reason}", style="dim")
        best = "–" if run.best is None else f"{run.best[1]} {run.best[2]:.4f} (step {run.best[0]})"
        table.add_row(
            run.name,
            state,
            f"{run.step} of {run.steps or '?'}",
            number(run.final()),
            best,
            number(rates(run)["samples_per_second"], 3, significant=True),
            duration(run.seconds),
            str(run.world or "–"),
            (run.started or "–")[:16].replace("T", " "),
        )
    return table


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """What sets runs apart, and how they did.

    Raises:
        UserError: fewer than two runs.
    """
    if len(runs) < 2:
        raise UserError("A comparison takes two runs or more: give several folders, or one that holds several runs.")
    trees = {
        "configuration": [flatten(run.config) for run in runs],
        "code and machine": [_circumstances(run) for run in runs],
    }
    return {
        "runs": [run.name for run in runs],
        "differences": {title: _differing(found) for title, found in trees.items()},
        "results": _results(runs),
    }


def compare(runs: Sequence[Run]) -> list[Table]:
    """The same as tables."""
    found = comparison(runs)
    tables = []
    for title, rows in [*found["differences"].items(), ("results", found["results"])]:
        table = Table("", *found["runs"], title=title, title_justify="left")
        for name, values in rows.items():
            table.add_row(name, *(_cell(value) for value in values))
        if not rows:
            table.add_row("no difference", *("" for _ in runs))
        tables.append(table)
    return tables


def _circumstances(run: Run) -> dict[str, Any]:
    """Code, versions and machine of the last session."""
    last = run.sessions[-1] if run.sessions else {}
    git, machine = last.get("git") or {}, last.get("machine") or {}
    patch = git.get("patch") or {}
    found = {
        "commit": git.get("commit"),
        "patch": patch.get("sha256"),
        "ranks": last.get("world_size"),
        "nodes": last.get("nodes"),
        "processor": machine.get("processor"),
        "GPUs": ", ".join(machine.get("gpus") or []) or None,
    }
    found |= {f"packages.{name}": version for name, version in (last.get("packages") or {}).items()}
    return found | {f"versions.{name}": version for name, version in (last.get("versions") or {}).items()}


def _differing(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows whose values are not the same in all runs."""
    names = dict.fromkeys(name for tree in trees for name in tree)
    rows = {name: [tree.get(name) for tree in trees] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _results(runs: Sequence[Run]) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {
        "state": [run.state for run in runs],
        "steps": [run.step for run in runs],
        "samples seen": [run.lines[-1].get("samples_seen") if run.lines else None for run in runs],
        "loss": [run.final() for run in runs],
    }
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        rows[f"loss {task}"] = [run.final(task) for run in runs]
    for name in dict.fromkeys(name for run in runs for name in validation_names(run)):
        curves = [validation_curve(run, name) for run in runs]
        rows[f"validation {name}, last"] = [curve[-1][1] if curve else None for curve in curves]
        chosen = min if name.startswith(_LARGER_IS_WORSE) else max
        rows[f"validation {name}, best"] = [chosen(v for _, v in curve) if curve else None for curve in curves]
    for name in ("samples_per_second", "tokens_per_second", "data_wait", "mfu"):
        rows[name.replace("_per_second", "/s").replace("_", " ")] = [rates(run)[name] for run in runs]
    memory = [mean([max((line.get("memory_bytes") or 0 for line in run.lines), default=0)]) for run in runs]
    rows["peak memory, GB"] = [value / 1e9 if value else None for value in memory]
    rows["hours of steps"] = [run.seconds / 3600 for run in runs]
    return rows


def validation_names(run: Run) -> list[str]:
    """Metrics that its validations have a number for."""
    return list(
        dict.fromkeys(
            name
            for line in run.validations
            for name, value in (line.get("metrics") or {}).items()
            if mean([value]) is not None
        )
    )


def validation_curve(run: Run, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric."""
    pairs = [(line["step"], mean([(line.get("metrics") or {}).get(name)])) for line in run.validations]
    return [(step, value) for step, value in pairs if value is not None]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree as one level: `train.phases.3.steps`; lists stay whole."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value, 4, significant=True)
    if isinstance(value, str) and len(value) == 64:  # a checksum
        return value[:12]
    return "–" if value is None else str(value)


def number(value: float | None, digits: int = 4, significant: bool = False) -> str:
    """A figure, or a dash."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if significant else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"


def default_picture(runs: Sequence[Run]) -> Path:
    """Where curves go that no name was given for: in the one run's folder, else here, under the time."""
    if len(runs) == 1:
        return runs[0].folder / "curves.png"
    return Path(f"curves-{datetime.now(UTC):%Y%m%d-%H%M%S}.png")
