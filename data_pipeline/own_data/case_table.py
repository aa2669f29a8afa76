"""A table of cases, read strictly: every cell that cannot be meant is refused before any work."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_pipeline.own_data.table_columns import CT_COLUMN, TableColumns
from data_pipeline.own_data.table_mapping import TableMapping
from data_pipeline.patient_hash import patient_fraction
from rectvlm.data.sample import SAMPLE_KEY_PATTERN
from rectvlm.data.volume import strip_suffix
from rectvlm.delimited_file import DelimitedFile, TableRow
from rectvlm.labels import FINDINGS, LESION_BY_KEY
from rectvlm.types import InputError, Split

VALID_SHARE = 0.2
"""Share of the patients that a table without splits gives to valid, by a hash of the patient."""
_MISSING_WORDS = {"", "nan", "na", "n/a", "null"}
"""Cells, in lower case, that hold nothing."""
_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "development": "dev",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
}
_LABEL_PATTERN = re.compile(r"([01])(?:[.,]0*)?")
_NIFTI_SUFFIX = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)


@dataclass
class TableCase:
    """One row of the table, as far as it can be read without opening its files."""

    row: int
    """Number of the row as a spreadsheet shows it."""
    key: str
    patient: str
    split: Split | None
    """Split of the row; None until the patient's is known."""
    ct_text: str
    """Path of the CT as the table has it."""
    ct: Path
    labels: dict[str, int | None]
    """Labels of all 18 findings; None is unknown."""
    texts: dict[str, str]
    """Cells of the report and of what was known before it, by name of the column."""
    masks: dict[str, Path] = field(default_factory=dict)
    """Mask files by key of the lesion; a lesion without one was not annotated."""
    absent_lesions: list[str] = field(default_factory=list)
    """Keys of the lesions that were looked for and are not there."""


class _CellFault(NamedTuple):
    row: int
    column: str
    expected: str
    found: str
    remedy: str


@dataclass
class _CellReader:
    """Reads the cells of a table and collects those that cannot be meant."""

    columns: TableColumns
    mapping: TableMapping
    folder: Path
    faults: list[_CellFault] = field(default_factory=list)

    def read_row(self, row: TableRow) -> TableCase:
        texts = {name: row.cells[column] for name, column in self.columns.texts.items()}
        for name in (CT_COLUMN, "key", "patient"):
            if texts.get(name, "").casefold() in _MISSING_WORDS:
                texts[name] = ""
        ct_text = texts[CT_COLUMN]
        if not ct_text:
            self._refuse(row, self.columns.texts[CT_COLUMN], "the path of a CT", "fill it in")
        key = self._read_key(row, texts)
        patient = texts["patient"] if "patient" in self.columns.texts else key
        if not patient and "patient" in self.columns.texts:
            remedy = "fill it in: without it one patient could be in two splits"
            self._refuse(row, self.columns.texts["patient"], "the patient", remedy)
        case = TableCase(
            row=row.number,
            key=key,
            patient=patient,
            split=self._read_split(row),
            ct_text=ct_text,
            ct=resolve_path(ct_text, self.folder),
            labels=dict.fromkeys(FINDINGS),
            texts={name: text for name, text in texts.items() if name in PROSE_COLUMNS},
        )
        for finding, column in self.columns.findings.items():
            case.labels[finding] = self._read_label(row, column)
        for lesion, column in self.columns.masks.items():
            self._read_mask(row, column, lesion, case)
        return case

    def _read_key(self, row: TableRow, texts: dict[str, str]) -> str:
        key = texts.get("key", "")
        if not key:
            name = strip_suffix(re.split(r"[/\\]", texts[CT_COLUMN].rstrip("/\\"))[-1])
            return re.sub(r"[^A-Za-z0-9_-]", "_", name)[-80:]
        if not SAMPLE_KEY_PATTERN.fullmatch(key):
            wanted = "1 to 80 letters (a to z), digits, '_' or '-'"
            self._refuse(row, self.columns.texts["key"], wanted, "rename the case")
        return key

    def _read_split(self, row: TableRow) -> Split | None:
        column = self.columns.texts.get("split")
        text = self.mapping.translate(row.cells[column]).casefold() if column else ""
        if column and text not in _MISSING_WORDS | _SPLIT_WORDS.keys():
            remedy = "leave such rows out, or translate the word in the file of --mapping"
            self._refuse(row, column, "train, dev, valid or nothing", remedy)
        return _SPLIT_WORDS.get(text)

    def _read_label(self, row: TableRow, column: str) -> int | None:
        text = self.mapping.translate(row.cells[column]).casefold()
        if text in _MISSING_WORDS:
            return None
        match = _LABEL_PATTERN.fullmatch(text)
        if match is None:
            remedy = "correct it, or translate the word in the file of --mapping"
            self._refuse(row, column, "0, 1 or nothing for unknown", remedy)
            return None
        return int(match[1])

    def _read_mask(self, row: TableRow, column: str, lesion: str, case: TableCase) -> None:
        text = self.mapping.translate(row.cells[column])
        if text == "none":
            case.absent_lesions.append(lesion)
            kind = LESION_BY_KEY[lesion]
            if kind.is_implied_by_finding and case.labels[kind.finding] == 1:
                expected = f"a mask file or nothing, since {kind.finding!r} is 1 in this row"
                self._refuse(row, column, expected, "correct one of the two cells")
        elif _NIFTI_SUFFIX.search(text):
            case.masks[lesion] = resolve_path(text, self.folder)
        elif text.casefold() not in _MISSING_WORDS:
            self._refuse(
                row,
                column,
                "a mask file (.nii or .nii.gz), 'none' for looked for and not there, or nothing "
                "for not annotated",
                "correct it",
            )

    def _refuse(self, row: TableRow, column: str, expected: str, remedy: str) -> None:
        self.faults.append(_CellFault(row.number, column, expected, row.cells[column], remedy))


