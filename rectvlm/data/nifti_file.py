"""Reading of NIfTI files; `nifti_affine` reads their position."""

import gzip
import threading
import zlib
from pathlib import Path
from typing import Any

import deflate
import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from rectvlm.data.file_checks import (
    require_finite_voxels,
    require_possible_size,
    require_regular_file,
    truncated_error,
    unreadable_error,
)
from rectvlm.data.nifti_affine import read_affine
from rectvlm.types import Affine, InputError, Volume

_HEADER_BYTES = 540
_HEADER_CLASSES: dict[int, type[nib.Nifti1Header]] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}


def read_nifti(path: Path, default_affine: Affine | None = None) -> Volume:
    """Read a `.nii` or `.nii.gz` of any content; unscaled voxels keep their stored type.

    Args:
        path: file.
        default_affine: index to world for a file whose header is blank, when it is known from
            elsewhere.

    Raises:
        InputError: the file is not NIfTI, is shorter or longer than its header says, is not 3-D,
            does not fit in memory, has no affine that `read_affine` believes, or holds voxels that
            are not finite.
    """
    require_regular_file(path, "a NIfTI file (.nii or .nii.gz)")
    is_gzip = _is_gzip(path)
    header = _read_header(path, is_gzip)
    shape = _read_shape(header, path, is_gzip)
    affine, is_of_header = read_affine(header, shape, path, default_affine)
    slope, intercept = _read_scaling(header, path)
    array = _read_voxels(header, shape, path, is_gzip)
    if slope is not None and (slope, intercept) != (1, 0):
        array = array.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    require_finite_voxels(array, path)
    return Volume(array, affine, str(path), header.binaryblock if is_of_header else None)


def parse_header(block: bytes) -> nib.Nifti1Header:
    """Parse the first bytes of a NIfTI file, unchecked, in their byte order.

    nibabel's check would turn a spacing of 0 into 1 mm with only a log line.

    Raises:
        HeaderDataError: the bytes are no header, or too few.
    """
    little, big = int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")
    kind = _HEADER_CLASSES.get(little) or _HEADER_CLASSES.get(big)
    if kind is None:
        raise HeaderDataError("a file that starts with something else")
    if len(block) < kind.template_dtype.itemsize:
        raise HeaderDataError(f"an end after {len(block)} bytes, inside the header")
    return kind(block[: kind.template_dtype.itemsize], check=False)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _read_header(path: Path, is_gzip: bool) -> nib.Nifti1Header:
    try:
        with gzip.open(path, "rb") if is_gzip else path.open("rb") as file:
            block = file.read(_HEADER_BYTES)
        header = parse_header(block)
        if int(header["datatype"]) not in nib.nifti1.data_type_codes.dtype:
            raise HeaderDataError(f"the unknown voxel type {int(header['datatype'])}")
        if not int(header["sizeof_hdr"]) + 4 <= header["vox_offset"] < 1 << 20:
            raise HeaderDataError(
                f"voxels that would start at byte {float(header['vox_offset']):g}"
            )
    except (
        HeaderDataError,
        nib.spatialimages.HeaderTypeError,
        EOFError,
        zlib.error,
        OSError,
        ValueError,
    ) as error:
        raise InputError(
            path,
            "is not a NIfTI file",
            expected="a NIfTI header",
            found=str(error),
            remedy="convert it or copy it again",
        ) from None
    if not header["magic"].item().startswith((b"n+1", b"n+2")):
        raise InputError(
            path,
            "is not a single-file NIfTI",
            expected=".nii or .nii.gz",
            found="a pair of .hdr and .img, or another magic number",
            remedy="convert it to .nii.gz",
        )
    return header


