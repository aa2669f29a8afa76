"""Tables of a data set's statistics, for a terminal of 80 columns."""

from collections.abc import Callable

from rich import box
from rich.table import Table

from data_pipeline.verify.statistics import LABEL_WORDS, DatasetStatistics, SplitStatistics
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.terminal_tables import FoldingTable


def build_tables(statistics: DatasetStatistics) -> list[Table]:
    """Build the tables of cases, findings and lesions."""
    by_split = statistics.to_dict()
    return [
        _case_table(by_split),
        _finding_table(by_split),
        _lesion_table(by_split),
        _source_table(by_split),
    ]


def _new_table(title: str, *columns: str) -> Table:
    table = FoldingTable(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table


def _case_table(by_split: dict[str, SplitStatistics]) -> Table:
    table = _new_table("Cases", "", *by_split)

    def add_row(name: str, key: str, format_value: Callable[..., str]) -> None:
        table.add_row(name, *(format_value(split[key]) for split in by_split.values()))

    for key in ("patients", "scans", "samples"):
        add_row(key, key, "{:,}".format)
    add_row("samples of one scan", "reconstructions of a scan", _format_reconstructions)
    for key in ("reports", "indications", "techniques"):
        add_row(key, key, "{:,}".format)
    for key in ("report words", "in-plane spacing, mm", "slice spacing, mm", "slices"):
        add_row(f"{key}: median (5–95 %)", key, _format_percentiles)
    for key in ("matrix", "region sources", "HU decisions"):
        add_row(key, key, _format_counts)
    add_row("with padding below −1024 HU", "with padding", "{:,}".format)
    return table


def _format_reconstructions(scan_counts: dict[int, int]) -> str:
    return ", ".join(f"{number} (×{scans})" for number, scans in scan_counts.items())


def _format_counts(counts: dict[str, int]) -> str:
    return "\n".join(f"{name}: {count:,}" for name, count in counts.items())


def _format_percentiles(percentiles: dict[str, float] | None) -> str:
    if percentiles is None:
        return "–"
    median, low, high = (_format_number(percentiles[name]) for name in ("median", "p5", "p95"))
    return f"{median} ({low}–{high})"


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _finding_table(by_split: dict[str, SplitStatistics]) -> Table:
    short_words = {"present": "yes", "absent": "no", "unknown": "?"}
    columns = ["finding"]
    for split in by_split:
        columns += [f"{split}\n{short_words[word]}" for word in LABEL_WORDS]
    title = "Findings: samples with each present (yes), absent (no), unknown (?)"
    table = _new_table(title, *columns)
    for finding in FINDINGS:
        cells = []
        for split_statistics in by_split.values():
            counts = split_statistics["labels"][finding]
            cells += [f"{counts[word]:,}" for word in LABEL_WORDS]
        table.add_row(finding, *cells)
    return table


def _lesion_table(by_split: dict[str, SplitStatistics]) -> Table:
    columns = {
        "present": "outlined",
        "annotated": "full",
        "partial": "part",
        "not annotated": "not",
    }
    title = "Lesions: samples with each outlined; annotated in full, in part, or not"
    table = _new_table(title, "lesion", "split", *columns.values(), "ml, median (5–95 %)")
    for lesion in LESIONS:
        for split, split_statistics in by_split.items():
            counts = split_statistics["lesions"][lesion.key]
            cells = [f"{counts[name]:,}" for name in columns]
            table.add_row(lesion.name, split, *cells, _format_percentiles(counts["ml"]))
    return table


def _source_table(by_split: dict[str, SplitStatistics]) -> Table:
    """Who or what outlined each lesion."""
    table = _new_table("Lesions: samples by the source of the outlines", "lesion", *by_split)
    for lesion in LESIONS:
        sources = [split["lesions"][lesion.key]["sources"] for split in by_split.values()]
        table.add_row(lesion.name, *(_format_counts(counts) or "–" for counts in sources))
    return table
