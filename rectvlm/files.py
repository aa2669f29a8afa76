"""Files that must survive a kill, a full disk or a second process: atomic writes, hashes, locks."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from rectvlm.types import UserError

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[Any]]:
    """Open a binary file that appears under its name complete and on disk, or not at all.

    Raises:
        OSError: there is no room, or the disk failed; what was at `path` before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, tree: Any) -> None:
    """Write a tree of plain values as indented JSON, atomically; NaN and infinity are refused.

    Raises:
        OSError: there is no room, or the disk failed.
    """
    text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: of the file.
        remedy: what the user can do when it is missing or damaged, as the end of a sentence.

    Raises:
        UserError: it is missing, cannot be read, is not JSON or holds no object.
    """
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not an object: {remedy}.")
    return tree


def append_json_line(path: Path, tree: Any) -> None:
    """Append a value as one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(tree) + "\n")


def json_sha256(tree: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_file(path: Path) -> None:
    """Flush a file to disk.

    Raises:
        OSError: there is no room, or the disk failed.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: names that were added, renamed or removed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that there is no room on the disk."""
    return error.errno in DISK_FULL_ERRNOS


def exclusive_lock(path: Path, timeout_seconds: float = -1) -> FileLock:
    """Make a lock between processes, for a `with` statement.

    The system drops it when its holder dies.

    Args:
        path: of the lock file, whose folder is made.
        timeout_seconds: how long to wait for it; negative is for ever. `filelock.Timeout` is raised
            after it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=timeout_seconds)
