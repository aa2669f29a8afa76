"""A table of text as spreadsheets save it: CSV with any common separator, encoding and line end."""

import codecs
import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from rectvlm.types import InputError

_DELIMITERS = (";", "\t", "|", ",")
"""Separators that are tried. On a tie the first one wins: a comma may also be part of a name."""
_WORKBOOK_STARTS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
"""First bytes of Excel's own formats, `.xlsx` and `.xls`."""
_EXCEL_DELIMITER_LINE = re.compile(r"\A\"?sep=(.)\"?\r?\n")


@dataclass(frozen=True)
class TableRow:
    """One row of a table."""

    number: int
    """Number of the row as a spreadsheet shows it: the header is row 1."""
    cells: dict[str, str]
    """Text by column, without spaces around it."""


@dataclass(frozen=True)
class DelimitedFile:
    """The content of a table's file."""

    columns: tuple[str, ...]
    """Names of the columns as they are written, without spaces around them."""
    rows: list[TableRow]
    """Rows in which at least one cell holds something."""
    encoding: str
    """Encoding by which the file was read."""


def read_delimited_file(path: Path) -> DelimitedFile:
    """Read a table whose first row names the columns.

    UTF-8 and UTF-16 are recognised, anything else is read as Windows-1252. The separator is the one
    that gives the header the most columns.

    Raises:
        InputError: no such file, no text, no header or no rows, a column that is named twice, a row
            with more or fewer cells than the header, or quotes that do not close.
    """
    text, encoding = _read_text(path)
    delimiter = None
    excel_line = _EXCEL_DELIMITER_LINE.match(text)
    if excel_line is not None:
        delimiter, text = excel_line[1], text[excel_line.end() :]
    if delimiter is None:
        delimiter = max(_DELIMITERS, key=lambda mark: len(_read_first_row(text, mark)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = list(reader)
    except csv.Error as error:
        raise InputError(
            path,
            f"cannot be read as a table near line {reader.line_num}",
            expected=f"cells separated by {delimiter!r}, and quotes that are doubled inside quotes",
            found=f"the fault {str(error)!r}",
            remedy="save it again as CSV",
        ) from None
    columns = _read_columns(lines[0] if lines else [], path)
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        stripped = [cell.strip() for cell in cells]
        if any(stripped):
            rows.append(TableRow(number, _name_cells(stripped, columns, number, path)))
    if not rows:
        raise InputError(
            path,
            "has no rows",
            expected="a row for each case below the header",
            found=f"a header of {len(columns)} columns alone",
            remedy="add the cases",
        )
    return DelimitedFile(tuple(filter(None, columns)), rows, encoding)


def decode_text(content: bytes) -> tuple[str, str]:
    """Decode text as editors and spreadsheets save it; return it with its encoding.

    Raises:
        UnicodeDecodeError: it is neither UTF-8, UTF-16 with its mark, nor Windows-1252.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16"), "UTF-16"
    try:
        return content.decode("utf-8-sig"), "UTF-8"
    except UnicodeDecodeError:
        return content.decode("cp1252"), "Windows-1252"


def _read_text(path: Path) -> tuple[str, str]:
    wanted = "a CSV table"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            path,
            "cannot be read",
            expected=wanted,
            found=f"the system's answer {error.strerror or error!r}",
            remedy="correct the path",
        ) from None
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise InputError(
            path, "is empty", expected=wanted, found="no text", remedy="save the table again"
        )
    if content.startswith(_WORKBOOK_STARTS):
        raise InputError(
            path,
            "is an Excel workbook",
            expected=wanted,
            found="Excel's own format",
            remedy="save it as 'CSV UTF-8'",
        )
    try:
        text, encoding = decode_text(content)
    except UnicodeDecodeError:
        text, encoding = "\0", ""
    if "\0" in text:
        raise InputError(
            path,
            "is no text",
            expected=wanted,
            found="bytes of another format",
            remedy="save the table as 'CSV UTF-8'",
        )
    return text, encoding


def _read_first_row(text: str, delimiter: str) -> list[str]:
    """Cells of the first row; none where its quotes do not close."""
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error:
        return []


def _read_columns(header: list[str], path: Path) -> list[str]:
    """Names of the columns; empty for a column without a name."""
    columns = [name.strip() for name in header]
    repeated = sorted({name for name in columns if name and columns.count(name) > 1})
    if repeated:
        raise InputError(
            path,
            f"has the column {repeated[0]!r} twice",
            expected="each once",
            found=f"{columns.count(repeated[0])} of them",
            remedy="delete or rename the wrong one",
        )
    if not any(columns):
        raise InputError(
            path,
            "has no header",
            expected="the names of the columns in the first row",
            found="an empty row",
            remedy="add the names",
        )
    return columns


def _name_cells(cells: list[str], columns: list[str], number: int, path: Path) -> dict[str, str]:
    """Cells by column; spreadsheets add empty cells and columns at the right, which are dropped."""
    if len(cells) < len(columns) or any(cells[len(columns) :]):
        raise InputError(
            path,
            f"has a row of another length, row {number}",
            expected=f"{len(columns)} cells as in the header",
            found=f"{len(cells)}",
            remedy="put quotes around text that holds the separator, and close all quotes",
        )
    named = dict(zip(columns, cells, strict=False))
    nameless = [cell for name, cell in zip(columns, cells, strict=False) if cell and not name]
    if nameless:
        raise InputError(
            path,
            f"has a cell below no name in row {number}",
            expected="a name in the header for each column that is used",
            found=repr(nameless[0]),
            remedy="name the column, or empty it",
        )
    named.pop("", None)
    return named
