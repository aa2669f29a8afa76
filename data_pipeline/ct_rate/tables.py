"""CT-RATE's tables: names, reports, labels and metadata, read strictly and joined by one normalized name.

Every copy of CT-RATE writes its names a little differently (`valid_` or `validation_`, with or without `.nii.gz`, under
`VolumeName` or `AccessionNo`, sometimes as paths); `parse_name` is the only place that knows.
"""

import ast
import csv
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rectvlm.labels import FINDINGS
from rectvlm.types import InputError, Split, UserError

NAME_COLUMNS = ("VolumeName", "AccessionNo")
_NAME_PATTERN = re.compile(r"(train|valid|validation)_(\d+)_([a-z]+)(?:_(\d+))?(?:\.nii(?:\.gz)?)?")
_UNKNOWN_VALUES = {"", "nan", "na", "n/a", "none", "null"}
T = TypeVar("T")


@dataclass(frozen=True)
class VolumeName:
    """What a CT-RATE name says: `train_1_a_2` is patient 1 of the training part, scan a, reconstruction 2."""

    split: Split
    patient_number: int
    scan_letters: str
    reconstruction: int | None
    """None in a name that stands for a whole scan."""

    @property
    def patient(self) -> str:
        """Numbers start anew in each part, so the part belongs to the patient's name."""
        return f"{self.split}_{self.patient_number}"

    @property
    def scan(self) -> str:
        return f"{self.patient}_{self.scan_letters}"

    @property
    def key(self) -> str:
        """The volume's name as its file bears it, without suffix."""
        return self.scan if self.reconstruction is None else f"{self.scan}_{self.reconstruction}"

    @property
    def sort_key(self) -> tuple[str, int, int, str, int]:
        """Sorts as people count: train_2 before train_10."""
        letters = self.scan_letters
        return self.split, self.patient_number, len(letters), letters, self.reconstruction or 0


def parse_volume_name(text: str) -> VolumeName | None:
    """The volume or scan that a file name, a path or a table's cell names; None when it names neither."""
    found = _NAME_PATTERN.fullmatch(re.split(r"[/\\]", text.strip())[-1])
    if found is None:
        return None
    prefix, patient, letters, number = found.groups()
    return VolumeName(
        "train" if prefix == "train" else "valid",
        int(patient),
        letters,
        int(number) if number is not None else None,
    )


@dataclass(frozen=True)
class ReportSections:
    """The two sections of a report; None where there is none."""

    findings: str | None
    impression: str | None


@dataclass(frozen=True)
class SeriesMetadata:
    """What the metadata says of one reconstruction; None where it says nothing."""

    manufacturer: str | None
    kernel: str | None
    """ConvolutionKernel; its first part where the scanner gave several, as in `['Br40f', '3']`."""
    slice_spacing_mm: float | None
    """mm."""
    slice_count: int | None
    pixel_spacing_mm: tuple[float, float] | None
    """mm, along a row of voxels and from row to row."""
    row_count: int | None
    slope: float | None
    intercept: float | None
    position_lps_mm: tuple[float, ...] | None
    """ImagePositionPatient: centre of the first voxel, LPS mm."""
    orientation_lps: tuple[float, ...] | None
    """ImageOrientationPatient: directions along a row and from row to row, LPS."""


FindingLabels = tuple[int | None, ...]
"""In the order of `FINDINGS`."""


def read_labels(path: Path) -> dict[VolumeName, FindingLabels]:
    """The 18 labels by name: 1, 0, or None where the table says nothing.

    Raises:
        UserError: a label column is missing, a value is neither 0 nor 1, or a name has two rows that disagree.
    """

    def labels(row: Mapping[str, str], number: int) -> FindingLabels:
        return tuple(_parse_label(row[finding], path, number, finding) for finding in FINDINGS)

    return _read_table(path, FINDINGS, labels)


def read_reports(path: Path) -> dict[VolumeName, ReportSections]:
    """Findings and impression by name.

    Raises:
        UserError: a column is missing, or a name has two rows that disagree.
    """

    def report(row: Mapping[str, str], number: int) -> ReportSections:
        return ReportSections(
            _parse_report_section(row["Findings_EN"]), _parse_report_section(row["Impressions_EN"])
        )

    return _read_table(path, ("Findings_EN", "Impressions_EN"), report)


