"""`rectvlm predict` on what a PACS exports: one anonymous case a study, nothing of the patient."""

import json
import logging
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import dicom_files
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from conftest import write_nifti
from pydicom.uid import generate_uid

from rectvlm.checkpoint import Checkpoint, run_folder
from rectvlm.cli import main
from rectvlm.data.volume import read_volume
from rectvlm.predict.dicom_results import DICOM_FILES
from rectvlm.predict.find_volumes import case_names, find_volumes
from rectvlm.types import UserError
from tests.small_cases import AFFINE, body


def write_study(folder: Path, seed: int = 1) -> tuple[str, str]:
    """A study as it is exported: CT, lung kernel, scout, dose sheet; UIDs of the two CTs."""
    hu, _ = body(seed)
    study, soft, sharp = generate_uid(), generate_uid(), generate_uid()

    def make_sharp(dataset, _number):
        dataset.ConvolutionKernel = "Bl57d"

    def make_scout(dataset, _number):
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    def make_dose_sheet(dataset, _number):
        dataset.Modality = "SR"

    options = {"study_uid": study}
    dicom_files.write_series(hu[:, :, :1], AFFINE, folder / "1", make_scout, **options)
    dicom_files.write_series(
        hu, AFFINE, folder / "2", make_sharp, series_number=2, series_uid=sharp, **options
    )
    dicom_files.write_series(
        hu, AFFINE, folder / "3", suffix="", series_number=3, series_uid=soft, **options
    )
    dicom_files.write_series(hu[:, :, :1], AFFINE, folder / "4", make_dose_sheet, **options)
    return soft, sharp


