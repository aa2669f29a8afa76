"""Shard tasks in this process or in worker processes; a case that kills its worker is set aside.

A worker holds one case at a time. What it sends back is the record of a shard, a few kilobytes.
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
"""Environment of a worker: numerical libraries read these variables when a process first loads
them, and one thread is enough where the workers are the parallelism."""
_is_worker = False
"""Whether this process is a worker, which may end itself without harm to anyone."""


class TaskRunner(Protocol):
    """A way to call a function on each of many tasks."""

    def __call__(
        self,
        function: Callable[[ShardTask], Any],
        tasks: Sequence[ShardTask],
        one_at_a_time: bool = False,
    ) -> Iterator[tuple[ShardTask, Any]]:
        """Yield each task with the function's result, in the order in which tasks finish.

        The result is None when the process of the task died.

        Args:
            function: called in a worker.
            tasks: to call it on.
            one_at_a_time: give each task the machine's memory to itself.
        """


def run_tasks(
    tasks: Sequence[ShardTask], runner: TaskRunner
) -> Iterator[tuple[ShardTask, ShardRecord]]:
    """Make all shards; yield each task with the record of its shard.

    A shard whose process died is tried again. When it dies again, its cases are tried one by one;
    those that kill their process are set aside, and the rest becomes the shard.

    Raises:
        UserError: the output cannot be written, or a shard dies although each of its cases passes.
    """
    remaining = tasks
    for _ in range(2):
        lost = []
        for task, record in runner(make_shard, remaining):
            if record is None:
                log.warning(
                    "A worker was killed while it made %s, most likely for memory.", task.name
                )
                lost.append(task)
            else:
                yield task, record
        remaining = lost
        if not remaining:
            return

    for task in remaining:
        survivable = replace(task, fatal_keys=_find_fatal_keys(task, runner))
        for _, record in runner(make_shard, [survivable], one_at_a_time=True):
            if record is None:
                raise UserError(
                    f"The worker that makes {task.name} was killed three times, although each of "
                    f"its cases passes: free memory or lower --workers; finished shards are kept, "
                    f"and the same command goes on."
                )
            yield task, record


def _find_fatal_keys(task: ShardTask, runner: TaskRunner) -> tuple[str, ...]:
    """Try the cases of a task one by one; return the keys of those that kill their process."""
    single_case_tasks = [replace(task, cases=(case,)) for case in task.cases]
    results = runner(try_case, single_case_tasks, one_at_a_time=True)
    return tuple(single.cases[0].key for single, passed in results if not passed)


# What a worker does


def make_shard(task: ShardTask) -> ShardRecord:
    """Make one shard and record it.

    Raises:
        UserError: the output cannot be written.
    """
    store = ShardStore(task.folder)
    rejected: list[RejectedCase] = []

    def usable_samples() -> Iterator[PackedSample]:
        for case in task.cases:
            sample = _prepare_case(case, task)
            if isinstance(sample, RejectedCase):
                rejected.append(sample)
            else:
                yield sample

    with explain_write_errors(store):
        if store.local_folder is not None and not (store.local_folder / RECORD_FOLDER).is_dir():
            raise OSError(errno.ENOENT, "the folder has gone since the run began")
        # Without its record a shard counts as not made, so a kill between the two writes below
        # cannot pair an old record with the new shard.
        store.remove_file(task.record_name)
        shard = write_shard(usable_samples(), store, task.name)
        record = ShardRecord(task.fingerprint, shard, rejected)
        store.write_file(task.record_name, SHARD_RECORD_ADAPTER.dump_json(record))
    return record


def try_case(task: ShardTask) -> bool:
    """Prepare the only case of a task and drop the result; return if the process survives it."""
    _prepare_case(task.cases[0], task)
    return True


def _prepare_case(case: Case, task: ShardTask) -> PackedSample | RejectedCase:
    """Bring a case to a packed sample, or describe why it cannot be used."""
    options = task.options
    try:
        if case.key in task.fatal_keys:
            raise InputError(
                case.source,
                "ended the process that worked on it",
                expected="a case that a process can hold",
                found="that it ended each time: killed, most likely for memory, or stuck where no "
                "time limit reaches",
                remedy="look at its size, or give each worker more memory",
            )
        with _time_limit(task.timeout_seconds):
            sample = case_to_sample(
                case, options.grid, options.spacing, coarse_regions=options.coarse_regions
            )
            return pack_sample(sample)
    except _CaseTimeout:
        timeout_error = InputError(
            case.source,
            "took too long",
            expected=f"a case within {task.timeout_seconds:g} seconds",
            found="no end of it",
            remedy="check the disk that it lies on, then try again with --retry, or give it more "
            "time with --timeout",
        )
        return RejectedCase.from_error(case, timeout_error)
    except UserError as error:
        return RejectedCase.from_error(case, error)
    except Exception as error:
        # One odd file among fifty thousand must not stop the rest; the trace goes to the log.
        log.exception("%s failed", case.key)
        return RejectedCase.from_error(case, error)


class _CaseTimeout(BaseException):
    """The time limit of a case. It is no `Exception`, so that no library catches it as its own."""


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `_CaseTimeout` in the block after `seconds`.

    A worker that even this cannot stop ends itself 5 seconds and a fifth of the limit later.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_timeout(*_: object) -> None:
        raise _CaseTimeout

    previous_handler = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if _is_worker:
        faulthandler.dump_traceback_later(1.2 * seconds + 5, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
        if _is_worker:
            faulthandler.cancel_dump_traceback_later()


@contextmanager
def explain_write_errors(store: ShardStore) -> Iterator[None]:
    """Turn an `OSError` in the block into one sentence about the output and what to do.

    Raises:
        UserError: the block raised an `OSError`.
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
            f"Shards cannot be written to {store} ({error.strerror or error}): {remedy}, then give "
            f"the same command again; finished shards are kept."
        ) from None


