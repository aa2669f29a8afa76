"""DICOM SEG and SR: outlines on the right voxels, the right patient, read back by other programs.

Positions are computed here from the written files alone, not by the code that wrote them.
"""

import itertools
import logging
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import dicom_files
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from rectvlm.data.dicom.series import list_series
from rectvlm.data.dicom.volume import read_series
from rectvlm.labels import LESION_BY_KEY
from rectvlm.predict import dicom_results
from rectvlm.predict.case import PredictedCase
from rectvlm.predict.lesion_codes import LESION_CODES
from rectvlm.types import HuConversion, Volume
from tests.predict.small_summary import REPORT, make_summary
from tests.small_cases import AFFINE, body

highdicom = pytest.importorskip("highdicom", reason="highdicom is not installed")
NODULE = LESION_BY_KEY["lung_nodule"].mask_value
CONSOLIDATION = LESION_BY_KEY["consolidation"].mask_value
PLEURAL = LESION_BY_KEY["pleural_effusion"].mask_value


def read_with_headers(folder: Path) -> Volume:
    (series,) = list_series(sorted(folder.iterdir())).series
    return read_series(series, folder, with_headers=True)


def draw(volume: Volume, points: np.ndarray, value: int = NODULE) -> np.ndarray:
    """Bits with a voxel at each point (N, 3), RAS mm."""
    bits = np.zeros(volume.array.shape, np.uint8)
    index = np.linalg.inv(volume.affine) @ np.c_[points, np.ones(len(points))].T
    bits[tuple(np.rint(index[:3]).astype(int))] |= value
    return bits


def write_results(volume: Volume, bits: np.ndarray, folder: Path, **changes: object) -> Path:
    """The DICOM objects of outlines."""
    hu = volume.array.astype(np.int16)
    summary = replace(make_summary(bits, hu, volume.affine), **changes)
    case = PredictedCase(
        "ct-1", volume, hu, HuConversion(1, 0, "DICOM"), np.eye(4), {}, bits, "text"
    )
    folder.mkdir(parents=True, exist_ok=True)
    dicom_results.write_dicom_results(case, summary, folder)
    return folder


def segmented_points(segmentation: Dataset, number: int = 1) -> np.ndarray:
    """Centres of a segment's voxels (N, 3), RAS mm, by the file's own geometry."""
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(
        2, 3
    )
    row_step, column_step = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    frames = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
    points = []
    for frame, group in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        holder = group if "SegmentIdentificationSequence" in group else shared
        if holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber != number:
            continue
        corner = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in np.argwhere(frame):
            points.append(corner + column * column_step * cosines[0] + row * row_step * cosines[1])
    return np.array(points) * [-1, -1, 1]


def sort_points(points: np.ndarray) -> np.ndarray:
    rounded = points.round(2)
    return points[np.lexsort(rounded.T)]


def make_affines() -> list[np.ndarray]:
    """48 orientations of a grid with three spacings, three oblique ones, and a tilted gantry."""
    affines = []
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = 0
            for column, (axis, sign, mm) in enumerate(
                zip(axes, signs, (0.7, 1.1, 2.5), strict=True)
            ):
                affine[axis, column] = sign * mm
            affine[:3, 3] = (-31.4, 27.2, 105.9)
            affines.append(affine)
    for angles in ((0.2, 0.1, -0.3), (-0.6, 0.5, 0.4), (1.2, -0.8, 0.7)):
        turn = np.eye(3)
        for axis, angle in enumerate(angles):
            rotation = np.eye(3)
            one, two = [other for other in range(3) if other != axis]
            rotation[one, one] = rotation[two, two] = np.cos(angle)
            rotation[one, two], rotation[two, one] = -np.sin(angle), np.sin(angle)
            turn = rotation @ turn
        affine = affines[0].copy()
        affine[:3, :3] = turn @ affine[:3, :3]
        affines.append(affine)
    tilted = affines[0].copy()
    tilted[:3, 2] += 0.4 * tilted[:3, 1]
    return [*affines, tilted]


