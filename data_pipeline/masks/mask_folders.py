"""Masks that lie beside a data set's volumes: which files belong to a volume, and what they hold.

`MaskFolders.of(key)` looks for the files, `CaseMasks.load(volume)` reads them in a worker process. Each mask keeps its
own grid and affine; bringing it to the sample's grid is `rectvlm.data.canonical_grid`'s. What the numbers of a file mean is
`totalsegmentator.py`'s and `rexgrounding.py`'s.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.masks import rexgrounding, totalsegmentator
from data_pipeline.masks.rexgrounding import RexVolumeRecord as RexEntry
from rectvlm.data.canonical_grid import require_overlap
from rectvlm.data.volume import read_mask
from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_bits import pack_lesion
from rectvlm.types import Affine, InputError, MaskVolume, UserError, Volume

MIN_OVERLAP_SHARE = 0.75
"""Least share of the shorter box, mask's or volume's, that the two have in common along each axis. Of one scan, one box
holds the other (a mask of part of it, a crop of the CT), so the share is near 1; three quarters leave room for two
crops of one scan and still find most masks of another patient, who lay elsewhere on the table."""
MIN_COVERED_SHARE = 2 / 3
"""Least share of the volume along each axis that a mask's box spans for its empty voxels to say that there is nothing.
A box around the body or the lungs does; of one that is smaller no one knows whether the rest was looked at."""


@dataclass(frozen=True)
class LoadedMasks:
    """What the masks of a volume say, one to one the fields of `data_pipeline.cases.CaseData`."""

    lesions: Sequence[Volume] = ()
    """uint8 lesion bits, each on its own grid and affine; they are united."""
    lesions_annotated: dict[str, bool] = field(
        default_factory=lambda: dict.fromkeys(LESION_BY_KEY, False)
    )
    """By lesion key: whether one of the sources outlined all of its kind. What has no file is not annotated."""
    lesions_partial: dict[str, bool] = field(
        default_factory=lambda: dict.fromkeys(LESION_BY_KEY, False)
    )
    """By lesion key: some are outlined, others may not be; never together with annotated."""
    lesions_source: str | None = None
    """The sources of the outlines; None when nothing was annotated."""
    regions: Volume | None = None
    """uint8 region ids, on its own grid and affine."""
    regions_source: str | None = None


@dataclass(frozen=True)
class CaseMasks:
    """The mask files of one volume."""

    key: str
    lesion_files: tuple[tuple[str, Path], ...] = ()
    """Lesion key and its file."""
    stray_files: tuple[Path, ...] = ()
    """Files among its lesion files that bear the name of no lesion and of no anatomical class."""
    task_files: tuple[tuple[str, Path], ...] = ()
    """Folder name of a TotalSegmentator task that outlines lesions, and its file."""
    region_map: Path | None = None
    """A multi-label map, or a folder with one file a class."""
    rex_files: tuple[Path, ...] = ()
    """A ReXGroundingCT mask and the tables that explain it."""
    rex_record: RexEntry | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that `load` reads: part of the case's identity."""
        whole: Iterable[Path] = ()
        if self.region_map is not None:
            whole = (
                sorted(self.region_map.glob("*.nii*"))
                if self.region_map.is_dir()
                else (self.region_map,)
            )
        return (
            *(path for _, path in (*self.lesion_files, *self.task_files)),
            *self.rex_files,
            *whole,
        )

    @property
    def ignored_finding_count(self) -> int:
        """Findings of ReXGroundingCT with a mask that are none of the lesions."""
        findings = (
            self.rex_record.findings if self.rex_record is not None and self.rex_files else ()
        )
        return sum(not rexgrounding.infer_lesions(*finding) for finding in findings)

    def load(self, volume: Volume) -> LoadedMasks:
        """Read them. Sources unite; one that outlined all of a lesion counts before one that outlined some.

        Args:
            volume: the CT that they were drawn on, as read from its file.

        Raises:
            UserError: a mask that cannot be read, that lies elsewhere, whose side is unknown or wrong, or whose name
                says nothing.
        """
        union, complete, partly, sources = _LesionUnion(), set[str](), set[str](), list[str]()
        if self.stray_files:
            raise InputError(
                self.stray_files[0],
                "is the mask of nothing that is known",
                expected=f"a name among {', '.join(LESION_BY_KEY)}",
                found=self.stray_files[0].name,
                remedy="rename it, or move it elsewhere",
            )
        for key, path in self.lesion_files:
            mask = _require_on_volume(volume, read_mask(path))
            union.add(mask, pack_lesion(mask.array > 0, LESION_BY_KEY[key]))
            (complete if _covers_volume(mask, volume) else partly).add(key)
            sources.append("lesion files")
        for task, path in self.task_files:
            mask, looked_for = totalsegmentator.read_lesions(path, task)
            union.add(_require_on_volume(volume, mask), mask.array)
            (complete if _covers_volume(mask, volume) else partly).update(looked_for)
            sources.append("TotalSegmentator")
        if self.rex_files and self.rex_record is not None:
            outlines = rexgrounding.read_outlines(self.rex_files[0], self.rex_record, volume)
            union.add(outlines.lesions, outlines.lesions.array)
            complete |= outlines.annotated
            partly |= outlines.partial
            sources += ["ReXGroundingCT"] if outlines.annotated or outlines.partial else []
        regions, how = self._load_regions(volume)
        return LoadedMasks(
            lesions=union.volumes,
            lesions_annotated={key: key in complete for key in LESION_BY_KEY},
            lesions_partial={key: key in partly - complete for key in LESION_BY_KEY},
            lesions_source=", ".join(dict.fromkeys(sources)) or None,
            regions=regions,
            regions_source=how,
        )

    def _load_regions(self, volume: Volume) -> tuple[Volume | None, str | None]:
        if self.region_map is None:
            return None, None
        if self.region_map.is_dir():
            regions, how = totalsegmentator.read_class_folder(self.region_map), "one file a class"
        else:
            regions, how = totalsegmentator.read_regions(self.region_map)
        totalsegmentator.require_sides(_require_on_volume(volume, regions))
        # Every chest has regions: a map without any is no map.
        return (regions, how) if regions.array.any() else (None, None)


