"""Options of the user's own data."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from rectvlm.cli_options import add_options, argument


@dataclass(frozen=True)
class OwnDataOptions:
    """Where the user's own cases are listed; at most one of `table` and `cases`."""

    table: Path | None = field(default=None, metadata=argument(metavar="CSV"))
    """Table with a row for each CT: columns ct, key, patient, split, report, one a finding, and
    LESION_mask."""
    mapping: Path | None = field(default=None, metadata=argument(metavar="YAML"))
    """What the table's own column names and words stand for, as `columns` and `words`."""
    cases: str | None = field(default=None, metadata=argument(metavar="MODULE:FUNCTION"))
    """Function that yields `data_pipeline.cases.Case`s."""


def add_own_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `OwnDataOptions` to a parser, as a group."""
    group = parser.add_argument_group("own data", "see docs/tutorial/own-data.md")
    add_options(group, OwnDataOptions)