def write_zip(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def test_a_study_becomes_one_case_that_says_nothing_of_the_patient(
    tiny_run, tmp_path, capsys, caplog
):
    write_study(tmp_path / "export")
    out = tmp_path / "out"
    caplog.set_level(logging.DEBUG)
    command = ["predict", str(tmp_path / "export"), "--checkpoint", str(tiny_run(3))]
    assert main([*command, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (page,) = (Path(line) for line in lines if line.endswith("index.html"))
    assert page.parent.name.startswith("ct-") and len(page.parent.name) == 15

    volume = read_volume(tmp_path / "export")
    mask = nib.load(page.with_name("lesions.nii.gz"))
    assert mask.shape == volume.array.shape
    np.testing.assert_allclose(mask.affine, volume.affine, atol=1e-4)
    summary = json.loads(page.with_name("findings.json").read_text())
    assert summary["file"] == page.parent.name

    run_summary = json.loads((out / "predict-summary.json").read_text())
    assert run_summary["predicted"][0]["file"] == f"{tmp_path / 'export' / '3'}, series 3"
    reasons = {Path(row["path"]).name: row["reason"] for row in run_summary["skipped"]}
    assert reasons["1"] == "holds a file that is a localizer (scout)"
    assert (
        "series 2 (12 slices, 20 mm apart, kernel Bl57d), but series 3 has the softer"
        in (reasons["2"])
    )
    assert "dose sheet" in reasons["4"]
    # What goes back to the PACS names the patient, as DICOM demands; nothing else does.
    report = pydicom.dcmread(page.with_name("report.sr.dcm"))
    assert report.PatientID == dicom_files.PATIENT_ID and report.StudyDate == "20200101"
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in DICOM_FILES]
    texts = [caplog.text, *map(str, out.rglob("*"))]
    texts += [path.read_bytes().decode("latin-1") for path in files]
    for word in dicom_files.PERSONAL_WORDS:
        assert not any(word in text for text in texts)
    # A path may name the patient, so what can be handed on has none.
    case_texts = [path.read_bytes().decode("latin-1") for path in page.parent.iterdir()]
    assert not any(str(tmp_path / "export") in text for text in case_texts)


def test_a_zip_gets_outlines_and_measurements_for_the_pacs(tiny_run, tmp_path):
    pytest.importorskip("highdicom", reason="highdicom is not installed")
    soft, _ = write_study(tmp_path / "export")
    archive = write_zip(tmp_path / "export.zip", tmp_path / "export")
    checkpoint = Checkpoint.open(tiny_run(2))
    tensors = checkpoint.read_tensors()
    tensors["localizer.denoiser.bias"] = torch.full_like(tensors["localizer.denoiser.bias"], 50)
    generous = run_folder.step_folder(tmp_path / "phase2", 1)
    generous.mkdir(parents=True)
    replace(checkpoint, folder=generous).write_files(tensors, None)
    command = ["predict", str(archive), "--checkpoint", str(generous)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    (folder,) = (path.parent for path in (tmp_path / "out").glob("*/findings.json"))
    assert {path.name for path in folder.glob("*.dcm")} == set(DICOM_FILES[:2])
    summary = json.loads((folder / "findings.json").read_text())
    segmentation = pydicom.dcmread(folder / DICOM_FILES[0])
    assert segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID == soft
    assert segmentation.PatientID == dicom_files.PATIENT_ID
    drawn = [row["name"] for row in summary["lesions"] if row["voxels"]]
    assert drawn == [segment.SegmentLabel for segment in segmentation.SegmentSequence] != []


def test_studies_zips_and_other_formats_in_nested_folders_are_all_found(tmp_path):
    root = tmp_path / "in"
    for seed, name in enumerate(("p1/study", "p2/a/b"), start=1):
        write_study(root / name, seed)
    write_study(tmp_path / "zipped", 3)
    (root / "zips").mkdir()
    write_zip(root / "zips" / "p3.zip", tmp_path / "zipped")
    hu, _ = body(4)
    write_nifti(hu, AFFINE, root / "p4.nii.gz")
    np.savez(root / "p5.npz", ct=hu, affine=AFFINE)
    (root / "notes.txt").write_text("none")
    (root / "broken.zip").write_text("none")
    found = find_volumes(root, tmp_path / "out")
    places = [os.path.relpath(source.place, root) for source in found.sources]
    assert places == [
        *("broken.zip", "p1/study/3, series 3", "p2/a/b/3, series 3", "p4.nii.gz", "p5.npz"),
        "zips/p3.zip, series 3",
    ]
    names = case_names(found.sources)
    assert len(set(names)) == 6 and [name[:3] for name in names] == [
        *("bro", "ct-", "ct-", "p4", "p5", "ct-")
    ]
    for source in found.sources[1:]:
        assert source.read().array.shape == hu.shape
    with pytest.raises(UserError, match=r"broken.zip is a damaged archive"):
        found.sources[0].read()
    skipped = [(Path(path.path).name, path.reason) for path in found.skipped]
    assert ("notes.txt", "has another format than") in [(name, text[:23]) for name, text in skipped]
    assert sum("localizer" in reason for _, reason in skipped) == 3


def test_a_series_is_asked_for_by_number_or_uid(tmp_path):
    _, sharp = write_study(tmp_path / "a")
    write_study(tmp_path / "b", 2)
    write_nifti(body(4)[0], AFFINE, tmp_path / "c.nii.gz")
    out = tmp_path / "out"

    def places(wanted: str) -> list[str]:
        found = find_volumes(tmp_path, out, wanted)
        return [os.path.relpath(source.place, tmp_path) for source in found.sources]

    assert places("2") == ["a/2, series 2", "b/2, series 2"]
    assert places(sharp) == ["a/2, series 2"]
    with pytest.raises(UserError, match=r"No CT that --series 9 asks for.*also holds series"):
        places("9")
    with pytest.raises(UserError, match=r"c.nii.gz is not of the series that --series 2"):
        find_volumes(tmp_path / "c.nii.gz", out, "2")
    file = next((tmp_path / "a" / "2").iterdir())
    assert find_volumes(file, out, "2").sources[0].path == file
    with pytest.raises(UserError, match="is not of the series that --series 3"):
        find_volumes(file, out, "3")
    archive = write_zip(tmp_path / "a.zip", tmp_path / "a")
    (source,) = find_volumes(archive, out, "2").sources
    assert source.archived_uid == sharp and source.label == "series 2"


def test_a_file_of_a_series_and_a_dicomdir_are_found(tmp_path):
    write_study(tmp_path / "a")
    (tmp_path / "a" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    file = next((tmp_path / "a" / "3").iterdir())
    for source in (file, tmp_path / "a" / "DICOMDIR"):
        (ct,) = find_volumes(source, tmp_path / "out").sources
        assert ct.label == "series 3" and ct.read().array.shape == body(1)[0].shape


def test_folders_and_archives_without_a_ct_say_what_they_hold(tmp_path):
    def make_mr(dataset, _number):
        dataset.Modality = "MR"

    dicom_files.write_series(body(1)[0], AFFINE, tmp_path / "in" / "mr", make_mr)
    with pytest.raises(UserError, match=r"No CT in .*is no CT slice \(modality MR\)"):
        find_volumes(tmp_path / "in", tmp_path / "out")
    archive = write_zip(tmp_path / "mr.zip", tmp_path / "in")
    with pytest.raises(UserError, match=r"No CT in .*mr.zip.*modality MR"):
        find_volumes(archive, tmp_path / "out")
