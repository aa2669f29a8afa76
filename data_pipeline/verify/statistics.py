"""What a data set of shards holds: figures by split, as tables and as `stats.json`.

Figures come from the samples themselves, never from the index. Unknown labels and lesions that were not annotated are
counted as such, never as absent.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from rectvlm.data.hounsfield import MAX_HU, MIN_HU
from rectvlm.data.report_text import join_report_sections
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.types import GridGeometry, HuConversion, Sample, Split

SPLITS: tuple[Split, ...] = ("train", "valid")
NO_REGIONS = "none"


@dataclass(frozen=True)
class SampleSummary:
    """What is remembered of a sample when its voxels are gone."""

    key: str
    shard: str
    split: Split
    patient: str
    scan: str
    labels: tuple[int | None, ...]
    """In the order of `FINDINGS`."""
    lesion_ml: tuple[float, ...]
    """Outlined volume in the order of `LESIONS`, ml; 0 where nothing is outlined."""
    lesions_annotated: tuple[bool, ...]
    lesions_partial: tuple[bool, ...]
    regions_source: str
    """`NO_REGIONS` when there are none."""
    report_words: int | None
    """Of the report; None when there is none."""
    report_digest: str
    """Digest of the report."""
    native_spacing_mm: tuple[float, float]
    """Native voxel size, mm: in-plane (mean of both axes), between slices."""
    matrix_size: int
    """Longer side of a native slice, voxels."""
    slice_count: int
    """Native slices, along the axis that runs most from feet to head."""
    hu_decision: str
    """How stored numbers became HU, in words."""
    has_padding: bool
    """Whether the file had padding below −1024 HU."""
    versions: tuple[tuple[str, str], ...]

    @classmethod
    def from_sample(cls, sample: Sample, shard: str) -> "SampleSummary":
        """The facts of a decoded sample."""
        meta = sample.meta
        text = join_report_sections(meta.findings, meta.impression)
        in_plane, between, matrix, slices = measure_native_sampling(meta.geometry)
        ml = float(np.prod(meta.spacing)) / 1000
        source = meta.regions_source
        return cls(
            key=meta.key,
            shard=shard,
            split=meta.split,
            patient=meta.patient,
            scan=meta.scan,
            labels=tuple(meta.labels[finding] for finding in FINDINGS),
            lesion_ml=tuple(
                int(np.count_nonzero(lesion_mask(sample.lesions, lesion))) * ml
                for lesion in LESIONS
            ),
            lesions_annotated=tuple(meta.lesions_annotated[lesion.key] for lesion in LESIONS),
            lesions_partial=tuple(meta.lesions_partial[lesion.key] for lesion in LESIONS),
            regions_source=NO_REGIONS if source is None else source,
            report_words=None if text is None else len(text.split()),
            report_digest=hashlib.sha256((text or "").encode()).hexdigest()[:16],
            native_spacing_mm=(in_plane, between),
            matrix_size=matrix,
            slice_count=slices,
            hu_decision=_describe_hu_decision(meta.hu),
            has_padding=meta.hu.padding_voxels > 0,
            versions=tuple(meta.versions.items()),
        )


def measure_native_sampling(geometry: GridGeometry) -> tuple[float, float, int, int]:
    """In-plane spacing and slice spacing (mm), longer side of a slice and number of slices, of the native file.

    Slices are counted along the file axis that runs most from feet to head.
    """
    affine = np.array(geometry.native_affine)
    sizes = nib.affines.voxel_sizes(affine)
    along = int(np.abs(affine[2, :3] / sizes).argmax())
    others = [axis for axis in range(3) if axis != along]
    shape = geometry.native_shape
    return (
        float(sizes[others].mean()),
        float(sizes[along]),
        max(shape[i] for i in others),
        shape[along],
    )


def _describe_hu_decision(hu: HuConversion) -> str:
    if (hu.slope, hu.intercept) == (1.0, 0.0):
        return "stored as HU"
    return f"{hu.slope:g} × stored {'−' if hu.intercept < 0 else '+'} {abs(hu.intercept):g}"


def count_hu(ct: NDArray[np.int16]) -> NDArray[np.int64]:
    """Voxels at each HU from −1024 to 3071: (4096,); what lies beyond counts at the ends."""
    shifted = np.clip(ct, MIN_HU, MAX_HU).ravel().astype(np.intp) - MIN_HU
    return np.bincount(shifted, minlength=MAX_HU - MIN_HU + 1)


@dataclass
class DatasetStatistics:
    """Figures of all samples that were read."""

    sample_summaries: list[SampleSummary] = field(default_factory=list)
    hu_histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """By split: voxels at each HU from −1024 on."""

    def of_split(self, split: Split) -> list[SampleSummary]:
        """The facts of one split."""
        return [one for one in self.sample_summaries if one.split == split]

    def to_dict(self) -> dict[str, Any]:
        """All figures, by split; the content of `stats.json`."""
        return {
            split: _split_figures(part, self.hu_histograms.get(split))
            for split in SPLITS
            if (part := self.of_split(split))
        }

    def to_json(self) -> bytes:
        """`stats.json`."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False).encode() + b"\n"


def pick_evenly(items: Sequence[Any], max_count: int) -> list[Any]:
    """At most so many of some items, evenly spread over them, in their order."""
    if len(items) <= max_count:
        return list(items)
    return [items[int((number + 0.5) * len(items) / max_count)] for number in range(max_count)]


