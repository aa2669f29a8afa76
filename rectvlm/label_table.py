"""A table of the 18 labels by case: CT-RATE's own, a refined one, or a user's.

    VolumeName,Medical material,Arterial wall calcification,…
    valid_1_a_1.nii.gz,0,1,…
    valid_2_a,1,,…                 an empty cell is unknown

Labels belong to a scan. A row may name the scan or one of its volumes.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rectvlm.data.volume import strip_suffix
from rectvlm.delimited_file import TableRow, read_delimited_file
from rectvlm.labels import FINDINGS
from rectvlm.types import InputError
from rectvlm.volume_names import parse_volume_name

FindingLabels = tuple[int | None, ...]
"""Labels in the order of `FINDINGS`: 1, 0, or None for unknown."""
NAME_COLUMNS = ("VolumeName", "AccessionNo", "key", "case", "scan")
"""Columns that may hold the name of the case; the first one that a table has is used."""
UNKNOWN_VALUES = frozenset({"", "nan", "na", "n/a", "none", "null"})
"""Cells, in lower case, that stand for no value."""
_SHOWN_NAMES = 3
"""Number of names that a message shows."""


@dataclass(frozen=True)
class ScanLabels:
    """Labels of some scans, in their order."""

    rows: list[FindingLabels]
    """Labels of each scan."""
    n_conflicting: int
    """Number of labels in which rows of one scan disagree; they count as unknown."""


@dataclass(frozen=True)
class LabelTable:
    """A table of labels that was read, from one file or several."""

    paths: tuple[Path, ...]
    """Files of the table."""
    rows: dict[str, list[FindingLabels]]
    """Rows by name without folder and suffix; rows of reconstructions under their scan."""

    def labels_of(self, scans: Sequence[Iterable[str]]) -> ScanLabels:
        """Labels of scans.

        Args:
            scans: names by which each scan may be in the table: its own, and its volumes'.

        Raises:
            InputError: a scan has no row.
        """
        labels, missing, n_conflicting = [], [], 0
        for scan_names in scans:
            names = list(scan_names)
            rows: list[FindingLabels] = []
            for name in dict.fromkeys(map(_simplify_name, names)):
                rows += self.rows.get(name, [])
            if not rows:
                missing.append(names[0])
                continue
            merged, conflicts = _merge_rows(rows)
            labels.append(merged)
            n_conflicting += conflicts
        if missing:
            more = ", …" if len(missing) > _SHOWN_NAMES else ""
            raise InputError(
                " and ".join(map(str, self.paths)),
                f"lacks {len(missing)} of {len(scans)} cases",
                expected="a row for each",
                found=f"none for {', '.join(missing[:_SHOWN_NAMES])}{more}",
                remedy="add their rows, with empty cells where a label is unknown",
            )
        return ScanLabels(labels, n_conflicting)


def read_label_table(paths: Sequence[Path]) -> LabelTable:
    """Read a table of labels from one file or several; columns that are no finding are ignored.

    Raises:
        InputError: the file cannot be read, a column is missing, a name has two rows, or a value is
            neither 0, 1 nor empty.
    """
    rows: dict[str, list[FindingLabels]] = defaultdict(list)
    for path in paths:
        for name, labels in _read_rows(path):
            rows[name].append(labels)
    return LabelTable(tuple(paths), dict(rows))


def _read_rows(path: Path) -> Iterator[tuple[str, FindingLabels]]:
    """Yield the name by which a case is found, and the labels, of each row of a file."""
    table = read_delimited_file(path)
    name_column = _find_columns(path, table.columns)
    first_rows: dict[str, int] = {}
    for row in table.rows:
        written_name = _strip_name(row.cells[name_column])
        if not written_name:
            raise _wrong_row(path, row, "has no name", "the name of a case", "an empty cell")
        first = first_rows.setdefault(written_name, row.number)
        if first != row.number:
            found = f"{written_name!r} in row {first} as well"
            raise _wrong_row(path, row, "has a case twice", "one row for each", found)
        labels = [parse_label(row.cells[name], path, row.number, name) for name in FINDINGS]
        yield _simplify_name(written_name), tuple(labels)


def parse_label(text: str, path: Path, row_number: int, column: str) -> int | None:
    """Read the cell of a label.

    Args:
        text: content of the cell.
        path: of the table, for the error.
        row_number: number of the row, for the error.
        column: name of the column, for the error.

    Raises:
        InputError: the cell holds neither 0, 1 nor nothing.
    """
    value = text.strip().lower()
    if value in ("0", "0.0"):
        return 0
    if value in ("1", "1.0"):
        return 1
    if value in UNKNOWN_VALUES:
        return None
    raise InputError(
        path,
        f"has a label that is none in row {row_number}, column {column!r}",
        expected="0, 1 or nothing",
        found=repr(text),
        remedy="correct it, or empty the cell where it is unknown",
    )


def _find_columns(path: Path, columns: Sequence[str]) -> str:
    """Check the columns; return the one that holds the names."""
    missing = [finding for finding in FINDINGS if finding not in columns]
    name_columns = [column for column in NAME_COLUMNS if column in columns]
    if not name_columns:
        missing.insert(0, " or ".join(NAME_COLUMNS))
    if not missing:
        return name_columns[0]
    others = [column for column in columns if column not in (*FINDINGS, *NAME_COLUMNS)]
    hints = []
    for name in missing:
        near = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
        hints.append(f"{near[0]!r} for {name!r}" if near else f"none for {name!r}")
    raise InputError(
        path,
        f"lacks {len(missing)} column{'s' * (len(missing) > 1)}",
        expected=f"one of {', '.join(NAME_COLUMNS)}, and the {len(FINDINGS)} findings",
        found=", ".join(hints),
        remedy="give renamed columns their names back, and add missing ones, empty if unknown",
    )


def _wrong_row(path: Path, row: TableRow, fault: str, expected: str, found: str) -> InputError:
    return InputError(
        path,
        f"{fault} in row {row.number}",
        expected=expected,
        found=found,
        remedy="correct or delete the row",
    )


def _strip_name(text: str) -> str:
    """A name without folder and suffix."""
    return strip_suffix(re.split(r"[/\\]", text.strip())[-1])


def _simplify_name(text: str) -> str:
    """The name by which a case is found: that of the scan where it is a name of CT-RATE's."""
    volume_name = parse_volume_name(text)
    return _strip_name(text) if volume_name is None else volume_name.scan


def _merge_rows(rows: Iterable[FindingLabels]) -> tuple[FindingLabels, int]:
    """Labels of a scan from its rows, and the number of labels in which these disagree."""
    merged: list[int | None] = []
    n_conflicting = 0
    for values in zip(*rows, strict=True):
        known_values = set(values) - {None}
        n_conflicting += len(known_values) > 1
        merged.append(known_values.pop() if len(known_values) == 1 else None)
    return tuple(merged), n_conflicting
