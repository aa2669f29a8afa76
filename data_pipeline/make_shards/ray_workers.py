"""Shard tasks on a Ray cluster: Ray places them on machines and notices when a machine is lost.

    pip install "rectvlm[ray]"
    python -m data_pipeline.preprocess --ray auto --out s3://bucket/shards …

`data_pipeline` and `rectvlm` travel with the job; the libraries that they need must be installed on
each machine. Inputs and output must be paths that all machines share, or URLs.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import data_pipeline
import rectvlm
from data_pipeline.make_shards.shard_plan import ShardTask
from data_pipeline.make_shards.workers import THREAD_VARIABLES, mark_as_worker
from rectvlm.code_fingerprint import hash_modules
from rectvlm.types import UserError


class RayRunner:
    """A `workers.TaskRunner` on a Ray cluster, one CPU a task."""

    def __init__(self, address: str) -> None:
        """Connect to a cluster; a connection that exists already is used.

        Args:
            address: of the cluster; `local` starts Ray on this machine.

        Raises:
            UserError: Ray is not installed, or no cluster answers at the address.
        """
        try:
            import ray
        except ImportError:
            raise UserError(
                '--ray needs Ray, which is not installed: pip install "rectvlm[ray]".'
            ) from None
        self._ray = ray
        environment = {"py_modules": [data_pipeline, rectvlm], "env_vars": THREAD_VARIABLES}
        if not ray.is_initialized():
            _require_reachable_cluster(address)
            try:
                # The modules are given here: Ray uploads those of a job, not those of a task.
                ray.init(address=None if address == "local" else address, runtime_env=environment)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise _no_cluster_error(address, error) from None

    def __call__(
        self,
        function: Callable[[ShardTask], Any],
        tasks: Sequence[ShardTask],
        one_at_a_time: bool = False,
    ) -> Iterator[tuple[ShardTask, Any]]:
        """Yield each task with the function's result; see `workers.TaskRunner`."""
        ray, errors = self._ray, self._ray.exceptions
        worker_died = (
            errors.WorkerCrashedError,
            errors.OutOfMemoryError,
            errors.NodeDiedError,
            errors.LocalRayletDiedError,
            errors.ObjectLostError,
        )
        # Ray's own retries are off: it would try a task that runs out of memory for ever.
        remote = ray.remote(num_cpus=1, max_retries=0)(_run_on_worker)
        waiting = list(reversed(tasks))
        busy: dict[Any, ShardTask] = {}
        while waiting or busy:
            while waiting and not (one_at_a_time and busy):
                task = waiting.pop()
                busy[remote.options(name=task.name).remote(function, task)] = task
            ready, _ = ray.wait(list(busy), num_returns=1)
            task = busy.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except worker_died:
                result = None
            except errors.RayTaskError as error:
                raise error.cause from None
            yield task, result


def _require_reachable_cluster(address: str) -> None:
    """Refuse an address that no one answers at; Ray itself would try it for minutes in silence."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # auto, local, or what Ray explains at once
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster_error(address, error) from None


def _no_cluster_error(address: str, error: Exception) -> UserError:
    return UserError(
        f"No Ray cluster at {address} ({error}): start one with `ray start --head`, or use "
        f"--ray local."
    )


def _run_on_worker(function: Callable[[ShardTask], Any], task: ShardTask) -> Any:
    """Run a task on a worker, whose code must be the plan's: shards must not vary by machine."""
    if hash_modules(task.modules) != task.code_sha256:
        raise UserError(
            f"{socket.gethostname()} has other code of data_pipeline or rectvlm than the machine "
            f"that started the run: bring all machines to one version."
        )
    mark_as_worker()
    return function(task)
