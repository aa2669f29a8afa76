"""Tables on the terminal that keep every character, however narrow it is."""

import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 200
"""Columns of a table that goes to a pipe or a file, where there is no width to keep to."""


class FoldingTable(Table):
    """A table in which a word that is too long goes on in the next line of its cell.

    Rich cuts such a word by default, and an id without its end is of no use.
    """

    def add_column(self, *arguments: Any, **settings: Any) -> None:
        """Add a column with the arguments of `rich.table.Table.add_column`."""
        super().add_column(*arguments, **({"overflow": "fold"} | settings))


def make_stdout_console() -> Console:
    """Make a console on stdout, wide where stdout is no terminal and COLUMNS is not set."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if has_width else PIPE_WIDTH)
