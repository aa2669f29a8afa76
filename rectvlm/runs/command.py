"""The command `rectvlm runs`."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from rectvlm.files import require_writable_file
from rectvlm.runs.read_runs import TrainingRun, find_runs
from rectvlm.runs.run_tables import (
    compare_runs,
    default_figure_path,
    make_comparison_tables,
    make_run_table,
    summarize_run,
)
from rectvlm.terminal_tables import make_stdout_console


def run(options: argparse.Namespace) -> None:
    """Read the runs and show them.

    Raises:
        UserError: no run in a folder, too few to compare, or nothing to draw.
    """
    runs = find_runs(options.folders)
    actions = {"list": _print_list, "compare": _print_comparison, "plot": _save_plot}
    actions[options.action](runs, options)
    for training_run in runs:
        for fault in training_run.faults:
            sys.stderr.write(f"{training_run.name}: {fault}\n")


def _write_json(tree: Any) -> None:
    sys.stdout.write(json.dumps(tree, indent=2) + "\n")


def _print_list(runs: list[TrainingRun], options: argparse.Namespace) -> None:
    if options.json:
        _write_json([summarize_run(training_run) for training_run in runs])
    else:
        make_stdout_console().print(make_run_table(runs))


def _print_comparison(runs: list[TrainingRun], options: argparse.Namespace) -> None:
    if options.json:
        _write_json(asdict(compare_runs(runs)))
        return
    for table in make_comparison_tables(runs):
        make_stdout_console().print(table)


def _save_plot(runs: list[TrainingRun], options: argparse.Namespace) -> None:
    from rectvlm.runs.curves import plot_runs

    path = options.out or default_figure_path(runs)
    require_writable_file(path)
    plot_runs(runs, path)
    sys.stdout.write(f"{path}\n")
