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
from data_pipeline.ct_rate_download import Facts, dataset_folder, expected_path, find_volumes, read_facts
from data_pipeline.ct_rate_options import CtRateOptions, add_arguments, options_from, policy
from data_pipeline.ct_rate_series import choose, kernel_class, series_affine
from data_pipeline.ct_rate_tables import Labels, Report, VolumeName, read_held_out, read_names
from data_pipeline.masks import CaseMasks, says_nothing
from data_pipeline.rexgrounding import TABLES as REX_TABLES
from rectvlm.data.volume import Volume, read_volume
from rectvlm.labels import FINDINGS
from rectvlm.types import Affine, InputError

__all__ = ["CtRateCases", "CtRateOptions", "add_arguments", "ct_rate_cases", "load_case", "options_from"]

UNUSABLE = {
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
class _Row:
    """What a worker needs to load a case, besides its files."""

    labels: Labels
    report: Report
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
    dataset = dataset_folder(root)
    counts: Counter[str] = Counter()
    files = find_volumes(dataset, options, counts)
    splits = [split for split in options.splits if options.require_all or any(name.split == split for name in files)]
    facts = read_facts(dataset, splits, options, counts)
    expected = facts.named if options.require_all else frozenset[VolumeName]()
    wanted, dropped = _usable(sorted({*files, *facts.named}, key=lambda name: name.order), facts, options, counts)
    not_there = [name for name in wanted if name not in files and name not in expected]
    counts["volumes that the tables name and that are not on disk"] = len(not_there)
    wanted = [name for name in wanted if name in files or name in expected]
    chosen = _choose(wanted, facts, options)
    dropped["another reconstruction of the scan was chosen"] = [name.key for name in wanted if name not in chosen]
    kept: list[VolumeName] = []
    for split in options.splits:
        part = [name for name in chosen if name.split == split]
        kept += part[: options.limit]
        dropped["beyond the limit"] += [name.key for name in part[options.limit :]] if options.limit is not None else []
    masks = options.masks
    if masks.ts_seg is None and (dataset / "ts_seg").is_dir():
        masks = replace(masks, ts_seg=dataset / "ts_seg")
    cases = []
    for name in kept:
        path = files.get(name) or expected_path(dataset, name, options)
        own = masks.of(name.key)
        if own.rex_files:
            counts["findings of ReXGroundingCT that are none of the five lesions"] += own.ignored
        cases.append(_case(name, path, dataset, facts, chosen[name], own))
    _count_unknowns(kept, facts, counts)
    _require_apart(cases)
    return CtRateCases(
        cases,
        {why: tuple(names) for why, names in dropped.items() if names},
        dict(counts),
        policy(options),
    )


def load_case(path: Path, row: _Row, masks: CaseMasks) -> CaseData:
    """Read a case from its files; runs in a worker process.

    Raises:
        UserError: a file that cannot be used, or a volume whose place neither its header nor the metadata tells.
    """
    affine = np.array(row.affine) if row.affine is not None else None
    volume = _placed(read_volume(path, blank=affine), affine)
    loaded = masks.load(volume)
    return CaseData(
        volume=volume,
        labels=dict(zip(FINDINGS, row.labels, strict=True)),
        findings=row.report.findings,
        impression=row.report.impression,
        lesions=loaded.lesions,
        lesions_annotated=loaded.lesions_annotated,
        lesions_partial=loaded.lesions_partial,
        lesions_source=loaded.lesions_source,
        regions=loaded.regions,
        regions_source=loaded.regions_source,
        slope=row.slope,
        intercept=row.intercept,
    )


def _placed(volume: Volume, affine: Affine | None) -> Volume:
    """The volume where it lies: the first release left its headers blank, so side and size are the metadata's."""
    if not says_nothing(volume.affine):
        return volume
    size = np.abs(np.diag(volume.affine)[:3])
    fits = affine is not None and np.allclose(size, np.linalg.norm(affine[:3, :3], axis=0), rtol=0.01)
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


def _usable(
    names: Iterable[VolumeName], facts: Facts, options: CtRateOptions, counts: Counter[str]
) -> tuple[list[VolumeName], dict[str, list[str]]]:
    """What is left of the volumes, and what was dropped, by reason."""
    excluded = {name.key for path in options.exclude for name in read_names(path)}
    tables = [*options.hold_out]
    if options.masks.rexgrounding is not None:
        tables += [path for name in REX_TABLES if (path := options.masks.rexgrounding / name).is_file()]
    held_out = {name.patient for path in tables for name in read_held_out(path) if name.split == "train"}
    left: list[VolumeName] = []
    dropped: dict[str, list[str]] = defaultdict(list)
    used: set[str] = set()
    for name in names:
        reason = None
        if {name.key, name.scan} & facts.no_chest:
            reason = "does not show the chest (no-chest list)"
        elif name.key in UNUSABLE:
            reason = f"known to be unusable: {UNUSABLE[name.key]}"
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


def _choose(
    names: Sequence[VolumeName], facts: Facts, options: CtRateOptions
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
            chosen |= {name: {"reconstructions": number, "chosen": "all are used"} for name in of_scan}
        else:
            outlined = [name for name in of_scan if len(of_scan) > 1 and lesions.of(name.key).paths]
            name, why = choose(of_scan, facts.series, options.kernel, options.grid_spacing, outlined)
            chosen[name] = {"reconstructions": number, "chosen": why}
    return chosen


# Cases


def _case(
    name: VolumeName, path: Path, dataset: Path, facts: Facts, choice: Mapping[str, str | float], masks: CaseMasks
) -> Case:
    series = facts.series.get(name)
    affine = series_affine(series)
    row = _Row(
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
        "slice_spacing": series.slice_spacing if series else None,
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


def _count_unknowns(names: Iterable[VolumeName], facts: Facts, counts: Counter[str]) -> None:
    unknown: Labels = (None,) * len(FINDINGS)
    for name in names:
        labels = facts.labels_of(name)
        counts["cases without labels"] += labels == unknown
        counts["cases with some labels unknown"] += None in labels and labels != unknown
        counts["cases without a report"] += facts.report_of(name) == Report(None, None)
        counts["cases without metadata"] += name not in facts.series


def _require_apart(cases: Iterable[Case]) -> None:
    """Train and valid share no patient: names begin with the part, and files lie in its folder."""
    patients: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        patients[case.split].add(case.patient)
    shared = patients["train"] & patients["valid"]
    assert not shared, f"patients {sorted(shared)[:3]} are in both parts"
