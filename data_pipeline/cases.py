"""What preprocessing works on: a case, whatever data set it comes from, and its way to a sample.

A data set plugs in as a function that lists `Case`s; each knows how to load its own `CaseData`, in a worker process,
when its turn comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.masks.coarse_regions import estimate_coarse_regions
from rectvlm.data.canonical_grid import canonical_affine, require_overlap, resample_to_grid
from rectvlm.data.hounsfield import to_hu
from rectvlm.data.sample import preprocessing_versions
from rectvlm.labels import FINDINGS, LESION_BY_KEY
from rectvlm.lesion_bits import present_lesions
from rectvlm.types import COARSE_REGIONS_SOURCE, GridGeometry, Sample, SampleMeta, Split, Volume


@dataclass(frozen=True)
class CaseData:
    """All that is known of a case, as it comes from its files."""

    volume: Volume
    """The CT, HU or stored numbers."""
    labels: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(FINDINGS))
    """By finding: 1, 0, or None for unknown; all 18."""
    findings: str | None = None
    impression: str | None = None
    lesions: Sequence[Volume] = ()
    """uint8 lesion bits, each on its own grid and affine; they are united."""
    lesions_annotated: dict[str, bool] = field(
        default_factory=lambda: dict.fromkeys(LESION_BY_KEY, False)
    )
    """By lesion key, all 5: whether it was looked for. What was not annotated is not absent."""
    lesions_partial: dict[str, bool] = field(
        default_factory=lambda: dict.fromkeys(LESION_BY_KEY, False)
    )
    """By lesion key: some are outlined, others may not be; never together with annotated."""
    lesions_source: str | None = None
    """Where the outlines came from."""
    regions: Volume | None = None
    """uint8 region ids, on its own grid and affine."""
    regions_source: str | None = None
    slope: float | None = None
    """RescaleSlope and RescaleIntercept of the series, where known; `to_hu` decides whether they still apply."""
    intercept: float | None = None


@dataclass(frozen=True)
class Case:
    """One case of a data set, before it is read."""

    key: str
    """Unique; letters, digits, '_' and '-' only."""
    split: Split
    patient: str
    source: str
    """Data set and file, for the sample's record and for the quarantine list."""
    load: Callable[[], CaseData]
    """Reads it; runs in another process, so a module's function or a `functools.partial` of one."""
    identity: tuple[str, ...]
    """What decides the loaded data, such as names, sizes and times of files: when it changes, the case is redone."""
    scan: str = ""
    """The examination that its reconstructions share; empty when the case is the only one."""
    series: dict[str, str | float | None] = field(default_factory=dict)
    """What is known of the reconstruction, for the sample's record."""


def file_identity(*paths: Path) -> tuple[str, ...]:
    """Name, size and modification time of each file; a missing file counts as such."""
    stats = [(path, path.stat() if path.is_file() else None) for path in paths]
    return tuple(
        f"{path}:{stat.st_size}:{stat.st_mtime_ns}" if stat else f"{path}:missing"
        for path, stat in stats
    )


def case_to_sample(
    case: Case,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    coarse_regions: bool = False,
) -> Sample:
    """Load a case and bring it to the canonical grid.

    Args:
        grid: voxels (z, y, x).
        spacing: mm (z, y, x).
        coarse_regions: estimate regions from the CT where no map exists; `COARSE` is then their source.

    Raises:
        UserError: a file that cannot be read, numbers that are not HU, or a mask that lies elsewhere.
    """
    data = case.load()
    native = data.volume
    hu, decision = to_hu(native, data.slope, data.intercept)
    affine = canonical_affine(native.affine, hu.shape, hu, grid, spacing)
    for mask in [*data.lesions, *([data.regions] if data.regions else [])]:
        require_overlap(mask.affine, mask.array.shape, native.affine, hu.shape, mask.where)
    lesions = np.zeros(grid, np.uint8)
    for mask in data.lesions:
        lesions |= resample_to_grid(mask.array, mask.affine, affine, grid, "bits")
    drawn = {lesion.key for lesion in present_lesions(lesions)}
    looked_for = {
        key for key in LESION_BY_KEY if data.lesions_annotated[key] or data.lesions_partial[key]
    }
    assert drawn <= looked_for, f"{case.key}: {drawn - looked_for} drawn but not annotated"
    ct = resample_to_grid(hu, native.affine, affine, grid, "ct")
    regions, regions_source = np.zeros(grid, np.uint8), data.regions_source
    if data.regions is not None:
        regions = resample_to_grid(data.regions.array, data.regions.affine, affine, grid, "labels")
    elif coarse_regions:
        regions = estimate_coarse_regions(ct, spacing)
        regions_source = COARSE_REGIONS_SOURCE if regions.any() else None
    meta = SampleMeta(
        key=case.key,
        split=case.split,
        source=case.source,
        patient=case.patient,
        scan=case.scan or case.key,
        labels=data.labels,
        findings=data.findings,
        impression=data.impression,
        spacing=spacing,
        geometry=GridGeometry(
            grid_affine=affine.tolist(),
            native_shape=(hu.shape[0], hu.shape[1], hu.shape[2]),
            native_affine=native.affine.tolist(),
        ),
        hu=decision,
        lesions_annotated=data.lesions_annotated,
        regions_source=regions_source,
        lesions_partial=data.lesions_partial,
        lesions_source=data.lesions_source,
        series=case.series,
        versions=preprocessing_versions(),
    )
    return Sample(ct, lesions, regions, meta)