def read_metadata(path: Path) -> dict[VolumeName, SeriesMetadata]:
    """The reconstructions by name.

    Raises:
        UserError: a column is missing, a value cannot be read, or a name has two rows that disagree.
    """

    def series(row: Mapping[str, str], number: int) -> SeriesMetadata:
        def numbers(column: str, count: int) -> tuple[float, ...] | None:
            return _parse_numbers(row[column], count, path, number, column)

        def one(column: str) -> float | None:
            values = numbers(column, 1)
            return values[0] if values else None

        slices, rows, pixel = one("NumberofSlices"), one("Rows"), numbers("XYSpacing", 2)
        return SeriesMetadata(
            manufacturer=_parse_text(row["Manufacturer"]),
            kernel=_parse_kernel(row["ConvolutionKernel"]),
            slice_spacing_mm=one("ZSpacing"),
            slice_count=int(slices) if slices is not None else None,
            pixel_spacing_mm=(pixel[0], pixel[1]) if pixel else None,
            row_count=int(rows) if rows is not None else None,
            slope=one("RescaleSlope"),
            intercept=one("RescaleIntercept"),
            position_lps_mm=numbers("ImagePositionPatient", 3),
            orientation_lps=numbers("ImageOrientationPatient", 6),
        )

    columns = (
        "Manufacturer",
        "ConvolutionKernel",
        "ZSpacing",
        "NumberofSlices",
        "XYSpacing",
        "Rows",
    )
    placed = ("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient")
    return _read_table(path, (*columns, *placed), series)


def read_volume_list(path: Path) -> list[VolumeName]:
    """The volumes or scans of a list, one a line; paths and suffixes are allowed, `#` starts a comment.

    Raises:
        UserError: no such file, or a line that names neither a volume nor a scan.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as a list of volume names ({error}): expected one name a line."
        ) from None
    names = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name = parse_volume_name(text)
        if name is None:
            raise _bad_name_error(path, f"line {number}", text)
        names.append(name)
    return names


def read_held_out_volumes(path: Path) -> list[VolumeName]:
    """The volumes of the validation and test parts of a ReXGroundingCT table."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}): expected ReXGroundingCT's dataset.json."
        ) from None
    parts = {part: table[part] for part in ("val", "valid", "validation", "test") if part in table}
    items = [item for part in parts.values() if isinstance(part, list) for item in part]
    texts = [item.get("name") if isinstance(item, dict) else item for item in items]
    names = [parse_volume_name(text) if isinstance(text, str) else None for text in texts]
    known = [name for name in names if name is not None]
    if not known or len(known) < len(names):
        wrong = texts[names.index(None)] if None in names else None
        raise InputError(
            path,
            "is no table of ReXGroundingCT",
            expected='lists "val" and "test" of items with a "name" such as train_1_a_1.nii.gz',
            found=f"the name {wrong!r}" if items else "none in them",
            remedy="give its dataset.json",
        )
    return known


# Rows


def _read_table(
    path: Path, columns: Sequence[str], parse: Callable[[Mapping[str, str], int], T]
) -> dict[VolumeName, T]:
    """Parsed rows by name; a name twice is fine as long as both rows say the same."""
    parsed: dict[VolumeName, T] = {}
    for number, name, row in _iterate_rows(path, columns):
        record = parse(row, number)
        if parsed.setdefault(name, record) != record:
            raise InputError(
                path,
                f"contradicts itself in row {number}",
                expected=f"one content for {name.key}",
                found="two rows that differ",
                remedy="keep the right one",
            )
    return parsed


