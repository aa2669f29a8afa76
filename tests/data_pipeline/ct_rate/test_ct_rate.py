"""CT-RATE downloads to cases: each trap of the data set, set by a tree of files that a reader could
fall into."""

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from data_pipeline.cases import Case, case_to_sample
from data_pipeline.ct_rate.cases import CtRateCases, list_ct_rate_cases
from data_pipeline.ct_rate.options import CtRateOptions, add_ct_rate_options
from data_pipeline.ct_rate.series import choose_reconstruction
from data_pipeline.ct_rate.tables import SeriesMetadata
from data_pipeline.masks.mask_folders import MaskFolders
from rectvlm.cli_options import options_from_namespace
from rectvlm.data.dataset import collate_samples
from rectvlm.data.kernels import kernel_class, siemens_kernel_number
from rectvlm.data.shards import read_index, read_sample, write_shards
from rectvlm.files import file_sha256
from rectvlm.labels import FINDINGS
from rectvlm.models.cues import describe_batch_cues
from rectvlm.models.language_model import load_tokenizer
from rectvlm.models.report_prompt import encode_report_prompt
from rectvlm.pretrained import resolve_model
from rectvlm.types import OWN_OUTLINES, InputError, Sample, UserError
from rectvlm.volume_names import VolumeName, parse_volume_name
from tests.ct_rate_tree import Tree, phantom

