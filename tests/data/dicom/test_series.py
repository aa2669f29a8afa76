"""Which series of a study is the chest CT, by the stated rules."""

from pathlib import Path

import dicom_files
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from rectvlm.data.dicom.series import choose_chest_ct, list_series
from rectvlm.data.volume import read_volume
from rectvlm.types import InputError
from tests.data.chest_volume import RAS, chest
from tests.grids import reorder


def edit(**elements: object) -> dicom_files.Edit:
    def apply(dataset: Dataset, _number: int) -> None:
        for name, value in elements.items():
            setattr(dataset, name, value)

    return apply


CORONAL = edit(ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
DERIVED = edit(ImageType=["DERIVED", "SECONDARY", "MPR"])
WORSE = {
    "is axial": CORONAL,
    "names the chest": edit(BodyPartExamined="HEAD"),
    "is ORIGINAL and PRIMARY": DERIVED,
    "has the softer kernel": edit(ConvolutionKernel=["Bl57d", "3"]),
}


@pytest.mark.parametrize("reason", WORSE)
def test_a_series_that_fits_worse_is_left_out_with_its_reason(tmp_path: Path, reason: str) -> None:
    hu, study = chest()[0], generate_uid()
    dicom_files.write_series(
        hu, RAS, tmp_path / "worse", WORSE[reason], study_uid=study, series_number=1
    )
    dicom_files.write_series(hu, RAS, tmp_path / "better", study_uid=study, series_number=2)
    listing = list_series(sorted(tmp_path.rglob("*.dcm")))
    (best, _), (other, why) = choose_chest_ct(listing.series)
    assert (best.number, other.number) == (2, 1) and why.startswith(f"series 2 {reason}")


def test_length_slices_and_number_decide_in_this_order(tmp_path: Path) -> None:
    hu, study = chest()[0], generate_uid()
    short = hu[:, :, :5]
    dicom_files.write_series(short, RAS, tmp_path / "a", study_uid=study, series_number=1)
    dicom_files.write_series(hu, RAS, tmp_path / "b", study_uid=study, series_number=3)
    dicom_files.write_series(hu, RAS, tmp_path / "c", study_uid=study, series_number=2)
    listing = list_series(sorted(tmp_path.rglob("*.dcm")))
    ranked = choose_chest_ct(listing.series)
    assert [series.number for series, _ in ranked] == [2, 3, 1]
    assert [why for _, why in ranked[1:]] == [
        "series 2 has the lower number",
        "series 2 is at least 200 mm long",
    ]


def test_slices_seen_from_above_are_axial_too(tmp_path: Path) -> None:
    """Their normal points down the body: rows to the left, columns to the front."""
    hu, study = chest()[0], generate_uid()
    coronal = reorder(hu, RAS, (0, 2, 1), (False, False, False))
    from_above = reorder(hu, RAS, (0, 1, 2), (True, False, False))
    dicom_files.write_series(*coronal, tmp_path / "a", study_uid=study, series_number=1)
    dicom_files.write_series(*from_above, tmp_path / "b", study_uid=study, series_number=2)
    (best, _), (_, why) = choose_chest_ct(list_series(sorted(tmp_path.rglob("*.dcm"))).series)
    assert best.slices[0].orientation == (1, 0, 0, 0, -1, 0)
    assert (best.number, why) == (2, "series 2 is axial")


def test_an_unknown_kernel_ranks_between_soft_and_sharp(tmp_path: Path) -> None:
    hu, study = chest()[0], generate_uid()
    for number, kernel in enumerate(("Bl57d", "", "Br40f")):
        dicom_files.write_series(
            *(hu, RAS, tmp_path / str(number), edit(ConvolutionKernel=kernel)),
            study_uid=study,
            series_number=number,
        )
    ranked = choose_chest_ct(list_series(sorted(tmp_path.rglob("*.dcm"))).series)
    assert [series.number for series, _ in ranked] == [2, 1, 0]


def test_a_series_is_asked_for_by_number_or_uid(tmp_path: Path) -> None:
    hu, study, uid = chest()[0], generate_uid(), generate_uid()
    dicom_files.write_series(hu, RAS, tmp_path / "a", study_uid=study, series_number=1)
    dicom_files.write_series(
        hu - 7, RAS, tmp_path / "b", DERIVED, study_uid=study, series_number=2, series_uid=uid
    )
    assert (read_volume(tmp_path).array == hu).all()
    for wanted in ("2", uid):
        assert (read_volume(tmp_path, series=wanted).array == hu - 7).all()
    with pytest.raises(InputError, match=r"exactly one series '9'.*series 1 \(16 slices, 16 mm"):
        read_volume(tmp_path, series="9")


def test_what_is_no_slice_is_counted_by_reason(tmp_path: Path) -> None:
    hu, _ = chest()
    dicom_files.write_series(hu, RAS, tmp_path / "s")
    dicom_files.write_series(
        hu[:, :, :2], RAS, tmp_path / "scout", edit(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    )
    dicom_files.write_series(hu[:, :, :1], RAS, tmp_path / "dose", edit(Modality="SR"))
    capture = edit(SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    dicom_files.write_series(hu[:, :, :1], RAS, tmp_path / "screen", capture)
    (tmp_path / "s" / "note.dcm").write_text("no DICOM")
    listing = list_series(sorted(tmp_path.rglob("*.dcm")))
    assert len(listing.series) == 1 and len(listing.series[0].slices) == 16
    assert {(folder.name, reason) for folder, reason in listing.describe_skipped()} == {
        ("scout", "holds 2 files, each of which is a localizer (scout)"),
        ("dose", "holds a file that is a structured report, such as a dose sheet (modality SR)"),
        ("screen", "holds a file that is a secondary capture, such as a dose sheet (modality CT)"),
        ("s", "holds a file that is not a DICOM file"),
    }
