"""From shards to batches: which sample goes where, and the batches themselves.

The order of training is a function of (seed, epoch) alone: a permutation of all samples of the split, across shards.
Epoch after epoch makes one endless row, and rank r of W takes the r-th of W equal slices of each batch of all ranks. So
one number, the samples seen so far by all ranks together, is the whole state: a run resumes at the exact next sample,
on any number of ranks and workers, every rank gets the same number of batches, and an epoch holds each sample exactly
once. Where an epoch does not divide, the batch that crosses its end begins the next epoch.

A sample is one contiguous range of a tar and one read. At the large grid that is several MB, so that fetching in random
order costs a seek (about 10 ms of a disk's 100) or a request (which workers overlap), not a scan. There is no shuffle
buffer, and no memory to fill before the first batch.
"""

import atexit
import contextlib
import functools
import itertools
import math
import shutil
import signal
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rectvlm.config import DataConfig
from rectvlm.data.report_text import join_report_sections
from rectvlm.data.shards import SampleLocation, read_index, read_sample
from rectvlm.data.shared_batches import BatchPool, find_pool
from rectvlm.data.store import ShardStore
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.types import Batch, Sample, SampleMeta, Split, UserError

VOLUME_DTYPES = {"ct": torch.int16, "lesions": torch.uint8, "regions": torch.uint8}
_NUMPY_DTYPES = {"ct": np.int16, "lesions": np.uint8, "regions": np.uint8}
_PREFETCH_BATCHES = 2
"""Batches that each worker holds ready."""
_HELD_BATCHES = 2
"""Batches that the main process holds at a time: the next one comes before the last one goes."""
_SHARED_MEMORY_FOLDER = Path("/dev/shm")


class ShardDataset(Dataset[Sample]):
    """The samples of a split, read by number, one at a time or as a batch."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        """Open the index.

        Raises:
            UserError: no shards there, shards of another grid or spacing, or no sample of the split.
        """
        self.store = ShardStore(config.shards)
        index = read_index(self.store)
        if tuple(index.grid) != config.grid or not np.allclose(index.spacing, config.spacing):
            raise UserError(
                f"Shards in {self.store} have grid {tuple(index.grid)} at {tuple(index.spacing)} mm, but the "
                f"configuration asks for {config.grid} at {config.spacing} mm: point data.shards at matching shards, "
                "or make them with `make preprocess`."
            )
        self.grid = config.grid
        self.locations: list[SampleLocation] = index.select_split(split)
        if not self.locations:
            raise UserError(f"Shards in {self.store} hold no sample of the split {split!r}.")

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, number: int) -> Sample:
        return read_sample(self.store, self.locations[number])

    def read_batch(self, numbers: Sequence[int]) -> Batch:
        """Some samples as a batch; each volume is decoded right into its place there.

        Raises:
            UserError: see `read_sample`.
        """
        arrays = {
            name: np.empty((len(numbers), *self.grid), _NUMPY_DTYPES[name])
            for name in VOLUME_DTYPES
        }
        metas = self.read_into_arrays(numbers, arrays)
        return _build_batch(
            {name: torch.from_numpy(array) for name, array in arrays.items()}, metas
        )

    def read_into_arrays(
        self, numbers: Sequence[int], arrays: Mapping[str, NDArray[Any]]
    ) -> list[SampleMeta]:
        """Some samples, the volumes into arrays of (sample, z, y, x) by name.

        Raises:
            UserError: see `read_sample`.
        """
        return [
            read_sample(
                self.store,
                self.locations[number],
                {name: array[i] for name, array in arrays.items()},
            ).meta
            for i, number in enumerate(numbers)
        ]


class _BatchDataset(Dataset[Sample]):
    """What DataLoader reads from, in workers or without: a dataset, and the slots that its batches go to."""

    def __init__(self, dataset: ShardDataset, pool: BatchPool) -> None:
        self.dataset, self.pool = dataset, pool

    def __getitems__(self, numbers: list[int]) -> "_BatchHandle | Batch | UserError":
        worker = get_worker_info()
        taken = self.pool.take_slot(worker.id if worker else 0, len(numbers))
        # DataLoader would wrap a worker's exception in a traceback: an error that is for the user travels as a value,
        # and `_Batches` raises it.
        try:
            if taken is None:
                return self.dataset.read_batch(numbers)
            slot, arrays = taken
            return _BatchHandle(
                self.pool.pool_id, slot, self.dataset.read_into_arrays(numbers, arrays)
            )
        except UserError as error:
            return error


@dataclass(frozen=True)
class _BatchHandle:
    """A batch on its way to the main process: where its volumes lie, and all else."""

    pool_id: int
    slot: int
    metas: list[SampleMeta]

    def open_batch(self) -> Batch:
        """The batch, in the main process; once."""
        return _build_batch(
            find_pool(self.pool_id).open_slot(self.slot, len(self.metas)), self.metas
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by torch's DataLoader, in a thread."""
        return self.open_batch().pin_memory()


