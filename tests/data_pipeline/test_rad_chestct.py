"""Rad-ChestCT's volumes and tables to shards: sides, labels, and what is refused by name."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import write_nifti
from numpy.typing import NDArray
from rad_chestct_tree import ABNORMALITIES, LOCATIONS, write_archive, write_table
from scipy import ndimage

from data_pipeline import preprocess as pipeline
from data_pipeline.rad_chestct import (
    ABNORMALITIES_BY_FINDING,
    LABEL_TABLES,
    list_rad_chestct_cases,
    read_finding_labels,
)
from data_pipeline.verify.verify import main as verify_main
from rectvlm.cli import main
from rectvlm.data.shard_manifest import read_label_origin
from rectvlm.data.shards import read_index, read_sample
from rectvlm.labels import FINDINGS
from rectvlm.phantom.phantom import PhantomCase
from rectvlm.types import UserError

TRAIN_TABLE, VALID_TABLE, TEST_TABLE = LABEL_TABLES
UNMAPPED = {"Coronary artery wall calcification", "Mosaic attenuation pattern"}


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """Two scans of two tables, one of them in a folder of its own."""
    folder = tmp_path / "Rad-ChestCT"
    write_archive(folder / "trn00001.npz", seed=1)
    write_archive(folder / "more" / "tst00002.npz", seed=2)
    write_table(folder / TRAIN_TABLE, {"trn00001": {"nodule*left_upper", "calcification*aorta"}})
    write_table(folder / TEST_TABLE, {"tst00002": {"nodulegr1cm*right_lower"}, "tst00003": set()})
    return folder


def preprocess(download: Path, *more: str) -> int:
    out = ["--out", str(download.parent / "shards"), "--workers", "0", "--config", "tiny"]
    return pipeline.main(["--rad-chestct", str(download), *out, *more])


def refusal(download: Path) -> str:
    """Sentence by which a download is refused."""
    with pytest.raises(UserError) as error:
        list_rad_chestct_cases(download)
    message = str(error.value)
    assert "\n" not in message and "expected" in message and message.endswith(".")
    return message


def edit_header(path: Path, old: str, new: str | None) -> None:
    """Rename a column of a table; None removes it with its cells."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    index = rows[0].index(old)
    if new is not None:
        rows[0][index] = new
    with path.open("w", newline="") as file:
        keep: Sequence[int] = [i for i in range(len(rows[0])) if new is not None or i != index]
        csv.writer(file).writerows([row[i] for i in keep] for row in rows)


def test_one_command_makes_valid_shards_of_a_download(download: Path) -> None:
    assert preprocess(download) == 0
    shards = download.parent / "shards"
    index = read_index(shards)
    records = index.select_split("valid")
    assert not index.select_split("train") and not index.select_split("dev")
    samples = {sample.meta.key: sample for sample in (read_sample(shards, r) for r in records)}
    assert samples.keys() == {"trn00001", "tst00002"}
    meta = samples["trn00001"].meta
    assert {finding for finding, label in meta.labels.items() if label is None} == UNMAPPED
    present = {finding for finding, label in meta.labels.items() if label == 1}
    assert present == {"Lung nodule", "Arterial wall calcification"}
    second = samples["tst00002"].meta.labels
    assert [finding for finding in FINDINGS if second[finding] == 1] == ["Lung nodule"]
    assert not any(meta.lesions_annotated.values()) and meta.findings is None
    assert meta.source == "Rad-ChestCT trn00001.npz" and meta.patient == "trn00001"
    assert verify_main([str(shards), "--config", "tiny"]) == 0
    assert read_label_origin(shards) == "Rad-ChestCT's label tables, 16 findings mapped"


