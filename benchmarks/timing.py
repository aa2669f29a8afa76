"""Times of work on a device, and processes of their own for it."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

ResultT = TypeVar("ResultT")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronized_time(device: torch.device) -> float:
    """Return the time in seconds when the device has done its work."""
    synchronize(device)
    return time.perf_counter()


class SectionTimer:
    """Seconds of the sections of a step, step by step."""

    def __init__(self, sections: Sequence[str], device: torch.device) -> None:
        """Start with no step timed."""
        self.seconds: dict[str, list[float]] = {section: [] for section in sections}
        self._device = device
        self._last_time = 0.0

    def start_step(self) -> None:
        """Start the first section of a step."""
        self._last_time = synchronized_time(self._device)

    def end_section(self, section: str) -> None:
        """End a section; the next one starts."""
        now = synchronized_time(self._device)
        self.seconds[section].append(now - self._last_time)
        self._last_time = now

    def drop_steps(self) -> None:
        """Forget the steps so far, which warmed up."""
        for seconds in self.seconds.values():
            seconds.clear()

    @property
    def step_seconds(self) -> float:
        """Sum of the sections' median seconds."""
        return sum(statistics.median(seconds) for seconds in self.seconds.values())


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_in_new_process(task: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """Run a task in a process of its own and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(task, *arguments).result()
