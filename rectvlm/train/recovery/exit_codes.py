"""How a run ends: the one table of exit codes, and what it leaves to read.

`accelerate launch` ends with 1 whenever a rank ends with a code that is not 0, so the code of the run itself is also in
RUN/phaseN/ending.json, for whoever decides whether to start it again.
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
    """Exit codes of `launch/phaseN.py`; the numbers above 64 are those of sysexits.h."""

    FINISHED = 0
    """The last step is done and saved."""
    FAILED = 1
    """An error that no one foresaw; its traceback is in the log, and starting again would meet it again."""
    USER_ERROR = 2
    """Something that the user can mend, in one sentence."""
    DIVERGED = 65
    """Too many steps in a row had a loss or gradient that is not normal; starting again would repeat them."""
    RANK_LOST = 69
    """A rank hung or went away: start again with `--resume auto`."""
    WRITE_FAILED = 74
    """What had to be written could not be: make room, then start again with `--resume auto`."""
    STOPPED_BY_SIGNAL = 75
    """Stopped by a signal after saving: start again with `--resume auto`."""


class RunEnded(SystemExit):
    """The run ends early, in order; `together` where all ranks raise it."""

    def __init__(self, code: ExitCode, reason: str, on_all_ranks: bool = True) -> None:
        super().__init__(int(code))
        self.exit_code, self.reason, self.on_all_ranks = code, reason, on_all_ranks


def write_ending(folder: Path, code: ExitCode, reason: str, step: int | None) -> None:
    """Leave `ending.json`; nothing when there is no room or no folder.

    A rank that only lost the others writes nothing where one of them has said why it went.
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
        made = folder / f".{ENDING_FILE}.{socket.gethostname()}.{os.getpid()}"
        made.write_text(text)
        made.replace(folder / ENDING_FILE)


def clear_ending(folder: Path) -> None:
    """While a run goes on there is no `ending.json`; none afterwards means that it was killed."""
    (folder / ENDING_FILE).unlink(missing_ok=True)