def test_axes_grow_to_inferior_posterior_and_left(download: Path) -> None:
    """The archive has a bright block at low slice, low row and high column."""
    assert preprocess(download, "data.spacing=[4,2,2]", "data.grid=[32,64,64]") == 0
    shards = download.parent / "shards"
    record = read_index(shards).select_split("valid")[0]
    ct = read_sample(shards, record).ct.astype(float)
    bright = np.argwhere(ct > 700)
    body = np.argwhere(ct > -300)
    z, y, x = bright.mean(axis=0) - body.mean(axis=0)
    # Canonical axes grow to superior, posterior and left.
    assert len(bright) > 5 and z > 2 and y < -2 and x > 2


def test_16_findings_are_mapped() -> None:
    assert set(FINDINGS) - ABNORMALITIES_BY_FINDING.keys() == UNMAPPED
    assert len(ABNORMALITIES_BY_FINDING) == 16


def test_an_empty_cell_is_unknown_and_never_negative(tmp_path: Path) -> None:
    path = tmp_path / TRAIN_TABLE
    write_table(path, {"a": {"nodule*lung"}, "b": set()}, empty={"nodule*heart", "opacity*lung"})
    labels = {
        name: dict(zip(FINDINGS, row, strict=True))
        for name, row in read_finding_labels(path).items()
    }
    assert labels["a"]["Lung nodule"] == 1 and labels["b"]["Lung nodule"] is None
    assert labels["b"]["Lung opacity"] is None and labels["b"]["Emphysema"] == 0


def test_a_row_without_a_volume_is_counted(download: Path) -> None:
    counts = list_rad_chestct_cases(download).counts
    assert counts["rows without a volume"] == 1
    assert counts["cases with a mapped label unknown"] == 0


# What is refused


def test_a_volume_without_a_row_is_named(download: Path) -> None:
    write_archive(download / "val00009.npz", seed=3)
    message = refusal(download)
    assert "val00009.npz has no row of labels" in message and VALID_TABLE in message


@pytest.mark.parametrize("column", ["septal_thickening*left_upper", "NoteAcc_DEID"])
@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_a_missing_or_renamed_column_is_named(download: Path, column: str, change: str) -> None:
    new = None if change == "missing" else column.replace("e", "é", 1)
    edit_header(download / TRAIN_TABLE, column, new)
    message = refusal(download)
    assert f"lacks the column {column!r}:" in message and TRAIN_TABLE in message
    if new is not None:
        assert f"the nearest {new!r}" in message


def test_an_abnormality_that_is_gone_at_all_locations_is_named(download: Path) -> None:
    for location in LOCATIONS:
        edit_header(download / TEST_TABLE, f"hernia*{location}", f"hiatal_hernia*{location}")
    assert f"lacks the column 'hernia*{LOCATIONS[0]}' and {len(LOCATIONS) - 1} more" in refusal(
        download
    )


def test_a_scan_in_two_rows_or_two_archives_is_named(download: Path) -> None:
    copied = shutil.copy(download / "trn00001.npz", download / "more")
    assert "second archive of a scan" in refusal(download)
    Path(copied).unlink()
    write_table(download / VALID_TABLE, {"trn00001": set()})
    assert "has the scan 'trn00001' twice" in refusal(download)
    (download / VALID_TABLE).unlink()
    with (download / TRAIN_TABLE).open("a") as table:
        table.write((download / TRAIN_TABLE).read_text().splitlines()[1] + "\n")
    assert "another one in row 2" in refusal(download)


def test_a_cell_that_is_no_label_is_named(download: Path) -> None:
    write_table(download / TRAIN_TABLE, {"trn00001": set()}, word="2")
    message = refusal(download)
    assert "row 1, column" in message and "found '2'" in message


def test_folders_without_volumes_or_tables_are_refused(tmp_path: Path, download: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "nowhere")
    (download / TRAIN_TABLE).unlink()
    (download / TEST_TABLE).unlink()
    assert "lacks the label tables" in refusal(download)
    (tmp_path / "empty").mkdir()
    assert "holds no volumes" in refusal(tmp_path / "empty")


