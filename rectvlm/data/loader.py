"""Batches of shards in a given order, by worker processes or without."""

import atexit
import contextlib
import itertools
import logging
import math
import shutil
import signal
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, get_worker_info

from rectvlm.config import DataConfig
from rectvlm.data.dataset import ShardDataset, build_batch
from rectvlm.data.order import TrainOrder, repeat_rare_lesions
from rectvlm.data.sample import VOLUME_DTYPES
from rectvlm.data.shared_batches import BatchPool, find_pool
from rectvlm.types import Batch, Sample, SampleMeta, Split, UserError

log = logging.getLogger(__name__)

_PREFETCH_BATCHES = 2
"""Number of batches that each worker holds ready."""
_HELD_BATCHES = 2
"""Number of batches in the main process: the next one comes before the last one goes."""
_SHARED_MEMORY_FOLDER = Path("/dev/shm")
_PARENT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that only the main process handles. Launchers and schedulers send them to every process,
but a run ends after the current step, which needs its batches."""


def build_train_loader(
    config: DataConfig,
    micro_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    samples_seen: int = 0,
    pin_memory: bool = False,
    repeat_threshold: float = 0.0,
    accumulation: int = 1,
    sort_by_length: bool = False,
) -> "BatchLoader":
    """Make the loader of one rank's micro-batches, without end, after `samples_seen` samples.

    Args:
        config: shards and workers.
        micro_batch: number of samples of a micro-batch.
        rank: this rank.
        world_size: number of ranks.
        seed: seed of the order.
        samples_seen: number of samples of all ranks before the first.
        pin_memory: whether batches come in pinned memory.
        repeat_threshold: share of the cases below which an outlined lesion repeats its cases; see
            `repeat_rare_lesions`.
        accumulation: number of micro-batches of a rank in a global batch.
        sort_by_length: whether the samples of a global batch are sorted by the length of their
            text; see `TrainOrder`.

    Raises:
        UserError: as `ShardDataset`, or shared memory is too small for the workers' batches.
    """
    dataset = ShardDataset(config, "train")
    _require_shared_memory(config, micro_batch)
    outlined = [location.outlined for location in dataset.locations]
    if repeat_threshold and rank == 0 and not any(outlined):
        log.warning(
            "the index of %s lists no outlined lesion, so repeat_threshold = %g repeats no case: "
            "if the shards hold outlines, they are of an earlier version; preprocess again",
            dataset.store,
            repeat_threshold,
        )
    numbers = repeat_rare_lesions(outlined, repeat_threshold)
    lengths = None
    if sort_by_length:
        lengths = [location.text_bytes for location in dataset.locations]
    order = TrainOrder(
        numbers, micro_batch, rank, world_size, seed, samples_seen, accumulation, lengths
    )
    return BatchLoader(dataset, order, config.workers, pin_memory)


def build_eval_loader(config: DataConfig, split: Split, batch_size: int) -> "BatchLoader":
    """Make the loader of every sample of a split once, in order, unchanged.

    Raises:
        UserError: as `ShardDataset`.
    """
    dataset = ShardDataset(config, split)
    numbers = range(len(dataset))
    return BatchLoader(dataset, [list(numbers[i : i + batch_size]) for i in numbers[::batch_size]])


class BatchLoader:
    """Batches in a given order. Each iteration starts anew, with worker processes of its own."""

    def __init__(
        self,
        dataset: ShardDataset,
        order: Iterable[list[int]],
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Load batches of `dataset`.

        Args:
            dataset: samples to read.
            order: sample numbers of each batch.
            workers: number of processes that read; 0 reads in this one.
            pin_memory: put the batches in page-locked memory.
        """
        self.dataset, self.order = dataset, order
        self.workers, self.pin_memory = workers, pin_memory

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)


class _BatchIterator(Iterator[Batch]):
    """One iteration. Workers end with it, when it is dropped, or when the interpreter exits."""

    def __init__(self, loader: BatchLoader) -> None:
        order = _StoppableOrder(loader.order)
        batch_size = len(next(iter(loader.order), [0]))
        pool = BatchPool(
            loader.workers,
            _PREFETCH_BATCHES + _HELD_BATCHES,
            batch_size,
            VOLUME_DTYPES,
            loader.dataset.grid,
        )
        torch_loader = DataLoader(
            _BatchDataset(loader.dataset, pool),
            batch_sampler=order,
            collate_fn=_collate_nothing,
            num_workers=loader.workers,
            pin_memory=loader.pin_memory,
            prefetch_factor=_PREFETCH_BATCHES if loader.workers else None,
            # The engine starts threads before the loader starts, and a forked child of a process
            # with threads can hang.
            multiprocessing_context="spawn" if loader.workers else None,
            worker_init_fn=_ignore_parent_signals,
        )
        with _block_parent_signals() if loader.workers else contextlib.nullcontext():
            self._items: Iterator[Any] = iter(torch_loader)
        self.close = weakref.finalize(self, _drain_workers, order, self._items, pool)
        # `finalize` has its own exit hook, but multiprocessing's may come first and kill the
        # workers while they work.
        self.close.atexit = False
        atexit.register(self.close)

    def __next__(self) -> Batch:
        item = next(self._items)
        if isinstance(item, UserError):
            self.close()
            raise item
        if isinstance(item, _BatchHandle):
            return item.open_batch()
        assert isinstance(item, Batch)
        return item


