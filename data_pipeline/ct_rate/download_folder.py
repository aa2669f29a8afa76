"""What lies in a CT-RATE download: volumes by name, and the facts of the tables that belong to them."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.ct_rate.options import CtRateOptions, TableName
from data_pipeline.ct_rate.tables import (
    FindingLabels,
    ReportSections,
    SeriesMetadata,
    VolumeName,
    parse_volume_name,
    read_labels,
    read_metadata,
    read_reports,
    read_volume_list,
)
from rectvlm.labels import FINDINGS
from rectvlm.types import InputError, Split, UserError

_VOLUME_FOLDERS: dict[tuple[Split, str], tuple[str, ...]] = {
    ("train", "fixed"): ("train_fixed",),
    ("valid", "fixed"): ("valid_fixed", "validation_fixed"),
    ("train", "v1"): ("train",),
    ("valid", "v1"): ("valid", "validation"),
}
_TABLE_FILES: dict[TableName, tuple[str, str]] = {
    "labels": ("multi_abnormality_labels", "{}_predicted_labels.csv"),
    "reports": ("radiology_text_reports", "{}_reports.csv"),
    "metadata": ("metadata", "{}_metadata.csv"),
    "no-chest": ("metadata", "no_chest_{}.txt"),
}


@dataclass(frozen=True)
class CtRateTables:
    """What the tables say. Labels and reports belong to a scan, so they hold for all of its reconstructions."""

    labels: dict[str, FindingLabels]
    """By scan."""
    reports: dict[VolumeName, ReportSections]
    """By volume, where it has a row of its own."""
    scan_reports: dict[str, ReportSections]
    """By scan: the report of its first reconstruction that has one."""
    series: dict[VolumeName, SeriesMetadata]
    no_chest_keys: frozenset[str]
    """Keys of volumes, or of whole scans."""
    named_volumes: frozenset[VolumeName]
    """Volumes that labels, reports or metadata name."""

    def labels_of(self, name: VolumeName) -> FindingLabels:
        """Of the volume's scan; all None where no table has it."""
        return self.labels.get(name.scan, (None,) * len(FINDINGS))

    def report_of(self, name: VolumeName) -> ReportSections:
        """The volume's own report, else its scan's."""
        nothing = ReportSections(None, None)
        own = self.reports.get(name, nothing)
        return own if own != nothing else self.scan_reports.get(name.scan, nothing)


# Files


def find_dataset_folder(root: Path) -> Path:
    """The folder that holds the trees of volumes: `root/dataset` or `root` itself.

    Raises:
        UserError: neither does.
    """
    for folder in (root / "dataset", root):
        if any((folder / name).is_dir() for names in _VOLUME_FOLDERS.values() for name in names):
            return folder
    found = (
        ", ".join(sorted(path.name for path in root.iterdir())[:10])
        if root.is_dir()
        else "no such folder"
    )
    raise InputError(
        root,
        "is no CT-RATE download",
        expected="a folder dataset/ with train_fixed/ or valid_fixed/ (or train/, valid/) in it",
        found=found or "an empty folder",
        remedy="give the folder that dataset/ lies in",
    )


def find_volumes(
    dataset: Path, options: CtRateOptions, counts: Counter[str]
) -> dict[VolumeName, Path]:
    """Volumes on disk by name; where a volume is in both trees, the fixed one's counts. No file is opened.

    Raises:
        UserError: there are none, or one of a split lies in the other's folder.
    """
    layouts = ("fixed", "v1") if options.layout == "auto" else (options.layout,)
    files: dict[VolumeName, Path] = {}
    for split in options.splits:
        for layout in layouts:
            for folder in (dataset / name for name in _VOLUME_FOLDERS[split, layout]):
                for entry in _walk_files(folder, 3) if folder.is_dir() else ():
                    name = (
                        parse_volume_name(entry.name)
                        if entry.name.endswith((".nii", ".nii.gz"))
                        else None
                    )
                    if name is None or name.reconstruction is None:
                        counts["other files among the volumes"] += 1
                    elif name.split != split:
                        raise UserError(
                            f"{entry.path} is a volume of {name.split} in a folder of {split}: move it, since patients "
                            f"of one must not get into the other."
                        )
                    elif name in files:
                        counts[
                            "volumes that are on disk twice, of which the fixed or the packed one is used"
                        ] += 1
                    else:
                        files[name] = Path(entry.path)
    if not files:
        raise UserError(
            f"{dataset} holds no volumes of {' or '.join(options.splits)} in layout {options.layout}: expected files "
            f"such as train_fixed/train_1/train_1_a/train_1_a_1.nii.gz."
        )
    return files


