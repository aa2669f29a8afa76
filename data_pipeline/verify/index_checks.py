"""Checks of a folder's index and manifest, of the files beside them, and of what all samples
share."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_pipeline.make_shards.shard_plan import QUARANTINE_FILE
from data_pipeline.verify.issues import IssueRecorder, VerificationIssues
from data_pipeline.verify.statistics import (
    DatasetStatistics,
    SampleSummary,
    count_labels,
    count_lesions,
)
from rectvlm.data.sample import SAMPLE_MEMBERS
from rectvlm.data.shard_manifest import (
    SHARD_MANIFEST_FILE,
    ShardManifest,
    dump_manifest,
    sum_counts,
)
from rectvlm.data.shards import (
    SHARD_INDEX_FILE,
    IndexedShard,
    SampleLocation,
    ShardIndex,
    dump_index,
)
from rectvlm.data.store import ShardStore
from rectvlm.types import SAMPLE_SCHEMA, SPLITS

EXPECTED_FILES = (SHARD_INDEX_FILE, SHARD_MANIFEST_FILE, QUARANTINE_FILE)
"""Files that belong beside the shards."""
_MAX_SPACING_MM = 1e3


def check_index(store: ShardStore, index: ShardIndex, issues: VerificationIssues) -> None:
    """Check the index by itself: its schema, each shard and key once, each patient in one split."""
    recorder = IssueRecorder(issues, SHARD_INDEX_FILE)
    _check_json_fields(store, index, dump_index(index), recorder)
    recorder.expect_or_fault(
        index.schema == SAMPLE_SCHEMA, f"schema {SAMPLE_SCHEMA}", f"schema {index.schema}"
    )
    has_valid_spacing = all(0 < mm < _MAX_SPACING_MM for mm in index.spacing)
    recorder.expect_or_fault(
        min(index.grid) >= 1 and has_valid_spacing,
        "a grid of positive sides and spacings",
        f"{index.grid} of {index.spacing} mm",
    )
    recorder.expect_or_fault(bool(index.shards), "at least one shard", "none")
    _check_repeated_shards([shard.name for shard in index.shards], recorder)
    locations: list[SampleLocation] = []
    for shard in index.shards:
        _check_indexed_shard(shard, issues)
        locations += shard.samples
    for key, count in Counter(location.key for location in locations).items():
        if count > 1:
            key_recorder = IssueRecorder(issues, SHARD_INDEX_FILE, key)
            key_recorder.record_fault("each key once", f"it {count} times")
    _check_patient_splits(locations, recorder)


def _check_indexed_shard(shard: IndexedShard, issues: VerificationIssues) -> None:
    """Check that a shard's samples name it, are of the split in its name, and have all members."""
    recorder = IssueRecorder(issues, SHARD_INDEX_FILE)
    recorder.expect_or_fault(bool(shard.samples), f"at least one sample in {shard.name}", "none")
    other_shards = sorted({location.shard for location in shard.samples} - {shard.name})
    recorder.expect_or_fault(
        not other_shards,
        f"samples of {shard.name} under that name",
        f"some of {', '.join(other_shards)}",
    )
    splits = sorted({location.split for location in shard.samples})
    recorder.expect_or_fault(
        all(shard.name.startswith(f"{split}-") for split in splits),
        f"samples of one split in {shard.name}, by its name",
        " and ".join(splits),
    )
    for location in shard.samples:
        sample_recorder = IssueRecorder(issues, SHARD_INDEX_FILE, location.key)
        sample_recorder.expect_or_fault(
            set(location.members) == set(SAMPLE_MEMBERS),
            f"offsets of {', '.join(SAMPLE_MEMBERS)}",
            f"of {', '.join(location.members)}",
        )


def _check_repeated_shards(names: Sequence[str], recorder: IssueRecorder) -> None:
    for name, count in Counter(names).items():
        recorder.expect_or_fault(count == 1, "each shard once", f"{name} {count} times")


