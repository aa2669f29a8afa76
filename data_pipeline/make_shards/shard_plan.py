"""The plan of a preprocessing run: the shards to make and the record of each finished one.

The plan follows from the list of cases alone, not from the machine, the number of workers or an
earlier run. So a run that was stopped, or one with other workers, makes the same shards with the
same bytes.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

from pydantic import TypeAdapter, ValidationError

from data_pipeline.cases import Case
from rectvlm.code_fingerprint import find_imported_modules, hash_modules
from rectvlm.data.sample import SAMPLE_KEY_PATTERN, preprocessing_versions
from rectvlm.data.shards import WrittenShard
from rectvlm.data.store import ShardStore
from rectvlm.files import json_sha256, printable_text
from rectvlm.types import SPLITS, InputError, Split, UserError

RECORD_FOLDER = ".parts"
"""Folder of the records of finished shards, inside the folder of shards."""
QUARANTINE_FILE = "quarantine.jsonl"
"""List of the cases that could not be used, one JSON object a line."""
_ROOT_MODULES = ("data_pipeline.cases", "rectvlm.data.sample")
"""Modules that decide a sample of any data set. The modules that load the cases are added, and all
modules of this project that they import."""
_OWN_PACKAGES = ("data_pipeline", "rectvlm")


@dataclass(frozen=True)
class SampleOptions:
    """Options that decide how a case becomes a sample."""

    grid: tuple[int, int, int]
    """Size of the canonical grid (z, y, x), voxels."""
    spacing: tuple[float, float, float]
    """Spacing of the canonical grid (z, y, x), mm."""
    coarse_regions: bool = False
    """Whether a region map is estimated from the CT where a case has none."""


@dataclass(frozen=True)
class RejectedCase:
    """A case that could not be used; one line of the quarantine list."""

    key: str
    file: str
    """The file at fault, or the case's source where the file is not known."""
    reason: str
    """Kind of fault, in the same words for every case that has it, so that it can be counted."""
    expected: str
    found: str
    remedy: str
    message: str
    """All of the above in one sentence."""

    @classmethod
    def from_error(cls, case: Case, error: BaseException) -> "RejectedCase":
        """Describe a case by the exception that it raised."""
        if not isinstance(error, InputError):
            error = _to_input_error(case.source, error)
        return cls(
            key=printable_text(case.key),
            file=printable_text(error.file),
            reason=printable_text(error.reason),
            expected=printable_text(error.expected),
            found=printable_text(error.found),
            remedy=printable_text(error.remedy),
            message=printable_text(error),
        )


def _to_input_error(source: str, error: BaseException) -> InputError:
    """Give an exception of any kind the parts that a quarantine list has."""
    message = " ".join(str(error).split()).removesuffix(".") or "no message"
    if isinstance(error, UserError):
        reason = "cannot be used"
        expected = "a case of use"
        remedy = "mend it"
    elif isinstance(error, MemoryError):
        reason = "needs too much memory"
        expected = "a case that the free memory can hold"
        remedy = "look at its size, lower --workers, then try again with --retry"
    else:
        reason = f"met an unexpected {type(error).__name__}"
        expected = "no such error"
        remedy = "look at its trace in the log, and report it if the file is sound"
    return InputError(source, reason, expected=expected, found=message, remedy=remedy)


@dataclass(frozen=True)
class ShardRecord:
    """The record of one finished shard: `.parts/NAME.json`."""

    fingerprint: str
    """Digest of the cases, the options and the code that the shard was made from."""
    shard: WrittenShard | None
    """The shard; None when none of its cases could be used."""
    rejected: list[RejectedCase]


SHARD_RECORD_ADAPTER: TypeAdapter[ShardRecord] = TypeAdapter(ShardRecord)


@dataclass(frozen=True)
class ShardTask:
    """One shard to make, small enough to send to any machine: its cases are not loaded yet."""

    name: str
    """File name of the shard."""
    cases: tuple[Case, ...]
    folder: str
    """Path or URL of the folder of shards."""
    options: SampleOptions
    modules: tuple[str, ...]
    """Modules whose code is part of the fingerprint."""
    code_sha256: str
    """Digest of these modules on the machine that made the plan."""
    fingerprint: str
    """Digest of the cases, the options and the code."""
    timeout_seconds: float | None = None
    """Time that one case may take, seconds; None for any."""
    fatal_keys: tuple[str, ...] = ()
    """Keys of the cases that killed the process which worked on them."""

    @property
    def record_name(self) -> str:
        """Name of the shard's record, relative to the folder of shards."""
        return f"{RECORD_FOLDER}/{self.name}.json"


