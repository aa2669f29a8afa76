"""Shards: samples written to WebDataset tars with an index, and read back one by one.

A shard is a plain WebDataset tar of one split, with four members for each sample (see `sample`).
`index.json` beside the shards holds the offsets of all members, so that any sample can be read
without a scan, from a disk or from a URL. `manifest.json` holds checksums, counts and provenance.
"""

import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from rectvlm.data.sample import (
    SAMPLE_MEMBERS,
    decode_sample,
    encode_sample,
    parse_meta,
    preprocessing_versions,
)
from rectvlm.data.shard_manifest import (
    SHARD_MANIFEST_FILE,
    LabelCounts,
    ManifestShard,
    ShardManifest,
    ShardProvenance,
    add_sample_counts,
    dump_manifest,
    sum_counts,
)
from rectvlm.data.store import ShardStore
from rectvlm.labels import Lesion
from rectvlm.lesion_bits import present_lesions
from rectvlm.types import (
    SAMPLE_SCHEMA,
    SPLITS,
    Sample,
    SampleMeta,
    Split,
    UserError,
    first_invalid_field,
)

SHARD_INDEX_FILE = "index.json"
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{6}}\.tar")
"""Names of shards."""


@dataclass(frozen=True)
class SampleLocation:
    """Position of one sample in the shards; its fields are keys of `index.json`."""

    key: str
    """Key of the sample."""
    split: Split
    """Split of the sample."""
    patient: str
    """Id of the patient."""
    shard: str
    """File name of the tar in the index's folder."""
    members: dict[str, tuple[int, int]]
    """Offset and size in the tar, bytes, of `ct`, `lesions`, `regions` and `json`."""
    outlined: tuple[str, ...] = ()
    """Keys of the lesions that at least one voxel carries."""

    @property
    def text_bytes(self) -> int:
        """Size of the metadata, bytes: of the report, the indication and the technique, and of
        entries that differ little from sample to sample."""
        return self.members["json"][1]


@dataclass(frozen=True)
class IndexedShard:
    """One tar in the index; its fields are keys of `index.json`."""

    name: str
    """File name of the tar."""
    samples: list[SampleLocation]
    """Samples of the tar, in its order."""


@dataclass(frozen=True)
class WrittenShard:
    """One tar that has been written, with its entries for the manifest and the index."""

    facts: ManifestShard
    """Size and checksum of the tar."""
    samples: list[SampleLocation]
    """Samples of the tar, in its order."""
    counts: LabelCounts
    """Counts of findings and lesions in the tar."""


@dataclass(frozen=True)
class PackedSample:
    """A sample as the bytes that a shard stores."""

    meta: SampleMeta
    """Metadata of the sample."""
    members: dict[str, bytes]
    """Bytes of the four members, by name."""
    lesions: tuple[Lesion, ...]
    """Lesions that at least one voxel carries."""


@dataclass(frozen=True)
class ShardIndex:
    """Positions of all samples of a folder; `index.json`, whose keys are these field names."""

    grid: tuple[int, int, int]
    """Voxels (z, y, x)."""
    spacing: tuple[float, float, float]
    """Voxel size (z, y, x), mm."""
    shards: list[IndexedShard]
    """Tars of the folder."""
    schema: int = SAMPLE_SCHEMA
    """Version of this schema."""
    manifest: str = ""
    """SHA-256 of `manifest.json`, which no other file vouches for."""

    def select_split(self, split: Split | None) -> list[SampleLocation]:
        """Samples of a split, as they were written; of all splits, train first, for None."""
        if split is None:
            return list(chain.from_iterable(self.select_split(split) for split in SPLITS))
        locations = chain.from_iterable(shard.samples for shard in self.shards)
        return [location for location in locations if location.split == split]

    @property
    def selection_split(self) -> Split:
        """Split that chooses checkpoints: dev, or valid where there is no dev."""
        return "dev" if self.select_split("dev") else "valid"

    @property
    def threshold_split(self) -> Split:
        """Split that thresholds are fitted on: dev, or train where there is no dev."""
        return "dev" if self.select_split("dev") else "train"


_INDEX_ADAPTER = TypeAdapter(ShardIndex)


# Writing


def pack_sample(sample: Sample) -> PackedSample:
    """Make the bytes of a sample.

    Raises:
        UserError: as `encode_sample`.
    """
    return PackedSample(sample.meta, encode_sample(sample), present_lesions(sample.lesions))


