"""Whether a checkpoint is what was written: sizes and SHA-256 of its files, in its `manifest.json`.

Files that come later, such as fitted thresholds, have no entry and are not looked at.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from rectvlm.types import UserError
from rectvlm.weights import manifest
from rectvlm.weights.manifest import FileEntry

log = logging.getLogger(__name__)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def settle(path: Path) -> FileEntry:
    """Have a file on the disk, not only in the system's memory; its size and checksum.

    Raises:
        OSError: there is no room, or the disk failed.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(path.stat().st_size, manifest.digest(path))


def seal(work: Path, files: Mapping[str, FileEntry], target: Path) -> None:
    """Give a folder whose files are settled its manifest and its name, which no other has yet.

    Raises:
        OSError: there is no room, the disk failed, or the name is taken: a whole checkpoint is never written over.
    """
    manifest.write(work, manifest.Manifest(dict(sorted(files.items()))))
    settle(work / manifest.FILE)
    for folder in [path for path in work.rglob("*") if path.is_dir()] + [work]:
        _settle_folder(folder)
    work.rename(target)
    _settle_folder(target.parent)


def _settle_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_sealed(folder: Path) -> bool:
    """Whether a checkpoint has a manifest; those of earlier versions have none."""
    return (folder / manifest.FILE).is_file()


def names(folder: Path) -> list[str]:
    """The files that a checkpoint should have, largest first, so that shares of them are alike.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    try:
        files = manifest.parse((folder / manifest.FILE).read_bytes(), manifest.FILE).files
    except FileNotFoundError:
        raise UserError(f"{manifest.FILE} is missing") from None
    except OSError as error:
        raise UserError(f"{manifest.FILE} cannot be read ({error})") from error
    return sorted(files, key=lambda name: (-files[name].size, name))


def faults(folder: Path, some: Iterable[str]) -> list[str]:
    """What is wrong with some files of a checkpoint, in words."""
    files = manifest.parse((folder / manifest.FILE).read_bytes(), manifest.FILE).files
    return [fault for name in some if (fault := _fault(folder / name, name, files[name]))]


def _fault(path: Path, name: str, entry: FileEntry) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{name} has {size} of {entry.size} bytes"
        return (
            f"{name} has another checksum than when it was written" if manifest.digest(path) != entry.sha256 else None
        )
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error})"


def remove(folder: Path) -> None:
    """Delete a checkpoint, which is none any more from the first moment: a kill leaves no half one.

    Raises:
        OSError: the disk failed, or another process holds its files (NFS).
    """
    gone = unfinished(folder)
    folder.rename(gone)
    shutil.rmtree(gone)


def unfinished(folder: Path) -> Path:
    """The name of a checkpoint while it is written or deleted."""
    return folder.with_name(f".{folder.name}.partial")


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one and nothing deletes it; its new place."""
    number, target = 1, folder.with_name(f"damaged-{folder.name}")
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}-{number}")
    folder.rename(target)
    return target


def is_full(error: OSError) -> bool:
    """Whether an error says that there is no room on the disk."""
    return error.errno in NO_ROOM
