"""Which volumes of a CT-RATE download are used, and in which split: none without the chest, none of
a held-out patient but those that measure localization, one a scan.

No volume is dropped without a count and a reason.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from data_pipeline.ct_rate.download_folder import CtRateTables
from data_pipeline.ct_rate.options import CtRateOptions
from data_pipeline.ct_rate.series import choose_reconstruction
from data_pipeline.masks.rexgrounding import find_tables, has_exhaustive_outlines
from data_pipeline.patient_hash import patient_fraction
from rectvlm.types import SPLITS, Split
from rectvlm.volume_names import (
    VolumeName,
    read_held_out_volumes,
    read_volume_list,
)

UNUSABLE_VOLUMES = {
    "train_14384_a_2": "not in the data set",
    "valid_251_a_2": "not in the data set",
    "train_1267_a_4": "without slice spacing",
    "train_11755_a_3": "without slice spacing",
    "train_11755_a_4": "without slice spacing",
}
"""Volumes of CT-RATE that are known to be of no use, with the reason."""


@dataclass(frozen=True)
class SelectedVolume:
    """A volume that is used."""

    name: VolumeName
    split: Split
    """Split of the patient; `dev` and `grounding` are taken from the released train."""
    reason: str
    """Why it was chosen among the reconstructions of its scan."""
    scan_reconstructions: int
    """Number of usable reconstructions of its scan."""


@dataclass(frozen=True)
class HeldOutCases:
    """Training cases that ReXGroundingCT holds out for validation or test."""

    patients: frozenset[str] = frozenset()
    """Patients who stay out of train and dev with all their scans."""
    outlined_keys: frozenset[str] = frozenset()
    """Keys of their volumes whose exhaustive outlines are at hand: the grounding split."""


@dataclass
class VolumeSelection:
    """The volumes that are used, and those that are not."""

    volumes: list[SelectedVolume] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Keys of the volumes that are not used, by reason."""


def select_volumes(
    on_disk: Collection[VolumeName],
    tables: CtRateTables,
    options: CtRateOptions,
    counts: Counter[str],
) -> VolumeSelection:
    """Choose the volumes of a download that become cases.

    Args:
        on_disk: names of the volumes that have a file.
        tables: of the download.
        options: what the user wants of it.
        counts: receives what a reader of the results should know.

    Raises:
        UserError: a list of volumes that cannot be read.
    """
    selection = VolumeSelection()
    names = sorted({*on_disk, *tables.named_volumes}, key=lambda name: name.sort_key)
    held_out = _read_held_out_cases(options)
    usable = _drop_unusable_volumes(names, tables, options, held_out, counts, selection)

    available = set(on_disk)
    if options.require_all:
        available |= tables.named_volumes
    absent_count = sum(name not in available for name in usable)
    counts["volumes that the tables name and that are not on disk"] = absent_count
    usable = [name for name in usable if name in available]

    chosen = _choose_reconstructions(usable, tables, options, held_out, selection)
    for split in SPLITS:
        split_volumes = [volume for volume in chosen if volume.split == split]
        limit = len(split_volumes) if options.limit is None else options.limit
        selection.volumes += split_volumes[:limit]
        selection.dropped["beyond the limit"] += [
            volume.name.key for volume in split_volumes[limit:]
        ]
    return selection


def _drop_unusable_volumes(
    names: Iterable[VolumeName],
    tables: CtRateTables,
    options: CtRateOptions,
    held_out: HeldOutCases,
    counts: Counter[str],
    selection: VolumeSelection,
) -> list[VolumeName]:
    """Return the names of usable volumes; the others go to `selection.dropped`."""
    excluded_keys: set[str] = set()
    for path in options.exclude:
        excluded_keys |= {name.key for name in read_volume_list(path)}

    usable = []
    matched_keys: set[str] = set()
    for name in names:
        keys = {name.key, name.scan}
        if keys & tables.no_chest_keys:
            reason = "does not show the chest (no-chest list)"
        elif name.key in UNUSABLE_VOLUMES:
            reason = f"known to be unusable: {UNUSABLE_VOLUMES[name.key]}"
        elif keys & excluded_keys:
            reason = "kept out by a list"
            matched_keys |= keys & excluded_keys
        elif name.patient in held_out.patients and name.key not in held_out.outlined_keys:
            reason = "patient of the validation or test part of ReXGroundingCT"
        else:
            usable.append(name)
            continue
        selection.dropped[reason].append(name.key)
    counts["names in exclude lists that no volume bears"] = len(excluded_keys - matched_keys)
    return usable


def _read_held_out_cases(options: CtRateOptions) -> HeldOutCases:
    folder = options.masks.rexgrounding
    paths = [*options.hold_out]
    if folder is not None:
        paths += find_tables(folder)
    patients, outlined_keys = set(), set()
    for path in paths:
        for name in read_held_out_volumes(path):
            if name.split != "train":
                continue
            patients.add(name.patient)
            if folder is not None and has_exhaustive_outlines(folder, name.key):
                outlined_keys.add(name.key)
    return HeldOutCases(frozenset(patients), frozenset(outlined_keys))


def _choose_reconstructions(
    names: Sequence[VolumeName],
    tables: CtRateTables,
    options: CtRateOptions,
    held_out: HeldOutCases,
    selection: VolumeSelection,
) -> list[SelectedVolume]:
    """Choose one reconstruction of each scan, or all; the others go to `selection.dropped`."""
    scans: dict[str, list[VolumeName]] = defaultdict(list)
    for name in names:
        scans[name.scan].append(name)

    chosen = []
    for scan_names in scans.values():
        if options.reconstructions == "all":
            for name in scan_names:
                split = assign_split(name, options.dev_share, held_out)
                chosen.append(SelectedVolume(name, split, "all are used", len(scan_names)))
            continue
        best, reason = choose_reconstruction(
            scan_names,
            tables.series,
            options.kernel,
            options.grid_spacing_mm,
            _find_outlined(scan_names, options),
        )
        split = assign_split(best, options.dev_share, held_out)
        chosen.append(SelectedVolume(best, split, reason, len(scan_names)))
        selection.dropped["another reconstruction of the scan was chosen"] += [
            name.key for name in scan_names if name != best
        ]
    return chosen


def assign_split(name: VolumeName, dev_share: float, held_out: HeldOutCases) -> Split:
    """Split of a volume's patient: as released, but for what is taken from train.

    Volumes that ReXGroundingCT outlines exhaustively are grounding, and a share of the other
    patients is dev.

    A hash of the patient's name decides, so no other patient changes it, and a greater share keeps
    the patients of a smaller one.
    """
    if name.key in held_out.outlined_keys:
        return "grounding"
    if name.split == "train" and patient_fraction(name.patient) < dev_share:
        return "dev"
    return name.split


def _find_outlined(scan_names: Sequence[VolumeName], options: CtRateOptions) -> list[VolumeName]:
    """Names of a scan's volumes that have lesion masks; empty when there is no choice to make."""
    if len(scan_names) == 1:
        return []
    lesion_folders = replace(options.masks, ts_seg=None, regions=None)
    return [name for name in scan_names if lesion_folders.find_masks(name.key).paths]
