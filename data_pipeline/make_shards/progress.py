"""Progress and summary of a preprocessing run: a bar on a terminal, lines of the log elsewhere."""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from data_pipeline.make_shards.shard_plan import QUARANTINE_FILE, RejectedCase
from rectvlm.data.shard_manifest import ShardManifest
from rectvlm.data.store import ShardStore
from rectvlm.labels import LESIONS
from rectvlm.terminal_tables import FoldingTable
from rectvlm.types import SPLITS

log = logging.getLogger(__name__)

MAX_LISTED_CASES = 10
"""Rejected cases that the summary names; the quarantine list has them all."""
LOG_INTERVAL_SECONDS = 30.0
"""Time between two lines of the log, seconds."""


class CaseProgress(AbstractContextManager["CaseProgress"]):
    """Counts finished and rejected cases, and shows them with the speed and the time left."""

    def __init__(self, total: int, previously_done: int = 0) -> None:
        """Start to count.

        Args:
            total: cases of the whole run.
            previously_done: cases that an earlier run finished; they do not count for the speed.
        """
        self.total = total
        self.previously_done = previously_done
        self.done = previously_done
        self.rejected = 0
        self._start = time.monotonic()
        self._last_log = self._start
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("cases"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "CaseProgress":
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("cases", total=self.total, completed=self.done, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, cases: int, rejected: int) -> None:
        """Count finished cases, `rejected` of which could not be used."""
        self.done += cases
        self.rejected += rejected
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.describe_progress())
        elif time.monotonic() - self._last_log >= LOG_INTERVAL_SECONDS:
            self._last_log = time.monotonic()
            log.info("%d of %d cases, %s", self.done, self.total, self.describe_progress())

    @property
    def cases_per_second(self) -> float:
        """Mean speed since the start of this run."""
        elapsed_seconds = max(time.monotonic() - self._start, 1e-9)
        return (self.done - self.previously_done) / elapsed_seconds

    def describe_progress(self) -> str:
        """Speed, time left and number of rejected cases, in words."""
        speed = self.cases_per_second
        time_left = "unknown time"
        if speed:
            time_left = str(timedelta(seconds=round((self.total - self.done) / speed)))
        return f"{speed:.2f}/s, {time_left} left, {self.rejected} set aside"


def print_run_summary(
    folder: str,
    manifest: ShardManifest,
    rejected: Sequence[RejectedCase],
    shards_made: int,
    seconds: float,
) -> None:
    """Print a table of the splits, and log which cases were set aside and why.

    Args:
        folder: path or URL of the shards.
        manifest: of the folder.
        rejected: cases that could not be used.
        shards_made: shards that this run made; 0 when all were up to date.
        seconds: duration of the run.
    """
    settings = manifest.provenance.settings
    grid = " × ".join(map(str, settings["grid"]))
    spacing = " × ".join(f"{mm:g}" for mm in settings["spacing"])
    console = Console()
    console.print(
        f"{folder}: {grid} voxels (z, y, x) of {spacing} mm", highlight=False, soft_wrap=True
    )
    console.print(_summary_table(manifest))
    console.print(
        "lesions: cases that show one / cases in which all were outlined; the rest is unknown, "
        "not absent"
    )

    case_count = sum(shard.samples for shard in manifest.shards) + len(rejected)
    if shards_made:
        log.info("%d cases in %.0f s; shards made now: %d", case_count, seconds, shards_made)
    else:
        log.info("up to date: nothing has changed since the last run")
    _log_rejected_cases(folder, manifest, rejected)


def _log_rejected_cases(
    folder: str, manifest: ShardManifest, rejected: Sequence[RejectedCase]
) -> None:
    if not rejected:
        log.info("0 cases set aside")
        return
    quarantine = ShardStore(folder) / QUARANTINE_FILE
    log.warning("%d cases set aside, all of them listed in %s:", len(rejected), quarantine)
    reasons = manifest.provenance.set_aside.items()
    for reason, count in sorted(reasons, key=lambda item: -item[1]):
        log.warning("%6d: %s", count, reason)
    for case in rejected[:MAX_LISTED_CASES]:
        log.warning("%s: %s", case.key, case.message)
    if len(rejected) > MAX_LISTED_CASES:
        log.warning("… and %d more", len(rejected) - MAX_LISTED_CASES)


def _summary_table(manifest: ShardManifest) -> Table:
    """One column a split: cases, shards, MiB, and for each lesion the cases that show it."""
    columns = []
    splits_with_shards = {shard.split for shard in manifest.shards}
    used_splits = [split for split in SPLITS if split in splits_with_shards]
    for split in used_splits:
        shards = [shard for shard in manifest.shards if shard.split == split]
        mebibytes = sum(shard.bytes for shard in shards) / 2**20
        case_count = sum(shard.samples for shard in shards)
        cells = [str(case_count), str(len(shards)), f"{mebibytes:.1f}"]
        for lesion in LESIONS:
            counts = manifest.counts[split]["lesions"][lesion.key]
            cells.append(f"{counts['present']} / {counts['annotated']}")
        columns.append(cells)

    table = FoldingTable()
    table.add_column("")
    for split in used_splits:
        table.add_column(split, justify="right")
    row_names = ["cases", "shards", "MiB", *(lesion.name for lesion in LESIONS)]
    for name, *cells in zip(row_names, *columns, strict=True):
        table.add_row(name, *cells)
    return table
