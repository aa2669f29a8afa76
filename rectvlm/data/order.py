"""The order of training samples, a function of (seed, epoch) alone.

Each epoch is a permutation of all samples of the split, across shards. The epochs one after the
other make one endless sequence. A global batch is the next piece of it, cut into micro-batches, of
which rank r takes the r-th in each round. So one integer, the number of samples seen by all ranks
together, is the entire state:

- a run resumes at the exact next sample, on any number of ranks and workers;
- every rank gets the same number of batches;
- an epoch holds each sample exactly once, or as often as `repeat_rare_lesions` says. Where an epoch
  does not divide into batches, the batch that crosses its end begins the next epoch.

With lengths, the samples of a global batch are sorted by length before they are cut into
micro-batches, so that reports of like length are padded together, and all ranks have like lengths
at the same time. Each global batch holds the same samples as without.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


class TrainOrder:
    """Sample numbers of one rank's micro-batches, from any point of training on, without end."""

    def __init__(
        self,
        numbers: Sequence[int],
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        samples_seen: int = 0,
        accumulation: int = 1,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Start after `samples_seen` samples of all ranks together.

        Args:
            numbers: sample numbers of an epoch, in any order.
            micro_batch: number of samples of a micro-batch.
            rank: this rank.
            world_size: number of ranks.
            seed: seed of the permutations.
            samples_seen: number of samples before the first, at the end of a global batch.
            accumulation: number of micro-batches of a rank in a global batch.
            lengths: length of each sample by its number, in any unit; None keeps the order of the
                permutation.
        """
        assert len(numbers) > 0 and 0 <= rank < world_size
        self.numbers, self.micro_batch, self.seed = numbers, micro_batch, seed
        self.samples_seen, self.lengths = samples_seen, lengths
        self.first_of_rank = rank * micro_batch
        self.stride = micro_batch * world_size
        self.global_batch = accumulation * self.stride

    def __iter__(self) -> Iterator[list[int]]:
        for start in itertools.count(self.samples_seen, self.global_batch):
            numbers = [self._sample_at(start + i) for i in range(self.global_batch)]
            if self.lengths is not None:
                numbers.sort(key=self.lengths.__getitem__)
            for first in range(self.first_of_rank, self.global_batch, self.stride):
                yield numbers[first : first + self.micro_batch]

    def _sample_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.numbers))
        return self.numbers[_permute_epoch(len(self.numbers), self.seed, epoch)[index]]


def repeat_rare_lesions(outlined: Sequence[Sequence[str]], threshold: float) -> list[int]:
    """Sample numbers of an epoch in which cases with rarely outlined lesions stand more often.

    A lesion that a share f of the cases have outlined, below the threshold t, repeats its cases
    √(t / f) times, and a case has the largest number of its lesions (repeat-factor sampling: Gupta
    et al., 2019, "LVIS"). Fractions add up from case to case: of three cases with 1.33 each, one
    stands twice.

    Args:
        outlined: for each case, lesions that it has outlined.
        threshold: t, a share of the cases; 0 repeats nothing.
    """
    counts = Counter(key for keys in outlined for key in set(keys))
    factors = {key: math.sqrt(threshold * len(outlined) / count) for key, count in counts.items()}
    numbers = []
    fraction = 0.0
    for number, keys in enumerate(outlined):
        fraction, repeats = math.modf(max((1.0, *(factors[key] for key in keys))) + fraction)
        numbers += [number] * int(repeats)
    return numbers


@functools.lru_cache(maxsize=2)
def _permute_epoch(sample_count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(sample_count)
