"""Read shards back and check everything in them.

    python -m data_pipeline.verify [FOLDER or URL] [--stats OUT] [--workers 2] [--sample N] [--show 100]

Reads each shard once, whole: sizes, checksums, the tar as WebDataset walks it, the offsets of the index, and every
sample (see `data_pipeline.verify.sample_checks`); then what must hold across shards. Each fault is one line; the exit status
is 1 when there is any. `--sample N` reads only N samples, spread over the shards, by their offsets: no checksums, no
counts. `--stats OUT` prints figures of what was read and writes them to OUT with pictures.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_pipeline.verify.sample_checks import VerificationIssue, VerificationIssues
from data_pipeline.verify.shard_checks import ShardCheckResult, check_sample_by_offsets, check_shard
from data_pipeline.verify.statistics import (
    SPLITS,
    DatasetStatistics,
    SampleSummary,
    build_tables,
    count_labels,
    count_lesions,
    pick_evenly,
)
from rectvlm import config
from rectvlm.data.sample import SAMPLE_MEMBERS
from rectvlm.data.shard_manifest import (
    SHARD_MANIFEST_FILE,
    ShardManifest,
    dump_manifest,
    read_manifest,
    sum_counts,
)
from rectvlm.data.shards import (
    SHARD_INDEX_FILE,
    IndexedShard,
    SampleLocation,
    ShardIndex,
    dump_index,
    read_index,
)
from rectvlm.data.store import ShardStore
from rectvlm.types import SAMPLE_SCHEMA, UserError

log = logging.getLogger(__name__)

EXPECTED_FILES = (SHARD_INDEX_FILE, SHARD_MANIFEST_FILE, "quarantine.jsonl")
"""What may lie beside the tars."""
_MAX_SERIAL_BYTES = 64 << 20
"""Bytes that are read sooner than processes start."""


@dataclass
class VerificationResult:
    """What a run of `verify` found."""

    issues: VerificationIssues = field(default_factory=VerificationIssues)
    statistics: DatasetStatistics = field(default_factory=DatasetStatistics)
    shards_read: int = 0
    bytes_read: int = 0
    seconds: float = 0.0

    def summary(self) -> str:
        """One line with the figures of the run."""
        faults, notes, seconds = (
            len(self.issues.faults),
            len(self.issues.notes),
            max(self.seconds, 1e-9),
        )
        return (
            f"{len(self.statistics.sample_summaries):,} samples in {self.shards_read:,} shards, {self.bytes_read / 1e6:,.1f} MB in "
            f"{self.seconds:,.1f} s ({self.bytes_read / 1e6 / seconds:,.1f} MB/s): {_format_count(faults, 'fault')}, "
            f"{_format_count(notes, 'note')}"
        )


def verify_shards(
    place: str | Path | ShardStore, *, workers: int = 1, sample_count: int | None = None
) -> VerificationResult:
    """Read shards back and check them.

    Args:
        workers: processes; 1 works in this one.
        sample: read only so many samples, spread over all shards, and leave out what needs whole shards.

    Raises:
        UserError: a place that cannot be opened, or a worker that was killed.
    """
    began = time.monotonic()
    store, outcome = ShardStore(place), VerificationResult()
    try:
        index = read_index(store)
    except UserError as error:
        outcome.issues.faults.append(
            VerificationIssue(
                SHARD_INDEX_FILE, None, "the index of finished shards", f"that {error}"
            )
        )
        return outcome
    faults = outcome.issues.faults
    manifest: ShardManifest | None = None
    try:
        manifest = read_manifest(store)
    except UserError as error:
        faults.append(
            VerificationIssue(
                SHARD_MANIFEST_FILE, None, "the manifest of finished shards", f"that {error}"
            )
        )
    faults += _check_index(store, index)
    facts = {} if manifest is None else {one.name: one for one in manifest.shards}
    if manifest is not None:
        faults += _check_manifest(store, manifest, index)
    outcome.issues.extend(_check_folder(store, index))
    wanted = index.grid, index.spacing
    jobs: dict[Callable[[], ShardCheckResult], int]
    if sample_count is None:
        jobs = {
            partial(check_shard, store, shard, facts.get(shard.name), *wanted): sum(
                size for entry in shard.samples for _, size in entry.members.values()
            )
            for shard in index.shards
        }
    else:
        chosen = pick_evenly(index.select_split(None), sample_count)
        jobs = {
            partial(check_sample_by_offsets, store, one, *wanted): sum(
                n for _, n in one.members.values()
            )
            for one in chosen
        }
    reports = list(_run_checks(jobs, workers))
    # Sorted, since workers finish in any order and two runs must print the same.
    for report in sorted(reports, key=lambda report: report.shard_name):
        outcome.issues.extend(report.issues)
        outcome.statistics.sample_summaries += report.sample_summaries
        outcome.bytes_read += report.bytes_read
        for split, counts in report.hu_histograms.items():
            outcome.statistics.hu_histograms[split] = (
                outcome.statistics.hu_histograms.get(split, np.zeros_like(counts)) + counts
            )
    outcome.shards_read = len({report.shard_name for report in reports})
    faults += _check_across_samples(outcome.statistics.sample_summaries)
    if sample_count is None and manifest is not None:
        # Where samples could not be read the counts differ for that reason, which is named already.
        if len(outcome.statistics.sample_summaries) == sum(
            len(shard.samples) for shard in index.shards
        ):
            faults += _check_counts(manifest, outcome.statistics)
        outcome.issues.notes += _check_versions(manifest, outcome.statistics.sample_summaries)
    outcome.seconds = time.monotonic() - began
    return outcome


# The index and the folder


def _check_index(store: ShardStore, index: ShardIndex) -> Iterator[VerificationIssue]:
    """What the index must be by itself: of the schema, with each shard and key once and each patient in one split."""
    yield from _check_json_fields(store, SHARD_INDEX_FILE, index, dump_index(index))
    if index.schema != SAMPLE_SCHEMA:
        yield VerificationIssue(
            SHARD_INDEX_FILE, None, f"schema {SAMPLE_SCHEMA}", f"schema {index.schema}"
        )
    if min(index.grid) < 1 or not all(0 < mm < 1e3 for mm in index.spacing):
        yield VerificationIssue(
            SHARD_INDEX_FILE,
            None,
            "a grid of positive sides and spacings",
            f"{index.grid} of {index.spacing} mm",
        )
    if not index.shards:
        yield VerificationIssue(SHARD_INDEX_FILE, None, "at least one shard", "none")
    for name, number in Counter(shard.name for shard in index.shards).items():
        if number > 1:
            yield VerificationIssue(
                SHARD_INDEX_FILE, None, "each shard once", f"{name} {number} times"
            )
    for shard in index.shards:
        yield from _check_shard_entries(shard)
    entries = [entry for shard in index.shards for entry in shard.samples]
    for key, number in Counter(entry.key for entry in entries).items():
        if number > 1:
            yield VerificationIssue(SHARD_INDEX_FILE, key, "each key once", f"it {number} times")
    for patient, splits in _splits_by_patient(entries).items():
        if len(splits) > 1:
            yield VerificationIssue(
                SHARD_INDEX_FILE,
                None,
                f"patient {patient} in one split",
                f"samples in {' and '.join(sorted(splits))}",
            )


def _check_json_fields(
    store: ShardStore, name: str, understood: ShardIndex | ShardManifest, written: bytes
) -> Iterator[VerificationIssue]:
    """Nothing in the file but what was read from it: no unknown field, no default in place of a missing one, and
    no byte other than preprocessing writes."""
    data = store.read_file(name)
    stored, read = json.loads(data), json.loads(json.dumps(asdict(understood)))
    if stored != read:
        yield VerificationIssue(
            name, None, "the fields and types of its schema only", _first_difference(read, stored)
        )
    elif data != written:
        yield VerificationIssue(
            name, None, "JSON as preprocessing writes it", "the same values in other bytes"
        )


def _check_manifest(
    store: ShardStore, manifest: ShardManifest, index: ShardIndex
) -> Iterator[VerificationIssue]:
    """The manifest is of the schema and speaks of the index's shards, once each."""
    yield from _check_json_fields(store, SHARD_MANIFEST_FILE, manifest, dump_manifest(manifest))
    digest = hashlib.sha256(store.read_file(SHARD_MANIFEST_FILE)).hexdigest()
    if digest != index.manifest:
        yield VerificationIssue(
            SHARD_MANIFEST_FILE,
            None,
            f"SHA-256 {index.manifest or '(none)'}, which the index has",
            digest,
        )
    if manifest.schema != SAMPLE_SCHEMA:
        yield VerificationIssue(
            SHARD_MANIFEST_FILE, None, f"schema {SAMPLE_SCHEMA}", f"schema {manifest.schema}"
        )
    indexed = {shard.name: shard for shard in index.shards}
    for name, number in Counter(one.name for one in manifest.shards).items():
        if number > 1:
            yield VerificationIssue(
                SHARD_MANIFEST_FILE, None, "each shard once", f"{name} {number} times"
            )
    for name in sorted(set(indexed) - {one.name for one in manifest.shards}):
        yield VerificationIssue(
            SHARD_MANIFEST_FILE, None, f"{name}, which the index names", "no such shard"
        )
    for one in manifest.shards:
        if one.name not in indexed:
            yield VerificationIssue(
                SHARD_MANIFEST_FILE, None, "only shards that the index names", one.name
            )
            continue
        entries = indexed[one.name].samples
        found = (len(entries), sorted({entry.split for entry in entries}))
        if found != (one.samples, [one.split]):
            yield VerificationIssue(
                SHARD_MANIFEST_FILE,
                None,
                f"{one.samples} {one.split} samples in {one.name}",
                f"{found[0]} of {found[1]} in the index",
            )


