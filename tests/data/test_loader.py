"""Loaders: batches with and without workers, resumed, in pinned memory, and ended cleanly."""

import multiprocessing
import os
import signal
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import phantom_sample

from rectvlm.config import Config, DataConfig
from rectvlm.data.dataset import ShardDataset, collate_samples
from rectvlm.data.loader import build_eval_loader, build_train_loader
from rectvlm.data.order import TrainOrder
from rectvlm.data.sample import VOLUME_DTYPES
from rectvlm.data.shards import write_shards
from rectvlm.data.shared_batches import BatchPool
from rectvlm.labels import CT_WINDOWS, FINDINGS, LESIONS
from rectvlm.models.image_features import apply_windows
from rectvlm.types import Batch, UserError


@pytest.fixture(scope="module")
def data(tiny: Config, phantom_shards: Path) -> DataConfig:
    return tiny.data.model_copy(update={"shards": str(phantom_shards)})


def first(
    data: DataConfig, count: int, rank: int = 0, world: int = 1, seen: int = 0
) -> list[Batch]:
    return list(islice(build_train_loader(data, 2, rank, world, seed=0, samples_seen=seen), count))  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    tensors = (
        "ct",
        "lesions",
        "regions",
        "regions_known",
        "lesions_annotated",
        "labels",
        "labels_known",
    )
    return (
        a.keys == b.keys
        and a.reports == b.reports
        and all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors)
    )


def test_ranks_take_different_samples_and_every_rank_has_a_next(data: DataConfig) -> None:
    both = [first(data, 3, rank, 2) for rank in (0, 1)]
    keys = [key for step in zip(*both, strict=True) for batch in step for key in batch.keys]
    assert sorted(keys[:6]) == sorted(keys[6:12]) == sorted(f"phantom_{k}" for k in range(6))
    assert not any(set(one.keys) == set(two.keys) for one, two in zip(*both, strict=True))


def test_a_resumed_loader_gives_the_next_batch(data: DataConfig) -> None:
    whole = first(data, 4)
    assert all(same(a, b) for a, b in zip(first(data, 2, seen=4), whole[2:], strict=True))


def test_worker_processes_give_the_same_batches(data: DataConfig) -> None:
    with_workers = first(data.model_copy(update={"workers": 2}), 4)
    assert all(same(a, b) for a, b in zip(with_workers, first(data, 4), strict=True))


def test_a_signal_while_workers_start_is_left_to_the_parent(data: DataConfig) -> None:
    """A launcher's signal reaches workers while they import, but the step needs their batches."""
    sent: set[int] = set()
    done = threading.Event()

    def signal_all_new() -> None:
        while not done.wait(0.005):
            for worker in multiprocessing.active_children():
                if worker.pid is not None and worker.pid not in sent:
                    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                        os.kill(worker.pid, number)
                    sent.add(worker.pid)

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    thread = threading.Thread(target=signal_all_new)
    thread.start()
    try:
        found = first(data.model_copy(update={"workers": 2}), 4)
    finally:
        done.set()
        thread.join()
    assert len(sent) == 2
    assert all(same(a, b) for a, b in zip(found, first(data, 4), strict=True))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_consumer_keeps_is_never_written_over(data: DataConfig, workers: int) -> None:
    """Dropped batches share a few slots; a batch or a view that is kept stays unchanged."""
    dataset = ShardDataset(data, "train")
    expected = [
        dataset.read_batch(numbers) for numbers in islice(TrainOrder(range(6), 2, 0, 1, seed=0), 14)
    ]
    places, kept, view = set(), None, None
    batches = iter(
        build_train_loader(data.model_copy(update={"workers": workers}), 2, 0, 1, seed=0)
    )
    for i, wanted in enumerate(expected):
        batch = next(batches)
        assert same(batch, wanted)
        places.add(batch.ct.data_ptr())
        if i == 2:
            kept = batch
        if i == 5:
            view = batch.regions[1, 3]
    assert kept is not None and view is not None
    assert same(kept, expected[2]) and torch.equal(view, expected[5].regions[1, 3])
    assert 2 <= len(places) <= 6
    del batch
    batches.close()
    assert same(kept, expected[2])


