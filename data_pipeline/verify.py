"""Read shards back and check everything in them.

    python -m data_pipeline.verify [FOLDER or URL] [--stats OUT] [--workers 2] [--sample N] [--show 100]

Reads each shard once, whole: sizes, checksums, the tar as WebDataset walks it, the offsets of the index, and every
sample (see `data_pipeline.sample_checks`); then what must hold across shards. Each fault is one line; the exit status
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
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_pipeline.checks import ShardReport, check_entry, check_shard
from data_pipeline.sample_checks import Remark, Remarks
from data_pipeline.stats import SPLITS, Facts, Statistics, count_labels, count_lesions, spread, tables
from rectvlm import config
from rectvlm.data.manifest import MANIFEST, Manifest, add_counts, dump_manifest, read_manifest
from rectvlm.data.sample import MEMBERS, SCHEMA
from rectvlm.data.shards import INDEX, Entry, Index, Shard, dump_index, read_index
from rectvlm.data.store import Store
from rectvlm.types import UserError

log = logging.getLogger(__name__)

BESIDE = (INDEX, MANIFEST, "quarantine.jsonl")
"""What may lie beside the tars."""
_SMALL = 64 << 20
"""Bytes that are read sooner than processes start."""


@dataclass
class Outcome:
    """What a run of `verify` found."""

    remarks: Remarks = field(default_factory=Remarks)
    statistics: Statistics = field(default_factory=Statistics)
    shards: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def summary(self) -> str:
        """One line with the figures of the run."""
        faults, notes, seconds = len(self.remarks.faults), len(self.remarks.notes), max(self.seconds, 1e-9)
        return (
            f"{len(self.statistics.facts):,} samples in {self.shards:,} shards, {self.bytes / 1e6:,.1f} MB in "
            f"{self.seconds:,.1f} s ({self.bytes / 1e6 / seconds:,.1f} MB/s): {_count(faults, 'fault')}, "
            f"{_count(notes, 'note')}"
        )


def verify(place: str | Path | Store, *, workers: int = 1, sample: int | None = None) -> Outcome:
    """Read shards back and check them.

    Args:
        workers: processes; 1 works in this one.
        sample: read only so many samples, spread over all shards, and leave out what needs whole shards.

    Raises:
        UserError: a place that cannot be opened, or a worker that was killed.
    """
    began = time.monotonic()
    store, outcome = Store(place), Outcome()
    try:
        index = read_index(store)
    except UserError as error:
        outcome.remarks.faults.append(Remark(INDEX, None, "the index of finished shards", f"that {error}"))
        return outcome
    faults = outcome.remarks.faults
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(store)
    except UserError as error:
        faults.append(Remark(MANIFEST, None, "the manifest of finished shards", f"that {error}"))
    faults += _check_index(store, index)
    facts = {} if manifest is None else {one.name: one for one in manifest.shards}
    if manifest is not None:
        faults += _check_manifest(store, manifest, index)
    outcome.remarks.add(_check_folder(store, index))
    wanted = index.grid, index.spacing
    jobs: dict[Callable[[], ShardReport], int]
    if sample is None:
        jobs = {
            partial(check_shard, store, shard, facts.get(shard.name), *wanted): sum(
                size for entry in shard.samples for _, size in entry.members.values()
            )
            for shard in index.shards
        }
    else:
        chosen = spread(index.select(None), sample)
        jobs = {partial(check_entry, store, one, *wanted): sum(n for _, n in one.members.values()) for one in chosen}
    reports = list(_run(jobs, workers))
    # Sorted, since workers finish in any order and two runs must print the same.
    for report in sorted(reports, key=lambda report: report.name):
        outcome.remarks.add(report.remarks)
        outcome.statistics.facts += report.facts
        outcome.bytes += report.bytes
        for split, counts in report.hu.items():
            outcome.statistics.hu[split] = outcome.statistics.hu.get(split, np.zeros_like(counts)) + counts
    outcome.shards = len({report.name for report in reports})
    faults += _check_together(outcome.statistics.facts)
    if sample is None and manifest is not None:
        # Where samples could not be read the counts differ for that reason, which is named already.
        if len(outcome.statistics.facts) == sum(len(shard.samples) for shard in index.shards):
            faults += _check_counts(manifest, outcome.statistics)
        outcome.remarks.notes += _check_versions(manifest, outcome.statistics.facts)
    outcome.seconds = time.monotonic() - began
    return outcome


# The index and the folder


def _check_index(store: Store, index: Index) -> Iterator[Remark]:
    """What the index must be by itself: of the schema, with each shard and key once and each patient in one split."""
    yield from _check_fields(store, INDEX, index, dump_index(index))
    if index.schema != SCHEMA:
        yield Remark(INDEX, None, f"schema {SCHEMA}", f"schema {index.schema}")
    if min(index.grid) < 1 or not all(0 < mm < 1e3 for mm in index.spacing):
        yield Remark(INDEX, None, "a grid of positive sides and spacings", f"{index.grid} of {index.spacing} mm")
    if not index.shards:
        yield Remark(INDEX, None, "at least one shard", "none")
    for name, number in Counter(shard.name for shard in index.shards).items():
        if number > 1:
            yield Remark(INDEX, None, "each shard once", f"{name} {number} times")
    for shard in index.shards:
        yield from _check_entries(shard)
    entries = [entry for shard in index.shards for entry in shard.samples]
    for key, number in Counter(entry.key for entry in entries).items():
        if number > 1:
            yield Remark(INDEX, key, "each key once", f"it {number} times")
    for patient, splits in _splits(entries).items():
        if len(splits) > 1:
            yield Remark(INDEX, None, f"patient {patient} in one split", f"samples in {' and '.join(sorted(splits))}")


def _check_fields(store: Store, name: str, understood: Index | Manifest, written: bytes) -> Iterator[Remark]:
    """Nothing in the file but what was read from it: no unknown field, no default in place of a missing one, and
    no byte other than preprocessing writes."""
    data = store.read(name)
    stored, read = json.loads(data), json.loads(json.dumps(asdict(understood)))
    if stored != read:
        yield Remark(name, None, "the fields and types of its schema only", _first_difference(read, stored))
    elif data != written:
        yield Remark(name, None, "JSON as preprocessing writes it", "the same values in other bytes")


def _check_manifest(store: Store, manifest: Manifest, index: Index) -> Iterator[Remark]:
    """The manifest is of the schema and speaks of the index's shards, once each."""
    yield from _check_fields(store, MANIFEST, manifest, dump_manifest(manifest))
    digest = hashlib.sha256(store.read(MANIFEST)).hexdigest()
    if digest != index.manifest:
        yield Remark(MANIFEST, None, f"SHA-256 {index.manifest or '(none)'}, which the index has", digest)
    if manifest.schema != SCHEMA:
        yield Remark(MANIFEST, None, f"schema {SCHEMA}", f"schema {manifest.schema}")
    indexed = {shard.name: shard for shard in index.shards}
    for name, number in Counter(one.name for one in manifest.shards).items():
        if number > 1:
            yield Remark(MANIFEST, None, "each shard once", f"{name} {number} times")
    for name in sorted(set(indexed) - {one.name for one in manifest.shards}):
        yield Remark(MANIFEST, None, f"{name}, which the index names", "no such shard")
    for one in manifest.shards:
        if one.name not in indexed:
            yield Remark(MANIFEST, None, "only shards that the index names", one.name)
            continue
        entries = indexed[one.name].samples
        found = (len(entries), sorted({entry.split for entry in entries}))
        if found != (one.samples, [one.split]):
            yield Remark(
                MANIFEST,
                None,
                f"{one.samples} {one.split} samples in {one.name}",
                f"{found[0]} of {found[1]} in the index",
            )


