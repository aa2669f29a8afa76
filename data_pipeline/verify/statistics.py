"""Statistics of a data set of shards, by split: the content of `stats.json`.

They come from the samples themselves, never from the index. Unknown labels and lesions that were
not annotated are counted as such, never as absent.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from rectvlm.data.hounsfield import MAX_HU, MIN_HU
from rectvlm.data.report_text import join_report_sections
from rectvlm.labels import FINDINGS, LESIONS, Lesion
from rectvlm.lesion_bits import lesion_mask
from rectvlm.types import (
    SPLITS,
    UNKNOWN_OUTLINES,
    GridGeometry,
    HuConversion,
    Sample,
    SampleMeta,
    Split,
)

NO_REGIONS = "none"
LABEL_WORDS: dict[str, int | None] = {"present": 1, "absent": 0, "unknown": None}
"""Values of a label by the word that the counts have for it."""
SplitStatistics = dict[str, Any]
"""Statistics of one split, as `stats.json` holds them."""
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class NativeSampling:
    """Sampling of a native file.

    Slices are counted along the file axis that runs most from feet to head.
    """

    in_plane_mm: float
    """Spacing in the plane of a slice (mean of both axes), mm."""
    slice_spacing_mm: float
    """Spacing between slices, mm."""
    matrix_size: int
    """Longer side of a slice, voxels."""
    slice_count: int


def measure_native_sampling(geometry: GridGeometry) -> NativeSampling:
    """Measure the sampling of a sample's native file."""
    affine = np.array(geometry.native_affine)
    voxel_sizes = nib.affines.voxel_sizes(affine)
    slice_axis = int(np.abs(affine[2, :3] / voxel_sizes).argmax())
    plane_axes = [axis for axis in range(3) if axis != slice_axis]
    return NativeSampling(
        in_plane_mm=float(voxel_sizes[plane_axes].mean()),
        slice_spacing_mm=float(voxel_sizes[slice_axis]),
        matrix_size=max(geometry.native_shape[axis] for axis in plane_axes),
        slice_count=geometry.native_shape[slice_axis],
    )


@dataclass(frozen=True)
class SampleSummary:
    """What statistics keep of a sample when its voxels are gone."""

    key: str
    shard: str
    split: Split
    patient: str
    scan: str
    labels: tuple[int | None, ...]
    """Labels in the order of `FINDINGS`."""
    lesion_ml: tuple[float, ...]
    """Outlined volumes in the order of `LESIONS`, ml; 0 where nothing is outlined."""
    lesions_annotated: tuple[bool, ...]
    """Whether each lesion was annotated, in the order of `LESIONS`."""
    lesions_partial: tuple[bool, ...]
    """Whether each lesion was annotated in part, in the order of `LESIONS`."""
    lesions_source: tuple[str | None, ...]
    """Source of each lesion's outlines, in the order of `LESIONS`; None where not annotated."""
    regions_source: str
    """Source of the region map; `NO_REGIONS` when there is none."""
    report_words: int | None
    """Number of words of the report; None when there is none."""
    report_digest: str
    """SHA-256 of the report, its first 16 digits."""
    has_indication: bool
    has_technique: bool
    native_sampling: NativeSampling
    hu_conversion: str
    """Way from stored numbers to HU, in words."""
    has_padding: bool
    """Whether the file had padding below −1024 HU."""
    versions: tuple[tuple[str, str], ...]

    @classmethod
    def from_sample(cls, sample: Sample, shard: str) -> "SampleSummary":
        """Summarize a decoded sample of a shard."""
        meta = sample.meta
        report = join_report_sections(meta.findings, meta.impression)
        voxel_ml = float(np.prod(meta.spacing)) / 1000
        lesion_ml = [
            int(np.count_nonzero(lesion_mask(sample.lesions, lesion))) * voxel_ml
            for lesion in LESIONS
        ]
        return cls(
            key=meta.key,
            shard=shard,
            split=meta.split,
            patient=meta.patient,
            scan=meta.scan,
            labels=tuple(meta.labels[finding] for finding in FINDINGS),
            lesion_ml=tuple(lesion_ml),
            lesions_annotated=tuple(meta.lesions_annotated[lesion.key] for lesion in LESIONS),
            lesions_partial=tuple(meta.lesions_partial[lesion.key] for lesion in LESIONS),
            lesions_source=_list_lesion_sources(meta),
            regions_source=NO_REGIONS if meta.regions_source is None else meta.regions_source,
            report_words=None if report is None else len(report.split()),
            report_digest=hashlib.sha256((report or "").encode()).hexdigest()[:16],
            has_indication=meta.indication is not None,
            has_technique=meta.technique is not None,
            native_sampling=measure_native_sampling(meta.geometry),
            hu_conversion=_describe_hu_conversion(meta.hu),
            has_padding=meta.hu.padding_voxels > 0,
            versions=tuple(meta.versions.items()),
        )