def _iterate_rows(
    path: Path, columns: Sequence[str]
) -> Iterator[tuple[int, VolumeName, dict[str, str]]]:
    """Number (from 1, the header not counted), name and wanted cells of each row, all as text."""
    found = _read_header(path)
    name_column = next((column for column in NAME_COLUMNS if column in found), None)
    missing = [column for column in columns if column not in found]
    if name_column is None:
        missing.insert(0, " or ".join(NAME_COLUMNS))
    if missing or name_column is None:
        raise InputError(
            path,
            f"lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}",
            expected=f"{' or '.join(NAME_COLUMNS)}, {', '.join(columns)}",
            found=", ".join(found) or "no header",
            remedy="download it again, or give renamed columns their names back",
        )
    table = _load_columns(path, found)
    cells = {column: table[column] for column in columns}
    for index, text in enumerate(table[name_column]):
        name = parse_volume_name(text or "")
        if name is None:
            raise _bad_name_error(path, f"row {index + 1}", text)
        yield index + 1, name, {column: values[index] or "" for column, values in cells.items()}


def _read_header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read as a CSV table ({error}): download it again."
        ) from None
    twice = sorted({column for column in found if found.count(column) > 1})
    if twice:
        raise UserError(
            f"{path} has the column {twice[0]} twice: expected each once; delete the wrong one."
        )
    return found


def _load_columns(path: Path, columns: Sequence[str]) -> dict[str, list[str | None]]:
    """All cells as text, by column; nothing is left in any cache."""
    # Worker processes import this module to load cases; they never read tables, and the library takes seconds.
    import datasets

    features = datasets.Features({column: datasets.Value("string") for column in columns})
    with tempfile.TemporaryDirectory() as cache, _hide_progress_bars(datasets):
        try:
            # Without the filter, pandas would take a report that says "None" or "NA" for a missing one.
            table = datasets.Dataset.from_csv(
                str(path),
                features=features,
                cache_dir=cache,
                keep_in_memory=True,
                na_filter=False,
                encoding="utf-8-sig",
            )
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(
                f"{path} cannot be read as a CSV table ({reason}): download it again."
            ) from None
        cells: dict[str, list[str | None]] = table[:]
        return cells


@contextmanager
def _hide_progress_bars(datasets: Any) -> Iterator[None]:
    """Without the library's progress bar for a fraction of a second's work."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# Cells


def _bad_name_error(path: Path, place: str, text: object) -> InputError:
    return InputError(
        path,
        f"has a name in {place} that is not of CT-RATE",
        expected="one such as train_1_a_1.nii.gz or valid_1_a_1",
        found=repr(text),
        remedy="correct or delete it",
    )


def _parse_label(text: str, path: Path, number: int, finding: str) -> int | None:
    value = text.strip().lower()
    if value in ("0", "0.0"):
        return 0
    if value in ("1", "1.0"):
        return 1
    if value in _UNKNOWN_VALUES:
        return None
    raise InputError(
        path,
        f"has a label that is none in row {number}, column {finding!r}",
        expected="0, 1 or nothing",
        found=repr(text),
        remedy="correct it, or empty the cell where it is unknown",
    )


def _parse_report_section(text: str) -> str | None:
    """A section of a report; None for an empty one and for CT-RATE's `Not given.`"""
    section = text.strip()
    return (
        None if section.lower().rstrip(".").strip() in _UNKNOWN_VALUES | {"not given"} else section
    )


def _parse_text(text: str) -> str | None:
    return None if text.strip().lower() in _UNKNOWN_VALUES else text.strip()


def _parse_kernel(text: str) -> str | None:
    value = _parse_text(text)
    if value is None or not value.startswith(("[", "(")):
        return value
    try:
        parts = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return _parse_text(str(parts[0])) if parts else None


def _parse_numbers(
    text: str, count: int, path: Path, row: int, column: str
) -> tuple[float, ...] | None:
    """So many finite numbers, written as `0.5` or `[0.5, 0.5]`; None where there are none or one of them is not."""
    value = text.strip()
    if value.lower() in _UNKNOWN_VALUES:
        return None
    try:
        numbers = tuple(float(part) for part in value.strip("[]()").split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise InputError(
            path,
            f"has a value that cannot be read in row {row}, column {column!r}",
            expected="a number" if count == 1 else f"{count} numbers such as [0.5, 0.5]",
            found=repr(text),
            remedy="download it again, or empty the cell",
        )
    return numbers if all(map(math.isfinite, numbers)) else None