class TrainOrder:
    """Numbers of the samples of each micro-batch of one rank, from any point of training on.

    Epoch after epoch, each a permutation of all samples, makes one endless row of samples. Neither the row nor a
    position in it depends on the number of ranks. A batch of all ranks may begin in one epoch and end in the next.
    """

    def __init__(
        self,
        samples: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        samples_seen: int = 0,
    ) -> None:
        """Start after `seen` samples of all ranks together."""
        assert samples > 0 and 0 <= rank < world_size
        self.samples, self.micro_batch, self.seed = samples, micro_batch, seed
        self.first, self.stride = samples_seen + rank * micro_batch, micro_batch * world_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in itertools.count(self.first, self.stride):
            yield [self._sample_at(start + i) for i in range(self.micro_batch)]

    def _sample_at(self, position: int) -> int:
        epoch, place = divmod(position, self.samples)
        return int(_epoch_permutation(self.samples, self.seed, epoch)[place])


@functools.lru_cache(maxsize=2)
def _epoch_permutation(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(samples)


def collate_samples(samples: list[Sample]) -> Batch:
    """Stack samples; unknown labels and missing maps keep their flags."""
    volumes = {
        name: torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))
        for name in VOLUME_DTYPES
    }
    return _build_batch(volumes, [sample.meta for sample in samples])


def _build_batch(volumes: dict[str, Tensor], metas: list[SampleMeta]) -> Batch:
    labels = [[meta.labels[name] for name in FINDINGS] for meta in metas]
    return Batch(
        keys=[meta.key for meta in metas],
        ct=volumes["ct"],
        lesions=volumes["lesions"],
        regions=volumes["regions"],
        regions_known=torch.tensor([meta.regions_source is not None for meta in metas]),
        lesions_annotated=torch.tensor(
            [[meta.lesions_annotated[lesion.key] for lesion in LESIONS] for meta in metas]
        ),
        lesions_partial=torch.tensor(
            [[meta.lesions_partial[lesion.key] for lesion in LESIONS] for meta in metas]
        ),
        labels=torch.tensor([[float(value or 0) for value in row] for row in labels]),
        labels_known=torch.tensor([[value is not None for value in row] for row in labels]),
        reports=[join_report_sections(meta.findings, meta.impression) for meta in metas],
        spacing=metas[0].spacing,
        metas=metas,
    )


