"""CT-RATE's tables of labels, reports and metadata, read strictly and joined by volume name."""

import ast
import csv
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.ct_rate.volume_names import VolumeName, require_volume_name
from rectvlm.labels import FINDINGS
from rectvlm.types import InputError, UserError

NAME_COLUMNS = ("VolumeName", "AccessionNo")
"""Columns that may hold the name; the first one that a table has is used."""
_REPORT_COLUMNS = ("Findings_EN", "Impressions_EN", "ClinicalInformation_EN", "Technique_EN")
"""Columns of the fields of `ReportSections`, in their order."""
_METADATA_COLUMNS = (
    "Manufacturer",
    "ConvolutionKernel",
    "ZSpacing",
    "NumberofSlices",
    "XYSpacing",
    "Rows",
    "RescaleSlope",
    "RescaleIntercept",
    "ImagePositionPatient",
    "ImageOrientationPatient",
)
_UNKNOWN_VALUES = {"", "nan", "na", "n/a", "none", "null"}
"""Cells, in lower case, that stand for no value."""
RowT = TypeVar("RowT")

FindingLabels = tuple[int | None, ...]
"""Labels in the order of `FINDINGS`: 1, 0, or None for unknown."""


@dataclass(frozen=True)
class ReportSections:
    """The two sections of a report, and what was known before it was written."""

    findings: str | None = None
    """The Findings section; None when there is none."""
    impression: str | None = None
    """The Impression section; None when there is none."""
    indication: str | None = None
    """Clinical information; None when there is none."""
    technique: str | None = None
    """Technique of the examination; None when there is none."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no report, whatever was known before."""
        return self.findings is None and self.impression is None


@dataclass(frozen=True)
class SeriesMetadata:
    """What the metadata says of one reconstruction; None where it says nothing."""

    manufacturer: str | None = None
    kernel: str | None = None
    """ConvolutionKernel; its first part where the scanner gave several, as in `['Br40f', '3']`."""
    slice_spacing_mm: float | None = None
    """Distance between slices, mm."""
    slice_count: int | None = None
    pixel_spacing_mm: tuple[float, float] | None = None
    """Distance between voxels along a row and from row to row, mm."""
    row_count: int | None = None
    slope: float | None = None
    """RescaleSlope."""
    intercept: float | None = None
    """RescaleIntercept."""
    position_lps_mm: tuple[float, ...] | None = None
    """ImagePositionPatient: centre of the first voxel, LPS mm."""
    orientation_lps: tuple[float, ...] | None = None
    """ImageOrientationPatient: directions along a row and from row to row, LPS."""


def read_labels(path: Path) -> dict[VolumeName, FindingLabels]:
    """Read the 18 labels of each name.

    Raises:
        UserError: a label column is missing, a value is neither 0 nor 1, or a name has two rows
            that disagree.
    """

    def parse_labels(cells: Mapping[str, str], row_number: int) -> FindingLabels:
        return tuple(parse_label(cells[finding], path, row_number, finding) for finding in FINDINGS)

    return _read_table(path, FINDINGS, parse_labels)


def read_reports(path: Path) -> dict[VolumeName, ReportSections]:
    """Read the report of each name.

    Raises:
        UserError: a column is missing, or a name has two rows that disagree.
    """

    def parse_report(cells: Mapping[str, str], row_number: int) -> ReportSections:
        return ReportSections(*(parse_report_section(cells[column]) for column in _REPORT_COLUMNS))

    return _read_table(path, _REPORT_COLUMNS, parse_report)


def read_metadata(path: Path) -> dict[VolumeName, SeriesMetadata]:
    """Read the metadata of each reconstruction.

    Raises:
        UserError: a column is missing, a value cannot be read, or a name has two rows that
            disagree.
    """

    def parse_series(cells: Mapping[str, str], row_number: int) -> SeriesMetadata:
        def parse_numbers(column: str, count: int) -> tuple[float, ...] | None:
            return _parse_numbers(cells[column], count, path, row_number, column)

        def parse_number(column: str) -> float | None:
            numbers = parse_numbers(column, 1)
            return numbers[0] if numbers else None

        slice_count = parse_number("NumberofSlices")
        row_count = parse_number("Rows")
        pixel_spacing = parse_numbers("XYSpacing", 2)
        return SeriesMetadata(
            manufacturer=_parse_text(cells["Manufacturer"]),
            kernel=_parse_kernel(cells["ConvolutionKernel"]),
            slice_spacing_mm=parse_number("ZSpacing"),
            slice_count=int(slice_count) if slice_count is not None else None,
            pixel_spacing_mm=(pixel_spacing[0], pixel_spacing[1]) if pixel_spacing else None,
            row_count=int(row_count) if row_count is not None else None,
            slope=parse_number("RescaleSlope"),
            intercept=parse_number("RescaleIntercept"),
            position_lps_mm=parse_numbers("ImagePositionPatient", 3),
            orientation_lps=parse_numbers("ImageOrientationPatient", 6),
        )

    return _read_table(path, _METADATA_COLUMNS, parse_series)


