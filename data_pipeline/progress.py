"""How far a run is: a bar on a terminal, a line of the log now and then elsewhere."""

import logging
import sys
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

LINE_EVERY = 30.0
"""Seconds between two lines of the log."""


class Progress(AbstractContextManager["Progress"]):
    """Cases done, cases a second, time left, and how many were set aside."""

    def __init__(self, total: int, before: int = 0) -> None:
        """Of `total` cases, `before` were done by an earlier run; they do not count for the speed."""
        self.total, self.before = total, before
        self.done, self.aside = before, 0
        self._start = self._said = time.monotonic()
        columns = (TextColumn("cases"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("cases", total=self.total, completed=self.done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, cases: int, aside: int) -> None:
        """Count finished cases, `aside` of which could not be used."""
        self.done += cases
        self.aside += aside
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.note())
        elif time.monotonic() - self._said >= LINE_EVERY:
            self._said = time.monotonic()
            log.info("%d of %d cases, %s", self.done, self.total, self.note())

    @property
    def rate(self) -> float:
        """Cases a second since the start of this run."""
        return (self.done - self.before) / max(time.monotonic() - self._start, 1e-9)

    def note(self) -> str:
        """Speed, time left and cases set aside, in words."""
        left = timedelta(seconds=round((self.total - self.done) / self.rate)) if self.rate else "unknown time"
        return f"{self.rate:.2f}/s, {left} left, {self.aside} set aside"
