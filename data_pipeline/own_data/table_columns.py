"""The columns of a table of cases, recognised by their names.

Upper and lower case, spaces, hyphens and underscores make no difference.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.own_data.table_mapping import IGNORED_COLUMN, TableMapping
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.types import InputError

CT_COLUMN = "ct"
TEXT_COLUMNS = (
    CT_COLUMN,
    "key",
    "patient",
    "split",
    "report",
    "findings_text",
    "impression",
    "indication",
    "technique",
)
"""Columns that are neither a finding nor a mask."""
_ALIASES = {
    "ct_path": CT_COLUMN,
    "path": CT_COLUMN,
    "file": CT_COLUMN,
    "file_name": CT_COLUMN,
    "image": CT_COLUMN,
    "image_path": CT_COLUMN,
    "volume": CT_COLUMN,
    "case": "key",
    "case_id": "key",
    "patient_id": "patient",
    "findings": "findings_text",
    "clinical_information": "indication",
}
"""Other common names of these columns."""


@dataclass
class TableColumns:
    """Names that a table gives to each of the columns; a column that is not there is unknown."""

    texts: dict[str, str] = field(default_factory=dict)
    """By name of `TEXT_COLUMNS`."""
    findings: dict[str, str] = field(default_factory=dict)
    """Columns of labels, by finding."""
    masks: dict[str, str] = field(default_factory=dict)
    """Columns of mask files, by key of the lesion."""

    def assign(self, meaning: str, column: str) -> str | None:
        """Note what a column means; return the column that already means the same, if any."""
        columns = self.texts
        if meaning in FINDINGS:
            columns = self.findings
        elif meaning in _MASK_COLUMNS:
            columns, meaning = self.masks, _MASK_COLUMNS[meaning]
        earlier = columns.setdefault(meaning, column)
        return None if earlier == column else earlier


_MASK_COLUMNS = {f"{lesion.key}_mask": lesion.key for lesion in LESIONS}
"""Lesions by the column of their masks."""


def _simplify(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


_MEANINGS = {_simplify(name): name for name in (*TEXT_COLUMNS, *FINDINGS, *_MASK_COLUMNS)} | {
    _simplify(alias): name for alias, name in _ALIASES.items()
}
"""Meanings of columns by simplified name."""


def recognise_columns(columns: Iterable[str], path: Path, mapping: TableMapping) -> TableColumns:
    """Find what each column of a table means.

    Args:
        columns: names as the table has them.
        path: of the table, for errors.
        mapping: names of the user's own.

    Raises:
        InputError: a column that means nothing, two that mean the same, no column of CTs, or a
            report beside its parts.
    """
    meanings_by_name = {_simplify(name): target for name, target in mapping.columns.items()}
    recognised = TableColumns()
    unknown = []
    for column in columns:
        target = meanings_by_name.get(_simplify(column), column)
        if _simplify(target) == IGNORED_COLUMN:
            continue
        meaning = _MEANINGS.get(_simplify(target))
        if meaning is None:
            unknown.append(_describe_unknown_column(column, target))
            continue
        earlier = recognised.assign(meaning, column)
        if earlier is not None:
            raise InputError(
                path,
                f"has two columns that mean {meaning!r}",
                expected="one",
                found=f"{earlier!r} and {column!r}",
                remedy="delete or rename one, or map it to 'ignore' in the file of --mapping",
            )
    if unknown:
        raise InputError(
            path,
            f"has {len(unknown)} column{'s' * (len(unknown) > 1)} of unknown meaning",
            expected=f"{', '.join(TEXT_COLUMNS)}, a finding such as {FINDINGS[9]!r}, or LESION_mask"
            f" such as {next(reversed(_MASK_COLUMNS))!r}",
            found=", ".join(unknown),
            remedy="rename them, or say what they mean in the file of --mapping ('ignore' leaves "
            "one out)",
        )
    _require_useful_texts(recognised, path)
    return recognised


def _describe_unknown_column(column: str, target: str) -> str:
    text = repr(column) if target == column else f"{column!r} (mapped to {target!r})"
    near = difflib.get_close_matches(_simplify(target), _MEANINGS, n=1, cutoff=0.6)
    return f"{text} (did you mean {_MEANINGS[near[0]]!r}?)" if near else text


def _require_useful_texts(columns: TableColumns, path: Path) -> None:
    if CT_COLUMN not in columns.texts:
        named = [*columns.texts.values(), *columns.findings.values(), *columns.masks.values()]
        raise InputError(
            path,
            "has no column of CT files",
            expected=f"a column {CT_COLUMN!r} with paths relative to the table",
            found=", ".join(named) or "none",
            remedy="add or rename it",
        )
    parts = {"findings_text", "impression"} & columns.texts.keys()
    if "report" in columns.texts and parts:
        raise InputError(
            path,
            "has the report twice",
            expected="a column of whole reports, or columns of their parts",
            found=f"'report' and {' and '.join(map(repr, sorted(parts)))}",
            remedy="leave one of them out",
        )