GRID, SPACING = (16, 48, 48), (16.0, 7.2, 7.2)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Two scans of a training patient, one of a validation patient; files without content."""
    tree = Tree(tmp_path / "CT-RATE")
    for name in ("train_1_a_1", "train_1_b_1", "valid_1_a_1"):
        tree.add(name)
    return tree


def read(tree: Tree, **options: object) -> CtRateCases:
    return list_ct_rate_cases(tree.write(), CtRateOptions(**options))  # type: ignore[arg-type]


def keys(result: CtRateCases) -> list[str]:
    return [case.key for case in result.cases]


def row(case: Case) -> tuple[dict[str, int | None], str | None, str | None]:
    """Labels, findings and impression that a case will be loaded with."""
    known = case.load.args[1]  # type: ignore[attr-defined]
    return (
        dict(zip(FINDINGS, known.labels, strict=True)),
        known.report.findings,
        known.report.impression,
    )


def by_key(result: CtRateCases, key: str) -> Case:
    return next(case for case in result.cases if case.key == key)


def sample(case: Case) -> Sample:
    """As a worker makes it: the case crosses a process border."""
    return case_to_sample(pickle.loads(pickle.dumps(case)), GRID, SPACING)


# Names


@pytest.mark.parametrize(
    "text",
    [
        "valid_12_ab_3",
        "valid_12_ab_3.nii.gz",
        "validation_12_ab_3",
        "validation_12_ab_3.nii.gz",
        "  /mnt/x/valid_fixed/valid_12/valid_12_ab/valid_12_ab_3.nii.gz ",
        "D:\\ct\\valid_12_ab_3.nii",
    ],
)
def test_all_ways_to_write_a_name_are_one(text: str) -> None:
    name = parse_volume_name(text)
    assert name == VolumeName("valid", 12, "ab", 3)
    assert (name.key, name.scan, name.patient) == ("valid_12_ab_3", "valid_12_ab", "valid_12")


@pytest.mark.parametrize(
    "text", ["", "train_1", "train_1_a_1.nii.gz.part", "._train_1_a_1.nii.gz", "test_1_a_1"]
)
def test_other_texts_are_no_names(text: str) -> None:
    assert parse_volume_name(text) is None


@pytest.mark.parametrize("suffix", [True, False])
@pytest.mark.parametrize("column", ["VolumeName", "AccessionNo"])
def test_tables_join_whatever_they_call_a_volume(tree: Tree, suffix: bool, column: str) -> None:
    tree.labels["valid_1_a_1"]["Emphysema"] = "1"
    tree.name_as = lambda name: f"{name}.nii.gz" if suffix else name
    for columns in tree.columns.values():
        columns[0] = column
    result = read(tree)
    assert keys(result) == ["train_1_a_1", "train_1_b_1", "valid_1_a_1"]
    labels, findings, impression = row(by_key(result, "valid_1_a_1"))
    assert [finding for finding in FINDINGS if labels[finding] == 1] == ["Emphysema"]
    assert (findings, impression) == ("Findings of valid_1_a.", None)
    assert by_key(result, "valid_1_a_1").series["kernel"] == "Br40f"
    assert result.counts["cases without labels"] == result.counts["cases without a report"] == 0


def test_a_table_may_bear_the_other_prefix(tree: Tree) -> None:
    tree.write()
    labels = tree.dataset / "multi_abnormality_labels"
    (labels / "valid_predicted_labels.csv").rename(labels / "validation_predicted_labels.csv")
    assert list_ct_rate_cases(tree.root, CtRateOptions()).counts["cases without labels"] == 0


def test_numbers_sort_as_people_count(tree: Tree) -> None:
    for number in (10, 9, 2):
        tree.add(f"train_{number}_a_1")
    result = read(tree, splits=("train",), limit=3)
    assert keys(result) == ["train_1_a_1", "train_1_b_1", "train_2_a_1"]
    assert result.dropped["beyond the limit"] == ("train_9_a_1", "train_10_a_1")


# Labels


def test_a_missing_label_column_is_an_error_that_names_it_and_what_was_found(tree: Tree) -> None:
    columns = tree.columns["labels"]
    columns[columns.index("Hiatal hernia")] = "Hernia"
    columns.remove("Emphysema")
    with pytest.raises(InputError) as error:
        read(tree)
    assert "Hiatal hernia, Emphysema" in error.value.reason
    assert "train_predicted_labels.csv" in error.value.file
    assert "Hernia" in error.value.found and "Cardiomegaly" in error.value.found


@pytest.mark.parametrize("text", ["", "nan", "NaN", " "])
def test_a_missing_label_is_unknown_not_absent(tree: Tree, text: str) -> None:
    tree.labels["train_1_a_1"]["Lung nodule"] = text
    tree.labels["train_1_a_1"]["Emphysema"] = "1.0"
    result = read(tree)
    labels, _, _ = row(by_key(result, "train_1_a_1"))
    assert (
        labels["Lung nodule"] is None and labels["Emphysema"] == 1 and labels["Cardiomegaly"] == 0
    )
    assert result.counts["cases with some labels unknown"] == 1


@pytest.mark.parametrize("text", ["2", "-1", "0.7", "yes"])
def test_a_label_that_is_none_is_an_error_with_its_place(tree: Tree, text: str) -> None:
    tree.labels["train_1_b_1"]["Atelectasis"] = text
    with pytest.raises(
        InputError, match=r"train_predicted_labels\.csv .* row 2, column 'Atelectasis'"
    ) as error:
        read(tree)
    assert error.value.found == repr(text)


def test_columns_in_another_order_are_read_by_name(tree: Tree) -> None:
    tree.labels["train_1_a_1"]["Pleural effusion"] = "1"
    tree.columns["labels"] = ["VolumeName", *reversed(FINDINGS)]
    labels, _, _ = row(by_key(read(tree), "train_1_a_1"))
    assert [finding for finding in FINDINGS if labels[finding]] == ["Pleural effusion"]


def test_labels_and_report_of_one_reconstruction_hold_for_the_others(tree: Tree) -> None:
    tree.add("train_1_a_2")
    del tree.labels["train_1_a_1"], tree.reports["train_1_a_1"]
    tree.labels["train_1_a_2"]["Consolidation"] = "1"
    result = read(tree, reconstructions="all")
    assert row(by_key(result, "train_1_a_1")) == row(by_key(result, "train_1_a_2"))
    assert row(by_key(result, "train_1_a_1"))[0]["Consolidation"] == 1
    # Not those of the patient's other scan.
    assert row(by_key(result, "train_1_b_1"))[0]["Consolidation"] == 0


def test_rows_may_name_scans(tree: Tree) -> None:
    tree.labels = {"train_1_a": dict.fromkeys(FINDINGS, "1"), **tree.labels}
    del tree.labels["train_1_a_1"]
    labels, _, _ = row(by_key(read(tree), "train_1_a_1"))
    assert set(labels.values()) == {1}


def test_reconstructions_that_contradict_each_other_leave_a_label_unknown(tree: Tree) -> None:
    tree.add("train_1_a_2")
    tree.labels["train_1_a_1"] |= {"Emphysema": "1", "Lymphadenopathy": ""}
    tree.labels["train_1_a_2"] |= {"Emphysema": "0", "Lymphadenopathy": "1"}
    result = read(tree)
    labels, _, _ = row(by_key(result, "train_1_a_1"))
    assert labels["Emphysema"] is None
    assert labels["Lymphadenopathy"] == 1
    assert labels["Cardiomegaly"] == 0
    assert (
        result.counts["labels set to unknown since reconstructions of a scan contradict each other"]
        == 1
    )


def test_other_labels_replace_those_of_the_download(tree: Tree, tmp_path: Path) -> None:
    tables = [tmp_path / "train.csv", tmp_path / "valid.csv"]
    for path in tables:
        rows = [f"{path.stem}_{scan}.nii.gz{',1' * len(FINDINGS)}" for scan in ("1_a_9", "1_b_1")]
        path.write_text("\n".join([",".join(["VolumeName", *FINDINGS]), *rows]) + "\n")
    result = read(tree, labels=tuple(tables))
    for case in result.cases:
        assert set(row(case)[0].values()) == {1}, case.key
    stated = str(result.policy["labels"])
    assert f"train.csv (SHA-256 {file_sha256(tables[0])}), valid.csv" in stated
    with pytest.raises(InputError, match=r"train\.csv lacks 1 of 3 cases.*valid_1_a_1"):
        read(tree, labels=(tables[0],))


def test_a_row_twice_is_fine_only_when_it_says_the_same(tree: Tree) -> None:
    path = tree.write() / "dataset/multi_abnormality_labels/train_predicted_labels.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    assert len(list_ct_rate_cases(tree.root, CtRateOptions()).cases) == 3
    path.write_text("\n".join([*lines, lines[1][:-1] + "1"]) + "\n")
    with pytest.raises(
        InputError, match=r"contradicts itself in row 3.*one content for train_1_a_1"
    ):
        list_ct_rate_cases(tree.root, CtRateOptions())


# Reports


@pytest.mark.parametrize("text", ["Not given.", "not given", " NOT GIVEN. ", ""])
def test_a_report_that_was_not_given_is_none(tree: Tree, text: str) -> None:
    tree.reports["train_1_a_1"] |= {"Findings_EN": text, "Impressions_EN": text}
    result = read(tree)
    assert row(by_key(result, "train_1_a_1"))[1:] == (None, None)
    assert result.counts["cases without a report"] == 1


def test_report_text_comes_through_as_it_is(tree: Tree) -> None:
    text = 'Nodule of "5 mm" in the left lower lobe,\nnot given contrast; Bülau drain. 007'
    tree.reports["train_1_a_1"] |= {"Findings_EN": text, "Impressions_EN": "007"}
    assert row(by_key(read(tree), "train_1_a_1"))[1:] == (text, "007")


def test_different_reports_of_one_scan_stay_with_their_reconstructions(tree: Tree) -> None:
    tree.add("train_1_a_2")
    tree.reports["train_1_a_2"]["Findings_EN"] = "Another text."
    result = read(tree, reconstructions="all")
    assert row(by_key(result, "train_1_a_1"))[1] == "Findings of train_1_a."
    assert row(by_key(result, "train_1_a_2"))[1] == "Another text."
    assert result.counts["scans whose reconstructions have different reports"] == 1


# What is missing


def test_a_volume_without_rows_is_kept_with_unknowns_and_counted(tree: Tree) -> None:
    for rows in (tree.labels, tree.reports, tree.metadata):
        del rows["train_1_b_1"]
    result = read(tree)
    case = by_key(result, "train_1_b_1")
    labels, findings, impression = row(case)
    assert set(labels.values()) == {None} and (findings, impression) == (None, None)
    assert case.series["kernel"] is None and case.series["slice_spacing"] is None
    for what in ("labels", "a report", "metadata"):
        assert result.counts[f"cases without {what}"] == 1


def test_rows_without_a_volume_are_counted_or_become_cases_for_the_quarantine(tree: Tree) -> None:
    tree.add("train_2_a_1", layout=None)
    result = read(tree)
    assert "train_2_a_1" not in keys(result)
    assert result.counts["volumes that the tables name and that are not on disk"] == 1
    result = read(tree, require_all=True)
    case = by_key(result, "train_2_a_1")
    assert case.source == "CT-RATE train_fixed/train_2/train_2_a/train_2_a_1.nii.gz"
    assert result.counts["volumes that the tables name and that are not on disk"] == 0
    with pytest.raises(UserError, match="does not exist"):
        case.load()


@pytest.mark.parametrize(
    ("table", "file"),
    [
        ("labels", "multi_abnormality_labels/train_predicted_labels.csv"),
        ("reports", "radiology_text_reports/validation_reports.csv"),
        ("metadata", "metadata/train_metadata.csv"),
        ("no-chest", "metadata/no_chest_valid.txt"),
    ],
)
def test_a_missing_table_is_an_error_unless_it_is_allowed(
    tree: Tree, table: str, file: str
) -> None:
    tree.write()
    (tree.dataset / file).unlink()
    with pytest.raises(
        InputError, match=f"lacks the {table} .*{Path(file).name}.*--without {table}"
    ):
        list_ct_rate_cases(tree.root, CtRateOptions())
    result = list_ct_rate_cases(tree.root, CtRateOptions(without=(table,)))  # type: ignore[arg-type]
    assert len(result.cases) == 3 and result.policy["without"] == table


def test_tables_of_a_part_that_was_not_downloaded_are_not_asked_for(tree: Tree) -> None:
    tree.write()
    for path in tree.dataset.rglob("*train*"):
        if path.is_file() and path.suffix in (".csv", ".txt", ".gz"):
            path.unlink()
    assert keys(list_ct_rate_cases(tree.root, CtRateOptions())) == ["valid_1_a_1"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"]
)
def test_a_damaged_table_is_an_error_that_names_it(tree: Tree, content: bytes) -> None:
    path = tree.write() / "dataset/metadata/train_metadata.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train_metadata\.csv"):
        list_ct_rate_cases(tree.root, CtRateOptions())


def test_a_name_that_is_none_is_an_error_with_its_place(tree: Tree) -> None:
    tree.name_as = lambda name: "0012" if name == "train_1_b_1" else name
    with pytest.raises(InputError, match=r"in row 2 .*'0012'"):
        read(tree)


# Files


def test_the_folder_may_be_given_with_or_without_dataset(tree: Tree) -> None:
    root = tree.write()
    cases = [list_ct_rate_cases(path, CtRateOptions()).cases for path in (root, root / "dataset")]
    assert [case.source for case in cases[0]] == [case.source for case in cases[1]]
    with pytest.raises(InputError, match=r"is no CT-RATE download.*metadata"):
        list_ct_rate_cases(_without_volumes(tree), CtRateOptions())


def _without_volumes(tree: Tree) -> Path:
    for split in ("train", "valid"):
        (tree.dataset / f"{split}_fixed").rename(tree.root / f"elsewhere_{split}")
    return tree.dataset


def test_the_fixed_tree_counts_before_the_first_release(tree: Tree) -> None:
    tree.add("train_1_a_1", layout="v1")
    tree.add("train_3_a_1", layout="v1")

    def sources(layout: str) -> list[str]:
        result = read(tree, layout=layout, splits=("train",))
        return [case.source.split()[1].split("/")[0] + " " + case.key for case in result.cases]

    assert sources("auto") == [
        "train_fixed train_1_a_1",
        "train_fixed train_1_b_1",
        "train train_3_a_1",
    ]
    assert sources("fixed") == ["train_fixed train_1_a_1", "train_fixed train_1_b_1"]
    assert sources("v1") == ["train train_1_a_1", "train train_3_a_1"]


def test_stray_files_are_counted_and_hidden_ones_passed_over(tree: Tree) -> None:
    folder = tree.path("train_1_a_1").parent
    (folder / "train_1_a_1.nii.gz.part").touch()
    (folder / "._train_1_a_1.nii.gz").touch()
    result = read(tree)
    assert keys(result) == ["train_1_a_1", "train_1_b_1", "valid_1_a_1"]
    assert result.counts["other files among the volumes"] == 1


def test_a_volume_in_the_other_parts_folder_is_refused(tree: Tree) -> None:
    folder = tree.dataset / "valid_fixed/train_7/train_7_a"
    folder.mkdir(parents=True)
    (folder / "train_7_a_1.nii.gz").touch()
    with pytest.raises(UserError, match="volume of train in a folder of valid"):
        read(tree)


def test_no_volume_is_opened(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.write()
    real = Path.open

    def watched(self: Path, *args: object, **kwargs: object) -> object:
        assert ".nii" not in self.name, f"{self} was opened"
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", watched)
    assert len(list_ct_rate_cases(tree.root, CtRateOptions()).cases) == 3


# What is left out


def test_no_chest_volumes_are_left_out_by_base_name(tree: Tree) -> None:
    tree.no_chest["train"] = ["/share/ct/train/train_1/train_1_b/train_1_b_1.nii.gz", ""]
    tree.no_chest["valid"] = ["validation_1_a_1"]
    result = read(tree)
    assert keys(result) == ["train_1_a_1"]
    assert result.dropped["does not show the chest (no-chest list)"] == (
        "train_1_b_1",
        "valid_1_a_1",
    )


def test_a_no_chest_reconstruction_is_not_chosen(tree: Tree) -> None:
    tree.add("train_1_a_2", kernel="['Br60f', '3']")
    tree.no_chest["train"] = ["train_1_a_1.nii.gz"]
    assert keys(read(tree, splits=("train",))) == ["train_1_a_2", "train_1_b_1"]


def test_volumes_known_to_be_bad_are_left_out_by_name_and_counted(tree: Tree) -> None:
    for name in ("train_1267_a_3", "train_1267_a_4", "train_11755_a_3", "train_11755_a_4"):
        tree.add(name)
        tree.metadata[name]["ZSpacing"] = ""
    for name in ("train_14384_a_2", "valid_251_a_2"):
        tree.add(name, layout=None)
    result = read(tree, require_all=True, reconstructions="all")
    assert keys(result) == ["train_1_a_1", "train_1_b_1", "train_1267_a_3", "valid_1_a_1"]
    assert result.dropped == {
        "known to be unusable: without slice spacing": (
            "train_1267_a_4",
            "train_11755_a_3",
            "train_11755_a_4",
        ),
        "known to be unusable: not in the data set": ("train_14384_a_2", "valid_251_a_2"),
    }
    # Another volume without a spacing in the table: the header decides.
    assert by_key(result, "train_1267_a_3").series["slice_spacing"] is None


def test_lists_keep_volumes_and_scans_out(tree: Tree, tmp_path: Path) -> None:
    tree.add("train_2_a_1")
    tree.add("train_2_a_2")
    listed = tmp_path / "out.txt"
    listed.write_text("# a comment\n/x/train_1_a_1.nii.gz\ntrain_2_a\ntrain_99_a_1  # not here\n")
    result = read(tree, exclude=(listed,), splits=("train",))
    assert keys(result) == ["train_1_b_1"]
    assert result.dropped["kept out by a list"] == ("train_1_a_1", "train_2_a_1", "train_2_a_2")
    assert result.counts["names in exclude lists that no volume bears"] == 1
    listed.write_text("train_1_a_1\nscan 17\n")
    with pytest.raises(InputError, match=r"in line 2 .*'scan 17'"):
        read(tree, exclude=(listed,))


def rex(path: Path, **parts: list[str]) -> Path:
    """A table of ReXGroundingCT."""
    items = {
        part: [
            {"name": f"{name}.nii.gz", "findings": {"0": "Nodule"}, "categories": {"0": "2d"}}
            for name in names
        ]
        for part, names in parts.items()
    }
    path.write_text(json.dumps(items))
    return path


def test_patients_that_rexgrounding_validates_on_are_not_trained_on(
    tree: Tree, tmp_path: Path
) -> None:
    for name in ("train_2_a_1", "train_2_a_2", "train_3_a_1", "train_4_a_1"):
        tree.add(name)
    table = rex(
        tmp_path / "dataset.json",
        train=["train_4_a_1"],
        val=["train_2_a_2", "valid_1_a_1"],
        test=["train_1_b_1"],
    )
    result = read(tree, hold_out=(table,))
    assert keys(result) == ["train_3_a_1", "train_4_a_1", "valid_1_a_1"]
    # Both reconstructions of the scan, and the other scan of the patient.
    held = result.dropped["patient of the validation or test part of ReXGroundingCT"]
    assert held == ("train_1_a_1", "train_1_b_1", "train_2_a_1", "train_2_a_2")


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"val": []}', '{"val": [{"name": "x"}]}', '{"val": [{}]}', "no"]
)
def test_a_table_that_holds_nothing_out_is_refused(
    tree: Tree, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json"):
        read(tree, hold_out=(path,))


# Reconstructions


@pytest.mark.parametrize(
    ("text", "number", "group"),
    [
        ("Br40f", 40, "soft"),
        ("B31f", 31, "soft"),
        ("Bl57d", 57, "sharp"),
        ("I50f", 50, "sharp"),
        ("I30f", 30, "soft"),
        ("B70s", 70, "sharp"),
        ("B", None, "soft"),
        ("YA", None, "sharp"),
        ("L", None, "sharp"),
        ("LUNG", None, "sharp"),
        ("STANDARD", None, "soft"),
        ("FC08", None, "soft"),
        ("FC52", None, "sharp"),
        ("NEW-9", None, None),
        (None, None, None),
    ],
)
def test_kernels(text: str | None, number: int | None, group: str | None) -> None:
    assert (siemens_kernel_number(text), kernel_class(text)) == (number, group)


def choice(
    *series: SeriesMetadata | None, kernel: str = "soft", grid: float = 5.0
) -> tuple[int, str]:
    """Number of the reconstruction that is chosen from these, and why; the same from any order."""
    names = [VolumeName("train", 1, "a", number) for number in range(1, len(series) + 1)]
    known = {name: one for name, one in zip(names, series, strict=True) if one is not None}
    name, why = choose_reconstruction(names, known, kernel, grid)  # type: ignore[arg-type]
    assert choose_reconstruction(names[::-1], known, kernel, grid) == (name, why)  # type: ignore[arg-type]
    assert name.reconstruction is not None
    return name.reconstruction, why


def made(
    kernel: str | None = "Br40f",
    spacing: float | None = 1.5,
    length: float = 300,
    across: float = 350,
) -> SeriesMetadata:
    slices = round(length / (spacing or 1.5))
    return SeriesMetadata(
        "SIEMENS",
        kernel,
        spacing,
        slices,
        (across / 512, across / 512),
        512,
        1.0,
        -1024.0,
        None,
        None,
    )


def test_the_kernel_decides_not_the_number() -> None:
    assert choice(made("Br60f"), made("Br40f")) == (2, "has the wanted kernel")
    assert choice(made("Br60f"), made("Br40f"), kernel="sharp") == (1, "has the wanted kernel")
    assert choice(made("YA"), made("B"))[0] == 2
    assert choice(made("?"), made("Br60f"), made(None))[0] == 1
    assert choice(made("B20f"), made("B41s")) == (2, "its kernel is nearer to the usual one")


def test_slices_are_fine_enough_for_the_grid_and_no_finer_than_that() -> None:
    assert choice(made(spacing=0.75), made(spacing=1.5), made(spacing=4)) == (
        2,
        "has the better slice spacing",
    )
    assert choice(made(spacing=5), made(spacing=4))[0] == 2
    assert choice(made(spacing=10), made(spacing=5))[0] == 2
    assert choice(made(spacing=3), made(spacing=2), grid=2.0)[0] == 2
    assert choice(made(spacing=None), made(spacing=5))[0] == 2
    # Slices of 10 mm leave gaps that no kernel makes up for.
    reason = "its slices are not farther apart than the grid's"
    assert choice(made("Br40f", spacing=10), made("Br60f", spacing=1)) == (2, reason)


def test_a_detail_of_the_scan_is_not_chosen() -> None:
    assert choice(made(length=100), made("Br60f")) == (2, "covers more of the scan")
    assert choice(made(across=180), made("Br60f"))[0] == 2
    assert choice(made(length=280), made("Br60f"))[0] == 1


def test_ties_go_to_the_lowest_number() -> None:
    assert choice(made(), made()) == (1, "has the lowest number")
    assert choice(None, None) == (1, "has the lowest number")
    assert choice(made()) == (1, "the only reconstruction")


def test_the_choice_and_its_reason_are_recorded(tree: Tree) -> None:
    tree.add("train_1_a_2", kernel="['Br60f', '3']", spacing=1.0)
    result = read(tree, splits=("train",))
    assert result.dropped["another reconstruction of the scan was chosen"] == ("train_1_a_2",)
    assert by_key(result, "train_1_a_1").series == {
        "manufacturer": "SIEMENS",
        "kernel": "Br40f",
        "kernel_class": "soft",
        "slice_spacing": 1.5,
        "reconstructions": 2.0,
        "chosen": "has the wanted kernel",
    }
    assert keys(read(tree, splits=("train",), kernel="sharp"))[0] == "train_1_a_2"
    every = read(tree, splits=("train",), reconstructions="all")
    assert keys(every) == ["train_1_a_1", "train_1_a_2", "train_1_b_1"]
    assert {case.scan for case in every.cases[:2]} == {"train_1_a"}


def test_the_reconstruction_that_was_outlined_is_the_one_that_is_used(
    tree: Tree, tmp_path: Path
) -> None:
    tree.add("train_1_a_2", kernel="['Br60f', '3']")
    (tmp_path / "masks/train_1_a_2").mkdir(parents=True)
    (tmp_path / "masks/train_1_a_2/lung_nodule.nii.gz").touch()
    case = read(tree, masks=MaskFolders(lesions=tmp_path / "masks")).cases[0]
    assert (case.key, case.series["chosen"]) == ("train_1_a_2", "its lesions were outlined")


# Splits and identity


@pytest.fixture
def many_patients(tmp_path: Path) -> Tree:
    """Two scans of each of 60 training patients, one of each of 10 of validation."""
    tree = Tree(tmp_path / "CT-RATE")
    for number in range(60):
        tree.add(f"train_{number}_a_1")
        tree.add(f"train_{number}_b_1")
    for number in range(10):
        tree.add(f"valid_{number}_a_1")
    return tree


def patients_by_split(result: CtRateCases) -> dict[str, set[str]]:
    patients: dict[str, set[str]] = {}
    for case in result.cases:
        patients.setdefault(case.split, set()).add(case.patient)
    return patients


def test_a_share_of_the_training_patients_with_all_their_scans_is_the_dev_split(
    many_patients: Tree,
) -> None:
    few = patients_by_split(read(many_patients, dev_share=0.1))
    more = patients_by_split(read(many_patients, dev_share=0.3))
    assert not more["train"] & more["dev"] and len(more["train"] | more["dev"]) == 60
    assert 10 <= len(more["dev"]) <= 26 and few["dev"] < more["dev"]
    assert few["valid"] == more["valid"] == {f"valid_{number}" for number in range(10)}
    assert "dev" not in patients_by_split(read(many_patients, dev_share=0.0))
    # No other patient decides: one fewer changes nothing for the rest.
    del many_patients.labels["train_0_a_1"]
    many_patients.path("train_0_a_1").unlink()
    again = read(many_patients, dev_share=0.3, limit=1)
    assert patients_by_split(again)["dev"] <= more["dev"] and len(again.cases) == 3
    assert again.policy["dev_share"] == 0.3


def test_the_cases_that_a_dev_share_moves_are_made_again(many_patients: Tree) -> None:
    before = {case.key: case for case in read(many_patients, dev_share=0.1).cases}
    moved = []
    for case in read(many_patients, dev_share=0.3).cases:
        is_same = case.identity == before[case.key].identity
        assert is_same == (case.split == before[case.key].split)
        moved += [] if is_same else [case.split]
    assert moved and set(moved) == {"dev"}


def test_a_dev_share_that_is_a_percentage_is_refused() -> None:
    with pytest.raises(UserError, match=r"--dev-share 2 leaves no patient.*0\.02 for 2%"):
        CtRateOptions(dev_share=2)


def test_train_and_valid_share_no_patient_though_their_numbers_are_the_same(tree: Tree) -> None:
    result = read(tree)
    assert {case.patient for case in result.cases} == {"train_1", "valid_1"}
    assert [case.split for case in result.cases] == ["train", "train", "valid"]


def test_identity_changes_with_rows_files_and_masks_and_with_nothing_else(
    tree: Tree, tmp_path: Path
) -> None:
    folder = tmp_path / "masks/train_1_a_1"
    folder.mkdir(parents=True)

    def identities() -> list[tuple[str, ...]]:
        return [
            case.identity
            for case in read(tree, masks=MaskFolders(lesions=tmp_path / "masks")).cases
        ]

    def changed(before: list[tuple[str, ...]]) -> list[bool]:
        return [one != other for one, other in zip(before, identities(), strict=True)]

    def change(rows: dict[str, dict[str, str]], column: str, value: str) -> Callable[[], object]:
        return lambda: rows["train_1_a_1"].update({column: value})

    assert identities() == identities()
    for act in (
        change(tree.labels, "Emphysema", "1"),
        change(tree.reports, "Impressions_EN", "Other."),
        change(tree.metadata, "RescaleIntercept", "-8192"),
        change(tree.metadata, "ConvolutionKernel", "YA"),
        lambda: tree.path("train_1_a_1").write_bytes(b"more"),
        (folder / "lung_nodule.nii.gz").touch,
    ):
        before = identities()
        act()
        assert changed(before) == [True, False, False]


def test_what_a_worker_is_sent_is_small(tree: Tree) -> None:
    for case in read(tree).cases:
        assert len(pickle.dumps(case)) < 4000


def test_what_goes_into_the_manifest_is_json(tree: Tree) -> None:
    tree.no_chest["train"] = ["train_1_b_1"]
    result = read(tree)
    assert len(result.cases) == 2
    assert result.dropped["does not show the chest (no-chest list)"] == ("train_1_b_1",)
    assert json.loads(json.dumps({**result.policy, "counts": result.counts}))["kernel"] == "soft"


# Volumes


INDICATION, TECHNIQUE = "Left-sided chest pain,  cough; pneumonia?", "Non-contrast, 1.5 mm slices."


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Real volumes of one phantom: fixed, and as the first release has them with either
    intercept."""
    tree = Tree(tmp_path_factory.mktemp("volumes"))
    tree.add("train_1_a_1", 3)
    tree.add("train_2_a_1", 3, layout="v1", intercept=-1024)
    tree.add("train_3_a_1", 3, layout="v1", intercept=-8192, slope=2)
    tree.add_lesions("train_1_a_1", 3, tree.root / "masks")
    tree.reports["train_1_a_1"] |= {
        "ClinicalInformation_EN": INDICATION,
        "Technique_EN": TECHNIQUE,
    }
    tree.write()
    return tree


