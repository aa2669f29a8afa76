"""What must hold of one shard, checked against its bytes; of each sample in it, see `sample_checks`."""

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys

from data_pipeline.verify.sample_checks import IssueRecorder, VerificationIssues, check_sample
from data_pipeline.verify.statistics import SampleSummary, count_hu
from rectvlm.data.sample import SAMPLE_MEMBERS, decode_sample
from rectvlm.data.shard_manifest import ManifestShard
from rectvlm.data.shards import IndexedShard, SampleLocation
from rectvlm.data.store import ShardStore
from rectvlm.types import UserError

_READ_BLOCK_BYTES = 8 << 20
_MAX_LISTED_NAMES = 8
"""Samples that one remark names."""


@dataclass
class ShardCheckResult:
    """What reading one shard gave; small enough to send between processes."""

    shard_name: str
    issues: VerificationIssues = field(default_factory=VerificationIssues)
    sample_summaries: list[SampleSummary] = field(default_factory=list)
    """Of every sample that could be decoded and has sound affines."""
    hu_histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """By split: voxels at each HU, as `stats.hu_counts`."""
    bytes_read: int = 0
    """Read from the store."""


# One shard


def check_shard(
    store: ShardStore,
    shard: IndexedShard,
    facts: ManifestShard | None,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
) -> ShardCheckResult:
    """Read a whole shard once, in order, and check it and each of its samples.

    Args:
        shard: what the index says of it.
        facts: what the manifest says of it; None when there is no manifest.
        grid: voxels (z, y, x) of the index.
        spacing: mm (z, y, x) of the index.
    """
    report = ShardCheckResult(shard.name)
    checker = IssueRecorder(report.issues, shard.name)
    try:
        size = store.file_size(shard.name)
        if not checker.expect_or_fault(
            size is not None, "this shard, which the index names", "no such file"
        ):
            return report
        if facts is not None:
            checker.expect_or_fault(size == facts.bytes, f"{facts.bytes} bytes", f"{size} bytes")
        stream = _HashingReader(store, shard.name, size or 0)
        reader = io.BufferedReader(stream, _READ_BLOCK_BYTES)
        _check_tar(reader, size or 0, shard, grid, spacing, report)
        while reader.read(_READ_BLOCK_BYTES):
            """To the end, for the digest."""
    except OSError as error:
        checker.expect_or_fault(
            False, "a file that can be read", f"{type(error).__name__}: {error}"
        )
        return report
    report.bytes_read = stream.position
    if facts is not None:
        digest = stream.digest.hexdigest()
        checker.expect_or_fault(digest == facts.sha256, f"SHA-256 {facts.sha256}", digest)
    return report


class _HashingReader(io.RawIOBase):
    """A stored file of a known size read from its start to its end, digested on the way."""

    def __init__(self, store: ShardStore, name: str, size: int) -> None:
        self.store, self.name, self.size, self.position, self.digest = (
            store,
            name,
            size,
            0,
            hashlib.sha256(),
        )

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
    shard: IndexedShard,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    report: ShardCheckResult,
) -> None:
    """Walk the tar as WebDataset does and compare its samples and their places with the index."""
    checker = IssueRecorder(report.issues, shard.name)
    entries = {entry.key: entry for entry in shard.samples}
    places: dict[str, tuple[int, int]] = {}
    order: list[str] = []
    unknown: list[str] = []
    try:
        for record in group_by_keys(_iterate_tar_members(reader, size, places, checker)):
            key = record["__key__"]
            order.append(key)
            one = IssueRecorder(report.issues, shard.name, key)
            members = {name: data for name, data in record.items() if not name.startswith("__")}
            found = {
                name: places.pop(f"{key}.{name}") for name in members if f"{key}.{name}" in places
            }
            if key not in entries:
                unknown.append(key)
                continue
            complete = set(members) == set(SAMPLE_MEMBERS)
            if not one.expect_or_fault(
                complete, f"the members {', '.join(SAMPLE_MEMBERS)}", ", ".join(members)
            ):
                continue
            wanted = entries[key].members
            one.expect_or_fault(
                found == wanted,
                f"members at (offset, size) {_sort_members(wanted)} as in the index",
                _sort_members(found),
            )
            _check_decoded_sample(members, entries[key], grid, spacing, one, report)
    except ValueError as error:  # from `group_by_keys`: a file twice in a sample
        _record_bad_tar(checker, error)
    checker.expect_or_fault(
        not unknown,
        "only samples that the index names",
        f"{_abbreviate_names(unknown)}, which it does not",
    )
    missing = [key for key in entries if key not in order]
    checker.expect_or_fault(
        not missing,
        f"{len(entries)} samples that the index names",
        f"{_abbreviate_names(missing)} not, or not whole",
    )
    wanted_order = [entry.key for entry in shard.samples]
    if set(order) == set(wanted_order):
        checker.expect_or_fault(
            order == wanted_order,
            f"samples in the index's order {_abbreviate_names(wanted_order)}",
            _abbreviate_names(order),
        )


