"""Tasks to shards: in this process, in many, or on many machines; what ends a process is found and set aside.

A worker holds one case at a time, and what it sends back is the record of a shard, a few kilobytes.
"""

import errno
import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any, Protocol

import torch

from data_pipeline.cases import Case, case_to_sample
from data_pipeline.make_shards.shard_plan import (
    RECORD_FOLDER,
    SHARD_RECORD_ADAPTER,
    RejectedCase,
    ShardRecord,
    ShardTask,
)
from rectvlm.data.shards import PackedSample, pack_sample, write_shard
from rectvlm.data.store import ShardStore
from rectvlm.types import InputError, UserError

log = logging.getLogger(__name__)

THREAD_VARIABLES = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)
"""Numerical libraries read these when a process first loads them; workers are the parallelism here."""
_is_worker = False
"""Whether this process is a worker, whose end harms no one."""


class TaskRunner(Protocol):
    """A way to call a function on each of many tasks."""

    def __call__(
        self, function: Callable[[ShardTask], Any], tasks: Sequence[ShardTask], alone: bool = False
    ) -> Iterator[tuple[ShardTask, Any]]:
        """Tasks with what the function gave, in the order in which they finish; None when its process died.

        Args:
            alone: one at a time, so that each has the memory to itself.
        """


def run_tasks(
    tasks: Sequence[ShardTask], runner: TaskRunner
) -> Iterator[tuple[ShardTask, ShardRecord]]:
    """Make all shards.

    A shard whose process died is tried again; when it dies again, its cases are tried one by one, those that end
    their process are set aside, and the rest becomes the shard.

    Raises:
        UserError: the output cannot be written, or a shard dies although each of its cases passes.
    """
    left = tasks
    for _ in range(2):
        lost = []
        for task, part in runner(make_shard, left):
            if part is None:
                log.warning(
                    "A worker was killed while it made %s, most likely for memory.", task.name
                )
                lost.append(task)
            else:
                yield task, part
        left = lost
        if not left:
            return
    for task in left:
        singles = [replace(task, cases=(case,)) for case in task.cases]
        fatal = tuple(
            single.cases[0].key
            for single, passed in runner(try_case, singles, alone=True)
            if not passed
        )
        for _, part in runner(make_shard, [replace(task, fatal_keys=fatal)], alone=True):
            if part is None:
                raise UserError(
                    f"The worker that makes {task.name} was killed three times, although each of its cases passes: "
                    f"free memory or lower --workers; finished shards are kept, and the same command goes on."
                )
            yield task, part


# What a worker does


def make_shard(task: ShardTask) -> ShardRecord:
    """Make one shard and record it.

    Raises:
        UserError: the output cannot be written.
    """
    store = ShardStore(task.place)
    rejected: list[RejectedCase] = []

    def samples() -> Iterator[PackedSample]:
        for case in task.cases:
            one = _prepare_case(case, task)
            if isinstance(one, RejectedCase):
                rejected.append(one)
            else:
                yield one

    with explain_write_errors(store):
        if store.local_folder is not None and not (store.local_folder / RECORD_FOLDER).is_dir():
            raise OSError(errno.ENOENT, "the folder has gone since the run began")
        # Without its record a shard counts as not made, so a kill between the two cannot pair an old record with it.
        store.remove_file(task.record_name)
        part = ShardRecord(task.fingerprint, write_shard(samples(), store, task.name), rejected)
        store.write_file(task.record_name, SHARD_RECORD_ADAPTER.dump_json(part))
    return part


def try_case(task: ShardTask) -> bool:
    """Work on the only case of a task and drop the result; that this returns is the answer."""
    _prepare_case(task.cases[0], task)
    return True


def _prepare_case(case: Case, task: ShardTask) -> PackedSample | RejectedCase:
    options = task.options
    try:
        if case.key in task.fatal_keys:
            raise InputError(
                case.source,
                "ended the process that worked on it",
                expected="a case that a process can hold",
                found="that it ended each time: killed, most likely for memory, or stuck where no time limit reaches",
                remedy="look at its size, or give each worker more memory",
            )
        with _time_limit(task.timeout_seconds):
            sample = case_to_sample(
                case, options.grid, options.spacing, coarse_regions=options.coarse_regions
            )
            return pack_sample(sample)
    except _CaseTimeout:
        late = InputError(
            case.source,
            "took too long",
            expected=f"a case within {task.timeout_seconds:g} seconds",
            found="no end of it",
            remedy="check the disk that it lies on, then try again with --retry, or give it more time with --timeout",
        )
        return RejectedCase.from_error(case, late)
    except UserError as error:
        return RejectedCase.from_error(case, error)
    except Exception as error:
        # One odd file among fifty thousand must not stop the rest; the trace goes to the log.
        log.exception("%s failed", case.key)
        return RejectedCase.from_error(case, error)