def test_indication_and_technique_go_from_the_table_to_the_prompt(
    volumes: Tree, tmp_path: Path
) -> None:
    result = list_ct_rate_cases(volumes.root, CtRateOptions())
    made = [sample(by_key(result, key)) for key in ("train_1_a_1", "train_2_a_1")]
    write_shards(made, tmp_path)
    locations = read_index(tmp_path).select_split("train")
    batch = collate_samples([read_sample(tmp_path, location) for location in locations])
    assert [meta.indication for meta in batch.metas] == [INDICATION, None]  # "Not given."
    nothing_found = torch.zeros(2, len(FINDINGS))
    with_context, without = describe_batch_cues(
        batch, nothing_found, [0.5] * len(FINDINGS), batch.lesions * 0
    )
    examination = f"Indication: {' '.join(INDICATION.split())} Technique: {TECHNIQUE}"
    assert with_context == f"{examination} {without}"
    assert without.startswith("No findings suggested.")
    tokenizer = load_tokenizer(resolve_model("bundled:tiny-llama"))
    after = encode_report_prompt(tokenizer, with_context)[1]
    assert examination in tokenizer.decode(after)


def test_an_indication_alone_is_no_report(tree: Tree) -> None:
    nothing = {"Findings_EN": "Not given.", "Impressions_EN": "Not given."}
    tree.reports["train_1_a_1"] |= nothing | {"ClinicalInformation_EN": INDICATION}
    result = read(tree)
    assert result.counts["cases without a report"] == 1
    known = by_key(result, "train_1_a_1").load.args[1]  # type: ignore[attr-defined]
    assert known.report.indication == INDICATION


