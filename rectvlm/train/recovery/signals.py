"""Signals that ask a run to end: it saves after the step at hand; a second one ends it at once.

A scheduler sends SIGTERM or SIGUSR1 before it takes a machine away, a terminal sends SIGINT for Ctrl-C, and a launcher
forwards what it receives, so one Ctrl-C arrives twice within milliseconds: a repeat counts only after `ECHO` seconds.

Python runs a handler when its main thread comes back from C, which may take as long as a collective or a kernel. So a
thread of its own reads the numbers of arriving signals from a pipe that the interpreter writes at once.
"""

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

CAUGHT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_AFTER_SECONDS = 2.0
"""Seconds in which a further signal is the same request."""
_PR_SET_PDEATHSIG = 1


class StopSignals:
    """Catches signals while it is open; `received` is the number of the first one, 0 before."""

    def __init__(self) -> None:
        self.received_signal = 0
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in CAUGHT_SIGNALS:
            # Without a handler of Python's the number would not be written to the pipe.
            self._before[number] = signal.signal(number, lambda *_: None)
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
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)
        self._listener.join()
        os.close(self._read)

    def _listen_for_signals(self) -> None:
        while numbers := os.read(self._read, 64):
            for number in numbers:
                if number in CAUGHT_SIGNALS:
                    self._handle_signal(number)

    def _handle_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self.received_signal:
            self._since = time.monotonic()
            self.received_signal = number
            log.warning(
                "%s: saving after this step, then ending; a second signal ends at once", name
            )
        elif time.monotonic() - self._since > REPEAT_AFTER_SECONDS:
            log.warning("%s again: ending at once", name)
            os._exit(128 + number)


def terminate_with_launcher() -> None:
    """Receive SIGTERM when the launcher dies, so that no rank goes on alone and without being asked.

    A launcher that is killed, or that has no handler for a scheduler's signal, passes nothing on. Linux only; a process
    that was not started by a launcher is left alone, since its parent may be a shell that was logged out of.
    """
    with contextlib.suppress(OSError, AttributeError):
        parent = os.getppid()
        if any(
            name in word
            for word in _read_command_line(parent)
            for name in ("accelerate", "torchrun", "torch.distributed")
        ):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died in between
                os.kill(os.getpid(), signal.SIGTERM)


def _read_command_line(process: int) -> Iterator[str]:
    """The first words of a process's command line: interpreter, options, program."""
    words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    yield from words[:4]
