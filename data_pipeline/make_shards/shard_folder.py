"""Cases to a folder of shards: only what is missing or changed is made, then the index is written.

`index.json` is written last, so a folder with an index is complete. Finished shards are recorded in
`.parts/`, so a run that was stopped continues with the rest.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_pipeline.cases import Case
from data_pipeline.make_shards.progress import CaseProgress
from data_pipeline.make_shards.shard_plan import (
    QUARANTINE_FILE,
    RECORD_FOLDER,
    RejectedCase,
    SampleOptions,
    ShardRecord,
    ShardTask,
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
from rectvlm.data.sample import preprocessing_versions
from rectvlm.data.shard_manifest import (
    LABELS_SETTING,
    SHARD_MANIFEST_FILE,
    ShardManifest,
    ShardProvenance,
    read_manifest,
)
from rectvlm.data.shards import SHARD_INDEX_FILE, ShardIndex, WrittenShard, read_index, write_index
from rectvlm.data.store import ShardStore
from rectvlm.files import json_sha256
from rectvlm.folder_lock import FolderLock
from rectvlm.types import UserError

log = logging.getLogger(__name__)

_LOCK_FILE = f"{RECORD_FOLDER}/lock"
_REJECTED_ADAPTER = TypeAdapter(RejectedCase)


@dataclass
class PreprocessResult:
    """The folder that a run of `preprocess` left, and what the run did."""

    index: ShardIndex
    manifest: ShardManifest
    rejected: list[RejectedCase] = field(default_factory=list)
    """All cases that could not be used, also those of earlier runs."""
    shards_made: int = 0
    """Number of shards that this run made; 0 when all were up to date."""


def preprocess(
    cases: Sequence[Case],
    folder: str | Path | ShardStore,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    *,
    coarse_regions: bool = False,
    samples_per_shard: int = 8,
    workers: int = 0,
    runner: TaskRunner | None = None,
    timeout_seconds: float | None = None,
    retry_rejected: bool = False,
    labels: str | None = None,
    policy: Mapping[str, Any] | None = None,
    dropped: Mapping[str, int] | None = None,
) -> PreprocessResult:
    """Bring cases to shards in a folder or at a URL.

    Only shards whose cases, options or code changed are made again. The result does not depend on
    `workers` or on how often the run was interrupted.

    Args:
        cases: of all splits.
        folder: path or URL of the shards.
        grid: size of the samples' grid (z, y, x), voxels.
        spacing: spacing of the samples' grid (z, y, x), mm.
        coarse_regions: estimate a region map from the CT where a case has none.
        samples_per_shard: cases of one shard.
        workers: number of processes; 0 works in this process.
        runner: another way to run than `workers`, such as `ray_workers.RayRunner`.
        timeout_seconds: time that one case may take before it is set aside.
        retry_rejected: make the shards again from which a case was set aside.
        labels: origin of the labels in words, for the manifest.
        policy: how the data set chose its cases, for the manifest.
        dropped: number of volumes that the data set left out, by reason, for the manifest.

    Raises:
        UserError: a key twice, a patient in two splits, no usable case, another run at work on the
            same folder, or an output that cannot be written.
    """
    store = ShardStore(folder)
    if store.local_folder is not None:
        # Workers on other machines have another working directory.
        store = ShardStore(store.local_folder.absolute())
    options = SampleOptions(grid, spacing, coarse_regions)
    tasks = plan_shards(cases, str(store), options, samples_per_shard, timeout_seconds)
    provenance = _describe_plan(tasks, samples_per_shard, labels, policy or {}, dropped or {})
    previous = _read_previous_result(store, provenance.fingerprint)
    if previous is not None and not (retry_rejected and previous.rejected):
        return previous

    with _lock_folder(store):
        _require_own_index(store)
        records = read_finished_records(tasks, store)
        if retry_rejected:
            records = {name: record for name, record in records.items() if not record.rejected}
        elif not records:
            _tell_of_other_shards(store)
        with explain_write_errors(store):
            _remove_temporary_files(store)
            for name in (SHARD_INDEX_FILE, SHARD_MANIFEST_FILE, QUARANTINE_FILE):
                store.remove_file(name)

        waiting = [task for task in tasks if task.name not in records]
        if runner is None:
            runner = ProcessRunner(workers) if workers else run_in_this_process
        try:
            records |= _make_shards(waiting, len(cases), runner)
        finally:
            # An error that ends the run counts more than the half-written files of its workers.
            with suppress(OSError):
                _remove_temporary_files(store)

        rejected: list[RejectedCase] = []
        for task in tasks:
            rejected += records[task.name].rejected
        reasons = Counter(case.reason for case in rejected)
        provenance = replace(provenance, set_aside=dict(sorted(reasons.items())))
        with explain_write_errors(store):
            index = _write_index_files(store, tasks, records, rejected, provenance)
    return PreprocessResult(index, read_manifest(store), rejected, len(waiting))


def _tell_of_other_shards(store: ShardStore) -> None:
    """Say that shards go of which this run can use none."""
    with suppress(UserError, OSError):  # where there are none
        log.warning(
            "%s holds %d shards of other cases, settings or code, which this run replaces",
            store,
            len(read_manifest(store).shards),
        )


def _require_own_index(store: ShardStore) -> None:
    """Refuse a folder whose `index.json` or `manifest.json` is another program's: it would go.

    Raises:
        UserError: it lists no shards.
    """
    for name in (SHARD_INDEX_FILE, SHARD_MANIFEST_FILE):
        try:
            content = json.loads(store.read_file(name))
        except (OSError, ValueError):  # none, or one of ours that a crash cut short
            continue
        if not isinstance(content, dict) or "shards" not in content:
            raise UserError(
                f"{store / name} is no list of shards, and preprocessing would replace it: choose "
                "another folder with --out."
            )


def _describe_plan(
    tasks: Sequence[ShardTask],
    samples_per_shard: int,
    labels: str | None,
    policy: Mapping[str, Any],
    dropped: Mapping[str, int],
) -> ShardProvenance:
    """The provenance of a plan's shards, before it is known which cases can be used."""
    settings: dict[str, Any] = asdict(tasks[0].options) if tasks else {}
    settings["samples_per_shard"] = samples_per_shard
    if labels is not None:
        settings[LABELS_SETTING] = labels
    if policy:
        settings["policy"] = dict(policy)
    task_fingerprints = [task.fingerprint for task in tasks]
    return ShardProvenance(
        fingerprint=json_sha256(
            [task_fingerprints, settings, dict(dropped), preprocessing_versions()]
        ),
        code=tasks[0].code_sha256 if tasks else None,
        settings=settings,
        dropped=dict(dropped),
    )


