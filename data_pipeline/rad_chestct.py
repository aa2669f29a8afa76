"""Rad-ChestCT as an external test set: its volumes and label tables become cases of valid.

    python -m data_pipeline.preprocess --rad-chestct /data/Rad-ChestCT --out shards

The data set (Draelos et al., Medical Image Analysis 67, 2021) has a NumPy archive for each scan,
`trn00001.npz`, and three tables with a column `abnormality*location` for each of 84 abnormalities
at each of 52 locations. Archives hold one array `ct` of HU clipped to ±1000, at 0.8 mm in each
direction, and declare no geometry. The code that wrote them (rachellea/ct-volume-preprocessing)
takes axial slices alone (ImageOrientationPatient 1, 0, 0, 0, 1, 0), puts the uppermost one first
and transposes to (slice, row, column): the axes grow to inferior, posterior and left.
"""

import csv
import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from data_pipeline.cases import Case, CaseData, file_identity
from rectvlm.data.volume import read_volume
from rectvlm.file_search import list_files
from rectvlm.files import json_sha256
from rectvlm.label_table import FindingLabels, parse_label
from rectvlm.labels import FINDINGS
from rectvlm.types import InputError

LABEL_TABLES = tuple(
    f"img{part}_Abnormality_and_Location_Labels.csv" for part in ("train", "valid", "test")
)
"""Names of the label tables. All three parts are the external test set, as in CT-CLIP's paper."""
NAME_COLUMN = "NoteAcc_DEID"
"""Column of the scan's name, which is its archive's name too."""
ABNORMALITIES_BY_FINDING: dict[str, tuple[str, ...]] = {
    "Medical material": (
        *("breast_implant", "catheter_or_port", "chest_tube", "clip", "gi_tube", "hardware"),
        *("pacemaker_or_defib", "staple", "stent", "suture", "tracheal_tube"),
    ),
    "Arterial wall calcification": ("calcification",),
    "Cardiomegaly": ("cardiomegaly",),
    "Pericardial effusion": ("pericardial_effusion",),
    "Hiatal hernia": ("hernia",),
    "Lymphadenopathy": ("lymphadenopathy",),
    "Emphysema": ("emphysema",),
    "Atelectasis": ("atelectasis",),
    "Lung nodule": ("nodule", "nodulegr1cm"),
    "Lung opacity": ("opacity",),
    "Pulmonary fibrotic sequela": ("fibrosis",),
    "Pleural effusion": ("pleural_effusion",),
    "Peribronchial thickening": ("bronchial_wall_thickening",),
    "Consolidation": ("consolidation",),
    "Bronchiectasis": ("bronchiectasis",),
    "Interlobular septal thickening": ("septal_thickening",),
}
"""Abnormalities, at any location, that stand for a finding.

These are the 16 classes of CT-CLIP's external evaluation (arXiv 2403.17834), which has one class of
calcification in the place of the arterial one. It names no columns: those here are the ones of
other published evaluations (HLIP; RadFinder for medical material). Coronary calcification and
mosaic attenuation stay unknown.
"""
ARCHIVE_AFFINE = np.array([[0, 0, -0.8, 0], [0, -0.8, 0, 0], [-0.8, 0, 0, 0], [0, 0, 0, 1.0]])
"""Index (slice, row, column, 1) of an archive to RAS+ mm, without a known origin."""


@dataclass(frozen=True)
class RadChestCtCases:
    """The cases of a download, and what was counted in it."""

    cases: list[Case]
    counts: dict[str, int]


