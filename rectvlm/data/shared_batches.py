"""Memory for batches that is used again and again, shared by the main process and its workers.

The kernel clears fresh memory page by page. For shared memory, whose pages are small, this takes
longer than decoding the voxels that go there. So the main process lays out some slots for each
worker, and a worker decodes into a free slot of its own. One byte for each volume, in the same kind
of memory, marks it as in use until the main process has dropped everything that lies on the volume.
"""

import itertools
import math
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PAGE_BYTES = 4096
_POOL_IDS = itertools.count()
_POOL_BY_ID: "weakref.WeakValueDictionary[int, BatchPool]" = weakref.WeakValueDictionary()
"""Pools of this process that are in use."""


class BatchPool:
    """Slots for batches. The main process makes it and sends it to workers when they start."""

    def __init__(
        self,
        workers: int,
        slots_per_worker: int,
        samples_per_slot: int,
        dtypes: Mapping[str, np.dtype[Any]],
        grid: tuple[int, int, int],
    ) -> None:
        """Lay out the slots; memory is taken when a slot is first used.

        Args:
            workers: number of worker processes; with 0, this process has slots of its own.
            slots_per_worker: number of batches that a worker can have in use.
            samples_per_slot: largest batch.
            dtypes: type of each volume of a sample, by name.
            grid: voxels (z, y, x) of each volume.
        """
        self.slots_per_worker, self.samples_per_slot = slots_per_worker, samples_per_slot
        self.grid = grid
        self.layout: dict[str, tuple[int, np.dtype[Any]]] = {}
        slot_bytes = 0
        for name, dtype in dtypes.items():
            self.layout[name] = slot_bytes, dtype
            volume_bytes = samples_per_slot * math.prod(grid) * dtype.itemsize
            slot_bytes += math.ceil(volume_bytes / _PAGE_BYTES) * _PAGE_BYTES
        slot_count = max(workers, 1) * slots_per_worker
        allocate = _allocate_shared if workers else _allocate_private
        self.memory = allocate((slot_count, slot_bytes))
        self.in_use = allocate((slot_count, len(dtypes)))
        self.pool_id = next(_POOL_IDS)
        _POOL_BY_ID[self.pool_id] = self

    def take_slot(self, worker: int, sample_count: int) -> int | None:
        """Mark a free slot of a worker as in use; None when there is none for so many samples.

        There is none while a consumer keeps many batches, or for a batch larger than the slots.
        """
        if sample_count > self.samples_per_slot:
            return None
        # The first free slot: later ones take memory only when they are needed.
        for slot in range(worker * self.slots_per_worker, (worker + 1) * self.slots_per_worker):
            if not self.in_use[slot].any():
                self.in_use[slot] = 1
                return slot
        return None

    def slot_arrays(self, slot: int, sample_count: int) -> dict[str, NDArray[Any]]:
        """Arrays (sample, z, y, x) of a slot, by name of the volume."""
        memory, shape = self.memory[slot].numpy(), (sample_count, *self.grid)
        arrays = {}
        for name, (start, dtype) in self.layout.items():
            volume_bytes = memory[start : start + math.prod(shape) * dtype.itemsize]
            arrays[name] = volume_bytes.view(dtype).reshape(shape)
        return arrays

    def open_slot(self, slot: int, sample_count: int) -> dict[str, Tensor]:
        """Tensors of a slot, in the main process.

        The slot is free again when no tensor or array lies on its volumes.
        """
        flags = self.in_use[slot].numpy()
        tensors = {}
        for i, (name, array) in enumerate(self.slot_arrays(slot, sample_count).items()):
            # A tensor and all its views keep the array that it was made from.
            weakref.finalize(array, flags.__setitem__, i, 0).atexit = False
            tensors[name] = torch.from_numpy(array)
        return tensors


def find_pool(pool_id: int) -> BatchPool:
    """The pool of this process with a number."""
    return _POOL_BY_ID[pool_id]


def _allocate_shared(shape: tuple[int, int]) -> Tensor:
    """Zeros in memory that a process started from this one can share."""
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _allocate_private(shape: tuple[int, int]) -> Tensor:
    # NumPy asks for huge pages, torch does not.
    return torch.from_numpy(np.zeros(shape, np.uint8))