def _check_patient_splits(
    samples: Sequence[SampleLocation] | Sequence[SampleSummary], recorder: IssueRecorder
) -> None:
    splits_by_patient: dict[str, set[str]] = {}
    for sample in samples:
        splits_by_patient.setdefault(sample.patient, set()).add(sample.split)
    for patient, splits in splits_by_patient.items():
        recorder.expect_or_fault(
            len(splits) == 1,
            f"patient {patient} in one split",
            f"samples in {' and '.join(sorted(splits))}",
        )


def _check_json_fields(
    store: ShardStore,
    parsed: ShardIndex | ShardManifest,
    expected_bytes: bytes,
    recorder: IssueRecorder,
) -> None:
    """Check that a file holds nothing but what was read from it.

    It may have no unknown field, no default in place of a missing one, and no byte that
    preprocessing would not write.
    """
    data = store.read_file(recorder.file_name)
    stored_tree, parsed_tree = json.loads(data), json.loads(json.dumps(asdict(parsed)))
    if stored_tree != parsed_tree:
        recorder.record_fault(
            "the fields and types of its schema only",
            _describe_first_difference(parsed_tree, stored_tree),
        )
    elif data != expected_bytes:
        recorder.record_fault("JSON as preprocessing writes it", "the same values in other bytes")


class _MissingValue:
    def __repr__(self) -> str:
        return "nothing"


_MISSING = _MissingValue()


def _describe_first_difference(parsed: Any, stored: Any, path: str = "") -> str:
    """Describe where two JSON trees first differ."""
    if isinstance(parsed, dict) and isinstance(stored, dict):
        for name in {**parsed, **stored}:
            values = parsed.get(name, _MISSING), stored.get(name, _MISSING)
            if values[0] != values[1]:
                return _describe_first_difference(*values, f"{path}.{name}".lstrip("."))
    if isinstance(parsed, list) and isinstance(stored, list) and len(parsed) == len(stored):
        for index, values in enumerate(zip(parsed, stored, strict=True)):
            if values[0] != values[1]:
                return _describe_first_difference(*values, f"{path}[{index}]")
    return f"{stored!r} where {parsed!r} is read, at {path}"


def check_manifest(
    store: ShardStore, manifest: ShardManifest, index: ShardIndex, issues: VerificationIssues
) -> None:
    """Check that the manifest is of the schema and lists the index's shards, once each."""
    recorder = IssueRecorder(issues, SHARD_MANIFEST_FILE)
    _check_json_fields(store, manifest, dump_manifest(manifest), recorder)
    sha256 = hashlib.sha256(store.read_file(SHARD_MANIFEST_FILE)).hexdigest()
    recorder.expect_or_fault(
        sha256 == index.manifest,
        f"SHA-256 {index.manifest or '(none)'}, which the index has",
        sha256,
    )
    recorder.expect_or_fault(
        manifest.schema == SAMPLE_SCHEMA, f"schema {SAMPLE_SCHEMA}", f"schema {manifest.schema}"
    )
    manifest_names = [shard.name for shard in manifest.shards]
    _check_repeated_shards(manifest_names, recorder)
    indexed_shards = {shard.name: shard for shard in index.shards}
    for name in sorted(set(indexed_shards) - set(manifest_names)):
        recorder.record_fault(f"{name}, which the index names", "no such shard")
    for shard in manifest.shards:
        if shard.name not in indexed_shards:
            recorder.record_fault("only shards that the index names", shard.name)
            continue
        locations = indexed_shards[shard.name].samples
        splits = sorted({location.split for location in locations})
        recorder.expect_or_fault(
            len(locations) == shard.samples and splits == [shard.split],
            f"{shard.samples} {shard.split} samples in {shard.name}",
            f"{len(locations)} of {splits} in the index",
        )


