"""Contradictions between calls, outlines and the report, on a phantom with painted lesions."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import phantom_sample, write_nifti

from rectvlm.checkpoint import Checkpoint
from rectvlm.config import load_config
from rectvlm.labels import FINDINGS, LESION_BY_KEY, REGION_BY_NAME
from rectvlm.lesion_places import locate_lesions
from rectvlm.models import RectVLM
from rectvlm.predict import case_folder
from rectvlm.predict.case import LoadedModel, PredictedCase
from rectvlm.predict.contradictions import find_contradictions, measure_extent
from rectvlm.types import HuConversion, Sample, Volume


@pytest.fixture(scope="module")
def patient() -> Sample:
    return phantom_sample(2, load_config("demo"))


def ball(sample: Sample, key: str, region: str, radius_mm: float) -> np.ndarray:
    """Lesion bits of a ball in the middle of a region."""
    centre = np.argwhere(sample.regions == REGION_BY_NAME[region].id).mean(axis=0).round()
    index = np.stack(np.indices(sample.ct.shape), axis=-1)
    mm = np.linalg.norm((index - centre) * np.asarray(sample.meta.spacing), axis=-1)
    return np.where(mm < radius_mm, np.uint8(LESION_BY_KEY[key].mask_value), np.uint8(0))


def kinds(
    sample: Sample,
    bits: np.ndarray | None,
    report: str | None,
    calls: dict[str, bool | None] | None = None,
) -> list[tuple[str, str]]:
    """Kind and finding of each contradiction of a case."""
    spacing = sample.meta.spacing
    places = [] if bits is None else locate_lesions(bits, sample.ct, None, spacing)
    affine = np.diag([*spacing, 1.0])
    entries = find_contradictions(calls or {}, bits, places, affine, report)
    assert all(entry.message.endswith(".") and "None" not in entry.message for entry in entries)
    return [(entry.kind, entry.finding) for entry in entries]


def test_a_report_that_denies_an_outlined_nodule_is_marked(patient: Sample) -> None:
    bits = ball(patient, "lung_nodule", "right upper lobe", 28)
    denied = [("report_denies_outline", "Lung nodule")]
    assert kinds(patient, bits, "No lung nodule.") == denied
    assert kinds(patient, bits, "Findings: The lungs are clear.") == denied
    assert kinds(patient, bits, "No acute finding.") == [("report_omits_outline", "Lung nodule")]
    assert kinds(patient, bits, "50 mm nodule in the right upper lobe.") == []
    assert kinds(patient, bits, "Possible nodule.") == []


def test_a_wrong_side_is_marked(patient: Sample) -> None:
    bits = ball(patient, "lung_nodule", "right upper lobe", 28)
    wrong = [("side", "Lung nodule")]
    assert kinds(patient, bits, "Nodule in the left upper lobe.") == wrong
    assert kinds(patient, bits, "Nodules in both lungs.") == wrong
    both = bits | ball(patient, "lung_nodule", "left upper lobe", 28)
    assert kinds(patient, both, "Nodule in the left upper lobe.") == wrong
    assert kinds(patient, both, "Nodules in both lungs.") == []


@pytest.mark.parametrize(
    ("report", "is_wrong"),
    [
        ("6 mm nodule in the right upper lobe.", True),
        ("Nodule of 5.5 x 4 cm in the right upper lobe.", False),
        ("A 14 cm nodule in the right upper lobe.", True),
        ("A nodule of 90 ml in the right upper lobe.", False),
        ("A nodule of 2 ml in the right upper lobe.", True),
        ("A nodule of 90 cm3 in the right upper lobe.", False),
        ("Right upper lobe nodule. Lymph nodes up to 7 mm.", False),
    ],
)
def test_a_size_that_the_outline_does_not_have_is_marked(
    patient: Sample, report: str, is_wrong: bool
) -> None:
    bits = ball(patient, "lung_nodule", "right upper lobe", 28)
    assert kinds(patient, bits, report) == ([("size", "Lung nodule")] if is_wrong else [])


def test_the_classifier_is_held_to_outlines_and_report(patient: Sample) -> None:
    bits = ball(patient, "lung_nodule", "right upper lobe", 28)
    nothing = np.zeros_like(bits)
    report = "50 mm nodule in the right upper lobe."
    assert kinds(patient, bits, report, {"Lung nodule": False}) == [
        ("outline_without_call", "Lung nodule"),
        ("report_without_call", "Lung nodule"),
    ]
    assert kinds(patient, nothing, "No nodule.", {"Lung nodule": True}) == [
        ("call_without_outline", "Lung nodule"),
        ("report_denies_call", "Lung nodule"),
    ]
    assert kinds(patient, nothing, report) == [("report_without_outline", "Lung nodule")]
    assert kinds(patient, None, "Emphysema.", {"Emphysema": False}) == [
        ("report_without_call", "Emphysema")
    ]
    # An unknown call contradicts nothing, and an opacity need not be ground glass.
    assert kinds(patient, bits, report, {"Lung nodule": None}) == []
    assert kinds(patient, nothing, "Lung opacity.", {"Lung opacity": True}) == []


def test_one_voxel_is_no_outline(patient: Sample) -> None:
    bits = np.zeros_like(ball(patient, "lung_nodule", "right upper lobe", 28))
    bits[10, 30, 20] = LESION_BY_KEY["lung_nodule"].mask_value
    fine = np.eye(4)
    (entry,) = find_contradictions({"Lung nodule": True}, bits, [], fine, None)
    assert entry.kind == "call_without_outline"
    assert "only 1 voxel of lung nodule (0.001 ml)" in entry.message
    assert find_contradictions({"Lung nodule": False}, bits, [], fine, "No nodule.") == []


def test_a_tilted_gantry_changes_no_volume(patient: Sample) -> None:
    """Slices that are shifted against each other lie farther apart than they are thick."""
    bits = np.zeros_like(ball(patient, "lung_nodule", "right upper lobe", 28))
    bits[10, 30, 20:30] = LESION_BY_KEY["lung_nodule"].mask_value
    tilted = np.diag([5.0, 2.0, 1.0, 1.0])
    tilted[1, 0] = 3.0
    (entry,) = find_contradictions({"Lung nodule": False}, bits, [], tilted, None)
    assert "0.1 ml of lung nodule" in entry.message


def test_an_effusion_in_the_lung_is_in_the_wrong_place(patient: Sample) -> None:
    bits = ball(patient, "pleural_effusion", "left upper lobe", 20)
    bits |= ball(patient, "pericardial_effusion", "right upper lobe", 20)
    assert kinds(patient, bits, None) == [
        ("place", "Pericardial effusion"),
        ("place", "Pleural effusion"),
    ]


def test_a_case_without_lesions_and_report_contradicts_nothing(patient: Sample) -> None:
    assert kinds(patient, None, None, dict.fromkeys(FINDINGS, True)) == []


def test_extents_are_those_of_the_largest_part() -> None:
    mask = np.zeros((20, 40, 60), bool)
    mask[5:9, 10:20, 5:55] = True
    mask[15, 30:32, 30] = True
    thickness, length = measure_extent(mask, (5.0, 1.0, 1.0))
    assert thickness == pytest.approx(10, abs=2) and length == pytest.approx(50, abs=6)
    one = np.zeros((3, 3, 3), bool)
    one[1, 1, 1] = True
    thickness, length = measure_extent(one, (5.0, 1.0, 1.0))
    assert thickness <= 2 and length <= 7


def test_findings_json_and_the_page_carry_the_contradictions(
    tiny_run, phantoms, tmp_path: Path
) -> None:
    phantom = phantoms(1)
    checkpoint = Checkpoint.open(tiny_run(2))
    loaded = LoadedModel(RectVLM.from_checkpoint(checkpoint, "cpu"), checkpoint)
    bits = np.zeros_like(phantom.lesions)
    bits[tuple(n // 2 for n in bits.shape)] = LESION_BY_KEY["lung_nodule"].mask_value
    write_nifti(phantom.hu, phantom.affine, tmp_path / "ct.nii")
    case = PredictedCase(
        "ct",
        Volume(phantom.hu, phantom.affine, str(tmp_path / "ct.nii")),
        phantom.hu,
        HuConversion(1, 0, "HU"),
        np.eye(4),
        dict.fromkeys(FINDINGS, 0.1) | {"Lung nodule": 0.9},
        bits,
        "No lung nodule. <b>Cardiomegaly.</b>",
    )
    folder = case_folder.write_case_folder(loaded, case, tmp_path)
    summary = json.loads((folder / "findings.json").read_text())
    found = {(entry["kind"], entry["finding"]) for entry in summary["contradictions"]}
    assert ("report_denies_call", "Lung nodule") in found
    assert ("report_without_call", "Cardiomegaly") in found
    html = (folder / "index.html").read_text()
    for entry in summary["contradictions"]:
        assert f'<li data-kind="{entry["kind"]}">{entry["message"]}</li>' in html
    assert html.count('class="mark"') >= 2
