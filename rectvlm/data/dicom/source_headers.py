"""Whole headers of the slices that a volume was read from, for DICOM results about them.

Unlike `DicomSlice`, they hold the patient's name, id and dates: results that go back beside the CT
must carry them. Nothing else may.
"""

import logging
import warnings
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from rectvlm.data.dicom.geometry import SliceStack
from rectvlm.files import printable_line

log = logging.getLogger(__name__)

_REQUIRED_EVEN_IF_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate"),
    *("StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
"""Elements of every DICOM object that may be empty, but not absent."""
_SEXES = ("M", "F", "O", "")


def read_source_headers(stack: SliceStack, where: Path) -> tuple[Dataset, ...] | None:
    """Read the headers of the files of a stack: one for each slice, or one of an enhanced CT.

    Of slices that are there twice, the first one is taken, as its pixels are.

    Args:
        stack: of the volume.
        where: source in messages.

    Returns:
        The headers without pixels; None where one is damaged in parts that the volume needs not.
    """
    files = dict.fromkeys(group[0].file for group in stack.slices)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tuple(_read_header(file) for file in files)
    except Exception as error:  # pydicom has many for a damaged header, and quotes it in some
        log.warning(
            "%s: no DICOM results, since a header is damaged (%s)",
            printable_line(where),
            type(error).__name__,
        )
        return None


def _read_header(file: Path) -> Dataset:
    header = pydicom.dcmread(file, stop_before_pixels=True)
    for keyword in _REQUIRED_EVEN_IF_EMPTY:
        if keyword not in header:
            setattr(header, keyword, "")
    if header.PatientSex not in _SEXES:
        header.PatientSex = ""
    return header
