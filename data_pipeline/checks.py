"""What must hold of one shard and of each sample in it, checked against the bytes themselves.

A fault is something that a reader would trip over or learn wrongly from; a note is something worth a look, such as a
lesion outlined in a case whose report does not name it.
"""

import hashlib
import io
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys

from data_pipeline.stats import Facts, hu_counts
from rectvlm.data.frame import require_overlap
from rectvlm.data.hounsfield import HU_HIGH, HU_LOW, Evidence, to_hu
from rectvlm.data.manifest import ShardFacts
from rectvlm.data.sample import MEMBERS, decode
from rectvlm.data.shards import Entry, Shard
from rectvlm.data.store import Store
from rectvlm.labels import AIR_HU, LESION_BY_KEY, LESIONS, REGION_BY_NAME
from rectvlm.types import COARSE, Affine, Sample, SampleMeta, UserError, Volume

_BLOCK = 8 << 20
_NAMED = 8
"""Samples that one remark names."""
_ENOUGH = 20
"""Voxels of a region from which its place says something."""
_TRACE = 0.01
"""Share of air and of soft tissue from which a doubt about HU is a note."""
_ORDER: tuple[tuple[int, str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        2,
        "further right than",
        ("right upper lobe", "right middle lobe", "right lower lobe"),
        ("left upper lobe", "left lower lobe"),
    ),
    (1, "in front of", ("heart",), ("spine",)),
    (0, "below", ("liver",), ("trachea",)),
)
"""Axis, words, and the regions whose mean index must be the lower and the higher one."""


@dataclass(frozen=True)
class Remark:
    """One fault or note."""

    shard: str
    """File in the folder of shards."""
    sample: str | None
    """Key; None when it is about the file."""
    expected: str
    found: str

    def __str__(self) -> str:
        place = self.shard if self.sample is None else f"{self.shard}, sample {self.sample}"
        return " ".join(f"{place}: expected {self.expected}, found {self.found}".split())


@dataclass
class Remarks:
    """Faults and notes as they are found."""

    faults: list[Remark] = field(default_factory=list)
    notes: list[Remark] = field(default_factory=list)

    def add(self, other: "Remarks") -> None:
        """Take over what another check found."""
        self.faults += other.faults
        self.notes += other.notes


@dataclass
class _Checker:
    """Adds to remarks about one place."""

    remarks: Remarks
    shard: str
    sample: str | None = None

    def expect(self, holds: bool, expected: str, found: object) -> bool:
        """Record a fault unless it holds."""
        if not holds:
            self.remarks.faults.append(Remark(self.shard, self.sample, expected, str(found)))
        return holds

    def note(self, holds: bool, expected: str, found: object) -> None:
        """Record a note unless it holds."""
        if not holds:
            self.remarks.notes.append(Remark(self.shard, self.sample, expected, str(found)))


@dataclass
class ShardReport:
    """What reading one shard gave; small enough to send between processes."""

    name: str
    remarks: Remarks = field(default_factory=Remarks)
    facts: list[Facts] = field(default_factory=list)
    """Of every sample that could be decoded and has sound affines."""
    hu: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """By split: voxels at each HU, as `stats.hu_counts`."""
    bytes: int = 0
    """Read from the store."""


# One shard


def check_shard(
    store: Store,
    shard: Shard,
    facts: ShardFacts | None,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
) -> ShardReport:
    """Read a whole shard once, in order, and check it and each of its samples.

    Args:
        shard: what the index says of it.
        facts: what the manifest says of it; None when there is no manifest.
        grid: voxels (z, y, x) of the index.
        spacing: mm (z, y, x) of the index.
    """
    report = ShardReport(shard.name)
    checker = _Checker(report.remarks, shard.name)
    try:
        size = store.size(shard.name)
        if not checker.expect(size is not None, "this shard, which the index names", "no such file"):
            return report
        if facts is not None:
            checker.expect(size == facts.bytes, f"{facts.bytes} bytes", f"{size} bytes")
        stream = _Hashed(store, shard.name, size or 0)
        reader = io.BufferedReader(stream, _BLOCK)
        _check_tar(reader, size or 0, shard, grid, spacing, report)
        while reader.read(_BLOCK):
            """To the end, for the digest."""
    except OSError as error:
        checker.expect(False, "a file that can be read", f"{type(error).__name__}: {error}")
        return report
    report.bytes = stream.position
    if facts is not None:
        digest = stream.digest.hexdigest()
        checker.expect(digest == facts.sha256, f"SHA-256 {facts.sha256}", digest)
    return report