def plan_shards(
    cases: Sequence[Case],
    folder: str,
    options: SampleOptions,
    samples_per_shard: int,
    timeout_seconds: float | None = None,
) -> list[ShardTask]:
    """Divide the cases of each split into shards of `samples_per_shard`, in the order of the list.

    Raises:
        UserError: a key that is not valid or given twice, an unknown split, or a patient in two.
    """
    _require_known_splits(cases)
    _require_valid_keys(cases)
    _require_unique_keys(cases)
    _require_one_split_per_patient(cases)
    modules = _find_modules(cases)
    code_sha256 = hash_modules(modules)

    tasks = []
    for split in SPLITS:
        split_cases = [case for case in cases if case.split == split]
        for number, start in enumerate(range(0, len(split_cases), samples_per_shard)):
            shard_cases = tuple(split_cases[start : start + samples_per_shard])
            task = ShardTask(
                name=f"{split}-{number:06d}.tar",
                cases=shard_cases,
                folder=folder,
                options=options,
                modules=modules,
                code_sha256=code_sha256,
                fingerprint=_shard_fingerprint(shard_cases, options, code_sha256),
                timeout_seconds=timeout_seconds,
            )
            tasks.append(task)
    return tasks


def _require_known_splits(cases: Sequence[Case]) -> None:
    for case in cases:
        if case.split not in SPLITS:
            raise UserError(
                f"The case {case.key} has the split {case.split!r}: expected "
                f"{', '.join(SPLITS[:-1])} or {SPLITS[-1]}; correct it."
            )


def _require_valid_keys(cases: Sequence[Case]) -> None:
    for case in cases:
        if not SAMPLE_KEY_PATTERN.fullmatch(case.key):
            raise UserError(
                f"The key {case.key!r} of {case.source} is not valid: expected 1 to 80 letters, "
                f"digits, '_' or '-'; rename the case."
            )


def _require_unique_keys(cases: Sequence[Case]) -> None:
    counts = Counter(case.key for case in cases)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise UserError(
            f"Several cases have the key {repeated[0]} ({len(repeated)} such keys): "
            f"keys must be unique."
        )


def _require_one_split_per_patient(cases: Sequence[Case]) -> None:
    splits: dict[str, Split] = {}
    for case in cases:
        first_split = splits.setdefault(case.patient, case.split)
        if first_split != case.split:
            raise UserError(
                f"Patient {case.patient} is in {first_split} and in {case.split}: "
                f"put all cases of a patient in one."
            )


def _shard_fingerprint(cases: Sequence[Case], options: SampleOptions, code_sha256: str) -> str:
    case_facts = [
        [case.key, case.split, case.patient, case.scan, case.source, case.identity, case.series]
        for case in cases
    ]
    return json_sha256([case_facts, asdict(options), code_sha256, preprocessing_versions()])


def estimate_samples_per_shard(megabytes: float, grid: tuple[int, int, int]) -> int:
    """Estimate how many samples make a shard of this many MiB.

    A CT is compressed to about half of its two bytes a voxel.
    """
    return max(1, round(megabytes * 2**20 / (grid[0] * grid[1] * grid[2])))


def read_finished_records(tasks: Sequence[ShardTask], store: ShardStore) -> dict[str, ShardRecord]:
    """Read the records of the shards that need not be made again, by the shard's name.

    These shards were made from the same cases, options and code, and their files are still there.
    """
    if not tasks:
        return {}
    sizes = {**store.list_sizes(), **store.list_sizes(RECORD_FOLDER)}
    recorded = [task for task in tasks if task.record_name in sizes]
    with ThreadPoolExecutor(16) as threads:  # each read is a request where the store is remote
        records = list(threads.map(partial(_read_record, store), recorded))

    finished = {}
    for task, record in zip(recorded, records, strict=True):
        if record is None or record.fingerprint != task.fingerprint:
            continue
        if record.shard is None or sizes.get(task.name) == record.shard.facts.bytes:
            finished[task.name] = record
    return finished


def _read_record(store: ShardStore, task: ShardTask) -> ShardRecord | None:
    """Read a shard's record; None when it is missing or damaged."""
    try:
        return SHARD_RECORD_ADAPTER.validate_json(store.read_file(task.record_name))
    except (OSError, ValidationError):
        return None


def _find_modules(cases: Sequence[Case]) -> tuple[str, ...]:
    """The modules whose code decides what these cases become, sorted."""
    loaders = {_unwrap_partial(case.load).__module__ for case in cases}
    return find_imported_modules({*_ROOT_MODULES, *loaders}, _OWN_PACKAGES)


def _unwrap_partial(function: object) -> object:
    while isinstance(function, partial):
        function = function.func
    return function
