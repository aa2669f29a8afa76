"""DICOM series become volumes on the right side, or are refused by name."""

import copy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import dicom_files
import nibabel as nib
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless, RLELossless, generate_uid

from rectvlm.data.dicom.pixels import rescale
from rectvlm.data.volume import read_volume
from rectvlm.types import InputError, Volume
from tests.data.chest_volume import RAS, chest, paint_chest

TILT = 0.25
"""Sideways millimetres for each along the body: a gantry tilted by 14°."""


def chest_in_orientation(code: str) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """The chest with its axes in another order and direction."""
    hu, _ = chest()
    orientations = nib.orientations
    turn = orientations.ornt_transform(
        orientations.io_orientation(RAS), orientations.axcodes2ornt(tuple(code))
    )
    turned = np.ascontiguousarray(orientations.apply_orientation(hu, turn))
    return turned, RAS @ orientations.inv_ornt_aff(turn, hu.shape)


def require_painted(volume: Volume) -> None:
    """Each voxel holds what lies at its place in the world: side, order and spacing are right."""
    expected, _ = paint_chest(volume.affine, volume.array.shape)
    is_equal = np.abs(volume.array - expected) <= 1
    assert is_equal.mean() > 0.998


@pytest.mark.parametrize(
    "code", ["LPS", "LPI", "RAS", "RPI", "RAI", "PIR", "PIL", "LIA", "LIP", "ASL"]
)
def test_every_orientation_lies_where_it_lay(tmp_path: Path, code: str) -> None:
    hu, affine = chest_in_orientation(code)
    volume = read_volume(dicom_files.write_series(hu, affine, tmp_path / "series"))
    assert volume.array.dtype == np.int16 and sorted(volume.array.shape) == sorted(hu.shape)
    require_painted(volume)


def test_an_oblique_series_without_suffixes_lies_where_it_lay(tmp_path: Path) -> None:
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:3, :3] = [
        [np.cos(angle), -np.sin(angle), 0],
        [np.sin(angle), np.cos(angle), 0],
        [0, 0, 1],
    ]
    centre = np.eye(4)
    centre[2, 3] = 1020
    affine = centre @ turn @ nib.affines.from_matvec(np.eye(3), [0, 0, 0]) @ np.linalg.inv(centre)
    affine = affine @ RAS
    hu = np.rint(paint_chest(affine, (44, 40, 16))[0]).astype(np.int16)
    folder = dicom_files.write_series(hu, affine, tmp_path / "s", suffix="")
    volume = read_volume(folder)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    require_painted(volume)


def test_a_tilted_gantry_stays_in_the_affine(tmp_path: Path) -> None:
    affine = RAS.copy()
    affine[1, 2] = TILT * affine[2, 2]
    hu = np.rint(paint_chest(affine, (44, 40, 16))[0]).astype(np.int16)
    volume = read_volume(dicom_files.write_series(hu, affine, tmp_path / "s"))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    require_painted(volume)


