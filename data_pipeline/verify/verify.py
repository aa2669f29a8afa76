"""Command that reads shards back and checks everything in them.

    python -m data_pipeline.verify [FOLDER or URL] [--stats OUT] [--workers 2] [--sample N] [--show
    100]

It reads each shard once: sizes, checksums, the tar as WebDataset walks it, the offsets of the
index, and every sample (see `sample_checks`); then it checks what must hold across shards. Each
fault is one line; the exit status is 1 when there is any. `--sample N` reads only N samples, spread
over the shards, by their offsets, without checksums and counts. `--stats OUT` prints statistics of
what was read and writes them to OUT with figures.
"""

import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_pipeline.verify.index_checks import (
    check_across_samples,
    check_counts,
    check_folder,
    check_index,
    check_manifest,
    check_versions,
    format_count,
)
from data_pipeline.verify.issues import IssueRecorder, VerificationIssues
from data_pipeline.verify.shard_checks import (
    ShardCheckResult,
    ShardGrid,
    check_sample_by_offsets,
    check_shard,
)
from data_pipeline.verify.statistics import DatasetStatistics, add_histogram, pick_evenly
from data_pipeline.verify.statistics_tables import build_tables
from rectvlm.cli_options import CommandParser, add_options, argument, options_from_namespace
from rectvlm.config import load_config
from rectvlm.data.shard_manifest import SHARD_MANIFEST_FILE, ShardManifest, read_manifest
from rectvlm.data.shards import SHARD_INDEX_FILE, SampleLocation, ShardIndex, read_index
from rectvlm.data.store import ShardStore
from rectvlm.files import explain_os_error, require_writable_folder
from rectvlm.optional_packages import require_extra
from rectvlm.types import UserError

log = logging.getLogger(__name__)

_MAX_SERIAL_BYTES = 64 << 20
"""Size of shards that are read sooner than worker processes start, bytes."""

CheckJobs = dict[Callable[[], ShardCheckResult], int]
"""Checks to run, each with the bytes that it reads."""


@dataclass
class VerificationResult:
    """Issues and statistics of a folder of shards."""

    issues: VerificationIssues = field(default_factory=VerificationIssues)
    statistics: DatasetStatistics = field(default_factory=DatasetStatistics)
    shards_read: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    """Duration of the run, seconds."""

    def describe(self) -> str:
        """Describe the run in one line."""
        sample_count = len(self.statistics.sample_summaries)
        megabytes = self.bytes_read / 1e6
        megabytes_per_second = megabytes / max(self.seconds, 1e-9)
        faults = format_count(len(self.issues.faults), "fault")
        notes = format_count(len(self.issues.notes), "note")
        return (
            f"{sample_count:,} samples in {self.shards_read:,} shards, {megabytes:,.1f} MB in "
            f"{self.seconds:,.1f} s ({megabytes_per_second:,.1f} MB/s): {faults}, {notes}"
        )


def verify_shards(
    folder: str | Path | ShardStore, *, workers: int = 1, sample_count: int | None = None
) -> VerificationResult:
    """Read shards back and check them.

    Args:
        folder: path or URL of the shards.
        workers: number of processes; 1 works in this process.
        sample_count: read only this many samples, spread over all shards, and leave out the checks
            that need whole shards.

    Raises:
        UserError: a place that cannot be opened, or a worker that was killed.
    """
    start = time.monotonic()
    store = ShardStore(folder)
    result = VerificationResult()
    issues = result.issues
    try:
        index = read_index(store)
    except UserError as error:
        recorder = IssueRecorder(issues, SHARD_INDEX_FILE)
        recorder.record_fault("the index of finished shards", f"this: {error}")
        return result
    manifest: ShardManifest | None = None
    try:
        manifest = read_manifest(store)
    except UserError as error:
        recorder = IssueRecorder(issues, SHARD_MANIFEST_FILE)
        recorder.record_fault("the manifest of finished shards", f"this: {error}")
    check_index(store, index, issues)
    if manifest is not None:
        check_manifest(store, manifest, index, issues)
    check_folder(store, index, issues)

    jobs = _plan_jobs(store, index, manifest, sample_count)
    check_results = list(_run_checks(jobs, workers))
    # Sorted, since workers finish in any order and two runs must print the same.
    for check_result in sorted(check_results, key=lambda check_result: check_result.shard_name):
        _add_check_result(result, check_result)
    result.shards_read = len({check_result.shard_name for check_result in check_results})

    summaries = result.statistics.sample_summaries
    check_across_samples(summaries, issues)
    if sample_count is None and manifest is not None:
        # Where samples could not be read the counts differ for that reason, which is named already.
        if len(summaries) == sum(len(shard.samples) for shard in index.shards):
            check_counts(manifest, result.statistics, issues)
        check_versions(manifest, summaries, issues)
    result.seconds = time.monotonic() - start
    return result