class _BatchDataset(Dataset[Sample]):
    """A dataset whose batches go to the slots of a pool."""

    def __init__(self, dataset: ShardDataset, pool: BatchPool) -> None:
        self.dataset, self.pool = dataset, pool

    def __getitems__(self, numbers: list[int]) -> "_BatchHandle | Batch | UserError":
        worker = get_worker_info()
        slot = self.pool.take_slot(worker.id if worker else 0, len(numbers))
        # DataLoader would wrap a worker's exception in a traceback, so an error for the user
        # travels as a value, and `_BatchIterator` raises it.
        try:
            if slot is None:
                return self.dataset.read_batch(numbers)
            arrays = self.pool.slot_arrays(slot, len(numbers))
            metas = self.dataset.read_into_arrays(numbers, arrays)
            return _BatchHandle(self.pool.pool_id, slot, metas)
        except UserError as error:
            return error


@dataclass(frozen=True)
class _BatchHandle:
    """A batch on its way from a worker, without its volumes."""

    pool_id: int
    """Number of the pool that holds the volumes."""
    slot: int
    """Number of the slot in the pool."""
    metas: list[SampleMeta]
    """Metadata of each sample."""

    def open_batch(self) -> Batch:
        """Make the batch, once, in the main process."""
        volumes = find_pool(self.pool_id).open_slot(self.slot, len(self.metas))
        return build_batch(volumes, self.metas)

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory; torch's DataLoader calls this in a thread."""
        return self.open_batch().pin_memory()


class _StoppableOrder:
    """An order that ends when it is told to."""

    def __init__(self, order: Iterable[list[int]]) -> None:
        self.order, self.is_stopped = order, False

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.takewhile(lambda _: not self.is_stopped, self.order)


def _drain_workers(order: _StoppableOrder, items: Iterator[Any], pool: BatchPool) -> None:
    """Take the batches that workers hold ready, after which DataLoader ends the workers.

    A worker that ends while its queue's thread is inside torch, sending a batch, aborts ("terminate
    called without an active exception"): CPython ends such threads by unwinding their stack, which
    C++ does not allow. `pool` keeps the memory of these batches alive meanwhile.
    """
    order.is_stopped = True
    with contextlib.suppress(RuntimeError):  # a worker that has died already
        for _ in items:
            pass


@contextlib.contextmanager
def _block_parent_signals() -> Iterator[None]:
    """Start processes that hold signals back until they ignore them.

    Their imports take seconds before that. The other threads of this process still take its own.
    """
    # To start the tracker, Python blocks two of the signals and lifts that afterwards.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENT_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_parent_signals(_worker: int) -> None:
    """Let a worker end only when its parent says so or is gone."""
    for number in _PARENT_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENT_SIGNALS)


def _collate_nothing(batch: Any) -> Any:
    return batch


def _require_shared_memory(config: DataConfig, micro_batch: int) -> None:
    """Refuse too little shared memory, of which workers would die by a bus error without a word.

    Containers often give 64 MB.
    """
    if not (config.workers and _SHARED_MEMORY_FOLDER.is_dir()):
        return
    batches = config.workers * _PREFETCH_BATCHES + max(config.workers, _HELD_BATCHES)
    voxel_bytes = sum(dtype.itemsize for dtype in VOLUME_DTYPES.values())
    needed = batches * micro_batch * math.prod(config.grid) * voxel_bytes
    free = shutil.disk_usage(_SHARED_MEMORY_FOLDER).free
    if free < needed:
        raise UserError(
            f"{_SHARED_MEMORY_FOLDER} has {free / 1e6:.0f} MB free, but {config.workers} loader "
            f"workers with micro-batches of {micro_batch} need {needed / 1e6:.0f} MB a rank: start "
            "the container with a larger --shm-size, or lower data.workers."
        )
