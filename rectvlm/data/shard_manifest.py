"""Where a folder of shards came from, and what is in it: `manifest.json`, beside the index that readers need.

It holds no time and no name of a machine, so the same inputs give the same file.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rectvlm.data.sample import SAMPLE_SCHEMA
from rectvlm.data.store import ShardStore
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.lesion_bits import combined_mask_value, present_lesions
from rectvlm.types import MaskVolume, SampleMeta, Split, UserError

SHARD_MANIFEST_FILE = "manifest.json"

LabelCounts = dict[str, dict[str, dict[str, int]]]
"""`labels`: by finding, how many samples are present, absent, unknown; `lesions`: by key, present, annotated."""


@dataclass(frozen=True)
class ManifestShard:
    """One tar, to be checked against."""

    name: str
    split: Split
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardProvenance:
    """What the samples alone do not tell."""

    fingerprint: str | None = None
    """Digest of all inputs and settings."""
    code: str | None = None
    """Digest of the modules that decide what a sample looks like."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Options of the run and the policy of the data set."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Volumes that the data set left out by rule, by reason."""
    set_aside: dict[str, int] = field(default_factory=dict)
    """Cases that could not be used, by reason; each is named in the quarantine list."""


@dataclass(frozen=True)
class ShardManifest:
    """`manifest.json`."""

    shards: list[ManifestShard]
    counts: dict[str, LabelCounts]
    """By split."""
    versions: dict[str, str]
    provenance: ShardProvenance
    schema: int = SAMPLE_SCHEMA


_MANIFEST_ADAPTER = TypeAdapter(ShardManifest)


def read_manifest(folder: str | Path | ShardStore) -> ShardManifest:
    """The manifest of a folder (or URL) of shards.

    Raises:
        UserError: none is there, or it is of another schema.
    """
    store = ShardStore(folder)
    try:
        return _MANIFEST_ADAPTER.validate_json(store.read_file(SHARD_MANIFEST_FILE))
    except OSError as error:
        raise UserError(
            f"{store / SHARD_MANIFEST_FILE} cannot be read ({error}): run `make preprocess`, or copy it."
        ) from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "top level"
        raise UserError(
            f"{store / SHARD_MANIFEST_FILE} is damaged at {where}: {fault['msg']}; run `make preprocess` again."
        ) from None


def dump_manifest(manifest: ShardManifest) -> bytes:
    """The bytes of `manifest.json`."""
    return _MANIFEST_ADAPTER.dump_json(manifest, indent=1) + b"\n"


@dataclass
class LabelTally:
    """Counts of findings and lesions."""

    labels: Counter[tuple[str, str]] = field(default_factory=Counter)
    lesions: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add_sample(self, meta: SampleMeta, lesion_bits: int) -> None:
        """Count one sample; `lesion_bits` are the bits that occur anywhere in its mask."""
        words = {0: "absent", 1: "present", None: "unknown"}
        self.labels.update((finding, words[value]) for finding, value in meta.labels.items())
        self.lesions.update(
            (lesion.key, "present") for lesion in LESIONS if lesion_bits & lesion.mask_value
        )
        self.lesions.update(
            (key, "annotated") for key, looked in meta.lesions_annotated.items() if looked
        )

    def as_counts(self) -> LabelCounts:
        """All findings and lesions, zeros included."""
        return {
            "labels": {
                f: {w: self.labels[f, w] for w in ("present", "absent", "unknown")}
                for f in FINDINGS
            },
            "lesions": {
                le.key: {w: self.lesions[le.key, w] for w in ("present", "annotated")}
                for le in LESIONS
            },
        }


def sum_counts(many: Sequence[LabelCounts]) -> LabelCounts:
    """The sum of counts; zeros when there are none."""
    total = LabelTally().as_counts()
    for counts in many:
        for kind, by_name in counts.items():
            for name, by_word in by_name.items():
                for word, number in by_word.items():
                    total[kind][name][word] += number
    return total


def find_lesion_bits(mask: MaskVolume) -> int:
    """The lesion bits that occur anywhere in a mask."""
    return combined_mask_value(present_lesions(mask))
