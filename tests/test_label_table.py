"""Tables of labels: any name of a case finds its row, and each fault is one sentence."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rectvlm.label_table import read_label_table
from rectvlm.labels import FINDINGS
from rectvlm.types import InputError

Rows = list[list[str]]


def write_table(path: Path, rows: Rows, header: Sequence[str] = ("VolumeName", *FINDINGS)) -> Path:
    path.write_text("".join(";".join(cells) + "\n" for cells in [header, *rows]))
    return path


def row(name: str, first: str = "1") -> list[str]:
    return [name, first, *["0"] * (len(FINDINGS) - 1)]


def test_a_case_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    rows = [row("validation_1_a_1.nii.gz"), row("dataset/train_2_b", "0.0"), row("scan7.mhd", "")]
    table = read_label_table([write_table(tmp_path / "labels.csv", rows)])
    labels = table.labels_of([["valid_1_a_2"], ["train_2_b_1"], ["scan7"], ["x", "scan7"]])
    assert [values[0] for values in labels.rows] == [1, 0, None, None]
    assert all(values[1:] == (0,) * (len(FINDINGS) - 1) for values in labels.rows)
    assert labels.n_conflicting == 0


def test_rows_of_one_scan_that_disagree_leave_a_label_unknown(tmp_path: Path) -> None:
    first = write_table(tmp_path / "a.csv", [row("valid_1_a_1", "1"), row("valid_2_a", "")])
    second = write_table(tmp_path / "b.csv", [row("valid_1_a_2", "0"), row("valid_2_a", "1")])
    labels = read_label_table([first, second]).labels_of([["valid_1_a_1"], ["valid_2_a_1"]])
    assert [values[0] for values in labels.rows] == [None, 1] and labels.n_conflicting == 1


def test_columns_are_read_by_name_and_others_do_not_matter(tmp_path: Path) -> None:
    header = ["note", *reversed(FINDINGS), "key"]
    cells = ["x", *["0"] * (len(FINDINGS) - 1), "1", "case"]
    table = read_label_table([write_table(tmp_path / "labels.csv", [cells], header)])
    assert table.labels_of([["case"]]).rows[0][:2] == (1, 0)


FAULTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "a missing column": (
        lambda path: write_table(path, [row("a")[:-1]], ["VolumeName", *FINDINGS[:-1]]),
        ("lacks 1 column", f"none for {FINDINGS[-1]!r}"),
    ),
    "a renamed column": (
        lambda path: write_table(path, [row("a")], ["key", *FINDINGS[:-1], "interlobular septa"]),
        ("lacks 1 column", f"'interlobular septa' for {FINDINGS[-1]!r}", "names back"),
    ),
    "no names": (
        lambda path: write_table(path, [row("a")], ["study", *FINDINGS]),
        ("none for 'VolumeName or AccessionNo or key or case or scan'",),
    ),
    "a scan twice": (
        lambda path: write_table(path, [row("a"), row("b"), row("a.nii.gz")]),
        ("has a case twice in row 4", "'a' in row 2 as well"),
    ),
    "an empty name": (lambda path: write_table(path, [row("")]), ("has no name in row 2",)),
    "another value": (
        lambda path: write_table(path, [row("a", "2")]),
        (f"row 2, column {FINDINGS[0]!r}", "expected 0, 1 or nothing, found '2'"),
    ),
    "a word": (lambda path: write_table(path, [row("a", "yes")]), ("found 'yes'",)),
    "no file": (lambda path: path, ("cannot be read",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_sentence_with_its_place(tmp_path: Path, fault: str) -> None:
    write, sentences = FAULTS[fault]
    path = write(tmp_path / "labels.csv")
    with pytest.raises(InputError) as error:
        read_label_table([path])
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(sentence in message for sentence in sentences), message


def test_cases_without_a_row_are_counted_and_named(tmp_path: Path) -> None:
    table = read_label_table([write_table(tmp_path / "labels.csv", [row("a")])])
    with pytest.raises(InputError, match=r"lacks 4 of 5 cases: .*none for b, c, d, …; add"):
        table.labels_of([["a"], ["b"], ["c"], ["d"], ["e"]])
