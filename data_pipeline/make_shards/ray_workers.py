"""The same tasks on a Ray cluster: Ray places them, and Ray notices when a machine goes.

    pip install "rectvlm[ray]"
    python -m data_pipeline.preprocess --ray auto --out s3://bucket/shards …

`data_pipeline` and `rectvlm` travel with the job; the libraries that they need are installed on each machine. Inputs
and output must be paths that all machines share, or URLs.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import data_pipeline
import rectvlm
from data_pipeline.make_shards.shard_plan import ShardTask
from data_pipeline.make_shards.workers import THREAD_VARIABLES, mark_as_worker
from rectvlm.code_fingerprint import code_sha256
from rectvlm.types import UserError


class RayRunner:
    """A `running.Runner` on a Ray cluster, one CPU a task."""

    def __init__(self, address: str) -> None:
        """Connect, or start Ray on this machine for `local`; a connection that is there already is used.

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
        self, function: Callable[[ShardTask], Any], tasks: Sequence[ShardTask], alone: bool = False
    ) -> Iterator[tuple[ShardTask, Any]]:
        """See `running.Runner`."""
        ray, errors = self._ray, self._ray.exceptions
        died = (
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
            while waiting and not (alone and busy):
                task = waiting.pop()
                busy[remote.options(name=task.name).remote(function, task)] = task
            ready, _ = ray.wait(list(busy), num_returns=1)
            task = busy.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except died:
                result = None
            except errors.RayTaskError as error:
                raise error.cause from None
            yield task, result


def _require_reachable_cluster(address: str) -> None:
    """Ray itself tries an address that no one answers at for minutes, and says nothing meanwhile."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # auto, local, or what Ray explains at once
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster_error(address, error) from None


def _no_cluster_error(address: str, error: Exception) -> UserError:
    return UserError(
        f"No Ray cluster at {address} ({error}): start one with `ray start --head`, or use --ray local."
    )


def _run_on_worker(function: Callable[[ShardTask], Any], task: ShardTask) -> Any:
    """On a worker: the code must be the plan's, or shards of one run would differ by machine."""
    if code_sha256(task.modules) != task.code_sha256:
        raise UserError(
            f"{socket.gethostname()} has other code of data_pipeline or rectvlm than the machine that started the "
            f"run: bring all machines to one version."
        )
    mark_as_worker()
    return function(task)