@dataclass(frozen=True)
class MaskFolders:
    """Where masks are looked for; a folder that is None is not."""

    ts_seg: Path | None = None
    """CT-RATE's `dataset/ts_seg`: outputs of TotalSegmentator (`ts_total`, `ts_lung_nodules`, …)."""
    rexgrounding: Path | None = None
    """ReXGroundingCT: `dataset.json` and `segmentations/KEY.nii.gz`."""
    lesions: Path | None = None
    """One NIfTI a lesion: `KEY/LESION.nii.gz` or `KEY_LESION.nii.gz`, LESION a key of `labels.LESION_BY_KEY`. One that
    is all zero says that there is none; a lesion without a file is not annotated."""
    regions: Path | None = None
    """Region maps: `KEY.nii.gz` with TotalSegmentator's classes, or `KEY/CLASS.nii.gz`, one file a class. They count
    before `ts_seg`."""

    def __post_init__(self) -> None:
        for one in fields(self):
            folder = getattr(self, one.name)
            if folder is not None and not Path(folder).is_dir():
                raise UserError(
                    f"{folder} is not a folder: expected the one given as {one.name} masks; check its path."
                )

    def find_masks(self, key: str) -> CaseMasks:
        """The masks of the volume `key` (its file's name without `.nii.gz`); none is no error.

        Raises:
            InputError: the ReXGroundingCT folder lacks its table, or has one of another form.
        """
        entry = (
            None if self.rexgrounding is None else rexgrounding.find_record(self.rexgrounding, key)
        )
        return CaseMasks(
            key,
            lesion_files=tuple(_find_lesion_files(self.lesions, key)) if self.lesions else (),
            stray_files=tuple(_find_stray_files(self.lesions / key)) if self.lesions else (),
            task_files=tuple(_find_task_files(self.ts_seg, key)) if self.ts_seg else (),
            region_map=self._find_region_map(key),
            rex_files=rexgrounding.find_mask_files(self.rexgrounding, key)
            if self.rexgrounding and entry
            else (),
            rex_record=entry,
        )

    def _find_region_map(self, key: str) -> Path | None:
        if self.regions is not None:
            own = _find_nifti(self.regions / key)
            if own is not None:
                return own
            if (self.regions / key).is_dir():
                return self.regions / key
        return None if self.ts_seg is None else _find_in_tree(self.ts_seg / "ts_total", key)


def _find_nifti(stem: Path) -> Path | None:
    """The file of this name, packed or not."""
    return next(
        (path for path in (Path(f"{stem}.nii.gz"), Path(f"{stem}.nii")) if path.is_file()), None
    )


