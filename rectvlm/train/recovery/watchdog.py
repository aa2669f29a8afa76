"""The watchdog: a rank that hangs ends itself and says where it was.

Ranks wait for each other in every collective: one that is stuck (a dead disk, a stopped process, a
kernel that never returns) blocks all of them for ever. A thread on each rank checks whether a step,
a checkpoint or a case of a validation began within the timeout. If none did, it prints what the
rank was doing and the stacks of all threads, and ends the process; the launcher ends the others.
"""

import faulthandler
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rectvlm.train.recovery.exit_codes import ExitCode, write_ending


@dataclass
class RankActivity:
    """What a rank is doing now."""

    step: int = 0
    """Current optimizer step, counted from 1."""
    operation: str = "start"
    sample_keys: list[str] = field(default_factory=list)
    """Keys of the samples in the current micro-batch."""

    def __str__(self) -> str:
        samples = f", samples {', '.join(self.sample_keys)}" if self.sample_keys else ""
        return f"step {self.step}, {self.operation}{samples}"


class Watchdog:
    """Ends the process when no heartbeat comes within the timeout, while it is open."""

    def __init__(
        self, activity: RankActivity, rank: int, folder: Path, timeout_seconds: float
    ) -> None:
        """Prepare the watchdog; it watches from `__enter__` on.

        Args:
            activity: what the rank is doing, which the message of the end names.
            rank: number of this process.
            folder: the phase's run folder, for `ending.json`.
            timeout_seconds: longest time between two heartbeats.
        """
        self.activity = activity
        self.rank = rank
        self.folder = folder
        self.timeout_seconds = timeout_seconds
        self._last_heartbeat = time.monotonic()
        self._closed = threading.Event()

    def record_heartbeat(self) -> None:
        """Note that a new operation begins."""
        self._last_heartbeat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.record_heartbeat()
        self._thread = threading.Thread(target=self._watch_heartbeat, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch_heartbeat(self) -> None:
        while not self._closed.wait(self._choose_pause_seconds()):
            if self._compute_seconds_left() <= 0:
                self._end_process()
            # For a thread that hangs with the interpreter's lock, so that this one never runs.
            faulthandler.dump_traceback_later(2 * self.timeout_seconds, exit=True)

    def _choose_pause_seconds(self) -> float:
        return max(0.05, min(self.timeout_seconds / 4, self._compute_seconds_left()))

    def _compute_seconds_left(self) -> float:
        return self._last_heartbeat + self.timeout_seconds - time.monotonic()

    def _end_process(self) -> None:
        timeout = f"{self.timeout_seconds:.0f} s"
        reason = f"rank {self.rank} made no progress for {timeout}: {self.activity}"
        sys.stderr.write(
            f"error: {reason}. The stacks of all threads follow; go on with --resume auto.\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        write_ending(self.folder, ExitCode.RANK_LOST, reason, self.activity.step - 1)
        os._exit(ExitCode.RANK_LOST)