def test_outlines_lie_where_they_were_drawn_for_all_orientations(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 500, (6, 5, 4)).astype(np.int16)
    drawn = np.array([[0, 1, 0], [5, 1, 1], [2, 4, 1], [3, 2, 3], [4, 2, 3]])
    from rectvlm.predict.dicom_seg import make_segmentation

    affines = make_affines()
    assert len(affines) == 52
    for number, affine in enumerate(affines):
        folder = dicom_files.write_series(hu, affine, tmp_path / str(number))
        volume = read_with_headers(folder)
        points = (affine @ np.c_[drawn, np.ones(len(drawn))].T)[:3].T
        bits = draw(volume, points)
        summary = make_summary(bits, volume.array.astype(np.int16), volume.affine)
        order = np.random.default_rng(number).permutation(hu.shape[2])
        headers = [volume.dicom_headers[index] for index in order]
        made = make_segmentation(bits, volume.affine, headers, summary)
        made.save_as(folder / "seg")
        segmentation = pydicom.dcmread(folder / "seg")
        np.testing.assert_allclose(
            sort_points(segmented_points(segmentation)), sort_points(points), atol=0.01
        )
        positions = {
            header.SOPInstanceUID: header.ImagePositionPatient for header in volume.dicom_headers
        }
        for group in segmentation.PerFrameFunctionalGroupsSequence:
            (source,) = group.DerivationImageSequence[0].SourceImageSequence
            position = group.PlanePositionSequence[0].ImagePositionPatient
            assert positions[source.ReferencedSOPInstanceUID] == position


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Volume, np.ndarray]:
    """DICOM objects of a case with four lesions of three kinds, two of which overlap."""
    folder = tmp_path_factory.mktemp("results")

    def set_name(dataset: Dataset, _number: int) -> None:
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName, dataset.StudyDescription = "Müller^Jörg", "Thorax für Prüfung"

    dicom_files.write_series(body(1)[0], AFFINE, folder / "in", set_name)
    volume = read_with_headers(folder / "in")
    bits = np.zeros(volume.array.shape, np.uint8)
    bits[5:8, 9:13, 2:5] |= NODULE
    bits[16:18, 10:12, 6:8] |= NODULE
    bits[4:9, 8:14, 2:6] |= CONSOLIDATION
    bits[14:19, 13:15, 1:4] |= PLEURAL
    return write_results(volume, bits, folder / "out"), volume, bits