REPORT_COLUMNS = ("report", "findings_text", "impression")
"""Text columns that hold a report or a part of it."""
PROSE_COLUMNS = (*REPORT_COLUMNS, "indication", "technique")
"""Text columns that hold sentences."""


def read_cases(
    table: DelimitedFile, path: Path, columns: TableColumns, mapping: TableMapping
) -> list[TableCase]:
    """Read all rows; every case gets a split.

    Args:
        table: content of the file.
        path: of the file; paths in it are relative to its folder.
        columns: meaning of its columns.
        mapping: words of the user's own.

    Raises:
        InputError: a cell that cannot be meant, a key or a file in two rows, or a patient in two
            splits.
    """
    reader = _CellReader(columns, mapping, Path(os.path.abspath(path)).parent)
    cases = [reader.read_row(row) for row in table.rows]
    if reader.faults:
        fault, others = reader.faults[0], len(reader.faults) - 1
        more = f" (and in {others} more cell{'s' * (others > 1)})" if others else ""
        raise InputError(
            path,
            f"has a cell that cannot be used in row {fault.row}, column {fault.column!r}",
            expected=fault.expected,
            found=f"{fault.found!r}{more}",
            remedy=fault.remedy,
        )
    _require_unique_keys(cases, path, has_key_column="key" in columns.texts)
    _require_unique_files(cases, path)
    _assign_splits(cases, path)
    return cases


def resolve_path(text: str, folder: Path) -> Path:
    """The file that a cell names: relative to a folder, `~` for the home, Windows' backslashes."""
    path = os.path.join(folder, os.path.expanduser(text))
    if "\\" in text and not os.path.exists(path):
        path = os.path.join(folder, os.path.expanduser(text.replace("\\", "/")))
    return Path(os.path.normpath(path))


def simplify_patient(name: str) -> str:
    """A patient's name without what two spellings of one name differ in.

    Case, spaces, accents as one or two letters, and marks that no one sees.
    """
    visible = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    return unicodedata.normalize("NFKC", " ".join(visible.split())).casefold()


def split_by_hash(patient: str) -> Split:
    """Split of a patient by a hash of the name, which other patients do not change."""
    return "valid" if patient_fraction(simplify_patient(patient)) < VALID_SHARE else "train"


def _require_unique_keys(cases: Sequence[TableCase], path: Path, has_key_column: bool) -> None:
    rows = _rows_by_value((case.key, case.row) for case in cases)
    repeated = [key for key, numbers in rows.items() if len(numbers) > 1]
    if repeated:
        raise InputError(
            path,
            f"has the key {repeated[0]!r} twice",
            expected="one row for each key",
            found=f"rows {_list_numbers(rows[repeated[0]])}"
            + (f", and {len(repeated) - 1} more such keys" if len(repeated) > 1 else ""),
            remedy="delete or rename one"
            if has_key_column
            else "add a column 'key', since the CTs' file names are not unique",
        )


def _require_unique_files(cases: Sequence[TableCase], path: Path) -> None:
    """A file named twice is a slip of copying: a patient in two splits, or all lesions in one."""
    files = [(file, case.row) for case in cases for file in (case.ct, *case.masks.values())]
    rows = _rows_by_value((os.path.realpath(file), row) for file, row in files)
    repeated = [file for file, numbers in rows.items() if len(numbers) > 1]
    if repeated:
        raise InputError(
            path,
            f"names a file twice, {repeated[0]}",
            expected="one row for each CT, and one mask for each lesion of a CT",
            found=f"it in rows {_list_numbers(rows[repeated[0]])}",
            remedy="correct the path; write a mask of several lesions as one file a lesion",
        )


def _assign_splits(cases: Sequence[TableCase], path: Path) -> None:
    """Give every case its patient's split: the one that the table names, or one by hash.

    Two spellings of one patient become the first one.
    """
    named: dict[str, TableCase] = {}
    spellings: dict[str, str] = {}
    for case in cases:
        case.patient = spellings.setdefault(simplify_patient(case.patient), case.patient)
        if case.split is None:
            continue
        first = named.setdefault(case.patient, case)
        if first.split != case.split:
            raise InputError(
                path,
                f"has the patient {case.patient!r} in two splits",
                expected="all cases of a patient in one split",
                found=f"{first.split} in row {first.row} and {case.split} in row {case.row}",
                remedy="correct one of them",
            )
    for case in cases:
        if case.split is None:
            first_named = named.get(case.patient)
            case.split = first_named.split if first_named else split_by_hash(case.patient)


def count_cases(cases: Sequence[TableCase]) -> dict[str, int]:
    """Numbers that a reader of the log and of the manifest should know."""
    counts = Counter(f"cases in {case.split}" for case in cases)
    for case in cases:
        labels = list(case.labels.values())
        counts["cases without labels"] += not any(label is not None for label in labels)
        report_cells = [case.texts.get(column) for column in REPORT_COLUMNS]
        counts["cases without a report"] += not any(report_cells)
        for lesion in (*case.masks, *case.absent_lesions):
            counts[f"cases with {LESION_BY_KEY[lesion].name} annotated"] += 1
    return {subject: count for subject, count in counts.items() if count}


def _rows_by_value(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for value, row in pairs:
        rows[value].append(row)
    return rows


def _list_numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"{shown}, …" if len(numbers) > 5 else shown