def test_more_batches_than_slots_can_be_kept(data: DataConfig) -> None:
    kept = first(data.model_copy(update={"workers": 1}), 9)
    assert len({batch.ct.data_ptr() for batch in kept}) == 9
    assert all(same(a, b) for a, b in zip(kept, first(data, 9), strict=True))


def test_a_slot_is_free_when_nothing_lies_on_its_volumes() -> None:
    pool = BatchPool(2, 2, 3, VOLUME_DTYPES, (2, 4, 8))
    assert pool.take_slot(1, 2) == 2, "the second worker's first"
    for i, array in enumerate(pool.slot_arrays(2, 2).values()):
        array[:] = i + 1
    opened = pool.open_slot(2, 2)
    assert list(opened) == list(VOLUME_DTYPES)
    for i, (name, dtype) in enumerate(VOLUME_DTYPES.items()):
        volume = opened[name].numpy()
        assert volume.dtype == dtype and volume.shape == (2, 2, 4, 8) and (volume == i + 1).all()
    del volume
    assert pool.take_slot(1, 3) == 3 and pool.take_slot(1, 1) is None
    assert pool.take_slot(0, 3) == 0 and pool.take_slot(0, 4) is None
    part = opened["lesions"][1].flatten()[4:]
    del opened
    assert pool.take_slot(1, 1) is None
    del part
    assert pool.take_slot(1, 1) == 2


NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("device", "workers"),
    [
        ("cpu", 0),
        pytest.param("cuda", 0, marks=NEEDS_CUDA),
        pytest.param("cuda", 1, marks=NEEDS_CUDA),
    ],
)
def test_hu_travel_as_int16_and_windows_are_made_on_the_device(
    data: DataConfig, device: str, workers: int
) -> None:
    """Two bytes a voxel go to the device for any number of windows, with the full range of HU."""
    pin = device == "cuda"
    loader = build_train_loader(
        data.model_copy(update={"workers": workers}), 2, 0, 1, seed=0, pin_memory=pin
    )
    batch = next(iter(loader))
    assert same(batch, first(data, 1)[0])
    assert batch.ct.dtype == torch.int16 and batch.ct.is_pinned() == pin
    moved = batch.to(device)
    assert (moved.ct.dtype, moved.ct.device.type, moved.lesions.dtype) == (
        torch.int16,
        device,
        torch.uint8,
    )
    windows = apply_windows(moved.ct, data.windows)
    assert windows.dtype == torch.float32 and windows.device.type == device
    for channel, name in enumerate(data.windows):
        centre, width = CT_WINDOWS[name]
        by_hand = ((batch.ct.double() - (centre - width / 2)) / width).clamp(0, 1)
        torch.testing.assert_close(windows[:, channel].cpu().double(), by_hand, rtol=0, atol=1e-6)
        assert windows[:, channel].unique().numel() > 20


