"""A rank that hangs ends, and says where it was.

Ranks wait for each other in every collective: one that is stuck (a dead disk, a stopped process, a kernel that never
returns) holds up all of them, for good. A thread on each rank looks whether a step, a checkpoint or a case of a
validation began within the timeout. If none did, it prints what the rank was doing and the stacks of all threads, and
ends the process; the launcher then ends the others.
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
    """What a rank does just now."""

    step: int = 0
    """That is under way; 1 is the first."""
    operation: str = "start"
    sample_keys: list[str] = field(default_factory=list)
    """Of the micro-batch at hand."""

    def __str__(self) -> str:
        samples = f", samples {', '.join(self.sample_keys)}" if self.sample_keys else ""
        return f"step {self.step}, {self.operation}{samples}"


class Watchdog:
    """Ends the process when `beat` is not called for longer than the timeout, while it is open."""

    def __init__(
        self, activity: RankActivity, rank: int, folder: Path, timeout_seconds: float
    ) -> None:
        """Watch.

        Args:
            doing: what to say.
            rank: of this process.
            folder: of the phase's run, for `ending.json`.
            timeout: seconds.
        """
        self.activity, self.rank, self.folder, self.timeout_seconds = (
            activity,
            rank,
            folder,
            timeout_seconds,
        )
        self._beat = time.monotonic()
        self._over = threading.Event()

    def record_heartbeat(self) -> None:
        """Something new begins."""
        self._beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.record_heartbeat()
        self._watcher = threading.Thread(target=self._watch_heartbeat, name="watchdog", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._watcher.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch_heartbeat(self) -> None:
        while not self._over.wait(
            max(0.05, min(self.timeout_seconds / 4, self._compute_seconds_left()))
        ):
            if self._compute_seconds_left() <= 0:
                self._end_process()
            # For a thread that hangs and holds the interpreter's lock, so that this one never runs again.
            faulthandler.dump_traceback_later(2 * self.timeout_seconds, exit=True)

    def _compute_seconds_left(self) -> float:
        return self._beat + self.timeout_seconds - time.monotonic()

    def _end_process(self) -> None:
        reason = (
            f"rank {self.rank} did not get on for {self.timeout_seconds:.0f} s: {self.activity}"
        )
        sys.stderr.write(
            f"error: {reason}. The stacks of all threads follow; go on with --resume auto.\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        write_ending(self.folder, ExitCode.RANK_LOST, reason, self.activity.step - 1)
        os._exit(ExitCode.RANK_LOST)