def _remove_temporary_files(store: ShardStore) -> None:
    store.remove_temporary_files()
    store.remove_temporary_files(RECORD_FOLDER)


def _make_shards(
    waiting: Sequence[ShardTask], total_cases: int, runner: TaskRunner
) -> dict[str, ShardRecord]:
    """Make the shards of the waiting tasks under a progress bar; return their records by name."""
    previously_done = total_cases - sum(len(task.cases) for task in waiting)
    if waiting:
        note = f"; {previously_done} were done before" if previously_done else ""
        log.info("%d cases%s; shards to make: %d", total_cases, note, len(waiting))
    records = {}
    with CaseProgress(total_cases, previously_done) as progress:
        for task, record in run_tasks(waiting, runner):
            records[task.name] = record
            progress.advance(len(task.cases), len(record.rejected))
    return records


def _write_index_files(
    store: ShardStore,
    tasks: Sequence[ShardTask],
    records: Mapping[str, ShardRecord],
    rejected: Sequence[RejectedCase],
    provenance: ShardProvenance,
) -> ShardIndex:
    """Write quarantine list, manifest and index, and remove the records of an earlier plan."""
    lines = [_REJECTED_ADAPTER.dump_json(case) + b"\n" for case in rejected]
    store.write_file(QUARANTINE_FILE, b"".join(lines))
    task_records = [records[task.name] for task in tasks]
    shards = [record.shard for record in task_records if record.shard is not None]
    if not shards:
        case_count = sum(len(task.cases) for task in tasks)
        raise UserError(
            f"None of {case_count} cases could be used: see the reasons in "
            f"{store / QUARANTINE_FILE}."
        )
    _require_all_shards(store, shards)
    options = tasks[0].options
    index = write_index(
        store, shards, grid=options.grid, spacing=options.spacing, provenance=provenance
    )
    current_names = {_LOCK_FILE, *(task.record_name for task in tasks)}
    for name in store.list_names(RECORD_FOLDER):
        if name not in current_names:
            store.remove_file(name)
    return index


def _require_all_shards(store: ShardStore, shards: Sequence[WrittenShard]) -> None:
    sizes = store.list_sizes()
    missing = [
        shard.facts.name for shard in shards if sizes.get(shard.facts.name) != shard.facts.bytes
    ]
    if missing:
        raise UserError(
            f"{store} lacks {len(missing)} shards that were written, such as {missing[0]}: "
            f"expected a folder that stays and that all workers share; check it, then give the "
            f"same command again."
        )


def _read_previous_result(store: ShardStore, fingerprint: str | None) -> PreprocessResult | None:
    """Read the result of an earlier run of the same plan; None unless all its shards exist."""
    try:
        index = read_index(store)
        manifest = read_manifest(store)
        lines = store.read_file(QUARANTINE_FILE).splitlines()
    except (UserError, OSError):
        return None
    if manifest.provenance.fingerprint != fingerprint:
        return None
    sizes = store.list_sizes()
    if any(sizes.get(shard.name) != shard.bytes for shard in manifest.shards):
        return None
    return PreprocessResult(
        index, manifest, [_REJECTED_ADAPTER.validate_json(line) for line in lines]
    )


@contextmanager
def _lock_folder(store: ShardStore) -> Iterator[None]:
    """Keep a second run off a local folder; the system drops the lock of a run that is killed."""
    if store.local_folder is None:
        yield
        return
    lock = FolderLock(
        store.local_folder / _LOCK_FILE,
        in_use=f"Another run is writing to {store}, started",
        remedy="wait for its end, stop it, or name another folder with --out",
    )
    with explain_write_errors(store):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
