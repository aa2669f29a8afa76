"""Signals that ask a run to stop: it saves after the current step; a second signal ends it at once.

A scheduler sends SIGTERM or SIGUSR1 before it takes a machine away, and a terminal sends SIGINT for
Ctrl-C. A launcher forwards what it receives, so one Ctrl-C arrives twice within milliseconds: a
repeated signal counts only after `REPEAT_AFTER_SECONDS`.

Python runs a handler when its main thread comes back from C, which may take as long as a collective
or a kernel. So a separate thread reads the numbers of arriving signals from a pipe, to which the
interpreter writes at once.
"""

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

CAUGHT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_AFTER_SECONDS = 2.0
"""Time within which a further signal is taken for the same request, seconds."""
LAUNCHER_NAMES = ("accelerate", "torchrun", "torch.distributed")
"""Words by which a launcher is known in the command line of the parent process."""
LAUNCHER_VARIABLE = "RECTVLM_LAUNCHER"
"""Variable with the process id of `rectvlm train`, in the processes that it starts."""
_PR_SET_PDEATHSIG = 1


class StopSignals:
    """Catches signals while it is open.

    Attributes:
        received_signal: number of the first signal that has arrived; 0 before.
    """

    def __init__(self) -> None:
        self.received_signal = 0
        self._received_at = 0.0
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in CAUGHT_SIGNALS:
            # Without a Python handler the number would not be written to the pipe.
            self._previous_handlers[number] = signal.signal(number, lambda *_: None)
        self._listener = threading.Thread(
            target=self._listen_for_signals, name="signals", daemon=True
        )
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        os.close(self._write_end)
        self._listener.join()
        os.close(self._read_end)

    def _listen_for_signals(self) -> None:
        while numbers := os.read(self._read_end, 64):
            for number in numbers:
                if number in CAUGHT_SIGNALS:
                    self._handle_signal(number)

    def _handle_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self.received_signal:
            self._received_at = time.monotonic()
            self.received_signal = number
            log.warning(
                "%s: saving after this step, then ending; a second signal ends at once", name
            )
        elif time.monotonic() - self._received_at > REPEAT_AFTER_SECONDS:
            log.warning("%s again: ending at once", name)
            os._exit(128 + number)


def terminate_with_launcher() -> None:
    """Receive SIGTERM when the launcher dies, so that no rank goes on without it.

    A launcher that is killed, or has no handler for a scheduler's signal, forwards nothing. Linux
    only. A process that no launcher started is left alone: its parent may be a shell that was
    logged out of.
    """
    with contextlib.suppress(OSError, AttributeError):
        parent = os.getppid()
        if _is_launcher(parent):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died in between
                os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(process: int) -> bool:
    """Whether a process is `rectvlm train`, or its interpreter, options or program name one."""
    if os.environ.get(LAUNCHER_VARIABLE) == str(process):
        return True
    command_line = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    first_words = " ".join(command_line.split("\0")[:4])
    return any(name in first_words for name in LAUNCHER_NAMES)
