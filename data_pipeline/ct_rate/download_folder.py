"""What lies in a CT-RATE download: the volumes' files by name, and the content of the tables."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from data_pipeline.ct_rate.options import CtRateOptions, TableName
from data_pipeline.ct_rate.tables import (
    ReportSections,
    SeriesMetadata,
    read_labels,
    read_metadata,
    read_reports,
)
from rectvlm.label_table import FindingLabels
from rectvlm.labels import FINDINGS
from rectvlm.types import InputError, UserError
from rectvlm.volume_names import (
    ReleasedSplit,
    VolumeName,
    parse_volume_name,
    read_volume_list,
)

_VOLUME_FOLDERS: dict[tuple[ReleasedSplit, str], tuple[str, ...]] = {
    ("train", "fixed"): ("train_fixed",),
    ("valid", "fixed"): ("valid_fixed", "validation_fixed"),
    ("train", "v1"): ("train",),
    ("valid", "v1"): ("valid", "validation"),
}
"""Possible names of a tree of volumes, by split and layout."""
_TREE_DEPTH = 3
"""Levels of folders in a tree of volumes: patient, scan, and one to spare."""
_TABLE_FILES: dict[TableName, tuple[str, str]] = {
    "labels": ("multi_abnormality_labels", "{}_predicted_labels.csv"),
    "reports": ("radiology_text_reports", "{}_reports.csv"),
    "metadata": ("metadata", "{}_metadata.csv"),
    "no-chest": ("metadata", "no_chest_{}.txt"),
}
"""Folder of each table, and pattern of its file's name."""
_TABLE_PREFIXES: dict[ReleasedSplit, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("validation", "valid"),
}
"""Words that stand for a split in the names of tables."""
UNKNOWN_LABELS: FindingLabels = (None,) * len(FINDINGS)
NO_REPORT = ReportSections()


@dataclass
class CtRateTables:
    """The content of a download's tables."""

    labels: dict[str, FindingLabels] = field(default_factory=dict)
    """Labels by scan; they hold for all of its reconstructions."""
    reports: dict[VolumeName, ReportSections] = field(default_factory=dict)
    """Reports of the volumes that have a row."""
    scan_reports: dict[str, ReportSections] = field(default_factory=dict)
    """Report by scan, from its first reconstruction that has one."""
    series: dict[VolumeName, SeriesMetadata] = field(default_factory=dict)
    """Metadata of the volumes that have a row."""
    no_chest_keys: set[str] = field(default_factory=set)
    """Keys of volumes, or of whole scans, that do not show the chest."""
    named_volumes: set[VolumeName] = field(default_factory=set)
    """Volumes that labels, reports or metadata name."""

    def labels_of(self, name: VolumeName) -> FindingLabels:
        """Labels of the volume's scan; all None where no table has it."""
        return self.labels.get(name.scan, UNKNOWN_LABELS)

    def report_of(self, name: VolumeName) -> ReportSections:
        """Report of the volume itself, else of its scan."""
        report = self.reports.get(name, NO_REPORT)
        return self.scan_reports.get(name.scan, report) if report.is_empty else report


# Files


def find_dataset_folder(root: Path) -> Path:
    """Find the folder that holds the trees of volumes: `root/dataset` or `root` itself.

    Raises:
        UserError: neither does.
    """
    tree_names = list(chain.from_iterable(_VOLUME_FOLDERS.values()))
    for folder in (root / "dataset", root):
        if any((folder / name).is_dir() for name in tree_names):
            return folder
    content = "no such folder"
    if root.is_dir():
        content = ", ".join(sorted(path.name for path in root.iterdir())[:10]) or "an empty folder"
    raise InputError(
        root,
        "is no CT-RATE download",
        expected="a folder dataset/ with train_fixed/ or valid_fixed/ (or train/, valid/) in it",
        found=content,
        remedy="give the folder that dataset/ lies in",
    )


def find_volumes(
    dataset: Path, options: CtRateOptions, counts: Counter[str]
) -> dict[VolumeName, Path]:
    """Find the volumes on disk by name, without opening a file.

    A volume that is in both trees is taken from the fixed one.

    Args:
        dataset: folder of the trees of volumes.
        options: `splits` and `layout` decide which trees are read.
        counts: receives the number of files that are not used.

    Raises:
        UserError: there are no volumes, or one lies in the other split's folder.
    """
    files: dict[VolumeName, Path] = {}
    for split, folder in _volume_folders(dataset, options):
        for entry in _walk_files(folder, _TREE_DEPTH):
            is_nifti = entry.name.endswith((".nii", ".nii.gz"))
            name = parse_volume_name(entry.name) if is_nifti else None
            if name is None or name.reconstruction is None:
                counts["other files among the volumes"] += 1
            elif name.split != split:
                raise UserError(
                    f"{entry.path} is a volume of {name.split} in a folder of {split}: move it, "
                    f"since patients of one must not get into the other."
                )
            elif name in files:
                counts[
                    "volumes that are on disk twice, of which the fixed or the packed one is used"
                ] += 1
            else:
                files[name] = Path(entry.path)
    if not files:
        raise UserError(
            f"{dataset} holds no volumes of {' or '.join(options.splits)} in layout "
            f"{options.layout}: expected files such as "
            f"train_fixed/train_1/train_1_a/train_1_a_1.nii.gz."
        )
    return files


