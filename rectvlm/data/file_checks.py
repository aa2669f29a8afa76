"""Checks of CT files of every format, each with one clear error, before anything is allocated."""

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from rectvlm.types import InputError

MAX_DEFLATE_RATIO = 1032
"""Largest factor by which DEFLATE can expand data."""
_MAX_VOLUME_BYTES = 16 << 30


def require_regular_file(path: Path, expected: str) -> None:
    """Refuse what is not a readable, regular, non-empty file.

    Args:
        path: the file.
        expected: kind of file, with its article, for the message.

    Raises:
        InputError: it is missing, a folder, a pipe, empty or unreadable.
    """
    try:
        kind = path.stat()
        if stat.S_ISDIR(kind.st_mode):
            raise InputError(
                path,
                "is a folder",
                expected=expected,
                found="a folder",
                remedy="name the file in it",
            )
        if not stat.S_ISREG(kind.st_mode):
            # Opening a pipe would wait forever.
            raise InputError(
                path,
                "is not a file",
                expected=expected,
                found="a pipe or device",
                remedy="copy it again",
            )
        if kind.st_size == 0:
            raise InputError(
                path,
                "is empty",
                expected=expected,
                found="0 bytes",
                remedy="copy or export it again",
            )
        with path.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        raise InputError(
            path,
            "does not exist",
            expected=expected,
            found="nothing",
            remedy="download it or correct the path",
        ) from None
    except OSError as error:
        raise unreadable_error(path, error) from None


def require_possible_size(
    path: Path, shape: Sequence[int], needed_bytes: int, file_bytes: int
) -> None:
    """Refuse a volume that neither its file nor the memory can hold.

    Args:
        path: file in the message.
        shape: of the volume, by the header.
        needed_bytes: size of its voxels in memory.
        file_bytes: size of the file, which may be compressed.

    Raises:
        InputError: the header asks for too much.
        MemoryError: the volume would fit into a machine that is less busy.
    """
    if needed_bytes > min(_MAX_VOLUME_BYTES, file_bytes * MAX_DEFLATE_RATIO):
        raise InputError(
            path,
            "has a header that asks for too much",
            expected=f"at most {_MAX_VOLUME_BYTES / 2**30:.0f} GiB, and a size that a file of "
            f"{file_bytes} bytes can hold",
            found=f"{tuple(shape)} voxels, {needed_bytes / 2**30:.1f} GiB",
            remedy="copy it again, or crop the volume",
        )
    if needed_bytes > psutil.virtual_memory().available:
        raise MemoryError(f"{needed_bytes / 2**30:.1f} GiB for {path}")


def require_finite_voxels(array: NDArray[Any], path: Path) -> None:
    """Refuse NaN and infinity.

    Raises:
        InputError: a voxel is not finite.
    """
    bad = 0
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise InputError(
            path,
            "has voxels that are no numbers",
            expected="finite HU",
            found=f"{bad} voxels that are NaN or infinite",
            remedy="export the series again",
        )


def truncated_error(path: Path, expected: int, found: int) -> InputError:
    """Error for a file that ends before its data does; sizes in bytes."""
    return InputError(
        path,
        "is cut short",
        expected=f"{expected} bytes by its header",
        found=f"{found}",
        remedy="copy it again",
    )


def unreadable_error(path: Path, error: OSError) -> InputError:
    """Error for a file that the system does not let us read."""
    return InputError(
        path,
        "cannot be read",
        expected="a readable file",
        found=f"the system's answer {error.strerror or error!r}",
        remedy="check the disk and the permissions",
    )
