"""Locks of folders: second processes, kills, and holders on other machines."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from rectvlm import folder_lock
from rectvlm.folder_lock import FolderLock, LockHolder
from rectvlm.types import UserError

FORK = multiprocessing.get_context("fork")


def make_lock(path: Path, on_lost: Callable[[str], None] = print) -> FolderLock:
    return FolderLock(path, "The folder is in use", "wait for its end", on_lost)


def hold_until_killed(path: Path) -> None:
    with make_lock(path):
        (path.parent / f"held-{os.getpid()}").touch()
        time.sleep(60)


def start_holder(path: Path) -> BaseProcess:
    process = FORK.Process(target=hold_until_killed, args=(path,))
    process.start()
    deadline = time.monotonic() + 10
    while not (path.parent / f"held-{process.pid}").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rules in tenths of seconds."""
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(folder_lock, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 1.0)


def write_foreign_holder(path: Path, age_seconds: float) -> None:
    """What a process of another machine leaves in a lock file."""
    fields = {
        "host": "node7",
        "node": "another boot",
        "pid": os.getpid(),
        "process_start": 0.0,
        "user": "anna",
        "since": "2026-11-28 10:00:00 UTC",
        "token": "ab",
    }
    path.write_text(json.dumps(fields))
    then = time.time() - age_seconds
    os.utime(path, (then, then))


def test_a_second_process_learns_who_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "runs" / ".phase1.lock"
    path.parent.mkdir()
    holder = start_holder(path)
    try:
        with pytest.raises(UserError) as refusal, make_lock(path):
            pass
        names = LockHolder.of_this_process()
        assert str(refusal.value).startswith(
            f"The folder is in use by process {holder.pid} of {names.user} on {names.host} since 2"
        )
        assert str(refusal.value).endswith(" UTC: wait for its end.")
        os.kill(holder.pid or 0, signal.SIGSTOP)  # a process that stands still lives
        time.sleep(1.2)
        with pytest.raises(UserError, match=f"process {holder.pid} of"), make_lock(path):
            pass
    finally:
        holder.kill()
        holder.join()
    with make_lock(path):  # a kill leaves no lock behind
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert path.read_bytes() == b""


def test_of_many_processes_one_gets_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def try_to_hold() -> None:
        with suppress(UserError), make_lock(path):
            (tmp_path / f"held-{os.getpid()}").touch()
            time.sleep(1.5)

    processes = [FORK.Process(target=try_to_hold) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("held-*"))) == 1


def test_a_holder_on_another_machine_counts_while_its_heart_beats(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    write_foreign_holder(path, age_seconds=0)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(
            UserError, match=r"in use by process \d+ of anna on node7 since 2026-11-28 10:00:00 UTC"
        ):
            make_lock(path).acquire()
    finally:
        stop.set()
        thread.join()
    assert "node7" in path.read_text()


@pytest.mark.parametrize("age_seconds", [0.0, 3600.0])
def test_a_stale_lock_of_another_machine_is_taken(
    age_seconds: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    write_foreign_holder(path, age_seconds)
    with make_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "anna on node7" in caplog.text and "its lock is void" in caplog.text
    assert ("waiting up to 1 s" in caplog.text) == (age_seconds == 0)


def test_a_damaged_lock_file_holds_nobody_off(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text('{"host": "no')
    with make_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_without_locks_of_the_system_the_file_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that answers ENOLCK: the errors of the system's own calls come from here."""

    def no_flock(file: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", no_flock)
    path = tmp_path / "lock"
    holder = start_holder(path)
    try:
        with pytest.raises(UserError, match=f"process {holder.pid} of"):
            make_lock(path).acquire()
    finally:
        holder.kill()
        holder.join()
    with make_lock(path):  # its process is gone, so nobody waits for a heartbeat
        pass


def test_who_lost_the_lock_to_another_machine_is_told(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    reasons: list[str] = []
    with make_lock(path, reasons.append):
        write_foreign_holder(path, 0)
        deadline = time.monotonic() + 5
        while not reasons and time.monotonic() < deadline:
            time.sleep(0.02)
    assert len(reasons) == 1 and "was taken by process" in reasons[0] and "node7" in reasons[0]
    assert "node7" in path.read_text()  # released without touching the new holder's name