def write_shard(
    samples: Iterable[Sample | PackedSample], folder: str | Path | ShardStore, name: str
) -> WrittenShard | None:
    """Write samples of one split to the file `name`; None, and no file, when there are none.

    The same samples make the same bytes. Samples are taken one at a time, so a generator keeps one
    of them in memory.

    Raises:
        UserError: two samples have one key, or a sample is refused by `encode_sample`.
        OSError: the folder cannot be written to.
    """
    import webdataset  # takes seconds, as it imports torch

    stream = _pack_samples(samples)
    first = next(stream, None)
    if first is None:
        return None
    metas: dict[str, SampleMeta] = {}
    outlined: dict[str, tuple[str, ...]] = {}
    counts = sum_counts([])
    with ShardStore(folder).open_for_writing(name) as file:
        with webdataset.TarWriter(
            file, user="rectvlm", group="rectvlm", encoder=False, mtime=0
        ) as tar:
            for packed in chain([first], stream):
                assert packed.meta.split == first.meta.split, "a shard holds one split"
                key = packed.meta.key
                if key in metas:
                    raise UserError(
                        f"Two cases have the key {key}: keys must be unique, rename one."
                    )
                tar.write({"__key__": key, **packed.members})
                metas[key] = packed.meta
                outlined[key] = tuple(lesion.key for lesion in packed.lesions)
                add_sample_counts(counts, packed.meta, packed.lesions)

        file.flush()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        size = file.seek(0, os.SEEK_END)
        positions = _read_member_positions(file)

    locations = []
    for key, meta in metas.items():
        members = {member: positions[f"{key}.{member}"] for member in SAMPLE_MEMBERS}
        locations.append(
            SampleLocation(key, meta.split, meta.patient, name, members, outlined[key])
        )
    entry = ManifestShard(name, first.meta.split, len(metas), size, digest)
    return WrittenShard(entry, locations, counts)