def test_fixed_volumes_are_not_rescaled_again(volumes: Tree) -> None:
    result = list_ct_rate_cases(volumes.root, CtRateOptions())
    assert by_key(result, "train_1_a_1").load.args[1].intercept == -1024  # type: ignore[attr-defined]
    made = sample(by_key(result, "train_1_a_1"))
    assert (made.meta.hu.slope, made.meta.hu.intercept) == (1, 0)
    assert made.meta.labels == phantom(3).labels and made.meta.findings == phantom(3).findings
    assert (
        made.meta.scan == "train_1_a"
        and made.meta.source == "CT-RATE train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"
    )


@pytest.mark.parametrize(
    ("key", "slope", "intercept"), [("train_2_a_1", 1, -1024), ("train_3_a_1", 2, -8192)]
)
def test_the_first_release_gets_its_hu_and_its_place_from_the_metadata(
    volumes: Tree, key: str, slope: float, intercept: float
) -> None:
    result = list_ct_rate_cases(volumes.root, CtRateOptions())
    fixed, first = sample(by_key(result, "train_1_a_1")), sample(by_key(result, key))
    assert (first.meta.hu.slope, first.meta.hu.intercept) == (slope, intercept)
    np.testing.assert_allclose(
        first.meta.geometry.grid_affine, fixed.meta.geometry.grid_affine, atol=1e-3
    )
    # The chest is not its own mirror image, so equal voxels mean equal sides.
    assert np.abs(first.ct.astype(int) - fixed.ct).max() <= 1
    assert np.abs(first.ct[:, :, ::-1].astype(int) - fixed.ct).mean() > 20


