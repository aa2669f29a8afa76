"""Which case goes to which shard, what a finished shard leaves on record, and when it has to be made anew.

The plan is a matter of the list of cases alone, not of the machine, the number of workers or an earlier run: so a run
that was stopped, or one with other workers, makes the same shards with the same bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

from pydantic import TypeAdapter, ValidationError

from data_pipeline.cases import Case
from rectvlm.code_fingerprint import code_sha256, find_imported_modules
from rectvlm.data.sample import preprocessing_versions
from rectvlm.data.shards import WrittenShard
from rectvlm.data.store import ShardStore
from rectvlm.types import InputError, Split, UserError

RECORD_FOLDER = ".parts"
QUARANTINE_FILE = "quarantine.jsonl"
_ROOT_MODULES = ("data_pipeline.cases", "rectvlm.data.sample")
"""What decides a sample of any data set; the module that loads a case is added, and all of ours that they import."""
_OWN_PACKAGES = ("data_pipeline", "rectvlm")


@dataclass(frozen=True)
class SampleOptions:
    """How a case becomes a sample."""

    grid: tuple[int, int, int]
    """Voxels (z, y, x)."""
    spacing: tuple[float, float, float]
    """mm (z, y, x)."""
    coarse_regions: bool = False
    """Estimate a region map from the CT where a case has none."""


@dataclass(frozen=True)
class RejectedCase:
    """A case that could not be used; a line of the quarantine list."""

    key: str
    file: str
    """The file at fault, or the case's source where it is not known."""
    reason: str
    """The same words for the same fault, to be counted."""
    expected: str
    found: str
    remedy: str
    message: str
    """All of it in one sentence."""

    @classmethod
    def from_error(cls, case: Case, error: BaseException) -> "RejectedCase":
        """From what was raised while the case was worked on."""
        if not isinstance(error, InputError):
            error = _to_input_error(case.source, error)
        return cls(
            case.key,
            error.file,
            error.reason,
            error.expected,
            error.found,
            error.remedy,
            str(error),
        )


@dataclass(frozen=True)
class ShardRecord:
    """The record of one finished shard; `.parts/NAME.json`."""

    fingerprint: str
    """Of the cases, the options and the code that it was made from."""
    shard: WrittenShard | None
    """None when no case of it could be used."""
    rejected: list[RejectedCase]


def _to_input_error(source: str, error: BaseException) -> InputError:
    """What was raised without its parts, with those of a quarantine list."""
    found = " ".join(str(error).split()).removesuffix(".") or "no message"
    if isinstance(error, UserError):
        return InputError(
            source, "cannot be used", expected="a case of use", found=found, remedy="mend it"
        )
    if isinstance(error, MemoryError):
        expected = "a case that the free memory can hold"
        remedy = "look at its size, lower --workers, then try again with --retry"
        return InputError(
            source, "needs too much memory", expected=expected, found=found, remedy=remedy
        )
    name = type(error).__name__
    remedy = "look at its trace in the log, and report it if the file is sound"
    return InputError(
        source, f"met an unexpected {name}", expected="no such error", found=found, remedy=remedy
    )


SHARD_RECORD_ADAPTER: TypeAdapter[ShardRecord] = TypeAdapter(ShardRecord)


@dataclass(frozen=True)
class ShardTask:
    """One shard to make; small enough to send to any machine, since cases are not loaded yet."""

    name: str
    cases: tuple[Case, ...]
    place: str
    options: SampleOptions
    modules: tuple[str, ...]
    """Modules whose code is in the fingerprint."""
    code_sha256: str
    """Their digest where the plan was made."""
    fingerprint: str
    timeout_seconds: float | None = None
    """Seconds that one case may take."""
    fatal_keys: tuple[str, ...] = ()
    """Keys of cases that were seen to end the process that works on them."""

    @property
    def record_name(self) -> str:
        return f"{RECORD_FOLDER}/{self.name}.json"


def plan_shards(
    cases: Sequence[Case],
    place: str,
    options: SampleOptions,
    samples_per_shard: int,
    timeout_seconds: float | None = None,
) -> list[ShardTask]:
    """The shards of both splits, `samples_per_shard` cases each in the order of the list.

    Raises:
        UserError: a key twice, or a patient in both splits.
    """
    twice = [key for key, number in Counter(case.key for case in cases).items() if number > 1]
    if twice:
        raise UserError(
            f"Several cases have the key {twice[0]} ({len(twice)} such keys): keys must be unique."
        )
    splits: dict[str, Split] = {}
    for case in cases:
        if splits.setdefault(case.patient, case.split) != case.split:
            raise UserError(
                f"Patient {case.patient} is in train and in valid: put all cases of a patient in one."
            )
    modules = _find_modules(cases)
    code = code_sha256(modules)
    tasks = []
    for split in ("train", "valid"):
        part = [case for case in cases if case.split == split]
        for number, start in enumerate(range(0, len(part), samples_per_shard)):
            chosen = tuple(part[start : start + samples_per_shard])
            facts = [[c.key, c.patient, c.scan, c.source, c.identity, c.series] for c in chosen]
            fingerprint = json_digest([facts, asdict(options), code, preprocessing_versions()])
            name = f"{split}-{number:06d}.tar"
            tasks.append(
                ShardTask(name, chosen, place, options, modules, code, fingerprint, timeout_seconds)
            )
    return tasks


def estimate_samples_per_shard(megabytes: float, grid: tuple[int, int, int]) -> int:
    """How many samples make a shard of about so many MiB: a CT packs to about half of its two bytes a voxel."""
    return max(1, round(megabytes * 2**20 / (grid[0] * grid[1] * grid[2])))


def read_finished_records(tasks: Sequence[ShardTask], store: ShardStore) -> dict[str, ShardRecord]:
    """By name, the records of shards that were made before from the same cases and code and are still there."""
    if not tasks:
        return {}
    sizes = {**store.list_sizes(), **store.list_sizes(RECORD_FOLDER)}
    recorded = [task for task in tasks if task.record_name in sizes]
    with ThreadPoolExecutor(16) as threads:  # each is a request where the store is remote
        parts = threads.map(partial(_read_record, store), recorded)
        found = {
            task.name: part for task, part in zip(recorded, parts, strict=True) if part is not None
        }
    return {
        name: part
        for name, part in found.items()
        if part.shard is None or sizes.get(name) == part.shard.facts.bytes
    }


def _read_record(store: ShardStore, task: ShardTask) -> ShardRecord | None:
    try:
        part = SHARD_RECORD_ADAPTER.validate_json(store.read_file(task.record_name))
    except (OSError, ValidationError):
        return None
    return part if part.fingerprint == task.fingerprint else None


def json_digest(facts: object) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _find_modules(cases: Sequence[Case]) -> tuple[str, ...]:
    """The modules whose code decides what these cases become, sorted."""
    loaders = {_unwrap_partial(case.load).__module__ for case in cases}
    return find_imported_modules({*_ROOT_MODULES, *loaders}, _OWN_PACKAGES)


def _unwrap_partial(function: object) -> object:
    while isinstance(function, partial):
        function = function.func
    return function
