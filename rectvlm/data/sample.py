"""The shard schema, both ways: samples to WebDataset tars with an index, and back, one sample at a time.

A shard is a plain WebDataset tar of one split. Each sample is four members, `KEY.ct`, `KEY.lesions`, `KEY.regions`
(see `packing`) and `KEY.json` (the `SampleMeta`). `index.json` beside
the shards says where each member lies, so that any sample can be read without a scan.
"""

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import webdataset
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from rectvlm.data.packing import pack, unpack
from rectvlm.labels import FINDINGS, LESIONS, N_LESIONS, N_REGIONS
from rectvlm.types import Sample, SampleMeta, Split, UserError

SCHEMA = 1
INDEX = "index.json"
MEMBERS = ("ct", "lesions", "regions", "json")
_DTYPES: dict[str, np.dtype[Any]] = {"ct": np.dtype("<i2"), "lesions": np.dtype("u1"), "regions": np.dtype("u1")}
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass(frozen=True)
class Entry:
    """Where one sample lies."""

    key: str
    split: Split
    patient: str
    shard: str
    """File name of the tar, in the index's folder."""
    members: dict[str, tuple[int, int]]
    """By member (`ct`, `lesions`, `regions`, `json`): offset and size in the tar, bytes."""


@dataclass(frozen=True)
class Shard:
    """One tar of one split."""

    name: str
    bytes: int
    sha256: str
    samples: list[Entry]
    counts: dict[str, dict[str, dict[str, int]]]
    """`labels`: by finding, how many samples are present, absent, unknown; `lesions`: by key, present, annotated."""


@dataclass(frozen=True)
class Index:
    """What a folder of shards holds; `index.json`."""

    grid: tuple[int, int, int]
    """Voxels (z, y, x)."""
    spacing: tuple[float, float, float]
    """Voxel size (z, y, x), mm."""
    shards: list[Shard]
    counts: dict[str, dict[str, dict[str, dict[str, int]]]]
    """By split, as in a shard."""
    versions: dict[str, str]
    fingerprint: str | None = None
    """Digest of the inputs and settings that the shards were made from."""
    schema: int = SCHEMA

    def select(self, split: Split | None) -> list[Entry]:
        """The samples of a split (of both, train first, when None), in the order in which they were written."""
        wanted: tuple[Split, ...] = ("train", "valid") if split is None else (split,)
        return [entry for one in wanted for shard in self.shards for entry in shard.samples if entry.split == one]


_META = TypeAdapter(SampleMeta)
_INDEX = TypeAdapter(Index)
_SHARD = TypeAdapter(Shard)


def encode(sample: Sample) -> dict[str, bytes]:
    """The four members of a sample.

    Raises:
        UserError: a key that WebDataset would cut, or labels, flags or values outside the schema.
    """
    meta = sample.meta
    if not _KEY.fullmatch(meta.key):
        raise UserError(
            f"Sample key {meta.key!r} must be 1 to 80 letters, digits, '_' or '-' (WebDataset cuts a name at its "
            f"first dot): rename the case from {meta.source}."
        )
    _check_sample(sample, where=f"Sample {meta.key}")
    arrays: dict[str, NDArray[Any]] = {"ct": sample.ct, "lesions": sample.lesions, "regions": sample.regions}
    for name, array in arrays.items():
        assert array.dtype == _DTYPES[name], f"{name} is {array.dtype}"
    members = {name: pack(array) for name, array in arrays.items()}
    members["json"] = _META.dump_json(meta)
    return members


def decode(members: Mapping[str, bytes], where: str = "sample") -> Sample:
    """A sample from its four members, as WebDataset gives them (other keys are ignored).

    Raises:
        UserError: a member is missing, damaged, or not of this schema; `where` names the source.
    """
    missing = [name for name in MEMBERS if name not in members]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: expected the members {', '.join(MEMBERS)}.")
    arrays = {name: unpack(members[name], dtype, f"{where}, member {name}") for name, dtype in _DTYPES.items()}
    sample = Sample(**arrays, meta=_read_meta(members["json"], where))
    _check_sample(sample, where)
    return sample


