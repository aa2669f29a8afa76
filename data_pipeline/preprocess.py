"""Cases to shards.

    python -m data_pipeline.preprocess [--config demo] [--out DIR_OR_URL] [--phantoms 48] [part.field=value …]
    python -m data_pipeline.preprocess --config large --ct-rate /data/CT-RATE --out /data/shards

With no arguments: two real chest CTs and seeded phantoms, on the grid of the `demo` configuration, to its folder of
shards. Shards are made in parallel, each by one process; a finished one is recorded in `.parts/`, so that a run that
was stopped goes on where it was, and one without changes has nothing to do. What cannot be used is listed in
`quarantine.jsonl` with its reason, and the rest goes on.
"""

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from data_pipeline.cases import Case
from data_pipeline.ct_rate.cases import ct_rate_cases
from data_pipeline.ct_rate.options import add_arguments, options_from_arguments
from data_pipeline.demo_cases import list_demo_cases
from data_pipeline.make_shards.progress import CaseProgress, print_run_summary
from data_pipeline.make_shards.shard_plan import (
    QUARANTINE_FILE,
    RECORD_FOLDER,
    RejectedCase,
    SampleOptions,
    ShardRecord,
    ShardTask,
    estimate_samples_per_shard,
    json_digest,
    plan_shards,
    read_finished_records,
)
from data_pipeline.make_shards.workers import (
    ProcessRunner,
    TaskRunner,
    explain_write_errors,
    run_in_this_process,
    run_tasks,
)
from data_pipeline.sample_cts import SAMPLE_CT_FOLDER as SAMPLES
from rectvlm import config
from rectvlm.data.sample import preprocessing_versions
from rectvlm.data.shard_manifest import (
    SHARD_MANIFEST_FILE,
    ShardManifest,
    ShardProvenance,
    read_manifest,
)
from rectvlm.data.shards import SHARD_INDEX_FILE, ShardIndex, WrittenShard, read_index, write_index
from rectvlm.data.store import ShardStore
from rectvlm.phantom.patient_plan import PHANTOM_STYLES, VARIED_STYLE
from rectvlm.types import UserError

log = logging.getLogger(__name__)

_LOCK_FILE = f"{RECORD_FOLDER}/lock"
_REJECTED_ADAPTER = TypeAdapter(RejectedCase)


@dataclass
class PreprocessResult:
    """What a run of `preprocess` came to."""

    index: ShardIndex
    manifest: ShardManifest
    rejected: list[RejectedCase] = field(default_factory=list)
    shards_made: int = 0
    """Shards that were made now; 0 when all was up to date."""


def preprocess(
    cases: Sequence[Case],
    place: str | Path | ShardStore,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    *,
    coarse_regions: bool = False,
    samples_per_shard: int = 8,
    workers: int = 0,
    runner: TaskRunner | None = None,
    timeout_seconds: float | None = None,
    retry_rejected: bool = False,
    policy: Mapping[str, Any] | None = None,
    dropped: Mapping[str, int] | None = None,
) -> PreprocessResult:
    """Bring cases to shards in a folder or at a URL; only shards whose cases, options or code changed are made anew.

    The result does not depend on `workers` or on how often it was interrupted. `index.json` is written last: a folder
    with an index is complete.

    Args:
        grid: voxels (z, y, x).
        spacing: mm (z, y, x).
        coarse_regions: estimate a region map from the CT where a case has none.
        workers: processes; 0 works in this one.
        runner: another way to run than `workers`, such as `on_ray.OnRay`.
        timeout: seconds that one case may take before it is set aside.
        retry: make the shards anew from which a case was set aside.
        policy: how the data set chose its cases, for the manifest.
        dropped: how many volumes it left out, by reason, for the manifest.

    Raises:
        UserError: a key twice, a patient in both splits, no usable case, another run at work on the same folder, or
            an output that cannot be written.
    """
    store = ShardStore(place)
    if store.local_folder is not None:
        store = ShardStore(
            store.local_folder.absolute()
        )  # workers elsewhere have another working directory
    tasks = plan_shards(
        cases,
        str(store),
        SampleOptions(grid, spacing, coarse_regions),
        samples_per_shard,
        timeout_seconds,
    )
    settings = {
        **(asdict(tasks[0].options) if tasks else {}),
        "samples_per_shard": samples_per_shard,
    }
    settings |= {"policy": dict(policy)} if policy else {}
    fingerprint = json_digest(
        [
            [task.fingerprint for task in tasks],
            settings,
            dict(dropped or {}),
            preprocessing_versions(),
        ]
    )
    if done := _read_previous_result(store, fingerprint, retry_rejected):
        return done
    with _lock_folder(store):
        parts = read_finished_records(tasks, store)
        if retry_rejected:
            parts = {name: part for name, part in parts.items() if not part.rejected}
        with explain_write_errors(store):
            store.remove_temporary_files()
            store.remove_temporary_files(RECORD_FOLDER)
            for name in (SHARD_INDEX_FILE, SHARD_MANIFEST_FILE, QUARANTINE_FILE):
                store.remove_file(name)
        waiting = [task for task in tasks if task.name not in parts]
        try:
            _make_shards(
                waiting,
                parts,
                len(cases),
                runner or (ProcessRunner(workers) if workers else run_in_this_process),
            )
        finally:
            with suppress(
                OSError
            ):  # what a worker was at when an error, which counts more, ended the run
                for folder in ("", RECORD_FOLDER):
                    store.remove_temporary_files(folder)
        rejected = [one for task in tasks for one in parts[task.name].rejected]
        provenance = ShardProvenance(
            fingerprint,
            tasks[0].code_sha256 if tasks else None,
            settings,
            dict(dropped or {}),
            dict(sorted(Counter(one.reason for one in rejected).items())),
        )
        with explain_write_errors(store):
            index = _write_index_files(store, tasks, parts, rejected, provenance)
    return PreprocessResult(index, read_manifest(store), rejected, len(waiting))


