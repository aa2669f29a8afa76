"""Making files whole: bytes arrive in a part file that outlives a kill, are checked, and then get their name.

A file may be a copy of one at the source, or be put together from pieces of several, after a head of its own.
"""

import hashlib
import io
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rectvlm.pretrained.sources import Source, disk_error
from rectvlm.types import UserError

log = logging.getLogger(__name__)

WORK = ".pull"
"""Folder of part files, beside what they become; gone when all is whole."""
STREAMS = 4
"""Files that arrive at once."""


@dataclass(frozen=True)
class Piece:
    """Bytes `begin` to before `end` of a file at the source."""

    path: str
    begin: int
    end: int
    size: int
    """Of the whole file."""


@dataclass(frozen=True)
class Job:
    """One file to make."""

    target: Path
    pieces: tuple[Piece, ...]
    check: Callable[[Path], str | None]
    """What is wrong with a finished file, or None."""
    key: str
    """What the part file is called: another version of the content has another key."""
    head: bytes = b""

    @property
    def name(self) -> str:
        """For messages: the file at the source, or the one that is put together."""
        return self.pieces[0].path if len(self.pieces) == 1 and not self.head else self.target.name

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return len(self.head) + sum(piece.end - piece.begin for piece in self.pieces)


class _Stopped(Exception):
    pass


class _PartFile(io.BufferedWriter):
    """A file that is appended to until someone says stop: a transfer of gigabytes must not outlive Ctrl-C."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._stop = stop

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise _Stopped
        return super().write(data)


def run(jobs: Sequence[Job], source: Source, folder: Path) -> list[Path]:
    """Make all files; those that are there and right are kept.

    Args:
        jobs: with targets below `folder`.
        source: of the pieces.
        folder: gets the part files, in `WORK`.

    Returns:
        The files that were made anew.

    Raises:
        UserError: the disk is too small, another pull works here, or a file is not what it should be.
    """
    work = folder / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock", timeout=0):
            wanted = [job for job in jobs if not _is_there(job)]
            _check_room(wanted, folder, work)
            _all(wanted, source, work)
        shutil.rmtree(work)
    except Timeout:
        raise UserError(f"Another pull is at work in {folder}: wait for it, or stop it.") from None
    except OSError as error:
        raise disk_error(error, str(folder)) from error
    return [job.target for job in wanted]


def small(job: Job, source: Source) -> bytes:
    """The bytes of a small file, checked like any other.

    Raises:
        UserError: it is not what it should be.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / job.target.name
        _fill(job, source, path, threading.Event())
        if fault := job.check(path):
            raise UserError(f"{job.name} from {source.name} is not what it should be: {fault}.")
        return path.read_bytes()


def _is_there(job: Job) -> bool:
    if not job.target.is_file():
        return False
    fault = (
        job.check(job.target) if job.target.stat().st_size == job.size else "it has another size"
    )
    if fault:
        log.info("%s is fetched again: %s", job.target, fault)
    return fault is None


def _check_room(jobs: Sequence[Job], folder: Path, work: Path) -> None:
    missing = sum(job.size - min(job.size, _length(_part(job, work))) for job in jobs)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"The disk is too small: {missing / 1e9:.1f} GB are to come, {free / 1e9:.1f} GB are free in {folder}; "
            "make room, or choose another folder with --out."
        )


def _all(jobs: Sequence[Job], source: Source, work: Path) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(STREAMS, thread_name_prefix="pull") as pool:
        tasks = [pool.submit(_make, job, source, work, stop) for job in jobs]
        try:
            for task in as_completed(tasks):
                task.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _make(job: Job, source: Source, work: Path, stop: threading.Event) -> None:
    part = _part(job, work)
    begun = _length(part)
    if begun:
        log.info("going on with %s at %.1f of %.1f MB", job.name, begun / 1e6, job.size / 1e6)
    else:
        log.log(
            logging.INFO if job.size > 1e6 else logging.DEBUG,
            "%s, %.1f MB",
            job.name,
            job.size / 1e6,
        )
    _fill(job, source, part, stop)
    fault = job.check(part)
    if fault and begun:
        log.info("%s is fetched again from its start: %s", job.name, fault)
        part.unlink()
        _fill(job, source, part, stop)
        fault = job.check(part)
    if fault:
        part.unlink()
        raise UserError(
            f"{job.name} from {source.name} is not what it should be: {fault}; nothing was kept of it."
        )
    _flush(part)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(job.target)
    _flush(job.target.parent)


def _fill(job: Job, source: Source, part: Path, stop: threading.Event) -> None:
    """Append what is missing; the length of the part file says how far it is."""
    if _length(part) > job.size or (job.head and _length(part) < len(job.head)):
        part.unlink(missing_ok=True)
    with _PartFile(part, stop) as file:
        if job.head and file.tell() == 0:
            file.write(job.head)
        start = len(job.head)
        for piece in job.pieces:
            length = piece.end - piece.begin
            done = min(max(file.tell() - start, 0), length)
            if done < length:
                source.read(piece.path, piece.begin, piece.end, done, piece.size, file)
            start += length


def _part(job: Job, work: Path) -> Path:
    # Two files of one content have one key, so the target's name belongs to the part file's.
    return work / hashlib.sha256(f"{job.target}\n{job.key}".encode()).hexdigest()[:24]


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