class _Hashed(io.RawIOBase):
    """A stored file of a known size read from its start to its end, digested on the way."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self.store, self.name, self.size, self.position, self.digest = store, name, size, 0, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A server answers a range beyond the end with an error.
        wanted = min(len(buffer), self.size - self.position)
        data = self.store.read_range(self.name, self.position, wanted) if wanted > 0 else b""
        buffer[: len(data)] = data
        self.position += len(data)
        self.digest.update(data)
        return len(data)


def _check_tar(
    reader: BinaryIO,
    size: int,
    shard: Shard,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    report: ShardReport,
) -> None:
    """Walk the tar as WebDataset does and compare its samples and their places with the index."""
    checker = _Checker(report.remarks, shard.name)
    entries = {entry.key: entry for entry in shard.samples}
    places: dict[str, tuple[int, int]] = {}
    order: list[str] = []
    unknown: list[str] = []
    try:
        for record in group_by_keys(_members(reader, size, places, checker)):
            key = record["__key__"]
            order.append(key)
            one = _Checker(report.remarks, shard.name, key)
            members = {name: data for name, data in record.items() if not name.startswith("__")}
            found = {name: places.pop(f"{key}.{name}") for name in members if f"{key}.{name}" in places}
            if key not in entries:
                unknown.append(key)
                continue
            complete = set(members) == set(MEMBERS)
            if not one.expect(complete, f"the members {', '.join(MEMBERS)}", ", ".join(members)):
                continue
            wanted = entries[key].members
            one.expect(found == wanted, f"members at (offset, size) {_places(wanted)} as in the index", _places(found))
            _check_members(members, entries[key], grid, spacing, one, report)
    except ValueError as error:  # from `group_by_keys`: a file twice in a sample
        _not_a_tar(checker, error)
    checker.expect(not unknown, "only samples that the index names", f"{_some(unknown)}, which it does not")
    missing = [key for key in entries if key not in order]
    checker.expect(not missing, f"{len(entries)} samples that the index names", f"{_some(missing)} not, or not whole")
    wanted_order = [entry.key for entry in shard.samples]
    if set(order) == set(wanted_order):
        checker.expect(order == wanted_order, f"samples in the index's order {_some(wanted_order)}", _some(order))


def _not_a_tar(checker: _Checker, error: Exception) -> None:
    found = f"{type(error).__name__}: {error.args[0] if error.args else ''}"
    checker.expect(False, "a plain WebDataset tar", found)


def _some(names: Sequence[str]) -> str:
    """A few names in words, however many there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _places(members: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return dict(sorted(members.items()))


def _members(
    reader: BinaryIO, size: int, places: dict[str, tuple[int, int]], checker: _Checker
) -> Iterator[dict[str, Any]]:
    """The files of a tar as WebDataset's own reader yields them, up to where it is damaged; `places` gets offset and
    size of each."""
    try:
        with tarfile.open(fileobj=reader, mode="r|", bufsize=1 << 20) as tar:
            for member in tar:
                if not checker.expect(member.isreg(), "regular files only", f"{member.name!r} of another type"):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name!r} would end at byte {member.offset_data + member.size}")
                stored = tar.extractfile(member)
                assert stored is not None
                places[member.name] = (member.offset_data, member.size)
                yield {"fname": member.name, "data": stored.read(), "__url__": checker.shard}
                # tarfile keeps every header it has seen.
                tar.members = []  # type: ignore[attr-defined]
    except (tarfile.TarError, ValueError, EOFError) as error:
        # The samples before are still whole.
        _not_a_tar(checker, error)


def _check_members(
    members: dict[str, bytes],
    entry: Entry,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    checker: _Checker,
    report: ShardReport,
) -> None:
    try:
        sample = decode(members, where="it")
        if check_sample(sample, entry, grid, spacing, checker):
            report.facts.append(Facts.of(sample, checker.shard))
            counts = hu_counts(sample.ct)
            report.hu[sample.meta.split] = report.hu.get(sample.meta.split, np.zeros_like(counts)) + counts
    except UserError as error:
        checker.expect(False, "a sample of this schema", f"that {error}")
    except Exception as error:
        # Damaged bytes can upset any library; the shard's other samples are still to be read.
        checker.expect(False, "a sample of this schema", f"unexpected {type(error).__name__}: {error}")


