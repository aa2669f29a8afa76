"""Other loaders over the samples of a folder of shards, for `benchmarks.loader`.

Each gives the volumes of one sample after the other. webdataset reads the shards themselves, with
the suite's decoder; MONAI's PersistentDataset and LitData first write a copy in their own form,
which is not compressed, and read that.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.data.dataset import PersistentDataset
from monai.transforms.transform import Transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rectvlm.config import DataConfig
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.sample import VOLUME_DTYPES
from rectvlm.data.volume_codec import decode_volume

Volumes = dict[str, Tensor]
"""Volumes of a sample by name, (z, y, x)."""
PeerLoader = Callable[[Sequence[int], int], Iterator[Volumes]]
"""Iterates over samples by number, read by so many worker processes."""
INSTALL_BY_MODULE = {"webdataset": "webdataset", "monai": "monai", "litdata": "litdata"}
_LITDATA_CHUNK = "256MB"


def read_volumes(dataset: ShardDataset, number: int) -> Volumes:
    """Read the volumes of a sample from the shards."""
    sample = dataset[number]
    return {name: torch.from_numpy(getattr(sample, name)) for name in VOLUME_DTYPES}


class ReadVolumes(Transform):
    """MONAI's form of `read_volumes`."""

    def __init__(self, dataset: ShardDataset) -> None:
        """Read from this dataset."""
        self.dataset = dataset

    def __call__(self, data: dict[str, int]) -> Volumes:
        """Read the sample of a number."""
        return read_volumes(self.dataset, data["number"])


class LitDataSamples(Dataset[Volumes]):
    """The samples of a LitData folder by number."""

    def __init__(self, folder: str) -> None:
        """Open the folder."""
        from litdata import StreamingDataset

        self.dataset = StreamingDataset(folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Volumes:
        sample = self.dataset[number]
        # They are views of a mapped file, of which nothing has been read yet.
        return {name: torch.as_tensor(volume).clone() for name, volume in sample.items()}


def start_peers(data: DataConfig, work: Path, installed: Sequence[str]) -> dict[str, PeerLoader]:
    """Prepare every peer that is installed, by the name of its package.

    Args:
        data: the shards.
        work: folder for the peers' own copies.
        installed: modules of `INSTALL_BY_MODULE` that can be imported.
    """
    dataset = ShardDataset(data, "train")
    peers: dict[str, PeerLoader] = {}
    if "webdataset" in installed:
        peers["webdataset"] = partial(_iterate_webdataset, Path(data.shards))
    if "monai" in installed:
        numbers = [{"number": number} for number in range(len(dataset))]
        cached = PersistentDataset(numbers, ReadVolumes(dataset), work / "monai")
        for number in range(len(cached)):
            cached[number]  # fills the cache
        peers["MONAI PersistentDataset"] = partial(_iterate_map, cached)
    if "litdata" in installed:
        peers["LitData"] = partial(_iterate_map, _convert_to_litdata(dataset, work / "litdata"))
    return peers


def _iterate_map(dataset: Any, order: Sequence[int], workers: int) -> Iterator[Volumes]:
    context = "spawn" if workers else None
    yield from DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        multiprocessing_context=context,
    )


def _iterate_webdataset(shards: Path, order: Sequence[int], workers: int) -> Iterator[Volumes]:
    """Iterate in the order of the shards: this loader knows no other."""
    import webdataset

    urls = sorted(str(path) for path in shards.rglob("train-*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    endless = dataset.map(_decode_members).repeat()
    context = "spawn" if workers else None
    loader = DataLoader(
        endless, batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    for _, volumes in zip(order, loader, strict=False):
        yield volumes


def _decode_members(members: dict[str, Any]) -> Volumes:
    volumes: Volumes = {}
    for name, dtype in VOLUME_DTYPES.items():
        data = next(value for key, value in members.items() if key.split(".")[0] == name)
        volumes[name] = torch.from_numpy(decode_volume(data, dtype, name))
    return volumes


def _convert_to_litdata(dataset: ShardDataset, folder: Path) -> LitDataSamples:
    """Write LitData's chunks in this process, as `litdata.optimize` does in others."""
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=_LITDATA_CHUNK)
    for number in range(len(dataset)):
        writer[number] = read_volumes(dataset, number)
    writer.done()
    writer.merge()
    return LitDataSamples(str(folder))