# Runners


def run_in_this_process(
    function: Callable[[ShardTask], Any],
    tasks: Sequence[ShardTask],
    one_at_a_time: bool = False,
) -> Iterator[tuple[ShardTask, Any]]:
    """Run tasks without workers: a `TaskRunner` for small work."""
    for task in tasks:
        yield task, function(task)


class ProcessRunner:
    """A `TaskRunner` with worker processes on this machine.

    Each worker has an executor of its own, so a dead worker costs one task.
    """

    def __init__(self, workers: int) -> None:
        """Remember the number of workers; none is started before the first task."""
        self.workers = workers

    def __call__(
        self,
        function: Callable[[ShardTask], Any],
        tasks: Sequence[ShardTask],
        one_at_a_time: bool = False,
    ) -> Iterator[tuple[ShardTask, Any]]:
        """Yield each task with the function's result; see `TaskRunner`."""
        waiting = deque(tasks)
        max_busy = 1 if one_at_a_time else self.workers
        idle: list[_WorkerProcess] = []
        busy: dict[Future[Any], tuple[_WorkerProcess, ShardTask]] = {}
        leash, hold = multiprocessing.Pipe(duplex=False)
        with _single_threaded_children():
            try:
                while waiting or busy:
                    while waiting and len(busy) < max_busy:
                        worker = idle.pop() if idle else _WorkerProcess(leash)
                        task = waiting.popleft()
                        busy[worker.executor.submit(function, task)] = worker, task
                    for future in wait(busy, return_when=FIRST_COMPLETED).done:
                        worker, task = busy.pop(future)
                        try:
                            result = future.result()
                            idle.append(worker)
                        except BrokenProcessPool:
                            worker.require_started()
                            result = None
                        yield task, result
            finally:
                # The workers end as soon as the pipe closes: nothing is worth waiting for.
                hold.close()
                leash.close()
                for worker in [*idle, *(worker for worker, _ in busy.values())]:
                    worker.executor.shutdown(cancel_futures=True)


class _WorkerProcess:
    """One process that works for as long as it lives."""

    def __init__(self, leash: Connection) -> None:
        self.executor = ProcessPoolExecutor(1, worker_context(), _start_worker, (leash,))
        self._started = self.executor.submit(os.getpid)

    def require_started(self) -> None:
        """Refuse to blame a case when the worker broke before it came up.

        Raises:
            UserError: the worker did not start.
        """
        self.executor.shutdown(wait=False)
        if self._started.exception() is not None:
            raise UserError(
                "A worker process did not start (see the lines above): free memory or lower "
                "--workers; finished shards are kept, and the same command goes on."
            )


def worker_context() -> BaseContext:
    """Choose how workers start.

    On Linux they are copies of a process that holds the libraries, which is quick and shares their
    memory. Elsewhere libraries may not survive such a copy, so each worker loads its own.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_worker(leash: Connection) -> None:
    """Prepare a new worker: it dies with the run, or it would go on writing as an orphan."""

    def exit_with_the_run() -> None:
        leash.poll(None)  # returns when the run closes its end or dies, however hard
        os._exit(1)

    threading.Thread(target=exit_with_the_run, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    mark_as_worker()


def mark_as_worker() -> None:
    """Make this process a worker."""
    global _is_worker
    _is_worker = True
    torch.set_num_threads(1)


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Set the environment of workers while the block runs."""
    previous_values = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(THREAD_VARIABLES)
    try:
        yield
    finally:
        for name, value in previous_values.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
