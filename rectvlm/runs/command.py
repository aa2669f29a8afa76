"""The command `rectvlm runs`."""

import argparse
import json
import sys

from rich.console import Console

from rectvlm.runs.read_runs import TrainingRun, find_runs
from rectvlm.runs.run_tables import (
    compare_runs,
    default_figure_path,
    make_comparison_tables,
    make_run_table,
    summarize_run,
)


def run(options: argparse.Namespace) -> None:
    """Read the runs and show them.

    Raises:
        UserError: no run in a folder, too few to compare, or nothing to draw.
    """
    runs = find_runs(options.folders)
    {"list": _print_list, "compare": _print_comparison, "plot": _save_plot}[options.action](
        runs, options
    )
    for one in runs:
        for fault in one.faults:
            sys.stderr.write(f"{one.name}: {fault}\n")


def _make_console() -> Console:
    # In a pipe or a file there is no width to keep to.
    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else 200)


def _print_list(runs: list[TrainingRun], options: argparse.Namespace) -> None:
    if options.json:
        sys.stdout.write(json.dumps([summarize_run(one) for one in runs], indent=2) + "\n")
    else:
        _make_console().print(make_run_table(runs))


def _print_comparison(runs: list[TrainingRun], options: argparse.Namespace) -> None:
    if options.json:
        sys.stdout.write(json.dumps(compare_runs(runs), indent=2) + "\n")
        return
    for table in make_comparison_tables(runs):
        _make_console().print(table)


def _save_plot(runs: list[TrainingRun], options: argparse.Namespace) -> None:
    from rectvlm.runs.curves import plot_runs

    path = options.out or default_figure_path(runs)
    plot_runs(runs, path)
    sys.stdout.write(f"{path}\n")
