"""The README's table and plot of a run of all benchmarks.

    python -m benchmarks.readme_block benchmarks/results/bench-MACHINE-DATE

Prints Markdown: for each comparison that is worth a line the first case beside the others, each
with its command, and the plot of the parts of a step.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measurements import Comparison, Measurement, format_value, make_table
from benchmarks.publishing import CHECKOUT, quiet_main, read_sections
from rectvlm.cli_options import CommandParser
from rectvlm.types import UserError

PLOT = "engine-step-parts-of-a-step.png"


@dataclass(frozen=True)
class MainFigure:
    """A line of the table."""

    section: str
    comparison: str
    """Title of the comparison."""
    case: str
    """Case that is ours."""
    label: str
    """What it is, for a reader."""


MAIN_FIGURES = (
    MainFigure(
        "preprocess", "A volume from the file to a sample", "the pipeline", "A CT to a sample"
    ),
    MainFigure("loader", "A sample without workers", "rectvlm", "A sample from a shard"),
    MainFigure("attention", "Attention, forward and backward", "folded (ours)", "Attention"),
    MainFigure("overhead", "Step of the trainer and of bare loops", "trainer", "A trainer's step"),
)


def make_block(folder: Path) -> str:
    """Write table and plot of a result folder as Markdown.

    Raises:
        UserError: the folder holds no results, or none that the table shows.
    """
    _, sections = read_sections(folder)
    rows: list[list[str]] = []
    for figure in MAIN_FIGURES:
        for section in sections:
            for comparison in section.comparisons:
                names = (section.name, comparison.title)
                if names == (figure.section, figure.comparison):
                    command = f"`{section.command}`"
                    rows.append([figure.label, *_summarize(comparison, figure.case), command])
    if not rows:
        titles = ", ".join(figure.section for figure in MAIN_FIGURES)
        raise UserError(
            f"{folder} has none of the README's figures: expected a run with one of the sections "
            f"{titles}."
        )
    table = make_table(["", "rectvlm", "others", "command"], rows)
    plot = folder.resolve() / PLOT
    if not plot.is_file():
        return table
    place = plot.relative_to(CHECKOUT) if plot.is_relative_to(CHECKOUT) else plot
    return f"{table}\n![Parts of a step of each phase]({place})\n"


def _summarize(comparison: Comparison, case: str) -> tuple[str, str]:
    """The case's median at the last point, and the others' there."""
    last = comparison.measurements[-1].at
    at_last = [row for row in comparison.measurements if row.at == last]
    ours = next((row for row in at_last if row.case == case), None)
    others = [f"{row.case} {_format_median(row)}" for row in at_last if row is not ours]
    unit = comparison.unit
    if comparison.at_label:
        unit = f"{unit} ({comparison.at_label}: {last})"
    return f"{_format_median(ours) if ours else '–'} {unit}", "; ".join(others)


def _format_median(row: Measurement) -> str:
    low, high = row.quartiles
    return f"{format_value(row.median)} ({format_value(low)} to {format_value(high)})"


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    sys.stdout.write(make_block(options.folder))
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m benchmarks.readme_block",
        description="The README's table and plot of a run of all benchmarks.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