def _check_shard_entries(shard: IndexedShard) -> Iterator[VerificationIssue]:
    if not shard.samples:
        yield VerificationIssue(
            SHARD_INDEX_FILE, None, f"at least one sample in {shard.name}", "none"
        )
    others = sorted({entry.shard for entry in shard.samples} - {shard.name})
    if others:
        yield VerificationIssue(
            SHARD_INDEX_FILE,
            None,
            f"samples of {shard.name} under that name",
            f"some of {', '.join(others)}",
        )
    splits = {entry.split for entry in shard.samples}
    if any(not shard.name.startswith(f"{split}-") for split in splits):
        yield VerificationIssue(
            SHARD_INDEX_FILE,
            None,
            f"samples of one split in {shard.name}, by its name",
            " and ".join(sorted(splits)),
        )
    for entry in shard.samples:
        if set(entry.members) != set(SAMPLE_MEMBERS):
            yield VerificationIssue(
                SHARD_INDEX_FILE,
                entry.key,
                f"offsets of {', '.join(SAMPLE_MEMBERS)}",
                f"of {', '.join(entry.members)}",
            )


def _splits_by_patient(
    samples: Sequence[SampleLocation] | Sequence[SampleSummary],
) -> dict[str, set[str]]:
    """By patient: the splits that have samples of the patient."""
    splits: dict[str, set[str]] = {}
    for one in samples:
        splits.setdefault(one.patient, set()).add(one.split)
    return splits


