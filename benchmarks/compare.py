"""What got faster or slower between two result folders.

    python -m benchmarks.compare OLD NEW [--tolerance 0.1] [--other-machine]

Two medians differ where they are further apart than the tolerance and the quartiles of the
repetitions do not overlap. Measurements of which more or less is not better are left out. Exit
status: 0 nothing got worse, 1 the folders cannot be compared, 3 something got worse.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from benchmarks.measurements import (
    Comparison,
    Measurement,
    SectionResult,
    format_value,
    make_table,
)
from benchmarks.publishing import quiet_main, read_sections
from rectvlm.cli_options import CommandParser
from rectvlm.types import JsonObject, UserError

WORSE_EXIT_CODE = 3
MAX_NAMES_IN_ERROR = 5

Verdict = Literal["better", "worse", "same"]


@dataclass(frozen=True)
class Change:
    """A measurement in both folders."""

    name: str
    unit: str
    old: Measurement
    new: Measurement
    verdict: Verdict

    @property
    def ratio(self) -> float:
        """New median as a multiple of the old one."""
        return self.new.median / self.old.median if self.old.median else float("inf")


def compare_results(
    old: Sequence[SectionResult], new: Sequence[SectionResult], tolerance: float
) -> list[Change]:
    """Judge every measurement that both hold.

    Raises:
        UserError: one holds measurements that the other lacks.
    """
    old_by_name, new_by_name = dict(_list_measurements(old)), dict(_list_measurements(new))
    missing = [name for name in old_by_name if name not in new_by_name]
    added = [name for name in new_by_name if name not in old_by_name]
    if missing or added:
        raise UserError(
            "The folders do not hold the same measurements: expected as many of the same names, "
            f"found {_join_names(missing)} only in the first and {_join_names(added)} only in the "
            "second; compare two runs of one command."
        )
    changes: list[Change] = []
    for name, (comparison, before) in old_by_name.items():
        after = new_by_name[name][1]
        if comparison.better != "neither":
            verdict = judge_change(before, after, comparison.better == "lower", tolerance)
            changes.append(Change(name, comparison.unit, before, after, verdict))
    return changes


def _join_names(names: Sequence[str]) -> str:
    if not names:
        return "none"
    shown = ", ".join(repr(name) for name in names[:MAX_NAMES_IN_ERROR])
    return shown if len(names) <= MAX_NAMES_IN_ERROR else f"{shown} and others ({len(names)})"


def _list_measurements(
    sections: Sequence[SectionResult],
) -> Iterator[tuple[str, tuple[Comparison, Measurement]]]:
    for section in sections:
        for comparison in section.comparisons:
            for row in comparison.measurements:
                names = [section.name, comparison.title, row.case, row.at]
                yield ": ".join(filter(None, names)), (comparison, row)


def judge_change(
    old: Measurement, new: Measurement, lower_is_better: bool, tolerance: float
) -> Verdict:
    """Judge a change beyond tolerance and spread."""
    (old_low, old_high), (new_low, new_high) = old.quartiles, new.quartiles
    is_higher = new_low > old_high and new.median > old.median * (1 + tolerance)
    is_lower = new_high < old_low and new.median < old.median / (1 + tolerance)
    if not (is_higher or is_lower):
        return "same"
    return "better" if is_lower == lower_is_better else "worse"


def require_same_machine(old: JsonObject, new: JsonObject) -> None:
    """Refuse results of different machines.

    Raises:
        UserError: processor, cores or GPUs differ.
    """
    for fact in ("cpu", "cores", "gpus"):
        before, after = old["machine"][fact], new["machine"][fact]
        if before != after:
            raise UserError(
                f"The results come from different machines: expected the same {fact}, found "
                f"{before!r} in the first and {after!r} in the second; measure both on one machine "
                "or add --other-machine."
            )


def write_changes(changes: Sequence[Change]) -> str:
    """Write what got better or worse as Markdown, the largest changes first."""
    changed = [change for change in changes if change.verdict != "same"]
    changed.sort(key=lambda change: max(change.ratio, 1 / max(change.ratio, 1e-9)), reverse=True)
    rows: list[list[str]] = []
    for change in changed:
        old, new = format_value(change.old.median), format_value(change.new.median)
        rows.append([change.verdict, change.name, change.unit, old, new, f"{change.ratio:.2f}"])
    same = len(changes) - len(changed)
    summary = f"{same} of {len(changes)} measurements are the same within tolerance and spread.\n"
    if not rows:
        return summary
    return make_table(["", "measurement", "unit", "old", "new", "ratio"], rows) + "\n" + summary


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    old_results, old_sections = read_sections(options.old)
    new_results, new_sections = read_sections(options.new)
    if not options.other_machine:
        require_same_machine(old_results, new_results)
    changes = compare_results(old_sections, new_sections, options.tolerance)
    console = Console(soft_wrap=True)
    console.print(write_changes(changes), markup=False, highlight=False)
    has_worse = any(change.verdict == "worse" for change in changes)
    return WORSE_EXIT_CODE if has_worse else 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m benchmarks.compare",
        description="What got faster or slower between two result folders.",
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument(
        "--tolerance",
        type=_parse_tolerance,
        default=0.1,
        help="share by which medians may differ (default 0.1)",
    )
    parser.add_argument(
        "--other-machine", action="store_true", help="compare results of different machines"
    )
    return parser.parse_args(arguments)


def _parse_tolerance(text: str) -> float:
    try:
        tolerance = float(text)
    except ValueError:
        tolerance = -1.0
    if not 0 <= tolerance < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text!r}")
    return tolerance


if __name__ == "__main__":
    sys.exit(main())
