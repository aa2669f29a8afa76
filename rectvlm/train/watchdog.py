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

from rectvlm.train.exits import Exit, write_ending


@dataclass
class Doing:
    """What a rank does just now."""

    step: int = 0
    """That is under way; 1 is the first."""
    part: str = "start"
    samples: list[str] = field(default_factory=list)
    """Of the micro-batch at hand."""

    def __str__(self) -> str:
        samples = f", samples {', '.join(self.samples)}" if self.samples else ""
        return f"step {self.step}, {self.part}{samples}"


class Watchdog:
    """Ends the process when `beat` is not called for longer than the timeout, while it is open."""

    def __init__(self, doing: Doing, rank: int, folder: Path, timeout: float) -> None:
        """Watch.

        Args:
            doing: what to say.
            rank: of this process.
            folder: of the phase's run, for `ending.json`.
            timeout: seconds.
        """
        self.doing, self.rank, self.folder, self.timeout = doing, rank, folder, timeout
        self._beat = time.monotonic()
        self._over = threading.Event()

    def beat(self) -> None:
        """Something new begins."""
        self._beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watcher.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._over.wait(max(0.05, min(self.timeout / 4, self._left()))):
            if self._left() <= 0:
                self._bark()
            # For a thread that hangs and holds the interpreter's lock, so that this one never runs again.
            faulthandler.dump_traceback_later(2 * self.timeout, exit=True)

    def _left(self) -> float:
        return self._beat + self.timeout - time.monotonic()

    def _bark(self) -> None:
        reason = f"rank {self.rank} did not get on for {self.timeout:.0f} s: {self.doing}"
        sys.stderr.write(f"error: {reason}. The stacks of all threads follow; go on with --resume auto.\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        write_ending(self.folder, Exit.LOST, reason, self.doing.step - 1)
        os._exit(Exit.LOST)
