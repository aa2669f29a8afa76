"""The order of training samples, a function of (seed, epoch) alone.

Each epoch is a permutation of all samples of the split, across shards. The epochs one after the
other make one endless sequence. A global batch is the next piece of it, of which rank r of W takes
the r-th of W equal slices. So one integer, the number of samples seen by all ranks together, is the
entire state:

- a run resumes at the exact next sample, on any number of ranks and workers;
- every rank gets the same number of batches;
- an epoch holds each sample exactly once. Where an epoch does not divide into batches, the batch
  that crosses its end begins the next epoch.
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class TrainOrder:
    """Sample numbers of one rank's micro-batches, from any point of training on, without end."""

    def __init__(
        self,
        sample_count: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        samples_seen: int = 0,
    ) -> None:
        """Start after `samples_seen` samples of all ranks together."""
        assert sample_count > 0 and 0 <= rank < world_size
        self.sample_count, self.micro_batch, self.seed = sample_count, micro_batch, seed
        self.first_position = samples_seen + rank * micro_batch
        self.stride = micro_batch * world_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in itertools.count(self.first_position, self.stride):
            yield [self._sample_at(start + i) for i in range(self.micro_batch)]

    def _sample_at(self, position: int) -> int:
        epoch, index = divmod(position, self.sample_count)
        return int(_permute_epoch(self.sample_count, self.seed, epoch)[index])


@functools.lru_cache(maxsize=2)
def _permute_epoch(sample_count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(sample_count)