def test_the_segmentation_has_a_coded_segment_for_each_kind_and_the_sources_patient(
    results,
) -> None:
    folder, volume, bits = results
    source = volume.dicom_headers[0]
    segmentation = highdicom.seg.segread(folder / dicom_results.SEGMENTATION_FILE)
    assert segmentation.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4"
    assert segmentation.SegmentationType == "BINARY"
    keys = ("pleural_effusion", "consolidation", "lung_nodule")
    for number, key in enumerate(keys, start=1):
        description = segmentation.get_segment_description(number)
        assert description.segmented_property_type.value == LESION_CODES[key].value
        assert description.segmented_property_type.scheme_designator == "SCT"
        assert description.algorithm_identification.version == "0.1.0"
        mask = bits & LESION_BY_KEY[key].mask_value
        assert len(segmented_points(segmentation, number)) == np.count_nonzero(mask)
    for keyword in (
        *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID"),
        *("StudyDate", "StudyDescription", "FrameOfReferenceUID"),
    ):
        assert segmentation[keyword].value == source[keyword].value, keyword
    assert segmentation.SeriesInstanceUID != source.SeriesInstanceUID
    assert "Research use only" in segmentation.ContentDescription
    by_source = segmentation.get_pixels_by_source_instance(
        source_sop_instance_uids=[header.SOPInstanceUID for header in volume.dicom_headers],
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(by_source[..., 2] > 0, (bits & NODULE).transpose(2, 1, 0) > 0)


def test_the_measurement_report_has_volume_diameter_and_site_of_each_lesion(results) -> None:
    folder, volume, bits = results
    report = highdicom.sr.srread(folder / dicom_results.MEASUREMENTS_FILE)
    assert report.VerificationFlag == "UNVERIFIED" and report.CompletionFlag == "PARTIAL"
    assert report.PatientName == "Müller^Jörg"
    segmentation = pydicom.dcmread(folder / dicom_results.SEGMENTATION_FILE)
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert len(groups) == 3
    voxel_ml = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    for segment, group in zip(segmentation.SegmentSequence, groups, strict=True):
        reference = group.referenced_segment
        assert reference.referenced_sop_instance_uid == segmentation.SOPInstanceUID
        assert reference.referenced_segment_numbers == [segment.SegmentNumber]
        assert group.tracking_uid == segment.TrackingUID
        (measured,) = group.get_measurements(
            name=highdicom.sr.CodedConcept("118565006", "SCT", "V")
        )
        key = segment.SegmentLabel.replace(" ", "_")
        voxels = np.count_nonzero(bits & LESION_BY_KEY[key].mask_value)
        assert measured.value == pytest.approx(voxels * voxel_ml, rel=1e-4)
        assert measured.unit.value == "mL"
    singles = report.content.get_image_measurement_groups()
    assert [group.tracking_identifier for group in singles] == ["lung nodule 1", "lung nodule 2"]
    (long_axis,) = singles[1].get_measurements(
        name=highdicom.sr.CodedConcept("103339001", "SCT", "Long axis")
    )
    assert long_axis.value == pytest.approx(14 * np.hypot(1, 2), abs=0.1)
    sites = [group.finding_sites[0] for group in singles]
    assert [site.value.value for site in sites] == ["39607008", "39607008"]
    # The first nodule is at large x of the RAS world.
    assert [site.laterality.meaning for site in sites] == ["Right", "Left"]


def test_the_measurement_report_has_the_lobes_after_the_organ_and_says_that_they_are_approximate(
    results, tmp_path: Path
) -> None:
    _, volume, _ = results
    bits = np.zeros(volume.array.shape, np.uint8)
    bits[5:8, 9:13, 2:5] = NODULE
    summary = make_summary(bits, volume.array.astype(np.int16), volume.affine)
    lobes = ("right lower lobe", "right middle lobe")
    nodules = [replace(row, approximate_lobes=lobes) for row in summary.lesions if row.voxels]
    folder = write_results(volume, bits, tmp_path, lesions=nodules)
    report = highdicom.sr.srread(folder / dicom_results.MEASUREMENTS_FILE)
    (group,) = report.content.get_volumetric_roi_measurement_groups()
    sites = [(site.value.value, site.laterality.meaning) for site in group.finding_sites]
    assert sites == [("39607008", "Right"), ("90572001", "Right"), ("72481006", "Right")]
    assert b"Lobes are approximate" in (folder / dicom_results.MEASUREMENTS_FILE).read_bytes()


def test_the_text_report_has_findings_and_impression(results) -> None:
    folder = results[0]
    report = pydicom.dcmread(folder / dicom_results.REPORT_SR_FILE)
    assert report.SOPClassUID.name == "Basic Text SR Storage"
    assert report.VerificationFlag == "UNVERIFIED" and report.CompletionFlag == "PARTIAL"
    texts = [item.TextValue for item in report.ContentSequence if item.ValueType == "TEXT"]
    sections = [item for item in report.ContentSequence if item.ValueType == "CONTAINER"]
    assert any("Research use only" in text for text in texts)
    assert [section.ContentSequence[0].TextValue for section in sections] == [*REPORT.values()]


@pytest.mark.parametrize("name", dicom_results.DICOM_FILES)
def test_other_programs_read_the_objects_and_find_no_error(results, name: str) -> None:
    file = results[0] / name
    tools = [["dcmdump", "-q"], ["dcm2json"]] + [["dsrdump"]] * name.endswith(".sr.dcm")
    for tool in [*tools, ["dciodvfy", "-new"]]:
        if shutil.which(tool[0]) is None:
            package = "dicom3tools" if tool[0] == "dciodvfy" else "dcmtk"
            pytest.skip(f"{tool[0]} of the Debian package {package} is not installed")
        done = subprocess.run([*tool, str(file)], capture_output=True, text=True, errors="replace")
        errors = [line for line in done.stderr.splitlines() if line.startswith(("Error", "E:"))]
        assert done.returncode == 0 and not errors, (tool, errors)


def test_uneven_slices_get_the_outlines_at_their_own_positions(tmp_path: Path) -> None:
    steps = np.array([0, 2, 4.6, 6, 8.4, 10, 12.5, 14])

    def move(dataset: Dataset, number: int) -> None:
        dataset.ImagePositionPatient[2] = float(steps[number])

    hu = np.random.default_rng(0).integers(-1000, 500, (6, 5, 8)).astype(np.int16)
    dicom_files.write_series(hu, np.diag([1.0, 1, 2, 1]), tmp_path / "in", move)
    volume = read_with_headers(tmp_path / "in")
    bits = np.zeros(volume.array.shape, np.uint8)
    bits[2, 3, 3:6] = NODULE
    folder = write_results(volume, bits, tmp_path / "out")
    points = segmented_points(pydicom.dcmread(folder / dicom_results.SEGMENTATION_FILE))
    heights = np.unique(points[:, 2])
    assert set(heights.round(3)) <= set(steps)
    drawn = (volume.affine @ [[2] * 3, [3] * 3, [3, 4, 5], [1] * 3])[2]
    half_step = volume.affine[2, 2] / 2
    assert heights.min() >= drawn.min() - half_step and heights.max() <= drawn.max() + half_step
    inside = (steps > drawn.min()) & (steps < drawn.max())
    assert set(steps[inside]) <= set(heights.round(3))


def test_frames_of_an_enhanced_ct_are_referred_to(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 500, (6, 5, 4)).astype(np.int16)
    affine = np.diag([1.0, 1, 2, 1])
    slices = dicom_files.make_slices(hu, affine)
    enhanced = dicom_files.make_enhanced([slices[k] for k in (2, 0, 3, 1)])
    enhanced.FrameOfReferenceUID = "1.2.3.4"
    dicom_files.write_slices([enhanced], tmp_path / "in")
    volume = read_with_headers(tmp_path / "in")
    points = np.array([[1.0, 2, 0], [3, 4, 6]])
    folder = write_results(volume, draw(volume, points), tmp_path / "out")
    segmentation = pydicom.dcmread(folder / dicom_results.SEGMENTATION_FILE)
    np.testing.assert_allclose(sort_points(segmented_points(segmentation)), sort_points(points))
    assert (folder / dicom_results.MEASUREMENTS_FILE).is_file()


def test_a_case_without_outlines_or_report_has_no_object_of_them(tmp_path: Path) -> None:
    dicom_files.write_series(body(1)[0], AFFINE, tmp_path / "in")
    volume = read_with_headers(tmp_path / "in")
    empty = np.zeros(volume.array.shape, np.uint8)
    folder = write_results(volume, empty, tmp_path / "report")
    assert [path.name for path in folder.iterdir()] == [dicom_results.REPORT_SR_FILE]
    folder = write_results(volume, empty, tmp_path / "none", report=None)
    assert not list(folder.iterdir())


def test_what_a_series_lacks_is_named_without_its_patient(tmp_path: Path, caplog, capfd) -> None:
    def drop_frame_of_reference(dataset: Dataset, _number: int) -> None:
        del dataset.FrameOfReferenceUID

    def break_dates(dataset: Dataset, _number: int) -> None:
        dataset.PatientName, dataset.StudyDate = "SECRETNAME", "19010203SECRETID"

    for edit, words in (
        (drop_frame_of_reference, "expected a FrameOfReferenceUID, found none"),
        (break_dates, "break DICOM's rules"),
    ):
        source = tmp_path / edit.__name__
        dicom_files.write_series(body(1)[0], AFFINE, source / "in", edit)
        volume = read_with_headers(source / "in")
        bits = draw(volume, (AFFINE @ [[6], [10], [3], [1]])[:3].T)
        folder = write_results(volume, bits, source / "out")
        assert not list(folder.iterdir())
        assert words in caplog.text
    told = caplog.text + "".join(capfd.readouterr())
    assert not any(word in told for word in dicom_files.PERSONAL_WORDS)


def test_without_highdicom_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(dicom_results, "find_spec", lambda _name: None)
    dicom_results._has_highdicom.cache_clear()
    dicom_files.write_series(body(1)[0], AFFINE, tmp_path / "in")
    volume = read_with_headers(tmp_path / "in")
    bits = np.full(volume.array.shape, NODULE, np.uint8)
    caplog.set_level(logging.INFO)
    for name in ("one", "two"):
        assert not list(write_results(volume, bits, tmp_path / name).iterdir())
    dicom_results._has_highdicom.cache_clear()
    (message,) = [record.message for record in caplog.records if "highdicom" in record.message]
    assert "pip install 'rectvlm[dicom]'" in message


def test_missing_elements_that_may_be_empty_stop_nothing(tmp_path: Path) -> None:
    def edit(dataset: Dataset, _number: int) -> None:
        for keyword in ("AccessionNumber", "StudyID", "StudyTime", "PatientBirthDate"):
            delattr(dataset, keyword)
        dataset.PatientSex = "UNKNOWN"

    dicom_files.write_series(body(1)[0], AFFINE, tmp_path / "in", edit)
    volume = read_with_headers(tmp_path / "in")
    points = (AFFINE @ [[6], [10], [3], [1]])[:3].T
    folder = write_results(volume, draw(volume, points), tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == set(dicom_results.DICOM_FILES)
    report = pydicom.dcmread(folder / dicom_results.REPORT_SR_FILE)
    assert report.PatientID == dicom_files.PATIENT_ID and not report.PatientSex