def list_rad_chestct_cases(folder: Path) -> RadChestCtCases:
    """List the cases of a Rad-ChestCT download, all in valid.

    Each scan counts as a patient: the tables do not say which scans are of one.

    Args:
        folder: holds archives and label tables, at any depth.

    Raises:
        InputError: no archives or no table, a scan or a row twice, a column that is missing or has
            another name, a cell that is no label, or an archive without a row.
    """
    archives = _find_archives(folder)
    labels: dict[str, FindingLabels] = {}
    for table in _find_tables(folder):
        for name, row in read_finding_labels(table).items():
            if name in labels:
                raise _repeated_row_error(table, name, "one in another table too")
            labels[name] = row
    missing = [name for name in archives if name not in labels]
    if missing:
        raise InputError(
            archives[missing[0]],
            "has no row of labels",
            expected=f"{missing[0]} in the column {NAME_COLUMN} of {', '.join(LABEL_TABLES)}",
            found=f"{len(labels)} other scans, and {len(missing)} archives without a row",
            remedy="download the missing table, or move these archives away",
        )
    cases = [_build_case(name, path, labels[name]) for name, path in sorted(archives.items())]
    counts = {
        "rows without a volume": len(labels.keys() - archives.keys()),
        "cases with a mapped label unknown": sum(
            _has_unknown_mapped_label(labels[name]) for name in archives
        ),
    }
    return RadChestCtCases(cases, counts)


def _build_case(name: str, path: Path, labels: FindingLabels) -> Case:
    return Case(
        key=name,
        split="valid",
        patient=name,
        source=f"Rad-ChestCT {path.name}",
        load=partial(load_rad_chestct_case, path, labels),
        identity=(*file_identity(path), json_sha256(labels)),
    )


def _has_unknown_mapped_label(labels: FindingLabels) -> bool:
    unknown = {finding for finding, label in zip(FINDINGS, labels, strict=True) if label is None}
    return bool(unknown & ABNORMALITIES_BY_FINDING.keys())


# Files


def _find_archives(folder: Path) -> dict[str, Path]:
    """Archives by name of the scan.

    Raises:
        InputError: there are none, or two of one scan.
    """
    archives: dict[str, Path] = {}
    for path in _list_folder(folder):
        if path.suffix != ".npz":
            continue
        if path.stem in archives:
            raise InputError(
                path,
                "is the second archive of a scan",
                expected=f"one {path.name} in {folder}",
                found=f"{archives[path.stem]} as well",
                remedy="remove one of them",
            )
        archives[path.stem] = path
    if not archives:
        raise InputError(
            folder,
            "holds no volumes of Rad-ChestCT",
            expected="archives such as trn00001.npz in it or below",
            found="none",
            remedy="give the folder of the download",
        )
    return archives


def _find_tables(folder: Path) -> list[Path]:
    """Label tables of the download.

    Raises:
        InputError: there is none, or one of them is there twice.
    """
    tables = [path for path in _list_folder(folder) if path.name in LABEL_TABLES]
    counts = Counter(path.name for path in tables)
    repeated = [path for path in tables if counts[path.name] > 1]
    if tables and not repeated:
        return tables
    raise InputError(
        folder,
        "has a label table twice" if repeated else "lacks the label tables of Rad-ChestCT",
        expected=f"each once: {', '.join(LABEL_TABLES)}",
        found=" and ".join(map(str, repeated[:2])) or "none of them",
        remedy="remove the wrong one" if repeated else "download them into it",
    )


def _list_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(
            folder,
            "is no folder",
            expected="that of a Rad-ChestCT download",
            found="a file" if folder.exists() else "nothing",
            remedy="correct the path",
        )
    return list_files(folder).files


# Tables


