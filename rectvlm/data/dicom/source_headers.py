"""Whole headers of the slices that a volume was read from, for DICOM results about them.

Unlike `DicomSlice`, they hold the patient's name, id and dates: results that go back beside the CT
must carry them. Nothing else may.
"""

import warnings

import pydicom
from pydicom.dataset import Dataset

from rectvlm.data.dicom.geometry import SliceStack

_REQUIRED_EVEN_IF_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate"),
    *("StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
"""Elements of every DICOM object that may be empty, but not absent."""
_SEXES = ("M", "F", "O", "")


def read_source_headers(stack: SliceStack) -> tuple[Dataset, ...]:
    """Read the headers of the files of a stack: one for each slice, or one of an enhanced CT.

    Of slices that are there twice, the first one is taken, as its pixels are.
    """
    files = dict.fromkeys(group[0].file for group in stack.slices)
    headers = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in files:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            for keyword in _REQUIRED_EVEN_IF_EMPTY:
                if keyword not in header:
                    setattr(header, keyword, "")
            if header.PatientSex not in _SEXES:
                header.PatientSex = ""
            headers.append(header)
    return tuple(headers)
