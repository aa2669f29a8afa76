"""Room for batches that is used again and again, shared between workers and the main process where there are workers.

Fresh memory is cleared by the kernel page by page: shared memory, whose pages are small, takes longer for that than
decoding the voxels that go there. So the main process lays out some slots for each worker. A worker decodes into a slot
of its own that is free; a byte for each volume, in the same kind of memory, says that it is in use, until the main
process has dropped everything that lies on that volume.
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
"""Those of this process that are in use, by number."""


class BatchPool:
    """Slots for batches of some volumes. Made in the main process, and sent to workers, if any, when they start."""

    def __init__(
        self,
        workers: int,
        slots: int,
        batch: int,
        volumes: Mapping[str, torch.dtype],
        grid: tuple[int, int, int],
    ) -> None:
        """`slots` for each of `workers`, or for this process where there are none, each slot for `batch` samples.

        Memory is taken as slots are first used.
        """
        self.slots_per_worker, self.samples_per_slot, self.grid = slots, batch, grid
        self.layout: dict[str, tuple[int, np.dtype[Any]]] = {}
        size = 0
        for name, dtype in volumes.items():
            self.layout[name] = size, np.dtype(str(dtype).removeprefix("torch."))
            size += math.ceil(batch * math.prod(grid) * dtype.itemsize / _PAGE_BYTES) * _PAGE_BYTES
        count = max(workers, 1) * slots
        allocate = _allocate_shared if workers else _allocate_private
        self.memory, self.in_use = allocate((count, size)), allocate((count, len(volumes)))
        self.pool_id = next(_POOL_IDS)
        _POOL_BY_ID[self.pool_id] = self

    def take_slot(self, worker: int, count: int) -> tuple[int, dict[str, NDArray[Any]]] | None:
        """A free slot of a worker, now in use, and its arrays for `count` samples; None when there is none.

        There is none while a consumer keeps many batches, or for a batch larger than the slots.
        """
        own = range(worker * self.slots_per_worker, (worker + 1) * self.slots_per_worker)
        # The first that is free: slots further on are touched, and take memory, only when they are needed.
        slot = next((k for k in own if not self.in_use[k].any()), None)
        if slot is None or count > self.samples_per_slot:
            return None
        self.in_use[slot] = 1
        return slot, self._slot_arrays(slot, count)

    def open_slot(self, slot: int, count: int) -> dict[str, Tensor]:
        """In the main process: the volumes of a slot. Each is free again when no tensor or array lies on it."""
        flags = self.in_use[slot].numpy()
        opened = {}
        for i, (name, array) in enumerate(self._slot_arrays(slot, count).items()):
            # A tensor and all its views keep the array that it was made from.
            weakref.finalize(array, flags.__setitem__, i, 0).atexit = False
            opened[name] = torch.from_numpy(array)
        return opened

    def _slot_arrays(self, slot: int, count: int) -> dict[str, NDArray[Any]]:
        memory, shape = self.memory[slot].numpy(), (count, *self.grid)
        return {
            name: memory[start : start + math.prod(shape) * dtype.itemsize]
            .view(dtype)
            .reshape(shape)
            for name, (start, dtype) in self.layout.items()
        }


def find_pool(number: int) -> BatchPool:
    """A pool of this process."""
    return _POOL_BY_ID[number]


def _allocate_shared(shape: tuple[int, int]) -> Tensor:
    """Zeros, in memory that a process started from this one can share."""
    return (
        torch.empty(0, dtype=torch.uint8)
        .set_(torch.UntypedStorage._new_shared(math.prod(shape)))
        .view(shape)
    )


def _allocate_private(shape: tuple[int, int]) -> Tensor:
    # NumPy asks for huge pages, torch does not.
    return torch.from_numpy(np.zeros(shape, np.uint8))