def test_a_header_without_orientation_takes_it_from_the_metadata_too(volumes: Tree) -> None:
    image = nib.load(volumes.path("train_2_a_1", "v1"))
    blank = nib.Nifti1Image(np.asarray(image.dataobj), None)
    assert (int(blank.header["sform_code"]), int(blank.header["qform_code"])) == (0, 0)
    volumes.add("train_4_a_1", 3, layout="v1")
    nib.save(blank, volumes.path("train_4_a_1", "v1"))
    result = list_ct_rate_cases(volumes.write(), CtRateOptions())
    one, other = (
        by_key(result, key).load().volume.affine for key in ("train_4_a_1", "train_2_a_1")
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_header_of_voxel_sizes_alone_tells_no_side(volumes: Tree, sign: int) -> None:
    """Programs write it that know the spacing only; it claims an orientation, mostly the wrong
    one."""
    image = nib.load(volumes.path("train_1_a_1"))
    size = np.linalg.norm(image.affine[:3, :3], axis=0)
    volumes.add("train_5_a_1", 3, layout="v1")
    path = volumes.path("train_5_a_1", "v1")
    hu = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(hu, np.diag([sign * size[0], sign * size[1], size[2], 1])), path)
    case = by_key(list_ct_rate_cases(volumes.write(), CtRateOptions()), "train_5_a_1")
    made, fixed = (
        sample(case),
        sample(by_key(list_ct_rate_cases(volumes.root, CtRateOptions()), "train_1_a_1")),
    )
    assert np.abs(made.ct.astype(int) - fixed.ct).max() <= 1
    # Of another size than the metadata's, it is another volume.
    nib.save(nib.Nifti1Image(hu, np.diag([size[0] * 1.3, size[1] * 1.3, size[2], 1])), path)
    with pytest.raises(
        InputError, match=r"blank header.*no metadata that fits.*left and right are unknown"
    ):
        case.load()
    path.unlink()
    (
        volumes.labels.pop("train_5_a_1"),
        volumes.reports.pop("train_5_a_1"),
        volumes.metadata.pop("train_5_a_1"),
    )
    volumes.write()


