"""Whether a checkpoint is what was written: sizes and SHA-256 of its files, in its `manifest.json`.

Files that come later, such as fitted thresholds, have no entry and are not looked at.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from rectvlm.checkpoint import manifest
from rectvlm.checkpoint.manifest import ManifestEntry
from rectvlm.types import UserError

log = logging.getLogger(__name__)

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync_file(path: Path) -> ManifestEntry:
    """Have a file on the disk, not only in the system's memory; its size and checksum.

    Raises:
        OSError: there is no room, or the disk failed.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return ManifestEntry(path.stat().st_size, manifest.compute_sha256(path))


def finalize_checkpoint(work: Path, files: Mapping[str, ManifestEntry], target: Path) -> None:
    """Give a folder whose files are settled its manifest and its name, which no other has yet.

    Raises:
        OSError: there is no room, the disk failed, or the name is taken: a whole checkpoint is never written over.
    """
    manifest.write_manifest(work, manifest.CheckpointManifest(dict(sorted(files.items()))))
    fsync_file(work / manifest.MANIFEST_FILE)
    for folder in [path for path in work.rglob("*") if path.is_dir()] + [work]:
        _fsync_folder(folder)
    work.rename(target)
    _fsync_folder(target.parent)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def has_manifest(folder: Path) -> bool:
    """Whether a checkpoint has a manifest; those of earlier versions have none."""
    return (folder / manifest.MANIFEST_FILE).is_file()


def list_manifest_files(folder: Path) -> list[str]:
    """The files that a checkpoint should have, largest first, so that shares of them are alike.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    try:
        files = manifest.parse_manifest(
            (folder / manifest.MANIFEST_FILE).read_bytes(), manifest.MANIFEST_FILE
        ).files
    except FileNotFoundError:
        raise UserError(f"{manifest.MANIFEST_FILE} is missing") from None
    except OSError as error:
        raise UserError(f"{manifest.MANIFEST_FILE} cannot be read ({error})") from error
    return sorted(files, key=lambda name: (-files[name].size, name))


def find_faults(folder: Path, file_names: Iterable[str]) -> list[str]:
    """What is wrong with some files of a checkpoint, in words."""
    files = manifest.parse_manifest(
        (folder / manifest.MANIFEST_FILE).read_bytes(), manifest.MANIFEST_FILE
    ).files
    return [
        fault for name in file_names if (fault := _find_fault(folder / name, name, files[name]))
    ]


def _find_fault(path: Path, name: str, entry: ManifestEntry) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{name} has {size} of {entry.size} bytes"
        return (
            f"{name} has another checksum than when it was written"
            if manifest.compute_sha256(path) != entry.sha256
            else None
        )
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error})"


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, which is none any more from the first moment: a kill leaves no half one.

    Raises:
        OSError: the disk failed, or another process holds its files (NFS).
    """
    gone = partial_folder(folder)
    folder.rename(gone)
    shutil.rmtree(gone)


def partial_folder(folder: Path) -> Path:
    """The name of a checkpoint while it is written or deleted."""
    return folder.with_name(f".{folder.name}.partial")


def set_damaged_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one and nothing deletes it; its new place."""
    number, target = 1, folder.with_name(f"damaged-{folder.name}")
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}-{number}")
    folder.rename(target)
    return target


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that there is no room on the disk."""
    return error.errno in DISK_FULL_ERRNOS