def test_evaluation_reads_each_sample_once_in_order(data: DataConfig) -> None:
    keys = [key for batch in build_eval_loader(data, "valid", 2) for key in batch.keys]  # type: ignore[attr-defined]
    assert keys == ["phantom_6", "phantom_7", "phantom_8"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grid": (16, 48, 64)}, "16, 48, 64"),
        ({"spacing": (16.0, 7.2, 7.0)}, "7.0"),
        ({"shards": "/nowhere"}, "/nowhere"),
    ],
)
def test_shards_that_do_not_fit_are_refused(
    data: DataConfig, change: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        build_train_loader(data.model_copy(update=change), 1, 0, 1, 0)


def test_unknown_stays_unknown(tiny: Config) -> None:
    sample = phantom_sample(0, tiny)
    labels = dict(zip(FINDINGS, [None, 1, 0, *[None] * 14, 1], strict=True))
    annotated = {lesion.key: lesion.bit % 2 == 0 for lesion in LESIONS}
    bare = replace(
        sample.meta,
        labels=labels,
        lesions_annotated=annotated,
        findings=None,
        impression=None,
        regions_source=None,
    )
    batch = collate_samples([replace(sample, meta=bare), sample])
    assert batch.labels_known[0].tolist() == [value is not None for value in labels.values()]
    assert batch.labels[0].tolist() == [float(value or 0) for value in labels.values()]
    assert batch.lesions_annotated.tolist() == [
        [True, False, True, False, True],
        list(sample.meta.lesions_annotated.values()),
    ]
    assert batch.regions_known.tolist() == [False, True]
    assert batch.reports[0] is None
    assert batch.reports[1] is not None
    assert sample.meta.findings in batch.reports[1]
    assert batch.labels_known[1].all()
    assert torch.equal(batch.ct[0], torch.from_numpy(sample.ct))


def test_a_split_without_samples_is_refused(tmp_path: Path, tiny: Config) -> None:
    write_shards([phantom_sample(0, tiny)], tmp_path)
    with pytest.raises(UserError, match="'valid'"):
        ShardDataset(tiny.data.model_copy(update={"shards": str(tmp_path)}), "valid")


def test_the_loader_repeats_cases_whose_lesions_few_have_outlined(
    tiny: Config, tmp_path: Path
) -> None:
    samples = [phantom_sample(number, tiny) for number in range(4)]
    for number, sample in enumerate(samples):
        sample.lesions[:] = 0
        if number == 2:
            sample.lesions[4:8, 8:16, 8:16] = 1 << LESIONS[2].bit
    write_shards(samples, tmp_path, samples_per_shard=2)
    data = tiny.data.model_copy(update={"shards": str(tmp_path)})
    outlined = [location.outlined for location in ShardDataset(data, "train").locations]
    assert outlined == [(), (), (LESIONS[2].key,), ()]
    # √(1 / 0.25) = 2: an epoch has five samples, two of them the one with the outline.
    loader = build_train_loader(data, 1, 0, 1, seed=0, repeat_threshold=1.0)
    keys = [batch.keys[0] for batch in islice(loader, 5)]
    assert sorted(keys) == sorted([*(s.meta.key for s in samples), samples[2].meta.key])


def test_an_index_without_outlines_is_named_where_rare_ones_should_be_repeated(
    tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [phantom_sample(number, tiny) for number in range(2)]
    for sample in samples:
        sample.lesions[:] = 0
    write_shards(samples, tmp_path)
    data = tiny.data.model_copy(update={"shards": str(tmp_path)})
    build_train_loader(data, 1, 0, 1, seed=0, repeat_threshold=0.0)
    build_train_loader(data, 1, 1, 2, seed=0, repeat_threshold=0.4)
    assert not caplog.records
    build_train_loader(data, 1, 0, 1, seed=0, repeat_threshold=0.4)
    assert "lists no outlined lesion" in caplog.text and str(tmp_path) in caplog.text


def test_reports_of_like_length_share_a_micro_batch(tiny: Config, tmp_path: Path) -> None:
    """By the size of the metadata, which the index of any shards has."""
    samples = [phantom_sample(number, tiny) for number in range(6)]
    for number, sample in enumerate(samples):
        findings = "The lungs are clear. " * (1 + 5 * number % 6)
        sample.meta = replace(sample.meta, findings=findings, impression=None)
    write_shards(samples, tmp_path)
    data = tiny.data.model_copy(update={"shards": str(tmp_path)})
    keys, report_lengths = [], []
    for accumulation, sort_by_length in ((3, True), (3, False)):
        loader = build_train_loader(
            data, 2, 0, 1, seed=0, accumulation=accumulation, sort_by_length=sort_by_length
        )
        batches = list(islice(loader, 3))
        keys.append(sorted(key for batch in batches for key in batch.keys))
        reports = [report or "" for batch in batches for report in batch.reports]
        report_lengths.append([len(report) for report in reports])
    assert keys[0] == keys[1]
    assert report_lengths[0] == sorted(report_lengths[1]) != report_lengths[1]