# One sample


def check_entry(
    store: Store, entry: Entry, grid: tuple[int, int, int], spacing: tuple[float, float, float]
) -> ShardReport:
    """Read one sample by its offsets alone, as the loader does, and check it; nothing else of its shard is read."""
    report = ShardReport(entry.shard)
    checker = _Checker(report.remarks, entry.shard, entry.key)
    members = {}
    try:
        end = store.size(entry.shard)
        if not checker.expect(end is not None, "this shard, which the index names", "no such file"):
            return report
        for name, (offset, size) in entry.members.items():
            # Before anything of a size that a damaged index asks for is read.
            inside = min(offset, size) >= 0 and offset + size <= (end or 0)
            if not checker.expect(
                inside, f"{name} within the {end} bytes of the file", f"{size} bytes from {offset} on"
            ):
                return report
            members[name] = store.read_range(entry.shard, offset, size)
            report.bytes += len(members[name])
    except (OSError, ValueError) as error:
        checker.expect(False, "a file that can be read", f"{type(error).__name__}: {error}")
        return report
    _check_members(members, entry, grid, spacing, checker, report)
    return report


def check_sample(
    sample: Sample,
    entry: Entry,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    checker: _Checker,
) -> bool:
    """What must hold of a decoded sample: agreement with the index, HU, masks, geometry, report.

    Returns:
        Whether its affines and voxels are sound enough for figures.
    """
    meta = sample.meta
    for name in ("key", "split", "patient"):
        stated, held = getattr(entry, name), getattr(meta, name)
        checker.expect(held == stated, f"{name} {stated!r} as in the index", repr(held))
    checker.expect(meta.spacing == spacing, f"a spacing of {spacing} mm", meta.spacing)
    if not checker.expect(sample.ct.shape == grid, f"volumes of {grid} voxels", sample.ct.shape):
        return False
    usable = _check_affines(sample, checker)
    if usable and _check_geometry(sample, checker):
        _check_outside(sample, checker)
    _check_hu(sample, checker)
    _check_lesions(sample, checker)
    _check_regions(sample, checker)
    _check_report(meta, checker)
    return usable


def _check_affines(sample: Sample, checker: _Checker) -> bool:
    """Both affines and the native shape can be reckoned with."""
    geometry = sample.meta.geometry
    for name, rows in (("grid", geometry.grid_affine), ("native", geometry.native_affine)):
        good = [len(row) for row in rows] == [4] * 4 and bool(np.isfinite(rows).all()) and rows[3] == [0, 0, 0, 1]
        good = good and bool(abs(np.linalg.det(np.array(rows)[:3, :3])) > 1e-9)
        if not checker.expect(good, f"an invertible 4 × 4 {name} affine", rows):
            return False
    return checker.expect(min(geometry.native_shape) > 0, "a native shape of positive sides", geometry.native_shape)


def _check_geometry(sample: Sample, checker: _Checker) -> bool:
    """The grid's affine is canonical, and the grid lies on the native volume."""
    geometry, spacing = sample.meta.geometry, sample.meta.spacing
    grid_affine, native = np.array(geometry.grid_affine), np.array(geometry.native_affine)
    axes, straight = nib.aff2axcodes(grid_affine), np.count_nonzero(np.abs(grid_affine[:3, :3]) > 1e-6) == 3
    canonical = checker.expect(
        axes == ("S", "P", "L") and straight,
        "grid axes that run to superior, posterior and left",
        f"{axes}{'' if straight else ', oblique'} in {grid_affine.tolist()}",
    )
    sizes = nib.affines.voxel_sizes(grid_affine)
    checker.expect(
        bool(np.allclose(sizes, spacing, atol=1e-6)), f"a grid affine with a spacing of {spacing} mm", sizes.tolist()
    )
    try:
        require_overlap(grid_affine, sample.ct.shape, native, geometry.native_shape, "it")
    except UserError as error:
        return checker.expect(False, "a grid that lies on its native volume", f"that {error}")
    return canonical


def _check_outside(sample: Sample, checker: _Checker) -> None:
    """Beyond the native volume the CT is air: else the affines do not belong to these voxels."""
    corners = _box_on_grid(sample)
    low, high = np.floor(corners.min(axis=0)) - 1, np.ceil(corners.max(axis=0)) + 2
    begin, end = (np.clip(edge, 0, sample.ct.shape).astype(int) for edge in (low, high))
    for axis in range(3):
        planes = np.moveaxis(sample.ct, axis, 0)
        for outside in (planes[: begin[axis]], planes[end[axis] :]):
            top = outside.max(initial=AIR_HU)
            checker.expect(top == AIR_HU, f"{AIR_HU} HU outside the native volume", f"up to {top} HU on axis {axis}")


