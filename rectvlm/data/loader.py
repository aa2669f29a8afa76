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
from rectvlm.data.report import report_text
from rectvlm.data.shards import Entry, read_index, read_sample
from rectvlm.data.slots import Pool, find_pool
from rectvlm.data.store import Store
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.types import Batch, Sample, SampleMeta, Split, UserError

VOLUMES = {"ct": torch.int16, "lesions": torch.uint8, "regions": torch.uint8}
_NUMPY = {"ct": np.int16, "lesions": np.uint8, "regions": np.uint8}
_PREFETCH = 2
"""Batches that each worker holds ready."""
_HELD = 2
"""Batches that the main process holds at a time: the next one comes before the last one goes."""
_SHARED_MEMORY = Path("/dev/shm")


class ShardDataset(Dataset[Sample]):
    """The samples of a split, read by number, one at a time or as a batch."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        """Open the index.

        Raises:
            UserError: no shards there, shards of another grid or spacing, or no sample of the split.
        """
        self.store = Store(config.shards)
        index = read_index(self.store)
        if tuple(index.grid) != config.grid or not np.allclose(index.spacing, config.spacing):
            raise UserError(
                f"Shards in {self.store} have grid {tuple(index.grid)} at {tuple(index.spacing)} mm, but the "
                f"configuration asks for {config.grid} at {config.spacing} mm: point data.shards at matching shards, "
                "or make them with `make preprocess`."
            )
        self.grid = config.grid
        self.entries: list[Entry] = index.select(split)
        if not self.entries:
            raise UserError(f"Shards in {self.store} hold no sample of the split {split!r}.")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Sample:
        return read_sample(self.store, self.entries[number])

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some samples as a batch; each volume is decoded right into its place there.

        Raises:
            UserError: see `read_sample`.
        """
        arrays = {name: np.empty((len(numbers), *self.grid), _NUMPY[name]) for name in VOLUMES}
        metas = self.read(numbers, arrays)
        return _batch({name: torch.from_numpy(array) for name, array in arrays.items()}, metas)

    def read(self, numbers: Sequence[int], arrays: Mapping[str, NDArray[Any]]) -> list[SampleMeta]:
        """Some samples, the volumes into arrays of (sample, z, y, x) by name.

        Raises:
            UserError: see `read_sample`.
        """
        return [
            read_sample(self.store, self.entries[number], {name: array[i] for name, array in arrays.items()}).meta
            for i, number in enumerate(numbers)
        ]


class _Source(Dataset[Sample]):
    """What DataLoader reads from, in workers or without: a dataset, and the slots that its batches go to."""

    def __init__(self, dataset: ShardDataset, pool: Pool) -> None:
        self.dataset, self.pool = dataset, pool

    def __getitems__(self, numbers: list[int]) -> "_Parcel | Batch | UserError":
        worker = get_worker_info()
        taken = self.pool.take(worker.id if worker else 0, len(numbers))
        # DataLoader would wrap a worker's exception in a traceback: an error that is for the user travels as a value,
        # and `_Batches` raises it.
        try:
            if taken is None:
                return self.dataset.batch(numbers)
            slot, arrays = taken
            return _Parcel(self.pool.number, slot, self.dataset.read(numbers, arrays))
        except UserError as error:
            return error


@dataclass(frozen=True)
class _Parcel:
    """A batch on its way to the main process: where its volumes lie, and all else."""

    pool: int
    slot: int
    metas: list[SampleMeta]

    def open(self) -> Batch:
        """The batch, in the main process; once."""
        return _batch(find_pool(self.pool).open(self.slot, len(self.metas)), self.metas)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by torch's DataLoader, in a thread."""
        return self.open().pin_memory()


class TrainOrder:
    """Numbers of the samples of each micro-batch of one rank, from any point of training on.

    Epoch after epoch, each a permutation of all samples, makes one endless row of samples. Neither the row nor a
    position in it depends on the number of ranks. A batch of all ranks may begin in one epoch and end in the next.
    """

    def __init__(self, samples: int, micro_batch: int, rank: int, world: int, seed: int, seen: int = 0) -> None:
        """Start after `seen` samples of all ranks together."""
        assert samples > 0 and 0 <= rank < world
        self.samples, self.micro_batch, self.seed = samples, micro_batch, seed
        self.first, self.stride = seen + rank * micro_batch, micro_batch * world

    def __iter__(self) -> Iterator[list[int]]:
        for start in itertools.count(self.first, self.stride):
            yield [self._at(start + i) for i in range(self.micro_batch)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.samples)
        return int(_permutation(self.samples, self.seed, epoch)[place])