def check_folder(store: ShardStore, index: ShardIndex, issues: VerificationIssues) -> None:
    """Check that the folder holds no other files.

    A tar that the index does not name is a fault, since whoever reads `*.tar` would read it; other
    files are notes.
    """
    try:
        names = store.list_names()
    except OSError as error:
        recorder = IssueRecorder(issues, str(store))
        recorder.expect_or_note(False, "a place whose files can be listed", error)
        return
    known_names = {*EXPECTED_FILES, *(shard.name for shard in index.shards)}
    for name in sorted(set(names) - known_names):
        recorder = IssueRecorder(issues, name)
        record = recorder.expect_or_fault if name.endswith(".tar") else recorder.expect_or_note
        record(False, "only files of the data set", "a file that the index does not name")


def check_across_samples(summaries: Sequence[SampleSummary], issues: VerificationIssues) -> None:
    """Check what must hold between samples, by their own content."""
    shards_by_key: dict[str, str] = {}
    for summary in summaries:
        if summary.key in shards_by_key:
            recorder = IssueRecorder(issues, summary.shard, summary.key)
            recorder.record_fault("each key once", f"it in {shards_by_key[summary.key]}, too")
        shards_by_key[summary.key] = summary.shard
    _check_patient_splits(summaries, IssueRecorder(issues, "samples"))

    first_of_scan: dict[str, SampleSummary] = {}
    for summary in summaries:
        first = first_of_scan.setdefault(summary.scan, summary)
        shared_values = {
            "patient": summary.patient == first.patient,
            "labels": summary.labels == first.labels,
        }
        recorder = IssueRecorder(issues, summary.shard, summary.key)
        for name, is_same in shared_values.items():
            recorder.expect_or_fault(
                is_same,
                f"the {name} of {first.key}, as both are of scan {summary.scan}",
                "another",
            )
        recorder.expect_or_note(
            summary.report_digest == first.report_digest,
            f"the report of {first.key}, as both are of scan {summary.scan}",
            "another, as the data set may give one to each reconstruction",
        )


def check_versions(
    manifest: ShardManifest, summaries: Sequence[SampleSummary], issues: VerificationIssues
) -> None:
    """Note samples of other versions than the manifest's: they may differ in the last digit."""
    counts = Counter(summary.versions for summary in summaries if summary.versions)
    recorder = IssueRecorder(issues, SHARD_MANIFEST_FILE)
    for versions, count in counts.items():
        recorder.expect_or_note(
            dict(versions) == manifest.versions,
            f"samples of the manifest's versions {manifest.versions}",
            f"{dict(versions)} in {format_count(count, 'sample')}",
        )


def check_counts(
    manifest: ShardManifest, statistics: DatasetStatistics, issues: VerificationIssues
) -> None:
    """Compare the manifest's counts of labels and lesions with a recount of the samples."""
    recorder = IssueRecorder(issues, SHARD_MANIFEST_FILE)
    template = sum_counts([])
    for split in sorted({*manifest.counts, *SPLITS}):
        summaries = [summary for summary in statistics.sample_summaries if summary.split == split]
        recount = {"labels": count_labels(summaries), "lesions": count_lesions(summaries)}
        stated_counts = manifest.counts.get(split, {})
        for kind in sorted({*stated_counts, *template}):
            stated = stated_counts.get(kind, {})
            counted = {}
            for name, words in template.get(kind, {}).items():
                counted[name] = {word: recount[kind][name][word] for word in words}
            wrong = [
                name for name in {**counted, **stated} if counted.get(name) != stated.get(name)
            ]
            if wrong:
                name = wrong[0]
                rest = f", and {len(wrong) - 1} more {kind} wrong" if wrong[1:] else ""
                recorder.record_fault(
                    f"{split} {kind}, {name}: {counted.get(name)}, as counted",
                    f"{stated.get(name)}{rest}",
                )


def format_count(count: int, noun: str) -> str:
    """A number with its noun: `no faults`, `1 fault`, `2 faults`."""
    if count == 0:
        return f"no {noun}s"
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
