"""Time from the start of a process to the end of its first optimizer step, by part."""

import time

import psutil


class StartupClock:
    """Adds up the seconds of a start by part, beginning with the start of the process."""

    def __init__(self) -> None:
        """Begin at the start of this process, however long ago that was."""
        self.seconds_by_part: dict[str, float] = {}
        self._last_end = psutil.Process().create_time()

    def end_part(self, name: str) -> None:
        """Add the time since the last part ended to a part."""
        now = time.time()
        # A clock that was set back in between adds nothing.
        seconds = max(0.0, now - self._last_end)
        self.seconds_by_part[name] = self.seconds_by_part.get(name, 0.0) + seconds
        self._last_end = now

    def end_first_step(self, data_seconds: float) -> None:
        """End the first step, whose wait for its samples counts as data.

        Args:
            data_seconds: time that the step waited for its samples, seconds.
        """
        self.end_part("first step")
        data_seconds = min(data_seconds, self.seconds_by_part["first step"])
        self.seconds_by_part["first step"] -= data_seconds
        self.seconds_by_part["data"] = self.seconds_by_part.get("data", 0.0) + data_seconds

    @property
    def total_seconds(self) -> float:
        """Seconds of all parts so far."""
        return sum(self.seconds_by_part.values())

    def __str__(self) -> str:
        parts = [f"{name} {seconds:.1f}" for name, seconds in self.seconds_by_part.items()]
        return f"{self.total_seconds:.1f} s ({', '.join(parts)})"
