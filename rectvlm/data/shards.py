"""Shards, both ways: samples to WebDataset tars with an index, and back, one sample at a time.

A shard is a plain WebDataset tar of one split; each sample is the four members of `sample`. `index.json` beside the
shards says where each member lies, so that any sample can be read without a scan, from a disk or from a URL;
`manifest.json` holds checksums, counts and provenance.
"""

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import webdataset
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from rectvlm.data.sample import (
    SAMPLE_MEMBERS,
    SAMPLE_SCHEMA,
    decode_sample,
    encode_sample,
    preprocessing_versions,
)
from rectvlm.data.shard_manifest import (
    SHARD_MANIFEST_FILE,
    LabelCounts,
    LabelTally,
    ManifestShard,
    ShardManifest,
    ShardProvenance,
    dump_manifest,
    find_lesion_bits,
    sum_counts,
)
from rectvlm.data.store import ShardStore
from rectvlm.types import Sample, SampleMeta, Split, UserError

SHARD_INDEX_FILE = "index.json"


@dataclass(frozen=True)
class SampleLocation:
    """Where one sample lies."""

    key: str
    split: Split
    patient: str
    shard: str
    """File name of the tar, in the index's folder."""
    members: dict[str, tuple[int, int]]
    """By member (`ct`, `lesions`, `regions`, `json`): offset and size in the tar, bytes."""


@dataclass(frozen=True)
class IndexedShard:
    """One tar of one split, as the index has it."""

    name: str
    samples: list[SampleLocation]


@dataclass(frozen=True)
class WrittenShard:
    """One tar as it was written: what the index and the manifest say of it."""

    facts: ManifestShard
    samples: list[SampleLocation]
    counts: LabelCounts


@dataclass(frozen=True)
class PackedSample:
    """A sample as bytes, with what is kept of it outside the tar."""

    meta: SampleMeta
    members: dict[str, bytes]
    lesion_bits: int
    """Lesion bits that occur in it."""


@dataclass(frozen=True)
class ShardIndex:
    """What a reader needs to find the samples of a folder; `index.json`."""

    grid: tuple[int, int, int]
    """Voxels (z, y, x)."""
    spacing: tuple[float, float, float]
    """Voxel size (z, y, x), mm."""
    shards: list[IndexedShard]
    schema: int = SAMPLE_SCHEMA
    manifest: str = ""
    """SHA-256 of `manifest.json`: no other file vouches for its bytes."""

    def select_split(self, split: Split | None) -> list[SampleLocation]:
        """The samples of a split (of both, train first, when None), in the order in which they were written."""
        wanted: tuple[Split, ...] = ("train", "valid") if split is None else (split,)
        return [
            entry
            for one in wanted
            for shard in self.shards
            for entry in shard.samples
            if entry.split == one
        ]


_INDEX_ADAPTER = TypeAdapter(ShardIndex)


# Writing


def pack_sample(sample: Sample) -> PackedSample:
    """A sample ready to be written.

    Raises:
        UserError: as `sample.encode`.
    """
    return PackedSample(sample.meta, encode_sample(sample), find_lesion_bits(sample.lesions))


def write_shard(
    samples: Iterable[Sample | PackedSample], folder: str | Path | ShardStore, name: str
) -> WrittenShard | None:
    """Write samples of one split to the file `name`, the same bytes for the same samples; None when there are none.

    Samples are taken one at a time, so a generator keeps memory at one of them.

    Raises:
        UserError: a key twice, or whatever `encode` refuses.
        OSError: the place cannot be written.
    """
    stream = (one if isinstance(one, PackedSample) else pack_sample(one) for one in samples)
    first = next(stream, None)
    if first is None:
        return None
    metas: list[SampleMeta] = []
    tally = LabelTally()
    with ShardStore(folder).open_for_writing(name) as file:
        with webdataset.TarWriter(
            file, user="rectvlm", group="rectvlm", encoder=False, mtime=0
        ) as tar:
            for packed in chain([first], stream):
                assert packed.meta.split == first.meta.split, "a shard holds one split"
                if any(meta.key == packed.meta.key for meta in metas):
                    raise UserError(
                        f"Two cases have the key {packed.meta.key}: keys must be unique, rename one."
                    )
                tar.write({"__key__": packed.meta.key, **packed.members})
                metas.append(packed.meta)
                tally.add_sample(packed.meta, packed.lesion_bits)
        file.flush()
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as written:
            places = {member.name: (member.offset_data, member.size) for member in written}
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    entries = [
        SampleLocation(
            m.key,
            m.split,
            m.patient,
            name,
            {member: places[f"{m.key}.{member}"] for member in SAMPLE_MEMBERS},
        )
        for m in metas
    ]
    return WrittenShard(
        ManifestShard(name, first.meta.split, len(metas), size, digest), entries, tally.as_counts()
    )


def dump_index(index: ShardIndex) -> bytes:
    """The bytes of `index.json`."""
    return _INDEX_ADAPTER.dump_json(index) + b"\n"