def test_uneven_slices_are_resampled_at_their_true_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A ramp along the body: linear interpolation gives it back, file order would not."""
    positions = np.arange(16) * 16.0 + np.array([0, *([2, -1, 3, -2, 0, 3, -1] * 2), 0])
    hu = np.broadcast_to(np.rint(positions * 4), (44, 40, 16)).astype(np.int16)

    def move(dataset: Dataset, number: int) -> None:
        dataset.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], positions[number]]

    volume = read_volume(dicom_files.write_series(hu, RAS, tmp_path / "s", move))
    z = volume.affine[2, 2] * np.arange(volume.array.shape[2])
    assert z[-1] == pytest.approx(positions[-1]) and "resampled every" in caplog.text
    assert np.abs(volume.array - 4 * z).max() <= 1


@pytest.mark.parametrize(("step_mm", "off_mm"), [(1.0, 0.05), (16.0, 0.3)])
def test_slices_off_by_rounding_are_even(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step_mm: float, off_mm: float
) -> None:
    hu, _ = chest()
    affine = RAS.copy()
    affine[2, 2] = step_mm
    datasets = dicom_files.make_slices(hu, affine)
    datasets[5].ImagePositionPatient[2] += off_mm
    volume = read_volume(dicom_files.write_slices(datasets, tmp_path / "s"))
    assert "resampled" not in caplog.text and volume.affine[2, 2] == pytest.approx(step_mm)
    np.testing.assert_array_equal(volume.array, hu)


def test_each_slice_has_its_own_scaling(tmp_path: Path) -> None:
    hu, _ = chest()
    series, study = generate_uid(), generate_uid()
    uids = {"series_uid": series, "study_uid": study}
    halves = dicom_files.make_slices(hu // 2 * 2, RAS, slope=2, intercept=-1100, **uids)
    units = dicom_files.make_slices(hu // 2 * 2, RAS, **uids)
    mixed = [*halves[:7], *units[7:]]
    volume = read_volume(dicom_files.write_slices(mixed, tmp_path / "whole"))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, hu // 2 * 2)
    fractions = dicom_files.write_series(hu, RAS, tmp_path / "fractions", slope=0.25)
    volume = read_volume(fractions)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, hu)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1024.5), (0.5, -1025.0)])
def test_half_units_are_kept(slope: float, intercept: float) -> None:
    hu = rescale(np.array([0, 1], np.int16), slope, intercept)
    assert hu.dtype == np.float32
    np.testing.assert_array_equal(hu, [intercept, intercept + slope])


def test_hu_beyond_16_bits_are_not_wrapped(tmp_path: Path) -> None:
    hu, _ = chest()
    datasets = dicom_files.make_slices(hu, RAS, intercept=-1024)
    dicom_files.set_pixels(datasets[5], np.full((40, 44), 40000, np.uint16))
    array = read_volume(dicom_files.write_slices(datasets, tmp_path / "s")).array
    assert (array[..., 5] == 38976).all()
    np.testing.assert_array_equal(np.delete(array, 5, axis=2), np.delete(hu, 5, axis=2))


def test_padding_far_above_all_hu_becomes_air(tmp_path: Path) -> None:
    hu, _ = chest()

    def pad(dataset: Dataset, _number: int) -> None:
        stored = np.frombuffer(dataset.PixelData, np.uint16).reshape(40, 44).copy()
        stored[:3] = 63536
        dataset_padding = stored
        dicom_files.set_pixels(dataset, dataset_padding)
        dataset.PixelPaddingValue = 63536

    volume = read_volume(dicom_files.write_series(hu, RAS, tmp_path / "s", pad))
    assert (volume.array[:, :3] == -1024).all()
    np.testing.assert_array_equal(volume.array[:, 3:], hu[:, 3:])


def compress_by_pydicom(syntax: str) -> Callable[[Path, Path], None]:
    def compress(file: Path, target: Path) -> None:
        dataset = pydicom.dcmread(file)
        dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(target)

    return compress


def compress_by_dcmtk(program: str) -> Callable[[Path, Path], None]:
    def compress(file: Path, target: Path) -> None:
        if shutil.which(program) is None:
            pytest.skip(f"{program} of DCMTK is not installed")
        subprocess.run([program, file, target], check=True)

    return compress


@pytest.mark.parametrize(
    "compress",
    [
        *(compress_by_pydicom(RLELossless), compress_by_pydicom(JPEG2000Lossless)),
        *(compress_by_dcmtk("dcmcjpeg"), compress_by_dcmtk("dcmcjpls")),
    ],
    ids=["RLE", "JPEG 2000", "JPEG lossless", "JPEG-LS"],
)
def test_compressed_series_equal_the_plain_one(
    tmp_path: Path, compress: Callable[[Path, Path], None]
) -> None:
    hu, _ = chest()
    plain = dicom_files.write_series(hu, RAS, tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    for file in plain.iterdir():
        compress(file, tmp_path / "packed" / file.name)
    volume = read_volume(tmp_path / "packed")
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, hu)
    require_painted(volume)


def test_an_enhanced_ct_is_one_file_of_all_slices(tmp_path: Path) -> None:
    hu, _ = chest()
    datasets = dicom_files.make_slices(hu, RAS)
    order = np.random.default_rng(0).permutation(len(datasets))
    enhanced = dicom_files.make_enhanced([datasets[index] for index in order])
    enhanced.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    volume = read_volume(tmp_path / "enhanced.dcm")
    np.testing.assert_array_equal(volume.array, hu)
    require_painted(volume)


def test_equal_slices_at_one_position_are_used_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hu, _ = chest()
    folder = dicom_files.write_series(hu, RAS, tmp_path / "s")
    for number in range(3):
        shutil.copy(folder / f"IM000{number}.dcm", folder / f"copy{number}.dcm")
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array, hu)
    assert "3 slices are there twice, used once" in caplog.text


def test_a_file_stands_for_its_series_and_a_dicomdir_for_its_folder(tmp_path: Path) -> None:
    hu, _ = chest()
    dicom_files.write_series(hu, RAS, tmp_path / "a" / "b", suffix="")
    other = dicom_files.write_series(hu - 7, RAS, tmp_path / "other", series_number=4)
    for file in other.iterdir():
        shutil.copy(file, tmp_path / "a" / "b" / f"other-{file.name}")
    (tmp_path / "a" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    by_file = read_volume(tmp_path / "a" / "b" / "other-IM0000.dcm")
    np.testing.assert_array_equal(by_file.array, hu - 7)
    shutil.rmtree(other)
    for file in (tmp_path / "a" / "b").glob("other*"):
        file.unlink()
    np.testing.assert_array_equal(read_volume(tmp_path / "a" / "DICOMDIR").array, hu)


def _without_a_slice(datasets: list[Dataset]) -> None:
    del datasets[5]


def _single(datasets: list[Dataset]) -> None:
    del datasets[1:]


def _doubled(datasets: list[Dataset]) -> None:
    datasets.append(copy.deepcopy(datasets[4]))
    datasets[-1].PixelData = datasets[5].PixelData


def _two_sizes(datasets: list[Dataset]) -> None:
    stored = np.frombuffer(datasets[3].PixelData, np.uint16).reshape(40, 44)
    dicom_files.set_pixels(datasets[3], stored[:20])


def _two_spacings(datasets: list[Dataset]) -> None:
    datasets[3].PixelSpacing = [7, 8]


def _two_orientations(datasets: list[Dataset]) -> None:
    datasets[3].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def _crooked(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        dataset.ImageOrientationPatient = [1, 0, 0, 0.6, 0.8, 0]


def _two_patients(datasets: list[Dataset]) -> None:
    datasets[3].PatientID = "SECRETID-0815"


def _sideways(datasets: list[Dataset]) -> None:
    x, y, z = datasets[3].ImagePositionPatient
    datasets[3].ImagePositionPatient = [x + 5, y, z]


def _interleaved(datasets: list[Dataset]) -> None:
    x, y, z = datasets[3].ImagePositionPatient
    datasets[3].ImagePositionPatient = [x, y, z + 13]


def _cut(datasets: list[Dataset]) -> None:
    datasets[3].PixelData = datasets[3].PixelData[:-100]


def _absurd(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        dataset.Rows = dataset.Columns = 65535


def _absurd_and_packed(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.Rows = dataset.Columns = 65535


def _other_size_in_the_stream(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.Rows, dataset.Columns = 80, 44


def _unknown_codec(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"


def _colours(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        dataset.PhotometricInterpretation = "PALETTE COLOR"


def _no_position(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        del dataset.ImagePositionPatient


def _dose_sheets(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        dataset.Modality = "SR"


def _localizers(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def _two_studies(datasets: list[Dataset]) -> None:
    for dataset in datasets[8:]:
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.4"


REFUSED = {
    "missing": (
        _without_a_slice,
        r"missing slices: expected a slice every 16 mm, found a gap of 32",
    ),
    "single": (_single, "is a single slice"),
    "doubled": (_doubled, "different slices at one position"),
    "two_sizes": (_two_sizes, "slices of several sizes.*20 × 44, 40 × 44"),
    "two_spacings": (_two_spacings, "several pixel spacings.*7 to 8 mm"),
    "two_orientations": (_two_orientations, "several orientations"),
    "crooked": (_crooked, "has no valid orientation"),
    "two_patients": (_two_patients, "several patients in one series"),
    "sideways": (_sideways, "shifted sideways.*5 mm beside"),
    "interleaved": (_interleaved, "irregular distances|missing slices"),
    "cut": (_cut, "cut short or damaged"),
    "absurd": (_absurd, "is cut short: expected 8589672450 bytes"),
    "absurd_and_packed": (_absurd_and_packed, "asks for too much"),
    "other_size": (_other_size_in_the_stream, "cannot be decoded|another size"),
    "unknown_codec": (_unknown_codec, "cannot be decoded.*High-Throughput"),
    "colours": (_colours, "colour picture .PALETTE COLOR"),
    "no_position": (_no_position, "no position in the patient"),
    "dose_sheets": (_dose_sheets, "structured report, such as a dose sheet"),
    "localizers": (_localizers, r"is a localizer \(scout\)"),
    "two_studies": (_two_studies, "2 studies of 1 patients"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_volume_is_refused_by_name(tmp_path: Path, name: str) -> None:
    spoil, words = REFUSED[name]
    datasets = dicom_files.make_slices(chest()[0], RAS)
    spoil(datasets)
    folder = dicom_files.write_slices(datasets, tmp_path / "series")
    with pytest.raises(InputError, match=words) as error:
        read_volume(folder)
    message = str(error.value)
    assert str(folder) in message and message.endswith(".") and "\n" not in message
    assert not any(word in message for word in dicom_files.PERSONAL_WORDS)


def test_a_damaged_header_gives_a_user_error_or_a_volume(tmp_path: Path) -> None:
    hu, _ = chest()
    folder = dicom_files.write_series(hu[:, :, :3], RAS, tmp_path / "s")
    file = folder / "IM0001.dcm"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        spoilt = bytearray(whole)
        for place in rng.integers(132, 1400, 3):
            spoilt[place] = rng.integers(256)
        file.write_bytes(spoilt)
        try:
            volume = read_volume(folder)
        except InputError:
            continue
        assert volume.array.ndim == 3
