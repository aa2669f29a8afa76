"""Runs as tables for people and as trees for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rectvlm.runs.read_runs import (
    TrainingRun,
    compute_throughput,
    read_number,
)
from rectvlm.runs.run_files import CURVES_FILE
from rectvlm.terminal_tables import FoldingTable
from rectvlm.types import JsonObject, UserError

_STATE_COLOURS = {
    "finished": "green",
    "running": "cyan",
    "stopped": "yellow",
    "failed": "red",
    "cut off": "red",
}
_LOSS_PREFIX = "loss"
"""Beginning of a validation metric's name when a smaller value is better."""
SHA256_DIGITS, SHOWN_DIGITS = 64, 12

Rows = dict[str, list[Any]]
"""Name of a row, and its value in each run."""


def summarize_run(run: TrainingRun) -> JsonObject:
    """Summarize one run; None where its folder does not say."""
    session = run.last_session
    git = session.get("git") or {}
    validation = run.validation_lines[-1].get("metrics") if run.validation_lines else None
    return {
        "name": run.name,
        "folder": str(run.folder),
        "phase": run.phase_name,
        "state": run.state,
        "reason": run.reason,
        "step": run.last_step,
        "steps": run.planned_steps,
        "samples_seen": run.last_line.get("samples_seen"),
        "skipped_steps": sum(bool(line.get("skipped")) for line in run.metrics_lines),
        "loss": run.final_loss(),
        "losses": {task: run.final_loss(task) for task in run.tasks},
        "best": None if run.best is None else asdict(run.best),
        "validation": validation,
        **asdict(compute_throughput(run)),
        "memory_bytes": run.peak_memory_bytes,
        "seconds": run.training_seconds,
        "world_size": run.world_size,
        "nodes": session.get("nodes"),
        "sessions": len(run.sessions),
        "started": run.start_time,
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "faults": run.faults,
    }


def make_run_table(runs: Sequence[TrainingRun]) -> Table:
    """Make a table with one row for each run."""
    table = FoldingTable("run", "state", id_columns=(0,))
    for column in ("step", "loss"):
        table.add_column(column, justify="right")
    table.add_column("best validation")
    for column in ("samples/s", "time", "ranks", "started (UTC)"):
        table.add_column(column, justify="right")
    for run in runs:
        samples_per_second = compute_throughput(run).samples_per_second
        table.add_row(
            run.name,
            _describe_state(run),
            f"{run.last_step} of {run.planned_steps or '?'}",
            format_number(run.final_loss()),
            _describe_best(run),
            format_number(samples_per_second, 3, significant=True),
            format_duration(run.training_seconds),
            str(run.world_size or "–"),
            (run.start_time or "–")[:16].replace("T", " "),
        )
    return table


def _describe_state(run: TrainingRun) -> Text:
    text = Text(run.state, style=_STATE_COLOURS.get(run.state, ""))
    if run.reason:
        text.append(f"\n{run.reason}", style="dim")
    return text


def _describe_best(run: TrainingRun) -> str:
    if run.best is None:
        return "–"
    return f"{run.best.metric} {run.best.value:.4f} (step {run.best.step})"


@dataclass(frozen=True)
class RunComparison:
    """What sets runs apart, and how they did."""

    runs: list[str]
    """Names of the runs."""
    differences: dict[str, Rows]
    """Settings that differ between the runs, by kind."""
    results: Rows


def compare_runs(runs: Sequence[TrainingRun]) -> RunComparison:
    """Compare runs.

    Raises:
        UserError: fewer than two runs.
    """
    if len(runs) < 2:
        raise UserError(
            "A comparison takes two runs or more: give several folders, or one that holds several "
            "runs."
        )
    settings = [flatten_tree(run.config) for run in runs]
    environments = [_read_environment(run) for run in runs]
    return RunComparison(
        runs=[run.name for run in runs],
        differences={
            "configuration": _select_differences(settings),
            "code and machine": _select_differences(environments),
        },
        results=_collect_results(runs),
    )


def make_comparison_tables(runs: Sequence[TrainingRun]) -> list[Table]:
    """Compare runs and make a table of each kind of difference, and one of the results."""
    comparison = compare_runs(runs)
    tables: list[Table] = []
    for title, rows in (comparison.differences | {"results": comparison.results}).items():
        table = FoldingTable("", *comparison.runs, title=title, title_justify="left")
        for name, values in rows.items():
            table.add_row(name, *map(_format_cell, values))
        if not rows:
            table.add_row("no difference", *[""] * len(runs))
        tables.append(table)
    return tables