def _read_member_positions(file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """Offset and size of each member of an open tar, by name."""
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def _pack_samples(samples: Iterable[Sample | PackedSample]) -> Iterator[PackedSample]:
    for sample in samples:
        yield sample if isinstance(sample, PackedSample) else pack_sample(sample)


def dump_index(index: ShardIndex) -> bytes:
    """Make the bytes of `index.json`."""
    return _INDEX_ADAPTER.dump_json(index) + b"\n"


def write_index(
    folder: str | Path | ShardStore,
    shards: Sequence[WrittenShard],
    *,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    provenance: ShardProvenance | None = None,
) -> ShardIndex:
    """Write `manifest.json`, then `index.json`, of finished shards, and remove all other tars.

    Args:
        folder: folder or URL of the shards.
        shards: shards that make up the folder.
        grid: voxels (z, y, x) of every sample.
        spacing: voxel size (z, y, x) of every sample, mm.
        provenance: origin of the samples, for the manifest.

    Raises:
        UserError: a key is in two shards, or a patient in two splits.
    """
    _require_disjoint_splits(shards)
    counts: dict[str, LabelCounts] = {}
    for split in SPLITS:
        counts[split] = sum_counts([shard.counts for shard in shards if shard.facts.split == split])
    manifest = dump_manifest(
        ShardManifest(
            [shard.facts for shard in shards],
            counts,
            preprocessing_versions(),
            provenance or ShardProvenance(),
        )
    )
    store = ShardStore(folder)
    store.write_file(SHARD_MANIFEST_FILE, manifest)

    indexed = [IndexedShard(shard.facts.name, shard.samples) for shard in shards]
    index = ShardIndex(grid, spacing, indexed, manifest=hashlib.sha256(manifest).hexdigest())
    store.write_file(SHARD_INDEX_FILE, dump_index(index))

    indexed_names = {shard.name for shard in indexed}
    for name in store.list_names():
        if SHARD_NAME.fullmatch(name) and name not in indexed_names:
            store.remove_file(name)
    return index


def _require_disjoint_splits(shards: Sequence[WrittenShard]) -> None:
    splits: dict[str, Split] = {}
    keys: set[str] = set()
    for location in chain.from_iterable(shard.samples for shard in shards):
        key, patient = location.key, location.patient
        if key in keys:
            raise UserError(f"Two cases have the key {key}: keys must be unique, rename one.")
        keys.add(key)
        first_split = splits.setdefault(patient, location.split)
        if first_split != location.split:
            raise UserError(
                f"Patient {patient} is in {first_split} and in {location.split}: put all cases of "
                "a patient in one."
            )


def write_shards(
    samples: Iterable[Sample], folder: str | Path | ShardStore, samples_per_shard: int = 16
) -> ShardIndex:
    """Write samples to `train-000000.tar`, `dev-000000.tar`, … and `index.json`.

    Samples of a split keep their order. The old index goes first and the new one comes last, so a
    folder with an index is complete.

    Raises:
        UserError: there is no sample, samples differ in grid or spacing, or `write_shard` or
            `write_index` refuses them.
    """
    store = ShardStore(folder)
    store.remove_file(SHARD_INDEX_FILE)
    shards: list[WrittenShard] = []
    numbers: Counter[str] = Counter()
    grids: dict[tuple[Any, Any], str] = {}

    waiting: dict[Split, list[Sample]] = {split: [] for split in SPLITS}

    def flush_split(split: Split) -> None:
        shard = write_shard(waiting[split], store, f"{split}-{numbers[split]:06d}.tar")
        waiting[split] = []
        if shard is not None:
            shards.append(shard)
            numbers[split] += 1

    for sample in samples:
        grids.setdefault((sample.ct.shape, sample.meta.spacing), sample.meta.key)
        if len(grids) > 1:
            raise UserError(
                "All samples must have one grid and spacing, found (grid, spacing) by key: "
                f"{grids}."
            )
        split = sample.meta.split
        waiting[split].append(sample)
        if len(waiting[split]) == samples_per_shard:
            flush_split(split)
    for split in waiting:
        flush_split(split)
    if not shards:
        raise UserError(f"No sample to write to {store}: give at least one case that can be used.")
    shards.sort(key=lambda shard: shard.facts.name)
    grid, spacing = next(iter(grids))
    return write_index(store, shards, grid=grid, spacing=spacing)


# Reading


def read_index(folder: str | Path | ShardStore) -> ShardIndex:
    """Read the index of a folder or URL of shards.

    Raises:
        UserError: there is no folder, no index, or an index of another schema.
    """
    store = ShardStore(folder)
    try:
        data = store.read_file(SHARD_INDEX_FILE)
    except FileNotFoundError:
        raise UserError(
            f"No shards in {store} (expected {SHARD_INDEX_FILE}): run `make preprocess`, or set "
            "data.shards to their folder."
        ) from None
    except OSError as error:
        raise UserError(
            f"{store / SHARD_INDEX_FILE} cannot be read ({error}): check the place and the access "
            "to it."
        ) from None
    try:
        return _INDEX_ADAPTER.validate_json(data)
    except ValidationError as error:
        field, reason = first_invalid_field(error)
        raise UserError(
            f"{store / SHARD_INDEX_FILE} is damaged at {field}: {reason}; run `make preprocess` "
            "again."
        ) from None


def read_sample_meta(folder: str | Path | ShardStore, location: SampleLocation) -> SampleMeta:
    """Read the metadata of one sample by its offsets, without its volumes.

    Raises:
        UserError: the shard is missing, cut short or damaged.
    """
    store = ShardStore(folder)
    path = store / location.shard
    try:
        data = store.read_range(location.shard, *location.members["json"])
    except OSError as error:
        raise UserError(
            f"Shard {path} cannot be read ({error.strerror or error}): copy it again or run "
            "`make preprocess`."
        ) from None
    return parse_meta(data, f"Shard {path}, sample {location.key}")


def read_sample(
    folder: str | Path | ShardStore,
    location: SampleLocation,
    into: Mapping[str, NDArray[Any]] | None = None,
) -> Sample:
    """Read one sample by its offsets, in one read.

    Args:
        folder: folder or URL of the shards.
        location: position of the sample.
        into: arrays by member that receive the volumes; see `decode_sample`.

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
            f"Shard {path} is cut short: sample {location.key} should end at byte {end}, the file "
            f"ends at {start + len(data)}; run `make preprocess` again or copy it again."
        )
    members = {}
    for name, (offset, size) in location.members.items():
        members[name] = memoryview(data)[offset - start : offset - start + size]
    sample = decode_sample(members, f"Shard {path}, sample {location.key}", into)
    if sample.meta.key != location.key:
        raise UserError(
            f"Shard {path} and its index disagree: {location.key} expected, {sample.meta.key} "
            "found."
        )
    return sample