def _first_difference(expected: Any, found: Any, path: str = "") -> str:
    """Where two JSON trees first differ, in words."""
    if isinstance(expected, dict) and isinstance(found, dict):
        pairs = [
            (f"{path}.{name}".lstrip("."), expected.get(name, _MISSING), found.get(name, _MISSING))
            for name in {**expected, **found}
        ]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [
            (f"{path}[{i}]", *pair) for i, pair in enumerate(zip(expected, found, strict=True))
        ]
    else:
        return f"{found!r} where {expected!r} is read, at {path}"
    return next(_first_difference(a, b, at) for at, a, b in pairs if a != b)


class _MissingValue:
    def __repr__(self) -> str:
        return "nothing"


_MISSING = _MissingValue()


def _check_folder(store: ShardStore, index: ShardIndex) -> VerificationIssues:
    """A tar that the index does not name would be read by whoever reads `*.tar`; other files only puzzle."""
    remarks = VerificationIssues()
    try:
        names = store.list_names()
    except OSError as error:
        remarks.notes.append(
            VerificationIssue(str(store), None, "a place whose files can be listed", str(error))
        )
        return remarks
    for name in sorted(set(names) - {shard.name for shard in index.shards} - set(EXPECTED_FILES)):
        kind = remarks.faults if name.endswith(".tar") else remarks.notes
        kind.append(
            VerificationIssue(
                name, None, "only files of the data set", "a file that the index does not name"
            )
        )
    return remarks


# Across shards


def _check_across_samples(facts: Sequence[SampleSummary]) -> Iterator[VerificationIssue]:
    """What must hold between samples, by what they say themselves."""
    shards: dict[str, str] = {}
    for one in facts:
        if one.key in shards:
            yield VerificationIssue(
                one.shard, one.key, "each key once", f"it in {shards[one.key]}, too"
            )
        shards[one.key] = one.shard
    for patient, splits in _splits_by_patient(facts).items():
        if len(splits) > 1:
            yield VerificationIssue(
                "samples",
                None,
                f"patient {patient} in one split",
                f"samples in {' and '.join(sorted(splits))}",
            )
    first: dict[str, SampleSummary] = {}
    for one in facts:
        other = first.setdefault(one.scan, one)
        for name, attribute in (
            ("patient", "patient"),
            ("labels", "labels"),
            ("report", "report_digest"),
        ):
            if getattr(one, attribute) != getattr(other, attribute):
                yield VerificationIssue(
                    one.shard,
                    one.key,
                    f"the {name} of {other.key}, as both are of scan {one.scan}",
                    "another",
                )


