"""`rectvlm challenge`: results that the challenge's evaluation reads, from inputs that stay as they
were."""

import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from conftest import write_nifti

from rectvlm.cli import main
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.predict import run
from rectvlm.predict.challenge import lesion_boxes, write_challenge_results
from rectvlm.types import UserError
from tests.small_cases import AFFINE, body

SERIES = "32c1cb65-2c5d-4e14-87f2-0698e7dfb6aa"
BOX_NAMES = {
    *("Lung nodule", "Pleural effusion", "Pericardial effusion", "Consolidation"),
    "Ground glass opacity",
}


def write_mha(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    image = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0))
    lps = np.diag([-1, -1, 1.0]) @ affine[:3, :3]
    spacing = np.linalg.norm(lps, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps / spacing).ravel().tolist())
    image.SetOrigin((np.array([-1, -1, 1]) * affine[:3, 3]).tolist())
    SimpleITK.WriteImage(image, str(path))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a MetaImage and a NIfTI file."""
    folder = tmp_path_factory.mktemp("input")
    write_mha(body(1)[0], AFFINE, folder / "b1.2.mha")
    write_nifti(body(2)[0], AFFINE, folder / f"a_7_{SERIES}.nii.gz")
    return folder


def list_state(*folders: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below some folders."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def challenge(inputs: Path, checkpoint: Path, out: Path, task: str) -> Any:
    words = ["challenge", str(inputs), "--checkpoint", str(checkpoint), "--out", str(out)]
    assert main([*words, "--task", task, "--device", "cpu"]) == 0
    return json.loads(out.read_text())


def read_as_the_evaluation_does(submission: Any) -> Any:
    """The platform wraps what is not wrapped; its evaluation then reads the one output."""
    wrapped = submission if isinstance(submission, list) else [{"outputs": [{"value": submission}]}]
    return wrapped[0]["outputs"][0]["value"]


def test_classification_gives_18_probabilities_of_each_ct(inputs, tiny_run, tmp_path) -> None:
    before = list_state(inputs, tiny_run(1))
    results = challenge(inputs, tiny_run(1), tmp_path / "out" / "results.json", "classification")
    assert list_state(inputs, tiny_run(1)) == before
    assert os.listdir(tmp_path / "out") == ["results.json"]
    assert results["name"] == "Generated probabilities"
    assert results["type"] == "Abnormality Classification"
    assert results["version"] == {"major": 1, "minor": 0}
    rows = read_as_the_evaluation_does(results)["predictions"]
    assert [row["input_image_name"] for row in rows] == [f"a_7_{SERIES}", "b1.2"]
    for row in rows:
        assert list(row["probabilities"]) == list(FINDINGS)
        assert all(0 <= probability <= 1 for probability in row["probabilities"].values())
    folders = run.predict_cases(inputs, tiny_run(1), tmp_path / "predicted", device="cpu")
    for folder, row in zip(folders, rows, strict=True):
        findings = json.loads((folder / "findings.json").read_text())["findings"]
        for name, probability in row["probabilities"].items():
            assert probability == pytest.approx(findings[name]["probability"], abs=1e-4)


def test_reports_are_one_line_and_named_by_their_series(inputs, tiny_run, tmp_path) -> None:
    results = challenge(inputs, tiny_run(3), tmp_path / "results.json", "reports")
    value = read_as_the_evaluation_does(results)
    assert (value["name"], value["type"]) == ("Generated reports", "Report generation")
    rows = value["generated_reports"]
    assert [row["input_image_name"] for row in rows] == [SERIES, "b1.2"]
    assert all("\n" not in row["report"] and row["report"] for row in rows)


def test_localization_lists_boxes_of_all_five_lesions(inputs, tiny_run) -> None:
    beside_inputs = inputs.parent / "results.json"
    results = challenge(inputs, tiny_run(2), beside_inputs, "localization")
    rows = read_as_the_evaluation_does(results)["predictions"]
    assert [row["input_image_name"] for row in rows] == [f"a_7_{SERIES}.nii.gz", "b1.2.mha"]
    for row in rows:
        assert row.keys() - {"input_image_name"} == BOX_NAMES
        for box in (box for name in BOX_NAMES for box in row[name]):
            assert len(box["bbox_mm"]) == 6 and min(box["bbox_mm"]) >= 0
            assert 0 <= box["probability"] <= 1
    assert len(BOX_NAMES) == len(LESIONS)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPL", "IAR"])
def test_boxes_do_not_depend_on_the_order_of_the_axes(axes: str) -> None:
    mask = np.zeros((24, 24, 12), bool)
    mask[2:5, 7, 3:5] = mask[20:22, 7, 3] = True  # 14 × 14 × 20 mm; x and y fall in RAS
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(AFFINE), nib.orientations.axcodes2ornt(tuple(axes))
    )
    turned = nib.orientations.apply_orientation(mask, turn)
    affine = AFFINE @ nib.orientations.inv_ornt_aff(turn, mask.shape)
    boxes = lesion_boxes(turned, affine)
    # AFFINE's x and y fall in RAS, so they rise in LPS with the index.
    expected = [[28, 98, 60, 42, 14, 40], [280, 98, 60, 28, 14, 20]]
    assert sorted(boxes) == [pytest.approx(box) for box in expected]


def test_boxes_of_a_tilted_volume_enclose_the_voxels() -> None:
    angle = np.deg2rad(30)
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = True
    (box,) = lesion_boxes(mask, tilt)
    assert box[3:] == pytest.approx([np.cos(angle) + np.sin(angle)] * 2 + [1])
    assert lesion_boxes(np.zeros((4, 4, 4), bool), tilt) == []


def test_a_model_without_the_part_is_refused_before_any_work(inputs, tiny_run, tmp_path) -> None:
    with pytest.raises(UserError, match=r"has no generator, which the task reports needs: "):
        write_challenge_results(inputs, tiny_run(2), tmp_path / "r.json", "reports", "cpu")


def test_two_cts_of_one_name_are_refused(inputs, tiny_run, tmp_path) -> None:
    write_mha(body(1)[0], AFFINE, tmp_path / "same.mha")
    write_nifti(body(2)[0], AFFINE, tmp_path / "same.nii.gz")
    out = tmp_path / "out" / "results.json"
    with pytest.raises(UserError, match="holds 2 CTs called same: expected names that differ"):
        write_challenge_results(tmp_path, tiny_run(1), out, "classification", "cpu")


def test_a_broken_ct_ends_the_run_and_leaves_no_results(tiny_run, tmp_path, capsys) -> None:
    (tmp_path / "input").mkdir()
    write_nifti(body(1)[0], AFFINE, tmp_path / "input" / "a.nii.gz")
    (tmp_path / "input" / "b.mha").write_text("no image")
    words = ["challenge", str(tmp_path / "input"), "--checkpoint", str(tiny_run(1))]
    out = tmp_path / "out" / "results.json"
    assert main([*words, "--task", "classification", "--out", str(out)]) == 2
    assert "b.mha" in capsys.readouterr().err
    assert not out.exists()
