"""Features of CTs with their keys, patients and labels: one table, as safetensors or NumPy's npz.

In a safetensors file the tensors are `features` (N, C) float32 and `labels` (N, 18) float32, NaN
where unknown; the file's metadata holds the rest as JSON. In an npz file each column is an array.

Shapes: N CTs, C channels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rectvlm.files import atomic_file
from rectvlm.labels import FINDINGS
from rectvlm.types import UserError

FEATURE_SUFFIXES = (".safetensors", ".npz")
TEXT_COLUMNS = ("keys", "patients", "scans", "splits")
"""Columns of text, in the order of the file."""
_SCHEMA = "rectvlm-features-1"


@dataclass(frozen=True)
class FeatureTable:
    """Features of N CTs."""

    features: NDArray[np.float32]
    """Global token of each CT, (N, C)."""
    labels: NDArray[np.float32]
    """Labels of the findings, (N, 18), 0 or 1; NaN where unknown."""
    keys: list[str]
    """Name of each CT."""
    patients: list[str]
    """Id of each CT's patient."""
    scans: list[str]
    """Id of each CT's examination."""
    splits: list[str]
    """Split of each CT; empty for a file that is in no shards."""
    encoder: str
    """Encoder and where its weights came from, in words."""

    def __len__(self) -> int:
        return len(self.keys)

    def select_rows(self, rows: NDArray[np.intp]) -> "FeatureTable":
        """Table of some rows, by their numbers."""
        columns: dict[str, Any] = {
            "features": self.features[rows],
            "labels": self.labels[rows],
        }
        for name in TEXT_COLUMNS:
            values = getattr(self, name)
            columns[name] = [values[row] for row in rows]
        return replace(self, **columns)


def require_feature_path(path: Path) -> None:
    """Check the name of a file of features before the work that fills it.

    Raises:
        UserError: its name ends otherwise, or a file of another kind has this name.
    """
    if path.suffix not in FEATURE_SUFFIXES:
        raise UserError(
            f"{path} is no place for features: name a file that ends with "
            f"{' or '.join(FEATURE_SUFFIXES)}."
        )
    if path.is_file():
        try:
            read_features(path)
        except UserError:
            raise UserError(
                f"{path} exists and holds no features: move it away, or name another file."
            ) from None


def write_features(table: FeatureTable, path: Path) -> None:
    """Write a table in the format that the file's name asks for, atomically.

    Raises:
        OSError: there is no room, or the disk failed.
    """
    texts = {name: getattr(table, name) for name in TEXT_COLUMNS}
    arrays = {"features": table.features, "labels": table.labels}
    about = {"schema": _SCHEMA, "encoder": table.encoder, "findings": list(FINDINGS)}
    with atomic_file(path) as file:
        if path.suffix == ".npz":
            columns: dict[str, Any] = {}
            for name, value in {**arrays, **texts, **about}.items():
                columns[name] = np.array(value)
            np.savez(file, **columns)
        else:
            metadata = {name: json.dumps(value) for name, value in {**texts, **about}.items()}
            file.write(save(arrays, metadata))


def read_features(path: Path) -> FeatureTable:
    """Read a table that `write_features` wrote.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: give features that `rectvlm embed` wrote.")
    read_columns = _read_npz if path.suffix == ".npz" else _read_safetensors
    try:
        columns = read_columns(path)
        if columns["schema"] != _SCHEMA or columns["findings"] != list(FINDINGS):
            raise ValueError("another schema or other findings")
        table = FeatureTable(
            features=columns["features"],
            labels=columns["labels"],
            encoder=columns["encoder"],
            **{name: list(columns[name]) for name in TEXT_COLUMNS},
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} holds no features that can be read ({error}): make it anew with "
            "`rectvlm embed`."
        ) from None
    return table


def join_tables(tables: Sequence[FeatureTable], files: Sequence[Path]) -> FeatureTable:
    """Put the rows of several tables together.

    Args:
        tables: tables, at least one.
        files: their files, for the message.

    Raises:
        UserError: they come from different encoders, or a CT is in two of them.
    """
    first = tables[0]
    for table, file in zip(tables, files, strict=True):
        if (table.encoder, table.features.shape[1]) != (first.encoder, first.features.shape[1]):
            raise UserError(
                f"{file} holds features of another encoder ({table.encoder}) than {files[0]} "
                f"({first.encoder}): probe one encoder at a time."
            )
    texts: dict[str, list[str]] = {}
    for name in TEXT_COLUMNS:
        texts[name] = [value for table in tables for value in getattr(table, name)]
    repeated = len(texts["keys"]) - len(set(texts["keys"]))
    if repeated:
        raise UserError(
            f"{repeated} CTs are in the features more than once: give each file once, and files of "
            "different CTs."
        )
    return FeatureTable(
        features=np.concatenate([table.features for table in tables]),
        labels=np.concatenate([table.labels for table in tables]),
        encoder=first.encoder,
        **texts,
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="numpy") as file:
        columns = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        return columns | {name: file.get_tensor(name) for name in ("features", "labels")}


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        columns: dict[str, Any] = {name: file[name] for name in ("features", "labels")}
        for name in ("schema", "encoder", "findings", *TEXT_COLUMNS):
            columns[name] = file[name].tolist()
        return columns