def _make_shards(
    waiting: Sequence[ShardTask], parts: dict[str, ShardRecord], total: int, runner: TaskRunner
) -> None:
    before = total - sum(len(task.cases) for task in waiting)
    if waiting:
        done = f"; {before} were done before" if before else ""
        log.info("%d cases%s; shards to make: %d", total, done, len(waiting))
    with CaseProgress(total, before) as progress:
        for task, part in run_tasks(waiting, runner):
            parts[task.name] = part
            progress.advance(len(task.cases), len(part.rejected))


def _write_index_files(
    store: ShardStore,
    tasks: Sequence[ShardTask],
    parts: dict[str, ShardRecord],
    rejected: list[RejectedCase],
    provenance: ShardProvenance,
) -> ShardIndex:
    """Write quarantine list, manifest and index, and remove records of an earlier plan."""
    store.write_file(
        QUARANTINE_FILE, b"".join(_REJECTED_ADAPTER.dump_json(one) + b"\n" for one in rejected)
    )
    shards = [shard for task in tasks if (shard := parts[task.name].shard)]
    if not shards:
        number = sum(len(task.cases) for task in tasks)
        raise UserError(
            f"None of {number} cases could be used: see the reasons in {store / QUARANTINE_FILE}."
        )
    _require_all_shards(store, shards)
    options = tasks[0].options
    index = write_index(
        store, shards, grid=options.grid, spacing=options.spacing, provenance=provenance
    )
    for stale in (
        set(store.list_names(RECORD_FOLDER)) - {task.record_name for task in tasks} - {_LOCK_FILE}
    ):
        store.remove_file(stale)
    return index


def _require_all_shards(store: ShardStore, shards: Sequence[WrittenShard]) -> None:
    sizes = store.list_sizes()
    gone = [one.facts.name for one in shards if sizes.get(one.facts.name) != one.facts.bytes]
    if gone:
        raise UserError(
            f"{store} lacks {len(gone)} shards that were written, such as {gone[0]}: expected a folder that stays and "
            f"that all workers share; check it, then give the same command again."
        )


def _read_previous_result(
    store: ShardStore, fingerprint: str, retry: bool
) -> PreprocessResult | None:
    """The outcome of an earlier run to the same end, if nothing of it has gone."""
    try:
        index, manifest = read_index(store), read_manifest(store)
        lines = store.read_file(QUARANTINE_FILE).splitlines()
    except (UserError, OSError):
        return None
    sizes = store.list_sizes()
    whole = all(sizes.get(one.name) == one.bytes for one in manifest.shards)
    if not whole or manifest.provenance.fingerprint != fingerprint or (retry and lines):
        return None
    return PreprocessResult(
        index, manifest, [_REJECTED_ADAPTER.validate_json(line) for line in lines]
    )


@contextmanager
def _lock_folder(store: ShardStore) -> Iterator[None]:
    """Keep a second run off a folder. The system takes the lock back from a run that is killed; a URL has none."""
    if store.local_folder is None:
        yield
        return
    with explain_write_errors(store):
        (store.local_folder / RECORD_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = FileLock(store.local_folder / _LOCK_FILE, timeout=3)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"Another run is writing to {store}: wait for its end, stop it, or name another folder with --out."
            ) from None
        except NotImplementedError:
            log.warning("%s cannot be locked on its file system: start no second run on it.", store)
    try:
        yield
    finally:
        lock.release()


# Command line


