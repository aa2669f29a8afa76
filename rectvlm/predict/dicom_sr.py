"""Measurements and report of a case as DICOM Structured Reports, preliminary and unverified.

The measurement report follows TID 1500 of DICOM PS3.16, the text report TID 2000.
"""

from collections.abc import Sequence
from typing import Any

import highdicom as hd
import numpy as np
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    Comprehensive3DSR,
    ContainerContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    FindingSite,
    LanguageOfContentItemAndDescendants,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    ReferencedSegment,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    SourceImageForSegmentation,
    TextContentItem,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import BasicTextSRStorage, generate_uid

from rectvlm.files import remove_control_characters
from rectvlm.labels import LESION_BY_KEY
from rectvlm.predict.case_summary import CaseSummary, LesionSummary
from rectvlm.predict.dicom_seg import (
    CHARACTER_SET,
    MANUFACTURER,
    PlaneGeometry,
    describe_model,
    read_planes,
    require_reference,
    to_dicom_code,
)
from rectvlm.predict.lesion_codes import LESION_CODES, SIDE_CODES, lobe_codes, site_code
from rectvlm.predict.lesion_table import LesionComponent

_MeasurementGroup = (
    VolumetricROIMeasurementsAndQualitativeEvaluations | MeasurementsAndQualitativeEvaluations
)
MEASUREMENTS_SERIES_NUMBER = 9002
REPORT_SERIES_NUMBER = 9003
_CHEST_CT = Code("24627-2", "LN", "CT Chest")
_ENGLISH = CodedConcept("en", "RFC5646", "English")
_MILLILITRE = Code("mL", "UCUM", "mL")
_MILLIMETRE = Code("mm", "UCUM", "mm")
_HOUNSFIELD_UNIT = Code("[hnsf'U]", "UCUM", "Hounsfield unit")
_DEVICE_ROOT = "rectvlm device observer"


def make_measurement_report(
    segmentation: hd.seg.Segmentation, headers: Sequence[Dataset], summary: CaseSummary
) -> Comprehensive3DSR:
    """Make the TID 1500 report of a case's lesions.

    A group for each segment has the volume of the kind, its longest axial diameter, its site and
    its approximate lobes.
    Where a kind has several lesions, each lesion has a group of its own, which refers to the slice
    through its centre: a segment is all lesions of its kind.

    Args:
        segmentation: of the case.
        headers: of the source.
        summary: of the case, with lesions.
    """
    assert summary.lesions is not None and summary.components is not None
    planes = read_planes(headers)
    groups: list[_MeasurementGroup] = []
    for segment in segmentation.SegmentSequence:
        lesion = next(row for row in summary.lesions if row.name == segment.SegmentLabel)
        components = [row for row in summary.components if row.lesion == lesion.key]
        groups.append(_measure_segment(segmentation, segment, lesion, components, summary))
        if not _is_single_lesion(components, lesion):
            for row in components:
                image = _refer_to_slice(row.centre_mm, planes, headers)
                groups.append(_measure_component(row, image, summary))
    content = MeasurementReport(
        observation_context=_make_context(summary),
        procedure_reported=_CHEST_CT,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
        language_of_content_item_and_descendants=LanguageOfContentItemAndDescendants(_ENGLISH),
    )
    return Comprehensive3DSR(
        evidence=[segmentation, *headers],
        content=content,
        series_number=MEASUREMENTS_SERIES_NUMBER,
        series_description="rectvlm measurements (research use only)",
        **_common_elements(summary),
    )


def make_text_report(headers: Sequence[Dataset], summary: CaseSummary) -> EnhancedSR:
    """Make the Basic Text SR of the generated report: findings and impression.

    Raises:
        UserError: the source lacks UIDs.
    """
    assert summary.report is not None
    require_reference(headers[0])
    root = ContainerContentItem(codes.LN.DiagnosticImagingReport, template_id="2000")
    root.ContentSequence = ContentSequence()
    root.ContentSequence.extend(LanguageOfContentItemAndDescendants(_ENGLISH))
    for item in _make_context(summary):
        root.ContentSequence.append(item)
    root.ContentSequence.append(_make_text(codes.DCM.Comment, summary.disclaimer))
    sections = (
        (codes.DCM.Findings, codes.DCM.Finding, summary.report["findings"]),
        (codes.DCM.Impressions, codes.DCM.Impression, summary.report["impression"]),
    )
    for heading, name, text in sections:
        if text:
            section = ContainerContentItem(
                heading, relationship_type=RelationshipTypeValues.CONTAINS
            )
            section.ContentSequence = ContentSequence([_make_text(name, text)])
            root.ContentSequence.append(section)
    report = EnhancedSR(
        evidence=headers,
        content=root,
        series_number=REPORT_SERIES_NUMBER,
        series_description="rectvlm report (research use only)",
        **_common_elements(summary),
    )
    # highdicom has no class for it; the content is what Basic Text SR allows.
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    return report


def _measure_segment(
    segmentation: hd.seg.Segmentation,
    segment: Dataset,
    lesion: LesionSummary,
    components: Sequence[LesionComponent],
    summary: CaseSummary,
) -> VolumetricROIMeasurementsAndQualitativeEvaluations:
    """Group of one segment, whose longest diameter is that of its longest lesion."""
    measurements = [_measure_volume(lesion.volume_ml)]
    if components:
        longest_mm = max(row.longest_axial_diameter_mm for row in components)
        measurements.append(_measure_long_axis(longest_mm))
    if _is_single_lesion(components, lesion):
        measurements.append(_measure_mean_hu(components[0].mean_hu))
    return VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(segment.TrackingUID, segment.TrackingID),
        referenced_segment=_refer_to_segment(segmentation, int(segment.SegmentNumber)),
        finding_type=to_dicom_code(LESION_CODES[lesion.key]),
        algorithm_id=_identify_algorithm(summary),
        finding_sites=_list_sites(lesion.key, lesion),
        measurements=measurements,
    )