def write_index(
    folder: str | Path | ShardStore,
    shards: Sequence[WrittenShard],
    *,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    provenance: ShardProvenance | None = None,
) -> ShardIndex:
    """Write `manifest.json` and then `index.json` for finished shards, and remove tars that they do not name.

    Args:
        grid: voxels (z, y, x) of every sample.
        spacing: mm (z, y, x) of every sample.
        provenance: for the manifest.

    Raises:
        UserError: a key in two shards, or a patient in both splits.
    """
    splits: dict[str, Split] = {}
    keys: set[str] = set()
    for entry in (entry for shard in shards for entry in shard.samples):
        if entry.key in keys:
            raise UserError(f"Two cases have the key {entry.key}: keys must be unique, rename one.")
        keys.add(entry.key)
        if splits.setdefault(entry.patient, entry.split) != entry.split:
            raise UserError(
                f"Patient {entry.patient} is in train and in valid: put all cases of a patient in one."
            )
    facts = [shard.facts for shard in shards]
    counts = {
        split: sum_counts([shard.counts for shard in shards if shard.facts.split == split])
        for split in ("train", "valid")
    }
    store = ShardStore(folder)
    manifest = dump_manifest(
        ShardManifest(facts, counts, preprocessing_versions(), provenance or ShardProvenance())
    )
    store.write_file(SHARD_MANIFEST_FILE, manifest)
    listed = [IndexedShard(shard.facts.name, shard.samples) for shard in shards]
    index = ShardIndex(grid, spacing, listed, manifest=hashlib.sha256(manifest).hexdigest())
    store.write_file(SHARD_INDEX_FILE, dump_index(index))
    named = {one.name for one in facts}
    for name in store.list_names():
        if name.endswith(".tar") and name not in named:
            store.remove_file(name)
    return index


def write_shards(
    samples: Iterable[Sample], folder: str | Path | ShardStore, samples_per_shard: int = 16
) -> ShardIndex:
    """Write samples to `train-000000.tar`, `valid-000000.tar`, … and `index.json`; samples of a split keep their order.

    The old index goes first and the new one comes last, so a folder with an index is complete.

    Raises:
        UserError: no sample, two grids or spacings, or whatever `write_shard` and `write_index` refuse.
    """
    store = ShardStore(folder)
    store.remove_file(SHARD_INDEX_FILE)
    shards: list[WrittenShard] = []
    numbers: Counter[str] = Counter()
    grids: dict[tuple[Any, Any], str] = {}

    def flush(waiting: list[Sample], split: Split) -> None:
        shard = write_shard(waiting, store, f"{split}-{numbers[split]:06d}.tar")
        if shard is not None:
            shards.append(shard)
            numbers[split] += 1

    waiting: dict[Split, list[Sample]] = {"train": [], "valid": []}
    for sample in samples:
        grids.setdefault((sample.ct.shape, sample.meta.spacing), sample.meta.key)
        if len(grids) > 1:
            raise UserError(
                f"All samples must have one grid and spacing, found (grid, spacing) by key: {grids}."
            )
        split = sample.meta.split
        waiting[split].append(sample)
        if len(waiting[split]) == samples_per_shard:
            flush(waiting[split], split)
            waiting[split] = []
    for split, rest in waiting.items():
        flush(rest, split)
    if not shards:
        raise UserError(f"No sample to write to {store}: give at least one case that can be used.")
    (grid, spacing) = next(iter(grids))
    return write_index(
        store, sorted(shards, key=lambda shard: shard.facts.name), grid=grid, spacing=spacing
    )


# Reading


def read_index(folder: str | Path | ShardStore) -> ShardIndex:
    """The index of a folder (or URL) of shards.

    Raises:
        UserError: no folder, no index, or an index of another schema.
    """
    store = ShardStore(folder)
    try:
        data = store.read_file(SHARD_INDEX_FILE)
    except FileNotFoundError:
        raise UserError(
            f"No shards in {store} (expected {SHARD_INDEX_FILE}): run `make preprocess`, or set data.shards to their folder."
        ) from None
    except OSError as error:
        raise UserError(
            f"{store / SHARD_INDEX_FILE} cannot be read ({error}): check the place and the access to it."
        ) from None
    try:
        return _INDEX_ADAPTER.validate_json(data)
    except ValidationError as error:
        fault = error.errors()[0]
        folder = ".".join(map(str, fault["loc"])) or "top level"
        raise UserError(
            f"{store / SHARD_INDEX_FILE} is damaged at {folder}: {fault['msg']}; run `make preprocess` again."
        ) from None


def read_sample(
    folder: str | Path | ShardStore,
    location: SampleLocation,
    into: Mapping[str, NDArray[Any]] | None = None,
) -> Sample:
    """One sample, by its offsets and in one read.

    Args:
        place: folder or URL of the shards.
        entry: which.
        into: arrays by member that receive the volumes; see `decode`.

    Raises:
        UserError: the shard is missing, cut short or damaged.
    """
    store = ShardStore(folder)
    path = store / location.shard
    start = min(offset for offset, _ in location.members.values())
    end = max(offset + size for offset, size in location.members.values())
    try:
        data = store.read_range(location.shard, start, end - start)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"Shard {path} cannot be read ({reason}): copy it again or run `make preprocess`."
        ) from None
    if len(data) != end - start:
        raise UserError(
            f"Shard {path} is cut short: sample {location.key} should end at byte {end}, the file ends at "
            f"{start + len(data)}; run `make preprocess` again or copy it again."
        )
    view = memoryview(data)
    members = {
        name: view[offset - start : offset - start + size]
        for name, (offset, size) in location.members.items()
    }
    sample = decode_sample(members, f"Shard {path}, sample {location.key}", into)
    if sample.meta.key != location.key:
        raise UserError(
            f"Shard {path} and its index disagree: {location.key} expected, {sample.meta.key} found."
        )
    return sample