def _check_entries(shard: Shard) -> Iterator[Remark]:
    if not shard.samples:
        yield Remark(INDEX, None, f"at least one sample in {shard.name}", "none")
    others = sorted({entry.shard for entry in shard.samples} - {shard.name})
    if others:
        yield Remark(INDEX, None, f"samples of {shard.name} under that name", f"some of {', '.join(others)}")
    splits = {entry.split for entry in shard.samples}
    if any(not shard.name.startswith(f"{split}-") for split in splits):
        yield Remark(INDEX, None, f"samples of one split in {shard.name}, by its name", " and ".join(sorted(splits)))
    for entry in shard.samples:
        if set(entry.members) != set(MEMBERS):
            yield Remark(INDEX, entry.key, f"offsets of {', '.join(MEMBERS)}", f"of {', '.join(entry.members)}")


def _splits(samples: Sequence[Entry] | Sequence[Facts]) -> dict[str, set[str]]:
    """By patient: the splits that have samples of the patient."""
    splits: dict[str, set[str]] = {}
    for one in samples:
        splits.setdefault(one.patient, set()).add(one.split)
    return splits


def _first_difference(expected: Any, found: Any, path: str = "") -> str:
    """Where two JSON trees first differ, in words."""
    if isinstance(expected, dict) and isinstance(found, dict):
        pairs = [
            (f"{path}.{name}".lstrip("."), expected.get(name, _NOTHING), found.get(name, _NOTHING))
            for name in {**expected, **found}
        ]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(expected, found, strict=True))]
    else:
        return f"{found!r} where {expected!r} is read, at {path}"
    return next(_first_difference(a, b, at) for at, a, b in pairs if a != b)


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


def _check_folder(store: Store, index: Index) -> Remarks:
    """A tar that the index does not name would be read by whoever reads `*.tar`; other files only puzzle."""
    remarks = Remarks()
    try:
        names = store.names()
    except OSError as error:
        remarks.notes.append(Remark(str(store), None, "a place whose files can be listed", str(error)))
        return remarks
    for name in sorted(set(names) - {shard.name for shard in index.shards} - set(BESIDE)):
        kind = remarks.faults if name.endswith(".tar") else remarks.notes
        kind.append(Remark(name, None, "only files of the data set", "a file that the index does not name"))
    return remarks


