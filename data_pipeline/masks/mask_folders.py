"""Folders of masks beside a data set's volumes, and which of their files belong to a volume."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from data_pipeline.masks import rexgrounding, totalsegmentator
from data_pipeline.masks.mask_files import CaseMaskFiles
from rectvlm.cli_options import argument
from rectvlm.labels import LESION_BY_KEY
from rectvlm.types import UserError


@dataclass(frozen=True)
class MaskFolders:
    """Folders in which masks are looked for; None for those that are not used."""

    ts_seg: Path | None = field(default=None, metadata=argument(metavar="DIR"))
    """Outputs of TotalSegmentator (`ts_total`, `ts_lung_nodules`, …), as in CT-RATE's
    dataset/ts_seg."""
    rexgrounding: Path | None = field(default=None, metadata=argument(metavar="DIR"))
    """ReXGroundingCT: dataset.json, which is held out as well, and segmentations/KEY.nii.gz."""
    lesions: Path | None = field(default=None, metadata=argument(metavar="DIR"))
    """One NIfTI a lesion: KEY/LESION.nii.gz or KEY_LESION.nii.gz, LESION a key of
    `labels.LESION_BY_KEY`. A file that is all zero says that there is none; a lesion without a file
    is not annotated."""
    regions: Path | None = field(default=None, metadata=argument(metavar="DIR"))
    """Region maps: KEY.nii.gz with TotalSegmentator's classes, or KEY/CLASS.nii.gz, one file a
    class. They count before `ts_seg`."""

    def __post_init__(self) -> None:
        """Refuse folders that do not exist."""
        for mask_kind in fields(self):
            folder = getattr(self, mask_kind.name)
            if folder is not None and not Path(folder).is_dir():
                raise UserError(
                    f"{folder} is not a folder: expected the one given as {mask_kind.name} masks; "
                    f"check its path."
                )

    def find_masks(self, key: str) -> CaseMaskFiles:
        """Find the mask files of a volume; there may be none.

        Args:
            key: name of the volume's file without `.nii.gz`.

        Raises:
            InputError: the ReXGroundingCT folder lacks its table, or has one of another form.
        """
        rex_record = None
        rex_files: tuple[Path, ...] = ()
        if self.rexgrounding is not None:
            rex_record = rexgrounding.find_record(self.rexgrounding, key)
            if rex_record is not None:
                rex_files = rexgrounding.find_mask_files(self.rexgrounding, key)
        return CaseMaskFiles(
            lesion_files=tuple(_find_lesion_files(self.lesions, key)) if self.lesions else (),
            stray_files=tuple(_find_stray_files(self.lesions / key)) if self.lesions else (),
            task_files=tuple(_find_task_files(self.ts_seg, key)) if self.ts_seg else (),
            region_map=self._find_region_map(key),
            rex_files=rex_files,
            rex_record=rex_record,
        )

    def _find_region_map(self, key: str) -> Path | None:
        if self.regions is not None:
            region_map = _find_nifti(self.regions / key)
            if region_map is not None:
                return region_map
            if (self.regions / key).is_dir():
                return self.regions / key
        return None if self.ts_seg is None else _find_in_tree(self.ts_seg / "ts_total", key)


def _find_nifti(stem: Path) -> Path | None:
    """Find the file of this name, packed or not."""
    for path in (Path(f"{stem}.nii.gz"), Path(f"{stem}.nii")):
        if path.is_file():
            return path
    return None


def _find_lesion_files(folder: Path, key: str) -> Iterator[tuple[str, Path]]:
    for lesion in LESION_BY_KEY:
        for stem in (folder / key / lesion, folder / f"{key}_{lesion}"):
            path = _find_nifti(stem)
            if path is not None:
                yield lesion, path


def _find_stray_files(folder: Path) -> Iterator[Path]:
    """Yield the NIfTI files of a folder that name neither a lesion nor an anatomical class.

    The folder of a predicted case has its lesions in files of their own and in one of all.
    """
    is_predicted_case = (folder / "findings.json").is_file()
    for path in sorted(folder.glob("*.nii*")):
        if is_predicted_case and path.name == "lesions.nii.gz":
            continue
        name = path.name.split(".")[0]
        is_known = name in LESION_BY_KEY or totalsegmentator.is_known_class(name)
        if not is_known and not path.name.startswith("."):
            yield path


def _find_task_files(folder: Path, key: str) -> Iterator[tuple[str, Path]]:
    for task in totalsegmentator.LESION_TASKS:
        path = _find_in_tree(folder / task, key)
        if path is not None:
            yield task, path


def _find_in_tree(folder: Path, key: str) -> Path | None:
    """Find a file in CT-RATE's tree, or straight in a folder.

    A file of the tree is `train_fixed/train_1/train_1_a/train_1_a_1.nii.gz`.
    """
    name_parts = key.split("_")
    split = name_parts[0]
    nested = Path("_".join(name_parts[:2])) / "_".join(name_parts[:3]) / key
    for tree in (f"{split}_fixed", split, ""):
        for relative_path in (nested, Path(key)):
            path = _find_nifti(folder / tree / relative_path)
            if path is not None:
                return path
    return None
