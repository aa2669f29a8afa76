"""A CT-RATE download to cases, each with its labels, report, masks and metadata.

    python -m data_pipeline.preprocess --ct-rate /data/CT-RATE

Nothing unknown is read as negative. Volumes are found by their names; none is opened before its
turn comes in a worker process.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data_pipeline.cases import Case, CaseData, file_identity
from data_pipeline.ct_rate.download_folder import (
    UNKNOWN_LABELS,
    CtRateTables,
    expected_volume_path,
    find_dataset_folder,
    find_volumes,
    read_tables,
)
from data_pipeline.ct_rate.options import CtRateOptions, options_for_manifest
from data_pipeline.ct_rate.selection import SelectedVolume, select_volumes
from data_pipeline.ct_rate.series import series_affine
from data_pipeline.ct_rate.tables import ReportSections, SeriesMetadata
from data_pipeline.masks.mask_files import CaseMaskFiles
from rectvlm.data.kernels import kernel_class
from rectvlm.data.volume import read_volume
from rectvlm.files import json_sha256
from rectvlm.label_table import FindingLabels, read_label_table
from rectvlm.labels import FINDINGS
from rectvlm.volume_names import VolumeName


@dataclass(frozen=True)
class CtRateCases:
    """The cases of a download, and the volumes that became none."""

    cases: list[Case]
    dropped: dict[str, tuple[str, ...]]
    """Names of volumes that became no case, by reason."""
    counts: dict[str, int]
    """Numbers that a reader of the results should know, such as that of cases without labels."""
    policy: dict[str, str | float | bool | None]
    """Options by which the cases were chosen, for the manifest."""


@dataclass(frozen=True)
class CaseMetadata:
    """The part of a case that comes from tables, sent to the worker that loads its files."""

    labels: FindingLabels
    report: ReportSections
    slope: float | None
    """RescaleSlope of the series."""
    intercept: float | None
    """RescaleIntercept of the series."""
    affine: tuple[tuple[float, ...], ...] | None
    """4 × 4, index to RAS+ mm, by the metadata; for a file whose header is blank."""


def list_ct_rate_cases(root: Path, options: CtRateOptions) -> CtRateCases:
    """List the cases of a CT-RATE download.

    Labels and reports belong to a scan, so they hold for all of its reconstructions. Where
    reconstructions of one scan have different labels for a finding, it is unknown; where they have
    different reports, each keeps its own.

    Args:
        root: top folder of the download, which holds `dataset/`, or `dataset/` itself.
        options: what the user wants of it.

    Raises:
        UserError: no such folder, no volumes, a table that is missing or cannot be read, or a list
            of volumes that cannot.
    """
    dataset = find_dataset_folder(root)
    counts: Counter[str] = Counter()
    files = find_volumes(dataset, options, counts)
    splits_on_disk = {name.split for name in files}
    splits = [split for split in options.splits if options.require_all or split in splits_on_disk]
    tables = read_tables(dataset, splits, options, counts)
    selection = select_volumes(files.keys(), tables, options, counts)

    if options.labels:
        keys = [volume.name.key for volume in selection.volumes]
        other_labels = _read_other_labels(keys, options.labels, counts)
        scans = [volume.name.scan for volume in selection.volumes]
        tables.labels = dict(zip(scans, other_labels, strict=True))

    mask_folders = options.masks
    if mask_folders.ts_seg is None and (dataset / "ts_seg").is_dir():
        mask_folders = replace(mask_folders, ts_seg=dataset / "ts_seg")
    cases = []
    for volume in selection.volumes:
        name = volume.name
        path = files.get(name) or expected_volume_path(dataset, name, options)
        masks = mask_folders.find_masks(name.key)
        if volume.split == "grounding":
            # Measured against people alone, not against another network's outlines too.
            masks = masks.keep_rexgrounding_outlines()
        if masks.rex_files:
            counts["findings of ReXGroundingCT that are none of the five lesions"] += (
                masks.ignored_finding_count
            )
        source = f"CT-RATE {path.relative_to(dataset).as_posix()}"
        cases.append(_build_case(volume, path, source, tables, masks))
    _count_unknowns((volume.name for volume in selection.volumes), tables, counts)
    return CtRateCases(
        cases=cases,
        dropped={reason: tuple(keys) for reason, keys in selection.dropped.items() if keys},
        counts=dict(counts),
        policy=options_for_manifest(options),
    )


def _read_other_labels(
    keys: Sequence[str], paths: Sequence[Path], counts: Counter[str]
) -> list[FindingLabels]:
    """Labels of volumes from other tables than the download's.

    Raises:
        InputError: a table cannot be used, or they lack a volume.
    """
    scan_labels = read_label_table(paths).labels_of([[key] for key in keys])
    counts["labels set to unknown since rows of a scan contradict each other"] = (
        scan_labels.n_conflicting
    )
    return scan_labels.rows


def _build_case(
    volume: SelectedVolume, path: Path, source: str, tables: CtRateTables, masks: CaseMaskFiles
) -> Case:
    name = volume.name
    series = tables.series.get(name, SeriesMetadata())
    affine = series_affine(series)
    metadata = CaseMetadata(
        labels=tables.labels_of(name),
        report=tables.report_of(name),
        slope=series.slope,
        intercept=series.intercept,
        affine=tuple(map(tuple, affine.tolist())) if affine is not None else None,
    )
    series_record: dict[str, str | float | None] = {
        "manufacturer": series.manufacturer,
        "kernel": series.kernel,
        "kernel_class": kernel_class(series.kernel),
        "slice_spacing": series.slice_spacing_mm,
        "reconstructions": float(volume.scan_reconstructions),
        "chosen": volume.reason,
    }
    table_digest = json_sha256([asdict(metadata), series_record, name.scan, volume.split])
    return Case(
        key=name.key,
        split=volume.split,
        patient=name.patient,
        source=source,
        load=partial(load_case, path, metadata, masks),
        identity=(*file_identity(path, *masks.paths), table_digest),
        scan=name.scan,
        series=series_record,
    )


def _count_unknowns(
    names: Iterable[VolumeName], tables: CtRateTables, counts: Counter[str]
) -> None:
    for name in names:
        labels = tables.labels_of(name)
        has_no_labels = labels == UNKNOWN_LABELS
        counts["cases without labels"] += has_no_labels
        counts["cases with some labels unknown"] += None in labels and not has_no_labels
        counts["cases without a report"] += tables.report_of(name).is_empty
        counts["cases without metadata"] += name not in tables.series


# What a worker does


def load_case(path: Path, metadata: CaseMetadata, masks: CaseMaskFiles) -> CaseData:
    """Read a case from its files.

    Args:
        path: of the volume.
        metadata: of the case, from the tables.
        masks: files of the volume's masks.

    Raises:
        UserError: a file that cannot be used, or a volume whose place neither its header nor the
            metadata tells.
    """
    affine = np.array(metadata.affine) if metadata.affine is not None else None
    volume = read_volume(path, default_affine=affine)
    return CaseData(
        **vars(masks.load(volume)),
        volume=volume,
        labels=dict(zip(FINDINGS, metadata.labels, strict=True)),
        findings=metadata.report.findings,
        impression=metadata.report.impression,
        indication=metadata.report.indication,
        technique=metadata.report.technique,
        slope=metadata.slope,
        intercept=metadata.intercept,
    )
