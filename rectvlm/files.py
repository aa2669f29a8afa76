"""Files that must survive a kill, a full disk or a second process: atomic writes, hashes, locks."""

import errno
import hashlib
import json
import os
import re
import tempfile
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
    except OSError as error:
        if error.filename is None:  # a full disk says nothing of the file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, tree: Any) -> None:
    """Write a tree of plain values as indented JSON, atomically; NaN and infinity are refused.

    Raises:
        OSError: there is no room, or the disk failed.
    """
    text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(encode_json_text(text))


def encode_json_text(text: str) -> bytes:
    r"""Encode JSON as UTF-8; a byte of a file's name that is no UTF-8 becomes an escape.

    Python reads `"\udce9"` back as the name under which it opens the file.
    """
    return text.encode("utf-8", "backslashreplace")


def printable_text(text: object) -> str:
    r"""Text or a path with every byte that is no UTF-8 written as `\xe9`.

    File names are bytes, and Python's strings keep those that cannot be decoded as surrogates,
    which no UTF-8 file, page or terminal takes.
    """
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def remove_control_characters(text: str) -> str:
    """Text without characters that HTML, DICOM and FHIR refuse; an untrained model writes some.

    Any other space than a line's end becomes a plain one: "No\u00a0effusion" stays two words.
    """
    plain = "".join(" " if letter.isspace() and letter != "\n" else letter for letter in text)
    return "".join(letter for letter in plain if letter.isprintable() or letter == "\n")


def printable_line(text: object) -> str:
    r"""`printable_text` on one line: control characters of a file's name become `\x0a`.

    They would break a log's line, or give orders to the terminal.
    """
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", printable_text(text)
    )


def require_writable_folder(folder: Path) -> None:
    """Make a folder, and write a nameless file in it: a long command asks before its work.

    Raises:
        UserError: the folder cannot be made or written to, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file without a name leaves nothing behind when the process is killed.
        with tempfile.TemporaryFile(dir=folder, prefix=".rectvlm-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(explain_write_error(folder, error)) from None


def require_writable_file(path: Path) -> None:
    """Ask before the work of a command whether it will be able to write a file.

    Raises:
        UserError: the file is a folder, its folder cannot be made or written to, or the disk is
            full.
    """
    if path.is_dir():
        raise UserError(f"{path} cannot be written: expected a file, found a folder; name a file.")
    require_writable_folder(path.parent)


def explain_write_error(path: Path, error: OSError) -> str:
    """One sentence about an output that cannot be written, and what to do."""
    reason = error.strerror or str(error)
    blocker = next((parent for parent in (path, *path.parents) if os.path.lexists(parent)), None)
    if blocker is not None and not blocker.is_dir():
        reason, remedy = f"{blocker} is no folder", "move it away, or name another place"
    elif is_disk_full(error):
        remedy = "make room there, or name another place"
    else:
        remedy = "check the place and your access to it, or name another"
    return f"{path} cannot be written to ({reason}): {remedy}."


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


def explain_os_error(error: OSError) -> str:
    """One sentence about a system's answer that no part of a command has explained."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return f"The system answered: {reason}; check the disk and your access to it."
    path = Path(os.fsdecode(error.filename))
    if is_disk_full(error) or error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EROFS):
        return explain_write_error(path, error)
    return f"{path} cannot be used ({reason}): check the path and your access to it."


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
