"""A CT-RATE download to cases: which volumes are used, with which labels, report, masks and reconstruction.

    python -m data_pipeline.preprocess --ct-rate /data/CT-RATE

Nothing is dropped without a count, and nothing unknown is read as negative. Volumes are found by their names; none is
opened before its turn comes in a worker process.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data_pipeline.cases import Case, CaseData, file_identity
from data_pipeline.ct_rate.download_folder import (
    CtRateTables,
    expected_volume_path,
    find_dataset_folder,
    find_volumes,
    read_tables,
)
from data_pipeline.ct_rate.options import (
    CtRateOptions,
    add_arguments,
    options_for_manifest,
    options_from_arguments,
)
from data_pipeline.ct_rate.series import choose_reconstruction, kernel_class, series_affine
from data_pipeline.ct_rate.tables import (
    FindingLabels,
    ReportSections,
    VolumeName,
    read_held_out_volumes,
    read_volume_list,
)
from data_pipeline.masks.mask_folders import CaseMasks, is_blank_affine
from data_pipeline.masks.rexgrounding import TABLE_FILES as REX_TABLES
from rectvlm.data.volume import read_volume
from rectvlm.labels import FINDINGS
from rectvlm.types import Affine, InputError, Volume

__all__ = [
    "CtRateCases",
    "CtRateOptions",
    "add_arguments",
    "ct_rate_cases",
    "load_case",
    "options_from_arguments",
]

UNUSABLE_VOLUMES = {
    "train_14384_a_2": "not in the data set",
    "valid_251_a_2": "not in the data set",
    "train_1267_a_4": "without slice spacing",
    "train_11755_a_3": "without slice spacing",
    "train_11755_a_4": "without slice spacing",
}
"""Volumes of CT-RATE that are known to be of no use."""


@dataclass(frozen=True)
class CtRateCases:
    """The cases, and what became of the rest."""

    cases: list[Case]
    dropped: dict[str, tuple[str, ...]]
    """Names of volumes that became no case, by reason."""
    counts: dict[str, int]
    """What a reader of the results should know, such as volumes without labels."""
    policy: dict[str, str | float | bool | None]
    """How the cases were chosen."""


@dataclass(frozen=True)
class _CaseMetadata:
    """What a worker needs to load a case, besides its files."""

    labels: FindingLabels
    report: ReportSections
    slope: float | None
    intercept: float | None
    affine: tuple[tuple[float, ...], ...] | None
    """Of the metadata, for a file whose header is blank."""


def ct_rate_cases(root: Path, options: CtRateOptions) -> CtRateCases:
    """The cases of a CT-RATE download.

    Labels and reports belong to a scan, so they hold for all of its reconstructions. Where reconstructions of one scan
    have different labels for a finding, it is unknown; where they have different reports, each keeps its own.

    Args:
        root: the download's top folder, which holds `dataset/`, or `dataset/` itself.

    Raises:
        UserError: no such folder, no volumes, a table that is missing or cannot be read, or a list that cannot.
    """
    dataset = find_dataset_folder(root)
    counts: Counter[str] = Counter()
    files = find_volumes(dataset, options, counts)
    splits = [
        split
        for split in options.splits
        if options.require_all or any(name.split == split for name in files)
    ]
    facts = read_tables(dataset, splits, options, counts)
    expected = facts.named_volumes if options.require_all else frozenset[VolumeName]()
    wanted, dropped = _select_usable_volumes(
        sorted({*files, *facts.named_volumes}, key=lambda name: name.sort_key),
        facts,
        options,
        counts,
    )
    not_there = [name for name in wanted if name not in files and name not in expected]
    counts["volumes that the tables name and that are not on disk"] = len(not_there)
    wanted = [name for name in wanted if name in files or name in expected]
    chosen = _choose_reconstructions(wanted, facts, options)
    dropped["another reconstruction of the scan was chosen"] = [
        name.key for name in wanted if name not in chosen
    ]
    kept: list[VolumeName] = []
    for split in options.splits:
        part = [name for name in chosen if name.split == split]
        kept += part[: options.limit]
        dropped["beyond the limit"] += (
            [name.key for name in part[options.limit :]] if options.limit is not None else []
        )
    masks = options.masks
    if masks.ts_seg is None and (dataset / "ts_seg").is_dir():
        masks = replace(masks, ts_seg=dataset / "ts_seg")
    cases = []
    for name in kept:
        path = files.get(name) or expected_volume_path(dataset, name, options)
        own = masks.find_masks(name.key)
        if own.rex_files:
            counts["findings of ReXGroundingCT that are none of the five lesions"] += (
                own.ignored_finding_count
            )
        cases.append(_build_case(name, path, dataset, facts, chosen[name], own))
    _count_unknowns(kept, facts, counts)
    _require_disjoint_patients(cases)
    return CtRateCases(
        cases,
        {why: tuple(names) for why, names in dropped.items() if names},
        dict(counts),
        options_for_manifest(options),
    )


def load_case(path: Path, metadata: _CaseMetadata, masks: CaseMasks) -> CaseData:
    """Read a case from its files; runs in a worker process.

    Raises:
        UserError: a file that cannot be used, or a volume whose place neither its header nor the metadata tells.
    """
    affine = np.array(metadata.affine) if metadata.affine is not None else None
    volume = _with_known_affine(read_volume(path, default_affine=affine), affine)
    loaded = masks.load(volume)
    return CaseData(
        volume=volume,
        labels=dict(zip(FINDINGS, metadata.labels, strict=True)),
        findings=metadata.report.findings,
        impression=metadata.report.impression,
        lesions=loaded.lesions,
        lesions_annotated=loaded.lesions_annotated,
        lesions_partial=loaded.lesions_partial,
        lesions_source=loaded.lesions_source,
        regions=loaded.regions,
        regions_source=loaded.regions_source,
        slope=metadata.slope,
        intercept=metadata.intercept,
    )


def _with_known_affine(volume: Volume, affine: Affine | None) -> Volume:
    """The volume where it lies: the first release left its headers blank, so side and size are the metadata's."""
    if not is_blank_affine(volume.affine):
        return volume
    size = np.abs(np.diag(volume.affine)[:3])
    fits = affine is not None and np.allclose(
        size, np.linalg.norm(affine[:3, :3], axis=0), rtol=0.01
    )
    if affine is None or not (fits or (size == 1).all()):
        raise InputError(
            volume.where,
            "has a blank header (voxels along the world's axes, at the origin) and no metadata that fits",
            expected="an affine, or position, orientation and spacing in the metadata",
            found=f"voxels of {', '.join(f'{one:g}' for one in size)} mm, so left and right are unknown",
            remedy="take the volume of the fixed tree",
        )
    return replace(volume, affine=affine)