def _list_lesion_sources(meta: SampleMeta) -> tuple[str | None, ...]:
    sources: list[str | None] = []
    for lesion in LESIONS:
        is_outlined = meta.lesions_annotated[lesion.key] or meta.lesions_partial[lesion.key]
        source = meta.lesions_source[lesion.key] or UNKNOWN_OUTLINES
        sources.append(source if is_outlined else None)
    return tuple(sources)


def _describe_hu_conversion(hu: HuConversion) -> str:
    if (hu.slope, hu.intercept) == (1.0, 0.0):
        return "stored as HU"
    sign = "−" if hu.intercept < 0 else "+"
    return f"{hu.slope:g} × stored {sign} {abs(hu.intercept):g}"


def count_hu(ct: NDArray[np.int16]) -> NDArray[np.int64]:
    """Count the voxels at each HU from −1024 to 3071, (4096,); what lies beyond counts at the
    ends."""
    indexes = np.clip(ct, MIN_HU, MAX_HU).ravel().astype(np.intp) - MIN_HU
    return np.bincount(indexes, minlength=MAX_HU - MIN_HU + 1)


def add_histogram(
    histograms: dict[str, NDArray[np.int64]], split: str, counts: NDArray[np.int64]
) -> None:
    """Add counts to the histogram of a split, in place."""
    histograms[split] = histograms.get(split, np.zeros_like(counts)) + counts


@dataclass
class DatasetStatistics:
    """Summaries of all samples that were read, and statistics of them."""

    sample_summaries: list[SampleSummary] = field(default_factory=list)
    hu_histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Voxels at each HU from −1024 on, by split."""

    def of_split(self, split: Split) -> list[SampleSummary]:
        """Summaries of the samples of one split."""
        return [summary for summary in self.sample_summaries if summary.split == split]

    def by_split(self) -> dict[Split, list[SampleSummary]]:
        """Summaries of each split that has samples."""
        summaries = {split: self.of_split(split) for split in SPLITS}
        return {split: of_split for split, of_split in summaries.items() if of_split}

    def to_dict(self) -> dict[str, SplitStatistics]:
        """All statistics by split, as `stats.json` holds them."""
        return {
            split: _split_statistics(summaries, self.hu_histograms.get(split))
            for split, summaries in self.by_split().items()
        }

    def to_json(self) -> bytes:
        """The content of `stats.json`."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False).encode() + b"\n"


def pick_evenly(items: Sequence[ItemT], max_count: int) -> list[ItemT]:
    """Pick at most `max_count` items that are spread evenly, in their order."""
    if len(items) <= max_count:
        return list(items)
    return [items[int((number + 0.5) * len(items) / max_count)] for number in range(max_count)]


def count_labels(summaries: Sequence[SampleSummary]) -> dict[str, dict[str, int]]:
    """Count the samples in which each finding is present, absent and unknown."""
    counts = {}
    for index, finding in enumerate(FINDINGS):
        values = Counter(summary.labels[index] for summary in summaries)
        counts[finding] = {word: values[value] for word, value in LABEL_WORDS.items()}
    return counts


