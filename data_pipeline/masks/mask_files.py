"""The mask files of one volume, read and united.

Each mask keeps its own grid and affine; `rectvlm.data.canonical_grid` brings it to the sample's
grid. What the numbers in a file mean is the subject of `totalsegmentator` and `rexgrounding`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.masks import rexgrounding, totalsegmentator
from data_pipeline.masks.loaded_masks import LoadedMasks
from data_pipeline.masks.rexgrounding import RexVolumeRecord
from rectvlm.data.mask_placement import covers_volume, require_on_volume
from rectvlm.data.volume import read_mask
from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_bits import pack_lesion
from rectvlm.types import (
    OWN_OUTLINES,
    REXGROUNDING_OUTLINES,
    TOTALSEGMENTATOR_OUTLINES,
    InputError,
    MaskVolume,
    Volume,
)


@dataclass(frozen=True)
class CaseMaskFiles:
    """The mask files of one volume."""

    lesion_files: tuple[tuple[str, Path], ...] = ()
    """Pairs of a lesion's key and a file with its mask."""
    absent_lesions: tuple[str, ...] = ()
    """Keys of the lesions that were looked for in all of the volume and are not there."""
    stray_files: tuple[Path, ...] = ()
    """Files beside the lesion files that bear the name of no lesion and of no anatomical class."""
    task_files: tuple[tuple[str, Path], ...] = ()
    """Pairs of a TotalSegmentator task that outlines lesions (its folder's name) and a file."""
    region_map: Path | None = None
    """A multi-label map, or a folder with one file a class."""
    rex_files: tuple[Path, ...] = ()
    """A ReXGroundingCT mask and the tables that explain it."""
    rex_record: RexVolumeRecord | None = None
    """The volume's record in these tables."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that `load` reads or refuses: part of the case's identity."""
        region_files: list[Path] = []
        if self.region_map is not None and self.region_map.is_dir():
            region_files = sorted(self.region_map.glob("*.nii*"))
        elif self.region_map is not None:
            region_files = [self.region_map]
        lesion_files = [path for _, path in (*self.lesion_files, *self.task_files)]
        return (*lesion_files, *self.stray_files, *self.rex_files, *region_files)

    @property
    def ignored_finding_count(self) -> int:
        """Number of findings of ReXGroundingCT with a mask that are none of the lesions."""
        if self.rex_record is None or not self.rex_files:
            return 0
        return sum(not rexgrounding.infer_lesions(*finding) for finding in self.rex_record.findings)

    def keep_rexgrounding_outlines(self) -> "CaseMaskFiles":
        """The same files without lesion outlines of other sources; the region map stays."""
        return replace(self, lesion_files=(), absent_lesions=(), stray_files=(), task_files=())

    def load(self, volume: Volume) -> LoadedMasks:
        """Read and unite the masks.

        Where one source outlined all of a lesion and another one some of it, the lesion counts as
        annotated.

        Args:
            volume: the CT that the masks were drawn on, as read from its file.

        Raises:
            UserError: a mask that cannot be read, that lies elsewhere, whose side is unknown or
                wrong, or whose name stands for nothing.
        """
        if self.stray_files:
            stray = self.stray_files[0]
            raise InputError(
                stray,
                "is the mask of nothing that is known",
                expected=f"a name among {', '.join(LESION_BY_KEY)}",
                found=stray.name,
                remedy="rename it, or move it elsewhere",
            )
        outlines = _OutlineUnion(volume)
        for key, path in self.lesion_files:
            mask = read_mask(path)
            bits = pack_lesion(mask.array > 0, LESION_BY_KEY[key])
            outlines.add_mask(Volume(bits, mask.affine, mask.where), {key}, OWN_OUTLINES)
        outlines.add_absent(self.absent_lesions)
        for task, path in self.task_files:
            mask, looked_for = totalsegmentator.read_lesions(path, task)
            outlines.add_mask(mask, looked_for, TOTALSEGMENTATOR_OUTLINES)
        if self.rex_files and self.rex_record is not None:
            outlines.add_rexgrounding(
                rexgrounding.read_outlines(self.rex_files[0], self.rex_record, volume)
            )
        regions, regions_source = self._load_regions(volume)
        annotated = outlines.annotated
        partial = outlines.partial - annotated
        return LoadedMasks(
            lesions=outlines.volumes,
            lesions_annotated={key: key in annotated for key in LESION_BY_KEY},
            lesions_partial={key: key in partial for key in LESION_BY_KEY},
            lesions_source=outlines.describe_sources(),
            regions=regions,
            regions_source=regions_source,
        )

    def _load_regions(self, volume: Volume) -> tuple[Volume | None, str | None]:
        """Read the region map; return it with its source."""
        if self.region_map is None:
            return None, None
        if self.region_map.is_dir():
            regions = totalsegmentator.read_class_folder(self.region_map)
            source = "one file a class"
        else:
            regions, source = totalsegmentator.read_regions(self.region_map)
        require_on_volume(regions, volume.affine, volume.array.shape, volume.where)
        totalsegmentator.require_sides(regions)
        # Every chest has regions: a map without any is no map.
        return (regions, source) if regions.array.any() else (None, None)


class _OutlineUnion:
    """Lesion masks of several sources. Those on one grid share an array: five files need one."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.volumes: list[Volume] = []
        self.annotated: set[str] = set()
        self.partial: set[str] = set()
        self.sources: dict[str, list[str]] = {key: [] for key in LESION_BY_KEY}

    def add_mask(self, mask: Volume, looked_for: set[str], source: str) -> None:
        """Add lesion bits of a file whose lesions were looked for in all of its box.

        Raises:
            InputError: the mask does not lie on the volume.
        """
        require_on_volume(mask, self.volume.affine, self.volume.array.shape, self.volume.where)
        self._unite(mask)
        if covers_volume(mask, self.volume):
            self.annotated |= looked_for
        else:
            self.partial |= looked_for
        self._add_source(looked_for, source)

    def add_absent(self, lesions: Sequence[str]) -> None:
        """Note lesions that were looked for in all of the volume and are not there."""
        self.annotated.update(lesions)
        self._add_source(lesions, OWN_OUTLINES)

    def add_rexgrounding(self, outlines: rexgrounding.RexLesionOutlines) -> None:
        """Add the outlines of a ReXGroundingCT file."""
        self._unite(outlines.lesions)
        self.annotated |= outlines.annotated
        self.partial |= outlines.partial
        self._add_source(outlines.annotated | outlines.partial, REXGROUNDING_OUTLINES)

    def describe_sources(self) -> dict[str, str | None]:
        """Sources of each lesion's outlines, joined by " + "; None for none."""
        return {key: " + ".join(sources) or None for key, sources in self.sources.items()}

    def _add_source(self, lesions: Iterable[str], source: str) -> None:
        for lesion in lesions:
            if source not in self.sources[lesion]:
                self.sources[lesion].append(source)

    def _unite(self, mask: Volume) -> None:
        bits: MaskVolume = mask.array
        for volume in self.volumes:
            if volume.array.shape == bits.shape and np.array_equal(volume.affine, mask.affine):
                np.bitwise_or(volume.array, bits, out=volume.array)
                return
        self.volumes.append(mask)
