"""From shards to batches: which sample goes where, and the batches themselves.

The order of training is a function of (seed, epoch) alone: a permutation of all samples of the split. Rank r of W takes
the r-th of W equal slices of each batch of all ranks. So one number, the samples seen so far by all ranks together, is
the whole state: a run resumes at the exact next sample, on any number of ranks, every rank gets the same number of
batches, and an epoch holds each sample exactly once.
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from rectvlm.config import DataConfig
from rectvlm.data.report import report_text
from rectvlm.data.shards import Entry, read_index, read_sample
from rectvlm.data.store import Store
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.types import Batch, Sample, Split, UserError


class ShardDataset(Dataset[Sample]):
    """The samples of a split, read by number."""

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
        self.entries: list[Entry] = index.select(split)
        if not self.entries:
            raise UserError(f"Shards in {self.store} hold no sample of the split {split!r}.")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Sample:
        return read_sample(self.store, self.entries[number])


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
    labels = [[sample.meta.labels[name] for name in FINDINGS] for sample in samples]
    return Batch(
        keys=[sample.meta.key for sample in samples],
        ct=torch.from_numpy(np.stack([sample.ct for sample in samples])),
        lesions=torch.from_numpy(np.stack([sample.lesions for sample in samples])),
        regions=torch.from_numpy(np.stack([sample.regions for sample in samples])),
        regions_known=torch.tensor([sample.meta.regions_source is not None for sample in samples]),
        lesions_annotated=torch.tensor(
            [[sample.meta.lesions_annotated[lesion.key] for lesion in LESIONS] for sample in samples]
        ),
        lesions_partial=torch.tensor(
            [[sample.meta.lesions_partial[lesion.key] for lesion in LESIONS] for sample in samples]
        ),
        labels=torch.tensor([[float(value or 0) for value in row] for row in labels]),
        labels_known=torch.tensor([[value is not None for value in row] for row in labels]),
        reports=[report_text(sample.meta.findings, sample.meta.impression) for sample in samples],
        spacing=samples[0].meta.spacing,
        meta=[sample.meta for sample in samples],
    )


def train_loader(
    config: DataConfig, micro_batch: int, rank: int, world: int, seed: int, seen: int = 0, pin: bool = False
) -> DataLoader[Sample]:
    """Endless micro-batches of one rank, from the sample after `seen` on."""
    dataset = ShardDataset(config, "train")
    order = TrainOrder(len(dataset), micro_batch, rank, world, seed, seen)
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=config.workers,
        pin_memory=pin,
        persistent_workers=config.workers > 0,
        # The engine starts threads before the loader starts; a forked child of such a process can hang.
        multiprocessing_context="spawn" if config.workers else None,
    )


def eval_loader(config: DataConfig, split: Split, batch_size: int) -> DataLoader[Sample]:
    """Every sample of a split once, in order, unchanged."""
    return DataLoader(ShardDataset(config, split), batch_size=batch_size, shuffle=False, collate_fn=collate)
