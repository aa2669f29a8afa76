"""What whoever watches a run sees: figures of the last steps, as a bar on a terminal, else now and then as a line."""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from rectvlm.train.logging.mfu import StepFlops

log = logging.getLogger(__name__)

RECENT_STEPS = 20
"""Steps that figures are taken over."""
LOG_INTERVAL_SECONDS = 20.0
"""Seconds between two lines where there is no terminal for a bar."""


@dataclass(frozen=True)
class ProgressFigures:
    """Where a run stands; losses, rates and waiting are those of the last steps."""

    step: int
    total_steps: int
    loss: float | None
    losses: Mapping[str, float | None]
    samples_per_second: float
    """Of all ranks."""
    tokens_per_second: float
    """Patches and language positions of all ranks."""
    mfu: float | None
    """Model FLOPs as a share of what the devices could do; None where that is not known."""
    data_wait_share: float
    """Share of the time in which rank 0 waited for data."""
    peak_memory_bytes: float
    """Peak of the fullest rank, bytes."""
    seconds_left: float | None
    """Seconds until the last step, with what checkpoints and validation have taken so far."""

    def __str__(self) -> str:
        parts = " ".join(f"{task} {_format_number(value)}" for task, value in self.losses.items())
        share = "–" if self.mfu is None else f"{self.mfu:.1%}"
        return (
            f"loss {_format_number(self.loss)} ({parts}), {self.samples_per_second:.3g} samples/s, "
            f"{_format_thousands(self.tokens_per_second)} tokens/s, MFU {share}, data wait {self.data_wait_share:.0%}, "
            f"memory {self.peak_memory_bytes / 1e9:.3g} GB, {_format_duration(self.seconds_left)} left"
        )


class ProgressMeter:
    """Figures over the last steps of this session."""

    def __init__(self, steps: int, work: StepFlops | None) -> None:
        """Nothing seen yet.

        Args:
            steps: of the phase.
            work: FLOPs of a step, None where the hardware's rate is not known.
        """
        self._steps, self._work = steps, work
        self._recent: deque[tuple[dict[str, Any], int]] = deque(maxlen=RECENT_STEPS)
        self._seen = 0
        self._began = 0.0
        self._busy = 0.0

    def add_step(self, line: dict[str, Any], samples: int, now: float) -> ProgressFigures:
        """One more step.

        Args:
            line: as in `metrics.jsonl`.
            samples: that all ranks took in it.
            now: seconds on a clock that only goes forward.
        """
        if self._seen == 1:
            self._recent.clear()  # the first step builds and tunes what the others find ready
        self._recent.append((line, samples))
        self._seen += 1
        if self._seen == 1:
            self._began = now
        else:
            self._busy += line["seconds"]["total"]
        lines = [line for line, _ in self._recent]
        seconds = sum(line["seconds"]["total"] for line in lines)
        return ProgressFigures(
            step=line["step"],
            total_steps=self._steps,
            loss=_mean_of_known(line["loss"] for line in lines),
            losses={
                task: _mean_of_known(line["losses"].get(task) for line in lines)
                for task in line["losses"]
            },
            samples_per_second=sum(samples for _, samples in self._recent) / seconds,
            tokens_per_second=sum(line["tokens"] for line in lines) / seconds,
            mfu=self._work.compute_mfu(sum(line["tokens"] for line in lines), len(lines), seconds)
            if self._work
            else None,
            data_wait_share=sum(line["seconds"]["data"] for line in lines) / seconds,
            peak_memory_bytes=line["memory_bytes"],
            seconds_left=self._estimate_seconds_left(line["step"], seconds / len(lines), now),
        )

    def _estimate_seconds_left(self, step: int, seconds: float, now: float) -> float | None:
        """The rest at the pace of the last steps, and between the steps as much as there was between those so far."""
        others = self._seen - 1
        if not others:
            return None if step < self._steps else 0.0
        between = max(0.0, now - self._began - self._busy) / others
        return (self._steps - step) * (seconds + between)


class ProgressDisplay:
    """A bar with the figures below it where there is a terminal, else a line every 20 s and at the last step."""

    def __init__(self, name: str, steps: int, step: int) -> None:
        """Begin at a step; `name` is that of the phase."""
        self._name = name
        self._told = time.monotonic()
        self._live: Live | None = None
        console = _find_log_console()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), expand=True
            )
            self._task = self._bar.add_task(name, total=steps, completed=step)
            self._live = Live(self._bar, console=console, refresh_per_second=4, transient=False)
            self._live.start()

    def show_progress(self, figures: ProgressFigures) -> None:
        """Show them, or not yet."""
        if self._live is not None:
            self._bar.update(self._task, completed=figures.step)
            self._live.update(Group(self._bar, Text(str(figures))))
        elif (
            figures.step == figures.total_steps
            or time.monotonic() - self._told >= LOG_INTERVAL_SECONDS
        ):
            log.info(
                "%s: step %d of %d, %s", self._name, figures.step, figures.total_steps, figures
            )
            self._told = time.monotonic()

    def close(self) -> None:
        """Leave the last state on the terminal."""
        if self._live is not None:
            self._live.stop()


def _find_log_console() -> Console:
    """The one that the log writes to, so that its lines pass above the bar."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RichHandler):
            return handler.console
    return Console(file=sys.stderr)


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    """Of what is known and finite: one spoilt step must not spoil the next twenty figures."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _format_thousands(value: float) -> str:
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest:02d}" if days or hours else f"{minutes}:{rest:02d}"
    return f"{days} d {clock}" if days else clock
