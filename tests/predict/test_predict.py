import itertools
import json
import re
import shutil
from dataclasses import replace

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import write_nifti

from rectvlm.checkpoint import Checkpoint, run_folder
from rectvlm.checkpoint.export import export_checkpoint
from rectvlm.data.canonical_grid import canonical_affine, mask_to_native, resample_to_grid
from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS
from rectvlm.lesion_bits import pack_lesion
from rectvlm.models import RectVLM
from rectvlm.models.report_generator import ReportGenerator
from rectvlm.predict import case_folder, case_page, run
from rectvlm.predict.case import LoadedModel, PredictedCase
from rectvlm.predict.findings_schema import SCHEMA_FILE
from rectvlm.types import HuConversion, UserError, Volume

ORIENTATIONS = [
    "".join(code)
    for axes in itertools.permutations(("LR", "AP", "IS"))
    for code in itertools.product(*axes)
]
NODULE = LESION_BY_KEY["lung_nodule"]


def in_orientation(array, affine, code):
    """The same volume with its axes in another order and direction."""
    native = nib.orientations.io_orientation(affine)
    turn = nib.orientations.ornt_transform(native, nib.orientations.axcodes2ornt(tuple(code)))
    turned = np.ascontiguousarray(nib.orientations.apply_orientation(array, turn))
    return turned, affine @ nib.orientations.inv_ornt_aff(turn, array.shape)