# Rows


def _read_table(
    path: Path, columns: Sequence[str], parse_row: Callable[[Mapping[str, str], int], RowT]
) -> dict[VolumeName, RowT]:
    """Read parsed rows by name; a name may have two rows when both say the same."""
    rows: dict[VolumeName, RowT] = {}
    for row_number, name, cells in _iterate_rows(path, columns):
        row = parse_row(cells, row_number)
        if rows.setdefault(name, row) != row:
            raise InputError(
                path,
                f"contradicts itself in row {row_number}",
                expected=f"one content for {name.key}",
                found="two rows that differ",
                remedy="keep the right one",
            )
    return rows


def _iterate_rows(
    path: Path, columns: Sequence[str]
) -> Iterator[tuple[int, VolumeName, dict[str, str]]]:
    """Yield number (from 1, without the header), name and wanted cells of each row, as text."""
    header = _read_header(path)
    name_column = next((column for column in NAME_COLUMNS if column in header), None)
    missing = [column for column in columns if column not in header]
    if name_column is None:
        missing.insert(0, " or ".join(NAME_COLUMNS))
    if missing or name_column is None:
        raise InputError(
            path,
            f"lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}",
            expected=f"{' or '.join(NAME_COLUMNS)}, {', '.join(columns)}",
            found=", ".join(header) or "no header",
            remedy="download it again, or give renamed columns their names back",
        )
    table = _load_columns(path, header)
    for index, text in enumerate(table[name_column]):
        name = require_volume_name(text or "", path, f"row {index + 1}")
        yield index + 1, name, {column: table[column][index] or "" for column in columns}


def _read_header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read as a CSV table ({error}): download it again."
        ) from None
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise UserError(
            f"{path} has the column {repeated[0]} twice: expected each once; delete the wrong one."
        )
    return header


def _load_columns(path: Path, columns: Sequence[str]) -> dict[str, list[str | None]]:
    """Load all cells as text, by column; nothing is left in any cache."""
    # Worker processes import this module to load cases but never read tables, and the import takes
    # seconds.
    import datasets

    features = datasets.Features({column: datasets.Value("string") for column in columns})
    with tempfile.TemporaryDirectory() as cache, _hide_progress_bars(datasets):
        try:
            # With na_filter pandas would take a report that says "None" or "NA" for a missing one.
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
        columns_by_name: dict[str, list[str | None]] = table[:]
        return columns_by_name


@contextmanager
def _hide_progress_bars(datasets: Any) -> Iterator[None]:
    """Hide the library's progress bar, which would show a fraction of a second's work."""
    was_enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_progress_bars()


# Cells


def parse_label(text: str, path: Path, row_number: int, column: str) -> int | None:
    """Read a cell of a table of labels; None for an empty one.

    Args:
        text: content of the cell.
        path: of the table, for errors.
        row_number: number of the row, from 1 without the header, for errors.
        column: name of the column, for errors.

    Raises:
        InputError: it is neither 0 nor 1.
    """
    value = text.strip().lower()
    if value in ("0", "0.0"):
        return 0
    if value in ("1", "1.0"):
        return 1
    if value in _UNKNOWN_VALUES:
        return None
    raise InputError(
        path,
        f"has a label that is none in row {row_number}, column {column!r}",
        expected="0, 1 or nothing",
        found=repr(text),
        remedy="correct it, or empty the cell where it is unknown",
    )


def parse_report_section(text: str) -> str | None:
    """Read a section of a report; None for an empty one and for CT-RATE's `Not given.`"""
    section = text.strip()
    value = section.lower().rstrip(".").strip()
    return None if value in _UNKNOWN_VALUES or value == "not given" else section


def _parse_text(text: str) -> str | None:
    value = text.strip()
    return None if value.lower() in _UNKNOWN_VALUES else value


def _parse_kernel(text: str) -> str | None:
    """Read a kernel's name, also from a list such as `['Br40f', '3']`."""
    value = _parse_text(text)
    if value is None or not value.startswith(("[", "(")):
        return value
    try:
        parts = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return _parse_text(str(parts[0])) if parts else None


def _parse_numbers(
    text: str, count: int, path: Path, row_number: int, column: str
) -> tuple[float, ...] | None:
    """Read `count` numbers written as `0.5` or `[0.5, 0.5]`; None if one is not finite."""
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
            f"has a value that cannot be read in row {row_number}, column {column!r}",
            expected="a number" if count == 1 else f"{count} numbers such as [0.5, 0.5]",
            found=repr(text),
            remedy="download it again, or empty the cell",
        )
    return numbers if all(map(math.isfinite, numbers)) else None
