"""Checks of one shard against its bytes, the index and the manifest."""

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys

from data_pipeline.verify.issues import IssueRecorder, VerificationIssues
from data_pipeline.verify.sample_checks import check_sample
from data_pipeline.verify.statistics import SampleSummary, add_histogram, count_hu
from rectvlm.data.sample import SAMPLE_MEMBERS, decode_sample
from rectvlm.data.shard_manifest import ManifestShard
from rectvlm.data.shards import IndexedShard, SampleLocation
from rectvlm.data.store import ShardStore
from rectvlm.types import UserError

_READ_BLOCK_BYTES = 8 << 20
_MAX_LISTED_NAMES = 8
"""Number of samples that one issue names."""


@dataclass(frozen=True)
class ShardGrid:
    """The grid that all samples of a folder share, by its index."""

    size: tuple[int, int, int]
    """Voxels (z, y, x)."""
    spacing_mm: tuple[float, float, float]
    """Spacing (z, y, x), mm."""


@dataclass
class ShardCheckResult:
    """What reading one shard gave. It is small enough to send between processes."""

    shard_name: str
    issues: VerificationIssues = field(default_factory=VerificationIssues)
    sample_summaries: list[SampleSummary] = field(default_factory=list)
    """Summaries of the samples that could be decoded and have sound affines."""
    hu_histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Voxels at each HU by split, as `statistics.count_hu` gives them."""
    bytes_read: int = 0
    """Number of bytes read from the store."""


def check_shard(
    store: ShardStore,
    shard: IndexedShard,
    manifest_shard: ManifestShard | None,
    grid: ShardGrid,
) -> ShardCheckResult:
    """Read a whole shard once, in order, and check it and each of its samples.

    Args:
        store: folder of the shards.
        shard: its record in the index.
        manifest_shard: its record in the manifest; None when there is no manifest.
        grid: of the index.
    """
    result = ShardCheckResult(shard.name)
    recorder = IssueRecorder(result.issues, shard.name)
    try:
        size = store.file_size(shard.name)
        if size is None:
            recorder.record_fault("this shard, which the index names", "no such file")
            return result
        if manifest_shard is not None:
            expected_size = manifest_shard.bytes
            recorder.expect_or_fault(
                size == expected_size, f"{expected_size} bytes", f"{size} bytes"
            )
        stream = _HashingReader(store, shard.name, size)
        reader = io.BufferedReader(stream, _READ_BLOCK_BYTES)
        _check_tar(reader, size, shard, grid, result)
        while reader.read(_READ_BLOCK_BYTES):
            """Read to the end, for the checksum."""
    except OSError as error:
        recorder.record_fault("a file that can be read", f"{type(error).__name__}: {error}")
        return result
    result.bytes_read = stream.position
    if manifest_shard is not None:
        sha256 = stream.checksum.hexdigest()
        recorder.expect_or_fault(
            sha256 == manifest_shard.sha256, f"SHA-256 {manifest_shard.sha256}", sha256
        )
    return result


class _HashingReader(io.RawIOBase):
    """A stored file of a known size, read from its start to its end with a running checksum."""

    def __init__(self, store: ShardStore, name: str, size: int) -> None:
        self.store = store
        self.name = name
        self.size = size
        self.position = 0
        self.checksum = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A server answers a range beyond the end with an error.
        count = min(len(buffer), self.size - self.position)
        data = self.store.read_range(self.name, self.position, count) if count > 0 else b""
        buffer[: len(data)] = data
        self.position += len(data)
        self.checksum.update(data)
        return len(data)


def _check_tar(
    reader: BinaryIO, size: int, shard: IndexedShard, grid: ShardGrid, result: ShardCheckResult
) -> None:
    """Walk the tar as WebDataset does; compare its samples and their offsets with the index."""
    recorder = IssueRecorder(result.issues, shard.name)
    locations = {location.key: location for location in shard.samples}
    offsets: dict[str, tuple[int, int]] = {}
    keys: list[str] = []
    try:
        for record in group_by_keys(_iterate_tar_members(reader, size, offsets, recorder)):
            key = record["__key__"]
            keys.append(key)
            members = {name: data for name, data in record.items() if not name.startswith("__")}
            member_offsets = {
                name: offsets.pop(f"{key}.{name}") for name in members if f"{key}.{name}" in offsets
            }
            if key in locations:
                _check_members(members, member_offsets, locations[key], grid, result)
    except ValueError as error:  # from `group_by_keys`: a file twice in a sample
        _record_bad_tar(recorder, error)
    _check_keys(keys, [location.key for location in shard.samples], recorder)


def _check_members(
    members: dict[str, bytes],
    member_offsets: dict[str, tuple[int, int]],
    location: SampleLocation,
    grid: ShardGrid,
    result: ShardCheckResult,
) -> None:
    """Check the members of one sample and their offsets, then the sample that they hold."""
    recorder = IssueRecorder(result.issues, result.shard_name, location.key)
    is_complete = set(members) == set(SAMPLE_MEMBERS)
    if not recorder.expect_or_fault(
        is_complete, f"the members {', '.join(SAMPLE_MEMBERS)}", ", ".join(members)
    ):
        return
    recorder.expect_or_fault(
        member_offsets == location.members,
        f"members at (offset, size) {dict(sorted(location.members.items()))} as in the index",
        dict(sorted(member_offsets.items())),
    )
    _check_decoded_sample(members, location, grid, recorder, result)


def _check_keys(keys: list[str], indexed_keys: list[str], recorder: IssueRecorder) -> None:
    """Check the keys of a tar's samples and their order against the index."""
    unknown = [key for key in keys if key not in set(indexed_keys)]
    if unknown:
        recorder.record_fault(
            "only samples that the index names",
            f"{_abbreviate_names(unknown)}, which it does not",
        )
    distinct_keys = list(dict.fromkeys(indexed_keys))
    missing = [key for key in distinct_keys if key not in keys]
    if missing:
        recorder.record_fault(
            f"{len(distinct_keys)} samples that the index names",
            f"{_abbreviate_names(missing)} not, or not whole",
        )
    if not unknown and not missing and keys != indexed_keys:
        recorder.record_fault(
            f"samples in the index's order {_abbreviate_names(indexed_keys)}",
            _abbreviate_names(keys),
        )


