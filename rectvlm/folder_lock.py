"""A lock on a folder that one process at a time may write to, on one machine or several.

The lock is a file. Two things say that it is held:

- The system's lock on it (flock), which ends with its process, whatever ends that. Many network
  file systems share it between machines; some keep it on one machine, and some have none.
- What the file says: host, process and user, with the file's time as a heartbeat. A holder on this
  machine counts while its process lives, one on another machine until its heartbeat stops.

The file stays when the lock is released, empty: a file that came and went could be locked twice.
"""

import errno
import fcntl
import getpass
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import psutil
from pydantic import TypeAdapter, ValidationError

from rectvlm.types import UserError

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
"""Time between two heartbeats, seconds."""
STALE_SECONDS = 60.0
"""Time without a heartbeat after which a holder on another machine counts as dead, seconds."""
PATIENCE_SECONDS = 3.0
"""Time that processes of a run that was killed may still hold its lock, seconds."""
SETTLE_SECONDS = 2.0
"""Time until a file is read back where the file system has no locks, seconds."""
_POLL_SECONDS = 0.2
_NO_FLOCK_ERRNOS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_PROCESS_START_TOLERANCE_SECONDS = 5.0


@dataclass(frozen=True)
class LockHolder:
    """Who holds a lock; its fields are keys of the lock file."""

    host: str
    """Name of the machine."""
    node: str
    """Id of the machine since it was started, and of its process numbers."""
    pid: int
    """Number of the process."""
    process_start: float
    """Time at which the process started, seconds since 1970."""
    user: str
    """Name of the user."""
    since: str
    """Time at which the lock was taken, UTC."""
    token: str
    """Random name of this holding of the lock."""

    @classmethod
    def of_this_process(cls) -> "LockHolder":
        """Describe this process as a holder."""
        return cls(
            host=socket.gethostname(),
            node=_read_node_id(),
            pid=os.getpid(),
            process_start=psutil.Process().create_time(),
            user=_read_user_name(),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            token=secrets.token_hex(8),
        )

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host} since {self.since}"

    @property
    def is_local(self) -> bool:
        """Whether the holder's process number means a process of this machine."""
        return (self.host, self.node) == (socket.gethostname(), _read_node_id())


_HOLDER_ADAPTER = TypeAdapter(LockHolder)


def is_process_running(pid: int, start: float) -> bool:
    """Whether a process of this machine still runs: numbers are given out again, times are not."""
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - start) < _PROCESS_START_TOLERANCE_SECONDS
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError):
        return False


def _read_node_id() -> str:
    """Id that differs between machines, starts of a machine, and containers with own processes."""
    with suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _read_user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        return f"user {os.getuid()}"


class FolderLock:
    """Keeps other processes off a folder while it is open, as a `with` statement does."""

    def __init__(
        self,
        path: Path,
        in_use: str,
        remedy: str,
        on_lost: Callable[[str], None] = log.error,
    ) -> None:
        """Name the lock; nothing is locked yet.

        Args:
            path: of the lock file, whose folder is made.
            in_use: what is refused while another process holds it, as the start of a sentence.
            remedy: what the user can do about that, as the end of a sentence.
            on_lost: called with a sentence, by another thread, when another process took the lock
                because no heartbeat reached it.
        """
        self.path, self.in_use, self.remedy, self.on_lost = path, in_use, remedy, on_lost
        self._file = -1
        self._has_flock = True

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another process holds it.
            OSError: the lock file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take_flock()
            self._wait_until_stale(self._read_holder())
            self._write_holder()
        except BaseException:
            os.close(self._file)
            raise
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="folder lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back."""
        self._closed.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_ours():
                os.ftruncate(self._file, 0)
        os.close(self._file)

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _take_flock(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise self._in_use_error(self._read_holder()) from None
            except OSError as error:
                if error.errno not in _NO_FLOCK_ERRNOS:
                    raise
                self._has_flock = False
                return
            time.sleep(_POLL_SECONDS)

    def _in_use_error(self, holder: LockHolder | None) -> UserError:
        who = "another process" if holder is None else str(holder)
        return UserError(f"{self.in_use} by {who}: {self.remedy}.")

    def _read_holder(self) -> LockHolder | None:
        """Who the file names; None for no one."""
        # Opened anew: a network file system then asks its server.
        with suppress(OSError, ValidationError):
            return _HOLDER_ADAPTER.validate_json(self.path.read_bytes())
        return None

    def _wait_until_stale(self, holder: LockHolder | None) -> None:
        """Return when a holder that the system's lock does not know of is dead.

        Raises:
            UserError: it lives.
        """
        if holder is None or (holder.is_local and not self._is_alive_here(holder)):
            return
        if holder.is_local:
            raise self._in_use_error(holder)
        heartbeat, age = self._read_heartbeat()
        if age < STALE_SECONDS:
            log.warning(
                "%s by %s, whose heartbeat is %.0f s old: waiting up to %.0f s for the next one",
                self.in_use,
                holder,
                max(0.0, age),
                STALE_SECONDS - age,
            )
        deadline = time.monotonic() + STALE_SECONDS - age
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            if self._read_heartbeat()[0] != heartbeat:
                if self._read_holder() is None:
                    return  # released meanwhile
                raise self._in_use_error(holder)
        log.warning("%s has sent no heartbeat for %.0f s: its lock is void", holder, STALE_SECONDS)

    def _is_alive_here(self, holder: LockHolder) -> bool:
        return holder.pid != os.getpid() and is_process_running(holder.pid, holder.process_start)

    def _read_heartbeat(self) -> tuple[int, float]:
        """Time of the last heartbeat in ns, and its age in s, both by the file system's clock."""
        heartbeat = self.path.stat().st_mtime_ns
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".lock-") as probe:
            probe.write(b".")
            probe.flush()
            now = os.fstat(probe.fileno()).st_mtime_ns
        return heartbeat, max(0.0, (now - heartbeat) / 1e9)

    def _write_holder(self) -> None:
        """Name this process in the file.

        Raises:
            UserError: the system has no locks, and another process named itself at the same time.
        """
        holder = LockHolder.of_this_process()
        self._token = holder.token
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, _HOLDER_ADAPTER.dump_json(holder) + b"\n", 0)
        os.fsync(self._file)
        if self._has_flock:
            return
        time.sleep(SETTLE_SECONDS)
        if not self._is_ours():
            raise self._in_use_error(self._read_holder())

    def _is_ours(self) -> bool:
        holder = self._read_holder()
        return holder is not None and holder.token == self._token

    def _renew(self) -> None:
        """Send heartbeats until the lock is released, or another process has taken it."""
        while not self._closed.wait(HEARTBEAT_SECONDS):
            holder = self._read_holder()
            if holder is not None and holder.token != self._token:
                self.on_lost(
                    f"{self.path} was taken by {holder}, since no heartbeat of process "
                    f"{os.getpid()} reached it for {STALE_SECONDS:.0f} s"
                )
                return
            with suppress(OSError):
                os.utime(self._file)
