"""A case of any data set, and its way to a sample on the canonical grid.

A data set plugs in as a function that lists `Case`s. Each of them knows how to load its own
`CaseData`, in a worker process, when its turn comes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.masks.loaded_masks import LoadedMasks
from rectvlm.data.canonical_grid import canonical_affine, resample_to_grid
from rectvlm.data.coarse_regions import estimate_coarse_regions
from rectvlm.data.hounsfield import to_hu
from rectvlm.data.mask_placement import require_on_volume
from rectvlm.data.sample import preprocessing_versions
from rectvlm.file_search import list_files
from rectvlm.files import printable_text
from rectvlm.labels import FINDINGS
from rectvlm.lesion_bits import present_lesions
from rectvlm.types import (
    COARSE_REGIONS_SOURCE,
    GridGeometry,
    MaskVolume,
    Sample,
    SampleMeta,
    Split,
    Volume,
)


@dataclass(frozen=True, kw_only=True)
class CaseData(LoadedMasks):
    """The content of a case's files: its CT, masks, labels and report."""

    volume: Volume
    """CT in HU, or in stored numbers."""
    labels: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(FINDINGS))
    """Labels of all 18 findings: 1, 0, or None for unknown."""
    findings: str | None = None
    """Findings section of the report; None when there is none."""
    impression: str | None = None
    """Impression section of the report; None when there is none."""
    indication: str | None = None
    """Reason for the examination; None where it is not known."""
    technique: str | None = None
    """Technique of the examination, in words; None where it is not known."""
    slope: float | None = None
    """RescaleSlope of the series, where known; `to_hu` decides whether it still applies."""
    intercept: float | None = None
    """RescaleIntercept of the series, where known."""


@dataclass(frozen=True)
class Case:
    """One case of a data set, before its files are read."""

    key: str
    """Unique name of letters, digits, '_' and '-'."""
    split: Split
    patient: str
    source: str
    """Data set and file, for the sample's record and for the quarantine list."""
    load: Callable[[], CaseData]
    """Function that reads the case. It runs in another process, so it is a module's function or a
    `functools.partial` of one."""
    identity: tuple[str, ...]
    """Texts that change whenever the loaded data may, such as names, sizes and times of files; the
    case is then made again."""
    scan: str = ""
    """Scan that several reconstructions share; empty when the case is the only one of its scan."""
    series: dict[str, str | float | None] = field(default_factory=dict)
    """Facts of the reconstruction, for the sample's record."""


def file_identity(*paths: Path) -> tuple[str, ...]:
    """Name, size and modification time of each file, for `Case.identity`.

    A folder stands for the files in it. A file may be missing, and a path may be none that the
    system takes.
    """
    identity = []
    for path in paths:
        if os.path.isfile(path):
            stat = path.stat()
            identity.append(f"{path}:{stat.st_size}:{stat.st_mtime_ns}")
        elif os.path.isdir(path):
            identity += file_identity(*list_files(path).files)
        else:
            identity.append(f"{path}:missing")
    return tuple(identity)


def case_to_sample(
    case: Case,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    coarse_regions: bool = False,
) -> Sample:
    """Load a case and bring it to the canonical grid.

    Args:
        case: to load.
        grid: size of the canonical grid (z, y, x), voxels.
        spacing: spacing of the canonical grid (z, y, x), mm.
        coarse_regions: estimate regions from the CT where no map exists; their source is then
            `COARSE_REGIONS_SOURCE`.

    Raises:
        UserError: a file that cannot be read, numbers that are not HU, or a mask that lies
            elsewhere.
    """
    data = case.load()
    native = data.volume
    hu, conversion = to_hu(native, data.slope, data.intercept)
    affine = canonical_affine(native.affine, hu.shape, hu, grid, spacing)
    for mask in (*data.lesions, data.regions):
        if mask is not None:
            require_on_volume(mask, native.affine, hu.shape, native.where)

    lesions = np.zeros(grid, np.uint8)
    for mask in data.lesions:
        lesions |= resample_to_grid(mask.array, mask.affine, affine, grid, "bits")
    _require_known_lesions(case, data, lesions)
    ct = resample_to_grid(hu, native.affine, affine, grid, "ct")
    regions, regions_source = np.zeros(grid, np.uint8), data.regions_source
    if data.regions is not None:
        regions = resample_to_grid(data.regions.array, data.regions.affine, affine, grid, "labels")
    elif coarse_regions:
        regions = estimate_coarse_regions(ct, spacing)
        regions_source = COARSE_REGIONS_SOURCE if regions.any() else None

    geometry = GridGeometry(
        grid_affine=affine.tolist(),
        native_shape=(hu.shape[0], hu.shape[1], hu.shape[2]),
        native_affine=native.affine.tolist(),
    )
    meta = SampleMeta(
        key=case.key,
        split=case.split,
        source=printable_text(case.source),
        patient=case.patient,
        scan=case.scan or case.key,
        labels=data.labels,
        findings=data.findings,
        impression=data.impression,
        indication=data.indication,
        technique=data.technique,
        spacing=spacing,
        geometry=geometry,
        hu=conversion,
        lesions_annotated=data.lesions_annotated,
        regions_source=regions_source,
        lesions_partial=data.lesions_partial,
        lesions_source=data.lesions_source,
        series=case.series,
        versions=preprocessing_versions(),
    )
    return Sample(ct, lesions, regions, meta)


def _require_known_lesions(case: Case, data: CaseData, lesions: MaskVolume) -> None:
    """Assert that every lesion with a voxel was annotated, at least in part."""
    for lesion in present_lesions(lesions):
        assert data.lesions_annotated[lesion.key] or data.lesions_partial[lesion.key], (
            f"{case.key}: {lesion.key} is outlined but not annotated"
        )