@functools.lru_cache(maxsize=2)
def _permutation(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(samples)


def collate(samples: list[Sample]) -> Batch:
    """Stack samples; unknown labels and missing maps keep their flags."""
    volumes = {name: torch.from_numpy(np.stack([getattr(sample, name) for sample in samples])) for name in VOLUMES}
    return _batch(volumes, [sample.meta for sample in samples])


def _batch(volumes: dict[str, Tensor], metas: list[SampleMeta]) -> Batch:
    labels = [[meta.labels[name] for name in FINDINGS] for meta in metas]
    return Batch(
        keys=[meta.key for meta in metas],
        ct=volumes["ct"],
        lesions=volumes["lesions"],
        regions=volumes["regions"],
        regions_known=torch.tensor([meta.regions_source is not None for meta in metas]),
        lesions_annotated=torch.tensor([[meta.lesions_annotated[lesion.key] for lesion in LESIONS] for meta in metas]),
        lesions_partial=torch.tensor([[meta.lesions_partial[lesion.key] for lesion in LESIONS] for meta in metas]),
        labels=torch.tensor([[float(value or 0) for value in row] for row in labels]),
        labels_known=torch.tensor([[value is not None for value in row] for row in labels]),
        reports=[report_text(meta.findings, meta.impression) for meta in metas],
        spacing=metas[0].spacing,
        meta=metas,
    )


class Loader:
    """Batches in a given order. Each iteration starts anew, with worker processes of its own."""

    def __init__(self, dataset: ShardDataset, order: Iterable[list[int]], workers: int = 0, pin: bool = False) -> None:
        """Batches of `dataset`, the numbers of each from `order`; `pin` puts them in page-locked memory."""
        self.dataset, self.order, self.workers, self.pin = dataset, order, workers, pin

    def __iter__(self) -> "_Batches":
        return _Batches(self)


class _Batches(Iterator[Batch]):
    """One iteration. Workers end when it does, when it is dropped, or when the interpreter exits."""

    def __init__(self, loader: Loader) -> None:
        order = _Stoppable(loader.order)
        largest = len(next(iter(loader.order), [0]))
        pool = Pool(loader.workers, _PREFETCH + _HELD, largest, VOLUMES, loader.dataset.grid)
        inner = DataLoader(
            _Source(loader.dataset, pool),
            batch_sampler=order,
            collate_fn=_as_it_is,
            num_workers=loader.workers,
            pin_memory=loader.pin,
            prefetch_factor=_PREFETCH if loader.workers else None,
            # The engine starts threads before the loader starts; a forked child of such a process can hang.
            multiprocessing_context="spawn" if loader.workers else None,
            worker_init_fn=_leave_signals_to_the_parent,
        )
        with _signals_held() if loader.workers else contextlib.nullcontext():
            self._inner: Iterator[Any] = iter(inner)
        self.close = weakref.finalize(self, _finish, order, self._inner, pool)
        # `finalize` has an exit hook too, but multiprocessing's may come first and kill the workers at work.
        self.close.atexit = False
        atexit.register(self.close)

    def __next__(self) -> Batch:
        item = next(self._inner)
        if isinstance(item, UserError):
            self.close()
            raise item
        if isinstance(item, _Parcel):
            return item.open()
        assert isinstance(item, Batch)
        return item


class _Stoppable:
    """An order that can be cut off."""

    def __init__(self, order: Iterable[list[int]]) -> None:
        self.order, self.stopped = order, False

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.takewhile(lambda _: not self.stopped, self.order)


def _finish(order: _Stoppable, inner: Iterator[Any], pool: Pool) -> None:
    """Let workers hand over what they hold ready, whereupon DataLoader ends them.

    A worker that ends while its queue's thread is inside torch, sending a batch, aborts ("terminate called without an
    active exception"): CPython ends such threads by unwinding their stack, which C++ does not allow. The pool must be
    there for what is handed over.
    """
    order.stopped = True
    with contextlib.suppress(RuntimeError):  # a worker that has died already
        for _ in inner:
            pass


_FOR_THE_PARENT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Launchers and schedulers send these to every process, and the step that a run ends after them needs its batches."""


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes that start in here hold signals back until they leave them to their parent: the imports before that
    take seconds. The parent's other threads still take its own."""
    resource_tracker.ensure_running()  # to start it, Python blocks two of them and lifts that afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Workers end when their parent says so or is gone."""
    for number in _FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_PARENT)


def _as_it_is(batch: Any) -> Any:
    return batch


def train_loader(
    config: DataConfig, micro_batch: int, rank: int, world: int, seed: int, seen: int = 0, pin: bool = False
) -> Loader:
    """Endless micro-batches of one rank, from the sample after `seen` on.

    Raises:
        UserError: see `ShardDataset`, or too little shared memory for the workers' batches.
    """
    dataset = ShardDataset(config, "train")
    _require_shared_memory(config, micro_batch)
    order = TrainOrder(len(dataset), micro_batch, rank, world, seed, seen)
    return Loader(dataset, order, config.workers, pin)


def eval_loader(config: DataConfig, split: Split, batch_size: int) -> Loader:
    """Every sample of a split once, in order, unchanged."""
    dataset = ShardDataset(config, split)
    numbers = range(len(dataset))
    return Loader(dataset, [list(numbers[i : i + batch_size]) for i in numbers[::batch_size]])


def _require_shared_memory(config: DataConfig, micro_batch: int) -> None:
    """Workers die of a bus error, without a word, where shared memory is too small: containers often give 64 MB."""
    if not (config.workers and _SHARED_MEMORY.is_dir()):
        return
    voxel_bytes = sum(dtype.itemsize for dtype in VOLUMES.values())
    needed = (
        (config.workers * _PREFETCH + max(config.workers, _HELD)) * micro_batch * math.prod(config.grid) * voxel_bytes
    )
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, but {config.workers} loader workers with micro-batches of "
            f"{micro_batch} need {needed / 1e6:.0f} MB a rank: start the container with a larger --shm-size, or lower "
            "data.workers."
        )