def _plan_jobs(
    store: ShardStore, index: ShardIndex, manifest: ShardManifest | None, sample_count: int | None
) -> CheckJobs:
    """Plan the checks of all shards, or of some samples."""
    grid = ShardGrid(index.grid, index.spacing)
    jobs: CheckJobs = {}
    if sample_count is not None:
        for location in pick_evenly(index.select_split(None), sample_count):
            jobs[partial(check_sample_by_offsets, store, location, grid)] = _size_bytes(location)
        return jobs
    manifest_shards = manifest.shards if manifest is not None else []
    manifest_shard_by_name = {shard.name: shard for shard in manifest_shards}
    for shard in index.shards:
        job = partial(check_shard, store, shard, manifest_shard_by_name.get(shard.name), grid)
        jobs[job] = sum(_size_bytes(location) for location in shard.samples)
    return jobs


def _size_bytes(location: SampleLocation) -> int:
    return sum(size for _, size in location.members.values())


def _add_check_result(result: VerificationResult, check_result: ShardCheckResult) -> None:
    result.issues.extend(check_result.issues)
    result.statistics.sample_summaries += check_result.sample_summaries
    result.bytes_read += check_result.bytes_read
    for split, counts in check_result.hu_histograms.items():
        add_histogram(result.statistics.hu_histograms, split, counts)


def _run_checks(jobs: CheckJobs, workers: int) -> Iterator[ShardCheckResult]:
    """Run the checks under a progress bar that counts bytes; yield results as they come."""
    columns = (
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    total_bytes = sum(jobs.values())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reading", total=total_bytes)
        if min(workers, len(jobs)) <= 1 or total_bytes < _MAX_SERIAL_BYTES:
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
                    f"A worker was killed, most likely for memory ({workers} work at once): verify "
                    f"again with fewer --workers."
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


# Command line


@dataclass(frozen=True)
class VerifyOptions:
    """Options of the command."""

    folder: str | None = None
    """Folder or URL of the shards; by default data.shards of the configuration."""
    config: str = "demo"
    """Configuration that names the folder."""
    stats: Path | None = field(default=None, metadata=argument(metavar="OUT"))
    """Folder for statistics and figures of what was read, which are printed as well."""
    workers: int = field(default=2, metadata=argument(minimum=1))
    """Number of processes."""
    sample: int | None = field(default=None, metadata=argument(metavar="N", minimum=1))
    """Number of samples that are read instead of whole shards."""
    show: int = field(default=100, metadata=argument(metavar="N", minimum=1))
    """Number of faults, and of notes, that are printed at most."""


def _parse_arguments(arguments: Sequence[str] | None) -> VerifyOptions:
    parser = CommandParser(
        prog="python -m data_pipeline.verify", description="Read shards back and check them."
    )
    parser.add_argument(
        "folder",
        nargs="?",
        help="folder or URL of the shards (default: data.shards of the configuration)",
    )
    add_options(parser, VerifyOptions, exclude=["folder"])
    return options_from_namespace(VerifyOptions, parser.parse_args(arguments))


def _write_statistics(
    result: VerificationResult, folder: str, stats: Path, console: Console
) -> None:
    # matplotlib takes a while to load, in each worker too.
    from data_pipeline.verify.statistics_figures import write_statistics

    for table in build_tables(result.statistics):
        console.print(table)
    try:
        write_statistics(result.statistics, folder, stats)
    except OSError as error:  # what was found is told all the same
        log.error("%s", explain_os_error(error))
        return
    console.print(f"figures and pictures: {stats}", soft_wrap=True, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status.

    It is 0 without faults, 1 with faults, such as a missing index, and 2 when the place cannot be
    opened.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parse_arguments(arguments)
    console = Console(highlight=False)
    try:
        if options.stats:
            require_extra("train")
            require_writable_folder(options.stats)
        folder = options.folder or load_config(options.config).data.shards
        result = verify_shards(folder, workers=options.workers, sample_count=options.sample)
        if options.stats and result.statistics.sample_summaries:
            _write_statistics(result, folder, options.stats, console)
    except UserError as error:
        log.error("%s", error)
        return 2
    for noun, issues in (("note", result.issues.notes), ("fault", result.issues.faults)):
        for issue in issues[: options.show]:
            console.print(f"{noun}: {issue}", soft_wrap=True, markup=False)
        hidden_count = len(issues) - options.show
        if hidden_count > 0:
            hidden = format_count(hidden_count, f"more {noun}")
            console.print(f"and {hidden} (--show {len(issues)} prints all)", soft_wrap=True)
    console.print(result.describe(), soft_wrap=True, markup=False)
    return 1 if result.issues.faults else 0


if __name__ == "__main__":
    sys.exit(main())