def _count_usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number_parser(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    """For argparse: a finite number that is not below `least`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not least <= value < float("inf"):
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"expected a {what} from {least} on, found {text!r}")
        return value

    return read


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.preprocess", description="Make shards from cases."
    )
    add = parser.add_argument
    add("--config", default="demo", help="configuration whose grid, spacing and folder are used")
    add(
        "--out",
        help="folder or fsspec URL of the shards (default: data.shards of the configuration)",
    )
    add(
        "--phantoms",
        type=_number_parser(int, 0),
        help="synthetic training cases (default 48; none with --ct-rate)",
    )
    add(
        "--valid-phantoms",
        type=_number_parser(int, 0),
        help="synthetic validation cases (default 12; none with --ct-rate)",
    )
    add(
        "--phantom-style",
        choices=PHANTOM_STYLES,
        default=VARIED_STYLE.name,
        help="how phantoms look (default: %(default)s)",
    )
    add("--no-samples", action="store_true", help="leave the two real CTs out; needs no network")
    add(
        "--workers",
        type=_number_parser(int, 0),
        default=_count_usable_cpus(),
        help="processes (default: CPUs at hand, %(default)s); 0: in this one",
    )
    add(
        "--ray",
        metavar="ADDRESS",
        help="work on a Ray cluster instead: its address, auto, or local",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--samples-per-shard",
        type=_number_parser(int, 1),
        default=8,
        help="cases of one tar (default 8)",
    )
    size.add_argument(
        "--shard-mb",
        type=_number_parser(float, 0.1),
        help="choose the number of cases so that a tar has about so many MiB",
    )
    add(
        "--timeout",
        type=_number_parser(float, 0),
        default=600,
        help="seconds after which a case is set aside (default 600; 0: never)",
    )
    add("--coarse-regions", action=argparse.BooleanOptionalAction, default=False,
        help="estimate a region map where a case has none (default: no)")  # fmt: skip
    add("--retry", action="store_true", help="try the cases again that an earlier run set aside")
    add(
        "--strict",
        action="store_true",
        help="exit with 1 when a case was set aside, after all others are done",
    )
    add_arguments(parser)
    add("overrides", nargs="*", metavar="part.field=value", help="changes of the configuration")
    return parser.parse_intermixed_args(arguments)


def _list_cases(
    options: argparse.Namespace, slice_spacing: float
) -> tuple[list[Case], dict[str, Any], dict[str, int]]:
    """Cases, policy and dropped volumes of what the command line names."""
    if options.ct_rate is None:
        train, valid = options.phantoms, options.valid_phantoms
        samples = None if options.no_samples else SAMPLES
        numbers = 48 if train is None else train, 12 if valid is None else valid
        return list_demo_cases(*numbers, samples, options.phantom_style), {}, {}
    log.info("reading the tables of %s", options.ct_rate)
    found = ct_rate_cases(options.ct_rate, options_from_arguments(options, slice_spacing))
    phantoms = list_demo_cases(
        options.phantoms or 0, options.valid_phantoms or 0, None, options.phantom_style
    )
    dropped = {reason: len(names) for reason, names in sorted(found.dropped.items())}
    for reason, number in dropped.items():
        log.info("left out %d: %s", number, reason)
    for what, number in found.counts.items():
        if number:
            log.info("%s: %d", what, number)
    return found.cases + phantoms, {"CT-RATE": {**found.policy, "counts": found.counts}}, dropped


def _connect_to_ray(options: argparse.Namespace) -> TaskRunner | None:
    if options.ray is None:
        return None
    from data_pipeline.make_shards.ray_workers import RayRunner

    return RayRunner(options.ray)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parse_arguments(arguments)
    start = time.monotonic()
    try:
        wanted = config.load_config(options.config, options.overrides).data
        place = options.out or str(wanted.shards)
        cases, policy, dropped = _list_cases(options, wanted.spacing[0])
        per_shard = (
            estimate_samples_per_shard(options.shard_mb, wanted.grid)
            if options.shard_mb
            else options.samples_per_shard
        )
        outcome = preprocess(
            cases,
            place,
            wanted.grid,
            wanted.spacing,
            coarse_regions=options.coarse_regions,
            samples_per_shard=per_shard,
            workers=options.workers,
            runner=_connect_to_ray(options),
            timeout_seconds=options.timeout or None,
            retry_rejected=options.retry,
            policy=policy,
            dropped=dropped,
        )
    except UserError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("stopped; finished shards are kept, and the same command goes on with the rest")
        return 130
    print_run_summary(
        place, outcome.manifest, outcome.rejected, outcome.shards_made, time.monotonic() - start
    )
    if options.strict and outcome.rejected:
        log.error("--strict: exit status 1, since cases were set aside")
    return 1 if options.strict and outcome.rejected else 0


if __name__ == "__main__":
    sys.exit(main())