def _find_lesion_files(folder: Path, key: str) -> Iterable[tuple[str, Path]]:
    for lesion in LESION_BY_KEY:
        for path in (_find_nifti(folder / key / lesion), _find_nifti(folder / f"{key}_{lesion}")):
            if path is not None:
                yield lesion, path


def _find_stray_files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.glob("*.nii*")):
        name = path.name.split(".")[0]
        if not (
            path.name.startswith(".")
            or name in LESION_BY_KEY
            or totalsegmentator.is_known_class(name)
        ):
            yield path


def _find_task_files(folder: Path, key: str) -> Iterable[tuple[str, Path]]:
    for task in totalsegmentator.LESION_TASKS:
        path = _find_in_tree(folder / task, key)
        if path is not None:
            yield task, path


def _find_in_tree(folder: Path, key: str) -> Path | None:
    """A file in CT-RATE's tree: `train_fixed/train_1/train_1_a/train_1_a_1.nii.gz`, or straight in a folder."""
    parts = key.split("_")
    nested = Path("_".join(parts[:2])) / "_".join(parts[:3]) / key
    stems = [
        folder / split / where
        for split in (f"{parts[0]}_fixed", parts[0], "")
        for where in (nested, Path(key))
    ]
    return next((path for path in map(_find_nifti, stems) if path is not None), None)


class _LesionUnion:
    """Lesion bits of several files: those on one grid share an array, so that five files need no five arrays."""

    def __init__(self) -> None:
        self.volumes: list[Volume] = []

    def add(self, mask: Volume, bits: MaskVolume) -> None:
        for volume in self.volumes:
            if volume.array.shape == bits.shape and np.array_equal(volume.affine, mask.affine):
                np.bitwise_or(volume.array, bits, out=volume.array)
                return
        self.volumes.append(Volume(bits, mask.affine, mask.where))


def is_blank_affine(affine: Affine) -> bool:
    """Whether an affine is a voxel size at most: axes along the world's, origin at exactly 0, as programs write it
    that know no better. No scanner puts its first voxel there."""
    return (
        not affine[:3, 3].any()
        and np.count_nonzero(affine[:3, :3]) == 3
        and bool(np.diag(affine).all())
    )


def _require_on_volume(volume: Volume, mask: Volume) -> Volume:
    """The mask, when its affine says where it lies on the volume.

    Raises:
        UserError: an affine that says nothing about sides, or a box that hardly lies on the volume.
    """
    if is_blank_affine(mask.affine) and not np.allclose(mask.affine, volume.affine):
        raise InputError(
            mask.where,
            "has an affine that says nothing about its place or which side is left",
            expected="the affine of the grid that it was drawn on",
            found=f"voxels of {', '.join(f'{size:g}' for size in np.diag(mask.affine)[:3])} mm at the origin",
            remedy="write that affine into it (the masks of RadGenome-ChestCT need it), or leave it out",
        )
    require_overlap(mask.affine, mask.array.shape, volume.affine, volume.array.shape, mask.where)
    common, (size, whole) = _measure_overlap_mm(mask, volume)
    share = (common / np.minimum(size, whole)).min()
    if share < MIN_OVERLAP_SHARE:
        raise InputError(
            mask.where,
            "hardly lies on its volume",
            expected=f"at least {MIN_OVERLAP_SHARE:.0%} of the shorter of the two boxes in common along each axis",
            found=f"{share:.0%} with {volume.where}",
            remedy="check that it belongs to this scan",
        )
    return mask


def _covers_volume(mask: Volume, volume: Volume) -> bool:
    """Whether a mask spans enough of its volume to say where nothing is."""
    common, (_, whole) = _measure_overlap_mm(mask, volume)
    return bool((common / whole).min() >= MIN_COVERED_SHARE)


def _measure_overlap_mm(
    mask: Volume, volume: Volume
) -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], ...]]:
    """What two boxes along the world's axes have in common, and the size of each, mm along (x, y, z)."""
    (low, high), (other_low, other_high) = (
        _bounding_box_mm(one.affine, one.array.shape) for one in (mask, volume)
    )
    common = np.clip(np.minimum(high, other_high) - np.maximum(low, other_low), 0, None)
    return common, (high - low, other_high - other_low)


def _bounding_box_mm(
    affine: Affine, shape: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape])).reshape(3, -1)
    world = affine[:3, :3] @ corners + affine[:3, 3:]
    return world.min(axis=1), world.max(axis=1)
