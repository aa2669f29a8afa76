"""Masks that lie beside a data set's volumes: which files belong to a volume, and what they hold.

`MaskFolders.of(key)` looks for the files, `CaseMasks.load(volume)` reads them in a worker process. Each mask keeps its
own grid and affine; bringing it to the sample's grid is `rectvlm.data.frame`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rectvlm.data.volume import Volume
from rectvlm.labels import LESION_BY_KEY


@dataclass(frozen=True)
class LoadedMasks:
    """What the masks of a volume say, one to one the fields of `data_pipeline.cases.CaseData`."""

    lesions: Sequence[Volume] = ()
    """uint8 lesion bits, each on its own grid and affine; they are united."""
    lesions_annotated: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(LESION_BY_KEY, False))
    """By lesion key: whether one of the sources outlined all of its kind. What has no file is not annotated."""
    lesions_partial: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(LESION_BY_KEY, False))
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
    paths: tuple[Path, ...] = ()
    """Every file that `load` reads: part of the case's identity."""

    def load(self, volume: Volume) -> LoadedMasks:
        """Read them.

        Args:
            volume: the CT that they were drawn on, as read from its file.

        Raises:
            UserError: a mask that cannot be read, that lies elsewhere or whose side is unknown.
        """
        return LoadedMasks()


@dataclass(frozen=True)
class MaskFolders:
    """Where masks are looked for; a folder that is None is not."""

    ts_seg: Path | None = None
    """CT-RATE's `dataset/ts_seg`: outputs of TotalSegmentator (`ts_total`, `ts_lung_nodules`, …)."""
    rexgrounding: Path | None = None
    """ReXGroundingCT: `dataset.json` and `segmentations/KEY.nii.gz`."""
    lesions: Path | None = None
    """One NIfTI a lesion: `KEY/LESION.nii.gz` or `KEY_LESION.nii.gz`, LESION a key of `labels.LESION_BY_KEY`."""
    regions: Path | None = None
    """Region maps: `KEY.nii.gz` with TotalSegmentator's class ids, or `KEY/CLASS.nii.gz`, one file a class."""

    def of(self, key: str) -> CaseMasks:
        """The masks of the volume `key` (its file's name without `.nii.gz`); none is no error."""
        return CaseMasks(key)