@pytest.mark.parametrize(
    "column", ["ImagePositionPatient", "ImageOrientationPatient", "XYSpacing", "ZSpacing"]
)
def test_a_blank_header_without_metadata_is_refused(volumes: Tree, column: str) -> None:
    metadata_row = dict(volumes.metadata["train_2_a_1"])
    volumes.metadata["train_2_a_1"][column] = "nan"
    case = by_key(list_ct_rate_cases(volumes.write(), CtRateOptions()), "train_2_a_1")
    volumes.metadata["train_2_a_1"] = metadata_row
    volumes.write()
    with pytest.raises(InputError, match=r"blank header.*left and right are unknown"):
        case.load()


def test_masks_come_with_their_volume(volumes: Tree) -> None:
    options = CtRateOptions(masks=MaskFolders(lesions=volumes.root / "masks"))
    result = list_ct_rate_cases(volumes.root, options)
    made = sample(by_key(result, "train_1_a_1"))
    assert made.meta.lesions_annotated == phantom(3).lesions_annotated
    assert made.meta.lesions_source["lung_nodule"] == OWN_OUTLINES and made.lesions.any()
    without = sample(by_key(result, "train_2_a_1"))
    assert not any(without.meta.lesions_annotated.values())
    assert not any(without.meta.lesions_source.values())


