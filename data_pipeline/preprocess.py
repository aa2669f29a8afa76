"""Cases to shards.

    python -m data_pipeline.preprocess [--config demo] [--out DIR] [--phantoms 48] [part.field=value …]

With no arguments: two real chest CTs and seeded phantoms, on the grid of the `demo` configuration, to its folder of
shards. Shards are made in parallel, each by one process; a finished one is recorded in `.parts/`, so that a run that
was stopped goes on where it was, and one without changes has nothing to do. What cannot be used is listed in
`quarantine.jsonl` with its reason, and the rest goes on.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipeline import cases as cases_module
from data_pipeline.cases import Case, case_to_sample
from data_pipeline.demo import demo_cases
from data_pipeline.samples import FOLDER as SAMPLES
from rectvlm import config, labels
from rectvlm.data import frame, packing, sample, volume
from rectvlm.data.sample import versions
from rectvlm.data.shards import INDEX, Index, Shard, read_index, write_index, write_shard
from rectvlm.data.store import atomic_file
from rectvlm.types import Sample, Split, UserError

log = logging.getLogger(__name__)

PARTS = ".parts"
QUARANTINE = "quarantine.jsonl"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Rejected:
    """A case that could not be used."""

    key: str
    source: str
    reason: str


@dataclass(frozen=True)
class Part:
    """The record of one finished shard; `.parts/NAME.json`."""

    fingerprint: str
    """Of the cases, the grid and the code that it was made from."""
    shard: Shard | None
    """None when no case of it could be used."""
    rejected: list[Rejected]


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    name: str
    cases: tuple[Case, ...]
    folder: Path
    grid: tuple[int, int, int]
    spacing: tuple[float, float, float]
    fingerprint: str

    @property
    def record(self) -> Path:
        return self.folder / PARTS / f"{self.name}.json"

    def done(self) -> Part | None:
        """The record of this very shard, when it was made before and is still there."""
        try:
            part = _PART.validate_json(self.record.read_bytes())
        except (OSError, ValidationError):
            return None
        if part.fingerprint != self.fingerprint:
            return None
        path = self.folder / self.name
        whole = part.shard is None or (path.is_file() and path.stat().st_size == part.shard.bytes)
        return part if whole else None


_PART = TypeAdapter(Part)


@dataclass
class Outcome:
    """What a run of `preprocess` came to."""

    index: Index
    rejected: list[Rejected] = field(default_factory=list)
    made: int = 0
    """Shards that were made now; 0 when all was up to date."""


def preprocess(
    cases: Sequence[Case],
    folder: Path,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    *,
    samples_per_shard: int = 8,
    workers: int = 1,
) -> Outcome:
    """Bring cases to shards in `folder`; only shards whose cases, grid or code changed are made anew.

    The result does not depend on `workers` or on how often it was interrupted. `index.json` is written last: a folder
    with an index is complete.

    Args:
        grid: voxels (z, y, x).
        spacing: mm (z, y, x).
        workers: processes; 1 works in this one.

    Raises:
        UserError: a key twice, a patient in both splits, no usable case, or a worker that was killed.
    """
    tasks = _plan(cases, folder, grid, spacing, samples_per_shard)
    parts = {task.name: part for task in tasks if (part := task.done())}
    waiting = [task for task in tasks if task.name not in parts]
    fingerprint = _digest([task.fingerprint for task in tasks])
    if not waiting and (folder / INDEX).is_file():
        index = read_index(folder)
        if index.fingerprint == fingerprint:
            return Outcome(index, _rejected(tasks, parts))
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    for task, part in _run(waiting, workers):
        parts[task.name] = part
    rejected = _rejected(tasks, parts)
    with atomic_file(folder / QUARANTINE) as file:
        file.writelines(TypeAdapter(Rejected).dump_json(one) + b"\n" for one in rejected)
    shards = [shard for task in tasks if (shard := parts[task.name].shard)]
    if not shards:
        raise UserError(f"None of {len(cases)} cases could be used: see the reasons in {folder / QUARANTINE}.")
    index = write_index(folder, shards, grid=grid, spacing=spacing, fingerprint=fingerprint)
    for stale in set((folder / PARTS).iterdir()) - {task.record for task in tasks}:
        stale.unlink()
    return Outcome(index, rejected, len(waiting))


def _plan(
    cases: Sequence[Case],
    folder: Path,
    grid: tuple[int, int, int],
    spacing: tuple[float, float, float],
    samples_per_shard: int,
) -> list[Task]:
    """Which case goes to which shard: a matter of the list alone, so that any run makes the same shards."""
    twice = [key for key, number in Counter(case.key for case in cases).items() if number > 1]
    if twice:
        raise UserError(f"Several cases have the key {twice[0]} ({len(twice)} such keys): keys must be unique.")
    splits: dict[str, Split] = {}
    for case in cases:
        if splits.setdefault(case.patient, case.split) != case.split:
            raise UserError(f"Patient {case.patient} is in train and in valid: put all cases of a patient in one.")
    tasks = []
    for split in ("train", "valid"):
        part = [case for case in cases if case.split == split]
        for number, start in enumerate(range(0, len(part), samples_per_shard)):
            chosen = tuple(part[start : start + samples_per_shard])
            facts = [[c.key, c.patient, c.source, c.identity] for c in chosen]
            fingerprint = _digest([facts, grid, spacing, _code(), versions()])
            tasks.append(Task(f"{split}-{number:06d}.tar", chosen, folder, grid, spacing, fingerprint))
    return tasks


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def _code() -> str:
    """Digest of the modules that decide what a sample looks like."""
    modules = (cases_module, frame, labels, packing, sample, volume)
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()


def _rejected(tasks: Sequence[Task], parts: dict[str, Part]) -> list[Rejected]:
    return [one for task in tasks for one in parts[task.name].rejected]


# Running


def make_shard(task: Task) -> Part:
    """Make one shard and record it; runs in a worker."""
    # Without its record a shard counts as not made, so a kill between the two cannot pair an old record with it.
    task.record.unlink(missing_ok=True)
    rejected: list[Rejected] = []

    def samples() -> Iterator[Sample]:
        for case in task.cases:
            try:
                yield case_to_sample(case, task.grid, task.spacing)
            except UserError as error:
                rejected.append(Rejected(case.key, case.source, str(error)))
            except Exception as error:
                # One odd file among fifty thousand must not stop the rest; the trace goes to the log.
                log.exception("%s failed", case.key)
                rejected.append(Rejected(case.key, case.source, f"unexpected {type(error).__name__}: {error}"))

    part = Part(task.fingerprint, write_shard(samples(), task.folder, task.name), rejected)
    with atomic_file(task.record) as file:
        file.write(_PART.dump_json(part))
    return part


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Part]]:
    """Finished shards, in the order in which they finish, under a progress bar that counts cases."""
    columns = (TextColumn("cases"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("cases", total=sum(len(task.cases) for task in tasks))
        for task, part in _in_order(tasks) if workers <= 1 else _in_parallel(tasks, workers):
            progress.advance(bar, len(task.cases))
            yield task, part


def _in_order(tasks: Sequence[Task]) -> Iterator[tuple[Task, Part]]:
    for task in tasks:
        yield task, make_shard(task)


def _in_parallel(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Part]]:
    spawn = multiprocessing.get_context("spawn")
    with _single_threaded_children(), ProcessPoolExecutor(workers, spawn, _one_thread) as pool:
        futures: dict[Future[Part], Task] = {pool.submit(make_shard, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                f"A worker was killed, most likely for memory ({workers} work at once): run it again with fewer "
                f"--workers; finished shards are kept."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Numerical libraries read these variables when a process first loads them, so children must inherit them."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# Command line


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.preprocess", description="Make shards from cases.")
    parser.add_argument("--config", default="demo", help="configuration whose grid, spacing and folder are used")
    parser.add_argument("--out", type=Path, help="folder of the shards (default: data.shards of the configuration)")
    parser.add_argument("--phantoms", type=int, default=48, help="synthetic training cases (default 48)")
    parser.add_argument("--valid-phantoms", type=int, default=12, help="synthetic validation cases (default 12)")
    parser.add_argument("--no-samples", action="store_true", help="leave the two real CTs out; needs no network")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--samples-per-shard", type=int, default=8, help="cases of one tar (default 8)")
    parser.add_argument("overrides", nargs="*", metavar="part.field=value", help="changes of the configuration")
    return parser.parse_intermixed_args(arguments)


def _summary(outcome: Outcome, folder: Path) -> Table:
    index = outcome.index
    grid, spacing = " × ".join(map(str, index.grid)), " × ".join(f"{mm:g}" for mm in index.spacing)
    caption = f"{len(outcome.rejected)} cases set aside" + (f", see {folder / QUARANTINE}" if outcome.rejected else "")
    table = Table(title=f"{folder}: {grid} voxels of {spacing} mm", caption=caption, title_justify="left")
    table.add_column("split")
    for name in ("cases", "shards", "MiB", *(lesion.name for lesion in labels.LESIONS)):
        table.add_column(name, justify="right")
    for split in ("train", "valid"):
        shards = [shard for shard in index.shards if shard.samples[0].split == split]
        table.add_row(
            split,
            str(sum(len(shard.samples) for shard in shards)),
            str(len(shards)),
            f"{sum(shard.bytes for shard in shards) / 2**20:.1f}",
            *(str(index.counts[split]["lesions"][lesion.key]["present"]) for lesion in labels.LESIONS),
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parse(arguments)
    try:
        wanted = config.load(options.config, options.overrides).data
        folder = options.out or Path(wanted.shards)
        cases = demo_cases(options.phantoms, options.valid_phantoms, None if options.no_samples else SAMPLES)
        outcome = preprocess(
            cases,
            folder,
            wanted.grid,
            wanted.spacing,
            samples_per_shard=options.samples_per_shard,
            workers=options.workers,
        )
    except UserError as error:
        log.error("%s", error)
        return 2
    Console().print(_summary(outcome, folder))
    for one in outcome.rejected:
        log.warning("set aside %s: %s", one.key, one.reason)
    if not outcome.made:
        log.info("up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
