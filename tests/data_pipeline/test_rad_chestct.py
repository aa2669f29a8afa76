"""Rad-ChestCT's volumes and tables to shards: sides, labels, and what is refused by name."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rad_chestct_tree import ABNORMALITIES, LOCATIONS, write_archive, write_table

from data_pipeline import preprocess as pipeline
from data_pipeline.rad_chestct import (
    ABNORMALITIES_BY_FINDING,
    LABEL_TABLES,
    list_rad_chestct_cases,
    read_finding_labels,
)
from data_pipeline.verify.verify import main as verify_main
from rectvlm.data.shards import read_index, read_sample
from rectvlm.labels import FINDINGS
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


def test_the_tables_of_these_tests_have_the_published_form() -> None:
    mapped = {name for names in ABNORMALITIES_BY_FINDING.values() for name in names}
    assert mapped < set(ABNORMALITIES)
