"""Real DICOM files of small CTs, as a PACS would export them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
PATIENT = "SECRETNAME^<script>alert(1)</script>"
PATIENT_ID = "SECRETID-4711"
BIRTH_DATE = "19010203"
PERSONAL_WORDS = ("SECRETNAME", "SECRETID", BIRTH_DATE, "<script>alert(1)")
"""Words of a patient that no result may hold."""

Edit = Callable[[Dataset, int], None]
"""Changes the data set of a slice, given with its number."""


def make_slices(
    hu: NDArray[np.int16],
    affine: NDArray[np.float64],
    *,
    series_number: int = 3,
    series_uid: str | None = None,
    study_uid: str | None = None,
    slope: float = 1.0,
    intercept: float = -2000.0,
) -> list[Dataset]:
    """Data sets of a volume (i, j, k) on a RAS affine: columns along i, rows along j."""
    series_uid, study_uid = series_uid or generate_uid(), study_uid or generate_uid()
    lps = RAS_TO_LPS @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    orientation = [*(lps[:, 0] / spacing[0]), *(lps[:, 1] / spacing[1])]
    datasets = []
    for k in range(hu.shape[2]):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
        dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = generate_uid()
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.PatientName, dataset.PatientID = PATIENT, PATIENT_ID
        dataset.PatientBirthDate, dataset.PatientSex = BIRTH_DATE, "O"
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200101", "120000", "1"
        dataset.AccessionNumber = ""
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
        dataset.FrameOfReferenceUID = "1.2.3.4"
        dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.SeriesNumber, dataset.InstanceNumber = series_number, hu.shape[2] - k
        dataset.ConvolutionKernel, dataset.BodyPartExamined = "Br40f", "CHEST"
        dataset.SliceThickness = 99  # says nothing of the distance
        dataset.ImageOrientationPatient = [f"{value:.8f}" for value in orientation]
        position = lps[:, 3] + k * lps[:, 2]
        dataset.ImagePositionPatient = [f"{value:.6f}" for value in position]
        dataset.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        stored = np.rint((hu[:, :, k].T.astype(float) - intercept) / slope)
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        set_pixels(dataset, stored.astype(np.uint16))
        datasets.append(dataset)
    return datasets


def set_pixels(dataset: Dataset, stored: NDArray[np.generic]) -> None:
    """Put plain 16-bit pixels (row, column) into a data set."""
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = np.ascontiguousarray(stored).tobytes()
    dataset["PixelData"].VR = "OW"


def write_slices(
    datasets: Sequence[Dataset], folder: Path, suffix: str = ".dcm", seed: int = 0
) -> Path:
    """Write each data set as a file, in an order that says nothing of the position."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(datasets))
    for number, index in enumerate(order):
        datasets[index].save_as(folder / f"IM{number:04d}{suffix}", enforce_file_format=True)
    return folder


def write_series(
    hu: NDArray[np.int16],
    affine: NDArray[np.float64],
    folder: Path,
    edit: Edit | None = None,
    suffix: str = ".dcm",
    **options: object,
) -> Path:
    """Write a volume as a series of files; `edit` changes the data set of each slice."""
    datasets = make_slices(hu, affine, **options)  # type: ignore[arg-type]
    for number, dataset in enumerate(datasets):
        if edit is not None:
            edit(dataset, number)
    return write_slices(datasets, folder, suffix)


def make_enhanced(datasets: Sequence[Dataset]) -> Dataset:
    """All slices of a series as the frames of one Enhanced CT, in the order given."""
    first = datasets[0]
    enhanced = Dataset()
    enhanced.file_meta = FileMetaDataset()
    enhanced.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "Modality", "ImageType"):
        setattr(enhanced, name, getattr(first, name))
    enhanced.PatientName, enhanced.PatientID = PATIENT, PATIENT_ID
    enhanced.SOPClassUID = enhanced.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    enhanced.SOPInstanceUID = enhanced.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    stored = [np.frombuffer(item.PixelData, np.uint16) for item in datasets]
    set_pixels(enhanced, np.stack(stored).reshape(-1, first.Rows, first.Columns))
    enhanced.NumberOfFrames = len(datasets)

    def group(**elements: object) -> DicomSequence:
        item = Dataset()
        for name, value in elements.items():
            setattr(item, name, value)
        return DicomSequence([item])

    shared = Dataset()
    shared.PixelMeasuresSequence = group(PixelSpacing=first.PixelSpacing)
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=first.ImageOrientationPatient)
    shared.PixelValueTransformationSequence = group(
        RescaleSlope=first.RescaleSlope, RescaleIntercept=first.RescaleIntercept
    )
    enhanced.SharedFunctionalGroupsSequence = DicomSequence([shared])
    frames = []
    for item in datasets:
        frame = Dataset()
        frame.PlanePositionSequence = group(ImagePositionPatient=item.ImagePositionPatient)
        frames.append(frame)
    enhanced.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    return enhanced


def read_all(folder: Path) -> list[Dataset]:
    """Data sets of the files right in a folder."""
    return [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
