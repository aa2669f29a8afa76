"""How a run ends: the table of exit codes, and `ending.json` in the run's folder.

`accelerate launch` ends with 1 whenever a rank ends with a code other than 0. So the run's own code
is also in RUN/phaseN/ending.json, for whoever decides whether to start it again.
"""

import contextlib
import json
import os
import socket
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path

from rectvlm.runs.run_files import ENDING_FILE


class ExitCode(IntEnum):
    """Exit codes of `launch/phaseN.py`; numbers above 64 follow sysexits.h."""

    FINISHED = 0
    """The last step is done and saved."""
    FAILED = 1
    """An unexpected error, whose traceback is in the log; a new start would meet it again."""
    USER_ERROR = 2
    """A mistake that the user can mend, explained in one sentence."""
    DIVERGED = 65
    """Too many bad steps in a row; a new start would repeat them."""
    RANK_LOST = 69
    """A rank hung or went away; start again with `--resume auto`."""
    WRITE_FAILED = 74
    """A file could not be written; make room, then start again with `--resume auto`."""
    STOPPED_BY_SIGNAL = 75
    """Stopped by a signal after saving; start again with `--resume auto`."""


class RunEnded(SystemExit):
    """The run ends early and in order.

    Attributes:
        exit_code: the run's exit code.
        reason: why it ends, as a sentence without a full stop.
        on_all_ranks: whether all ranks raise this error at the same place.
    """

    def __init__(self, code: ExitCode, reason: str, on_all_ranks: bool = True) -> None:
        super().__init__(int(code))
        self.exit_code, self.reason, self.on_all_ranks = code, reason, on_all_ranks


def write_ending(folder: Path, code: ExitCode, reason: str, step: int | None) -> None:
    """Write `ending.json`, or nothing when the disk is full or the folder is missing.

    A rank that only lost the others does not overwrite the reason that one of them has left.
    """
    ending = {
        "code": int(code),
        "reason": reason,
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(ending) + "\n"
    with contextlib.suppress(OSError):
        if code == ExitCode.RANK_LOST:
            with (folder / ENDING_FILE).open("x") as file:
                file.write(text)
            return
        # The name is unique over machines, since several ranks may write on a shared disk.
        temporary = folder / f".{ENDING_FILE}.{socket.gethostname()}.{os.getpid()}"
        temporary.write_text(text)
        temporary.replace(folder / ENDING_FILE)


def clear_ending(folder: Path) -> None:
    """Remove `ending.json` when a run goes on; a run that leaves none behind was killed."""
    (folder / ENDING_FILE).unlink(missing_ok=True)
