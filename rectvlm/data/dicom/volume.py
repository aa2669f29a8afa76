"""A DICOM series as a volume in HU, and the door for a folder or a file of one."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.data.dicom.geometry import SliceStack, resample_evenly, stack_slices
from rectvlm.data.dicom.headers import DicomSlice, NotACtSlice, read_dicom_slices
from rectvlm.data.dicom.pixels import HuReader
from rectvlm.data.dicom.series import (
    DicomListing,
    DicomSeries,
    choose_chest_ct,
    group_by_study,
    is_wanted,
    list_series,
)
from rectvlm.data.dicom.source_headers import read_source_headers
from rectvlm.data.file_checks import require_possible_size, require_regular_file, truncated_error
from rectvlm.data.zip_archive import unpacked_dicom
from rectvlm.file_search import list_files
from rectvlm.files import printable_line
from rectvlm.types import InputError, Volume

log = logging.getLogger(__name__)

_BYTES_A_VOXEL = 2
_INT16 = np.iinfo(np.int16)


def read_dicom(path: Path, wanted: str | None = None) -> Volume:
    """Read the chest CT in a folder of DICOM files, or the series that a file belongs to.

    Args:
        path: folder, searched with the folders in it; DICOMDIR, which stands for its folder; or
            one file of a series whose files lie beside it.
        wanted: UID or number of the series in a folder; by default the chest CT is chosen.

    Raises:
        InputError: there is no CT, or none that is wanted, or it cannot be used as it is.
    """
    is_directory = path.name.upper() == "DICOMDIR" and path.is_file()
    if path.is_dir() or is_directory:
        folder = path.parent if is_directory else path
        return read_series(choose_series(list_series(list_files(folder).files), path, wanted), path)
    return read_series(series_of_file(path), path)


def read_dicom_archive(path: Path, wanted: str | None = None, with_headers: bool = False) -> Volume:
    """Read the chest CT, or the series that is wanted, in a `.zip` of DICOM files.

    Args:
        path: of the archive.
        wanted: UID or number of the series.
        with_headers: as for `read_series`.

    Raises:
        InputError: as `unpacked_dicom` and `read_dicom`.
    """
    with unpacked_dicom(path) as files:
        series = choose_series(list_series(files), path, wanted)
        return read_series(series, path, with_headers)


def series_of_file(file: Path) -> DicomSeries:
    """The series that a DICOM file belongs to, with its other files in the same folder.

    Raises:
        InputError: the file holds no slice of a CT.
    """
    require_regular_file(file, "a DICOM file")
    try:
        uid = read_dicom_slices(file)[0].series_uid
    except NotACtSlice as reason:
        raise InputError(
            file,
            str(reason),
            expected="a slice of a CT",
            found="something else",
            remedy="give a file of the CT's series",
        ) from None
    siblings = [path for path in sorted(file.parent.iterdir()) if path.is_file()]
    listing = list_series(siblings)
    return next(series for series in listing.series if series.uid == uid)


def choose_series(listing: DicomListing, path: Path, wanted: str | None) -> DicomSeries:
    """The one series that is read of a listing.

    Args:
        listing: of the files of a folder or archive.
        path: source in messages.
        wanted: UID or number of the series; None for the chest CT by `choose_chest_ct`.

    Raises:
        InputError: there is no CT, not exactly one that is wanted, or several studies.
    """
    if not listing.series:
        skipped = "; ".join(reason for _, reason in listing.describe_skipped()[:3])
        raise InputError(
            path,
            "is a folder or archive without a DICOM series of a CT",
            expected="slices of a CT (modality CT)",
            found=skipped or "no DICOM files",
            remedy="give the folder of the series",
        )
    candidates = listing.series
    if wanted is not None:
        candidates = [series for series in listing.series if is_wanted(series, wanted)]
        if len(candidates) != 1:
            known = ", ".join(series.describe() for series in listing.series[:10])
            raise InputError(
                path,
                f"does not hold exactly one series {wanted!r}",
                expected="the number or SeriesInstanceUID of one",
                found=f"{len(candidates)} of that name among {known}",
                remedy="ask for one of them",
            )
    studies = group_by_study(candidates)
    if len(studies) > 1:
        patients = {series.slices[0].patient_hash for series in candidates}
        raise InputError(
            path,
            "holds several studies",
            expected="the CT of one study",
            found=f"{len(studies)} studies of {len(patients)} patients",
            remedy="give the folder or a file of one series",
        )
    (chosen, _), *others = choose_chest_ct(studies[0])
    for other, reason in others:
        log.info("%s: %s left out, since %s", printable_line(path), other.describe(), reason)
    return chosen


def read_series(series: DicomSeries, path: Path, with_headers: bool = False) -> Volume:
    """Read a series in HU: int16 where it fits, else float32; index (column, row, slice).

    Args:
        series: with the headers of all its slices.
        path: source in messages.
        with_headers: whether to keep `dicom_headers`, which name the patient.

    Raises:
        InputError: its slices make no volume, see `stack_slices`; its size is absurd; its pixels
            are damaged; slices at one position differ.
    """
    where = Path(f"{path}, {series.label}")
    _require_possible_pixels(series.slices, where)
    stack = stack_slices(series.slices, where)
    array = _read_slices(stack, where)
    if not stack.is_even:
        array = resample_evenly(array, stack)
    return Volume(
        array.transpose(2, 1, 0),
        stack.affine,
        str(where),
        pseudonym=series.pseudonym,
        dicom_headers=read_source_headers(stack, where) if with_headers else None,
    )


def _require_possible_pixels(slices: Sequence[DicomSlice], where: Path) -> None:
    """Compare sizes with files and memory before anything is allocated.

    Raises:
        InputError: the header asks for more pixels than the files or the memory can hold.
    """
    first = slices[0]
    file_sizes = {piece.file: piece.file.stat().st_size for piece in slices}
    for piece in slices:
        needed = piece.rows * piece.columns * piece.bits // 8
        if not piece.is_compressed and needed > file_sizes[piece.file]:
            raise truncated_error(where, needed, file_sizes[piece.file])
    shape = (first.columns, first.rows, len(slices))
    needed = sum(piece.rows * piece.columns for piece in slices) * _BYTES_A_VOXEL
    require_possible_size(where, shape, needed, sum(file_sizes.values()))


def _read_slices(stack: SliceStack, where: Path) -> NDArray[Any]:
    """HU (slice, row, column) of one slice at each position."""
    reader = HuReader(where)
    first = stack.slices[0][0]
    array: NDArray[Any] = np.empty((len(stack.slices), first.rows, first.columns), np.int16)
    n_doubled = 0
    for index, group in enumerate(stack.slices):
        hu = reader.read_slice(group[0])
        for other in group[1:]:
            _require_equal(hu, reader.read_slice(other), index, len(stack.slices), where)
            n_doubled += 1
        is_int16 = hu.dtype.kind == "i" and hu.min() >= _INT16.min and hu.max() <= _INT16.max
        if array.dtype == np.int16 and not is_int16:
            array = array.astype(np.float32)
        array[index] = hu
    if n_doubled:
        log.warning("%s: %d slices are there twice, used once", printable_line(where), n_doubled)
    return array


def _require_equal(
    hu: NDArray[Any], other: NDArray[Any], index: int, count: int, where: Path
) -> None:
    if not np.array_equal(hu, other):
        raise InputError(
            where,
            "has different slices at one position",
            expected="one slice at each position",
            found=f"two that differ at position {index + 1} of {count}",
            remedy="export each acquisition or phase as a series of its own",
        )
