"""A mapping file: what a table's own column names and words stand for.

columns: {Datei: ct, Rundherd: Lung nodule, Alter: ignore}
words: {ja: 1, nein: 0, unklar: unknown, Training: train}
"""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rectvlm.delimited_file import decode_text
from rectvlm.types import InputError

IGNORED_COLUMN = "ignore"
"""Meaning of a column that is not used."""
_WORD_MEANINGS = {"1": "1", "0": "0", "unknown": "", "none": "none"} | {
    split: split for split in ("train", "dev", "valid")
}
"""Meanings that a word may have, and the cell's text for each."""


@dataclass(frozen=True)
class TableMapping:
    """What the columns and words of a table stand for, where they are not those of the project."""

    columns: dict[str, str] = field(default_factory=dict)
    """Name of the project's column, or `IGNORED_COLUMN`, by the table's name of it."""
    words: dict[str, str] = field(default_factory=dict)
    """Text that a cell would have in the project's words, by the table's word in lower case."""

    def translate(self, cell: str) -> str:
        """A cell in the project's words; unchanged where the mapping does not name it."""
        return self.words.get(cell.casefold(), cell)


def read_table_mapping(path: Path) -> TableMapping:
    """Read a mapping file (YAML or JSON).

    Raises:
        InputError: it cannot be read, or holds anything but `columns` and `words`.
    """
    try:
        # The base loader keeps all words as they are; others read `yes` as True.
        tree = yaml.load(decode_text(path.read_bytes())[0], Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _mapping_error(path, "cannot be read", " ".join(str(error).split())) from None
    if not isinstance(tree, dict):
        raise _mapping_error(path, "is no mapping", type(tree).__name__)
    unknown = sorted(set(tree) - {"columns", "words"})
    if unknown:
        raise _mapping_error(path, "has an unknown part", unknown[0])
    for name, part in tree.items():
        is_flat = isinstance(part, dict) and all(isinstance(value, str) for value in part.values())
        if not is_flat:
            raise _mapping_error(path, f"has {name} that are no pairs", str(part))
    words = {}
    for word, meaning in tree.get("words", {}).items():
        if meaning.casefold() not in _WORD_MEANINGS:
            raise InputError(
                path,
                f"gives the word {word!r} no known meaning",
                expected=f"one of {', '.join(_WORD_MEANINGS)}",
                found=repr(meaning),
                remedy="correct it",
            )
        words[word.casefold()] = _WORD_MEANINGS[meaning.casefold()]
    return TableMapping(tree.get("columns", {}), words)


def _mapping_error(path: Path, reason: str, found: str) -> InputError:
    return InputError(
        path,
        reason,
        expected="a mapping such as 'columns: {Datei: ct}' and 'words: {ja: 1, nein: 0}'",
        found=found,
        remedy="correct it",
    )