class BatchLoader:
    """Batches in a given order. Each iteration starts anew, with worker processes of its own."""

    def __init__(
        self,
        dataset: ShardDataset,
        order: Iterable[list[int]],
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Batches of `dataset`, the numbers of each from `order`; `pin` puts them in page-locked memory."""
        self.dataset, self.order, self.workers, self.pin_memory = (
            dataset,
            order,
            workers,
            pin_memory,
        )

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)


class _BatchIterator(Iterator[Batch]):
    """One iteration. Workers end when it does, when it is dropped, or when the interpreter exits."""

    def __init__(self, loader: BatchLoader) -> None:
        order = _StoppableOrder(loader.order)
        largest = len(next(iter(loader.order), [0]))
        pool = BatchPool(
            loader.workers,
            _PREFETCH_BATCHES + _HELD_BATCHES,
            largest,
            VOLUME_DTYPES,
            loader.dataset.grid,
        )
        inner = DataLoader(
            _BatchDataset(loader.dataset, pool),
            batch_sampler=order,
            collate_fn=_collate_nothing,
            num_workers=loader.workers,
            pin_memory=loader.pin_memory,
            prefetch_factor=_PREFETCH_BATCHES if loader.workers else None,
            # The engine starts threads before the loader starts; a forked child of such a process can hang.
            multiprocessing_context="spawn" if loader.workers else None,
            worker_init_fn=_ignore_parent_signals,
        )
        with _block_parent_signals() if loader.workers else contextlib.nullcontext():
            self._inner: Iterator[Any] = iter(inner)
        self.close = weakref.finalize(self, _drain_workers, order, self._inner, pool)
        # `finalize` has an exit hook too, but multiprocessing's may come first and kill the workers at work.
        self.close.atexit = False
        atexit.register(self.close)

    def __next__(self) -> Batch:
        item = next(self._inner)
        if isinstance(item, UserError):
            self.close()
            raise item
        if isinstance(item, _BatchHandle):
            return item.open_batch()
        assert isinstance(item, Batch)
        return item


class _StoppableOrder:
    """An order that can be cut off."""

    def __init__(self, order: Iterable[list[int]]) -> None:
        self.order, self.stopped = order, False

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.takewhile(lambda _: not self.stopped, self.order)


def _drain_workers(order: _StoppableOrder, inner: Iterator[Any], pool: BatchPool) -> None:
    """Let workers hand over what they hold ready, whereupon DataLoader ends them.

    A worker that ends while its queue's thread is inside torch, sending a batch, aborts ("terminate called without an
    active exception"): CPython ends such threads by unwinding their stack, which C++ does not allow. The pool must be
    there for what is handed over.
    """
    order.stopped = True
    with contextlib.suppress(RuntimeError):  # a worker that has died already
        for _ in inner:
            pass


_PARENT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Launchers and schedulers send these to every process, and the step that a run ends after them needs its batches."""


@contextlib.contextmanager
def _block_parent_signals() -> Iterator[None]:
    """Processes that start in here hold signals back until they leave them to their parent: the imports before that
    take seconds. The parent's other threads still take its own."""
    resource_tracker.ensure_running()  # to start it, Python blocks two of them and lifts that afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENT_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_parent_signals(_worker: int) -> None:
    """Workers end when their parent says so or is gone."""
    for number in _PARENT_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENT_SIGNALS)


def _collate_nothing(batch: Any) -> Any:
    return batch


def build_train_loader(
    config: DataConfig,
    micro_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    samples_seen: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """Endless micro-batches of one rank, from the sample after `seen` on.

    Raises:
        UserError: see `ShardDataset`, or too little shared memory for the workers' batches.
    """
    dataset = ShardDataset(config, "train")
    _require_shared_memory(config, micro_batch)
    order = TrainOrder(len(dataset), micro_batch, rank, world_size, seed, samples_seen)
    return BatchLoader(dataset, order, config.workers, pin_memory)


def build_eval_loader(config: DataConfig, split: Split, batch_size: int) -> BatchLoader:
    """Every sample of a split once, in order, unchanged."""
    dataset = ShardDataset(config, split)
    numbers = range(len(dataset))
    return BatchLoader(dataset, [list(numbers[i : i + batch_size]) for i in numbers[::batch_size]])


def _require_shared_memory(config: DataConfig, micro_batch: int) -> None:
    """Workers die of a bus error, without a word, where shared memory is too small: containers often give 64 MB."""
    if not (config.workers and _SHARED_MEMORY_FOLDER.is_dir()):
        return
    voxel_bytes = sum(dtype.itemsize for dtype in VOLUME_DTYPES.values())
    needed = (
        (config.workers * _PREFETCH_BATCHES + max(config.workers, _HELD_BATCHES))
        * micro_batch
        * math.prod(config.grid)
        * voxel_bytes
    )
    free = shutil.disk_usage(_SHARED_MEMORY_FOLDER).free
    if free < needed:
        raise UserError(
            f"{_SHARED_MEMORY_FOLDER} has {free / 1e6:.0f} MB free, but {config.workers} loader workers with micro-batches of "
            f"{micro_batch} need {needed / 1e6:.0f} MB a rank: start the container with a larger --shm-size, or lower "
            "data.workers."
        )