@pytest.fixture(scope="module")
def predicted(tiny_run, phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    file = write_nifti(phantoms(1).hu, phantoms(1).affine, folder / "chest.nii.gz")
    (case,) = run.predict_cases(file, tiny_run(3), folder / "out", device="cpu")
    return file, case


def test_a_case_is_complete(predicted):
    file, case = predicted
    assert {path.name for path in case.iterdir()} == {
        "findings.json",
        "lesions.nii.gz",
        "lesions.csv",
        "report.txt",
        "report.md",
        "fhir.json",
        "index.html",
    }
    summary = json.loads((case / "findings.json").read_text())
    jsonschema.validate(summary, json.loads(SCHEMA_FILE.read_text()))
    assert list(summary["findings"]) == list(FINDINGS)
    assert all(0 <= row["probability"] <= 1 for row in summary["findings"].values())
    assert summary["disclaimer"] == "Research use only; not a medical device."
    assert (
        summary["file"] == str(file)
        and summary["config"] == "tiny"
        and "already HU" in summary["hu"]["reason"]
    )
    for name in ("index.html", "report.txt", "report.md", "fhir.json"):
        assert case_page.DISCLAIMER in (case / name).read_text()
    assert not list(case.parent.glob(".*"))


def test_masks_lie_on_the_grid_of_the_file(predicted):
    file, case = predicted
    ct, mask = nib.load(file), nib.load(case / "lesions.nii.gz")
    assert mask.shape == ct.shape and mask.get_data_dtype() == np.uint8
    assert np.array_equal(mask.affine, ct.affine)
    assert mask.header.get_sform(coded=True)[1] == mask.header.get_qform(coded=True)[1] == 1
    (note,) = mask.header.extensions
    assert all(f"{lesion.mask_value} {lesion.key}" in note.text for lesion in LESIONS)


@pytest.mark.parametrize(
    ("part", "what"), [("classifier.bias", "findings"), ("localizer.denoiser.bias", "lesions")]
)
def test_a_model_that_gives_no_numbers_is_one_sentence(tiny_run, predicted, tmp_path, part, what):
    """It would read as a CT without lesions."""
    source = Checkpoint.open(tiny_run(2))
    tensors = source.read_tensors()
    tensors[part] = torch.full_like(tensors[part], torch.nan)
    spoilt = run_folder.step_folder(tmp_path / "phase2", 1)
    spoilt.mkdir(parents=True)
    replace(source, folder=spoilt).write_files(tensors, None)
    with pytest.raises(UserError, match=f"probabilities of {what} for chest are not finite"):
        run.predict_cases(predicted[0], spoilt, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "chest").exists()


def test_volumes_are_those_of_the_mask(predicted):
    _, case = predicted
    mask = nib.load(case / "lesions.nii.gz")
    bits = np.asanyarray(mask.dataobj)
    voxel_ml = abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    for row in json.loads((case / "findings.json").read_text())["lesions"]:
        voxels = np.count_nonzero(bits & row["mask_value"])
        assert row["voxels"] == voxels and row["volume_ml"] == pytest.approx(voxels * voxel_ml)


def test_the_axis_order_of_the_file_changes_nothing(tiny_run, phantoms, tmp_path):
    phantom = phantoms(1)
    for code in ("LPS", "SRA"):
        turned, affine = in_orientation(phantom.hu, phantom.affine, code)
        write_nifti(turned, affine, tmp_path / f"{code}.nii")
    one, two = (
        json.loads((case / "findings.json").read_text())["findings"]
        for case in run.predict_cases(tmp_path, tiny_run(2), tmp_path / "out", device="cpu")
    )
    for name in FINDINGS:
        assert one[name]["probability"] == pytest.approx(two[name]["probability"], abs=2e-3)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_canonical_view_is_the_same_from_every_axis_order(code):
    canonical = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    affine = np.array([[0, 0, -0.7, 9], [0, -0.8, 0, 8], [5, 0, 0, -700], [0, 0, 0, 1.0]])
    turned, native = in_orientation(canonical, affine, code)
    view, view_affine = case_folder.canonical_view(turned, native)
    assert np.array_equal(view, canonical)
    assert np.allclose(view_affine, affine)


@pytest.mark.parametrize("code", ["RAS", "LPS", "LAS", "SAL", "PIR", "IRP"])
def test_a_lesion_on_the_patients_left_is_on_the_right_of_the_picture(
    code, tiny_run, tiny, phantoms, tmp_path
):
    """A nodule at negative world x: on the model's grid and back, then on the page and in words."""
    phantom = phantoms(1)
    hu, affine = in_orientation(phantom.hu, phantom.affine, code)
    ct, view_affine = case_folder.canonical_view(hu, affine)
    depth, height, width = ct.shape
    column = round(0.72 * width)
    world = view_affine @ [depth // 2, height // 2, column, 1]
    middle = view_affine @ [depth // 2, height // 2, width // 2, 1]
    assert world[0] < middle[0], "the patient's left is at smaller world x"
    index = np.stack(np.meshgrid(*map(np.arange, hu.shape), indexing="ij"), axis=-1)
    mm = index @ affine[:3, :3].T + affine[:3, 3]
    ball = (np.linalg.norm(mm - world[:3], axis=-1) < 14).astype(np.uint8)
    hu = np.where(ball, 2500, hu).astype(np.int16)
    grid_affine = canonical_affine(affine, hu.shape, hu, tiny.data.grid, tiny.data.spacing)
    on_grid = resample_to_grid(
        pack_lesion(ball, NODULE), affine, grid_affine, tiny.data.grid, "bits"
    )
    back = mask_to_native(on_grid, grid_affine, hu.shape, affine)
    assert (back & (pack_lesion(ball, NODULE))).any()

    checkpoint = Checkpoint.open(tiny_run(2))
    reader = LoadedModel(RectVLM.from_checkpoint(checkpoint, "cpu"), checkpoint)
    volume, decision = Volume(hu, affine, "left.nii"), HuConversion(1, 0, "HU")
    case = PredictedCase(
        "left", volume, hu, decision, grid_affine, dict.fromkeys(FINDINGS, 0.5), back, None
    )
    folder = case_folder.write_case_folder(reader, case, tmp_path)

    row = json.loads((folder / "findings.json").read_text())["lesions"][NODULE.bit]
    assert (
        row["side"] == "left"
        and row["place"].startswith("left lung")
        and row["basis"] == "geometry"
    )
    assert row["approximate_lobes"], "the lung around the ball is found"
    assert all(lobe.startswith("left") for lobe in row["approximate_lobes"])
    html = (folder / "index.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    # The page starts in the lesion; in RAS order the patient's left is at small i.
    assert data["start"][0] < data["shape"][0] / 2


def test_a_checkpoint_without_localizer_and_generator_says_so(tiny_run, phantoms, tmp_path):
    file = write_nifti(phantoms(1).hu, phantoms(1).affine, tmp_path / "chest.nii")
    (case,) = run.predict_cases(file, tiny_run(1), tmp_path / "out", device="cpu")
    names = {"findings.json", "index.html", "report.md", "fhir.json"}
    assert {path.name for path in case.iterdir()} == names
    summary = json.loads((case / "findings.json").read_text())
    jsonschema.validate(summary, json.loads(SCHEMA_FILE.read_text()))
    assert summary["lesions"] is None and summary["report"] is None
    html = (case / "index.html").read_text()
    assert "does not outline lesions" in html and "no report generator" in html


def test_a_call_and_its_prompt_use_the_models_thresholds(
    predicted, tiny_run, tmp_path, monkeypatch
):
    """From a checkpoint, through an export, and from a file, to `findings.json` and the prompt.

    All probabilities lie above one half, and every second one below its threshold.
    """
    prompts = []
    encode = ReportGenerator.encode_prompt

    def record(self, cues):
        prompts.append(cues)
        return encode(self, cues)

    monkeypatch.setattr(ReportGenerator, "encode_prompt", record)

    def predict(checkpoint, thresholds=None):
        (folder,) = run.predict_cases(predicted[0], checkpoint, tmp_path / "out", "cpu", thresholds)
        summary = json.loads((folder / "findings.json").read_text())
        called = {name for name, row in summary["findings"].items() if row["present"]}
        suggested_text = prompts.pop().partition(" Lesions")[0].partition(" No lesions")[0].lower()
        suggested = {name for name in FINDINGS if name.lower() in suggested_text}
        assert called == suggested
        html = (folder / "index.html").read_text()
        assert html.count("finding called") == len(called)
        assert summary["thresholds"]["source"] in html
        return summary, called

    model = RectVLM.from_pretrained(tiny_run(3), "cpu")
    with torch.no_grad():
        model.classifier.bias += 1.5
    plain, own, exported = tmp_path / "plain", tmp_path / "own", tmp_path / "exported"
    model.save_pretrained(plain)
    summary, called = predict(plain)
    assert called == set(FINDINGS) and summary["thresholds"]["not_fitted"] == list(FINDINGS)
    rows = summary["findings"].values()
    assert all(row["probability"] > 0.5 and row["threshold"] == 0.5 for row in rows)

    margins = [(-1) ** number * 0.002 for number in range(len(FINDINGS))]
    values = [row["probability"] + margin for row, margin in zip(rows, margins, strict=True)]
    thresholds = FindingThresholds(np.array(values), np.ones(18, bool), "cases of a test", 40)
    model.thresholds = thresholds
    model.save_pretrained(own)
    export_checkpoint(own, exported)
    thresholds.write(tmp_path / "given.json")
    for checkpoint, file in ((own, None), (exported, None), (plain, tmp_path / "given.json")):
        summary, called = predict(checkpoint, file)
        assert called == set(FINDINGS[1::2])
        assert [row["threshold"] for row in summary["findings"].values()] == values
        assert summary["thresholds"]["source"] == "cases of a test"
    card = (exported / "README.md").read_text()
    assert f"{FINDINGS[0].lower()} {values[0]:.3g}" in card and "cases of a test" in card


def test_thresholds_that_cannot_be_read_end_a_prediction_before_the_model_is_loaded(
    tiny_run, predicted, tmp_path
):
    (tmp_path / "bad.json").write_text("{}")
    for name, words in {"bad.json": "is damaged", "none.json": "cannot be read"}.items():
        with pytest.raises(UserError, match=f"{name} .*{words}|{name} {words}"):
            run.predict_cases(predicted[0], tiny_run(1), tmp_path / "out", "cpu", tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_in_a_folder_bad_files_are_set_aside_and_the_rest_goes_on(
    tiny_run, phantoms, tmp_path, caplog
):
    phantom = phantoms(1)
    source = tmp_path / "in"
    (source / "deeper").mkdir(parents=True)
    good = write_nifti(phantom.hu, phantom.affine, source / "deeper" / "chest.nii.gz")
    write_nifti(phantom.lesions, phantom.affine, source / "mask.nii.gz")
    (source / "cut.nii.gz").write_bytes(good.read_bytes()[:2000])
    (source / "notes.txt").write_text("not a volume")
    out = source / "out"

    cases = run.predict_cases(source, tiny_run(1), out, device="cpu")

    assert cases == [out / "chest"]
    rows = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert {row["file"].rsplit("/", 1)[1] for row in rows} == {"cut.nii.gz", "mask.nii.gz"}
    for row in rows:
        assert row["file"] in row["reason"] and "\n" not in row["reason"]
        assert row["reason"] in caplog.text
    # A second run finds no CT in its own results, and no failure when nothing fails.
    (source / "cut.nii.gz").unlink()
    (source / "mask.nii.gz").unlink()
    assert run.predict_cases(source, tiny_run(1), out, device="cpu") == [out / "chest"]
    assert not (out / "failed.jsonl").exists()


def test_a_made_up_affine_is_set_aside_and_a_ct_in_metres_is_measured(tiny_run, phantoms, tmp_path):
    phantom, source = phantoms(1), tmp_path / "in"
    source.mkdir()
    reference = write_nifti(phantom.hu, phantom.affine, source / "reference.nii.gz")
    for name, affine in {
        "identity": np.eye(4),
        "mirrored": np.diag([-1.0, 1, 1, 1]),
        "micrometres": phantom.affine * [[1000], [1000], [1000], [1]],
    }.items():
        write_nifti(phantom.hu, affine, source / f"{name}.nii.gz")
    image = nib.Nifti1Image(phantom.hu, phantom.affine)
    metres = phantom.affine * [[0.001], [0.001], [0.001], [1]]
    image.set_sform(metres, 1)
    image.header["pixdim"][1:4] = np.linalg.norm(metres[:3, :3], axis=0)
    image.header.set_xyzt_units("meter")
    nib.save(image, source / "metres.nii.gz")

    out = tmp_path / "out"
    cases = run.predict_cases(source, tiny_run(3), out, device="cpu")

    assert {case.name for case in cases} == {"reference", "metres"}
    rows = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    reasons = {row["file"].rsplit("/", 1)[1].split(".")[0]: row["reason"] for row in rows}
    assert "left and right are unknown" in reasons["identity"]
    assert "left and right are unknown" in reasons["mirrored"]
    assert "impossible voxel size" in reasons["micrometres"]
    one, other = (
        json.loads((out / name / "findings.json").read_text()) for name in ("reference", "metres")
    )
    assert one["spacing_zyx_mm"] == other["spacing_zyx_mm"]
    assert one["findings"] == other["findings"]
    assert nib.load(reference).header["qform_code"] == 1
    assert nib.load(out / "metres" / "lesions.nii.gz").header["qform_code"] == 0
    assert nib.load(out / "metres" / "lesions.nii.gz").header.get_xyzt_units()[0] == "meter"


def test_bad_inputs_give_one_clear_sentence(tiny_run, phantoms, tmp_path):
    mask = write_nifti(phantoms(1).lesions, phantoms(1).affine, tmp_path / "mask.nii.gz")
    with pytest.raises(UserError, match="windowed picture"):
        run.predict_cases(mask, tiny_run(1), tmp_path / "out", device="cpu")
    with pytest.raises(UserError, match="None of the 1 files"):
        run.predict_cases(tmp_path, tiny_run(1), tmp_path / "out", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No CT in"):
        run.predict_cases(tmp_path / "empty", tiny_run(1), tmp_path / "out", device="cpu")
    with pytest.raises(UserError, match="does not exist"):
        run.predict_cases(tmp_path / "gone.nii", tiny_run(1), tmp_path / "out", device="cpu")


def test_no_input_is_replaced_by_its_result(tiny_run, phantoms, tmp_path):
    """A case's folder may be the one its CT is in, or the one of another case's DICOM files."""
    phantom = phantoms(1)
    (tmp_path / "P001").mkdir()
    file = write_nifti(phantom.hu, phantom.affine, tmp_path / "P001" / "P001.nii.gz")
    before = file.read_bytes()
    for source in (tmp_path, file):
        with pytest.raises(UserError, match="P001 would be replaced"):
            run.predict_cases(source, tiny_run(1), tmp_path, device="cpu")
    assert file.read_bytes() == before

    (tmp_path / "P002").mkdir()
    (tmp_path / "P002" / "slice1.dcm").write_bytes(b"dicom")
    beside = shutil.move(file, tmp_path / "P002.nii.gz")
    with pytest.raises(UserError, match="P002 would be replaced"):
        run.predict_cases(tmp_path, tiny_run(1), tmp_path, device="cpu")
    assert (tmp_path / "P002" / "slice1.dcm").read_bytes() == b"dicom"

    # Results beside the CTs: an earlier one is replaced, and its mask is not taken for a CT.
    shutil.rmtree(tmp_path / "P002")
    for _ in range(2):
        assert run.predict_cases(tmp_path, tiny_run(2), tmp_path, device="cpu") == [
            tmp_path / "P002"
        ]
        assert (tmp_path / "P002" / "lesions.nii.gz").exists()
    assert beside.read_bytes() == before