# Across shards


def _check_together(facts: Sequence[Facts]) -> Iterator[Remark]:
    """What must hold between samples, by what they say themselves."""
    shards: dict[str, str] = {}
    for one in facts:
        if one.key in shards:
            yield Remark(one.shard, one.key, "each key once", f"it in {shards[one.key]}, too")
        shards[one.key] = one.shard
    for patient, splits in _splits(facts).items():
        if len(splits) > 1:
            yield Remark(
                "samples", None, f"patient {patient} in one split", f"samples in {' and '.join(sorted(splits))}"
            )
    first: dict[str, Facts] = {}
    for one in facts:
        other = first.setdefault(one.scan, one)
        for name in ("patient", "labels", "report"):
            if getattr(one, name) != getattr(other, name):
                yield Remark(
                    one.shard, one.key, f"the {name} of {other.key}, as both are of scan {one.scan}", "another"
                )


def _check_versions(manifest: Manifest, facts: Sequence[Facts]) -> Iterator[Remark]:
    """Samples made by other versions than the manifest's may differ in the last digit."""
    others = Counter(one.versions for one in facts if one.versions and dict(one.versions) != manifest.versions)
    for versions, number in others.items():
        found = f"{dict(versions)} in {_count(number, 'sample')}"
        yield Remark(MANIFEST, None, f"samples of the manifest's versions {manifest.versions}", found)


def _check_counts(manifest: Manifest, statistics: Statistics) -> Iterator[Remark]:
    """Recount labels and lesions by split, in the words that a manifest uses."""
    words = add_counts([])
    for split in sorted({*manifest.counts, *SPLITS}):
        facts = [one for one in statistics.facts if one.split == split]
        recount = {"labels": count_labels(facts), "lesions": count_lesions(facts)}
        stated = manifest.counts.get(split, {})
        for kind in sorted({*stated, *words}):
            told, template = stated.get(kind, {}), words.get(kind, {})
            counted = {name: {word: recount[kind][name][word] for word in of} for name, of in template.items()}
            wrong = [name for name in {**counted, **told} if counted.get(name) != told.get(name)]
            if wrong:
                name, more = wrong[0], f", and {len(wrong) - 1} more {kind} wrong" if wrong[1:] else ""
                expected = f"{split} {kind}, {name}: {counted.get(name)}, as counted"
                yield Remark(MANIFEST, None, expected, f"{told.get(name)}{more}")


# Running


def _run(jobs: dict[Callable[[], ShardReport], int], workers: int) -> Iterator[ShardReport]:
    """Reports as they come, under a progress bar that counts bytes."""
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reading", total=sum(jobs.values()))
        if min(workers, len(jobs)) <= 1 or sum(jobs.values()) < _SMALL:
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


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}" if number else f"no {word}s"


# Command line


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.verify", description="Read shards back and check them."
    )
    parser.add_argument("place", nargs="?", help="folder or URL of shards (default: data.shards of the configuration)")
    parser.add_argument("--config", default="demo", help="configuration that names the folder (default demo)")
    parser.add_argument("--stats", type=Path, metavar="OUT", help="print figures, and write them and pictures to OUT")
    parser.add_argument("--workers", type=_positive, default=2, help="processes (default 2)")
    parser.add_argument("--sample", type=_positive, metavar="N", help="read only N samples, not whole shards")
    parser.add_argument(
        "--show",
        type=_positive,
        metavar="N",
        default=100,
        help="faults and notes to print, at most N of each (default 100)",
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 without faults, 1 with, 2 when nothing could be verified."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parse(arguments)
    console = Console(highlight=False)
    try:
        place = options.place or config.load(options.config).data.shards
        outcome = verify(place, workers=options.workers, sample=options.sample)
        if options.stats and outcome.statistics.facts:
            # matplotlib takes a while to load, in each worker too.
            from data_pipeline.pictures import write_statistics

            for table in tables(outcome.statistics):
                console.print(table)
            write_statistics(outcome.statistics, place, options.stats)
            console.print(f"figures and pictures: {options.stats}", soft_wrap=True, markup=False)
    except UserError as error:
        log.error("%s", error)
        return 2
    for kind, remarks in (("note", outcome.remarks.notes), ("fault", outcome.remarks.faults)):
        for remark in remarks[: options.show]:
            console.print(f"{kind}: {remark}", soft_wrap=True, markup=False)
        if (more := len(remarks) - options.show) > 0:
            console.print(f"and {_count(more, f'more {kind}')} (--show {len(remarks)} prints all)", soft_wrap=True)
    console.print(outcome.summary(), soft_wrap=True, markup=False)
    return 1 if outcome.remarks.faults else 0


if __name__ == "__main__":
    sys.exit(main())