def _record_bad_tar(checker: IssueRecorder, error: Exception) -> None:
    found = f"{type(error).__name__}: {error.args[0] if error.args else ''}"
    checker.expect_or_fault(False, "a plain WebDataset tar", found)


def _abbreviate_names(names: Sequence[str]) -> str:
    """A few names in words, however many there are."""
    more = len(names) - _MAX_LISTED_NAMES
    return ", ".join(names[:_MAX_LISTED_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _sort_members(members: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return dict(sorted(members.items()))


def _iterate_tar_members(
    reader: BinaryIO, size: int, places: dict[str, tuple[int, int]], checker: IssueRecorder
) -> Iterator[dict[str, Any]]:
    """The files of a tar as WebDataset's own reader yields them, up to where it is damaged; `places` gets offset and
    size of each."""
    try:
        with tarfile.open(fileobj=reader, mode="r|", bufsize=1 << 20) as tar:
            for member in tar:
                if not checker.expect_or_fault(
                    member.isreg(), "regular files only", f"{member.name!r} of another type"
                ):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(
                        f"{member.name!r} would end at byte {member.offset_data + member.size}"
                    )
                stored = tar.extractfile(member)
                assert stored is not None
                places[member.name] = (member.offset_data, member.size)
                yield {"fname": member.name, "data": stored.read(), "__url__": checker.shard}
                # tarfile keeps every header it has seen.
                tar.members = []  # type: ignore[attr-defined]
    except (tarfile.TarError, ValueError, EOFError) as error:
        # The samples before are still whole.
        _record_bad_tar(checker, error)


def _check_decoded_sample(
    members: dict[str, bytes],
    entry: SampleLocation,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    checker: IssueRecorder,
    report: ShardCheckResult,
) -> None:
    try:
        sample = decode_sample(members, where="it")
        if check_sample(sample, entry, grid, spacing, checker):
            report.sample_summaries.append(SampleSummary.from_sample(sample, checker.shard))
            counts = count_hu(sample.ct)
            report.hu_histograms[sample.meta.split] = (
                report.hu_histograms.get(sample.meta.split, np.zeros_like(counts)) + counts
            )
    except UserError as error:
        checker.expect_or_fault(False, "a sample of this schema", f"that {error}")
    except Exception as error:
        # Damaged bytes can upset any library; the shard's other samples are still to be read.
        checker.expect_or_fault(
            False, "a sample of this schema", f"unexpected {type(error).__name__}: {error}"
        )


def check_sample_by_offsets(
    store: ShardStore,
    sample_entry: SampleLocation,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
) -> ShardCheckResult:
    """Read one sample by its offsets alone, as the loader does, and check it; nothing else of its shard is read."""
    report = ShardCheckResult(sample_entry.shard)
    checker = IssueRecorder(report.issues, sample_entry.shard, sample_entry.key)
    members = {}
    try:
        end = store.file_size(sample_entry.shard)
        if not checker.expect_or_fault(
            end is not None, "this shard, which the index names", "no such file"
        ):
            return report
        for name, (offset, size) in sample_entry.members.items():
            # Before anything of a size that a damaged index asks for is read.
            inside = min(offset, size) >= 0 and offset + size <= (end or 0)
            if not checker.expect_or_fault(
                inside,
                f"{name} within the {end} bytes of the file",
                f"{size} bytes from {offset} on",
            ):
                return report
            members[name] = store.read_range(sample_entry.shard, offset, size)
            report.bytes_read += len(members[name])
    except (OSError, ValueError) as error:
        checker.expect_or_fault(
            False, "a file that can be read", f"{type(error).__name__}: {error}"
        )
        return report
    _check_decoded_sample(members, sample_entry, grid, spacing, checker, report)
    return report