class _CaseTimeout(BaseException):
    """Not an `Exception`, so that no library on the way takes it for one of its own."""


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `_TooLong` in the block after a time; a worker that even this cannot stop ends itself a while later."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _CaseTimeout

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if _is_worker:
        faulthandler.dump_traceback_later(1.2 * seconds + 5, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if _is_worker:
            faulthandler.cancel_dump_traceback_later()


@contextmanager
def explain_write_errors(store: ShardStore) -> Iterator[None]:
    """Say in one sentence why an output cannot be written.

    Raises:
        UserError: an `OSError` in the block.
    """
    remedies = {
        errno.ENOSPC: "make room there",
        errno.EDQUOT: "make room there",
        errno.EFBIG: "raise the limit of file sizes, or make smaller shards",
        errno.ENOENT: "bring it back (is its disk still mounted?)",
    }
    try:
        yield
    except OSError as error:
        remedy = remedies.get(error.errno or 0, "check the place and your access to it")
        raise UserError(
            f"Shards cannot be written to {store} ({error.strerror or error}): {remedy}, then give the same command "
            f"again; finished shards are kept."
        ) from None


# Ways to run


def run_in_this_process(
    function: Callable[[ShardTask], Any], tasks: Sequence[ShardTask], alone: bool = False
) -> Iterator[tuple[ShardTask, Any]]:
    """A `Runner` without workers, for small work."""
    for task in tasks:
        yield task, function(task)


class ProcessRunner:
    """A `Runner` with workers on this machine, one executor each, so that a dead worker is one lost task."""

    def __init__(self, workers: int) -> None:
        """Nothing is started yet."""
        self.workers = workers

    def __call__(
        self, function: Callable[[ShardTask], Any], tasks: Sequence[ShardTask], alone: bool = False
    ) -> Iterator[tuple[ShardTask, Any]]:
        """See `Runner`."""
        waiting, at_once = deque(tasks), 1 if alone else self.workers
        free: list[_WorkerProcess] = []
        busy: dict[Future[Any], tuple[_WorkerProcess, ShardTask]] = {}
        leash, hold = multiprocessing.Pipe(duplex=False)
        with _single_threaded_children():
            try:
                while waiting or busy:
                    while waiting and len(busy) < at_once:
                        worker, task = (
                            free.pop() if free else _WorkerProcess(leash),
                            waiting.popleft(),
                        )
                        busy[worker.executor.submit(function, task)] = worker, task
                    for future in wait(busy, return_when=FIRST_COMPLETED).done:
                        worker, task = busy.pop(future)
                        try:
                            result = future.result()
                            free.append(worker)
                        except BrokenProcessPool:
                            worker.require_started()
                            result = None
                        yield task, result
            finally:
                # Letting go ends the workers at once: there is nothing that is worth waiting for.
                hold.close()
                leash.close()
                for worker in [*free, *(worker for worker, _ in busy.values())]:
                    worker.executor.shutdown(cancel_futures=True)


class _WorkerProcess:
    """One process that works for as long as it lives."""

    def __init__(self, leash: Connection) -> None:
        self.executor = ProcessPoolExecutor(1, worker_context(), _start_worker, (leash,))
        self._started = self.executor.submit(os.getpid)

    def require_started(self) -> None:
        """After a break: a worker that never came up has no case to blame.

        Raises:
            UserError: it did not start.
        """
        self.executor.shutdown(wait=False)
        if self._started.exception() is not None:
            raise UserError(
                "A worker process did not start (see the lines above): free memory or lower --workers; finished "
                "shards are kept, and the same command goes on."
            )


def worker_context() -> BaseContext:
    """How workers start: on Linux as copies of a process that holds the libraries, at once and with their memory
    shared; elsewhere libraries may not survive such a copy."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_worker(leash: Connection) -> None:
    """In a new worker: die with the run, which would else leave an orphan that goes on writing."""

    def watch() -> None:
        leash.poll(None)  # returns when the run closes its end or dies, however hard
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    mark_as_worker()


def mark_as_worker() -> None:
    """Make this process a worker."""
    global _is_worker
    _is_worker = True
    torch.set_num_threads(1)


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(THREAD_VARIABLES)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
