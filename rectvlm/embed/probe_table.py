"""Scores of a linear probe as a table for the terminal."""

from rich.table import Table

from rectvlm.embed.probe import ProbeResult
from rectvlm.evaluate.score_format import FINDING_SCORE_NAMES, format_interval, format_score
from rectvlm.terminal_tables import FoldingTable

SHOWN_SCORES = ("auroc", "average_precision", "f1")
"""Scores in the table; the JSON file has all."""


def make_probe_table(result: ProbeResult) -> Table:
    """Make a table with a row for the mean and one for each finding."""
    title = f"{result.encoder}, C = {result.c:g}, {result.split} split, {result.n_scans} scans"
    table = FoldingTable(title=title, title_justify="left")
    table.add_column("finding", justify="left")
    for score in SHOWN_SCORES:
        table.add_column(FINDING_SCORE_NAMES[score], justify="right")
        table.add_column("95%", justify="right")
    table.add_column("positive", justify="right")
    rows = {"macro mean": result.classification["macro"]} | result.classification["per_finding"]
    for name, row in rows.items():
        cells = []
        for score in SHOWN_SCORES:
            cells += [format_score(row[score]), format_interval(row, score)]
        positive = f"{row['n_positive']} of {row['n_known']}" if "n_known" in row else ""
        table.add_row(name, *cells, positive)
    return table
