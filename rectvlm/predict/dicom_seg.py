"""The outlines of a case as a DICOM Segmentation: a binary segment for each kind of lesion.

Geometry, frame of reference, patient and study are those of the source series. Each frame refers
to the slice that it lies on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import highdicom as hd
import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import (
    SegmentAlgorithmTypeValues,
    SegmentationTypeValues,
    SegmentDescription,
)
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from rectvlm.labels import Lesion
from rectvlm.lesion_bits import lesion_mask, present_lesions
from rectvlm.predict.case_summary import CaseSummary
from rectvlm.predict.lesion_codes import LESION_CODES, SnomedCode, site_code
from rectvlm.types import Affine, MaskVolume, UserError

MANUFACTURER = "rectvlm"
CHARACTER_SET = "ISO_IR 192"
"""UTF-8, which holds the source's texts whatever their character set, and any report."""
SEGMENTATION_SERIES_NUMBER = 9001
_MAX_OFFSET_MM = 0.6
"""Largest distance of a slice's first pixel from its place on the grid, within the slice's plane:
the reader of series accepts slices that are up to 0.5 mm beside their line."""
_MAX_DIRECTION_ERROR = 0.02
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


class PlaneGeometry(NamedTuple):
    """Position of one slice by its own header, RAS mm."""

    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    """3 × 2: step along a row, and along a column."""


def make_segmentation(
    lesion_bits: MaskVolume, affine: Affine, headers: Sequence[Dataset], summary: CaseSummary
) -> hd.seg.Segmentation:
    """Make the DICOM Segmentation of a case.

    Args:
        lesion_bits: lesion bits (i, j, k) with at least one voxel, i along rows of the slices.
        affine: 4 × 4, index (i, j, k, 1) to world, RAS mm.
        headers: of the source, see `read_source_headers`.
        summary: of the case.

    Raises:
        UserError: the source has no frame of reference, or the outlines are not on its slices.
    """
    require_reference(headers[0])
    indexes = match_planes(headers, affine, lesion_bits.shape)
    planes = lesion_bits.transpose(2, 1, 0)[indexes]
    sources = list(headers)
    if len(sources) > 1:
        drawn = np.flatnonzero(planes.any(axis=(1, 2)))
        planes = planes[drawn]
        sources = [headers[index] for index in drawn.tolist()]
    lesions = present_lesions(planes)
    masks = np.stack([lesion_mask(planes, lesion) for lesion in lesions], axis=-1)
    return hd.seg.Segmentation(
        source_images=sources,
        pixel_array=masks.view(np.uint8),
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _describe_segment(number, lesion, summary)
            for number, lesion in enumerate(lesions, start=1)
        ],
        series_instance_uid=hd.UID(),
        series_number=SEGMENTATION_SERIES_NUMBER,
        series_description="rectvlm outlines (research use only)",
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MANUFACTURER,
        software_versions=summary.version,
        device_serial_number=describe_model(summary),
        content_label="RECTVLM_LESIONS",
        content_description=summary.disclaimer,
        specific_character_set=CHARACTER_SET,
    )


def require_reference(header: Dataset) -> None:
    """Refuse a series without the UIDs by which results find it.

    Raises:
        UserError: it has no study or no frame of reference.
    """
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
        if not header.get(keyword):
            raise UserError(
                f"the series cannot be referred to: expected a {keyword}, found none; export it "
                "again."
            )


def match_planes(
    headers: Sequence[Dataset], affine: Affine, shape: Sequence[int]
) -> NDArray[np.intp]:
    """Index k of the plane of a volume (i, j, k) that lies on each slice of the source.

    The slices' own positions decide, not their order. Where a volume was resampled because of
    uneven slices, the nearest plane is taken.

    Args:
        headers: one for each slice, or one of an enhanced CT with a frame for each slice.
        affine: 4 × 4, index (i, j, k, 1) to world, RAS mm.
        shape: of the volume.

    Raises:
        UserError: the volume is not on the slices' grid.
    """
    to_index = np.linalg.inv(affine)
    indexes = []
    for plane in read_planes(headers):
        index = to_index @ [*plane.position, 1]
        nearest = round(float(index[2]))
        offset_mm = np.linalg.norm(affine[:3, :2] @ index[:2])
        axes_error = np.abs(plane.axes - affine[:3, :2]).max()
        is_on_grid = offset_mm <= _MAX_OFFSET_MM and 0 <= nearest < shape[2]
        spacing = np.linalg.norm(affine[:3, :2], axis=0).max()
        if not is_on_grid or axes_error > _MAX_DIRECTION_ERROR * spacing:
            raise UserError(
                "the outlines are not on the slices of the series: expected its positions, found "
                f"a slice {offset_mm:.3g} mm beside plane {nearest + 1} of {shape[2]}; report it."
            )
        indexes.append(nearest)
    return np.array(indexes, dtype=np.intp)


def read_planes(headers: Sequence[Dataset]) -> list[PlaneGeometry]:
    """Positions of the slices of a source, each by its own header, in the order of the headers."""
    if "PerFrameFunctionalGroupsSequence" not in headers[0]:
        return [_read_plane(header, header, header) for header in headers]
    (enhanced,) = headers
    shared = enhanced.get("SharedFunctionalGroupsSequence") or [Dataset()]
    planes = []
    for frame in enhanced.PerFrameFunctionalGroupsSequence:
        groups = []
        for keyword in ("PlanePosition", "PlaneOrientation", "PixelMeasures"):
            holder = frame if f"{keyword}Sequence" in frame else shared[0]
            groups.append(holder[f"{keyword}Sequence"][0])
        planes.append(_read_plane(*groups))
    return planes


def describe_model(summary: CaseSummary) -> str:
    """Name of the model in DICOM objects: a path would not belong there."""
    return f"{summary.config} step {summary.step}"[:64]


def to_dicom_code(code: SnomedCode) -> Code:
    """A concept of SNOMED CT as DICOM writes it."""
    return Code(code.value, "SCT", code.meaning)


def _read_plane(position: Dataset, orientation: Dataset, measures: Dataset) -> PlaneGeometry:
    cosines = np.array(orientation.ImageOrientationPatient, dtype=float).reshape(2, 3)
    row_distance, column_distance = map(float, measures.PixelSpacing)
    steps = cosines * [[column_distance], [row_distance]] * _LPS_TO_RAS
    corner = np.array(position.ImagePositionPatient, dtype=float) * _LPS_TO_RAS
    return PlaneGeometry(corner, steps.T)


def _describe_segment(number: int, lesion: Lesion, summary: CaseSummary) -> SegmentDescription:
    """Description of a segment, without the organ where the lesion does not lie in it."""
    rows = [row for row in summary.lesions or [] if row.key == lesion.key]
    is_elsewhere = any(row.plausible is False for row in rows)
    return SegmentDescription(
        segment_number=number,
        segment_label=lesion.name,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=to_dicom_code(LESION_CODES[lesion.key]),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=MANUFACTURER,
            family=codes.DCM.ArtificialIntelligence,
            version=summary.version,
            source=MANUFACTURER,
            parameters={"model": describe_model(summary)},
        ),
        tracking_uid=hd.UID(),
        tracking_id=lesion.name,
        anatomic_regions=None if is_elsewhere else [to_dicom_code(site_code(lesion))],
        display_color=CIELabColor.from_string(lesion.colour),
    )
