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

from data_pipeline.sample_checks import Checker, Remarks, check_sample
from data_pipeline.stats import Facts, hu_counts
from rectvlm.data.manifest import ShardFacts
from rectvlm.data.sample import MEMBERS, decode
from rectvlm.data.shards import Entry, Shard
from rectvlm.data.store import Store
from rectvlm.types import UserError

_BLOCK = 8 << 20
_NAMED = 8
"""Samples that one remark names."""


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
    checker = Checker(report.remarks, shard.name)
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
    checker = Checker(report.remarks, shard.name)
    entries = {entry.key: entry for entry in shard.samples}
    places: dict[str, tuple[int, int]] = {}
    order: list[str] = []
    unknown: list[str] = []
    try:
        for record in group_by_keys(_members(reader, size, places, checker)):
            key = record["__key__"]
            order.append(key)
            one = Checker(report.remarks, shard.name, key)
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


def _not_a_tar(checker: Checker, error: Exception) -> None:
    found = f"{type(error).__name__}: {error.args[0] if error.args else ''}"
    checker.expect(False, "a plain WebDataset tar", found)


def _some(names: Sequence[str]) -> str:
    """A few names in words, however many there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _places(members: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return dict(sorted(members.items()))


def _members(
    reader: BinaryIO, size: int, places: dict[str, tuple[int, int]], checker: Checker
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
    checker: Checker,
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


def check_entry(
    store: Store, entry: Entry, grid: tuple[int, int, int], spacing: tuple[float, float, float]
) -> ShardReport:
    """Read one sample by its offsets alone, as the loader does, and check it; nothing else of its shard is read."""
    report = ShardReport(entry.shard)
    checker = Checker(report.remarks, entry.shard, entry.key)
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
