"""The samples of a split in a folder of shards, read by number, alone or as a batch.

A sample is one contiguous range of a tar and one read. At the large grid that is several MB, so
fetching in random order costs a seek (about 10 ms of a disk's 100) or a request (which workers
overlap), not a scan. There is no shuffle buffer to fill before the first batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from rectvlm.config import DataConfig
from rectvlm.data.report_text import join_report_sections
from rectvlm.data.sample import VOLUME_DTYPES
from rectvlm.data.shards import SampleLocation, read_index, read_sample
from rectvlm.data.store import ShardStore
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.types import Batch, Sample, SampleMeta, Split, UserError


class ShardDataset(Dataset[Sample]):
    """The samples of one split."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        """Read the index.

        Raises:
            UserError: there are no shards, they have another grid or spacing, or they hold no
                sample of the split.
        """
        self.store = ShardStore(config.shards)
        index = read_index(self.store)
        if tuple(index.grid) != config.grid or not np.allclose(index.spacing, config.spacing):
            raise UserError(
                f"Shards in {self.store} have grid {tuple(index.grid)} at {tuple(index.spacing)} "
                f"mm, but the configuration asks for {config.grid} at {config.spacing} mm: point "
                "data.shards at matching shards, or make them with `make preprocess`."
            )
        self.grid = config.grid
        self.split = split
        self.locations: list[SampleLocation] = index.select_split(split)
        if not self.locations:
            remedy = "put a patient into it and preprocess again"
            if split == "valid":
                remedy += ", or train without it (train.phases.KEY.validation.every=0)"
            raise UserError(
                f"Shards in {self.store} hold no sample of the split {split!r}: expected at least "
                f"one; {remedy}."
            )

    @classmethod
    def open_selection_split(cls, config: DataConfig) -> "ShardDataset":
        """Open the samples on which training validates: dev, or valid where there is no dev.

        Raises:
            UserError: as the class.
        """
        return cls(config, read_index(config.shards).selection_split)

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, number: int) -> Sample:
        return read_sample(self.store, self.locations[number])

    def read_batch(self, numbers: Sequence[int]) -> Batch:
        """Read samples as a batch, each volume decoded into its place there.

        Raises:
            UserError: as `read_sample`.
        """
        shape = (len(numbers), *self.grid)
        arrays = {name: np.empty(shape, dtype) for name, dtype in VOLUME_DTYPES.items()}
        metas = self.read_into_arrays(numbers, arrays)
        return build_batch({name: torch.from_numpy(arrays[name]) for name in arrays}, metas)

    def read_into_arrays(
        self, numbers: Sequence[int], arrays: Mapping[str, NDArray[Any]]
    ) -> list[SampleMeta]:
        """Read samples, their volumes into arrays (sample, z, y, x) by name.

        Raises:
            UserError: as `read_sample`.
        """
        metas = []
        for i, number in enumerate(numbers):
            volumes = {name: array[i] for name, array in arrays.items()}
            metas.append(read_sample(self.store, self.locations[number], volumes).meta)
        return metas


def collate_samples(samples: list[Sample]) -> Batch:
    """Stack samples; unknown labels and missing maps keep their flags."""
    volumes = {}
    for name in VOLUME_DTYPES:
        stacked = np.stack([getattr(sample, name) for sample in samples])
        volumes[name] = torch.from_numpy(stacked)
    return build_batch(volumes, [sample.meta for sample in samples])


def build_batch(volumes: Mapping[str, Tensor], metas: list[SampleMeta]) -> Batch:
    """Make a batch of stacked volumes, by name, and the metadata of each sample."""
    labels, annotated, partial = [], [], []
    for meta in metas:
        labels.append([meta.labels[name] for name in FINDINGS])
        annotated.append([meta.lesions_annotated[lesion.key] for lesion in LESIONS])
        partial.append([meta.lesions_partial[lesion.key] for lesion in LESIONS])

    # None becomes NaN.
    label_values = torch.from_numpy(np.array(labels, np.float32))
    labels_known = ~label_values.isnan()
    return Batch(
        keys=[meta.key for meta in metas],
        ct=volumes["ct"],
        lesions=volumes["lesions"],
        regions=volumes["regions"],
        regions_known=torch.tensor([meta.regions_source is not None for meta in metas]),
        lesions_annotated=torch.tensor(annotated),
        lesions_partial=torch.tensor(partial),
        labels=label_values.nan_to_num(0.0),
        labels_known=labels_known,
        reports=[join_report_sections(meta.findings, meta.impression) for meta in metas],
        spacing=metas[0].spacing,
        metas=metas,
    )