def _check_versions(
    manifest: ShardManifest, facts: Sequence[SampleSummary]
) -> Iterator[VerificationIssue]:
    """Samples made by other versions than the manifest's may differ in the last digit."""
    others = Counter(
        one.versions for one in facts if one.versions and dict(one.versions) != manifest.versions
    )
    for versions, number in others.items():
        found = f"{dict(versions)} in {_format_count(number, 'sample')}"
        yield VerificationIssue(
            SHARD_MANIFEST_FILE,
            None,
            f"samples of the manifest's versions {manifest.versions}",
            found,
        )


def _check_counts(
    manifest: ShardManifest, statistics: DatasetStatistics
) -> Iterator[VerificationIssue]:
    """Recount labels and lesions by split, in the words that a manifest uses."""
    words = sum_counts([])
    for split in sorted({*manifest.counts, *SPLITS}):
        facts = [one for one in statistics.sample_summaries if one.split == split]
        recount = {"labels": count_labels(facts), "lesions": count_lesions(facts)}
        stated = manifest.counts.get(split, {})
        for kind in sorted({*stated, *words}):
            told, template = stated.get(kind, {}), words.get(kind, {})
            counted = {
                name: {word: recount[kind][name][word] for word in of}
                for name, of in template.items()
            }
            wrong = [name for name in {**counted, **told} if counted.get(name) != told.get(name)]
            if wrong:
                name, more = (
                    wrong[0],
                    f", and {len(wrong) - 1} more {kind} wrong" if wrong[1:] else "",
                )
                expected = f"{split} {kind}, {name}: {counted.get(name)}, as counted"
                yield VerificationIssue(
                    SHARD_MANIFEST_FILE, None, expected, f"{told.get(name)}{more}"
                )


# Running


def _run_checks(
    jobs: dict[Callable[[], ShardCheckResult], int], workers: int
) -> Iterator[ShardCheckResult]:
    """Reports as they come, under a progress bar that counts bytes."""
    columns = (
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reading", total=sum(jobs.values()))
        if min(workers, len(jobs)) <= 1 or sum(jobs.values()) < _MAX_SERIAL_BYTES:
            for job, size in jobs.items():
                yield job()
                progress.advance(bar, size)
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), spawn) as pool:
            futures = {pool.submit(job): size for job, size in jobs.items()}
            try:
                for future in as_completed(futures):
                    yield future.result()
                    progress.advance(bar, futures.pop(future))
            except BrokenProcessPool:
                raise UserError(
                    f"A worker was killed, most likely for memory ({workers} work at once): verify again with fewer "
                    f"--workers."
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


def _format_count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}" if number else f"no {word}s"


# Command line


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.verify", description="Read shards back and check them."
    )
    parser.add_argument(
        "place",
        nargs="?",
        help="folder or URL of shards (default: data.shards of the configuration)",
    )
    parser.add_argument(
        "--config", default="demo", help="configuration that names the folder (default demo)"
    )
    parser.add_argument(
        "--stats",
        type=Path,
        metavar="OUT",
        help="print figures, and write them and pictures to OUT",
    )
    parser.add_argument(
        "--workers", type=_positive_integer, default=2, help="processes (default 2)"
    )
    parser.add_argument(
        "--sample",
        type=_positive_integer,
        metavar="N",
        help="read only N samples, not whole shards",
    )
    parser.add_argument(
        "--show",
        type=_positive_integer,
        metavar="N",
        default=100,
        help="faults and notes to print, at most N of each (default 100)",
    )
    return parser.parse_args(arguments)


def _positive_integer(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 without faults, 1 with, 2 when nothing could be verified."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parse_arguments(arguments)
    console = Console(highlight=False)
    try:
        place = options.place or config.load_config(options.config).data.shards
        outcome = verify_shards(place, workers=options.workers, sample_count=options.sample)
        if options.stats and outcome.statistics.sample_summaries:
            # matplotlib takes a while to load, in each worker too.
            from data_pipeline.verify.statistics_figures import write_statistics

            for table in build_tables(outcome.statistics):
                console.print(table)
            write_statistics(outcome.statistics, place, options.stats)
            console.print(f"figures and pictures: {options.stats}", soft_wrap=True, markup=False)
    except UserError as error:
        log.error("%s", error)
        return 2
    for kind, remarks in (("note", outcome.issues.notes), ("fault", outcome.issues.faults)):
        for remark in remarks[: options.show]:
            console.print(f"{kind}: {remark}", soft_wrap=True, markup=False)
        if (more := len(remarks) - options.show) > 0:
            console.print(
                f"and {_format_count(more, f'more {kind}')} (--show {len(remarks)} prints all)",
                soft_wrap=True,
            )
    console.print(outcome.summary(), soft_wrap=True, markup=False)
    return 1 if outcome.issues.faults else 0


if __name__ == "__main__":
    sys.exit(main())