def test_the_downloads_own_totalsegmentator_masks_are_found(tree: Tree, tmp_path: Path) -> None:
    path = tree.dataset / "ts_seg/ts_total/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"
    path.parent.mkdir(parents=True)
    path.touch()
    first, second, _ = read(tree).cases
    assert any("ts_total" in one for one in first.identity)
    assert not any("ts_total" in one for one in second.identity)
    (tmp_path / "none").mkdir()
    first = read(tree, masks=MaskFolders(ts_seg=tmp_path / "none")).cases[0]
    assert not any("ts_total" in one for one in first.identity)


# Command line


def test_options_come_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_ct_rate_options(parser)
    assert options_from_namespace(CtRateOptions, parser.parse_args([])) == CtRateOptions()
    line = [
        "--ct-rate",
        "/x",
        "--splits",
        "valid",
        "--layout",
        "v1",
        "--reconstructions",
        "all",
        "--kernel",
        "sharp",
    ]
    line += [
        "--exclude",
        "a",
        "--exclude",
        "b",
        "--hold-out",
        "c.json",
        "--lesions",
        str(tmp_path),
        "--limit",
        "3",
    ]
    line += ["--without", "reports", "no-chest", "--require-all", "--dev-share", "0.1"]
    given = parser.parse_args(line)
    assert given.ct_rate == Path("/x")
    options = options_from_namespace(CtRateOptions, given, grid_spacing_mm=2.5)
    assert options == CtRateOptions(
        splits=("valid",),
        dev_share=0.1,
        layout="v1",
        reconstructions="all",
        kernel="sharp",
        grid_spacing_mm=2.5,
        exclude=(Path("a"), Path("b")),
        hold_out=(Path("c.json"),),
        masks=MaskFolders(lesions=tmp_path),
        without=("reports", "no-chest"),
        require_all=True,
        limit=3,
    )
    with pytest.raises(SystemExit):
        parser.parse_args(["--limit", "0"])
    assert "--limit: must be at least 1, not 0" in capsys.readouterr().err
