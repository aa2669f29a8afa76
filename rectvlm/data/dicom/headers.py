"""Headers of DICOM files: the CT slices in a file, or the reason why it holds none."""

import hashlib
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import UID

# Its warnings quote what headers hold.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

_CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"
_ENHANCED_CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""Enhanced CT and Legacy Converted Enhanced CT: all slices are frames of one file."""
_SECONDARY_CAPTURE_CLASS = "1.2.840.10008.5.1.4.1.1.7"
_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
_DEFLATED_SYNTAX = b"1.2.840.10008.1.2.1.99"
_META_BYTES = 4096
"""Bytes at the start of a file that hold its transfer syntax."""
_MAX_FRAMES = 20_000
_MAX_TEXT = 32
_KEYWORDS = [
    *("SOPClassUID", "Modality", "ImageType", "StudyInstanceUID", "SeriesInstanceUID"),
    *("SeriesNumber", "PatientID", "PatientName", "BodyPartExamined", "ConvolutionKernel"),
    *("Rows", "Columns", "NumberOfFrames", "BitsAllocated", "SamplesPerPixel"),
    *("PhotometricInterpretation", "PixelRepresentation", "PixelPaddingValue"),
    *("RescaleSlope", "RescaleIntercept"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
"""Elements that are read; the pixels follow when the series is known."""


@dataclass(frozen=True)
class DicomSlice:
    """One CT slice, by its header. Directions and positions are in DICOM's world, LPS mm."""

    file: Path
    frame: int | None
    """Index of the slice in a file of several; None for a file of one."""
    patient_hash: str
    """Hash of the patient's id and name, which tells patients apart and names none."""
    study_uid: str
    series_uid: str
    series_number: int | None
    image_type: tuple[str, ...]
    body_part: str
    kernel: str | None
    rows: int
    columns: int
    bits: int
    """Bits of a stored pixel."""
    transfer_syntax: str
    """UID of the encoding of the pixels."""
    position: tuple[float, ...]
    """(x, y, z) of the centre of the first pixel."""
    orientation: tuple[float, ...]
    """Direction of a row, then of a column: six cosines."""
    spacing: tuple[float, ...]
    """Distance between rows, then between columns, mm."""
    slope: float
    intercept: float
    padding: int | None
    """Stored number of pixels outside the image; None where none is declared."""

    @property
    def is_compressed(self) -> bool:
        """Whether a codec must decode the pixels."""
        return UID(self.transfer_syntax).is_compressed

    @property
    def normal(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Unit vector across the slice: that of a row × that of a column."""
        row, column = self.orientation[:3], self.orientation[3:]
        return np.cross(row, column)


class NotACtSlice(Exception):
    """Reason, as the end of a sentence about a file, why it holds no slice of a CT."""


def read_dicom_slices(file: Path) -> list[DicomSlice]:
    """Read the slices of a DICOM file without their pixels: one, or the frames of an enhanced CT.

    Raises:
        NotACtSlice: the file is not DICOM, or holds something else than slices of a CT.
    """
    try:
        with file.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = stream.read(_META_BYTES)
            if start[128:132] != b"DICM":
                raise NotACtSlice("is not a DICOM file")
            if _DEFLATED_SYNTAX in start:
                raise NotACtSlice("is deflated as a whole, which is not read: write it plainly")
            stream.seek(0)
            dataset = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_KEYWORDS)
            return _parse_slices(dataset, file)
    except NotACtSlice:
        raise
    except OSError as error:
        raise NotACtSlice(f"cannot be read ({error.strerror or error})") from None
    except Exception as error:  # pydicom has many for a damaged header, and quotes it in some
        raise NotACtSlice(f"has a damaged DICOM header ({type(error).__name__})") from None


def _parse_slices(dataset: Any, file: Path) -> list[DicomSlice]:
    sop_class = str(dataset.get("SOPClassUID", ""))
    _require_ct(dataset, sop_class)
    n_frames = int(dataset.get("NumberOfFrames") or 1)
    if sop_class in _ENHANCED_CT_CLASSES:
        if not 1 <= n_frames <= _MAX_FRAMES:
            raise NotACtSlice(f"claims to hold {n_frames} frames")
        groups = [_frame_groups(dataset, frame) for frame in range(n_frames)]
        return [_make_slice(dataset, file, frame, group) for frame, group in enumerate(groups)]
    if n_frames > 1:
        raise NotACtSlice(f"holds {n_frames} frames in one file without their positions")
    return [_make_slice(dataset, file, None, [dataset])]


def _require_ct(dataset: Any, sop_class: str) -> None:
    """Refuse what is no slice of a CT, by the name of what it is.

    Raises:
        NotACtSlice: dose sheet, secondary capture, localizer, colours, other modality.
    """
    modality = _clean_text(dataset.get("Modality")) or "none"
    media_class = str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if _DIRECTORY_CLASS in (sop_class, media_class):
        raise NotACtSlice("is a DICOMDIR, the list of a folder")
    if modality == "SR":
        raise NotACtSlice("is a structured report, such as a dose sheet (modality SR)")
    if sop_class.startswith(_SECONDARY_CAPTURE_CLASS):
        raise NotACtSlice(f"is a secondary capture, such as a dose sheet (modality {modality})")
    if modality != "CT" or sop_class not in (_CT_CLASS, *_ENHANCED_CT_CLASSES):
        raise NotACtSlice(f"is no CT slice (modality {modality})")
    if "LOCALIZER" in _image_type(dataset):
        raise NotACtSlice("is a localizer (scout)")
    photometric = _clean_text(dataset.get("PhotometricInterpretation"))
    if dataset.get("SamplesPerPixel", 1) != 1 or not photometric.startswith("MONOCHROME"):
        raise NotACtSlice(f"is a colour picture ({photometric or 'no photometric interpretation'})")


def _frame_groups(dataset: Any, frame: int) -> list[Any]:
    """Items that describe a frame of an enhanced CT: its own before the shared ones."""
    items: list[Any] = []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for group in (dataset.PerFrameFunctionalGroupsSequence[frame], *shared[:1]):
        for element in group:
            if element.VR == "SQ" and element.value:
                items.append(element.value[0])
    return items


def _make_slice(dataset: Any, file: Path, frame: int | None, items: list[Any]) -> DicomSlice:
    image_type = _image_type(dataset)
    if frame is not None and "LOCALIZER" in image_type:
        raise NotACtSlice("is a localizer (scout)")
    series_uid = str(dataset.get("SeriesInstanceUID") or "")
    if not series_uid:
        raise NotACtSlice("belongs to no series (no SeriesInstanceUID)")
    position = _floats(items, "ImagePositionPatient", 3)
    orientation = _floats(items, "ImageOrientationPatient", 6)
    spacing = _floats(items, "PixelSpacing", 2)
    if position is None or orientation is None or spacing is None or min(spacing) <= 0:
        raise NotACtSlice("has no position in the patient (position, orientation, pixel spacing)")
    slope = _floats(items, "RescaleSlope", 1) or (1.0,)
    intercept = _floats(items, "RescaleIntercept", 1) or (0.0,)
    if slope[0] == 0:
        raise NotACtSlice("has a RescaleSlope of 0")
    transfer_syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    if not UID(transfer_syntax).is_transfer_syntax:
        raise NotACtSlice("has an unknown transfer syntax")
    identity = f"{dataset.get('PatientID') or ''}\n{dataset.get('PatientName') or ''}"
    kernel = _find(items, "ConvolutionKernel")
    padding = dataset.get("PixelPaddingValue")
    number = dataset.get("SeriesNumber")
    return DicomSlice(
        file=file,
        frame=frame,
        patient_hash=hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest(),
        study_uid=str(dataset.get("StudyInstanceUID") or ""),
        series_uid=series_uid,
        series_number=int(number) if number is not None else None,
        image_type=image_type,
        body_part=_clean_text(dataset.get("BodyPartExamined")).upper(),
        # Siemens adds the strength of its iterative reconstruction as a second value.
        kernel=_clean_text(kernel if isinstance(kernel, str) or not kernel else kernel[0]) or None,
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        bits=int(dataset.BitsAllocated),
        transfer_syntax=transfer_syntax,
        position=position,
        orientation=orientation,
        spacing=spacing,
        slope=slope[0],
        intercept=intercept[0],
        padding=int(padding) if isinstance(padding, int) else None,
    )


def _find(items: list[Any], keyword: str) -> Any:
    return next((item.get(keyword) for item in items if keyword in item), None)


def _floats(items: list[Any], keyword: str, count: int) -> tuple[float, ...] | None:
    """The finite numbers of an element; None where it is absent, broken or of another length."""
    value = _find(items, keyword)
    if value is None or value == "":
        return None
    try:
        numbers = tuple(float(number) for number in np.atleast_1d(value))
    except (ValueError, TypeError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


def _image_type(dataset: Any) -> tuple[str, ...]:
    value = dataset.get("ImageType") or []
    words = [value] if isinstance(value, str) else value
    return tuple(_clean_text(word).upper() for word in words)


def _clean_text(value: Any) -> str:
    """A short code of a header, such as a kernel, without what could be markup or a command."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else "/".join(map(str, np.atleast_1d(value)))
    return re.sub(r"[^\w ./+-]", "", text)[:_MAX_TEXT].strip()


def syntax_name(transfer_syntax: str) -> str:
    """Name of a transfer syntax in messages."""
    name = UID(transfer_syntax).name
    return _clean_text(name) if name != transfer_syntax else _clean_text(transfer_syntax)