def count_lesions(summaries: Sequence[SampleSummary]) -> dict[str, dict[str, int]]:
    """Count the samples in which each lesion is outlined, and was annotated in full, in part,
    not."""
    counts = {}
    for lesion in LESIONS:
        annotated = sum(summary.lesions_annotated[lesion.bit] for summary in summaries)
        partial = sum(summary.lesions_partial[lesion.bit] for summary in summaries)
        counts[lesion.key] = {
            "present": len(outlined_volumes_ml(summaries, lesion)),
            "annotated": annotated,
            "partial": partial,
            "not annotated": len(summaries) - annotated - partial,
        }
    return counts


def outlined_volumes_ml(summaries: Sequence[SampleSummary], lesion: Lesion) -> list[float]:
    """Outlined volume of a lesion in each sample that shows it, ml."""
    volumes = [summary.lesion_ml[lesion.bit] for summary in summaries]
    return [volume for volume in volumes if volume > 0]


def _split_statistics(
    summaries: list[SampleSummary], hu_histogram: NDArray[np.int64] | None
) -> SplitStatistics:
    samples_by_scan: Counter[str] = Counter()
    regions_sources: Counter[str] = Counter()
    hu_conversions: Counter[str] = Counter()
    matrix_sizes: Counter[int] = Counter()
    report_words, in_plane_mm, slice_spacings_mm, slice_counts = [], [], [], []
    for summary in summaries:
        samples_by_scan[summary.scan] += 1
        regions_sources[summary.regions_source] += 1
        hu_conversions[summary.hu_conversion] += 1
        matrix_sizes[summary.native_sampling.matrix_size] += 1
        in_plane_mm.append(summary.native_sampling.in_plane_mm)
        slice_spacings_mm.append(summary.native_sampling.slice_spacing_mm)
        slice_counts.append(summary.native_sampling.slice_count)
        if summary.report_words is not None:
            report_words.append(summary.report_words)
    reconstructions = Counter(samples_by_scan.values())
    lesion_counts = count_lesions(summaries)
    lesions = {}
    for lesion in LESIONS:
        volumes_ml = _percentiles(outlined_volumes_ml(summaries, lesion))
        sources = Counter(summary.lesions_source[lesion.bit] for summary in summaries)
        del sources[None]
        lesions[lesion.key] = {
            **lesion_counts[lesion.key],
            "sources": dict(sources.most_common()),
            "ml": volumes_ml,
        }
    return {
        "samples": len(summaries),
        "scans": len(samples_by_scan),
        "patients": len({summary.patient for summary in summaries}),
        "reconstructions of a scan": dict(sorted(reconstructions.items())),
        "labels": count_labels(summaries),
        "lesions": lesions,
        "region sources": dict(regions_sources.most_common()),
        "reports": len(report_words),
        "report words": _percentiles(report_words),
        "indications": sum(summary.has_indication for summary in summaries),
        "techniques": sum(summary.has_technique for summary in summaries),
        "in-plane spacing, mm": _percentiles(in_plane_mm),
        "slice spacing, mm": _percentiles(slice_spacings_mm),
        "slices": _percentiles(slice_counts),
        "matrix": dict(sorted(matrix_sizes.items())),
        "HU decisions": dict(hu_conversions.most_common()),
        "with padding": sum(summary.has_padding for summary in summaries),
        "HU": None if hu_histogram is None else _hu_statistics(hu_histogram),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Least, 5 %, median, 95 % and greatest of some values; None when there are none."""
    if not values:
        return None
    least, p5, median, p95, greatest = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
    points = {"min": least, "p5": p5, "median": median, "p95": p95, "max": greatest}
    return {name: round(value, 4) for name, value in points.items()}


def _hu_statistics(counts: NDArray[np.int64]) -> dict[str, float]:
    """Mean HU, and the shares of voxels at the lowest value, of air or lung, and of soft tissue."""
    values = np.arange(MIN_HU, MAX_HU + 1)
    total = max(1, int(counts.sum()))

    def share(low: int, high: int) -> float:
        return round(int(counts[(values >= low) & (values <= high)].sum()) / total, 4)

    return {
        "mean": round(float((counts * values).sum() / total), 1),
        f"share at {MIN_HU}": share(MIN_HU, MIN_HU),
        "share above it to −700": share(MIN_HU + 1, -700),
        "share −150 to 150": share(-150, 150),
    }