def _read_shape(header: nib.Nifti1Header, path: Path, is_gzip: bool) -> tuple[int, int, int]:
    """Shape (i, j, k). Sizes are compared with file and memory before anything is allocated."""
    shape = tuple(int(n) for n in header.get_data_shape())
    if len(shape) < 3 or set(shape[3:]) - {1} or min(shape) < 1:
        raise InputError(
            path,
            "is not one volume",
            expected="3 dimensions",
            found=f"shape {shape}",
            remedy="split a series of volumes first",
        )
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(
            path,
            "has voxels of a strange type",
            expected="integers or real numbers",
            found=str(dtype),
            remedy="convert it to int16",
        )
    size = path.stat().st_size
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    end = needed + int(header["vox_offset"])
    if not is_gzip and end > size:
        raise truncated_error(path, end, size)
    if not is_gzip and size - end >= needed // shape[2]:
        raise _trailing_bytes_error(path, end, size)
    require_possible_size(path, shape, needed, size)
    return shape[0], shape[1], shape[2]


def _trailing_bytes_error(path: Path, expected: int, found: int) -> InputError:
    return InputError(
        path,
        "holds more than its header says",
        expected=f"{expected} bytes, with less than a slice after them",
        found=f"at least {found}",
        remedy="export the series again",
    )


def _read_scaling(header: nib.Nifti1Header, path: Path) -> tuple[float | None, float | None]:
    """Slope and intercept of the header; None for both without scaling."""
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError:
        raise InputError(
            path,
            "has an impossible scaling",
            expected="a finite slope and intercept",
            found=f"slope {header['scl_slope']:g} and intercept {header['scl_inter']:g}",
            remedy="export the series again",
        ) from None
    return slope, intercept


def _read_voxels(
    header: nib.Nifti1Header, shape: tuple[int, int, int], path: Path, is_gzip: bool
) -> NDArray[Any]:
    """Stored numbers (i, j, k) in Fortran order, never as float64."""
    dtype, offset = header.get_data_dtype(), int(header["vox_offset"])
    count = int(np.prod(shape))
    if is_gzip:
        data = _decompress_gzip(
            path, offset + count * dtype.itemsize, count // shape[2] * dtype.itemsize
        )
        array = np.frombuffer(data, dtype, count, offset)
    else:
        array = np.fromfile(path, dtype, count, offset=offset)
    if dtype.kind == "f" and dtype.itemsize == 8:
        array = array.astype(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False).reshape(shape, order="F")


class _ReadBuffer(threading.local):
    """Memory for the bytes of one file at a time: fresh memory costs more than reading them."""

    def __init__(self) -> None:
        self.memory = bytearray()

    def read_file(self, path: Path) -> memoryview:
        """Read a file; its bytes are valid until the next call."""
        size, done = path.stat().st_size, 0
        if len(self.memory) < size:
            self.memory = bytearray(size)
        view = memoryview(self.memory)[:size]
        with path.open("rb", buffering=0) as file:
            while done < size and (count := file.readinto(view[done:])):
                done += count
        return view[:done]


_read_buffer = _ReadBuffer()


def _decompress_gzip(path: Path, needed: int, surplus: int) -> bytes | bytearray:
    """Decompress a gzip file to `needed` bytes; fewer than `surplus` bytes may follow them.

    libdeflate decompresses files of one member, the standard library all others.

    Raises:
        InputError: the file cannot be read, is damaged, or has another length.
    """
    try:
        data = _read_buffer.read_file(path)
    except OSError as error:
        raise unreadable_error(path, error) from None
    # The trailer holds the size of the last member, which nearly always is the only one.
    if int.from_bytes(data[-4:], "little") == needed:
        try:
            content: bytearray = deflate.gzip_decompress(data)
        except deflate.DeflateError:
            content = bytearray()
        if len(content) == needed:
            return content
    try:
        with gzip.open(path, "rb") as file:
            part = file.read(needed)
            # Reading on checks the checksum at the end, but stops early in a decompression bomb.
            surplus_read = len(file.read(surplus))
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(
            path,
            "is cut short or damaged",
            expected="a whole gzip file",
            found=str(error),
            remedy="copy it again",
        ) from None
    if len(part) < needed:
        raise truncated_error(path, needed, len(part))
    if surplus_read >= surplus:
        raise _trailing_bytes_error(path, needed, needed + surplus_read)
    return part