def read_finding_labels(path: Path) -> dict[str, FindingLabels]:
    """Read the labels of our findings by name of the scan; None where no column says it.

    A finding is present where one of its columns is 1, and absent where all of them are 0.

    Raises:
        InputError: the file cannot be read, a column is missing, repeated or unknown, a scan has
            two rows, or a cell is no label.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [column.strip() for column in next(reader, [])]
            columns_by_finding = _find_columns(header, path)
            return _read_rows(reader, header, columns_by_finding, path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            path,
            "cannot be read as a table",
            expected="CSV in UTF-8",
            found=str(error),
            remedy="download it again",
        ) from None


def _read_rows(
    reader: Iterator[list[str]],
    header: Sequence[str],
    columns_by_finding: dict[str, list[int]],
    path: Path,
) -> dict[str, FindingLabels]:
    labels: dict[str, FindingLabels] = {}
    name_index = header.index(NAME_COLUMN)
    for row_number, cells in enumerate(reader, start=1):
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise InputError(
                path,
                f"has a row of another length, row {row_number}",
                expected=f"{len(header)} cells as in the header",
                found=str(len(cells)),
                remedy="download it again",
            )
        name = cells[name_index].strip()
        if name in labels:
            raise _repeated_row_error(path, name, f"another one in row {row_number}")
        row: list[int | None] = []
        for finding in FINDINGS:
            indexes = columns_by_finding.get(finding, [])
            values = {parse_label(cells[i], path, row_number, header[i]) for i in indexes}
            row.append(_merge_labels(values))
        labels[name] = tuple(row)
    return labels


def _merge_labels(values: set[int | None]) -> int | None:
    """1 where one is 1, 0 where all are 0, else unknown."""
    if 1 in values:
        return 1
    return 0 if values == {0} else None


def _find_columns(header: Sequence[str], path: Path) -> dict[str, list[int]]:
    """Numbers of the columns of each finding.

    The tables have every abnormality at every location, so that a column which is missing shows.

    Raises:
        InputError: a column is missing, repeated or of another form.
    """
    indexes = {column: i for i, column in enumerate(header)}
    if len(indexes) < len(header):
        repeated = next(column for column in header if header.count(column) > 1)
        raise InputError(
            path,
            f"has the column {repeated!r} twice",
            expected="each once",
            found=f"{header.count(repeated)} of them",
            remedy="download it again",
        )
    locations = _find_locations(header)
    wanted: dict[str, list[str]] = defaultdict(list)
    for finding, abnormalities in ABNORMALITIES_BY_FINDING.items():
        for abnormality in abnormalities:
            wanted[finding] += [f"{abnormality}*{location}" for location in locations]
    all_wanted = [NAME_COLUMN, *chain.from_iterable(wanted.values())]
    missing = [column for column in all_wanted if column not in indexes]
    if missing:
        raise _missing_column_error(path, missing, header)
    return {finding: [indexes[name] for name in columns] for finding, columns in wanted.items()}


def _find_locations(header: Sequence[str]) -> list[str]:
    """Locations that more than half of the abnormalities have: others are slips of a renaming."""
    counts = Counter(column.partition("*")[2] for column in header if "*" in column)
    most = max(counts.values(), default=0)
    return [location for location, count in counts.items() if 2 * count > most] or ["lung"]


def _missing_column_error(path: Path, missing: Sequence[str], header: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(missing[0], header, n=1, cutoff=0)
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return InputError(
        path,
        f"lacks the column {missing[0]!r}{more}",
        expected=f"{NAME_COLUMN!r} and each abnormality at each location, such as 'nodule*lung'",
        found=f"{len(header)} columns, the nearest {near[0]!r}" if near else "no header",
        remedy="download it again, or give renamed columns their names back",
    )


def _repeated_row_error(path: Path, name: str, found: str) -> InputError:
    return InputError(
        path,
        f"has the scan {name!r} twice",
        expected="one row for each scan",
        found=found,
        remedy="keep the right one",
    )


# What a worker does


def load_rad_chestct_case(path: Path, labels: FindingLabels) -> CaseData:
    """Read a case from its archive.

    Args:
        path: of the archive.
        labels: in the order of `FINDINGS`.

    Raises:
        UserError: the archive cannot be used.
    """
    return CaseData(
        volume=read_volume(path, default_affine=ARCHIVE_AFFINE),
        labels=dict(zip(FINDINGS, labels, strict=True)),
    )
