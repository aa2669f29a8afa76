"""The command `rectvlm runs`."""

import argparse
import json
import sys

from rich.console import Console

from rectvlm.runs.reading import Run, find_runs
from rectvlm.runs.show import compare, comparison, default_picture, listing, summary


def run(options: argparse.Namespace) -> None:
    """Read the runs and show them.

    Raises:
        UserError: no run in a folder, too few to compare, or nothing to draw.
    """
    runs = find_runs(options.folders)
    {"list": _list, "compare": _compare, "plot": _plot}[options.action](runs, options)
    for one in runs:
        for fault in one.faults:
            sys.stderr.write(f"{one.name}: {fault}\n")


def _console() -> Console:
    # In a pipe or a file there is no width to keep to.
    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else 200)


def _list(runs: list[Run], options: argparse.Namespace) -> None:
    if options.json:
        sys.stdout.write(json.dumps([summary(one) for one in runs], indent=2) + "\n")
    else:
        _console().print(listing(runs))


def _compare(runs: list[Run], options: argparse.Namespace) -> None:
    if options.json:
        sys.stdout.write(json.dumps(comparison(runs), indent=2) + "\n")
        return
    for table in compare(runs):
        _console().print(table)


def _plot(runs: list[Run], options: argparse.Namespace) -> None:
    from rectvlm.runs.curves import plot

    path = options.out or default_picture(runs)
    plot(runs, path)
    sys.stdout.write(f"{path}\n")