def count_labels(facts: Iterable[SampleSummary]) -> dict[str, dict[str, int]]:
    """By finding: samples where it is present, absent and unknown."""
    tally = Counter(pair for one in facts for pair in zip(FINDINGS, one.labels, strict=True))
    words = (("present", 1), ("absent", 0), ("unknown", None))
    return {finding: {word: tally[finding, value] for word, value in words} for finding in FINDINGS}


def count_lesions(facts: Sequence[SampleSummary]) -> dict[str, dict[str, int]]:
    """By lesion key: samples where it is outlined, was annotated in full, in part, or not at all."""
    counts = {}
    for lesion in LESIONS:
        bit = lesion.bit
        annotated, partial = (
            sum(one.lesions_annotated[bit] for one in facts),
            sum(one.lesions_partial[bit] for one in facts),
        )
        counts[lesion.key] = {
            "present": sum(one.lesion_ml[bit] > 0 for one in facts),
            "annotated": annotated,
            "partial": partial,
            "not annotated": len(facts) - annotated - partial,
        }
    return counts


def _split_figures(facts: list[SampleSummary], hu: NDArray[np.int64] | None) -> dict[str, Any]:
    words = [one.report_words for one in facts if one.report_words is not None]
    lesions = count_lesions(facts)
    return {
        "samples": len(facts),
        "scans": len({one.scan for one in facts}),
        "patients": len({one.patient for one in facts}),
        "reconstructions of a scan": dict(
            sorted(Counter(Counter(one.scan for one in facts).values()).items())
        ),
        "labels": count_labels(facts),
        "lesions": {
            lesion.key: {
                **lesions[lesion.key],
                "ml": _percentiles([ml for one in facts if (ml := one.lesion_ml[lesion.bit])]),
            }
            for lesion in LESIONS
        },
        "region sources": dict(Counter(one.regions_source for one in facts).most_common()),
        "reports": len(words),
        "report words": _percentiles(words),
        "in-plane spacing, mm": _percentiles([one.native_spacing_mm[0] for one in facts]),
        "slice spacing, mm": _percentiles([one.native_spacing_mm[1] for one in facts]),
        "slices": _percentiles([one.slice_count for one in facts]),
        "matrix": dict(sorted(Counter(one.matrix_size for one in facts).items())),
        "HU decisions": dict(Counter(one.hu_decision for one in facts).most_common()),
        "with padding": sum(one.has_padding for one in facts),
        "HU": None if hu is None else _hu_figures(hu),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Least, 5 %, median, 95 % and greatest of values; None of none."""
    if not values:
        return None
    points = np.percentile(values, [0, 5, 50, 95, 100])
    return dict(
        zip(
            ("min", "p5", "median", "p95", "max"), (round(float(x), 4) for x in points), strict=True
        )
    )


def _hu_figures(counts: NDArray[np.int64]) -> dict[str, float]:
    """Mean HU, and shares of voxels at the lowest value, of air or lung above it, and of soft tissue."""
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


# Tables


def build_tables(statistics: DatasetStatistics) -> list[Table]:
    """The figures for a terminal of 80 columns."""
    figures = statistics.to_dict()
    return [_case_table(figures), _finding_table(figures), _lesion_table(figures)]


def _new_table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    return table


def _case_table(figures: dict[str, Any]) -> Table:
    table = _new_table("Cases", "", *figures)

    def row(name: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(value(part) for part in figures.values()))

    for name in ("patients", "scans", "samples"):
        row(name, lambda part, name=name: f"{part[name]:,}")  # type: ignore[misc]
    row(
        "samples of one scan",
        lambda part: ", ".join(f"{n} (×{k})" for n, k in part["reconstructions of a scan"].items()),
    )
    row("reports", lambda part: f"{part['reports']:,}")
    for name in ("report words", "in-plane spacing, mm", "slice spacing, mm", "slices"):
        row(f"{name}: median (5–95 %)", lambda part, name=name: _format_percentiles(part[name]))  # type: ignore[misc]
    for name in ("matrix", "region sources", "HU decisions"):
        row(name, lambda part, name=name: "\n".join(f"{k}: {n:,}" for k, n in part[name].items()))  # type: ignore[misc]
    row("with padding below −1024 HU", lambda part: f"{part['with padding']:,}")
    return table


def _format_percentiles(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "–"
    median, low, high = (
        f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        for x in (spread[k] for k in ("median", "p5", "p95"))
    )
    return f"{median} ({low}–{high})"


def _finding_table(figures: dict[str, Any]) -> Table:
    words = {"present": "yes", "absent": "no", "unknown": "?"}
    title = "Findings: samples with each present (yes), absent (no), unknown (?)"
    table = _new_table(
        title, "finding", *(f"{split}\n{short}" for split in figures for short in words.values())
    )
    for finding in FINDINGS:
        table.add_row(
            finding,
            *(f"{part['labels'][finding][word]:,}" for part in figures.values() for word in words),
        )
    return table


def _lesion_table(figures: dict[str, Any]) -> Table:
    words = {"present": "outlined", "annotated": "full", "partial": "part", "not annotated": "not"}
    table = _new_table(
        "Lesions: samples with each outlined; annotated in full, in part, or not",
        *("lesion", "split", *words.values(), "ml, median (5–95 %)"),
    )
    for lesion in LESIONS:
        for split, part in figures.items():
            one = part["lesions"][lesion.key]
            table.add_row(
                lesion.name,
                split,
                *(f"{one[word]:,}" for word in words),
                _format_percentiles(one["ml"]),
            )
    return table