def _volume_folders(dataset: Path, options: CtRateOptions) -> Iterator[tuple[ReleasedSplit, Path]]:
    """Yield the existing trees of volumes with their split, the fixed ones first."""
    layouts = ("fixed", "v1") if options.layout == "auto" else (options.layout,)
    for split in options.splits:
        for layout in layouts:
            for name in _VOLUME_FOLDERS[split, layout]:
                if (dataset / name).is_dir():
                    yield split, dataset / name


def _walk_files(folder: Path | str, depth: int) -> Iterator["os.DirEntry[str]"]:
    """Yield the files of a folder and of `depth` levels below it, except hidden ones.

    Packed files come before unpacked ones. Links count as what they lead to.
    """
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    for entry in sorted(entries, key=lambda entry: (not entry.name.endswith(".gz"), entry.name)):
        if not entry.is_dir():
            yield entry
        elif depth:
            yield from _walk_files(entry.path, depth - 1)


def expected_volume_path(dataset: Path, name: VolumeName, options: CtRateOptions) -> Path:
    """The path at which a volume that is not on disk belongs."""
    folder = _VOLUME_FOLDERS[name.split, "v1" if options.layout == "v1" else "fixed"][0]
    return dataset / folder / name.patient / name.scan / f"{name.key}.nii.gz"


# Tables


def read_tables(
    dataset: Path, splits: Sequence[ReleasedSplit], options: CtRateOptions, counts: Counter[str]
) -> CtRateTables:
    """Read the tables of some splits.

    Args:
        dataset: folder of the download that holds the tables' folders.
        splits: to read.
        options: `without` names the tables that may be missing.
        counts: receives the number of contradictions.

    Raises:
        UserError: a table is missing (unless `options.without` names it) or cannot be read.
    """
    tables = CtRateTables()
    volume_labels: dict[VolumeName, FindingLabels] = {}
    for split in splits:
        if not options.labels and (path := _find_table(dataset, split, "labels", options)):
            volume_labels |= read_labels(path)
        if path := _find_table(dataset, split, "reports", options):
            tables.reports |= read_reports(path)
        if path := _find_table(dataset, split, "metadata", options):
            tables.series |= read_metadata(path)
        if path := _find_table(dataset, split, "no-chest", options):
            tables.no_chest_keys |= {name.key for name in read_volume_list(path)}
    for name in {*volume_labels, *tables.reports, *tables.series}:
        if name.reconstruction and name.split in splits:
            tables.named_volumes.add(name)
    tables.scan_reports = _merge_scan_reports(tables.reports, counts)
    tables.labels = _merge_scan_labels(volume_labels, counts)
    return tables


def _find_table(
    dataset: Path, split: ReleasedSplit, table: TableName, options: CtRateOptions
) -> Path | None:
    """Find the file of a table; None where it is missing and may be."""
    folder, pattern = _TABLE_FILES[table]
    names = [pattern.format(prefix) for prefix in _TABLE_PREFIXES[split]]
    for parent in (dataset / folder, dataset):
        for name in names:
            if (parent / name).is_file():
                return parent / name
    if table in options.without:
        return None
    raise InputError(
        dataset / folder,
        f"lacks the {table} of {split}",
        expected=" or ".join(names),
        found="no such file",
        remedy=f"download it, or say --without {table} to go on without",
    )


def _merge_scan_reports(
    reports: Mapping[VolumeName, ReportSections], counts: Counter[str]
) -> dict[str, ReportSections]:
    """The first report of each scan's reconstructions."""
    scan_reports: dict[str, ReportSections] = {}
    differing_scans = set()
    for name in sorted(reports, key=lambda name: name.sort_key):
        report = reports[name]
        if not report.is_empty and scan_reports.setdefault(name.scan, report) != report:
            differing_scans.add(name.scan)
    counts["scans whose reconstructions have different reports"] = len(differing_scans)
    return scan_reports


def _merge_scan_labels(
    volume_labels: Mapping[VolumeName, FindingLabels], counts: Counter[str]
) -> dict[str, FindingLabels]:
    """Labels by scan; a finding that the scan's rows contradict each other on is unknown."""
    rows: dict[str, set[FindingLabels]] = defaultdict(set)
    for name, labels in volume_labels.items():
        rows[name.scan].add(labels)

    scan_labels: dict[str, FindingLabels] = {}
    for scan, distinct_rows in rows.items():
        merged: list[int | None] = []
        for values in zip(*distinct_rows, strict=True):
            known_values = set(values) - {None}
            counts[
                "labels set to unknown since reconstructions of a scan contradict each other"
            ] += len(known_values) > 1
            merged.append(known_values.pop() if len(known_values) == 1 else None)
        scan_labels[scan] = tuple(merged)
    return scan_labels