def _read_meta(data: bytes, where: str) -> SampleMeta:
    try:
        tree = json.loads(data)
        meta = _META.validate_json(data, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "top level"
        raise UserError(f"{where}: {place} of its JSON is not of schema {SCHEMA}: {fault['msg']}.") from None
    except ValueError as error:
        raise UserError(f"{where}: its JSON cannot be read ({error}); make the shards again.") from None
    found, expected = set(_paths(tree)), set(_paths(_META.dump_python(meta, mode="json")))
    if found != expected:
        unknown, missing = sorted(found - expected), sorted(expected - found)
        raise UserError(
            f"{where}: its JSON is not of schema {SCHEMA}: unknown {unknown}, missing {missing}; "
            f"read it with the version that wrote it, or make the shards again."
        )
    return meta


def _paths(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")


def _check_sample(sample: Sample, where: str) -> None:
    meta = sample.meta
    if meta.schema != SCHEMA:
        raise UserError(f"{where} is of schema {meta.schema}, this version reads {SCHEMA}: make the shards again.")
    wrong = set(meta.labels) ^ set(FINDINGS)
    if wrong or any(value not in (0, 1, None) for value in meta.labels.values()):
        raise UserError(f"{where}: labels must give 0, 1 or null for each of the 18 findings; wrong: {sorted(wrong)}.")
    wrong = set(meta.lesions_annotated) ^ {lesion.key for lesion in LESIONS}
    if wrong:
        raise UserError(f"{where}: lesions_annotated must name each of the 5 lesions; wrong: {sorted(wrong)}.")
    shapes = {sample.ct.shape, sample.lesions.shape, sample.regions.shape}
    if len(shapes) != 1:
        raise UserError(f"{where}: CT, lesions and regions must have one shape, found {sorted(shapes)}.")
    if sample.lesions.max() >= 1 << N_LESIONS or sample.regions.max() > N_REGIONS:
        raise UserError(f"{where}: lesion bits must be below {1 << N_LESIONS} and region ids at most {N_REGIONS}.")


# Writing


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name complete and on disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(samples: Iterable[Sample], folder: Path, name: str) -> Shard | None:
    """Write samples of one split to `folder/name`, the same bytes for the same samples; None when there are none.

    Raises:
        UserError: a key twice, or whatever `encode` refuses.
    """
    stream = iter(samples)
    first = next(stream, None)
    if first is None:
        return None
    metas: list[SampleMeta] = []
    tally = _Tally()
    with atomic_file(folder / name) as file:
        with webdataset.TarWriter(file, user="rectvlm", group="rectvlm", encoder=False, mtime=0) as tar:
            for sample in chain([first], stream):
                assert sample.meta.split == first.meta.split, "a shard holds one split"
                if any(meta.key == sample.meta.key for meta in metas):
                    raise UserError(f"Two cases have the key {sample.meta.key}: keys must be unique, rename one.")
                tar.write({"__key__": sample.meta.key, **encode(sample)})
                metas.append(sample.meta)
                tally.add(sample)
        file.flush()
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as written:
            places = {member.name: (member.offset_data, member.size) for member in written}
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    entries = [
        Entry(m.key, m.split, m.patient, name, {member: places[f"{m.key}.{member}"] for member in MEMBERS})
        for m in metas
    ]
    return Shard(name, size, digest, entries, tally.counts())


def write_index(folder: Path, shards: Sequence[Shard], *, grid: tuple[int, int, int],
                spacing: tuple[float, float, float], fingerprint: str | None = None) -> Index:  # fmt: skip
    """Write `index.json` for finished shards, and remove tars that it does not name.

    Args:
        grid: voxels (z, y, x) of every sample.
        spacing: mm (z, y, x) of every sample.
        fingerprint: digest of inputs and settings, for `Index.fingerprint`.

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
            raise UserError(f"Patient {entry.patient} is in train and in valid: put all cases of a patient in one.")
    counts = {
        split: _sum_counts([shard.counts for shard in shards if shard.samples[0].split == split])
        for split in ("train", "valid")
    }
    index = Index(grid, spacing, list(shards), counts, versions(), fingerprint)
    with atomic_file(folder / INDEX) as file:
        file.write(_INDEX.dump_json(index, indent=1))
    named = {shard.name for shard in shards}
    for stale in folder.glob("*.tar"):
        if stale.name not in named:
            stale.unlink()
    return index


def write_shards(samples: Iterable[Sample], folder: Path, samples_per_shard: int = 16) -> Index:
    """Write samples to `train-000000.tar`, `valid-000000.tar`, … and `index.json`; samples of a split keep their order.

    The old index goes first and the new one comes last, so a folder with an index is complete.

    Raises:
        UserError: no sample, two grids or spacings, or whatever `write_shard` and `write_index` refuse.
    """
    (folder / INDEX).unlink(missing_ok=True)
    shards: list[Shard] = []
    numbers: Counter[str] = Counter()
    grids: dict[tuple[Any, Any], str] = {}

    def flush(waiting: list[Sample], split: Split) -> None:
        shard = write_shard(waiting, folder, f"{split}-{numbers[split]:06d}.tar")
        if shard is not None:
            shards.append(shard)
            numbers[split] += 1

    waiting: dict[Split, list[Sample]] = {"train": [], "valid": []}
    for sample in samples:
        grids.setdefault((sample.ct.shape, sample.meta.spacing), sample.meta.key)
        if len(grids) > 1:
            raise UserError(f"All samples must have one grid and spacing, found (grid, spacing) by key: {grids}.")
        split = sample.meta.split
        waiting[split].append(sample)
        if len(waiting[split]) == samples_per_shard:
            flush(waiting[split], split)
            waiting[split] = []
    for split, rest in waiting.items():
        flush(rest, split)
    if not shards:
        raise UserError(f"No sample to write to {folder}: give at least one case that can be used.")
    (grid, spacing) = next(iter(grids))
    return write_index(folder, sorted(shards, key=lambda shard: shard.name), grid=grid, spacing=spacing)


@dataclass
class _Tally:
    """Counts of findings and lesions."""

    labels: Counter[tuple[str, str]] = field(default_factory=Counter)
    lesions: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        words = {0: "absent", 1: "present", None: "unknown"}
        self.labels.update((finding, words[value]) for finding, value in sample.meta.labels.items())
        bits = int(np.bitwise_or.reduce(sample.lesions, axis=None))
        self.lesions.update((lesion.key, "present") for lesion in LESIONS if bits >> lesion.bit & 1)
        self.lesions.update((key, "annotated") for key, looked in sample.meta.lesions_annotated.items() if looked)

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        return {
            "labels": {f: {w: self.labels[f, w] for w in ("present", "absent", "unknown")} for f in FINDINGS},
            "lesions": {le.key: {w: self.lesions[le.key, w] for w in ("present", "annotated")} for le in LESIONS},
        }


def _sum_counts(many: Sequence[dict[str, dict[str, dict[str, int]]]]) -> dict[str, dict[str, dict[str, int]]]:
    total = _Tally().counts()
    for counts in many:
        for kind, by_name in counts.items():
            for name, by_word in by_name.items():
                for word, number in by_word.items():
                    total[kind][name][word] += number
    return total


def versions() -> dict[str, str]:
    """Versions of what decides a sample's voxels and bytes."""
    return {name: version(name) for name in ("rectvlm", "numpy", "nibabel", "blosc2")}


# Reading


def read_index(folder: Path) -> Index:
    """The index of a folder of shards.

    Raises:
        UserError: no folder, no index, or an index of another schema.
    """
    path = folder / INDEX
    if not path.is_file():
        raise UserError(
            f"No shards in {folder} (expected {INDEX}): run `make preprocess`, or set data.shards to their folder."
        )
    try:
        return _INDEX.validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "top level"
        raise UserError(f"{path} is damaged at {place}: {fault['msg']}; run `make preprocess` again.") from None


def read_sample(folder: Path, entry: Entry) -> Sample:
    """One sample, by its offsets. Opens the file anew each time, so threads and forked workers do not interfere.

    Raises:
        UserError: the shard is missing, cut short or damaged.
    """
    path = folder / entry.shard
    members: dict[str, bytes] = {}
    try:
        with path.open("rb") as file:
            for name, (offset, size) in entry.members.items():
                file.seek(offset)
                members[name] = file.read(size)
                if len(members[name]) != size:
                    raise UserError(
                        f"Shard {path} is cut short: {entry.key}.{name} should end at byte {offset + size}, the file "
                        f"has {path.stat().st_size}; run `make preprocess` again or copy it again."
                    )
    except OSError as error:
        raise UserError(
            f"Shard {path} cannot be read ({error.strerror}): copy it again or run `make preprocess`."
        ) from None
    sample = decode(members, where=f"Shard {path}, sample {entry.key}")
    if sample.meta.key != entry.key:
        raise UserError(f"Shard {path} and its index disagree: {entry.key} expected, {sample.meta.key} found.")
    return sample