def _record_bad_tar(recorder: IssueRecorder, error: Exception) -> None:
    reason = error.args[0] if error.args else ""
    recorder.record_fault("a plain WebDataset tar", f"{type(error).__name__}: {reason}")


def _abbreviate_names(names: Sequence[str]) -> str:
    """The first names of a list, and the number of the rest."""
    text = ", ".join(names[:_MAX_LISTED_NAMES])
    rest = len(names) - _MAX_LISTED_NAMES
    return f"{text} and {rest:,} more" if rest > 0 else text


def _iterate_tar_members(
    reader: BinaryIO, size: int, offsets: dict[str, tuple[int, int]], recorder: IssueRecorder
) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar as WebDataset's own reader does, up to where it is damaged.

    Args:
        reader: of the tar.
        size: of the tar, bytes.
        offsets: receives offset and size of each file by its name.
        recorder: receives the faults.
    """
    try:
        with tarfile.open(fileobj=reader, mode="r|", bufsize=1 << 20) as tar:
            for member in tar:
                if not recorder.expect_or_fault(
                    member.isreg(), "regular files only", f"{member.name!r} of another type"
                ):
                    continue
                end = member.offset_data + member.size
                if end > size:
                    raise tarfile.ReadError(f"{member.name!r} would end at byte {end}")
                content = tar.extractfile(member)
                assert content is not None
                offsets[member.name] = (member.offset_data, member.size)
                yield {
                    "fname": member.name,
                    "data": content.read(),
                    "__url__": recorder.file_name,
                }
                # tarfile keeps every header it has seen.
                tar.members = []  # type: ignore[attr-defined]
    except (tarfile.TarError, ValueError, EOFError) as error:
        # The samples before are still whole.
        _record_bad_tar(recorder, error)


def _check_decoded_sample(
    members: dict[str, bytes],
    location: SampleLocation,
    grid: ShardGrid,
    recorder: IssueRecorder,
    result: ShardCheckResult,
) -> None:
    try:
        sample = decode_sample(members, where="it")
        if check_sample(sample, location, grid.size, grid.spacing_mm, recorder):
            summary = SampleSummary.from_sample(sample, recorder.file_name)
            result.sample_summaries.append(summary)
            add_histogram(result.hu_histograms, sample.meta.split, count_hu(sample.ct))
    except UserError as error:
        recorder.record_fault("a sample of this schema", f"that {error}")
    except Exception as error:
        # Damaged bytes can upset any library; the shard's other samples are still to be read.
        recorder.record_fault(
            "a sample of this schema", f"unexpected {type(error).__name__}: {error}"
        )


def check_sample_by_offsets(
    store: ShardStore, location: SampleLocation, grid: ShardGrid
) -> ShardCheckResult:
    """Read one sample by its offsets alone, as the loader does, and check it."""
    result = ShardCheckResult(location.shard)
    recorder = IssueRecorder(result.issues, location.shard, location.key)
    members = {}
    try:
        file_size = store.file_size(location.shard)
        if file_size is None:
            recorder.record_fault("this shard, which the index names", "no such file")
            return result
        for name, (offset, size) in location.members.items():
            # Checked before the read: a damaged index may ask for any size.
            is_inside = min(offset, size) >= 0 and offset + size <= file_size
            if not recorder.expect_or_fault(
                is_inside,
                f"{name} within the {file_size} bytes of the file",
                f"{size} bytes from {offset} on",
            ):
                return result
            members[name] = store.read_range(location.shard, offset, size)
            result.bytes_read += len(members[name])
    except (OSError, ValueError) as error:
        recorder.record_fault("a file that can be read", f"{type(error).__name__}: {error}")
        return result
    _check_decoded_sample(members, location, grid, recorder, result)
    return result
