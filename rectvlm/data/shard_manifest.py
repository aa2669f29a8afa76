"""The manifest of a folder of shards: checksums, counts and provenance, in `manifest.json`.

It holds no time and no name of a machine, so the same inputs give the same file.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rectvlm.data.store import ShardStore
from rectvlm.labels import FINDINGS, LESION_BY_KEY, Lesion
from rectvlm.types import SAMPLE_SCHEMA, SampleMeta, Split, UserError, first_invalid_field

SHARD_MANIFEST_FILE = "manifest.json"
LABELS_SETTING = "labels"
"""Key of `provenance.settings` with the origin of the labels, in words."""

LabelCounts = dict[str, dict[str, dict[str, int]]]
"""Numbers of samples: `labels`, by finding, `present`, `absent` and `unknown`; `lesions`, by lesion
key, `present` and `annotated`."""
_LABEL_WORDS = {1: "present", 0: "absent", None: "unknown"}


@dataclass(frozen=True)
class ManifestShard:
    """Size and checksum of one tar; its fields are keys of `manifest.json`."""

    name: str
    """File name of the tar."""
    split: Split
    """Split of all samples of the tar."""
    samples: int
    """Number of samples."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """Checksum of the tar."""


@dataclass(frozen=True)
class ShardProvenance:
    """Origin of the samples; its fields are keys of `manifest.json`."""

    fingerprint: str | None = None
    """Digest of all inputs and settings."""
    code: str | None = None
    """Digest of the modules that decide the bytes of a sample."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Options of the run and the policy of the data set."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of volumes that the data set left out by rule, by reason."""
    set_aside: dict[str, int] = field(default_factory=dict)
    """Number of cases that could not be used, by reason; the quarantine list names each."""


@dataclass(frozen=True)
class ShardManifest:
    """`manifest.json`, whose keys are these field names."""

    shards: list[ManifestShard]
    """Tars of the folder."""
    counts: dict[str, LabelCounts]
    """Counts of findings and lesions, by split."""
    versions: dict[str, str]
    """Versions of the packages that made the samples, by name."""
    provenance: ShardProvenance
    """Origin of the samples."""
    schema: int = SAMPLE_SCHEMA
    """Version of this schema."""


_MANIFEST_ADAPTER = TypeAdapter(ShardManifest)


def read_manifest(folder: str | Path | ShardStore) -> ShardManifest:
    """Read the manifest of a folder or URL of shards.

    Raises:
        UserError: there is none, or it is of another schema.
    """
    store = ShardStore(folder)
    path = store / SHARD_MANIFEST_FILE
    try:
        return _MANIFEST_ADAPTER.validate_json(store.read_file(SHARD_MANIFEST_FILE))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}): run `make preprocess`, or copy it."
        ) from None
    except ValidationError as error:
        field_name, reason = first_invalid_field(error)
        raise UserError(
            f"{path} is damaged at {field_name}: {reason}; run `make preprocess` again."
        ) from None


def read_label_origin(folder: str | Path | ShardStore) -> str | None:
    """Read where the labels of shards come from, in words; None where no manifest says it."""
    try:
        origin = read_manifest(folder).provenance.settings.get(LABELS_SETTING)
    except UserError:
        return None
    return None if origin is None else str(origin)


def dump_manifest(manifest: ShardManifest) -> bytes:
    """Make the bytes of `manifest.json`."""
    return _MANIFEST_ADAPTER.dump_json(manifest, indent=1) + b"\n"


def sum_counts(parts: Sequence[LabelCounts]) -> LabelCounts:
    """Sum of counts; zeros for every finding and lesion when there are none."""
    total: LabelCounts = {
        "labels": {finding: dict.fromkeys(_LABEL_WORDS.values(), 0) for finding in FINDINGS},
        "lesions": {key: {"present": 0, "annotated": 0} for key in LESION_BY_KEY},
    }
    for counts in parts:
        for kind, by_name in counts.items():
            for name, by_word in by_name.items():
                for word, number in by_word.items():
                    total[kind][name][word] += number
    return total


def add_sample_counts(counts: LabelCounts, meta: SampleMeta, lesions: Iterable[Lesion]) -> None:
    """Add one sample to counts, in place; `lesions` are those that occur in its mask."""
    for finding, value in meta.labels.items():
        counts["labels"][finding][_LABEL_WORDS[value]] += 1
    for lesion in lesions:
        counts["lesions"][lesion.key]["present"] += 1
    for key, is_annotated in meta.lesions_annotated.items():
        counts["lesions"][key]["annotated"] += is_annotated
