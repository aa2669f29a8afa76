"""The checks of `rectvlm doctor` as a table."""

from collections.abc import Sequence

from rich.text import Text

from rectvlm.doctor.checks import Check
from rectvlm.terminal_tables import FoldingTable

_STYLES = {"ok": "green", "missing": "yellow", "failed": "bold red"}


def make_doctor_table(checks: Sequence[Check]) -> FoldingTable:
    """One row a check: name, state, what was found, what to do."""
    table = FoldingTable("check", "state", "found", "what to do", id_columns=(0, 1))
    for check in checks:
        state = Text(check.state, style=_STYLES[check.state])
        table.add_row(check.name, state, Text(check.finding), Text(check.remedy))
    return table
