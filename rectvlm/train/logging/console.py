"""Progress of a run on the console: figures of the last steps, below a bar or as lines."""

import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from rectvlm.finite import mean_of_finite, mean_total_loss
from rectvlm.train.logging.mfu import StepFlops
from rectvlm.train.step_result import StepResult

log = logging.getLogger(__name__)

RECENT_STEPS = 20
"""Number of steps over which figures are taken."""
LOG_INTERVAL_SECONDS = 20.0
"""Time between two lines where there is no terminal for a bar, seconds."""


@dataclass(frozen=True)
class ProgressFigures:
    """Where a run stands; losses and rates are means over the last steps."""

    step: int
    """Number of optimizer steps done."""
    total_steps: int
    """Number of the phase's last step."""
    loss: float | None
    losses: Mapping[str, float | None]
    """Loss of each task; None where it is not known."""
    samples_per_second: float
    """Samples that all ranks together take in a second."""
    tokens_per_second: float
    """Patches and language positions that all ranks together take in a second."""
    mfu: float | None
    """Share of the devices' peak FLOP rate that the model uses; None where it is not known."""
    data_wait_share: float
    """Share of the time in which rank 0 waits for data."""
    peak_memory_bytes: float
    """Largest memory that a rank has held, bytes."""
    seconds_left: float | None
    """Time until the last step, including checkpoints and validation as so far, seconds."""

    def __str__(self) -> str:
        tasks = " ".join(f"{task} {_format_number(value)}" for task, value in self.losses.items())
        mfu = "–" if self.mfu is None else f"{self.mfu:.1%}"
        return (
            f"loss {_format_number(self.loss)} ({tasks}), {self.samples_per_second:.3g} samples/s, "
            f"{_format_thousands(self.tokens_per_second)} tokens/s, MFU {mfu}, data wait "
            f"{self.data_wait_share:.0%}, memory {self.peak_memory_bytes / 1e9:.3g} GB, "
            f"{_format_duration(self.seconds_left)} left"
        )


class ProgressMeter:
    """Computes figures over the last steps of this session."""

    def __init__(
        self,
        total_steps: int,
        step_flops: StepFlops | None,
        loss_weights: Mapping[str, float],
    ) -> None:
        """Begin with no steps.

        Args:
            total_steps: number of the phase's last step.
            step_flops: FLOPs of a step; None where the device's peak rate is not known.
            loss_weights: weight of each task's loss in the total.
        """
        self._total_steps, self._step_flops = total_steps, step_flops
        self._loss_weights = loss_weights
        self._recent: deque[tuple[StepResult, int]] = deque(maxlen=RECENT_STEPS)
        self._step_count = 0
        self._first_end = 0.0
        self._step_seconds = 0.0

    def add_step(self, result: StepResult, sample_count: int, now: float) -> ProgressFigures:
        """Add a step and return the figures.

        Args:
            result: the step's result.
            sample_count: number of samples that all ranks took in the step.
            now: time on a monotonic clock, seconds.
        """
        if self._step_count == 1:
            self._recent.clear()  # the first step builds and tunes what the others find ready
        self._recent.append((result, sample_count))
        self._step_count += 1
        if self._step_count == 1:
            self._first_end = now
        else:
            self._step_seconds += result.total_seconds

        results = [recent for recent, _ in self._recent]
        seconds = sum(recent.total_seconds for recent in results)
        samples = sum(count for _, count in self._recent)
        tokens = sum(recent.token_count for recent in results)
        data_seconds = sum(recent.seconds_by_operation["data"] for recent in results)
        losses = {}
        for task in result.losses_by_task:
            losses[task] = mean_of_finite(recent.losses_by_task.get(task) for recent in results)
        mfu = None
        if self._step_flops is not None:
            mfu = self._step_flops.compute_mfu(tokens, len(results), seconds)
        return ProgressFigures(
            step=result.step,
            total_steps=self._total_steps,
            loss=mean_total_loss(
                [recent.loss for recent in results],
                [recent.losses_by_task for recent in results],
                self._loss_weights,
            ),
            losses=losses,
            samples_per_second=samples / seconds,
            tokens_per_second=tokens / seconds,
            mfu=mfu,
            data_wait_share=data_seconds / seconds,
            peak_memory_bytes=result.peak_memory_bytes,
            seconds_left=self._estimate_seconds_left(result.step, seconds / len(results), now),
        )

    def _estimate_seconds_left(self, step: int, step_seconds: float, now: float) -> float | None:
        """Time of the remaining steps, with as much time between them as there was so far."""
        later_steps = self._step_count - 1
        if not later_steps:
            return None if step < self._total_steps else 0.0
        pause_seconds = max(0.0, now - self._first_end - self._step_seconds) / later_steps
        return (self._total_steps - step) * (step_seconds + pause_seconds)


class ProgressDisplay:
    """A bar above the figures on a terminal, else a line every 20 s and at the last step."""

    def __init__(self, name: str, total_steps: int, step: int) -> None:
        """Begin at a step; `name` is the phase's."""
        self._name = name
        self._last_line = time.monotonic()
        self._live: Live | None = None
        console = _find_log_console()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), expand=True
            )
            self._task = self._bar.add_task(name, total=total_steps, completed=step)
            self._live = Live(self._bar, console=console, refresh_per_second=4, transient=False)
            self._live.start()

    def show_progress(self, figures: ProgressFigures) -> None:
        """Update the bar, or log a line when one is due."""
        if self._live is not None:
            self._bar.update(self._task, completed=figures.step)
            self._live.update(Group(self._bar, Text(str(figures))))
            return
        is_last = figures.step == figures.total_steps
        if is_last or time.monotonic() - self._last_line >= LOG_INTERVAL_SECONDS:
            log.info(
                "%s: step %d of %d, %s", self._name, figures.step, figures.total_steps, figures
            )
            self._last_line = time.monotonic()

    def close(self) -> None:
        """Leave the last state on the terminal."""
        if self._live is not None:
            self._live.stop()


def _find_log_console() -> Console:
    """The console that the log writes to, so that its lines pass above the bar."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RichHandler):
            return handler.console
    return Console(file=sys.stderr)


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _format_thousands(value: float) -> str:
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{minutes}:{seconds:02d}"
    if days or hours:
        clock = f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{days} d {clock}" if days else clock
