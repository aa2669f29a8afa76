"""Tables on the terminal that keep every character, however narrow it is."""

import os
import sys
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table

PIPE_WIDTH = 200
"""Columns of a table that goes to a pipe or a file, where there is no width to keep to."""


MIN_PROSE_WIDTH = 5
"""Width that ids leave to each other column, characters."""


class FoldingTable(Table):
    """A table in which a word that is too long goes on in the next line of its cell.

    Rich cuts such a word by default, and an id without its end is of no use. In columns of ids,
    words are not broken at all where there is room.
    """

    def __init__(self, *headers: str, id_columns: tuple[int, ...] = (), **settings: Any) -> None:
        """Make a table; `settings` are those of `rich.table.Table`.

        Args:
            headers: headers of the first columns.
            id_columns: numbers of the columns whose words stay in one piece.
            settings: arguments of `rich.table.Table`.
        """
        super().__init__(**settings)
        self._id_columns = id_columns
        for header in headers:
            self.add_column(header)

    def add_column(self, *arguments: Any, **settings: Any) -> None:
        """Add a column with the arguments of `rich.table.Table.add_column`."""
        super().add_column(*arguments, **({"overflow": "fold"} | settings))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table, with its ids whole if they leave room for the other columns."""
        id_columns = [self.columns[number] for number in self._id_columns]
        widths = [_longest_word(column) for column in id_columns]
        prose_width = MIN_PROSE_WIDTH * (len(self.columns) - len(id_columns))
        borders_width = 3 * len(self.columns) + 1
        has_room = sum(widths) + prose_width + borders_width <= options.max_width
        natural_width = self.__rich_measure__(console, options.update(max_width=PIPE_WIDTH)).maximum
        if has_room and natural_width > options.max_width:
            for column, width in zip(id_columns, widths, strict=True):
                column.width = width
        yield from super().__rich_console__(console, options)


def _longest_word(column: Column) -> int:
    """Width of the longest word of a column, characters."""
    words = " ".join(str(cell) for cell in (column.header, *column.cells)).split()
    return max(map(cell_len, words), default=0)


def make_stdout_console() -> Console:
    """Make a console on stdout, wide where stdout is no terminal and COLUMNS is not set."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if has_width else PIPE_WIDTH)
