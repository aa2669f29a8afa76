"""DICOM files of a zip archive, unpacked into a temporary folder under names of our own."""

import contextlib
import logging
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from rectvlm.data.file_checks import require_regular_file
from rectvlm.types import InputError

log = logging.getLogger(__name__)

MAX_ARCHIVE_BYTES = 16 << 30
"""Largest size of all files of an archive, unpacked."""
MAX_ARCHIVE_RATIO = 100
"""Largest factor by which an archive may expand; CTs expand by 2 to 4."""
MAX_ARCHIVE_FILES = 200_000
_FREE_SPACE_SHARE = 0.9


@contextlib.contextmanager
def unpacked_dicom(path: Path) -> Iterator[list[Path]]:
    """Unpack the DICOM files of an archive for the time of a `with` block; return their paths.

    Files get numbers as names, so no name of the archive leads anywhere.

    Raises:
        InputError: the archive is broken, encrypted, a decompression bomb, too large for the disk,
            or names paths outside itself.
    """
    require_regular_file(path, "a zip archive of DICOM files")
    with tempfile.TemporaryDirectory(prefix="rectvlm-zip-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
                _require_harmless(members, path, Path(folder))
                files = _unpack(archive, members, Path(folder))
        except (
            *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError),
            *(RuntimeError, ValueError),
        ) as error:
            raise InputError(
                path,
                "is a damaged archive",
                expected="a whole .zip",
                found=str(error).rstrip(".") or type(error).__name__,
                remedy="copy it again",
            ) from None
        yield files


def _require_harmless(members: list[zipfile.ZipInfo], path: Path, folder: Path) -> None:
    """Check names and sizes before anything is unpacked.

    Raises:
        InputError: a name that leads out, encryption, or too many bytes.
    """
    for info in members:
        parts = re.split(r"[/\\]", info.filename)
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise InputError(
                path,
                "names a file outside itself",
                expected="relative paths",
                found=repr(info.filename[:100]),
                remedy="do not trust it; zip the folder of the series again",
            )
        if info.flag_bits & 1:
            raise InputError(
                path,
                "is encrypted",
                expected="an archive without a password",
                found="encrypted files",
                remedy="unpack it first and give the folder",
            )
    size = sum(info.file_size for info in members)
    packed_size = path.stat().st_size
    room = min(MAX_ARCHIVE_BYTES, int(_FREE_SPACE_SHARE * shutil.disk_usage(folder).free))
    is_bomb = size > MAX_ARCHIVE_RATIO * packed_size
    if is_bomb or size > room or len(members) > MAX_ARCHIVE_FILES:
        raise InputError(
            path,
            "would be too large when unpacked",
            expected=f"at most {room / 2**30:.1f} GiB, {MAX_ARCHIVE_RATIO} times its size and "
            f"{MAX_ARCHIVE_FILES} files",
            found=f"{size / 2**30:.2f} GiB, {size / max(1, packed_size):.0f} times its "
            f"{packed_size} bytes, in {len(members)} files",
            remedy="unpack it yourself if you trust it, and give the folder",
        )


def _unpack(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path) -> list[Path]:
    files = []
    for number, info in enumerate(members):
        with archive.open(info) as member:
            start = member.read(132)
            if start[128:] != b"DICM":
                continue
            file = folder / f"{number:06d}"
            with file.open("wb") as target:
                target.write(start)
                # zipfile reads no more than the size that was checked above.
                shutil.copyfileobj(member, target, 1 << 20)
        files.append(file)
    return files