def _walk_files(folder: Path | str, depth: int) -> Iterator["os.DirEntry[str]"]:
    """Files down to a depth of folders; packed before unpacked ones. Links count as what they lead to."""
    entries = sorted(
        (entry for entry in os.scandir(folder) if entry.name[0] != "."),
        key=lambda entry: entry.name,
    )
    for entry in sorted(entries, key=lambda entry: not entry.name.endswith(".gz")):
        if not entry.is_dir():
            yield entry
        elif depth:
            yield from _walk_files(entry.path, depth - 1)


def expected_volume_path(dataset: Path, name: VolumeName, options: CtRateOptions) -> Path:
    """Where a volume that is not on disk belongs."""
    folder = _VOLUME_FOLDERS[name.split, "v1" if options.layout == "v1" else "fixed"][0]
    return dataset / folder / name.patient / name.scan / f"{name.key}.nii.gz"


# Tables


def read_tables(
    dataset: Path, splits: Sequence[Split], options: CtRateOptions, counts: Counter[str]
) -> CtRateTables:
    """The tables of the given splits.

    Raises:
        UserError: a table is missing (unless `options.without` names it) or cannot be read.
    """
    labels: dict[VolumeName, FindingLabels] = {}
    reports: dict[VolumeName, ReportSections] = {}
    series: dict[VolumeName, SeriesMetadata] = {}
    no_chest: set[str] = set()
    for split in splits:
        if path := _find_table(dataset, split, "labels", options):
            labels |= read_labels(path)
        if path := _find_table(dataset, split, "reports", options):
            reports |= read_reports(path)
        if path := _find_table(dataset, split, "metadata", options):
            series |= read_metadata(path)
        if path := _find_table(dataset, split, "no-chest", options):
            no_chest |= {name.key for name in read_volume_list(path)}
    scan_reports: dict[str, ReportSections] = {}
    differing = set()
    for name in sorted(reports, key=lambda name: name.sort_key):
        report = reports[name]
        if (
            report != ReportSections(None, None)
            and scan_reports.setdefault(name.scan, report) != report
        ):
            differing.add(name.scan)
    counts["scans whose reconstructions have different reports"] = len(differing)
    named = frozenset(
        name
        for name in {*labels, *reports, *series}
        if name.reconstruction and name.split in splits
    )
    by_scan = _merge_scan_labels(labels, counts)
    return CtRateTables(by_scan, reports, scan_reports, series, frozenset(no_chest), named)


def _find_table(
    dataset: Path, split: Split, table: TableName, options: CtRateOptions
) -> Path | None:
    """The file of a table, under either prefix; None where it is missing and may be."""
    folder, pattern = _TABLE_FILES[table]
    names = [
        pattern.format(prefix)
        for prefix in ([split] if split == "train" else ["validation", "valid"])
    ]
    places = [parent / name for parent in (dataset / folder, dataset) for name in names]
    found = next((path for path in places if path.is_file()), None)
    if found is None and table not in options.without:
        raise InputError(
            dataset / folder,
            f"lacks the {table} of {split}",
            expected=" or ".join(names),
            found="no such file",
            remedy=f"download it, or say --without {table} to go on without",
        )
    return found


def _merge_scan_labels(
    labels: Mapping[VolumeName, FindingLabels], counts: Counter[str]
) -> dict[str, FindingLabels]:
    """Labels by scan: what its rows agree on; a finding that they contradict each other on is unknown."""
    rows: dict[str, set[FindingLabels]] = defaultdict(set)
    for name, row in labels.items():
        rows[name.scan].add(row)
    merged: dict[str, FindingLabels] = {}
    for scan, different in rows.items():
        values = [{row[place] for row in different} - {None} for place in range(len(FINDINGS))]
        conflicts = sum(len(of_finding) > 1 for of_finding in values)
        counts["labels set to unknown since reconstructions of a scan contradict each other"] += (
            conflicts
        )
        merged[scan] = tuple(
            of_finding.pop() if len(of_finding) == 1 else None for of_finding in values
        )
    return merged
