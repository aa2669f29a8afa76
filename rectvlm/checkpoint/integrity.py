"""Integrity of checkpoints: a manifest, and renames by which they appear complete or not at all.

`manifest.json` lists the size and SHA-256 of every file. README.md and thresholds.json have no
entry: people edit the first, and the validation after a save writes the second.
"""

import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rectvlm.files import file_sha256, fsync_file, fsync_folder, write_json
from rectvlm.types import UserError

MANIFEST_FILE = "manifest.json"
UNLISTED_FILES = frozenset({MANIFEST_FILE, "README.md", "thresholds.json", ".gitattributes"})
"""Files without an entry: they may be added, edited or missing."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ManifestEntry:
    """Size and checksum of one file."""

    size: int
    """Size, bytes."""
    sha256: str
    """SHA-256, 64 hexadecimal digits."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CheckpointManifest:
    """Content of `manifest.json`."""

    files: dict[str, ManifestEntry]
    """Entries by path relative to the folder, with forward slashes."""


_MANIFEST_ADAPTER = TypeAdapter(CheckpointManifest)


def flush_and_hash(path: Path) -> ManifestEntry:
    """Flush a file to disk and return its manifest entry.

    Raises:
        OSError: there is no room, or the disk failed.
    """
    fsync_file(path)
    return hash_file(path)


def hash_file(path: Path) -> ManifestEntry:
    """Size and checksum of a file."""
    return ManifestEntry(path.stat().st_size, file_sha256(path))


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, ManifestEntry]:
    """Manifest entries of the named files of a folder, without those that have no entry."""
    return {name: hash_file(folder / name) for name in names if name not in UNLISTED_FILES}


def write_manifest(folder: Path, entries: Mapping[str, ManifestEntry]) -> None:
    """Write the manifest of a folder, atomically.

    Raises:
        OSError: there is no room, or the disk failed.
    """
    write_json(folder / MANIFEST_FILE, asdict(CheckpointManifest(dict(sorted(entries.items())))))


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest to be checked against."""
    return (folder / MANIFEST_FILE).is_file()


def read_manifest(folder: Path) -> dict[str, ManifestEntry]:
    """Manifest entries of a folder, by file name.

    Raises:
        UserError: the manifest is missing or damaged, or names a file outside the folder.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = _MANIFEST_ADAPTER.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing, so nothing says what the folder should hold") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        fault = error.errors()[0]
        location = ".".join(map(str, fault["loc"]))
        raise UserError(f"{path} is damaged ({location}: {fault['msg']})") from None
    for name in manifest.files:
        check_file_name(name, str(path))
    return manifest.files


def check_file_name(name: str, where: str) -> None:
    """Refuse a path that could lead out of its folder.

    Raises:
        UserError: it is absolute, or has `..`, a backslash or a colon.
    """
    path = PurePosixPath(name)
    is_outside = path.is_absolute() or ".." in path.parts or not path.parts
    if is_outside or "\\" in name or ":" in name:
        raise UserError(
            f"{where} names the file {name!r}, which could lie outside its folder: nothing was "
            "written."
        )


def find_faults(folder: Path, names: Collection[str] | None = None) -> list[str]:
    """Compare files with the manifest: one phrase for each that is missing or differs.

    Args:
        folder: of the checkpoint.
        names: files to check, by default all that the manifest lists.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    entries = read_manifest(folder)
    faults = []
    for name in sorted(entries) if names is None else names:
        fault = _find_fault(folder / name, name, entries.get(name))
        if fault is not None:
            faults.append(fault)
    return faults


def _find_fault(path: Path, name: str, entry: ManifestEntry | None) -> str | None:
    if entry is None:
        return f"{name} is not listed in {MANIFEST_FILE}"
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{name} has {size} of {entry.size} bytes"
        if file_sha256(path) != entry.sha256:
            return f"{name} has another checksum than when it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return None


def list_manifest_files(folder: Path) -> list[str]:
    """The files that a checkpoint should have, largest first, so that ranks can share them evenly.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    entries = read_manifest(folder)
    return sorted(entries, key=lambda name: (-entries[name].size, name))


def finalize_checkpoint(work: Path, entries: Mapping[str, ManifestEntry], target: Path) -> None:
    """Write the manifest of a folder whose files are on disk, and give the folder its name.

    Raises:
        OSError: there is no room, the disk failed, or the name is taken: a checkpoint is never
            written over.
    """
    write_manifest(work, entries)
    for path in work.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
    fsync_folder(work)
    work.rename(target)
    fsync_folder(target.parent)


def remove_checkpoint(folder: Path) -> None:
    """Rename a checkpoint to its partial name and delete it: a kill leaves no half checkpoint.

    Raises:
        OSError: the disk failed, or another process holds its files (NFS).
    """
    partial = partial_folder(folder)
    folder.rename(partial)
    shutil.rmtree(partial)


def partial_folder(folder: Path) -> Path:
    """The name of a checkpoint while it is written or deleted."""
    return folder.with_name(f".{folder.name}.partial")


def set_damaged_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither read nor pruned; return its new path."""
    target = folder.with_name(f"damaged-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}-{number}")
    folder.rename(target)
    return target
