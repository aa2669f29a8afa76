"""How far a run is: a bar on a terminal, a line of the log now and then elsewhere. And what it came to, in the end."""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from data_pipeline.make_shards.shard_plan import QUARANTINE_FILE, RejectedCase
from rectvlm.data.shard_manifest import ShardManifest
from rectvlm.data.store import ShardStore
from rectvlm.labels import LESIONS

log = logging.getLogger(__name__)

MAX_LISTED_CASES = 10
"""Cases set aside that the end of a run names; the list has them all."""
LOG_INTERVAL_SECONDS = 30.0
"""Seconds between two lines of the log."""


class CaseProgress(AbstractContextManager["CaseProgress"]):
    """Cases done, cases a second, time left, and how many were set aside."""

    def __init__(self, total: int, before: int = 0) -> None:
        """Of `total` cases, `before` were done by an earlier run; they do not count for the speed."""
        self.total, self.before = total, before
        self.done, self.aside = before, 0
        self._start = self._said = time.monotonic()
        columns = (
            TextColumn("cases"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = (
            Bar(*columns, console=Console(stderr=True), transient=True)
            if sys.stderr.isatty()
            else None
        )

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
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, cases: int, aside: int) -> None:
        """Count finished cases, `aside` of which could not be used."""
        self.done += cases
        self.aside += aside
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.describe_progress())
        elif time.monotonic() - self._said >= LOG_INTERVAL_SECONDS:
            self._said = time.monotonic()
            log.info("%d of %d cases, %s", self.done, self.total, self.describe_progress())

    @property
    def cases_per_second(self) -> float:
        """Cases a second since the start of this run."""
        return (self.done - self.before) / max(time.monotonic() - self._start, 1e-9)

    def describe_progress(self) -> str:
        """Speed, time left and cases set aside, in words."""
        left = (
            timedelta(seconds=round((self.total - self.done) / self.cases_per_second))
            if self.cases_per_second
            else "unknown time"
        )
        return f"{self.cases_per_second:.2f}/s, {left} left, {self.aside} set aside"


def print_run_summary(
    place: str, manifest: ShardManifest, rejected: Sequence[RejectedCase], made: int, seconds: float
) -> None:
    """Say what a run came to: a table of both splits, and what was set aside and why."""
    settings, console = manifest.provenance.settings, Console()
    grid, spacing = (
        " × ".join(map(str, settings["grid"])),
        " × ".join(f"{mm:g}" for mm in settings["spacing"]),
    )
    console.print(
        f"{place}: {grid} voxels (z, y, x) of {spacing} mm", highlight=False, soft_wrap=True
    )
    console.print(_summary_table(manifest))
    console.print(
        "lesions: cases that show one / cases in which all were outlined; the rest is unknown, not absent"
    )
    cases = sum(one.samples for one in manifest.shards) + len(rejected)
    if made:
        log.info("%d cases in %.0f s; shards made now: %d", cases, seconds, made)
    else:
        log.info("up to date: nothing has changed since the last run")
    if not rejected:
        log.info("0 cases set aside")
        return
    log.warning(
        "%d cases set aside, all of them listed in %s:",
        len(rejected),
        ShardStore(place) / QUARANTINE_FILE,
    )
    for reason, number in sorted(manifest.provenance.set_aside.items(), key=lambda item: -item[1]):
        log.warning("%6d: %s", number, reason)
    for one in rejected[:MAX_LISTED_CASES]:
        log.warning("%s: %s", one.key, one.message)
    if len(rejected) > MAX_LISTED_CASES:
        log.warning("… and %d more", len(rejected) - MAX_LISTED_CASES)


def _summary_table(manifest: ShardManifest) -> Table:
    table = Table()
    table.add_column("")
    shards = {
        split: [one for one in manifest.shards if one.split == split]
        for split in ("train", "valid")
    }
    for split in shards:
        table.add_column(split, justify="right")
    table.add_row("cases", *(str(sum(one.samples for one in part)) for part in shards.values()))
    table.add_row("shards", *(str(len(part)) for part in shards.values()))
    table.add_row(
        "MiB", *(f"{sum(one.bytes for one in part) / 2**20:.1f}" for part in shards.values())
    )
    for lesion in LESIONS:
        counts = [manifest.counts[split]["lesions"][lesion.key] for split in shards]
        table.add_row(lesion.name, *(f"{one['present']} / {one['annotated']}" for one in counts))
    return table
