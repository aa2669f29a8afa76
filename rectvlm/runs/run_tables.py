"""Runs as tables for people and as trees for programs."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rectvlm.runs.read_runs import TrainingRun, compute_throughput, mean_finite
from rectvlm.types import UserError

_STATE_COLOURS = {
    "finished": "green",
    "running": "cyan",
    "stopped": "yellow",
    "failed": "red",
    "cut off": "red",
}
_LOSS_PREFIX = "loss"
"""What a validation metric's name begins with when a smaller value is better."""


def summarize_run(run: TrainingRun) -> dict[str, Any]:
    """One run in figures; None where its folder does not say."""
    last = run.metrics_lines[-1] if run.metrics_lines else {}
    git = (run.sessions[-1].get("git") if run.sessions else None) or {}
    return {
        "name": run.name,
        "folder": str(run.folder),
        "phase": run.phase_name,
        "state": run.state,
        "reason": run.reason,
        "step": run.last_step,
        "steps": run.planned_steps,
        "samples_seen": last.get("samples_seen"),
        "skipped_steps": sum(1 for line in run.metrics_lines if line.get("skipped")),
        "loss": run.final_loss(),
        "losses": {task: run.final_loss(task) for task in run.tasks},
        "best": None
        if run.best is None
        else dict(zip(("step", "metric", "value"), run.best, strict=True)),
        "validation": run.validation_lines[-1].get("metrics") if run.validation_lines else None,
        **compute_throughput(run),
        "memory_bytes": max(
            (line.get("memory_bytes") or 0 for line in run.metrics_lines), default=0
        )
        or None,
        "seconds": run.training_seconds,
        "world_size": run.world_size,
        "nodes": run.sessions[-1].get("nodes") if run.sessions else None,
        "sessions": len(run.sessions),
        "started": run.start_time,
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "faults": run.faults,
    }


def make_run_table(runs: Sequence[TrainingRun]) -> Table:
    """A row a run."""
    table = Table("run", "state")
    for column in (
        "step",
        "loss",
        "best validation",
        "samples/s",
        "time",
        "ranks",
        "started (UTC)",
    ):
        table.add_column(column, justify="left" if column == "best validation" else "right")
    for run in runs:
        state = Text(run.state, style=_STATE_COLOURS.get(run.state, ""))
        if run.reason:
            state.append(f"\n{run.reason}", style="dim")
        best = "–" if run.best is None else f"{run.best[1]} {run.best[2]:.4f} (step {run.best[0]})"
        table.add_row(
            run.name,
            state,
            f"{run.last_step} of {run.planned_steps or '?'}",
            format_number(run.final_loss()),
            best,
            format_number(compute_throughput(run)["samples_per_second"], 3, significant=True),
            format_duration(run.training_seconds),
            str(run.world_size or "–"),
            (run.start_time or "–")[:16].replace("T", " "),
        )
    return table


def compare_runs(runs: Sequence[TrainingRun]) -> dict[str, Any]:
    """What sets runs apart, and how they did.

    Raises:
        UserError: fewer than two runs.
    """
    if len(runs) < 2:
        raise UserError(
            "A comparison takes two runs or more: give several folders, or one that holds several runs."
        )
    trees = {
        "configuration": [flatten_tree(run.config) for run in runs],
        "code and machine": [_read_environment(run) for run in runs],
    }
    return {
        "runs": [run.name for run in runs],
        "differences": {title: _select_differences(found) for title, found in trees.items()},
        "results": _collect_results(runs),
    }


def make_comparison_tables(runs: Sequence[TrainingRun]) -> list[Table]:
    """The same as tables."""
    found = compare_runs(runs)
    tables = []
    for title, rows in [*found["differences"].items(), ("results", found["results"])]:
        table = Table("", *found["runs"], title=title, title_justify="left")
        for name, values in rows.items():
            table.add_row(name, *(_format_cell(value) for value in values))
        if not rows:
            table.add_row("no difference", *("" for _ in runs))
        tables.append(table)
    return tables


def _read_environment(run: TrainingRun) -> dict[str, Any]:
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
    return found | {
        f"versions.{name}": version for name, version in (last.get("versions") or {}).items()
    }


def _select_differences(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows whose values are not the same in all runs."""
    names = dict.fromkeys(name for tree in trees for name in tree)
    rows = {name: [tree.get(name) for tree in trees] for name in names}
    return {
        name: values for name, values in rows.items() if any(value != values[0] for value in values)
    }


def _collect_results(runs: Sequence[TrainingRun]) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {
        "state": [run.state for run in runs],
        "steps": [run.last_step for run in runs],
        "samples seen": [
            run.metrics_lines[-1].get("samples_seen") if run.metrics_lines else None for run in runs
        ],
        "loss": [run.final_loss() for run in runs],
    }
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        rows[f"loss {task}"] = [run.final_loss(task) for run in runs]
    for name in dict.fromkeys(name for run in runs for name in list_validation_metrics(run)):
        curves = [read_validation_curve(run, name) for run in runs]
        rows[f"validation {name}, last"] = [curve[-1][1] if curve else None for curve in curves]
        chosen = min if name.startswith(_LOSS_PREFIX) else max
        rows[f"validation {name}, best"] = [
            chosen(v for _, v in curve) if curve else None for curve in curves
        ]
    for name in ("samples_per_second", "tokens_per_second", "data_wait", "mfu"):
        rows[name.replace("_per_second", "/s").replace("_", " ")] = [
            compute_throughput(run)[name] for run in runs
        ]
    memory = [
        mean_finite([max((line.get("memory_bytes") or 0 for line in run.metrics_lines), default=0)])
        for run in runs
    ]
    rows["peak memory, GB"] = [value / 1e9 if value else None for value in memory]
    rows["hours of steps"] = [run.training_seconds / 3600 for run in runs]
    return rows


def list_validation_metrics(run: TrainingRun) -> list[str]:
    """Metrics that its validations have a number for."""
    return list(
        dict.fromkeys(
            name
            for line in run.validation_lines
            for name, value in (line.get("metrics") or {}).items()
            if mean_finite([value]) is not None
        )
    )


def read_validation_curve(run: TrainingRun, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric."""
    pairs = [
        (line["step"], mean_finite([(line.get("metrics") or {}).get(name)]))
        for line in run.validation_lines
    ]
    return [(step, value) for step, value in pairs if value is not None]


def flatten_tree(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree as one level: `train.phases.phase3.steps`; lists stay whole."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flatten_tree(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _format_cell(value: Any) -> str:
    if isinstance(value, float):
        return format_number(value, 4, significant=True)
    if isinstance(value, str) and len(value) == 64:  # a checksum
        return value[:12]
    return "–" if value is None else str(value)


def format_number(value: float | None, digits: int = 4, significant: bool = False) -> str:
    """A figure, or a dash."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if significant else f"{value:.{digits}f}"


def format_duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"


def default_figure_path(runs: Sequence[TrainingRun]) -> Path:
    """Where curves go that no name was given for: in the one run's folder, else here, under the time."""
    if len(runs) == 1:
        return runs[0].folder / "curves.png"
    return Path(f"curves-{datetime.now(UTC):%Y%m%d-%H%M%S}.png")