# Choice


def _select_usable_volumes(
    names: Iterable[VolumeName], facts: CtRateTables, options: CtRateOptions, counts: Counter[str]
) -> tuple[list[VolumeName], dict[str, list[str]]]:
    """What is left of the volumes, and what was dropped, by reason."""
    excluded = {name.key for path in options.exclude for name in read_volume_list(path)}
    tables = [*options.hold_out]
    if options.masks.rexgrounding is not None:
        tables += [
            path for name in REX_TABLES if (path := options.masks.rexgrounding / name).is_file()
        ]
    held_out = {
        name.patient
        for path in tables
        for name in read_held_out_volumes(path)
        if name.split == "train"
    }
    left: list[VolumeName] = []
    dropped: dict[str, list[str]] = defaultdict(list)
    used: set[str] = set()
    for name in names:
        reason = None
        if {name.key, name.scan} & facts.no_chest_keys:
            reason = "does not show the chest (no-chest list)"
        elif name.key in UNUSABLE_VOLUMES:
            reason = f"known to be unusable: {UNUSABLE_VOLUMES[name.key]}"
        elif hit := {name.key, name.scan} & excluded:
            reason = "kept out by a list"
            used |= hit
        elif name.patient in held_out:
            reason = "patient of the validation or test part of ReXGroundingCT"
        if reason is None:
            left.append(name)
        else:
            dropped[reason].append(name.key)
    counts["names in exclude lists that no volume bears"] = len(excluded - used)
    return left, dropped


def _choose_reconstructions(
    names: Sequence[VolumeName], facts: CtRateTables, options: CtRateOptions
) -> dict[VolumeName, dict[str, str | float]]:
    """The reconstructions that are used, in order, each with the reason and the number that there were."""
    scans: dict[str, list[VolumeName]] = defaultdict(list)
    for name in names:
        scans[name.scan].append(name)
    lesions = replace(options.masks, ts_seg=None, regions=None)
    chosen: dict[VolumeName, dict[str, str | float]] = {}
    for of_scan in scans.values():
        number = float(len(of_scan))
        if options.reconstructions == "all":
            chosen |= {
                name: {"reconstructions": number, "chosen": "all are used"} for name in of_scan
            }
        else:
            outlined = [
                name for name in of_scan if len(of_scan) > 1 and lesions.find_masks(name.key).paths
            ]
            name, why = choose_reconstruction(
                of_scan, facts.series, options.kernel, options.grid_spacing_mm, outlined
            )
            chosen[name] = {"reconstructions": number, "chosen": why}
    return chosen


# Cases


def _build_case(
    name: VolumeName,
    path: Path,
    dataset: Path,
    facts: CtRateTables,
    choice: Mapping[str, str | float],
    masks: CaseMasks,
) -> Case:
    series = facts.series.get(name)
    affine = series_affine(series)
    row = _CaseMetadata(
        labels=facts.labels_of(name),
        report=facts.report_of(name),
        slope=series.slope if series else None,
        intercept=series.intercept if series else None,
        affine=tuple(map(tuple, affine.tolist())) if affine is not None else None,
    )
    known: dict[str, str | float | None] = {
        "manufacturer": series.manufacturer if series else None,
        "kernel": series.kernel if series else None,
        "kernel_class": kernel_class(series.kernel) if series else None,
        "slice_spacing": series.slice_spacing_mm if series else None,
        **choice,
    }
    content = json.dumps([asdict(row), known, name.scan, name.split], sort_keys=True)
    return Case(
        key=name.key,
        split=name.split,
        patient=name.patient,
        source=f"CT-RATE {path.relative_to(dataset).as_posix()}",
        load=partial(load_case, path, row, masks),
        identity=(*file_identity(path, *masks.paths), hashlib.sha256(content.encode()).hexdigest()),
        scan=name.scan,
        series=known,
    )


def _count_unknowns(names: Iterable[VolumeName], facts: CtRateTables, counts: Counter[str]) -> None:
    unknown: FindingLabels = (None,) * len(FINDINGS)
    for name in names:
        labels = facts.labels_of(name)
        counts["cases without labels"] += labels == unknown
        counts["cases with some labels unknown"] += None in labels and labels != unknown
        counts["cases without a report"] += facts.report_of(name) == ReportSections(None, None)
        counts["cases without metadata"] += name not in facts.series


def _require_disjoint_patients(cases: Iterable[Case]) -> None:
    """Train and valid share no patient: names begin with the part, and files lie in its folder."""
    patients: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        patients[case.split].add(case.patient)
    shared = patients["train"] & patients["valid"]
    assert not shared, f"patients {sorted(shared)[:3]} are in both parts"