def test_two_data_sets_at_once_are_refused(
    download: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert preprocess(download, "--table", "cases.csv") == 2
    assert "--table and --rad-chestct name two data sets" in caplog.text


def test_a_broken_archive_is_set_aside_alone(download: Path) -> None:
    (download / "trn00001.npz").write_bytes(b"no archive")
    assert preprocess(download) == 0
    quarantine = (download.parent / "shards" / "quarantine.jsonl").read_text()
    assert "trn00001" in quarantine and "damaged" in quarantine


# From the download to figures and results


def place_in_archive(hu: NDArray[np.int16], affine: NDArray[np.float64]) -> NDArray[np.int16]:
    """A CT as the data set has it: axes to inferior, posterior and left, 0.8 mm, ±1000 HU."""
    image = nib.Nifti1Image(hu, affine)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt("IPL")
    )
    turned = image.as_reoriented(turn)
    zoom = np.array(nib.affines.voxel_sizes(turned.affine)) / 0.8
    array = ndimage.zoom(np.asarray(turned.dataobj), zoom, order=1, mode="nearest", grid_mode=True)
    return np.clip(array, -1000, 1000)


@pytest.mark.slow
def test_phantoms_go_from_a_download_to_figures_and_from_images_to_results(
    tmp_path: Path,
    tiny_run: Callable[[int], Path],
    phantoms: Callable[[int], PhantomCase],
) -> None:
    """Both ways read the same chests, so that the model says the same of them."""
    download, images = tmp_path / "Rad-ChestCT", tmp_path / "images"
    download.mkdir()
    images.mkdir()
    present: dict[str, set[str]] = {}
    for seed in (3, 4):
        phantom, name = phantoms(seed), f"trn0000{seed}"
        np.savez(download / f"{name}.npz", ct=place_in_archive(phantom.hu, phantom.affine))
        found = [finding for finding, label in phantom.labels.items() if label == 1]
        mapped = [finding for finding in found if finding in ABNORMALITIES_BY_FINDING]
        present[name] = {f"{ABNORMALITIES_BY_FINDING[finding][0]}*lung" for finding in mapped}
        write_nifti(phantom.hu, phantom.affine, images / f"{name}.nii.gz")
    write_table(download / TRAIN_TABLE, present)
    assert preprocess(download) == 0

    shards, metrics_path = tmp_path / "shards", tmp_path / "evaluation" / "metrics.json"
    checkpoint = ["--checkpoint", str(tiny_run(1)), "--device", "cpu"]
    where = ["--shards", str(shards), "--out", str(metrics_path)]
    assert main(["evaluate", *checkpoint, *where, "--no-plots", "--bootstrap", "0"]) == 0
    metrics = json.loads(metrics_path.read_text())
    assert metrics["labels"] == "Rad-ChestCT's label tables, 16 findings mapped"
    protocol = metrics["classification"]["vlm3d"]
    assert protocol["n_findings"] == 16 and not UNMAPPED & protocol["per_finding"].keys()
    assert "by VLM3D's protocol" in metrics_path.with_name("metrics.md").read_text()

    out = tmp_path / "results.json"
    words = [str(images), "--task", "classification", "--out", str(out)]
    assert main(["challenge", *words, *checkpoint]) == 0
    rows = json.loads(out.read_text())["predictions"]
    lines = (tmp_path / "evaluation" / "cases.jsonl").read_text().splitlines()
    cases = {case["key"]: case for case in map(json.loads, lines)}
    assert [row["input_image_name"] for row in rows] == sorted(cases)
    for row in rows:
        case = cases[row["input_image_name"]]
        expected = phantoms(int(row["input_image_name"][-1])).labels
        for finding, label in zip(FINDINGS, case["labels"], strict=True):
            assert label == (None if finding in UNMAPPED else expected[finding])
        probabilities = list(row["probabilities"].values())
        assert probabilities == pytest.approx(case["probabilities"], abs=0.02)


def test_the_tables_of_these_tests_have_the_published_form() -> None:
    mapped = {name for names in ABNORMALITIES_BY_FINDING.values() for name in names}
    assert mapped < set(ABNORMALITIES)