def _is_single_lesion(components: Sequence[LesionComponent], lesion: LesionSummary) -> bool:
    """Whether a segment is one lesion; small ones may not be among the components."""
    return len(components) == 1 and components[0].voxels == lesion.voxels


def _refer_to_segment(segmentation: Dataset, number: int) -> ReferencedSegment:
    """Reference to a segment, with the slices that it lies on.

    `ReferencedSegment.from_segmentation` fails where all frames are of one segment, whose number
    then stands in the shared groups.
    """
    (shared,) = segmentation.SharedFunctionalGroupsSequence
    images = []
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        holder = frame if "SegmentIdentificationSequence" in frame else shared
        if holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber != number:
            continue
        holder = frame if "DerivationImageSequence" in frame else shared
        source = holder.DerivationImageSequence[0].SourceImageSequence[0]
        frame_number = source.get("ReferencedFrameNumber")
        frames = None if frame_number is None else [int(frame_number)]
        uids = (source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID)
        images.append(SourceImageForSegmentation(*uids, frames))
    uids = (segmentation.SOPClassUID, segmentation.SOPInstanceUID)
    return ReferencedSegment(*uids, number, source_images=images)


def _measure_component(
    row: LesionComponent, image: SourceImageForMeasurementGroup, summary: CaseSummary
) -> MeasurementsAndQualitativeEvaluations:
    """Group of one of several lesions of a kind."""
    name = f"{LESION_BY_KEY[row.lesion].name} {row.number}"
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(hd.UID(), name),
        finding_type=to_dicom_code(LESION_CODES[row.lesion]),
        algorithm_id=_identify_algorithm(summary),
        finding_sites=_list_sites(row.lesion, row),
        measurements=[
            _measure_volume(row.volume_ml),
            _measure_long_axis(row.longest_axial_diameter_mm),
            _measure_mean_hu(row.mean_hu),
        ],
        source_images=[image],
    )


def _measure_volume(volume_ml: float) -> Measurement:
    return Measurement(codes.SCT.Volume, round(volume_ml, 4), _MILLILITRE)


def _measure_long_axis(diameter_mm: float) -> Measurement:
    return Measurement(codes.SCT.LongAxis, diameter_mm, _MILLIMETRE)


def _measure_mean_hu(mean_hu: float) -> Measurement:
    attenuation = codes.DCM.AttenuationCoefficient
    return Measurement(attenuation, mean_hu, _HOUNSFIELD_UNIT, derivation=codes.SCT.Mean)


def _list_sites(key: str, row: LesionSummary | LesionComponent) -> list[FindingSite]:
    """Organ and side of a lesion, then its lobes; none where it is not in the organ of its kind."""
    if row.plausible is False:
        return []
    lesion = LESION_BY_KEY[key]
    laterality = None
    if row.side is not None and lesion.site != "pericardium":
        laterality = to_dicom_code(SIDE_CODES[row.side])
    sites = [FindingSite(to_dicom_code(site_code(lesion)), laterality)]
    for lobe in row.approximate_lobes or ():
        sites.append(FindingSite(*map(to_dicom_code, lobe_codes(lobe))))
    return sites


def _refer_to_slice(
    centre_mm: Sequence[float], planes: Sequence[PlaneGeometry], headers: Sequence[Dataset]
) -> SourceImageForMeasurementGroup:
    """Reference to the slice of the source that is nearest to a point, RAS mm."""
    distances = []
    for plane in planes:
        normal = np.cross(plane.axes[:, 0], plane.axes[:, 1])
        normal /= np.linalg.norm(normal)
        distances.append(abs(float(normal @ (np.array(centre_mm) - plane.position))))
    index = int(np.argmin(distances))
    is_enhanced = len(headers) == 1
    header = headers[0] if is_enhanced else headers[index]
    frames = [index + 1] if is_enhanced else None
    return SourceImageForMeasurementGroup(header.SOPClassUID, header.SOPInstanceUID, frames)


def _make_context(summary: CaseSummary) -> ObservationContext:
    """The software as the observer: its identifier is the same for one version and model."""
    entropy = [_DEVICE_ROOT, summary.version, describe_model(summary)]
    device = DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=entropy),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=f"{MANUFACTURER} {summary.version}",
        serial_number=describe_model(summary),
    )
    return ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device))


def _identify_algorithm(summary: CaseSummary) -> AlgorithmIdentification:
    """Model and cautions: a parameter is the one text that TID 1500 allows in each group."""
    parameters = [describe_model(summary), summary.disclaimer, summary.lobes_note]
    return AlgorithmIdentification(MANUFACTURER, summary.version, parameters)


def _make_text(name: Code, text: str) -> TextContentItem:
    """Text without control characters, which an untrained language model writes."""
    printable = remove_control_characters(text)
    return TextContentItem(name, printable, RelationshipTypeValues.CONTAINS)


def _common_elements(summary: CaseSummary) -> dict[str, Any]:
    """Arguments of every report: equipment, new UIDs, and that nobody has read it."""
    return {
        "series_instance_uid": hd.UID(),
        "sop_instance_uid": hd.UID(),
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MANUFACTURER,
        "software_versions": summary.version,
        "device_serial_number": describe_model(summary),
        "is_complete": False,
        "is_final": False,
        "is_verified": False,
        "specific_character_set": CHARACTER_SET,
    }