def _read_environment(run: TrainingRun) -> JsonObject:
    """Read code, versions and machine of the last session."""
    session = run.last_session
    git, machine = session.get("git") or {}, session.get("machine") or {}
    environment = {
        "commit": git.get("commit"),
        "patch": (git.get("patch") or {}).get("sha256"),
        "ranks": session.get("world_size"),
        "nodes": session.get("nodes"),
        "processor": machine.get("processor"),
        "GPUs": ", ".join(machine.get("gpus") or []) or None,
    }
    for group in ("packages", "versions"):
        for name, version in (session.get(group) or {}).items():
            environment[f"{group}.{name}"] = version
    return environment


def _select_differences(trees: Sequence[Mapping[str, Any]]) -> Rows:
    """Select the rows whose values are not the same in all runs."""
    names: dict[str, None] = {}
    for tree in trees:
        names.update(dict.fromkeys(tree))
    rows: Rows = {}
    for name in names:
        values = [tree.get(name) for tree in trees]
        if any(value != values[0] for value in values):
            rows[name] = values
    return rows


def _collect_results(runs: Sequence[TrainingRun]) -> Rows:
    rows: Rows = {
        "state": [run.state for run in runs],
        "steps": [run.last_step for run in runs],
        "samples seen": [run.last_line.get("samples_seen") for run in runs],
        "loss": [run.final_loss() for run in runs],
    }
    for task in list_tasks(runs):
        rows[f"loss {task}"] = [run.final_loss(task) for run in runs]
    for metric in list_validation_metrics(runs):
        choose_best = min if metric.startswith(_LOSS_PREFIX) else max
        last_values: list[float | None] = []
        best_values: list[float | None] = []
        for run in runs:
            values = [value for _, value in read_validation_curve(run, metric)]
            last_values.append(values[-1] if values else None)
            best_values.append(choose_best(values) if values else None)
        rows[f"validation {metric}, last"] = last_values
        rows[f"validation {metric}, best"] = best_values
    throughputs = [asdict(compute_throughput(run)) for run in runs]
    for name in ("samples_per_second", "tokens_per_second", "data_wait", "mfu"):
        title = name.replace("_per_second", "/s").replace("_", " ")
        rows[title] = [throughput[name] for throughput in throughputs]
    memory_bytes = [read_number(run.peak_memory_bytes) for run in runs]
    rows["peak memory, GB"] = [size / 1e9 if size else None for size in memory_bytes]
    rows["hours of steps"] = [run.training_seconds / 3600 for run in runs]
    return rows


def list_tasks(runs: Sequence[TrainingRun]) -> list[str]:
    """List the tasks that have a loss on record in any run."""
    tasks: dict[str, None] = {}
    for run in runs:
        tasks.update(dict.fromkeys(run.tasks))
    return list(tasks)


def list_validation_metrics(runs: Sequence[TrainingRun]) -> list[str]:
    """List the validation metrics that have a number on record in any run."""
    metrics: dict[str, None] = {}
    for run in runs:
        for line in run.validation_lines:
            for name, value in (line.get("metrics") or {}).items():
                if read_number(value) is not None:
                    metrics[name] = None
    return list(metrics)


def read_validation_curve(run: TrainingRun, metric: str) -> list[tuple[int, float]]:
    """Read steps and values of a validation metric."""
    points: list[tuple[int, float]] = []
    for line in run.validation_lines:
        value = read_number((line.get("metrics") or {}).get(metric))
        if value is not None:
            points.append((line["step"], value))
    return points


def flatten_tree(tree: Any, prefix: str = "") -> JsonObject:
    """Flatten a tree to one level, as in `train.phases.phase3.samples`; lists stay lists."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    leaves: JsonObject = {}
    for name, value in tree.items():
        leaves |= flatten_tree(value, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def _format_cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return format_number(value, 4, significant=True)
    if isinstance(value, str) and len(value) == SHA256_DIGITS:
        return value[:SHOWN_DIGITS]
    return str(value)


def format_number(value: float | None, digits: int = 4, significant: bool = False) -> str:
    """Format a number with so many decimals or significant digits; None is a dash."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if significant else f"{value:.{digits}f}"


def format_duration(seconds: float) -> str:
    """Format seconds as hours and minutes, or as minutes and seconds."""
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"


def default_figure_path(runs: Sequence[TrainingRun]) -> Path:
    """Choose where curves go: the folder of a single run, else here, under the time."""
    if len(runs) == 1:
        return runs[0].folder / CURVES_FILE
    return Path(f"curves-{datetime.now(UTC):%Y%m%d-%H%M%S}.png")