def _box_on_grid(sample: Sample) -> Affine:
    """Corners (8, 3) of the native volume's box, as grid indexes (z, y, x)."""
    geometry = sample.meta.geometry
    sides = [(-0.5, n - 0.5) for n in geometry.native_shape]
    corners = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3)
    to_grid = np.linalg.inv(np.array(geometry.grid_affine)) @ np.array(geometry.native_affine)
    return corners @ to_grid[:3, :3].T + to_grid[:3, 3]


def _check_hu(sample: Sample, checker: _Checker) -> None:
    low, high = int(sample.ct.min()), int(sample.ct.max())
    checker.expect(low >= HU_LOW and high <= HU_HIGH, f"HU from {HU_LOW} to {HU_HIGH}", f"{low} to {high}")
    # The grid may reach far beyond the file; that much air would drown the soft tissue.
    filled = sample.ct > AIR_HU
    if not checker.expect(bool(filled.any()), "a CT", f"{AIR_HU} HU throughout"):
        return
    spans = []
    for axis in range(3):
        used = np.flatnonzero(filled.any(axis=tuple(other for other in range(3) if other != axis)))
        spans.append(slice(used[0], used[-1] + 1))
    part = sample.ct[tuple(spans)]
    try:
        to_hu(Volume(part, np.array(sample.meta.geometry.grid_affine), "it"))
    except UserError as error:
        # A file that just passed may just fail when averaged to its grid; a wrong scale or offset leaves no trace.
        evidence = Evidence.of(part)
        judge = checker.note if min(evidence.air, evidence.soft) >= _TRACE else checker.expect
        judge(False, "plausible HU", f"that {error}")


def _check_lesions(sample: Sample, checker: _Checker) -> None:
    meta = sample.meta
    bits = int(np.bitwise_or.reduce(sample.lesions, axis=None))
    for lesion in LESIONS:
        if not bits >> lesion.bit & 1:
            continue
        looked = meta.lesions_annotated[lesion.key] or meta.lesions_partial[lesion.key]
        checker.expect(looked, f"no {lesion.name} outlined, since it was not annotated", "voxels that carry its bit")
        absent = meta.labels[lesion.finding] == 0
        checker.note(
            not absent, f"{lesion.finding!r} not labelled absent, since {lesion.name} is outlined", "the label 0"
        )
    assert set(meta.lesions_annotated) == set(LESION_BY_KEY)


def _check_regions(sample: Sample, checker: _Checker) -> None:
    regions, source = sample.regions, sample.meta.regions_source
    if source is None:
        count = np.count_nonzero(regions)
        checker.expect(count == 0, "no regions, since they have no source", f"{count} voxels with a region")
        return
    checker.note(bool(regions.any()), f"regions, since their source is {source!r}", "none on the grid")
    if source == COARSE:
        # Estimated from where things lie, so their place proves nothing.
        return
    for axis, words, lower, higher in _ORDER:
        means = [_mean_index(regions, names, axis) for names in (lower, higher)]
        if means[0] is not None and means[1] is not None:
            checker.expect(
                means[0] < means[1],
                f"the {' and '.join(lower)} {words} the {' and '.join(higher)}",
                f"mean indexes {means[0]:.1f} and {means[1]:.1f} on axis {axis}, as if the volume were flipped",
            )


def _mean_index(regions: NDArray[np.uint8], names: tuple[str, ...], axis: int) -> float | None:
    """Mean index of some regions along an axis; None when they are hardly there."""
    where = np.isin(regions, [REGION_BY_NAME[name].id for name in names])
    along = where.sum(axis=tuple(other for other in range(3) if other != axis))
    return float(np.average(np.arange(len(along)), weights=along)) if along.sum() >= _ENOUGH else None


def _check_report(meta: SampleMeta, checker: _Checker) -> None:
    for name in ("findings", "impression"):
        text = getattr(meta, name) or ""
        odd = sorted({letter for letter in text if unicodedata.category(letter) == "Cc" and letter not in "\n\t"})
        checker.expect(
            not odd, f"{name} without control characters", ", ".join(f"U+{ord(letter):04X}" for letter in odd)
        )
